import functools
import itertools
import math
import sys

import pytest
import torch
from oracles import OPTIMIZERS, distance, loss_of, make_batches, make_model, same_bits, state_of
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from trainkit import accumulate, amp, train_step
from trainkit.core.update import Check, can_fuse

CPU = torch.device("cpu")
FUSED = [kind for kind in OPTIMIZERS if kind.endswith("fused")]
BATCHES = make_batches([4, 4, 2], torch.float32)


class Count(TorchDispatchMode):
    """Counts operations, and those of them that write into one of some tensors."""

    def __init__(self):
        super().__init__()
        self.ops = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.ops[name] = self.ops.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def counted(optimizer_of, *parts, weight=None, **options):
    """The operations of one update, the second."""
    model = make_model(torch.float32)

    @train_step(optimizer_of(model.parameters()), *parts, **options)
    def step(batch):
        return loss_of(model, batch) if weight is None else (loss_of(model, batch), weight)

    step(BATCHES[0])
    with Count() as count:
        step(BATCHES[1])
    return count.ops


class Passes(TorchDispatchMode):
    """Writes down every operation on gradients, with "r" where it reads them and "w" where it writes them; and every wait."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.waits = 0

    def watch(self, gradients):
        self.watched = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        self.found, self.waits = [], 0  # what was before is backward
        return gradients

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.waits += name == "_local_scalar_dense"
        arguments = {argument.name: argument for argument in func._schema.arguments}
        given = dict(zip(arguments, args, strict=False)) | (kwargs or {})
        touched = [
            arguments[name]
            for name, value in given.items()
            for item in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(item, torch.Tensor)
            and item.untyped_storage().data_ptr() in getattr(self, "watched", ())
        ]
        if touched:
            self.found.append(
                (
                    name,
                    "rw" if any(a.alias_info and a.alias_info.is_write for a in touched) else "r",
                )
            )
        return func(*args, **(kwargs or {}))


def passes(kind, *parts, generator=False, weight=None, **options):
    """The passes over the gradients in the update of one window, and its waits."""
    model = make_model(torch.float32)
    optimizer = kind(model.parameters())

    def returning(batch):
        return loss_of(model, batch) if weight is None else (loss_of(model, batch), weight)

    def yielding(batch):
        yield returning(batch)
        optimizer.step()

    step = train_step(optimizer, *parts, **options)(yielding if generator else returning)
    step(BATCHES[0])
    with Passes() as log, pytest.MonkeyPatch.context() as patch:
        found = step._gradients.found
        patch.setattr(step._gradients, "found", lambda: log.watch(found()))
        # On an accelerator it waits once for all; on a CPU, where it is no operation, the mode would not see it.
        patch.setattr(
            torch.Tensor,
            "tolist",
            lambda tensor: [tensor[0].item(), *map(float, tensor.numpy()[1:])],
        )
        step(BATCHES[1])
    return log.found, log.waits


FP16 = amp(dtype=torch.float16)
NORM, MULTIPLY = ("_foreach_norm", "r"), ("_foreach_mul_", "rw")


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
    name, _ = (
        log.found.pop()
    )  # the schema of the fused kernel has it write, which it does only where it unscales
    assert name == "_fused_sgd_" if fused else "_foreach_add_"
    assert [how for _, how in log.found] == ["rw", "r", "rw"] and log.waits == (not fused)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
@pytest.mark.parametrize("weight", [None, 3, torch.tensor(3)])
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}])
def test_a_fused_update_is_two_reads_one_write_and_no_wait(name, weight, options):
    kernel = (f"_fused_{name.lower()}_", "rw")
    fused = functools.partial(getattr(torch.optim, name), lr=0.01, fused=True)
    for parts in ([FP16], [FP16, accumulate(1)], [amp(dtype=torch.bfloat16)]):
        assert passes(fused, *parts, weight=weight, **options) == ([NORM, kernel], 0)
    # Where nothing asks for a norm, only the kernel is left.
    assert passes(fused, weight=weight) == ([kernel], 0)


@pytest.mark.parametrize("generator", [False, True])
def test_any_other_update_is_a_norm_one_multiplication_and_a_wait(generator):
    update = ("_foreach_add_", "r")
    assert passes(sgd, FP16, max_norm=1e-3, generator=generator) == ([NORM, MULTIPLY, update], 1)
    assert passes(sgd, FP16, generator=generator, weight=torch.tensor(3)) == (
        [NORM, MULTIPLY, update],
        1,
    )
    assert passes(sgd, max_norm=1e-3, generator=generator, weight=3) == (
        [NORM, MULTIPLY, update],
        1,
    )
    # None where their product is 1: no scale, a full window, and nothing to clip.
    assert passes(sgd, amp(dtype=torch.float32), generator=generator) == ([NORM, update], 1)
    assert passes(sgd, max_norm=1e9, generator=generator) == ([NORM, update], 1)
    # No norm where nothing asked for one; and then no wait.
    assert passes(sgd, generator=generator) == ([update], 0)
    assert passes(sgd, generator=generator, weight=4) == ([update], 0)
    assert passes(sgd, generator=generator, weight=3) == ([MULTIPLY, update], 0)


@pytest.mark.parametrize("kind", [kind for kind in FUSED if "dampening" not in kind])
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [None, 3, torch.tensor(3)])
def test_the_fused_path_reads_nothing_back_and_multiplies_no_gradient(kind, options, dtype, weight):
    ops = counted(OPTIMIZERS[kind], amp(dtype=dtype), weight=weight, **options)
    assert "_local_scalar_dense" not in ops and "_foreach_mul_" not in ops


def test_a_call_inside_a_window_adds_no_operation_but_detach():
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters()), accumulate(9), max_norm=1.0)(
        lambda batch: loss_of(model, batch)
    )
    step(BATCHES[0])
    with Count() as ours:
        step(BATCHES[1])
    with Count() as theirs:
        loss_of(model, BATCHES[1]).backward()
    # The loss that is kept, and the share of the micro-batch in place of the 1 that backward starts from otherwise.
    assert ours.ops.pop("detach") - theirs.ops.pop("detach", 0) == 1
    assert ours.ops.pop("full_like") == theirs.ops.pop("ones_like") == 1
    assert ours.ops == theirs.ops


def test_a_call_inside_a_window_is_few_calls_in_python():
    """What does not depend on the machine; each is 0.5 to 1 us after a model has been through the processor's caches."""
    model = make_model(torch.float32)
    plan = train_step(torch.optim.SGD(model.parameters()), accumulate(9), amp(dtype=torch.float32))
    step = plan(lambda: loss_of(model, BATCHES[0]))
    step(), step()
    called = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code) if event == "call" else None)
    try:
        step()
    finally:
        sys.setprofile(None)
    assert len([code for code in called if "trainkit" in code.co_filename]) <= 16


