"""The update: GradScaler and clip_grad_norm_ in one number, skips, and what comes after."""

import functools
import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    OPTIMIZERS,
    distance,
    loss_of,
    make_batches,
    make_model,
    same_bits,
    scaler_loop,
    state_of,
)
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from trainkit import accumulate, amp, train_step
from trainkit.core.fused import can_fuse, total_norm
from trainkit.core.plan import Plan
from trainkit.core.update import Answer, Updater
from trainkit.core.window import Window

FUSED = [kind for kind in OPTIMIZERS if kind.endswith("fused")]
BATCHES = make_batches([4, 4, 2], torch.float32)
FP16 = amp(dtype=torch.float16)
NAN = (torch.full((4, 4), math.nan), torch.zeros(4, 3))


def parameters_of(model):
    return [p.detach().clone() for p in model.parameters()]


# Against GradScaler and clip_grad_norm_, written out in oracles.py.


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_an_update_is_that_of_a_scaler_and_of_clipping_by_hand(kind, max_norm):
    """The first updates overflow, and the scale grows again after them."""
    batches = make_batches([4] * 16, torch.float32)
    model, expected = make_model(torch.float32), make_model(torch.float32)
    optimizer = OPTIMIZERS[kind](model.parameters())
    theirs = OPTIMIZERS[kind.removesuffix(" fused")](expected.parameters())
    scaled = amp(dtype=torch.float16, init_scale=2.0**19, growth_interval=3)
    options = {"dtype": torch.float16, "init_scale": 2.0**19, "growth_interval": 3}
    step = train_step(optimizer, accumulate(2), scaled, max_norm=max_norm)
    step = step(lambda batch: loss_of(model, batch))
    scales = []
    for batch in step.over(batches):
        if step(batch).complete:
            scales.append(step.state_dict()["loss_scale"])
    assert scales == scaler_loop(expected, theirs, batches, 2, max_norm=max_norm, **options)
    assert scales[0] < 2.0**19 and sorted(scales, reverse=True) != scales and step.skipped >= 1
    assert distance(parameters_of(model), parameters_of(expected)) <= 1e-4


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 3), st.booleans())
def test_the_loss_scale_follows_the_rule_of_grad_scaler(overflows, interval, fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=interval)
    ours, theirs = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([theirs], lr=0.0)
    part = amp(dtype=torch.float16, init_scale=1024.0, growth_interval=interval)
    step = train_step(torch.optim.SGD([ours], lr=0.0, fused=fused), part)
    step = step(lambda factor: ours.sum() * factor)
    for overflow in overflows:
        factor = math.inf if overflow else 1.0
        scaler.scale(theirs.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert step(factor).updated is not overflow
        state = step.state_dict()
        assert state["loss_scale"] == scaler.get_scale()
        assert state["growth_tracker"] == scaler._get_growth_tracker()


def test_a_half_precision_loss_is_scaled_in_float32():
    model = make_model(torch.float32)
    step = train_step(
        torch.optim.SGD(model.parameters(), lr=0.1),
        accumulate(4),
        amp(dtype=torch.float16, init_scale=2.0**17),
    )(lambda batch: loss_of(model, batch).half())
    assert [step(BATCHES[0]).updated for _ in range(4)] == [False, False, False, True]


@pytest.mark.parametrize("kind", ["SGD", "SGD momentum fused"])
def test_clipping_is_that_of_torch_for_tiny_gradients_too(kind):
    model, expected = make_model(torch.float32), make_model(torch.float32)
    optimizer = OPTIMIZERS[kind](model.parameters())
    theirs = OPTIMIZERS[kind](expected.parameters())
    for group in (*optimizer.param_groups, *theirs.param_groups):
        group.update(lr=1e6, weight_decay=0.0)
    train_step(optimizer, max_norm=1e-6)(lambda: loss_of(model, BATCHES[0]) * 1e-5)()
    (loss_of(expected, BATCHES[0]) * 1e-5).backward()
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 1e-6)
    theirs.step()
    assert distance(parameters_of(model), parameters_of(expected)) <= 1e-5


# Passes over the gradients.


