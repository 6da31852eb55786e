"""Any Python object in any position is accepted, or refused before anything is changed.

A refusal is a TypeError or a ValueError. Where a method of the object raises (``Own``), its
exception may come out as it is: hiding it would help nobody.
"""

import contextlib
import copy
import decimal
import enum
import fractions
import functools
import math
import re
import types
import unittest.mock
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import BATCHES, loss_of, make_model, same_values
from torch import nn

import trainkit
from trainkit import (
    History,
    Step,
    accumulate,
    amp,
    freeze,
    frozen,
    frozen_parameters,
    model_summary,
    train_step,
    trainable_parameters,
    unfreeze,
)


class Own(Exception):
    """What an object raises by itself."""


def hostile(*names):
    """An object whose methods of these names raise."""

    def method(self, *_, **__):
        raise Own

    return type("Hostile", (), dict.fromkeys(names, method))()


def lying(**answers):
    """An object whose methods of these names give these answers."""
    return type(
        "Liar",
        (),
        {f"__{name}__": lambda self, *_, answer=answer: answer for name, answer in answers.items()},
    )()


class Color(enum.IntEnum):
    RED = 1


class LossOnly:
    def __init__(self, loss):
        self.loss = loss


class Raising(dict):
    def __getitem__(self, key):
        raise Own


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(3)


def generator():
    yield 1


async def coroutine_function():
    pass


