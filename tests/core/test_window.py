import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import BATCHES, distance, loss_of, make_model, plain_loop

from trainkit import accumulate, train_step
from trainkit.core.window import Window, widened

weights = st.lists(st.integers(0, 10**7), min_size=1, max_size=6)


@given(weights, st.integers(1, 8), st.booleans(), st.none() | st.sampled_from([0.5, 1.0, 1024.0]))
def test_shares_over_the_divisor_are_the_weights_over_their_sum(
    weights, length, as_tensors, reference
):
    window = Window(length, reference)
    shares = []
    for weight in weights:
        weight = torch.tensor(weight) if as_tensors else weight
        shares.append(float(window.share(weight)))
        window.add(weight)
        assert math.log2(window.reference).is_integer()
    for weight, share in zip(weights, shares, strict=True):
        if sum(weights):
            assert math.isclose(
                share / float(window.divisor()), weight / sum(weights), rel_tol=1e-12
            )
    assert window.next_reference() in (
        [2.0**i for i in range(-4, 25)] if sum(weights) else [reference, reference or 1.0]
    )


@given(st.integers(1, 8), st.integers(1, 8))
def test_without_weights_a_full_window_is_divided_by_nothing(length, count):
    window = Window(length, None)
    for _ in range(count):
        assert window.share(None) == 1 / length
        window.add(None)
    assert window.divisor() == count / length and window.next_reference() is None


@pytest.mark.parametrize("weight", [1, 3, 1000, 65536, 10**7])
def test_the_share_of_a_usual_weight_is_near_that_of_one_without(weight):
    for given_weight in (weight, torch.tensor(weight), float(weight)):
        window = Window(4, None)
        assert 0.7 < float(window.share(given_weight)) * 4 < 1.5


def test_a_mean_over_weights_of_zero_is_nan():
    window = Window(2, None)
    for weight in (0, torch.tensor(0)):
        window.share(weight)
        window.add(weight)
        window.losses.append(torch.tensor(1.0))
    assert window.mean_loss(1).isnan() and window.mean_loss(2).isnan()


@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_numbers_of_numpy_do_not_wrap_around(kind):
    model = make_model()
    step = train_step(torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2))
    step = step(lambda batch: (loss_of(model, batch), kind(200)))
    step(BATCHES[0])
    state = io.BytesIO()
    torch.save(step.state_dict(), state)
    assert torch.load(io.BytesIO(state.getvalue()))["window"]["weights"] == [200]
    step(BATCHES[1])
    theirs = make_model()
    plain_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), BATCHES[:2], 2)
    assert distance(list(model.parameters()), list(theirs.parameters())) < 1e-12


def test_real_weights_beside_counts_on_the_device_are_summed_in_float64():
    window = Window(3, None)
    for weight in (torch.tensor(3), 0.1, torch.tensor(2)):
        window.add(weight)
    assert window.total.item() == 3 + 0.1 + 2
    window = Window(2, None)
    for weight in (0.1, torch.tensor(3)):
        window.add(weight)
    assert window.total.item() == 0.1 + 3


def test_losses_in_a_state_are_copies():
    model = make_model()
    step = train_step(torch.optim.SGD(model.parameters()), accumulate(2))(
        lambda batch: loss_of(model, batch)
    )
    result = step(BATCHES[0])
    state = step.state_dict()
    result.loss.zero_()
    assert state["window"]["losses"][0] > 0


def test_a_weight_that_lies_on_the_cpu_is_read_there_and_not_copied_to_a_device():
    assert (
        widened(torch.tensor(3), torch.device("meta")) == 3
        and widened(torch.tensor(0.5), torch.device("meta")) == 0.5
    )
    assert isinstance(widened(torch.tensor(3), torch.device("cpu")), torch.Tensor)
