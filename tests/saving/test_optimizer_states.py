"""States of optimizers of every form: what is stored comes back, and what is not is found early."""

import enum
import re
import tempfile
from collections import OrderedDict, deque, namedtuple
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saving_runs import ALWAYS, Killed, batches, names, same, same_when_killed
from torch import nn

from trainkit import accumulate, amp, resumable, train_step

Pair = namedtuple("Pair", "first second")
Mode = enum.Enum("Mode", ["FAST", "EXACT"])


class Growing(list):
    """Its pickle appends to it, which torch's safe unpickler allows for lists alone."""


class Keeping(torch.optim.SGD):
    """SGD that also keeps ``keep(gradient)`` for every parameter, from its first step on."""

    def __init__(self, params, keep, **group):
        super().__init__(params, lr=0.1)
        self.keep, self.param_groups[0] = keep, self.param_groups[0] | group

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p].setdefault("kept", self.keep(p.grad))
        super().step()


class Lookahead(torch.optim.Optimizer):
    """Steps an optimizer, and every second time goes halfway back; a state without groups."""

    def __init__(self, base, nest):
        super().__init__(base.param_groups, {})
        self.base, self.nest, self.count = base, nest, 0
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    def step(self, closure=None):
        self.base.step()
        self.count += 1
        if self.count % 2 == 0:
            for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                p.data.copy_(slow.lerp_(p.data, 0.5))

    def state_dict(self):
        return self.nest({"base": self.base.state_dict(), "slow": self.slow, "count": self.count})

    def load_state_dict(self, state):
        state = state[0] if isinstance(state, (list, tuple)) else state.get("all", state)
        self.base.load_state_dict(state["base"])
        self.param_groups, self.count = self.base.param_groups, state["count"]
        self.slow = [slow.clone() for slow in state["slow"]]


class Chained(torch.optim.Optimizer):
    """Optimizers as one, whose state is a list."""

    def __init__(self, *optimizers):
        super().__init__([group for o in optimizers for group in o.param_groups], {})
        self.optimizers = optimizers

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states):
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for o in self.optimizers for group in o.param_groups]


def chained(model):
    return Chained(
        torch.optim.AdamW(model[0].parameters(), lr=0.01),
        torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9),
    )


OPTIMIZERS = {
    "dict": lambda m: Lookahead(torch.optim.AdamW(m.parameters()), dict),
    "list": lambda m: Lookahead(torch.optim.AdamW(m.parameters()), lambda state: [state]),
    "tuple": lambda m: Lookahead(torch.optim.AdamW(m.parameters()), lambda state: (state,)),
    "nested": lambda m: Lookahead(torch.optim.AdamW(m.parameters()), lambda s: {"all": s}),
    "chained": chained,
    "around a chain": lambda m: Lookahead(chained(m), dict),
}


@pytest.mark.parametrize("form", OPTIMIZERS)
def test_an_optimizer_around_others_goes_on_with_the_same_bits(form, tmp_path):
    def loops(path, stop):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 8))
        optimizer = OPTIMIZERS[form](model)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        step = train_step(optimizer, accumulate(2), after=schedule.step)(
            lambda x: model(x).square().mean()
        )
        objects = {"model": model, "optimizer": optimizer, "schedule": schedule, "step": step}
        count = 0
        with resumable(path, every=ALWAYS, **objects) if path else nullcontext() as run:
            for _ in run.epochs(2) if path else range(2):
                for x in step.over(batches(7)):
                    if count == stop:
                        raise Killed
                    step(x)
                    count += 1
        return [thing.state_dict() for thing in objects.values()]

    assert same(same_when_killed(loops, tmp_path, (3, 8, 11)), loops(None, None))


def test_another_number_of_parameters_in_a_chain_is_refused(tmp_path):
    def enter(model):
        optimizer = chained(model)
        step = train_step(optimizer)(lambda x: model(x).mean())
        with resumable(tmp_path, log=[], optimizer=optimizer, step=step, model=model[2]) as run:
            list(run.epochs(1))

    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="Parameter"):
        enter(model)
    model[0] = nn.Linear(8, 8, bias=False)
    with (
        pytest.raises(ValueError, match=r"2 parameters for optimizer\.param_groups\.0.* 1 "),
        pytest.warns(UserWarning, match="Parameter"),
    ):
        enter(model)


def run_keeping(path, keep, count=4, stop=None, seen=None, dtype=torch.float32, **group):
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False).to(dtype)
    optimizer = Keeping(model.parameters(), keep, **group)
    step = train_step(optimizer)(lambda x: model(x.to(dtype)).square().mean())
    with resumable(path, every=ALWAYS, model=model, optimizer=optimizer, step=step):
        for i, x in enumerate(step.over(batches(count))):
            if i == stop:
                raise Killed
            step(x)
            if seen is not None:
                seen.append(i)
    return optimizer.state_dict()


leaves = st.sampled_from(
    [
        *(torch.bfloat16, torch.device("cpu"), torch.Size([2, 3]), torch.strided, 1j, slice(2)),
        *(
            np.arange(2.0),
            np.float32(1),
            frozenset([1]),
            {2},
            b"a",
            "text",
            None,
            1.5,
            bytearray(b"b"),
            torch.tensor([2**40]),
        ),
        *(torch.ones(2, dtype=kind) for kind in (torch.float64, torch.bfloat16, torch.bool)),
    ]
)
kept = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3).flatmap(
        lambda items: st.sampled_from(
            [
                *(items, tuple(items), deque(items), deque(items, maxlen=3)),
                *(dict(enumerate(items)), OrderedDict(enumerate(items))),
            ]
        )
    ),
    max_leaves=6,
)


