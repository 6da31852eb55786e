"""Loops that do not train say so, once; and loops that train in their own way hear nothing."""

import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from trainkit import accumulate, freeze, frozen, train_step, trainable_parameters, unfreeze


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def heard(loop):
    """Return the warnings of a loop."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop()
    return [str(warning.message) for warning in caught]


def trained(optimizer, model, below, windows=10, n=1):
    """Run windows of a step that yields; return what it said, and ``updated`` of each window."""

    @train_step(optimizer, accumulate(n), module=model)
    def step(x):
        yield model(x).square().mean()
        below()

    updated = []

    def loop():
        for _ in range(windows * n):
            result = step(torch.ones(2, 3))
            updated.extend([result.updated] * result.complete)

    said = heard(loop)
    return said, updated


# Below the yield


def test_a_yield_with_nothing_below_it_updates_nothing_and_says_so_in_the_first_window():
    model = net()

    @train_step(SGD(model.parameters(), lr=0.1))
    def step(x):
        yield model(x).mean()

    updated = []
    said = heard(lambda: updated.extend(step(torch.ones(2, 3)).updated for _ in range(3)))
    assert updated == [False] * 3
    (one,) = said
    assert "below `yield loss`" in one and "`optimizer.step()`" in one


@pytest.mark.parametrize("lost", ["not called", "after zero_grad"])
def test_an_update_that_never_moves_anything_is_said_late_and_once(lost):
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)

    def below():
        optimizer.zero_grad()
        if lost == "after zero_grad":
            optimizer.step()

    said, updated = trained(optimizer, model, below)
    assert updated == [False] * 10 and len(said) == 1 and "`optimizer.step()`" in said[0]


def test_an_optimizer_made_anew_is_named():
    model = net()
    old, new = AdamW(model[2].parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)
    said, updated = trained(old, model, new.step, windows=3)
    assert updated == [True] * 3 and len(said) == 1
    assert "SGD stepped in place of the AdamW" in said[0] and "`train_step(optimizer)`" in said[0]


class Duck:
    """An optimizer that is no torch.optim.Optimizer, around one."""

    def __init__(self, inner):
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)

    def step(self):
        self.inner.step()

    def zero_grad(self):
        self.inner.zero_grad()

    def state_dict(self):
        return self.inner.state_dict()


class ByHand(Duck):
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= 0.1 * p.grad


class Wrapper(torch.optim.Optimizer):
    """As SAM and Lookahead are written; ``second_step`` steps the base without ``self.step``."""

    def __init__(self, base):
        super().__init__(base.param_groups, base.defaults)
        self.base, self.param_groups = base, base.param_groups

    def step(self, closure=None):
        self.base.step()

    def second_step(self):
        self.base.step()


class Uninitialised(torch.optim.Optimizer):
    """As the AcceleratedOptimizer: a torch.optim.Optimizer without its hooks."""

    def __init__(self, base):
        self.base, self.param_groups, self.defaults = base, base.param_groups, base.defaults
        self.state = base.state

    def step(self, closure=None):
        self.base.step()


def data_by_hand(model, optimizer):
    for p in model.parameters():
        p.data -= 1e-6 * p.grad


@torch.no_grad()
def add_by_hand(model, optimizer):
    for p in model.parameters():
        p.add_(p.grad, alpha=-0.1)


def every(n, begin=0):
    calls = iter(range(begin, 100))
    return lambda model, optimizer: optimizer.step() if next(calls) % n == 0 else None


WAYS = {
    "its own": (lambda o: o, lambda m, o: o.step()),
    "p.data": (lambda o: o, data_by_hand),
    "add_": (lambda o: o, add_by_hand),
    "duck": (Duck, lambda m, o: o.step()),
    "duck by hand": (ByHand, lambda m, o: o.step()),
    "inside a duck": (lambda o: o, lambda m, o: Duck(o).step()),
    "inside a wrapper": (lambda o: o, lambda m, o: Wrapper(o).step()),
    "wrapper": (Wrapper, lambda m, o: o.step()),
    "its base": (Wrapper, lambda m, o: o.second_step()),
    "without hooks": (Uninitialised, lambda m, o: o.step()),
    "GradScaler": (
        lambda o: o,
        lambda m, o: torch.amp.GradScaler("cpu", enabled=False).step(o),
    ),
}


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_whatever_trains_below_the_yield_is_an_update_and_hears_nothing(way, n):
    model = net()
    wrap, below = WAYS[way]
    optimizer = wrap(SGD(model.parameters(), lr=0.1))
    said, updated = trained(optimizer, model, lambda: below(model, optimizer), n=n)
    assert said == [] and updated == [True] * 10


@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_a_learning_rate_of_zero_is_an_update(kind):
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.0, **{kind: True})
    said, updated = trained(optimizer, model, optimizer.step)
    assert said == [] and updated == [True] * 10


@pytest.mark.parametrize("begin", [0, 1])
def test_an_update_every_other_window_hears_nothing(begin):
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    update = every(2, begin)
    said, updated = trained(optimizer, model, lambda: update(model, optimizer))
    assert said == [] and updated == [i % 2 == begin for i in range(10)]


def test_another_optimizer_that_shares_nothing_may_step_alone():
    model, other = net(), nn.Linear(1, 1)
    optimizer, of_other = SGD(model.parameters(), lr=0.1), SGD(other.parameters(), lr=0.1)
    update = every(2)

    def below():
        of_other.step()
        update(model, optimizer)

    said, updated = trained(optimizer, model, below)
    assert said == [] and updated == [True, False] * 5


class Hidden(Duck):
    """An optimizer without hooks, whose inner optimizer is out of sight."""

    def __init__(self, inner):
        self.get = lambda: inner

    param_groups = property(lambda self: [dict(group) for group in self.inner.param_groups])
    inner = property(lambda self: self.get())


def test_nothing_is_known_of_an_optimizer_without_hooks():
    model = net()
    optimizer = Hidden(SGD(model.parameters(), lr=0.1))
    assert trained(optimizer, model, optimizer.step) == ([], [True] * 10)


def test_nothing_is_known_of_an_optimizer_whose_step_was_replaced():
    model = net()
    optimizer, inner = SGD(model.parameters(), lr=0.1), AdamW(model.parameters(), lr=0.1)
    optimizer.step = lambda: inner.step()
    assert trained(optimizer, model, lambda: optimizer.step()) == ([], [True] * 10)


def test_a_step_whose_function_returns_a_generator_steps_nothing_itself():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)

    def yielding(x):
        yield model(x).mean()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()

    step = train_step(optimizer)(lambda x: yielding(x))
    assert heard(lambda: [step(torch.ones(2, 3)) for _ in range(6)]) == []


def test_a_step_without_an_optimizer_knows_none_that_is_its_own():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)

    @accumulate(1, model)
    def step(x):
        yield model(x).mean()
        optimizer.step()

    assert heard(lambda: [step(torch.ones(2, 3)) for _ in range(3)]) == []


def test_code_below_a_yield_may_run_while_another_optimizer_steps():
    """As in another thread: torch iterates over the hooks of all optimizers meanwhile."""
    model, other = net(), SGD(net().parameters(), lr=0.1)
    optimizer = SGD(model.parameters(), lr=0.1)

    @train_step(optimizer)
    def step():
        yield model(torch.ones(2, 3)).mean()
        optimizer.step()

    step()
    other.register_step_post_hook(lambda *_: step())
    other.step()
    assert step.updates == 2


def test_an_exception_below_the_yield_is_raised_and_the_next_window_is_right():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError):
        trained(optimizer, model, lambda: 1 / 0)
    assert trained(optimizer, model, optimizer.step) == ([], [True] * 10)


def test_a_step_within_the_update_of_another_stays_fused():
    """It tells its kernel the loss scale in place of a wait, which nothing else shows."""
    model, inner = net(), nn.Linear(3, 1)
    fused = AdamW(inner.parameters(), lr=0.1, fused=True)
    told = []

    class Spy(dict):
        def update(self, *args, **kwargs):
            told.append(set(*args))
            super().update(*args, **kwargs)

    step = train_step(fused, max_norm=0.1)(lambda x: inner(x).square().mean())
    fused.__dict__ = Spy(fused.__dict__)
    trained(SGD(model.parameters(), lr=0.1), model, lambda: step(torch.ones(2, 3)), windows=2)
    assert told == [{"found_inf", "grad_scale"}] * 2


# Parameters that unfreeze made trainable


def staged(returns=True):
    """A step in its second stage: layers were frozen, and are trainable now."""
    model = net()
    freeze(model, "[0]")
    optimizer = SGD(trainable_parameters(model), lr=0.1)
    step = train_step(optimizer, accumulate(2))(lambda x: model(x).square().mean())
    for _ in range(8):
        step(torch.ones(2, 3))
    unfreeze(model, "[0]")
    return model, optimizer, step


@pytest.mark.parametrize("is_anew", [False, True])
def test_unfrozen_parameters_that_no_optimizer_holds_are_said_once(is_anew):
    model, _, step = staged()
    new = SGD(model.parameters(), lr=0.1) if is_anew else None
    (said,) = heard(lambda: [step(torch.ones(2, 3)) for _ in range(8)])
    assert "2 parameter(s)" in said and "(4, 3)" in said and "add_param_group" in said
    del new


def test_gradients_from_before_the_step_hear_nothing():
    """For example of another model, which was looked at and is not trained any more."""
    other, model = net(), net()
    freeze(other)
    unfreeze(other)
    other(torch.ones(2, 3)).sum().backward()
    step = train_step(SGD(model.parameters(), lr=0.1))(lambda x: model(x).square().mean())
    assert heard(lambda: [step(torch.ones(2, 3)) for _ in range(5)]) == []
    assert other[0].weight.grad is not None


def test_parameters_that_join_the_optimizer_hear_nothing():
    model, optimizer, step = staged()
    optimizer.add_param_group({"params": list(model[0].parameters())})
    before = model[0].weight.detach().clone()
    assert heard(lambda: [step(torch.ones(2, 3)) for _ in range(4)]) == []
    assert not torch.equal(model[0].weight, before)


def test_parameters_that_were_frozen_by_hand_meanwhile_hear_nothing():
    model, _, step = staged()
    model[0](torch.ones(2, 3)).sum().backward()
    model[0].requires_grad_(False)
    assert heard(lambda: [step(torch.ones(2, 3)) for _ in range(4)]) == []


@pytest.mark.parametrize("held", ["by a step", "by a step by hand", "by an optimizer"])
@pytest.mark.parametrize("around", ["nothing", "unfreeze", "frozen"])
def test_the_d_of_a_gan_gets_gradients_in_the_step_of_g(held, around):
    g, d = nn.Linear(3, 3), net()
    freeze(d)
    of_g, of_d = SGD(g.parameters(), lr=0.1), SGD(d.parameters(), lr=0.1)
    if held == "by a step by hand":  # which no torch.optim.Optimizer is in
        of_d = ByHand(types.SimpleNamespace(param_groups=of_d.param_groups))
    parts = [frozen(d)] if around == "frozen" else []
    g_step = train_step(of_g, *parts)(lambda x: d(g(x)).mean())
    d_step = train_step(of_d)(lambda x: d(x).mean())

    def loop():
        for _ in range(4):
            unfreeze(d)
            if held != "by an optimizer":
                d_step(torch.ones(2, 3))
            else:
                of_d.zero_grad()
                d(torch.ones(2, 3)).mean().backward()
                of_d.step()
            if around == "unfreeze":
                freeze(d)
            g_step(torch.ones(2, 3))

    assert heard(loop) == []


# What is left of the old loop


@pytest.mark.parametrize("place", ["loop", "function"])
@pytest.mark.parametrize("n", [1, 3])
def test_an_optimizer_that_is_stepped_beside_the_step_is_said_once(place, n):
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.1)

    @train_step(optimizer, accumulate(n))
    def step(x):
        loss = model(x).mean()
        if place == "function":
            optimizer.step()
        return loss

    def loop():
        for _ in range(6 * n):
            step(torch.ones(2, 3))
            if place == "loop":
                optimizer.step()

    (said,) = heard(loop)
    assert "`optimizer.step()`" in said and "remove it" in said


@pytest.mark.parametrize("other", ["loss", "yield", "closure", "once before"])
def test_an_optimizer_that_is_stepped_for_another_purpose_hears_nothing(other):
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    if other == "once before":  # so that a scheduler does not complain
        optimizer.step()
    step = train_step(optimizer)(lambda x: model(x).mean())

    @train_step(optimizer)
    def yielding(x):
        yield model(x).mean()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()

    def closure():
        loss = model(torch.ones(2, 3)).mean()
        loss.backward()
        return loss

    def loop():
        for _ in range(6):
            step(torch.ones(2, 3))
            if other == "loss":
                closure()
                optimizer.step()
                optimizer.zero_grad()
            if other == "yield":
                yielding(torch.ones(2, 3))
            if other == "closure":
                optimizer.step(closure)
                optimizer.zero_grad()

    assert heard(loop) == []


def test_a_step_that_finds_no_gradients_itself_is_not_stepped_beside():
    model, extra = net(), nn.Parameter(torch.ones(1))
    step = train_step(SGD(model.parameters(), lr=0.1))(lambda: extra.sum())
    updated = []
    said = heard(lambda: updated.extend(step().updated for _ in range(6)))
    assert updated == [False] * 6 and not any("found no gradients" in text for text in said)


def test_a_loss_that_a_scaler_scaled_is_refused_before_the_backward():
    model = net()
    scaler = torch.amp.GradScaler("cpu")
    step = train_step(SGD(model.parameters(), lr=0.1))(lambda x: scaler.scale(model(x).mean()))
    with pytest.raises(ValueError, match=r"GradScaler.*`return loss`.*`amp\(\)`"):
        step(torch.ones(2, 3))
    assert all(p.grad is None for p in model.parameters()) and step.updates == 0


@pytest.mark.parametrize("factor", ["disabled", "number", "tensor", "of another"])
def test_another_factor_of_a_loss_is_no_scaler(factor):
    model = net()
    scaler = torch.amp.GradScaler("cpu", enabled=factor != "disabled")
    scaler.scale(torch.ones(()))
    scale = {"disabled": scaler.scale, "number": lambda x: x * 65536.0}.get(
        factor, lambda x: x * torch.tensor(65536.0)
    )
    step = train_step(SGD(model.parameters(), lr=0.1))(lambda x: scale(model(x).mean()))
    assert step(torch.ones(2, 3)).updated


def test_a_scaler_below_the_yield_unscales_what_it_scaled():
    model = net()
    optimizer, scaler = SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")

    @train_step(optimizer)
    def step(x):
        yield scaler.scale(model(x).mean())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    updated = []
    assert heard(lambda: updated.extend(step(torch.ones(2, 3)).updated for _ in range(4))) == []
    assert updated == [True] * 4


def test_a_block_without_a_loss_is_no_fault_and_one_with_a_foreign_backward_is():
    model = net()
    step = train_step(SGD(model.parameters(), lr=0.1))
    with step:
        model(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match=r"step\.backward\(loss\)"), step:
        model(torch.ones(2, 3)).mean().backward()


# Windows that are never applied: said when the process ends, or when a third step is made

SCRIPT = """
import torch
from trainkit import accumulate, train_step
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = [torch.ones(1, 2) for _ in range(5)]
def make(n=2):
    return train_step(optimizer, accumulate(n))(lambda x: model(x).mean())