class Passes(TorchDispatchMode):
    """Logs every operation on gradients, "r" where it reads and "rw" where it writes; and waits."""

    def __init__(self):
        super().__init__()
        self.found, self.waits, self.watched, self.all = [], 0, set(), []

    def watch(self, gradients):
        self.watched = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        self.found, self.waits = [], 0  # before this came backward
        return gradients

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.all.append(name)
        self.waits += name == "_local_scalar_dense"
        arguments = {argument.name: argument for argument in func._schema.arguments}
        touched = [
            arguments[name]
            for name, value in (
                {**dict(zip(arguments, args, strict=False)), **(kwargs or {})}
            ).items()
            for item in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(item, torch.Tensor) and item.untyped_storage().data_ptr() in self.watched
        ]
        if touched:
            writes = any(a.alias_info and a.alias_info.is_write for a in touched)
            self.found.append((name, "rw" if writes else "r"))
        return func(*args, **(kwargs or {}))


def passes(kind, *parts, face="return", weight=None, **options):
    """The passes over the gradients in the update of one window, and its waits."""
    model = make_model(torch.float32)
    optimizer = kind(model.parameters())

    def returning(batch):
        return loss_of(model, batch) if weight is None else (loss_of(model, batch), weight)

    def yielding(batch):
        yield returning(batch)
        optimizer.step()

    step = train_step(optimizer, *parts, **options)(yielding if face == "yield" else returning)
    step(BATCHES[0])
    with Passes() as log, pytest.MonkeyPatch.context() as patch:
        close = Window.close
        patch.setattr(Window, "close", lambda window, ps: log.watch(close(window, ps)))
        # An accelerator waits once for a whole list, and a CPU never: here it counts as one wait.
        patch.setattr(
            torch.Tensor,
            "tolist",
            lambda tensor: [tensor[0].item(), *map(float, tensor.numpy()[1:])],
        )
        step(BATCHES[1])
    return log.found, log.waits


NORM, MULTIPLY, UPDATE = ("_foreach_norm", "r"), ("_foreach_mul_", "rw"), ("_foreach_add_", "r")


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, foreach=True)


@pytest.mark.parametrize("fused", [False, True])
def test_by_hand_it_is_four_reads_and_two_writes(fused):
    """And a wait, unless the optimizer is fused; counted in the same way."""
    model = make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), foreach=not fused, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, BATCHES[0])).backward()
    with Passes() as log:
        log.watch([p.grad for p in model.parameters()])
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
    name, _ = log.found.pop()  # by its schema the fused kernel writes; it does where it unscales
    assert name == ("_fused_sgd_" if fused else "_foreach_add_")
    assert [how for _, how in log.found] == ["rw", "r", "rw"] and log.waits == (not fused)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
@pytest.mark.parametrize("weight", [None, 3, torch.tensor(3)])
def test_a_fused_update_is_two_reads_one_write_and_no_wait(name, weight):
    kernel = (f"_fused_{name.lower()}_", "rw")
    fused = functools.partial(getattr(torch.optim, name), lr=0.01, fused=True)
    for parts, options in itertools.product(
        ([FP16], [FP16, accumulate(1)], [amp(dtype=torch.bfloat16)]), ({}, {"max_norm": 0.1})
    ):
        assert passes(fused, *parts, weight=weight, **options) == ([NORM, kernel], 0)
    assert passes(fused, weight=weight) == ([kernel], 0)  # nothing asks for a norm


@pytest.mark.parametrize("face", ["return", "yield"])
def test_any_other_update_is_a_norm_one_multiplication_and_a_wait(face):
    count = functools.partial(passes, sgd, face=face)
    assert count(FP16, max_norm=1e-3) == ([NORM, MULTIPLY, UPDATE], 1)
    assert count(FP16, weight=torch.tensor(3)) == ([NORM, MULTIPLY, UPDATE], 1)
    assert count(max_norm=1e-3, weight=3) == ([NORM, MULTIPLY, UPDATE], 1)
    # No multiplication by 1: no scale, a full window, and nothing to clip.
    assert count(amp(dtype=torch.float32)) == ([NORM, UPDATE], 1)
    assert count(max_norm=1e9) == ([NORM, UPDATE], 1)
    # No norm where nothing asks for one; and then no wait.
    assert count() == ([UPDATE], 0) and count(weight=4) == ([UPDATE], 0)
    assert count(weight=3) == ([MULTIPLY, UPDATE], 0)


