"""An interruption at every point: what was found is back, nothing is lost, the next window right.

Three ways to interrupt, each at its k-th point for every k. *Operations*: an exception before or
after any operation of torch, also in backward and in the optimizer. *Functions*: an exception from
any call of torch's Python interface, also where a flag or a gradient is set. *Signals*: a
KeyboardInterrupt where CPython looks for signals, in trainkit, contextlib and `torch.nn.Module`:
on entry to a Python function, on resuming a generator, and after a call of a C function.

Python and torch cannot make these safe, so nothing here asks for them:

- A signal that arrives at the end of a `with` block may be raised before the first line of
  `__exit__`. A step that is called looks after that itself; nobody can for a block by hand.
- An exception that is kept keeps its traceback, and so the contexts that were entered or left.
- An interrupted `optimizer.step()` may have moved some of the parameters, or all of them. It is not
  counted, the window is dropped, and training goes on from there. The same holds for the update
  code below a yield. The first step of Adam may leave half a state, and torch cannot go on.
- Between an update and the loss scale: an overflow is counted, and the next update may overflow,
  too.
- Python code of torch enters and leaves `torch.autocast`, and may be interrupted as any other.
"""

import contextlib
import copy
import inspect
import itertools
import linecache
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from oracles import distance, make_batches, same_bits, same_values, state_of
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import trainkit
from trainkit import accumulate, amp, freeze, frozen, recompute, train_step, unfreeze

DEEP = settings.default.max_examples > 500
NEVER = 10**9


class Interruption(BaseException):
    pass


# Ways to interrupt. Each counts its points, raises at one of them, and says what went on there.


class Injector:
    """Raises ``error`` at point k, and notes whether torch was in an optimizer or in backward."""

    def __init__(self, k=NEVER):
        self.k, self.seen, self.error, self.where = k, 0, Interruption(), set()

    def point(self):
        if self.error is None:
            return False
        self.seen += 1
        if self.seen <= self.k:
            return False
        error, self.error = self.error, None
        frame = sys._getframe()
        while frame is not None:
            self.where.add(frame.f_code.co_name)
            if "/torch/optim/" in frame.f_code.co_filename:
                self.where.add("torch.optim")
            frame = frame.f_back
        if torch._C._current_graph_task_id() != -1:
            self.where.add("torch.autograd")
        try:
            raise error
        finally:
            del (
                error
            )  # or the exception, and with it every context on its way, would be kept by a cycle


@contextlib.contextmanager
def operations(injector, after=False):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not after:
                injector.point()
            value = function(*args, **kwargs or {})
            if after:
                injector.point()
            return value

    with Mode():
        yield


@contextlib.contextmanager
def functions(injector):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if (
                function is not torch._C._set_grad_enabled
            ):  # by which `torch.no_grad` puts back what it found
                injector.point()
            return function(*args, **kwargs or {})

    with Mode():
        yield


FILES = (trainkit.__path__[0], contextlib.__file__, sys.modules[nn.Module.__module__].__file__)


@contextlib.contextmanager
def signals(injector):
    injector.error = KeyboardInterrupt()

    def looks(code):
        # A generator left early is entered once more to be closed; CPython looks for none then.
        left_early = code.co_name == "<genexpr>" or (
            code.co_flags & inspect.CO_GENERATOR and code.co_filename == FILES[2]
        )
        # What is raised in `__del__`, Python prints and ignores.
        is_skipped = left_early or code.co_name == "__del__"
        return code.co_filename.startswith(FILES) and not is_skipped

    def profile(frame, event, argument):
        if event not in ("call", "c_return") or not looks(frame.f_code):
            return
        on_the_way_out = event == "call" and frame.f_code.co_name == "__exit__"
        if not on_the_way_out or looks(
            frame.f_back.f_code
        ):  # see above: what a block of the user's is left by
            injector.point()

    def trace(frame, event, argument):
        if not looks(frame.f_code):
            return None
        before = frame.f_lineno

        def line(frame, event, argument):
            nonlocal before
            back, before = frame.f_lineno < before, frame.f_lineno
            text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
            if event == "line" and back and text.startswith(("for ", "while ")):
                injector.point()
            return line

        return line

    found = sys.getprofile(), sys.gettrace()
    sys.setprofile(profile)
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(found[1])
        sys.setprofile(found[0])


