import pytest
import torch
from oracles import BATCHES, loss_of, make_batches, make_model, snapshot, unchanged

from trainkit import accumulate, amp, train_step


def test_with_and_finally_around_a_yield_are_over_when_the_call_returns(model, optimizer):
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


def test_a_generator_is_closed_even_where_somebody_keeps_it(model):
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


@pytest.mark.parametrize(
    "mode", [lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad, torch.inference_mode]
)
def test_a_mode_left_on_over_the_yield_is_an_error(model, optimizer, mode):
    @accumulate(1, model)
    def step(batch):
        loss = loss_of(model, batch)
        with mode():
            yield loss
        optimizer.step()

    before = snapshot(model, optimizer)
    modes = (
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )
    with pytest.raises(RuntimeError, match="above `yield loss`"):
        step(BATCHES[0])
    assert modes == (
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )
    assert unchanged(before, model, optimizer)


def test_the_same_autocast_once_more_over_the_yield_is_an_error_too():
    model = make_model(torch.float32)

    @accumulate(1, model)
    @amp(dtype=torch.bfloat16)
    def step(batch):
        with torch.autocast("cpu", torch.bfloat16):
            yield loss_of(model, batch)

    with pytest.raises(RuntimeError, match="above `yield loss`"):
        step(make_batches([2], torch.float32)[0])
    assert not torch.is_autocast_enabled("cpu")


def test_a_generator_yields_once(model, optimizer):
    @accumulate(1, model)
    def nothing(batch):
        if batch is None:
            yield

    @accumulate(1, model)
    def twice(batch):
        yield loss_of(model, batch)
        yield loss_of(model, batch)

    with pytest.raises(TypeError, match="ended without a loss"):
        nothing(BATCHES[0])
    with pytest.raises(ValueError, match="yielded twice"):
        twice(BATCHES[0])


def test_after_belongs_to_steps_that_return(model, optimizer):
    def step(batch):
        yield loss_of(model, batch)

    with pytest.raises(ValueError, match="below the yield"):
        train_step(optimizer, after=print)(step)(BATCHES[0])
