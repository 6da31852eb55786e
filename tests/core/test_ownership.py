"""The window owns its gradients: between two micro-batches `.grad` belongs to the training loop.

Whatever a loop does to `.grad`, or to the flags of other parameters, between two micro-batches
changes no bit of what a step computes. Inside a micro-batch, `.grad` holds the sums of the window,
and a change by anything but `step.backward` is an error.
"""

import copy
import functools
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import (
    BATCHES,
    OPTIMIZERS,
    distance,
    loss_of,
    make_batches,
    make_model,
    same_bits,
    same_values,
    state_of,
    windows_of,
)
from torch import nn

from trainkit import accumulate, amp, freeze, frozen, microbatch, train_step, unfreeze

HAS_WIDE_SUMS = hasattr(torch.Tensor, "grad_dtype")
FEW = settings(max_examples=settings.default.max_examples // 2)
FULL_SIZES = [4, 3, 2, 4, 3, 4, 2]  # rows of each micro-batch


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "at the start of a loop")
        yield


@dataclass(frozen=True)
class Setup:
    face: str = "returns"  # or "returns after a further loss", "yields", "block"
    optimizer: str = "AdamW"
    precision: torch.dtype | None = None
    wide: bool = False  # bfloat16 parameters, summed in float32
    n: int = 3
    weights: str | None = None  # or "int", "tensor"
    max_norm: float | None = None
    overflow: bool = False
    chunk: int | None = None

    @property
    def dtype(self):
        if self.wide:
            return torch.bfloat16
        return torch.float64 if self.precision is None else torch.float32


@st.composite
def setups(draw):
    wide = HAS_WIDE_SUMS and draw(st.integers(0, 3)) == 0
    precision = draw(st.sampled_from([None, torch.bfloat16, torch.float16]))
    max_norm = draw(st.sampled_from([None, 0.05]))
    face = draw(st.sampled_from(["returns", "returns after a further loss", "yields", "block"]))
    kind = draw(st.sampled_from(sorted(OPTIMIZERS)))
    if wide and "SGD" in kind:  # fused, torch rounds bfloat16 one way or another, from run to run
        kind = kind.removesuffix(" fused")
    return Setup(
        face=face,
        optimizer=kind,
        precision=None if wide and precision == torch.float16 else precision,
        wide=wide,
        n=draw(st.integers(1, 4)),
        weights=draw(st.sampled_from([None, "int", "tensor"])),
        max_norm=max_norm,
        overflow=draw(st.booleans()) and (max_norm or precision) is not None,
        chunk=draw(st.sampled_from([None, None, 2])) if face == "returns" else None,
    )