WAYS = {
    "before operations": operations,
    "after operations": lambda injector: operations(injector, after=True),
    "functions": functions,
    "signals": signals,
}


# What is interrupted: an epoch of a window of three micro-batches and one of two.

SIZES, ENDS = [4, 3, 2, 4, 3], [0, 3, 5, 8]
BATCHES = {
    dtype: make_batches([*SIZES, 2, 4, 3], dtype) for dtype in (torch.float32, torch.float64)
}


@dataclass(frozen=True)
class Setup:
    face: str = "returns"  # or "yields", "block", "block that catches"
    optimizer: str = "AdamW"
    fused: bool = False
    precision: torch.dtype | None = None
    max_norm: float | None = None
    weights: str | None = None  # or "ints", "tensors"
    freezing: bool = False
    several: bool = False
    further: bool = False
    overflow: bool = False  # in the first window, for a loss scale

    def __str__(self):
        words = [
            value if isinstance(value, str) else name for name, value in vars(self).items() if value
        ]
        return " ".join(words + [str(self.precision)[6:]] * bool(self.precision))


class World:
    """A model, its optimizers and a step, and a record of what the loop over it did."""

    def __init__(self, setup):
        self.setup = setup
        dtype = torch.float64 if setup.precision is None and not setup.fused else torch.float32
        torch.manual_seed(1)
        norm = nn.BatchNorm1d(6) if setup.freezing else nn.Identity()
        self.model = nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3)).to(dtype)
        parameters = list(self.model.parameters())
        owned = [parameters[:1], parameters[1:]] if setup.several else [parameters]
        options = {"momentum": 0.9} if setup.optimizer == "SGD" else {}
        make = getattr(torch.optim, setup.optimizer)
        self.optimizers = [make(ps, lr=0.05, fused=setup.fused, **options) for ps in owned]
        self.schedulers = [
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in self.optimizers
        ]
        self.batches = BATCHES[dtype]
        self.done = self.calls = 0  # micro-batches that came to their end, calls of `after`
        self.doing = ""
        parts = [accumulate(3)]
        if setup.precision is not None:
            parts.append(
                amp(
                    dtype=setup.precision,
                    init_scale=2.0**40 if setup.overflow else 2.0**10,
                    growth_interval=2,
                )
            )
        if setup.freezing:
            parts.append(frozen(self.model, "[:2]"))
            self.found = {p: torch.full_like(p, 7.0) for p in parameters[:4]}
            for parameter, gradient in self.found.items():
                parameter.grad = gradient
        function = {"returns": self.loss, "yields": self.yielding}.get(setup.face)
        after = () if setup.face == "yields" else self.after
        step = train_step(self.optimizers, *parts, max_norm=setup.max_norm, after=after)
        self.step = step if function is None else step(function)

    def loss(self, i):
        self.doing = "forward"
        x, y = self.batches[i]
        if self.setup.further and i != 1:
            penalty = self.weighted(0.1 * self.model[3].weight.square().mean(), i)
            self.doing = ""
            self.step.backward(penalty)
            self.doing = "forward, after a loss"
        loss = F.mse_loss(self.model(x), y)
        self.doing = ""
        return self.weighted(loss, i)

    def weighted(self, loss, i):
        rows = len(self.batches[i][0])
        return {None: loss, "ints": (loss, rows), "tensors": (loss, torch.tensor(rows))}[
            self.setup.weights
        ]

    def yielding(self, i):
        yield self.loss(i)
        self.doing = "update"
        for optimizer in self.optimizers:
            optimizer.step()
        self.after()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.doing = ""

    def after(self):
        self.calls += 1
        for scheduler in self.schedulers:
            scheduler.step()

    def block(self, i):
        caught = None
        with self.step as result:
            if self.setup.face == "block that catches":
                loss = self.loss(i)
                try:
                    self.step.backward(loss)
                except (Interruption, KeyboardInterrupt) as error:
                    caught = error
            else:
                self.step.backward(self.loss(i))
        try:
            if caught is not None:
                raise caught
        finally:
            del caught
        return result

    def one(self, i):
        return self.block(i) if self.setup.face.startswith("block") else self.step(i)

    def run(self, indices):
        """The loop."""
        for i in self.step.over(indices):
            self.one(i)
            self.doing = ""
            self.done += 1

    def state(self):
        return [t for optimizer in self.optimizers for t in state_of(self.model, optimizer)]

    def weights_now(self):
        return [p.detach().clone() for p in self.model.parameters()]

    def rates(self):
        return [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]

    def copy_of_what_is_there(self):
        """A new world that begins with this one's numbers, and has never been interrupted."""
        twin = World(self.setup)
        twin.model.load_state_dict(self.model.state_dict())
        for ours, theirs in zip(
            self.optimizers + self.schedulers, twin.optimizers + twin.schedulers, strict=True
        ):
            theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
        numbers = self.step.state_dict()
        twin.step.load_state_dict(
            {key: value for key, value in numbers.items() if key not in ("window", "gradients")}
        )
        return twin

    def nothing_is_left_behind(self):
        setup = self.setup
        assert all(p.requires_grad for p in self.model.parameters())
        assert all(m.training and "train" not in m.__dict__ for m in self.model.modules())
        if setup.freezing:
            assert all(
                p.grad is gradient and (gradient == 7.0).all() for p, gradient in self.found.items()
            )
        assert modes() == (0, False, torch.bfloat16, True, False)
        for optimizer in self.optimizers:
            assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
        with pytest.raises(RuntimeError, match="inside a micro-batch"):  # none is under way
            self.step.backward(None)