@settings(max_examples=settings.default.max_examples // 2)
@given(kept)
def test_what_an_optimizer_keeps_comes_back_as_it_was(value):
    """Torch's own ``load_state_dict`` casts to the dtype of the parameter, and the like."""
    with tempfile.TemporaryDirectory() as path:
        with pytest.raises(Killed):
            run_keeping(path, lambda gradient: value, stop=2, group=value)
        state = run_keeping(path, lambda gradient: "made again", group=None)
    for again in (state["state"][0]["kept"], state["param_groups"][0]["group"]):
        assert repr(again) == repr(value)
        assert getattr(again, "maxlen", None) == getattr(value, "maxlen", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_of_another_dtype_than_its_parameter(dtype, tmp_path):
    """In float32 for bfloat16, as in many optimizers; and the other way."""
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[dtype]

    def keep(gradient):
        return {"moment": gradient.to(other), "past": [gradient.double()]}

    whole = run_keeping(tmp_path / "whole", keep, dtype=dtype)
    with pytest.raises(Killed):
        run_keeping(tmp_path / "killed", keep, stop=2, dtype=dtype)
    again = run_keeping(tmp_path / "killed", keep, dtype=dtype)["state"][0]["kept"]
    assert same(again, whole["state"][0]["kept"])
    assert again["moment"].dtype == other and again["past"][0].dtype == torch.float64


class Projector:
    def __init__(self, gradient):
        self.basis = gradient


UNSTORABLE = {
    "an object": (Projector, "Projector .*`torch.serialization.add_safe_globals([Projector])`"),
    "an object in a deque": (lambda g: deque([{"a": Projector(g)}]), ".0.a Projector"),
    "a named tuple": (lambda g: Pair(g, g), "Pair add_safe_globals([Pair])`"),
    "an enum": (lambda g: Mode.FAST, "Mode add_safe_globals([Mode])`"),
    "a function": (lambda g: lambda: g, "function lambda `"),
    "a subclass": (lambda g: Growing([1]), "Growing"),
}


@pytest.mark.parametrize("every", [ALWAYS, 10**6])
@pytest.mark.parametrize("kind", UNSTORABLE)
def test_what_cannot_be_stored_is_found_after_the_first_update(kind, every, tmp_path):
    keep, words = UNSTORABLE[kind]
    words, seen = ["optimizer.state.0.kept", *words.split()], []
    with pytest.raises(TypeError) as raised:
        run_keeping(tmp_path, keep, seen=seen)
    assert all(
        re.search(re.escape(word).replace(r"\.\*", ".*"), str(raised.value)) for word in words
    )
    assert seen == [0] and not names(tmp_path)


@pytest.mark.skipif(torch.__version__ >= (2, 14), reason="there torch loads it")
def test_what_is_allowed_and_could_not_be_loaded_is_found_as_early(tmp_path):
    seen = []
    with (
        torch.serialization.safe_globals([Growing]),
        pytest.raises(TypeError, match=r"optimizer\.state\.0\.kept .*`"),
    ):
        run_keeping(tmp_path, lambda gradient: Growing([1]), seen=seen)
    assert seen == [0]


@pytest.mark.parametrize("value", [Mode.EXACT, Pair(1, (2, Mode.FAST))])
def test_what_is_allowed_comes_back_as_itself(value, tmp_path):
    with torch.serialization.safe_globals([Mode, Pair]):
        with pytest.raises(Killed):
            run_keeping(tmp_path, lambda gradient: value, stop=2)
        state = run_keeping(tmp_path, lambda gradient: None)
    assert repr(state["state"][0]["kept"]) == repr(value)


def test_found_in_the_second_loop_if_the_first_was_left_after_its_update(tmp_path):
    model = nn.Linear(8, 8)
    optimizer = Keeping(model.parameters(), Projector)
    step, seen = train_step(optimizer)(lambda x: model(x).mean()), []
    with (
        pytest.raises(TypeError, match=r"optimizer\.state\.0\.kept .*Projector"),
        resumable(tmp_path, model=model, optimizer=optimizer, step=step) as run,
    ):
        for _ in run.epochs(3):
            for x in step.over(batches()):
                step(x)
                seen.append(x)
                break
    assert len(seen) == 1


def test_found_after_an_update_that_follows_skipped_ones(tmp_path):
    model = nn.Linear(8, 8)
    optimizer = Keeping(model.parameters(), Projector)
    precision = amp(dtype=torch.float16, init_scale=2.0**24)
    step, seen = train_step(optimizer, precision)(lambda x: model(x).mean()), []
    with (
        pytest.raises(TypeError, match=r"optimizer\.state\.0\.kept .*Projector"),
        resumable(tmp_path, model=model, optimizer=optimizer, step=step),
    ):
        for x in step.over(batches(200)):
            seen.append(step(x).updated)
    assert seen.index(True) == len(seen) - 1 > 0


def test_found_where_the_last_batch_closes_the_first_window(tmp_path):
    model = nn.Linear(8, 8)
    optimizer = Keeping(model.parameters(), Projector)
    step, seen = train_step(optimizer, accumulate(99))(lambda x: model(x).mean()), []
    with (
        pytest.raises(TypeError, match=r"optimizer\.state\.0\.kept .*Projector"),
        resumable(tmp_path, model=model, optimizer=optimizer, step=step) as run,
    ):
        for _ in run.epochs(3):
            for x in step.over(batches()):
                seen.append(step(x).updated)
    assert seen == [False] * 7 + [True]
