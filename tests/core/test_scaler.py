import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import OPTIMIZERS, loss_of, make_batches, make_model
from torch import nn
from torch.nn import functional as F

from trainkit import accumulate, amp, train_step
from trainkit.core.answer import Answer
from trainkit.core.scaler import LossScale, Streak


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 3), st.booleans())
def test_the_loss_scale_follows_the_rule_of_grad_scaler(overflows, interval, private):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=interval)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    ours = LossScale(1024.0, interval, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        if not private:
            patch.setattr("trainkit.core.scaler._amp_update_scale_", None)
        for overflow in overflows:
            scaler.scale(parameter.sum() * (math.inf if overflow else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            ours.update(torch.tensor(float(overflow)))
            assert ours.value.item() == scaler.get_scale()
            assert ours.growth_tracker.item() == scaler._get_growth_tracker()


def test_a_streak_is_looked_at_when_it_could_be_the_limit(monkeypatch):
    looked = []
    monkeypatch.setattr(
        Answer, "read", lambda answer, read=Answer.read: looked.append(1) or read(answer)
    )
    streak, good, found = Streak(5, lag=0), torch.tensor(0.0), torch.tensor(1.0)
    assert [streak.add(found) for _ in range(4)] == [False] * 4 and not looked
    assert not streak.add(good) and len(looked) == 1
    for _ in range(20):
        streak.add(good)
    assert len(looked) == 5
    assert [streak.add(f) for f in [good, good, found, found, found]] == [
        False
    ] * 5 and streak.length == 3
    assert not streak.add(good)  # unseen: two more could be the limit
    assert [streak.add(found) for _ in range(5)] == [False] * 4 + [True]


def test_a_streak_is_known_late_where_the_device_is_late_and_by_all_ranks_at_the_same_time(
    monkeypatch,
):
    arrived = []
    monkeypatch.setattr(Answer, "known", lambda _: bool(arrived))
    alone, together = Streak(3, lag=0), Streak(3, lag=4)
    told = [(alone.add(torch.ones(())), together.add(torch.ones(()))) for _ in range(7)]
    assert told == [(False, False)] * 6 + [(False, True)]
    arrived.append(1)
    assert alone.add(torch.ones(())) and alone.length == 3


@pytest.mark.parametrize("kind", ["AdamW", "AdamW fused"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_updates_skipped_in_a_row_are_an_error_that_says_where(kind, dtype):
    model = make_model(torch.float32)
    before = [p.clone() for p in model.parameters()]

    @train_step(
        OPTIMIZERS[kind](model.parameters()),
        accumulate(2),
        amp(dtype=dtype),
        module=model,
        max_skips=3,
    )
    def step(batch, bad):
        hidden = model[:2](batch[0])
        if bad:
            hidden.register_hook(lambda gradient: gradient * math.inf)
        return F.mse_loss(model[2](hidden), batch[1])

    batches = make_batches([4] * 2, torch.float32)

    def window(bad):
        step(batches[0], False)
        return step(batches[1], bad)

    assert window(False).updated
    before = [p.clone() for p in model.parameters()]
    for _ in range(2):
        assert not window(True).updated
    assert window(False).updated  # the next two are the first in a row again
    for _ in range(2):
        assert not window(True).updated
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=r"^3 updates in a row were skipped") as found:
        window(True)
    message = str(found.value)
    assert (
        "those of 2 of 4 parameters, first '0.weight', '0.bias'. The last good update was number 2,"
        in message
    )
    assert ("the loss scale is 2048" in message) is (dtype == torch.float16)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert (step.updates, step.skipped) == (2, 5)
    assert window(False).updated


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


@pytest.mark.parametrize("weight", [None, 2, torch.tensor(2)])
@pytest.mark.parametrize("losses", [1, 3])
def test_a_parameter_of_one_element_does_not_change_what_backward_starts_from(weight, losses):
    """Its gradient may lie in the memory of that, and is added to there."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    step = train_step(torch.optim.SGD([parameter], lr=1.0), accumulate(2))
    for _ in range(8):
        with step:
            step.backward(parameter.squeeze(), weight)
            for _ in range(1, losses):
                step.backward(parameter.squeeze())
    assert step.updates == 4 and math.isclose(parameter.item(), 1 - 4 * losses)


def test_a_half_precision_loss_is_scaled_in_float32():
    model = make_model(torch.float32)
    step = train_step(
        torch.optim.SGD(model.parameters(), lr=0.1),
        accumulate(4),
        amp(dtype=torch.float16, init_scale=2.0**17),
    )(lambda batch: loss_of(model, batch).half())
    assert [step(make_batches([4], torch.float32)[0]).updated for _ in range(4)] == [
        False,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    "dtypes", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]
)
def test_a_state_goes_from_one_precision_to_another(dtypes):
    """As from a T4 to an A100: what has added up of the window is scaled in one, and not in the other."""
    batches, norms = make_batches([4, 4], torch.float32), []
    for first, second in (dtypes, dtypes[1:] * 2):
        model = make_model(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        steps = [
            train_step(optimizer, accumulate(2), amp(dtype=d))(
                lambda batch, m=model: loss_of(m, batch)
            )
            for d in (first, second)
        ]
        steps[0](batches[0])
        steps[1].load_state_dict(steps[0].state_dict())
        norms.append(steps[1](batches[1]).grad_norm.item())
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_a_state_without_a_part_of_it_is_refused_before_anything_changes():
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters()), amp(dtype=torch.float16))(
        lambda batch: loss_of(model, batch)
    )
    step(make_batches([4], torch.float32)[0])
    state = step.state_dict()
    del state["growth_tracker"]
    with pytest.raises(ValueError, match="not the state of a step"):
        step.load_state_dict({**state, "updates": 7})
    assert step.updates == 1
