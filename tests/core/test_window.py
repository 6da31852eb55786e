"""Weights: a window is the weighted mean of what is in it, whatever the weights are."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    BATCHES,
    distance,
    loss_of,
    make_batches,
    make_model,
    plain_loop,
    same_bits,
    state_of,
)

from trainkit import accumulate, amp, train_step
from trainkit.core.window import Window, as_weight, power_of_two_near

CPU = torch.device("cpu")
LOSS = torch.tensor(1.0)
FLOAT32 = make_batches([4, 4, 2], torch.float32)
weights = st.lists(st.integers(0, 10**7), min_size=1, max_size=6)


def weighing(model, optimizer, *parts, as_tensor=False, **options):
    """A step that takes a batch and its weight."""
    return train_step(optimizer, *parts, **options)(
        lambda batch, weight: {
            "loss": loss_of(model, batch),
            "weight": torch.tensor(weight) if as_tensor else weight,
        }
    )


# The arithmetic.


@given(weights, st.integers(1, 8), st.booleans(), st.none() | st.sampled_from([0.5, 1.0, 1024.0]))
def test_shares_over_the_divisor_are_the_weights_over_their_sum(
    given, length, as_tensor, reference
):
    window, shares, total = Window(length, reference), [], sum(given)
    for number in given:
        weight = as_weight(torch.tensor(number) if as_tensor else number, CPU)
        shares.append(float(window.share(weight)))
        window.add(LOSS, weight)
    for number, share in zip(given, shares, strict=True):
        if total:
            assert math.isclose(share / float(window.divisor()), number / total, rel_tol=1e-12)
    assert bool(window.is_empty()) is (total == 0)
    following = float(window.next_reference())
    assert math.log2(following).is_integer()
    if total and following != float(window.reference) / 2:  # which is the least
        assert 0.7 < total / len(given) / following < 1.5
    elif total:
        assert total / len(given) / following < 1.5
    elif reference:
        assert following == reference


@given(st.integers(1, 8), st.integers(1, 8))
def test_without_weights_a_full_window_is_divided_by_nothing(length, count):
    window = Window(length, None)
    for _ in range(count):
        assert window.share(None) == 1 / length
        window.add(LOSS, None)
    assert window.divisor() == count / length and window.next_reference() is None
    assert window.is_empty() is False


@pytest.mark.parametrize("weight", [1, 3, 1000, 65536, 10**7])
def test_the_share_of_a_first_weight_is_near_the_share_without_weights(weight):
    for given_as in (weight, torch.tensor(weight), float(weight)):
        share = Window(4, None).share(as_weight(given_as, CPU))
        assert 0.7 < float(share) * 4 < 1.5


def test_a_mean_over_weights_of_zero_is_nan():
    for weight in (0, torch.tensor(0)):
        window = Window(2, None)
        for _ in range(2):
            window.share(as_weight(weight, CPU))
            window.add(LOSS, as_weight(weight, CPU))
        assert window.mean_loss(1).isnan() and window.mean_loss(2).isnan()


@pytest.mark.parametrize("total", [0.0, math.inf, math.nan])
def test_a_reference_stays_where_the_total_of_the_weights_is_no_number_above_zero(total):
    mean = torch.tensor(total, dtype=torch.float64)
    assert power_of_two_near(mean, least=32.0, otherwise=64.0) == 64.0


def test_real_weights_beside_counts_on_the_device_are_summed_in_float64():
    window = Window(3, None)
    for number in (torch.tensor(3), 0.1, torch.tensor(2)):
        window.add(LOSS, as_weight(number, CPU))
    assert float(window.total()) == 3 + 0.1 + 2


def test_a_weight_that_lies_on_the_cpu_is_read_there_and_not_copied_to_a_device():
    meta = torch.device("meta")
    assert as_weight(torch.tensor(3), meta) == 3 and as_weight(torch.tensor(0.5), meta) == 0.5
    on_device = as_weight(torch.tensor(3), CPU)
    assert isinstance(on_device, torch.Tensor) and on_device.dtype == torch.float64


# In a step.


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        (np.uint8, [200, 200, 100, 50]),
        (np.int64, [200, 200, 100, 50]),
        (torch.uint8, [200, 200, 100, 50]),
        (torch.int8, [100, 100, 100, 50]),
        (torch.int32, [2**30] * 3 + [7]),
        (torch.int64, [2**30] * 3 + [7]),
    ],
)
def test_numbers_of_numpy_do_not_wrap_around(model, optimizer, kind, numbers):
    """And tensors do not either: four times 200 is 32 in uint8."""
    step = train_step(optimizer, accumulate(4))(
        lambda batch, weight: (
            loss_of(model, batch),
            torch.tensor(weight, dtype=kind) if isinstance(kind, torch.dtype) else kind(weight),
        )
    )
    batches, file = make_batches([3, 3, 3, 3]), io.BytesIO()
    results = [step(batch, number) for batch, number in zip(batches[:2], numbers, strict=False)]
    torch.save(step.state_dict(), file)
    step.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    results += [step(*pair) for pair in zip(batches[2:], numbers[2:], strict=True)]
    theirs = make_model()
    plain_loop(
        theirs, other := torch.optim.AdamW(theirs.parameters(), lr=0.01), batches, 4, numbers
    )
    assert distance(state_of(model, optimizer), state_of(theirs, other)) <= 1e-12
    losses = [loss_of(make_model(), batch).item() for batch in batches]
    mean = sum(x * n for x, n in zip(losses, numbers, strict=True)) / sum(numbers)
    assert results[-1].updated and math.isclose(results[-1].window_loss.item(), mean)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_real_weights_are_those_of_the_weighted_mean(model, optimizer, as_tensor):
    """Also from window to window, with the reference of the one before."""
    numbers = [0.3, 7.25, 1e-3, 40.0, 0.6, 5e4]
    batches = make_batches([3] * 6)
    step = weighing(model, optimizer, accumulate(2), as_tensor=as_tensor)
    for batch, number in zip(batches, numbers, strict=True):
        step(batch, number)
    theirs = make_model()
    plain_loop(
        theirs, other := torch.optim.AdamW(theirs.parameters(), lr=0.01), batches, 2, numbers
    )
    tolerance = 1e-6 if as_tensor else 1e-12  # torch.tensor(0.3) is a float32
    assert distance(state_of(model, optimizer), state_of(theirs, other)) <= tolerance


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_weights_that_sum_to_zero_skip_the_update(as_tensor, fused, max_norm):
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    step = weighing(model, optimizer, accumulate(2), as_tensor=as_tensor, max_norm=max_norm)
    before = state_of(model, optimizer)
    results = [step(FLOAT32[0], 0), step(FLOAT32[0], 0)]
    assert results[1].complete and not results[1].updated and step.skipped == 1
    assert same_bits(before[:4], [p.detach() for p in model.parameters()])
    assert all(p.grad is None for p in model.parameters())
    step(FLOAT32[0], 0)
    assert step(FLOAT32[0], 5).updated and step.updates == 1


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_weight_of_zero_contributes_nothing(model, optimizer, as_tensor):
    step = weighing(model, optimizer, accumulate(2), as_tensor=as_tensor)
    step(BATCHES[0], 0)
    step(BATCHES[1], 7)
    theirs = make_model()
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    plain_loop(theirs, other, [BATCHES[1]])
    assert distance(state_of(model, optimizer), state_of(theirs, other)) <= 1e-12


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_on_the_device_that_is_no_number_skips_its_window_only(fused, weight):
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    step = weighing(model, optimizer, as_tensor=True)
    assert [step(FLOAT32[0], w).updated for w in (2.0, weight, 2.0)] == [True, False, True]


# The reference, and the range of the loss scale.


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_window_of_weight_zero_does_not_lose_the_reference(as_tensor):
    model = make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = weighing(model, optimizer, accumulate(2), amp(dtype=torch.float16), as_tensor=as_tensor)
    weights = (10**6, 10**6, 0, 0, 10**6, 10**6)
    updated = [step(FLOAT32[0], weight).updated for weight in weights]
    assert updated == [False, True, False, False, False, True]
    assert step.state_dict()["loss_scale"] == 65536


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("before", "then"), [(1, 10**7), (10**7, 1), (3, 70_000)])
def test_a_drift_of_the_weights_costs_at_most_one_skipped_window(before, then, fused, as_tensor):
    """Rows become tokens, for example: the reference follows the weights by one window."""
    model = make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    step = weighing(model, optimizer, accumulate(2), amp(dtype=torch.float16), as_tensor=as_tensor)
    for weight in [before] * 4 + [then] * 8:
        step(FLOAT32[0], weight)
    state = step.state_dict()
    assert state["skipped"] <= 1 and state["updates"] >= 5 and state["loss_scale"] >= 32768
