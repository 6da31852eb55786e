"""Step functions that yield: the code around a yield runs, and nothing is left on over it."""

import pytest
import torch
from oracles import BATCHES, loss_of, make_batches, make_model, snapshot, unchanged

from trainkit import accumulate, amp


def test_with_and_finally_around_a_yield_are_over_when_the_call_returns(model):
    log = []

    @accumulate(2, model)
    def step(batch):
        try:
            yield loss_of(model, batch)
            log.append("update")
        finally:
            log.append("over")

    step(BATCHES[0])
    assert log == ["over"]
    step(BATCHES[1])
    assert log == ["over", "update", "over"]


def test_a_generator_is_closed_even_where_something_keeps_it(model):
    kept = []

    def keeping(function):
        def wrapper(batch):
            kept.append(function(batch))
            return kept[-1]

        return wrapper

    @accumulate(2, model)
    @keeping
    def step(batch):
        yield loss_of(model, batch)

    step(BATCHES[0])
    assert kept[0].gi_frame is None


def modes():
    return (
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


@pytest.mark.parametrize("under_amp", [False, True])
@pytest.mark.parametrize(
    "mode", [lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad, torch.inference_mode]
)
def test_a_mode_left_on_over_the_yield_is_an_error(mode, under_amp):
    model = make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters())
    part = amp(dtype=torch.bfloat16) if under_amp else accumulate(1)

    @accumulate(1, model)
    @part
    def step(batch):
        loss = loss_of(model, batch)
        with mode():
            yield loss
        optimizer.step()

    before, found = snapshot(model, optimizer), modes()
    with pytest.raises(RuntimeError, match="above `yield loss`"):
        step(make_batches([4], torch.float32)[0])
    assert modes() == found and unchanged(before, model, optimizer)


def test_gradients_below_the_yield_are_true_whether_the_update_clears_them_or_not(model):
    seen = []

    @accumulate(2, model)
    def step(batch, clear):
        yield loss_of(model, batch)
        seen.append(model[0].weight.grad.clone())
        if clear:
            model.zero_grad()

    for clear in (False, True):
        step(BATCHES[0], clear)
        step(BATCHES[0], clear)
    (expected,) = torch.autograd.grad(loss_of(model, BATCHES[0]), [model[0].weight])
    assert all(torch.allclose(gradient, expected, rtol=1e-12) for gradient in seen)