OBJECTS = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "1": lambda: 1,
    "-1": lambda: -1,
    "2**70": lambda: 2**70,
    "10**400": lambda: 10**400,
    "-10**400": lambda: -(10**400),
    "10**5000": lambda: 10**5000,
    "0.5": lambda: 0.5,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "1e39": lambda: 1e39,
    "1e300": lambda: 1e300,
    "1e-300": lambda: 1e-300,
    "5e-324": lambda: 5e-324,
    "complex": lambda: 1j,
    "Fraction": lambda: fractions.Fraction(1, 3),
    "Decimal": lambda: decimal.Decimal("0.5"),
    "Decimal nan": lambda: decimal.Decimal("sNaN"),
    "IntEnum": lambda: Color.RED,
    "str": lambda: "",
    "str pattern": lambda: "[0]",
    "str bad pattern": lambda: "[",
    "str surrogate": lambda: "\udcff.weight",
    "str null": lambda: "\0",
    "str long": lambda: "a" * 100_000,
    "str index": lambda: "[" + "9" * 5000 + "]",
    "str stars": lambda: "**.**.**.**",
    "bytes": lambda: b"0",
    "bytearray": lambda: bytearray(b"0"),
    "list": list,
    "tuple": tuple,
    "dict": dict,
    "set": lambda: {1},
    "nested": lambda: [[{"a": (1, [None])}]],
    "itself": lambda: (lambda a: a.append(a) or a)([]),
    "deep": lambda: functools.reduce(lambda a, _: [a], range(5000), []),
    "range": lambda: range(3),
    "slice": lambda: slice(1),
    "ellipsis": lambda: ...,
    "NotImplemented": lambda: NotImplemented,
    "object": object,
    "class": lambda: int,
    "Tensor class": lambda: torch.Tensor,
    "Module class": lambda: nn.Linear,
    "Optimizer class": lambda: torch.optim.SGD,
    "amp itself": lambda: amp,
    "frozen class": lambda: frozen,
    "Step class": lambda: Step,
    "module": lambda: math,
    "lambda": lambda: lambda *_: None,
    "lambda raising": lambda: hostile("__call__"),
    "builtin": lambda: len,
    "partial": lambda: functools.partial(int, "3"),
    "method": lambda: [].append,
    "generator": generator,
    "generator function": lambda: generator,
    "coroutine function": lambda: coroutine_function,
    "exception": lambda: ValueError("x"),
    "exception class": lambda: KeyboardInterrupt,
    "Mock": unittest.mock.MagicMock,
    "Mock of a tensor": lambda: unittest.mock.MagicMock(spec=torch.Tensor),
    "Mock of an optimizer": lambda: unittest.mock.MagicMock(spec=torch.optim.SGD),
    "Mock of a module": lambda: unittest.mock.MagicMock(spec=nn.Module),
    "eq true": lambda: lying(eq=True, hash=1),
    "len negative": lambda: lying(len=-1),
    "len huge": lambda: lying(len=2**80, iter=iter(())),
    "len str": lambda: lying(len="3", getitem=None),
    "iter none": lambda: lying(iter=None),
    "float str": lambda: lying(float="x", int="x", index="x"),
    "loss only": lambda: LossOnly(3),
    "loss none": lambda: LossOnly(None),
    "SimpleNamespace": lambda: types.SimpleNamespace(loss=None, weight=None, step=None, plan=3),
    "np int": lambda: np.int64(2),
    "np uint8": lambda: np.uint8(200),
    "np float": lambda: np.float32(0.5),
    "np nan": lambda: np.float64("nan"),
    "np bool": lambda: np.bool_(True),
    "np array": lambda: np.arange(3),
    "np 0-d": lambda: np.array(2),
    "np object": lambda: np.array([None, "a"], dtype=object),
    "np str": lambda: np.str_("[0]"),
    "dtype": lambda: torch.float16,
    "dtype int": lambda: torch.int32,
    "dtype other": lambda: torch.float64,
    "device": lambda: torch.device("cpu"),
    "device meta": lambda: torch.device("meta"),
    "device str": lambda: "cuda:99",
    "layout": lambda: torch.strided,
    "size": lambda: torch.Size([2]),
    "0-d": lambda: torch.tensor(1.5),
    "0-d int": lambda: torch.tensor(2),
    "0-d bool": lambda: torch.tensor(True),
    "0-d complex": lambda: torch.tensor(1j, requires_grad=True),
    "0-d nan": lambda: torch.tensor(math.nan, requires_grad=True),
    "0-d leaf": lambda: torch.tensor(1.5, requires_grad=True),
    "0-d half": lambda: torch.tensor(1.5, dtype=torch.float16, requires_grad=True),
    "0-d float8": lambda: torch.tensor(1.5).to(torch.float8_e4m3fn),
    "0-d meta": lambda: torch.tensor(1.5, device="meta"),
    "0-d meta int": lambda: torch.tensor(2, device="meta"),
    "0-d sparse": lambda: torch.sparse_coo_tensor(torch.zeros(0, 1, dtype=torch.long), [1.0], ()),
    "1-d": lambda: torch.ones(3),
    "1-d leaf": lambda: torch.ones(1, requires_grad=True),
    "empty": lambda: torch.ones(0),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
    "nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "inference tensor": lambda: torch.inference_mode()(torch.ones)(()),
    "parameter": lambda: nn.Parameter(torch.ones(2)),
    "parameter 0-d": lambda: nn.Parameter(torch.ones(())),
    "Linear": lambda: nn.Linear(2, 2),
    "module without init": lambda: type("Forgot", (nn.Module,), {"__init__": lambda self: None})(),
    "meta Linear": lambda: nn.Linear(2, 2, device="meta"),
    "Lazy": Lazy,
    "UninitializedParameter": lambda: nn.UninitializedParameter(),
    "ModuleList": lambda: nn.ModuleList([nn.Linear(2, 2)]),
    "empty ModuleList": lambda: nn.ModuleList(),
    "empty Sequential": lambda: nn.Sequential(),
    "scripted": lambda: torch.jit.ScriptModule(),
    "SGD": lambda: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1),
    "LBFGS": lambda: torch.optim.LBFGS([nn.Parameter(torch.ones(2))]),
    "scheduler": lambda: torch.optim.lr_scheduler.StepLR(
        torch.optim.SGD([nn.Parameter(torch.ones(2))]), 1
    ),
    "plateau step": lambda: (
        torch.optim.lr_scheduler.ReduceLROnPlateau(
            torch.optim.SGD([nn.Parameter(torch.ones(2))])
        ).step
    ),
    "scaler": lambda: torch.amp.GradScaler("cpu"),
    "context": lambda: contextlib.nullcontext(),
    "no_grad": lambda: torch.no_grad(),
    "accumulate": lambda: accumulate(2),
    "amp": lambda: amp(),
    "frozen": lambda: frozen(nn.Linear(2, 2)),
    "unbound step": lambda: train_step(torch.optim.SGD([nn.Parameter(torch.ones(2))])),
    "step": lambda: accumulate(2)(lambda: None),
    "raising dict": lambda: Raising(loss=3, updates=0, skipped=0),
    "string pattern": lambda: re.compile("a"),
    **{
        name: functools.partial(hostile, name)
        for name in (
            *(
                "__eq__",
                "__len__",
                "__iter__",
                "__bool__",
                "__call__",
                "__getattr__",
                "__getattribute__",
                "__repr__",
                "__str__",
            ),
            *(
                "__hash__",
                "__float__",
                "__int__",
                "__index__",
                "__getitem__",
                "__contains__",
                "__format__",
                "__enter__",
                "__lt__",
            ),
        )
    },
    "everything raises": lambda: hostile(
        "__eq__", "__len__", "__iter__", "__bool__", "__getattr__", "__repr__", "__hash__"
    ),
}