def test_a_call_inside_a_window_adds_no_operation_but_detach():
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters()), accumulate(9), max_norm=1.0)(
        lambda batch: loss_of(model, batch)
    )
    step(BATCHES[0])
    with Passes() as ours:
        step(BATCHES[1])
    loss_of(model, BATCHES[0]).backward()
    with Passes() as theirs:
        loss_of(model, BATCHES[1]).backward()
    # The share is in place of the 1 that backward starts from. Torch 2.6 detaches the loss twice.
    ours.all[ours.all.index("full_like")] = "ones_like"
    ours, theirs = (Counter(p.all) for p in (ours, theirs))
    added = ours - theirs
    assert set(added) == {"detach"} and ours - added == theirs


def peak(run):
    """The most bytes of tensors at a time while this runs, beyond those before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))


@pytest.mark.parametrize("kind", ["AdamW", "SGD momentum fused"])
@pytest.mark.parametrize("weight", [None, 3])
def test_an_update_takes_no_more_memory_than_by_hand(kind, weight):
    model, theirs = nn.Linear(500, 500), nn.Linear(500, 500)
    optimizer, other = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](theirs.parameters())
    step, scaler = train_step(optimizer, FP16, max_norm=0.1), torch.amp.GradScaler("cpu")

    def by_hand():
        scaler.unscale_(other)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        scaler.step(other)
        scaler.update()
        other.zero_grad()

    for _ in range(2):  # the first makes the states of the optimizers
        scaler.scale(theirs(torch.ones(4, 500)).mean()).backward()
        taken_by_hand = peak(by_hand)
        step.__enter__()
        step.backward(model(torch.ones(4, 500)).float().mean(), weight)
        taken = peak(lambda: step.__exit__(None, None, None))
    assert taken <= taken_by_hand + 1_000  # the gradient of the weight is a million bytes


# The fused path.


def test_the_fused_path_is_refused_where_it_would_not_be_exact():
    parameters = list(make_model(torch.float32).parameters())
    gradients = [torch.zeros_like(p) for p in parameters]

    class Own(torch.optim.AdamW):
        pass

    def fused(*optimizers):
        return can_fuse(optimizers, gradients)

    def make():
        return torch.optim.AdamW(parameters, fused=True)

    adamw = make()
    assert fused(adamw) and not can_fuse([adamw], [])
    assert not can_fuse([adamw], [g.double() for g in gradients])
    assert not fused(torch.optim.AdamW(parameters)) and not fused(Own(parameters, fused=True))
    assert not fused(torch.optim.SGD(parameters, momentum=0.9, dampening=0.1, fused=True))
    assert fused(torch.optim.SGD(parameters, momentum=0.9, fused=True))
    # A kernel writes back what it divided, and a second one would divide it again.
    assert not fused(adamw, make())
    assert fused(*(torch.optim.AdamW([p], fused=True) for p in parameters))
    torch.optim.lr_scheduler.StepLR(adamw, 1)
    assert fused(adamw)
    for register in (
        adamw.register_step_pre_hook,
        adamw.register_step_post_hook,
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert not fused(adamw)
        handle.remove()
        assert fused(adamw)
    adamw.load_state_dict(torch.optim.AdamW(parameters).state_dict())
    assert not fused(adamw)
    adamw = make()
    adamw.step = lambda: None
    assert not fused(adamw)


def test_nothing_told_to_a_fused_optimizer_outlives_the_update():
    """What is left behind makes the next GradScaler.step raise."""
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = train_step(optimizer, FP16, max_norm=0.1)(lambda batch: loss_of(model, batch))
    for batch in (BATCHES[0], NAN):
        step(batch)
        assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


@pytest.mark.parametrize("kind", FUSED)
def test_a_first_step_that_overflows_leaves_everything_usable(kind):
    model, expected = make_model(torch.float32), make_model(torch.float32)
    optimizer = OPTIMIZERS[kind](model.parameters())
    theirs = OPTIMIZERS[kind.removesuffix(" fused")](expected.parameters())
    step = train_step(optimizer, max_norm=math.inf)(
        lambda batch, scale: loss_of(model, batch) * scale
    )
    before = parameters_of(model)
    assert not step(BATCHES[0], math.inf).updated and same_bits(before, parameters_of(model))
    for batch in BATCHES:
        step(batch, 1.0)
        loss_of(expected, batch).backward()
        theirs.step()
        theirs.zero_grad()
    assert distance(parameters_of(model), parameters_of(expected)) <= 1e-5


# The norm.


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_the_norm_is_accumulated_in_float32_whatever_the_gradients_are(norm_type):
    dtypes = torch.float16, torch.bfloat16, torch.float32
    gradients = [torch.full((300, 300), 300.0, dtype=dtype) for dtype in dtypes]
    flat = torch.cat([g.double().flatten() for g in gradients])
    expected = torch.linalg.vector_norm(flat, norm_type).item()
    for chosen in (gradients, gradients[:1] * 3, gradients[1:2] * 3):
        norm = total_norm(chosen, norm_type, torch.zeros(()))
        # torch itself adds 90,000 squares in float32 to no better than this.
        assert norm.dtype == torch.float32 and math.isclose(norm.item(), expected, rel_tol=1e-4)


@pytest.mark.parametrize("kind", ["AdamW", "AdamW fused"])
@pytest.mark.parametrize("face", ["return", "yield"])
@pytest.mark.parametrize("norm_type", [1, 2, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_of_nan_or_infinity_is_never_applied(value, norm_type, kind, face):
    model = make_model(torch.float32)
    optimizer = OPTIMIZERS[kind](model.parameters())

    def returning():
        return loss_of(model, BATCHES[0]) + value * model[0].bias[0]

    def yielding():
        yield returning()
        optimizer.step()

    function = yielding if face == "yield" else returning
    step = train_step(optimizer, max_norm=1.0, norm_type=norm_type)(function)
    before = state_of(model, optimizer)[:4]
    result = step()
    assert result.complete and not result.updated and not result.grad_norm.isfinite()
    assert same_bits(before, parameters_of(model)) and all(
        p.grad is None for p in model.parameters()
    )
    assert (step.updates, step.skipped) == (0, 1)


@pytest.mark.parametrize("kind", ["AdamW", "AdamW fused"])
def test_an_update_without_any_gradient_is_an_update_of_nothing(kind):
    model, extra = make_model(torch.float32), nn.Parameter(torch.ones(1))
    step = train_step(OPTIMIZERS[kind](model.parameters()), FP16, max_norm=1.0)(lambda: extra.sum())
    before = parameters_of(model)
    with pytest.warns(UserWarning, match="only 0 of 4"):
        assert not step().updated and step.updates == 1
    assert same_bits(before, parameters_of(model))


@pytest.mark.parametrize("fused", [False, True])
def test_an_empty_parameter_has_no_part_in_the_norm(fused):
    model, empty = make_model(torch.float32), nn.Parameter(torch.zeros(0))
    optimizer = torch.optim.AdamW([*model.parameters(), empty], fused=fused)
    for norm_type in (1, math.inf):
        step = train_step(optimizer, max_norm=1.0, norm_type=norm_type)
        assert step(lambda: loss_of(model, BATCHES[0]) + empty.sum())().updated


# Skips in a row.


@pytest.fixture
def reads(monkeypatch):
    """How often the host reads a number of the device."""
    found = []
    monkeypatch.setattr(
        Answer, "read", lambda answer, read=Answer.read: found.append(1) or read(answer)
    )
    return found


def updater(max_skips):
    """An updater that learns of skips without a step around it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    return Updater(Plan(optimizers=(optimizer,), max_norm=1.0, max_skips=max_skips), False)