def peak(run):
    """The most bytes of tensors at a time while this runs, beyond those that were there before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    sizes = [
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("kind", ["AdamW", "AdamW fused", "SGD momentum fused", "SGD"])
@pytest.mark.parametrize("weight", [None, 3])
def test_an_update_takes_no_more_memory_than_by_hand(kind, weight):
    model, theirs = torch.nn.Linear(500, 500), torch.nn.Linear(500, 500)
    optimizer, other = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](theirs.parameters())
    step = train_step(optimizer, FP16, max_norm=0.1)
    scaler = torch.amp.GradScaler("cpu")

    def by_hand():
        scaler.unscale_(other)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        scaler.step(other)
        scaler.update()
        other.zero_grad()

    for _ in range(2):  # the first of them makes the optimizers' states
        scaler.scale(theirs(torch.ones(4, 500)).mean()).backward()
        taken_by_hand = peak(by_hand)
        step.__enter__()
        step.backward(model(torch.ones(4, 500)).float().mean(), weight)
        taken = peak(lambda: step.__exit__(None, None, None))
    assert taken <= taken_by_hand + 1_000  # the gradient of the weight is a million bytes


def test_the_fused_path_is_refused_where_it_would_not_be_exact():
    parameters = list(make_model(torch.float32).parameters())
    gradients = [torch.zeros_like(p) for p in parameters]

    class Own(torch.optim.AdamW):
        pass

    def fused(optimizer):
        return can_fuse([optimizer], gradients)

    adamw = torch.optim.AdamW(parameters, fused=True)
    assert (
        fused(adamw)
        and not can_fuse([adamw], [])
        and not can_fuse([adamw], [g.double() for g in gradients])
    )
    assert not fused(torch.optim.AdamW(parameters)) and not fused(Own(parameters, fused=True))
    assert not fused(torch.optim.SGD(parameters, momentum=0.9, dampening=0.1, fused=True))
    assert fused(torch.optim.SGD(parameters, momentum=0.9, fused=True))
    torch.optim.lr_scheduler.StepLR(adamw, 1)
    assert fused(adamw)
    handle = adamw.register_step_pre_hook(lambda *_: None)
    assert not fused(adamw)
    handle.remove()
    handle = register_optimizer_step_post_hook(lambda *_: None)
    assert not fused(adamw)
    handle.remove()
    assert fused(adamw)
    adamw.load_state_dict(torch.optim.AdamW(parameters).state_dict())
    assert not fused(adamw)
    adamw = torch.optim.AdamW(parameters, fused=True)
    adamw.step = lambda: None
    assert not fused(adamw)


@pytest.mark.parametrize("kind", FUSED)
def test_a_first_step_that_overflows_leaves_everything_usable(kind):
    model, expected = make_model(torch.float32), make_model(torch.float32)
    optimizer, theirs = (
        OPTIMIZERS[kind](model.parameters()),
        OPTIMIZERS[kind.removesuffix(" fused")](expected.parameters()),
    )
    step = train_step(optimizer, max_norm=math.inf)(
        lambda batch, scale: loss_of(model, batch) * scale
    )
    before = [p.clone() for p in model.parameters()]
    assert not step(BATCHES[0], math.inf).updated and same_bits(before, list(model.parameters()))
    for batch in BATCHES:
        step(batch, 1.0)
        loss_of(expected, batch).backward()
        theirs.step()
        theirs.zero_grad()
    assert distance(list(model.parameters()), list(expected.parameters())) <= 1e-5


def test_a_parameter_may_join_fused_sgd_with_momentum_later():
    model = make_model(torch.float32)
    model[0].requires_grad_(False)
    step = train_step(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True), max_norm=1.0
    )(lambda b: loss_of(model, b))
    step(BATCHES[0])
    model[0].requires_grad_(True)
    before = model[0].weight.clone()
    assert step(BATCHES[1]).updated and not torch.equal(before, model[0].weight)


@pytest.mark.parametrize(
    "name", ["update._foreach_norm", "update._foreach_mul_", "scaler._amp_update_scale_"]
)
@pytest.mark.parametrize("kind", ["AdamW", "AdamW fused"])
def test_without_a_private_function_of_torch_the_result_is_the_same(name, kind, monkeypatch):
    states = []
    for present in (True, False):
        if not present:
            monkeypatch.setattr(f"trainkit.{name}", None)
        model = make_model(torch.float32)
        optimizer = OPTIMIZERS[kind](model.parameters())
        step = train_step(
            optimizer, accumulate(2), amp(dtype=torch.float16, growth_interval=1), max_norm=0.1
        )(lambda batch, model=model: loss_of(model, batch))
        for batch in step.over(BATCHES):
            step(batch)
        states.append((state_of(model, optimizer), step.state_dict()))
    assert distance(states[0][0], states[1][0]) <= 1e-6 and states[0][1] == states[1][1]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_the_norm_is_accumulated_in_float32_whatever_the_gradients_are(norm_type):
    gradients = [
        torch.full((300, 300), 300.0, dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    ]
    expected = torch.linalg.vector_norm(
        torch.cat([g.double().flatten() for g in gradients]), norm_type
    )
    for chosen in (gradients, gradients[:1] * 3, gradients[1:2] * 3):
        norm = Check(1.0, norm_type, CPU).norm(chosen)
        # torch itself adds 90,000 squares in float32 to no better than this.
        assert norm.dtype == torch.float32 and math.isclose(
            norm.item(), expected.item(), rel_tol=1e-4
        )


def test_a_gradient_of_nan_or_infinity_is_never_applied():
    for value, norm_type in (
        (math.nan, 1),
        (math.nan, 2),
        (math.nan, math.inf),
        (math.inf, 1),
        (-math.inf, 2),
        (math.inf, math.inf),
    ):
        for kind in ("AdamW", "AdamW fused"):
            model = make_model(torch.float32)
            before = [p.clone() for p in model.parameters()]
            step = train_step(
                OPTIMIZERS[kind](model.parameters()), max_norm=1.0, norm_type=norm_type
            )(
                lambda model=model, value=value: (
                    loss_of(model, BATCHES[0]) + value * model[0].bias[0]
                )
            )
            assert not step().updated and same_bits(before, list(model.parameters()))


def test_an_update_without_any_gradient_is_an_update_of_nothing():
    model = make_model(torch.float32)
    extra = torch.nn.Parameter(torch.ones(1))
    for kind in ("AdamW", "AdamW fused"):
        step = train_step(
            OPTIMIZERS[kind](model.parameters()), amp(dtype=torch.float16), max_norm=1.0
        )(lambda: extra.sum())
        assert step().updated and step.updates == 1


@pytest.mark.parametrize("kind", ["SGD", "SGD momentum fused"])
def test_clipping_is_that_of_torch_for_tiny_gradients_too(kind):
    model, expected = make_model(torch.float32), make_model(torch.float32)
    optimizer, theirs = (
        OPTIMIZERS[kind](model.parameters()),
        OPTIMIZERS[kind](expected.parameters()),
    )
    for group in (*optimizer.param_groups, *theirs.param_groups):
        group.update(lr=1e6, weight_decay=0.0)
    train_step(optimizer, max_norm=1e-6)(lambda: loss_of(model, BATCHES[0]) * 1e-5)()
    (loss_of(expected, BATCHES[0]) * 1e-5).backward()
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 1e-6)
    theirs.step()
    assert distance(list(model.parameters()), list(expected.parameters())) <= 1e-5


def test_parameters_of_half_precision_take_the_fused_path_too():
    model, expected = make_model(torch.bfloat16), make_model(torch.bfloat16)
    batches = make_batches([4, 4, 4, 4], torch.bfloat16)
    step = train_step(
        torch.optim.AdamW(model.parameters(), fused=True), accumulate(2), max_norm=0.1
    )(lambda b: loss_of(model, b))
    theirs = torch.optim.AdamW(expected.parameters(), fused=True)
    for start in (0, 2):
        for batch in batches[start : start + 2]:
            step(batch)
            (loss_of(expected, batch) / 2).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        theirs.step()
        theirs.zero_grad()
    assert (
        step.updates == 2
        and distance(list(model.parameters()), list(expected.parameters())) <= 1e-2
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_several_dtypes_are_clipped_by_one_norm(fused, other):
    slopes = [torch.full((3,), 2.0), torch.full((5,), 4.0, dtype=other)]
    parameters = [torch.nn.Parameter(torch.zeros_like(slope)) for slope in slopes]
    step = train_step(torch.optim.SGD(parameters, lr=1.0, fused=fused), accumulate(2), max_norm=1.0)
    for _ in range(2):
        with step as result:
            step.backward(
                sum((p * slope).sum().float() for p, slope in zip(parameters, slopes, strict=True)),
                7,
            )
    norm = math.sqrt(3 * 2.0**2 + 5 * 4.0**2)
    assert math.isclose(result.grad_norm.item(), norm, rel_tol=1e-6)
    for parameter, slope in zip(parameters, slopes, strict=True):
        assert torch.allclose(
            parameter,
            -slope / (norm + 1e-6),
            rtol=max(4 * torch.finfo(parameter.dtype).eps, 1e-6),
            atol=0,
        )


def test_an_empty_parameter_has_no_part_in_the_norm():
    model = make_model(torch.float32)
    empty = torch.nn.Parameter(torch.zeros(0))
    optimizer = torch.optim.AdamW([*model.parameters(), empty], fused=True)
    step = train_step(optimizer, max_norm=1.0, norm_type=math.inf)(
        lambda: loss_of(model, BATCHES[0]) + empty.sum()
    )
    assert step().updated