def modes():
    torch.autocast_increment_nesting()
    nesting = torch.autocast_decrement_nesting()
    on = torch.is_autocast_enabled("cpu")
    return (
        nesting,
        on,
        torch.get_autocast_dtype("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


class Reference:
    """What an uninterrupted run comes to after every window."""

    def __init__(self, setup):
        world = World(setup)
        self.weights, self.numbers, self.rates, self.calls = [], [], [], []
        for begin, end in [(0, 0), *itertools.pairwise(ENDS)]:
            world.run(range(begin, end))
            self.weights.append(world.weights_now())
            self.numbers.append(world.step.state_dict())
            self.rates.append(world.rates())
            self.calls.append(world.calls)
        self.state = world.state()
        world.nothing_is_left_behind()


def interrupt(way, injector, call):
    """Whether ``call`` was interrupted, by its own exception. It is not kept: it holds contexts."""
    try:
        with way(injector):
            expected = id(injector.error)
            call()
    except (Interruption, KeyboardInterrupt) as error:
        assert id(error) == expected and error.__context__ is None
        return True
    return False


def waiting_in(state):
    return len(state["window"]["losses"]) if "window" in state else 0


def check_point(setup, reference, way, k):
    """Interrupts an epoch at point k, checks what is there, and goes on to a third window."""
    world, injector = World(setup), Injector(k)
    if not interrupt(way, injector, lambda: world.run(range(5))):
        return False
    world.nothing_is_left_behind()
    step = world.step
    numbers = step.state_dict()
    closed, waiting = numbers["updates"] + numbers["skipped"], waiting_in(numbers)
    position = ENDS[closed] + waiting

    # What counts, and what does not.
    if world.doing == "forward":
        assert position == world.done, (
            "an interruption in forward does not count, and the window stays"
        )
    elif "torch.autograd" in injector.where or world.doing:
        assert position == ENDS[closed] <= world.done, "from backward on the window is dropped"
    else:
        assert position in (ENDS[closed], world.done, world.done + 1) and closed in (0, 1, 2)
        assert world.done >= ENDS[closed] - 1
    if waiting == 0 and setup.face != "yields" and not setup.freezing:
        assert all(p.grad is None for p in world.model.parameters())
    within_update = injector.where & {"torch.optim", "step_all"} or world.doing == "update"
    if not within_update:
        assert same_bits(world.weights_now(), reference.weights[closed])
        assert (world.calls, world.rates()) == (reference.calls[closed], reference.rates[closed])
        assert {key: numbers[key] for key in ("updates", "skipped")} == {
            key: reference.numbers[closed][key] for key in ("updates", "skipped")
        }

    # The scale may be that of before the window, where only its verdict was not taken in any more.
    scales = [reference.numbers[i].get("loss_scale") for i in (closed, max(closed - 1, 0))]
    behind = [numbers.get(key) for key in ("loss_scale", "growth_tracker")] != [
        reference.numbers[closed].get(key) for key in ("loss_scale", "growth_tracker")
    ]
    assert not behind or numbers["loss_scale"] in scales
    if (
        "_init_group" in injector.where
    ):  # a first step: torch leaves a state of which half is missing, and cannot go on itself
        return True
    if within_update or behind:
        step.discard()
        position = ENDS[closed]
        twin = world.copy_of_what_is_there()
        twin.run(range(position, 5))
        twin.run(range(max(position, 5), 8))
        expected = twin.state(), twin.step.state_dict(), twin.rates()
    else:
        expected = reference.state, reference.numbers[-1], reference.rates[-1]
    world.run(range(position, 5))
    world.run(range(max(position, 5), 8))
    world.nothing_is_left_behind()
    assert same_bits(world.state(), expected[0]) and world.rates() == expected[2]
    assert step.state_dict() == expected[1]
    if not within_update:
        assert world.calls == step.updates
    return True


SETUPS = [
    Setup(),
    Setup(fused=True, max_norm=0.1),
    Setup(optimizer="SGD"),
    Setup(optimizer="SGD", fused=True, precision=torch.float16, weights="tensors"),
    Setup(precision=torch.float16, max_norm=0.1, weights="ints"),
    Setup(fused=True, precision=torch.float16, max_norm=0.1, overflow=True),
    Setup(precision=torch.float16, overflow=True, weights="tensors"),
    Setup(precision=torch.bfloat16, max_norm=0.1, freezing=True),
    Setup(fused=True, precision=torch.float16, freezing=True, several=True, weights="ints"),
    Setup(several=True, further=True, max_norm=0.1),
    Setup(face="yields", max_norm=0.1),
    Setup(face="yields", precision=torch.float16, weights="tensors", overflow=True, freezing=True),
    Setup(face="block", fused=True, max_norm=0.1),
    Setup(face="block", precision=torch.float16, freezing=True, further=True),
    Setup(face="block that catches", weights="ints"),
    Setup(
        face="block that catches", fused=True, precision=torch.float16, max_norm=0.1, several=True
    ),
]


STRIDE = 1 if DEEP else 37


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "at the start of a loop")  # left open
        yield


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_points_of_an_epoch(setup):
    """Every 37th point in every way; every point with HYPOTHESIS_PROFILE=deep."""
    reference = Reference(setup)
    for i, way in enumerate(WAYS):
        k = (i + SETUPS.index(setup)) % STRIDE
        while check_point(setup, reference, WAYS[way], k):
            k += STRIDE


@pytest.mark.parametrize("setup", [SETUPS[i] for i in (1, 8, 13)], ids=str)
def test_every_operation_of_an_epoch(setup):
    """The update and its surroundings are the last operations of a window."""
    reference = Reference(setup)
    k, stride = 0, 1 if DEEP else 7
    while check_point(setup, reference, WAYS["after operations"], k):
        k += stride
    assert k > 150


@pytest.mark.parametrize("setup", [SETUPS[i] for i in (0, 10, 13)], ids=str)
def test_every_signal_of_a_micro_batch(setup):
    for k in itertools.count():
        world = World(setup)
        if not interrupt(signals, Injector(k), lambda: world.one(0)):  # noqa: B023
            break
        world.nothing_is_left_behind()
    assert k > 50


def test_what_the_others_are_compared_with_is_the_plain_loop():
    world, plain = World(Setup()), World(Setup())
    world.run(range(5))
    for window in (range(3), range(3, 5)):
        for i in window:
            (plain.loss(i) / len(window)).backward()
        plain.optimizers[0].step()
        plain.optimizers[0].zero_grad()
        plain.after()
    assert distance(world.state(), plain.state()) <= 1e-12


# The other methods of a step.


def opened(setup, micro_batches):
    world = World(setup)
    world.found = {}  # dropping or loading a window clears `.grad`, also what was the user's
    for i in range(micro_batches):
        world.step(i)
    return world


def window_of(state):
    return {key: value for key, value in state.items() if key in ("window", "gradients")}


METHODS = {
    "state_dict": lambda step, state: step.state_dict(),
    "load_state_dict": lambda step, state: step.load_state_dict(state),
    "discard": lambda step, state: step.discard(),
    "settle": lambda step, state: step.settle(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("setup", [SETUPS[3], SETUPS[7]], ids=str)
def test_an_interrupted_method_leaves_the_window_that_was_or_that_is_to_be_or_none(
    setup, method, way
):
    elsewhere = opened(setup, 2)
    to_be = elsewhere.step.state_dict()
    k = 0
    while True:
        world = opened(setup, 4)
        before, weights = world.step.state_dict(), world.weights_now()
        if not interrupt(WAYS[way], Injector(k), lambda: METHODS[method](world.step, to_be)):  # noqa: B023
            break
        world.nothing_is_left_behind()
        after = world.step.state_dict()
        assert same_bits(world.weights_now(), weights)
        if method in ("state_dict", "settle"):
            assert same_values(after, before)
        windows = [window_of(before), {}] + [window_of(to_be)] * (method == "load_state_dict")
        assert any(same_values(window_of(after), window) for window in windows)
        twin = world.copy_of_what_is_there()
        if method == "load_state_dict":  # and so it is for who tries again
            world.step.load_state_dict(to_be)
            twin.step.load_state_dict(to_be)
        else:
            twin.step.load_state_dict(after)
        for one in (world, twin):
            one.step.last(4)
            one.run(range(5, 8))
        assert (
            same_bits(world.state(), twin.state())
            and world.step.state_dict() == twin.step.state_dict()
        )
        k += 1
    assert k > 0 or method in ("settle", "discard") or "operations" in way


@pytest.mark.parametrize("way", ["before operations", "signals"])
def test_after_is_owed_until_the_wait_for_the_verdict_is_over(way, monkeypatch):
    """Where the device is slow the host waits here, and here it is interrupted."""
    monkeypatch.setattr(trainkit.core.step.Answer, "known", lambda self: False)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    for k in range(50):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        step = train_step(optimizer, max_norm=1.0, after=scheduler.step)(lambda: weight.sum())
        step()
        if not interrupt(WAYS[way], Injector(k), step.settle):
            break
        assert step.updates == scheduler.last_epoch == 1
    assert k > 0


# Exceptions of what is not trainkit's.


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("sized", [True, False])
def test_an_exception_in_the_loader_leaves_the_window_open(sized, at):
    class Loader:
        def __init__(self, fails):
            self.fails = fails

        def __iter__(self):
            for i in range(5):
                if i == at and self.fails:
                    raise Interruption
                yield i
            if at == 5 and self.fails:
                raise Interruption

    Sized = type("Sized", (Loader,), {"__len__": lambda self: 5})
    setup = Setup(max_norm=0.1)
    reference, world = Reference(setup), World(setup)
    with pytest.raises(Interruption):
        world.run((Sized if sized else Loader)(True))
    if (
        world.done < 5
    ):  # a loader without a length is one batch ahead, and that batch is lost with it
        assert world.done == (at if sized else max(at - 1, 0))
        world.nothing_is_left_behind()
        world.run(range(world.done, 5))
    world.run(range(5, 8))
    assert same_bits(world.state(), reference.state) and world.step.updates == 3


HOOKS = {
    "forward": lambda world, hook: world.model.register_forward_hook(hook),
    "backward": lambda world, hook: world.model[3].register_full_backward_pre_hook(hook),
    "gradient": lambda world, hook: world.model[3].weight.register_hook(hook),
    "before the update": lambda world, hook: world.optimizers[0].register_step_pre_hook(hook),
    "after the update": lambda world, hook: world.optimizers[0].register_step_post_hook(hook),
}


@pytest.mark.parametrize("where", HOOKS)
@pytest.mark.parametrize("setup", [SETUPS[i] for i in (4, 7, 8, 10, 13)], ids=str)
def test_an_exception_in_a_hook(setup, where):
    world = World(setup)
    world.run(range(3))

    def hook(*_):
        world.seen += 1
        if world.seen > (0 if "update" in where else 1):
            raise Interruption

    world.seen = 0
    warnings.filterwarnings("ignore", "Full backward hook is firing")
    handle = HOOKS[where](world, hook)
    with pytest.raises(Interruption):
        world.run(range(3, 5))
    handle.remove()
    world.nothing_is_left_behind()
    assert world.step.updates == 1 and waiting_in(world.step.state_dict()) == (
        where == "forward" and not setup.further
    )
    world.step.discard()
    twin = world.copy_of_what_is_there()
    for one in (world, twin):
        one.run(range(5, 8))
    assert (
        same_bits(world.state(), twin.state()) and world.step.state_dict() == twin.step.state_dict()
    )


def test_an_exception_of_torch_while_a_step_is_entered_leaves_nothing_on(monkeypatch):
    world = World(SETUPS[13])
    monkeypatch.setattr(trainkit.core.step.MicroBatch, "watch", lambda self, window: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.run(range(1))
    monkeypatch.undo()
    world.nothing_is_left_behind()
    world.run(range(3))
    assert world.step.updates == 1


# Freezing.


def freeze_and_thaw(model):
    freeze(model, "[:2]")
    unfreeze(model, "[0]")


def a_block(model):
    with frozen(model, "[:2]"):
        model.train()
        model(BATCHES[torch.float32][0][0])


def a_recomputed_block(model):
    with recompute(model, "*"):
        pass


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", [a_block, a_recomputed_block, freeze_and_thaw])
def test_an_interruption_of_freezing(call, way):
    """A block gives back everything. ``freeze`` froze some layers, and all when called again."""

    def view(model):
        flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        return flags, [
            (m.training, not {"train", "forward", "__reduce_ex__"}.isdisjoint(m.__dict__))
            for m in model.modules()
        ]

    def model():
        made = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        for parameter in made.parameters():
            parameter.grad = torch.ones_like(parameter)
        return made

    call(expected := model())
    k = 0
    while True:
        interrupted = model()
        if not interrupt(WAYS[way], Injector(k), lambda: call(interrupted)):  # noqa: B023
            break
        if call is not freeze_and_thaw:
            assert view(interrupted) == view(expected)
        else:
            call(interrupted)
            assert view(interrupted) == view(expected)
            unfreeze(interrupted)
            assert all(flag for flag, *_ in view(interrupted)[0]) and {(True, False)} == set(
                view(interrupted)[1]
            )
        k += 1
    assert k > 2 or "operations" in way


def test_autocast_by_itself_is_left_at_every_point():
    k = 0
    while interrupt(signals, Injector(k), lambda: amp(dtype=torch.bfloat16).__enter__()):
        torch.clear_autocast_cache()
        assert modes()[0] == 0
        k += 1
    torch.autocast_decrement_nesting()
    torch.set_autocast_enabled("cpu", False)
    assert k > 0