class World:
    """A model, its optimizer and its step, and other things that use the same parameters."""

    def __init__(self, setup):
        self.setup = setup
        self.model = make_model(setup.dtype)
        self.parameters = list(self.model.parameters())
        self.optimizer = OPTIMIZERS[setup.optimizer](self.parameters)
        self.batches = make_batches(FULL_SIZES, setup.dtype)
        self.inside = None  # called at the top of the step function
        parts = [accumulate(setup.n, dtype=torch.float32 if setup.wide else None)]
        if setup.precision is not None:
            scale = 2.0**40 if setup.overflow else 1024.0
            parts.append(amp(dtype=setup.precision, init_scale=scale, growth_interval=2))
        if setup.chunk:
            parts.append(microbatch(setup.chunk))
        step = train_step(self.optimizer, *parts, max_norm=setup.max_norm)
        function = {"block": None, "yields": self.yielding}.get(setup.face, self.loss)
        self.step = step if function is None else step(function)
        self.others = {}

    def loss(self, x, y):
        if self.inside:
            self.inside()
        if self.setup.face == "returns after a further loss":
            self.step.backward(self.weighted(0.1 * self.model[2].weight.square().mean(), x))
        return self.weighted(loss_of(self.model, (x, y)), x)

    def weighted(self, loss, x):
        if self.setup.weights is None:
            return loss
        return loss, len(x) if self.setup.weights == "int" else torch.tensor(len(x))

    def yielding(self, x, y):
        yield self.loss(x, y)
        self.optimizer.step()  # and no zero_grad

    def one(self, batch):
        if self.setup.face != "block":
            return self.step(*batch)
        with self.step as result:
            self.step.backward(self.loss(*batch))
        return result

    def train(self, batches=None, between=lambda i: None):
        """Train, and return all that can be seen of it."""
        results = []
        for i, batch in enumerate(self.step.over(self.batches if batches is None else batches)):
            if self.setup.overflow and i == 1 and self.setup.precision != torch.float16:
                batch = (batch[0] * torch.inf, batch[1])
            found = self.one(batch)
            results.append([found.loss, found.complete, found.updated, found.grad_norm])
            results.append(found.window_loss)
            if not (found.updated and self.setup.face == "yields"):
                assert all(p.grad is None for p in self.parameters), "nothing is lent"
            between(i)
        return [*state_of(self.model, self.optimizer), self.step.state_dict(), results]

    # What else a loop may do with the parameters. `chosen` are some of them.

    def batch(self):
        return tuple(t.to(self.setup.dtype) for t in BATCHES[0])

    def zero_grad(self, chosen):
        self.optimizer.zero_grad()

    def zeros(self, chosen):
        self.model.zero_grad(set_to_none=False)

    def backward(self, chosen):
        (1e4 * loss_of(self.model, self.batch())).backward()

    def backward_of_some(self, chosen):
        if chosen := [p for p in chosen if p.requires_grad]:
            loss_of(self.model, self.batch()).backward(inputs=chosen)

    def write(self, chosen):
        for p in self.parameters:
            if p.grad is not None:
                p.grad.mul_(-1e5).add_(torch.nan)

    def assign(self, chosen):
        for p in chosen:
            p.grad = torch.full_like(p, 1e5)

    def clip(self, chosen):
        nn.utils.clip_grad_norm_(self.parameters, 0.1)

    def autograd_grad(self, chosen):
        if chosen := [p for p in chosen if p.requires_grad]:
            torch.autograd.grad(loss_of(self.model, self.batch()), chosen)

    def evaluate(self, chosen):
        self.model.eval()
        # Autocast in float16 around one in bfloat16 fails in torch: both use the same copies.
        with torch.no_grad(), amp(dtype=self.setup.precision or torch.bfloat16):
            loss_of(self.model, self.batch())
        self.model.train()

    def copied(self, chosen):
        loss_of(copy.deepcopy(self.model), self.batch()).backward()

    def flags(self, chosen):
        for p in chosen:
            p.requires_grad_(False)
        self.optimizer.zero_grad()
        for p in chosen:
            p.requires_grad_(True)

    def frozen_for_good(self, chosen):
        freeze(self.model, "[0]")
        unfreeze(self.model, "[0]")

    def reload(self, chosen):
        self.step.load_state_dict(self.step.state_dict())

    def other_step(self, chosen):
        """Call a step with an open window of its own. Its learning rate is 0."""
        if "call" not in self.others:
            dtype = torch.float32 if self.setup.wide else None
            other = train_step(torch.optim.SGD(self.parameters, lr=0.0), accumulate(3, dtype=dtype))
            self.others["call"] = other(lambda: loss_of(self.model, self.batch()))
        self.others["call"]()

    def other_block(self, chosen):
        """The same by hand, over some of the parameters and a new one."""
        if "block" not in self.others:
            own = nn.Parameter(torch.ones(()))
            optimizer = torch.optim.SGD([own, *self.parameters[1:3]], lr=0.0)
            self.others["block"] = own, train_step(optimizer, accumulate(2), max_norm=1.0)
        own, step = self.others["block"]
        with step:
            step.backward(own * loss_of(self.model, self.batch()))

    def other_yield(self, chosen):
        if "yield" not in self.others:

            @accumulate(2, self.model)
            def other():
                yield loss_of(self.model, self.batch())
                assert any(p.grad is not None for p in self.parameters)

            self.others["yield"] = other
        self.others["yield"]()


NOT_INSIDE = {"reload"}
if torch.__version__ < (2, 7):  # its autocast keeps copies that were made under no_grad
    NOT_INSIDE.add("evaluate")
