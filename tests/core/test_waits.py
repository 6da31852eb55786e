"""Nothing on the path of a call waits for the device.

An accelerator computes behind the host, which waits as soon as it reads a number from a tensor. A
CPU has every number at once, so here each read counts as a wait, and no answer ever arrives.
"""

import math

import pytest
import torch
from oracles import loss_of, make_batches, make_model
from torch.utils._python_dispatch import TorchDispatchMode

from trainkit import History, accumulate, amp, frozen, microbatch, recompute, train_step
from trainkit.core.update import Answer

BATCHES = make_batches([4, 3, 2], torch.float32)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait: ``item``, ``bool``, ``float`` and other reads of numbers."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        reads = "_local_scalar_dense", "equal", "nonzero"
        self.count += operation.overloadpacket.__name__ in reads
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """Counts waits in a ``with`` block. Three reads are no operations on a CPU."""
    found = Waits()

    def counted(read):
        def reads(tensor, *args, **kwargs):
            found.count += 1
            return read(tensor, *args, **kwargs)

        return reads

    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    monkeypatch.setattr(Answer, "known", lambda answer: False)
    monkeypatch.setattr(Answer, "read", counted(Answer.read))
    return found


def waits_of(calls, waits):
    """How often each call waits."""
    found = []
    for call in calls:
        with waits:
            before = waits.count
            call()
            found.append(waits.count - before)
    return found


PARTS = {
    "none": lambda model: [],
    "float16": lambda model: [amp(dtype=torch.float16, init_scale=2.0**40)],  # updates are skipped
    "bfloat16": lambda model: [amp(dtype=torch.bfloat16)],
    "layers": lambda model: [frozen(model, "[0]"), recompute(model, "[2]")],
    "chunks": lambda model: [microbatch(2)],
}
WEIGHTS = {"no weight": None, "rows": 4, "tokens": torch.tensor(4)}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("parts", PARTS)
def test_a_call_with_a_fused_optimizer_never_waits(parts, weight, waits):
    """Open and closing calls; enough updates for the first question about skips."""
    model, weight = make_model(torch.float32), WEIGHTS[weight]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    @train_step(optimizer, accumulate(3), *PARTS[parts](model), max_norm=0.1)
    def step(x, y):
        loss = loss_of(model, (x, y))
        return loss if weight is None else (loss, weight)

    History(step)
    calls = [lambda batch=batch: step(*batch) for batch in BATCHES * 30]
    assert waits_of(calls, waits) == [0] * 90


def test_a_block_with_a_fused_optimizer_never_waits(waits):
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = train_step(optimizer, accumulate(3), amp(dtype=torch.float16), max_norm=0.1)

    def block(batch):
        with step:
            step.backward(loss_of(model, batch), torch.tensor(3))

    calls = [lambda batch=batch: block(batch) for batch in BATCHES * 30]
    assert waits_of(calls, waits) == [0] * 90


def test_a_scheduler_in_after_waits_for_the_update_before_alone(waits):
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    after = torch.optim.lr_scheduler.ConstantLR(optimizer).step
    step = train_step(optimizer, accumulate(3), max_norm=0.1, after=after)
    step = step(lambda batch: loss_of(model, batch))
    found = waits_of([lambda batch=batch: step(batch) for batch in BATCHES * 4], waits)
    is_waiting = [count > 0 for count in found]
    assert is_waiting == [False] * 3 + [False, False, True] * 3


@pytest.mark.parametrize("face", ["return", "yield"])
def test_any_other_update_waits_once_and_an_open_call_never(face, waits):
    model = make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def yielding(batch):
        yield loss_of(model, batch)
        optimizer.step()

    function = yielding if face == "yield" else lambda batch: loss_of(model, batch)
    step = train_step(optimizer, accumulate(3), max_norm=0.1)(function)
    found = waits_of([lambda batch=batch: step(batch) for batch in BATCHES * 4], waits)
    assert found == [0, 0, 1] * 4


def test_each_way_to_read_a_number_counts(waits):
    number = torch.ones(())
    ways = number.item, number.tolist, number.cpu, number.numpy, number.__bool__, number.__float__
    more = number.__int__, lambda: torch.equal(number, number), lambda: math.sqrt(number)
    assert waits_of([*ways, *more], waits) == [1] * 9