# Every position, as a function of a world and of an object.


class World:
    """A model, and a step with a window open."""

    def __init__(self):
        self.model = make_model(torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.batch = tuple(t.float() for t in BATCHES[0])
        self.given = lambda: self.loss()
        self.step = train_step(self.optimizer, accumulate(3), amp(dtype=torch.float16))(
            lambda: self.given()
        )
        for _ in range(4):
            self.step()
        self.by_hand = train_step(self.optimizer, accumulate(2))

    def loss(self):
        return loss_of(self.model, self.batch)

    def state(self):
        """Everything that could have changed."""
        parameters = list(self.model.parameters())
        return (
            [p.detach().clone() for p in parameters],
            [None if p.grad is None else p.grad.clone() for p in parameters],
            [p.requires_grad for p in parameters],
            [(m.training, "train" in vars(m)) for m in self.model.modules()],
            copy.deepcopy(self.optimizer.state_dict()),
            self.step.state_dict(),
            self.by_hand.state_dict(),
            (torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()),
        )

    def returning(self, wrap):
        self.given = lambda: wrap(self.loss())
        return self.step()

    def in_block(self, call):
        with self.by_hand:
            call(self.by_hand)


def yielding_of(world, wrap):
    @accumulate(2, world.model)
    def step():
        yield wrap(world.loss())

    return step


def length_returns(x):
    return lambda updates: x


def function():
    return None


MAKERS = {
    "train_step(x)": lambda w, x: train_step(x),
    "train_step([x])": lambda w, x: train_step([w.optimizer, x]),
    "train_step(_, x)": lambda w, x: train_step(w.optimizer, x),
    "train_step(_, module=x)": lambda w, x: train_step(w.optimizer, module=x),
    "train_step(_, max_norm=x)": lambda w, x: train_step(w.optimizer, max_norm=x),
    "train_step(_, norm_type=x)": lambda w, x: train_step(w.optimizer, max_norm=1.0, norm_type=x),
    "train_step(_, after=x)": lambda w, x: train_step(w.optimizer, after=x),
    "train_step(_, after=[x])": lambda w, x: train_step(w.optimizer, after=[print, x]),
    "train_step(_)(x)": lambda w, x: train_step(w.optimizer)(x),
    "accumulate(x)": lambda w, x: accumulate(x),
    "accumulate(_, x)": lambda w, x: accumulate(2, x),
    "accumulate(_)(x)": lambda w, x: accumulate(2)(x),
    "amp(x)": lambda w, x: amp(x),
    "amp(_, x)": lambda w, x: amp(w.optimizer, x),
    "amp(dtype=x)": lambda w, x: amp(dtype=x),
    "amp(device=x)": lambda w, x: amp(device=x),
    "amp(max_norm=x)": lambda w, x: amp(max_norm=x),
    "amp(norm_type=x)": lambda w, x: amp(norm_type=x),
    "amp(init_scale=x)": lambda w, x: amp(init_scale=x),
    "amp(growth_interval=x)": lambda w, x: amp(growth_interval=x),
    "amp()(x)": lambda w, x: amp()(x),
    "frozen(x)": lambda w, x: frozen(x),
    "frozen(_, x)": lambda w, x: frozen(w.model, x),
    "frozen(_, [x])": lambda w, x: frozen(w.model, ["[0]", x]),
    "frozen(_, lambda: x)": lambda w, x: frozen(w.model, lambda name, parameter: x),
    "frozen(_, eval_mode=x)": lambda w, x: frozen(w.model, eval_mode=x),
    "frozen(_)(x)": lambda w, x: frozen(w.model)(x),
    "frozen_parameters(x)": lambda w, x: frozen_parameters(x),
    "trainable_parameters(x)": lambda w, x: trainable_parameters(x),
    "Step(x)": lambda w, x: Step(x),
    "Step(x, x)": lambda w, x: Step(x, x),
    "Step(_, x)": lambda w, x: Step(w.step._plan, x),
    "StepResult(x)": lambda w, x: trainkit.StepResult(x),
}
CALLS = {
    "freeze(x)": lambda w, x: freeze(x),
    "freeze(_, x)": lambda w, x: freeze(w.model, x),
    "freeze(_, [x])": lambda w, x: freeze(w.model, ["[0]", x]),
    "unfreeze(x)": lambda w, x: unfreeze(x),
    "unfreeze(_, x)": lambda w, x: unfreeze(w.model, x),
    "return x": lambda w, x: w.returning(lambda loss: x),
    "return loss, x": lambda w, x: w.returning(lambda loss: (loss, x)),
    "return x, 1": lambda w, x: w.returning(lambda loss: (x, 1)),
    "return {loss: x}": lambda w, x: w.returning(lambda loss: {"loss": x}),
    "return {weight: x}": lambda w, x: w.returning(lambda loss: {"loss": loss, "weight": x}),
    "return .loss = x": lambda w, x: w.returning(lambda loss: LossOnly(x)),
    "return .weight = x": lambda w, x: w.returning(
        lambda loss: types.SimpleNamespace(loss=loss, weight=x)
    ),
    "yield x": lambda w, x: yielding_of(w, lambda loss: x)(),
    "yield loss, x": lambda w, x: yielding_of(w, lambda loss: (loss, x))(),
    "backward(x)": lambda w, x: w.in_block(lambda step: step.backward(x)),
    "backward(loss, x)": lambda w, x: w.in_block(lambda step: step.backward(w.loss(), x)),
    "over(x)": lambda w, x: w.step.over(x),
    "list(over(x))": lambda w, x: [None for _, _ in zip(range(9), w.step.over(x), strict=False)],
    "over(_, x)": lambda w, x: w.step.over([], x),
    "over(progress=x)": lambda w, x: list(w.step.over([], progress=x)),
    "History(x)": lambda w, x: History(x),
    "History(_, log=x)": lambda w, x: History(w.step, log=x),
    "History.load_state_dict(x)": lambda w, x: History(w.step).load_state_dict(x),
    "model_summary(x)": lambda w, x: model_summary(x),
    "model_summary(_, x)": lambda w, x: model_summary(w.model, x),
    "over([x])": lambda w, x: list(w.step.over([x, x])),
    "length": lambda w, x: train_step(w.optimizer, accumulate(length_returns(x)))(w.loss)(),
    "load_state_dict(x)": lambda w, x: w.step.load_state_dict(x),
    "load_state_dict({x: x})": lambda w, x: w.step.load_state_dict({x: x}),
}


def own_errors(x):
    """What comes of the object alone, when it is shown, counted or asked for yes or no."""
    found = [Own]
    for ask in (repr, len, bool, lambda x: x.param_groups):
        try:
            ask(x)
        except Exception as error:
            found.append(type(error))
    return tuple(found)


def attempt(call, world, x, before=None):
    """Whether the object was accepted; where it was not, nothing may have changed."""
    before = world.state() if before is None else before
    try:
        call(world, x)
    except (TypeError, ValueError) as error:
        refused = error
    except own_errors(x) as error:
        refused = error
    else:
        return True
    assert same_values(before, world.state()), refused
    return False


@pytest.fixture(autouse=True)
def warnings_are_not_of_interest():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("position", MAKERS)
def test_what_makes_something_changes_nothing(position):
    world = World()
    before = world.state()
    for make in OBJECTS.values():
        attempt(MAKERS[position], world, make(), before)
    assert same_values(before, world.state())


@pytest.mark.parametrize("position", CALLS)
def test_what_is_refused_changes_nothing(position):
    world = World()
    before = world.state()
    for make in OBJECTS.values():
        if attempt(CALLS[position], world, make(), before):
            world = World()


NESTED = st.recursive(
    st.sampled_from(list(OBJECTS.values())),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda makers: lambda: [make() for make in makers]),
        st.lists(inner, max_size=3).map(lambda makers: lambda: tuple(make() for make in makers)),
        st.dictionaries(
            st.sampled_from(["loss", "weight", "updates", "skipped", "window", 0]),
            inner,
            max_size=3,
        ).map(lambda makers: lambda: {key: make() for key, make in makers.items()}),
        inner.map(lambda make: lambda: LossOnly(make())),
        inner.map(lambda make: lambda: lambda *_: make()),
    ),
    max_leaves=5,
)