DISTURBANCES = [
    *["zero_grad", "zeros", "backward", "backward_of_some", "write", "assign", "clip"],
    *["autograd_grad", "evaluate", "copied", "flags", "frozen_for_good", "reload"],
    *["other_step", "other_block", "other_yield"],
]  # fmt: skip
SOME = st.sets(st.integers(0, 3), max_size=3)
AROUND = st.sampled_from([None, None, "[0]", "[2].weight", "**.bias"])
GAP = st.lists(st.tuples(st.sampled_from(DISTURBANCES), SOME, AROUND), max_size=3)


def disturb(world, gap, allowed=DISTURBANCES):
    for name, some, around in gap:
        if name in allowed:
            with nullcontext() if around is None else frozen(world.model, around):
                getattr(world, name)([world.parameters[i] for i in some])


@functools.cache
def undisturbed(setup):
    return World(setup).train()


@given(setups(), st.lists(GAP, min_size=4, max_size=8), st.booleans())
def test_nothing_between_two_micro_batches_changes_anything(setup, gaps, at_the_top):
    """The top of a step function, before any loss, is between two micro-batches, too."""
    world = World(setup)
    disturb(world, gaps[-1])
    if at_the_top and setup.face != "block" and not setup.chunk:
        harmless = set(DISTURBANCES) - NOT_INSIDE
        world.inside = lambda: disturb(world, gaps[-2], harmless)
    found = world.train(between=lambda i: disturb(world, gaps[i % len(gaps)]))
    assert same_values(found, undisturbed(setup))


# Parameters that are frozen for a part of a window.


FROZEN = st.sampled_from([None, None, "[0]", "[2]", "**.bias", "[0].weight"])
PATTERNS = {None: [], "[0]": [0, 1], "[2]": [2, 3], "**.bias": [1, 3], "[0].weight": [0]}


@given(
    st.lists(st.tuples(FROZEN, st.booleans(), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 4),
    st.sampled_from(["SGD", "SGD momentum", "AdamW", "AdamW fused"]),
    st.booleans(),
)
def test_sums_of_frozen_parameters_wait(micro_batches, n, kind, leftover):
    """A frozen parameter adds nothing, loses nothing, and does not move."""
    batches = make_batches([4] * len(micro_batches))
    model, theirs = make_model(), make_model()
    optimizer, their_optimizer = (OPTIMIZERS[kind](m.parameters()) for m in (model, theirs))
    step = train_step(optimizer, accumulate(n))(lambda batch: loss_of(model, batch))
    for i, batch in enumerate(batches, 1):
        pattern, for_good, reload = micro_batches[i - 1]
        if leftover:
            loss_of(model, BATCHES[0]).backward()
        block = nullcontext() if pattern is None or for_good else frozen(model, pattern)
        with block:
            if pattern is not None and for_good:
                freeze(model, pattern)
            if reload:
                step.load_state_dict(step.state_dict())
            (step.last if i == len(batches) else step)(batch)
        unfreeze(model)
        step.state_dict()

    parameters = list(theirs.parameters())
    for window in windows_of(list(zip(batches, micro_batches, strict=True)), n):
        sums = {}
        for batch, (pattern, *_) in window:
            trained = [p for i, p in enumerate(parameters) if i not in PATTERNS[pattern]]
            found = torch.autograd.grad(loss_of(theirs, batch) / len(window), trained)
            for p, gradient in zip(trained, found, strict=True):
                sums[p] = sums.get(p, 0) + gradient
        for p in trained:  # in the last micro-batch
            p.grad = sums[p]
        their_optimizer.step()
        their_optimizer.zero_grad()
    assert distance(state_of(model, optimizer), state_of(theirs, their_optimizer)) <= 1e-12


def test_a_state_has_the_sums_of_what_is_frozen_while_it_is_taken_or_loaded(model, optimizer):
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    step(BATCHES[0])
    state = step.state_dict()
    with frozen(model, "[0]"):
        assert same_values(step.state_dict(), state)
        step.load_state_dict(state)
        assert same_values(step.state_dict(), state)
    assert same_values(step.state_dict(), state)
    before = model[0].weight.clone()
    with frozen(model, "[0]"):
        assert step(BATCHES[1]).updated
    assert torch.equal(model[0].weight, before)
    assert all(p.grad is None for p in model.parameters())


def test_an_update_does_not_move_a_parameter_whose_flag_was_cleared_by_hand(model, optimizer):
    """Its leftover gradient is not of the window."""
    step = train_step(optimizer)(lambda batch: loss_of(model, batch))
    loss_of(model, BATCHES[1]).backward()
    before = model[0].weight.detach().clone()
    model[0].requires_grad_(False)
    assert step(BATCHES[0]).updated
    assert torch.equal(model[0].weight, before)


def test_a_parameter_group_that_joins_an_open_window_of_two_optimizers():
    """The sums stay with their parameters, whose positions change."""

    def made():
        torch.manual_seed(1)
        return [nn.Linear(3, 3, dtype=torch.float64) for _ in range(3)]

    x = torch.randn(4, 3, dtype=torch.float64)
    a, b, joins = ours = made()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (a, b)]
    step = train_step(optimizers, accumulate(2))(lambda: joins(b(a(x))).square().mean())
    step()
    optimizers[0].add_param_group({"params": list(joins.parameters())})
    assert step().updated

    a, b, joins = theirs = made()
    for trained in ([a, b], theirs):
        inputs = [p for layer in trained for p in layer.parameters()]
        (joins(b(a(x))).square().mean() / 2).backward(inputs=inputs)
    torch.optim.SGD([p for layer in theirs for p in layer.parameters()], lr=0.1).step()
    parameters = [[p for layer in layers for p in layer.parameters()] for layers in (ours, theirs)]
    assert distance(*parameters) <= 1e-12