GOOD, BAD = torch.zeros(()), torch.ones(())


def test_skips_are_counted_when_they_could_be_too_many(reads):
    learn = updater(5).learn
    assert [learn(BAD) for _ in range(4)] == [0] * 4 and not reads
    assert not learn(GOOD) and len(reads) == 1
    for _ in range(20):
        learn(GOOD)
    assert len(reads) == 5
    assert [learn(found) for found in [GOOD, GOOD, BAD, BAD, BAD]] == [0] * 5
    assert not learn(GOOD)  # not looked at: two more could be the limit
    assert [learn(BAD) for _ in range(5)] == [0] * 4 + [5]


def test_skips_are_known_late_where_the_device_is_and_by_all_ranks_at_the_same_time(monkeypatch):
    arrived = []
    monkeypatch.setattr(Answer, "known", lambda _: bool(arrived))
    alone, together = updater(3), updater(3)
    together.lag = 4
    told = [(alone.learn(BAD), together.learn(BAD)) for _ in range(7)]
    assert told == [(0, 0)] * 6 + [(0, 3)]
    arrived.append(1)
    assert alone.learn(BAD) == 3


@pytest.mark.parametrize("kind", ["AdamW", "AdamW fused"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_updates_skipped_in_a_row_are_an_error_that_says_where(kind, dtype):
    model = make_model(torch.float32)
    parts = accumulate(2), amp(dtype=dtype)

    @train_step(OPTIMIZERS[kind](model.parameters()), *parts, module=model, max_skips=3)
    def step(batch, bad):
        hidden = model[:2](batch[0])
        if bad:
            hidden.register_hook(lambda gradient: gradient * math.inf)
        return F.mse_loss(model[2](hidden), batch[1])

    def window(bad):
        step(BATCHES[0], False)
        return step(BATCHES[1], bad).updated

    # Two in a row, an update, and two that are the first in a row again.
    assert [window(bad) for bad in (0, 1, 1, 0, 1, 1)] == [True, False, False, True, False, False]
    before = parameters_of(model)
    with pytest.raises(FloatingPointError) as found:
        window(True)
    message = str(found.value)
    for words in ("3 updates in a row", "2 of 4 parameters", "'0.weight'", "number 2"):
        assert words in message
    assert ("the loss scale is 2048" in message) is (dtype == torch.float16)
    assert same_bits(before, parameters_of(model)) and all(
        p.grad is None for p in model.parameters()
    )
    assert (step.updates, step.skipped) == (2, 5)
    assert window(False)


def test_max_skips_is_25_unless_it_is_given_and_infinity_is_no_limit():
    good, bad = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [good]}, {"params": [bad]}], lr=0.1)

    @train_step(optimizer, max_norm=1.0)
    def step(factor):
        return (good + bad).sum() * 0 + (bad * factor).sum()

    for _ in range(24):
        step(math.nan)
    with pytest.raises(FloatingPointError, match=r"25 updates .* of 2 parameters"):
        step(math.nan)
    bad.data.fill_(math.nan)
    for _ in range(24):  # they are counted anew after the error
        step(math.nan)
    with pytest.raises(FloatingPointError, match="not finite itself"):
        step(math.nan)
    forever = train_step(optimizer, max_norm=1.0, max_skips=math.inf)(lambda: bad.sum() * math.nan)
    for _ in range(300):
        forever()
    assert forever.skipped == 300


