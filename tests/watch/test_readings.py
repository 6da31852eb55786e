"""The numbers of windows on their way from the device."""

import math

import pytest
import torch
from oracles import loss_of, make_batches, make_model

import trainkit.watch.readings
from trainkit import accumulate, train_step
from trainkit.core.answer import Answer
from trainkit.watch.readings import Readings, Smoothed

BATCHES = make_batches([4] * 12, torch.float32)


@pytest.fixture
def late(monkeypatch):
    """A device that has not got to it yet; ``late.clear()`` has it arrive. ``read`` is only allowed to those who may wait."""
    state = {"late"}
    monkeypatch.setattr(Answer, "known", lambda self: not state)
    return state


def stepped(*parts, **options):
    model = make_model(torch.float32)
    return train_step(torch.optim.AdamW(model.parameters(), fused=True), *parts, **options)(
        lambda batch: loss_of(model, batch)
    )


def test_nothing_is_read_before_it_has_arrived_and_then_in_order(late, monkeypatch):
    step, taken, copies = stepped(max_norm=1.0), [], []
    monkeypatch.setattr(
        trainkit.watch.readings, "Answer", lambda numbers: copies.append(numbers) or Answer(numbers)
    )
    Readings(step, lambda numbers: taken.append(numbers["update"]), least=1)
    with monkeypatch.context() as patch:
        patch.setattr(Answer, "read", lambda self: pytest.fail("the host waits"))
        for batch in BATCHES[:5]:
            step(batch)
    assert taken == [] and len(copies) == 1  # no second one while the first is on its way
    late.clear()
    step(BATCHES[5])
    assert taken == [1, 2, 3, 4, 5, 6] and len(copies) == 2


def test_copies_are_few_and_what_waits_is_bounded(monkeypatch):
    step, taken, copies = stepped(max_norm=1.0), [], []
    monkeypatch.setattr(
        trainkit.watch.readings, "Answer", lambda numbers: copies.append(numbers) or Answer(numbers)
    )
    readings = Readings(step, taken.append, least=8)
    for batch in BATCHES * 2:
        step(batch)
        assert readings.pending < 8
    assert len(copies) == 3 and len(taken) == 24


def test_flush_waits_for_all_that_is_left(late):
    step, taken = stepped(), []
    readings = Readings(step, taken.append, least=2)
    for batch in BATCHES[:5]:
        step(batch)
    assert readings.pending == 5 and taken == []
    readings.flush()
    assert [numbers["update"] for numbers in taken] == [1, 2, 3, 4, 5] and readings.pending == 0


def test_a_copy_that_fails_loses_nothing(monkeypatch):
    step, taken = stepped(), []
    readings = Readings(step, lambda numbers: taken.append(numbers["update"]), least=2)
    with monkeypatch.context() as patch:
        patch.setattr(trainkit.watch.readings, "Answer", lambda numbers: pytest.fail("interrupted"))
        step(BATCHES[0])
        with pytest.raises(pytest.fail.Exception):
            step(BATCHES[1])
    assert readings.pending == 2
    step(BATCHES[2])
    assert taken == [1, 2, 3] and step.updates == 3


def test_the_end_of_a_loop_flushes_however_it_ends(late):
    step, taken = stepped(accumulate(2)), []
    Readings(step, taken.append, least=1)
    for batch in step.over(BATCHES[:3]):
        step(batch)
    assert len(taken) == 2
    for batch in step.over(BATCHES):
        step(batch)
        if step._closed == 4:
            break
    assert len(taken) == 4


def test_closed_it_watches_no_longer():
    step, taken, others = stepped(), [], []
    first, _ = Readings(step, taken.append, least=1), Readings(step, others.append, least=1)
    step(BATCHES[0])
    first.close()
    step(BATCHES[1])
    assert len(taken) == 1 and len(others) == 2


def test_weights_may_be_numbers_and_tensors_in_one_window():
    model, taken = make_model(torch.float32), []
    step = train_step(torch.optim.SGD(model.parameters()), accumulate(3))(
        lambda batch, w: (loss_of(model, batch), w)
    )
    Readings(step, taken.append, least=1)
    weights = [1, torch.tensor(2, dtype=torch.uint8), 5]
    losses = [
        step(batch, weight).loss.item() for batch, weight in zip(BATCHES, weights, strict=False)
    ]
    assert taken[0]["weight"] == 8
    assert taken[0]["loss"] == pytest.approx(
        (losses[0] + 2 * losses[1] + 5 * losses[2]) / 8, rel=1e-6
    )


def test_an_optimizer_need_not_have_a_learning_rate():
    class Halves(torch.optim.Optimizer):
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                parameter.data.mul_(0.5)

    model, taken = make_model(torch.float32), []
    step = train_step(Halves(model.parameters(), {}))(lambda batch: loss_of(model, batch))
    Readings(step, taken.append, least=1)
    step(BATCHES[0])
    assert step.updates == 1 and taken[0]["update"] == 1 and "lr" not in taken[0]


def test_a_window_that_weighs_nothing_has_no_mean():
    model, taken = make_model(torch.float32), []
    step = train_step(torch.optim.SGD(model.parameters()), max_norm=1.0)(
        lambda batch, w: (loss_of(model, batch), w)
    )
    Readings(step, taken.append, least=1)
    step(BATCHES[0], 0)
    step(BATCHES[1], torch.tensor(0))
    assert [(numbers["skipped"], numbers["weight"]) for numbers in taken] == [(1, 0)] * 2
    assert all(math.isnan(numbers["loss"]) for numbers in taken) and "grad_norm" not in taken[0]


def test_smoothed_is_without_a_bias_and_leaves_out_what_is_not_finite():
    average = Smoothed(0.1)
    assert (
        average.add(3.0) == pytest.approx(3.0)
        and average.add(math.inf) == math.inf
        and math.isnan(average.add(math.nan))
    )
    assert average.add(5.0) == pytest.approx((0.9 * 3 + 5) / 1.9)
    assert Smoothed(1.0).add(7.0) == 7.0