# Inside a micro-batch.

INTRUSIONS = {
    "backward": lambda world: loss_of(world.model, world.batch()).backward(),
    "backward of some": lambda world: world.backward_of_some(world.parameters[2:3]),
    "zero_grad": lambda world: world.optimizer.zero_grad(),
    "zeros": lambda world: world.optimizer.zero_grad(set_to_none=False),
    "in place": lambda world: world.parameters[3].grad.mul_(2),
    "other step": lambda world: world.other_step([]),
}


class Intruded(World):
    """Runs two losses per micro-batch, and ``intrusion`` before, between or after them."""

    intrusion, place = None, ""

    def intrude(self, place):
        if place == self.place:
            self.intrusion(self)

    def loss(self, x, y):
        self.intrude("before")
        self.step.backward(loss_of(self.model, (x, y)))
        self.intrude("between")
        if self.setup.face != "returns":  # where a returned loss is the second
            self.step.backward(self.model[2].weight.square().mean())
            self.intrude("after")
        return self.model[0].weight.square().mean()

    def one(self, batch):
        if self.setup.face != "block":
            return self.step(*batch)
        with self.step as result:
            self.loss(*batch)
        return result


@st.composite
def intruded(draw):
    setup = draw(setups())
    face = draw(st.sampled_from(["returns", "returns three", "yields", "block", "block"]))
    places = ["between", *["after"] * (face != "returns"), *["before"] * (face == "block")]
    values = {"face": face, "weights": None, "chunk": None, "overflow": False, "n": 3}
    return replace(setup, **values), draw(st.sampled_from(places))


@FEW
@given(intruded(), st.sampled_from(sorted(INTRUSIONS)), st.integers(0, 2))
def test_a_change_inside_a_micro_batch_is_refused(drawn, name, at):
    setup, place = drawn
    assume(place != "before" or name.startswith("backward"))
    ours, twin = Intruded(setup), Intruded(setup)
    for world in (ours, twin):
        for batch in world.batches[:at]:
            world.one(batch)
    weights = [p.detach().clone() for p in ours.parameters]
    ours.intrusion, ours.place = INTRUSIONS[name], place
    with pytest.raises(RuntimeError, match=r"`step\.backward"):
        ours.one(ours.batches[at])
    ours.place = ""
    assert same_bits([p.detach() for p in ours.parameters], weights)
    if place == "before":  # the window waits, and the gradients are the user's
        assert len(ours.step.state_dict().get("window", {"losses": ()})["losses"]) == at
    else:
        assert "window" not in ours.step.state_dict()
        assert all(p.grad is None for p in ours.parameters)
        twin.step.discard()
    assert ours.step.updates == 0
    for other in ("zero_grad", "backward"):
        getattr(ours, other)([])
    rest = range(at, 3) if place == "before" else range(4)
    assert same_values(*(w.train([w.batches[i] for i in rest]) for w in (ours, twin)))