def test_gradients_whose_norm_alone_is_not_finite():
    weight = nn.Parameter(torch.ones(2))
    step = train_step(torch.optim.SGD([weight], lr=0.1), max_norm=1.0, max_skips=1)(
        lambda: (weight * 3e38).sum()
    )
    with pytest.raises(FloatingPointError, match="finite, but their norm is not"):
        step()


def test_windows_without_weight_are_not_bad():
    weight = nn.Parameter(torch.ones(2))
    step = train_step(torch.optim.SGD([weight], lr=0.1), max_norm=1.0, max_skips=2)(
        lambda w: (weight.sum(), w)
    )
    for _ in range(5):
        assert not step(0).updated and not step(torch.tensor(0)).updated


def test_a_streak_is_over_where_a_state_is_loaded_and_sparse_gradients_are_named():
    table = nn.Embedding(3, 2, sparse=True)
    step = train_step(torch.optim.SGD(table.parameters(), lr=0.1), max_norm=1.0, max_skips=2)(
        lambda: table(torch.tensor([1])).sum() * math.nan
    )
    step()
    step.load_state_dict(step.state_dict())
    step()
    with pytest.raises(FloatingPointError, match="1 of 1 parameters"):
        step()


# after, and a verdict that comes late, as from an accelerator.


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_after_runs_once_for_each_applied_update(fused, late, monkeypatch):
    """Never after a skipped one: pytorch#67590, accelerate#4242."""
    if late:
        monkeypatch.setattr(Answer, "known", lambda answer: False)
    model, calls = make_model(torch.float32), []
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    after = [lambda: calls.append("a"), lambda: calls.append("b")]
    step = train_step(optimizer, amp(dtype=torch.float32), after=after)
    step = step(lambda batch: loss_of(model, batch))
    assert step(BATCHES[0]).updated and calls == ["a", "b"]
    assert not step(NAN).updated and calls == ["a", "b"]
    assert step(BATCHES[0]).updated and calls == ["a", "b"] * 2
    assert (step.updates, step.skipped) == (2, 1)