@given(NESTED, st.sampled_from([*MAKERS.values(), *CALLS.values()]))
def test_objects_within_objects(make, call):
    attempt(call, World(), make())


USES = {
    "train_step": lambda w, made: made(w.loss)(),
    "amp": lambda w, made: train_step(w.optimizer, made)(w.loss)(),
    "accumulate": lambda w, made: train_step(w.optimizer, made)(w.loss)(),
    "frozen": lambda w, made: made.__enter__() and made.__exit__(None, None, None),
}
IN_USE = [
    *(
        "train_step(_, module=x)",
        "train_step(_, max_norm=x)",
        "train_step(_, norm_type=x)",
        "accumulate(_, x)",
        "amp(dtype=x)",
    ),
    *(
        "amp(max_norm=x)",
        "amp(norm_type=x)",
        "amp(init_scale=x)",
        "amp(growth_interval=x)",
        "frozen(_, x)",
        "frozen(_, [x])",
    ),
    "amp(device=x)",
]


@pytest.mark.parametrize("position", IN_USE)
def test_what_is_accepted_can_be_used(position):
    """A value that the first call would choke on is refused where it is given."""
    accepted, world = 0, World()
    for name, make in OBJECTS.items():
        try:
            made = MAKERS[position](world, make())
        except Exception:
            continue
        if "cuda" in name:  # there is autocast for it, and no device here
            continue
        USES[position.partition("(")[0]](world, made)
        accepted, world = accepted + 1, World()
    assert accepted