def test_a_block_that_catches_the_refusal_has_no_window(model, optimizer):
    step = train_step(optimizer, accumulate(2))
    with step:
        step.backward(loss_of(model, BATCHES[0]))
        optimizer.zero_grad()
        with pytest.raises(RuntimeError):
            step.backward(loss_of(model, BATCHES[0]))
    assert "window" not in step.state_dict()
    assert all(p.grad is None for p in model.parameters())


def test_a_block_that_catches_an_exception_of_backward_and_continues_begins_a_window(model):
    def fail(gradient):
        raise ZeroDivisionError

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = train_step(optimizer, accumulate(2))
    with step:
        step.backward(loss_of(model, BATCHES[0]))
    with step:
        handle = model[0].weight.register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            step.backward(loss_of(model, BATCHES[1]))
        handle.remove()
        step.backward(loss_of(model, BATCHES[1]))
    with step as result:
        step.backward(loss_of(model, BATCHES[0]))
    theirs = make_model()
    for batch in (BATCHES[1], BATCHES[0]):
        (loss_of(theirs, batch) / 2).backward()
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    assert result.updated and same_bits([*model.parameters()], [*theirs.parameters()])


HARMLESS = {
    "reads": lambda world: [p.grad.norm() for p in world.parameters if p.grad is not None],
    "copies": lambda world: [p.grad.clone() for p in world.parameters if p.grad is not None],
    "total norm": lambda world: nn.utils.clip_grad_norm_(
        [nn.Parameter(p.detach()) for p in world.parameters], 1.0
    ),
    "autograd.grad": lambda world: world.autograd_grad(world.parameters),
    "evaluation": lambda world: world.evaluate([]),
    "copied": lambda world: world.copied([]),
    "frozen": lambda world: frozen(world.model, "[0]").__call__(world.evaluate)([]),
    "frozen around a backward": lambda world: frozen(world.model, "[0]")(lambda: None)(),
    "backward of others": lambda world: nn.Parameter(torch.ones(())).square().backward(),
    "a step over others": lambda world: world.step_over_others(),
}
BEFORE = {
    "zero_grad": lambda world: world.zero_grad([]),
    "zeros": lambda world: world.zeros([]),
    "undone": lambda world: (world.backward([]), world.zero_grad([])),
    "undone by zeros": lambda world: (world.backward([]), world.zeros([])),
    "other step": lambda world: world.other_step([]),
}


class Harmless(Intruded):
    def step_over_others(self):
        if "others" not in self.others:
            own = nn.Parameter(torch.ones(()))
            step = train_step(torch.optim.SGD([own], lr=0.1), accumulate(2))
            self.others["others"] = step(lambda: own * loss_of(self.model, self.batch()).detach())
        self.others["others"]()


@FEW
@given(intruded(), st.sampled_from([*HARMLESS, *BEFORE]), st.booleans())
def test_no_false_alarm(drawn, name, leftover):
    setup, place = drawn
    if name in BEFORE:
        setup, place, leftover = replace(setup, face="block"), "before", True
    ours, twin = Harmless(setup), Harmless(setup)
    ours.intrusion, ours.place = (HARMLESS | BEFORE)[name], place

    def leave(_):
        if leftover:
            ours.backward([])

    leave(0)
    assert same_values(ours.train(between=leave), twin.train())


LEFTOVER = [False, True]


@pytest.mark.parametrize("face", ["returns", "block"])
@pytest.mark.parametrize("leftover", LEFTOVER)
def test_a_block_around_a_loss_of_a_micro_batch_takes_its_layers_out_of_that_loss(face, leftover):
    model, theirs = make_model(), make_model()
    part = train_step(torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2))
    if leftover:
        loss_of(model, BATCHES[2]).backward()

    def function(batch):
        with frozen(model, "[0]"):
            step.backward(loss_of(model, batch))
        return model[0](batch[0]).square().mean()

    step = part if face == "block" else part(function)
    for batch in BATCHES[:2]:
        if face == "block":
            with step:
                step.backward(function(batch))
        else:
            step(batch)
        for loss, inputs in (
            (loss_of(theirs, batch), list(theirs[2].parameters())),
            (theirs[0](batch[0]).square().mean(), list(theirs[0].parameters())),
        ):
            (loss / 2).backward(inputs=inputs)
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    assert distance(list(model.parameters()), list(theirs.parameters())) <= 1e-15