def counting_scheduler(optimizer, calls):
    class Counting(torch.optim.lr_scheduler.ConstantLR):
        def step(self):
            super().step()
            calls.append(1)

    scheduler = Counting(optimizer)
    calls.clear()
    return scheduler


def test_a_scheduler_does_not_wait_and_has_run_before_the_next_update(monkeypatch, reads):
    arrived = []
    monkeypatch.setattr(Answer, "known", lambda answer: bool(arrived))
    model, calls = make_model(torch.float32), []
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scheduler = counting_scheduler(optimizer, calls)
    step = train_step(optimizer, accumulate(2), max_norm=1.0, after=scheduler.step)
    step = step(lambda batch: loss_of(model, batch))
    seen = []
    for _ in range(4):
        step(BATCHES[0])
        seen.append((len(calls), len(reads)))
    assert seen == [(0, 0), (0, 0), (0, 0), (1, 1)]  # the verdict is read by the next update alone
    arrived.append(1)
    step(BATCHES[0])
    assert len(calls) == 2
    arrived.clear()
    step(BATCHES[0])
    assert len(calls) == 2 and step.updates == 3 and len(calls) == 3  # reading updates runs it
    for batch in step.over(BATCHES[:2]):
        result = step(batch)
    assert len(calls) == 4 and result.updated


@pytest.mark.parametrize("several", [False, True])
def test_what_changes_the_model_after_an_update_has_run_when_the_call_returns(monkeypatch, several):
    """A clamp, a teacher or an average may be read by any forward that follows."""
    monkeypatch.setattr(Answer, "known", lambda answer: False)
    calls, late, model = [], [], make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters())
    after = [counting_scheduler(optimizer, late).step, lambda: calls.append(1)]
    step = train_step(optimizer, accumulate(2), after=after if several else after[1:])
    step = step(lambda batch: loss_of(model, batch))
    for n in (1, 2):
        step.last(BATCHES[0]) if n == 1 else (step(BATCHES[0]), step.close())
        assert len(calls) == n and len(late) == n * several


@pytest.mark.parametrize("read", [lambda step, result: step.settle(), lambda s, r: r.updated])
def test_after_is_owed_until_the_wait_for_the_verdict_is_over(monkeypatch, model, optimizer, read):
    """A slow device is interrupted in that wait, and the scheduler must not miss the update."""
    calls = []
    scheduler = counting_scheduler(optimizer, calls)
    step = train_step(optimizer, after=scheduler.step)(lambda batch: loss_of(model, batch))
    monkeypatch.setattr(Answer, "known", lambda answer: False)
    result = step(make_batches([4])[0])
    with monkeypatch.context() as patch:
        patch.setattr(Answer, "read", lambda answer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            read(step, result)
    assert calls == []
    read(step, result)
    assert calls == [1] and step.updates == 1 and calls == [1]