step = make()
"""
LOOP = "for x in data: step(x)"
# Each code in a fork of one process, which imports torch once, and ends as a process does.
ENDS = """
import gc, os, sys, torch, torch._dynamo, trainkit  # an optimizer imports the latter
gc.freeze()
for path in sys.argv[1:]:
    if os.fork() == 0:
        os.dup2(os.open(f"{path}.stderr", os.O_WRONLY | os.O_CREAT), 2)
        exec(compile(open(path).read(), path, "exec"), {})
        break
    os.wait()
"""
LOST = {
    LOOP: 1,
    "step = make(8)\n" + LOOP: 5,
    "def run(step):\n    for x in data: step(x)\nrun(step); del step": 1,
    "step.me = step\n" + LOOP + "\ndel step; import gc; gc.collect()": 1,
    "for x in data: make()(x)": 2,  # at the third step
}
OTHERS = [
    "for x in step.over(data): step(x)\nstep(x)",
    LOOP + "\nstep.close()",
    LOOP + "\nstep.discard()",
    LOOP + "\nstate = step.state_dict()",
    LOOP + "\nstep.last(x)\nstep(x)",
    "step = make(1)\n" + LOOP,
    "pass",
    LOOP + "\n1 / 0",
    LOOP + "\nraise KeyboardInterrupt",
    "import pytest\n" + LOOP,
    "try: train_step(3)\nexcept TypeError: pass",
]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What a process that runs a code says, by code."""
    folder, paths = tmp_path_factory.mktemp("ends"), {}
    for number, code in enumerate([*LOST, *OTHERS]):
        paths[code] = folder / f"{number}.py"
        paths[code].write_text(SCRIPT + code)
    subprocess.run([sys.executable, "-c", ENDS, *paths.values()], check=True)
    return {code: Path(f"{path}.stderr").read_text() for code, path in paths.items()}


@pytest.mark.parametrize("code", LOST)
def test_a_window_that_was_never_applied_is_said_once_in_a_process(code, said):
    told = said[code]
    assert told.count("UserWarning") == 1 and f"{LOST[code]} micro-batch(es)" in told, told
    assert all(
        call in told for call in ("`step.over(loader)`", "`step.close()`", "before the loop")
    )


@pytest.mark.parametrize("code", OTHERS)
def test_of_other_ends_of_a_process_nothing_is_said(code, said):
    told = said[code]
    assert "micro-batch" not in told and "ignored" not in told, told
    assert ("Error" in told or "KeyboardInterrupt" in told) == ("1 / 0" in code or "raise" in code)