REFUSALS = [
    (lambda w: train_step(w.optimizer, max_norm=1e300), "1e+300"),
    (lambda w: train_step(w.optimizer, max_norm=1e-300), "1e-300"),
    (lambda w: amp(init_scale=1e39), "1e+39"),
    (lambda w: amp(growth_interval=2**40), "1099511627776"),
    (lambda w: amp(device="meta"), "'meta'"),
    (lambda w: accumulate(-1), "-1"),
    (lambda w: accumulate(2, OBJECTS["module without init"]()), "Forgot"),
    (lambda w: frozen(OBJECTS["module without init"]()), "Forgot"),
    (lambda w: w.returning(lambda loss: (loss, -3)), "-3"),
    (lambda w: w.returning(lambda loss: (loss, torch.tensor(2, device="meta"))), "meta"),
    (lambda w: w.returning(lambda loss: OBJECTS["nested tensor"]()), "nested"),
    (lambda w: w.step.over(3), "int"),
    (lambda w: w.step.load_state_dict(torch.ones(3)), "step.state_dict()"),
]


@pytest.mark.parametrize(("call", "value"), REFUSALS)
def test_a_refusal_says_what_came_and_what_to_write(call, value):
    with pytest.raises((TypeError, ValueError)) as raised:
        call(World())
    assert value in str(raised.value) and str(raised.value).count("`") >= 2


def test_what_is_given_at_another_time_is_a_runtime_error():
    world = World()
    before = world.state()
    with pytest.raises(RuntimeError, match="inside a micro-batch"):
        world.by_hand.backward(world.loss())
    with world.by_hand, pytest.raises(RuntimeError, match="already running"), world.by_hand:
        pass
    assert same_values(before, world.state())