@pytest.mark.parametrize("leftover", LEFTOVER)
def test_a_block_that_ends_with_the_micro_batch_keeps_its_layers_out_of_the_update(
    model, optimizer, leftover
):
    step, before = train_step(optimizer, accumulate(2)), model[0].weight.detach().clone()
    for batch in BATCHES[:2]:
        if leftover:
            loss_of(model, BATCHES[2]).backward()
        with step as result, frozen(model, "[0]"):
            step.backward(loss_of(model, batch))
    assert result.updated and torch.equal(model[0].weight, before)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_adversarial_weights_between_two_losses(dtype):
    """AWP (Wu et al. 2020): the second loss is computed with weights moved by the first."""
    wide = torch.float64 if dtype is None else torch.float32
    batches = make_batches([4, 4], wide)
    model, theirs = make_model(wide), make_model(wide)
    parameters, their_parameters = list(model.parameters()), list(theirs.parameters())
    parts = [accumulate(2)] if dtype is None else [accumulate(2), amp(dtype=dtype)]

    @train_step(torch.optim.SGD(parameters, lr=0.1), *parts)
    def step(batch):
        step.backward(loss_of(model, batch))
        with torch.no_grad():
            found = [p.clone() for p in parameters]
            for p in parameters:
                p.add_(p.grad.sign(), alpha=0.1)
        step.backward(loss_of(model, batch))
        with torch.no_grad():
            for p, value in zip(parameters, found, strict=True):
                p.copy_(value)
        return sum(0.01 * p.square().sum() for p in parameters)

    for batch in batches:
        step(batch)

    for batch in batches:
        for loss in (1, 2):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                value = loss_of(theirs, batch)
            (value / 2).backward()
            if loss == 1:
                found = [p.detach().clone() for p in their_parameters]
                with torch.no_grad():
                    for p in their_parameters:
                        p.add_(p.grad.sign(), alpha=0.1)
        with torch.no_grad():
            for p, value in zip(their_parameters, found, strict=True):
                p.copy_(value)
        (sum(0.01 * p.square().sum() for p in their_parameters) / 2).backward()
    torch.optim.SGD(their_parameters, lr=0.1).step()
    assert distance(parameters, their_parameters) <= (1e-12 if dtype is None else 1e-4)


def test_a_block_that_runs_its_own_backward_is_refused(model, optimizer):
    step = train_step(optimizer, accumulate(2))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"in place of `loss\.backward"), step:
            loss_of(model, BATCHES[0]).backward()
    with step, torch.no_grad():
        loss_of(model, BATCHES[0])


# What is left when a window is over.


@pytest.mark.parametrize("kind", ["AdamW", "AdamW fused"])
@pytest.mark.parametrize("face", ["returns", "block"])
def test_no_gradient_outlives_its_window(face, kind):
    world = World(Setup(face, kind, n=2))
    world.one(world.batches[0])
    seen = []
    for p in world.parameters:
        p.register_post_accumulate_grad_hook(lambda p: seen.append(weakref.ref(p.grad)))
    world.one(world.batches[1])
    assert len(seen) == 4 and not any(gradient() is not None for gradient in seen)


def test_an_exception_in_after_keeps_what_frozen_has_set_aside():
    """The window is dropped once when it closes, and once more on the way out of the call."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model[0].parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    step = train_step(optimizer, frozen(model, "[0]"), after=lambda: 1 / 0)(
        lambda batch: loss_of(model, batch)
    )
    with pytest.raises(ZeroDivisionError):
        step(BATCHES[0])
    assert step.updates == 1 and all((p.grad == 7.0).all() for p in model[0].parameters())
    assert all(p.grad is None for p in model[2].parameters())
