import warnings
import weakref

import pytest
import torch
from oracles import BATCHES, distance, gradients_of, loss_of, make_model, same_bits, state_of

from trainkit import accumulate, amp, frozen, train_step
from trainkit.gradients import Gradients
from trainkit.plan import Plan


def test_loaded_gradients_are_not_taken_for_what_frozen_put_back_in_an_earlier_window():
    model = make_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = Gradients(Plan(modules=(model,)))
    with frozen(model, "[0]"):
        gradients.drop()
    state = {i: torch.full_like(p, 2.0) for i, p in enumerate(model.parameters())}
    gradients.load_state_dict(state)
    gradients.drop_returned()
    assert same_bits(gradients_of(model), list(state.values()))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_above_the_yield_is_an_error(model, optimizer, set_to_none):
    @accumulate(2)
    @amp(optimizer, dtype=torch.float32)
    def step(batch):
        optimizer.zero_grad(set_to_none)
        yield loss_of(model, batch)
        optimizer.step()

    step(BATCHES[0])
    with pytest.raises(RuntimeError, match="move it below the yield"):
        step(BATCHES[1])
    assert not step.state_dict().get("window")


def test_zero_grad_below_the_yield_and_frozen_between_calls_are_fine(model, optimizer):
    step = train_step(optimizer, accumulate(3))(lambda batch: loss_of(model, batch))
    step(BATCHES[0])
    with frozen(model, "[0]"):
        step(BATCHES[1])
    assert step(BATCHES[2]).updated


def test_a_foreign_backward_into_an_open_window_is_an_error(model, optimizer):
    """As that of a generator through the discriminator: accelerate#668."""
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    step(BATCHES[0])
    loss_of(model, BATCHES[1]).backward()
    with pytest.raises(RuntimeError, match=r"1 micro-batch\(es\) were changed from outside.*`with frozen\(model\):`"):
        step(BATCHES[2])
    step(BATCHES[0])
    with frozen(model):  # the remedy
        (loss_of(model, (BATCHES[1][0].requires_grad_(), BATCHES[1][1]))).backward()
    assert step(BATCHES[2]).updated


def test_a_loss_that_went_around_the_step_is_warned_of(model, optimizer):
    step = train_step(optimizer, accumulate(2))
    with pytest.warns(UserWarning, match="in place of `loss.backward"), step:
        loss_of(model, BATCHES[0]).backward()
    with step:
        step.backward(loss_of(model, BATCHES[0]))
    with pytest.warns(UserWarning, match="in place of `loss.backward"), step:
        loss_of(model, BATCHES[0]).backward()
    with warnings.catch_warnings(), step, torch.no_grad():
        warnings.simplefilter("error")
        loss_of(model, BATCHES[0])


def test_no_gradient_outlives_its_window(model, optimizer):
    step = train_step(optimizer, accumulate(2))
    by_call = step(lambda batch: loss_of(model, batch))
    for run in (by_call, lambda batch: [step.__enter__(), step.backward(loss_of(model, batch)), step.__exit__(None, None, None)]):
        run(BATCHES[0])
        left = [weakref.ref(parameter.grad) for parameter in model.parameters()]
        run(BATCHES[1])
        assert not any(gradient() is not None for gradient in left)


def test_gradients_that_frozen_set_aside_are_put_back_and_take_part_in_nothing(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    with frozen(model, "[0]"):
        step(BATCHES[0])
        assert len(step.state_dict()["gradients"]) == 2
    assert torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 1e6))
    step(BATCHES[1])

    expected = make_model()
    theirs = torch.optim.AdamW(expected.parameters(), lr=0.01)
    (loss_of(expected, BATCHES[0]) / 2).backward()
    expected[0].zero_grad()
    (loss_of(expected, BATCHES[1]) / 2).backward()
    theirs.step()
    assert distance(state_of(model, optimizer), state_of(expected, theirs)) <= 1e-12


def test_a_state_taken_where_part_of_the_window_is_frozen_is_whole(model, optimizer):
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    step(BATCHES[0])
    found = gradients_of(model)
    with frozen(model, "[0]"):
        assert same_bits(list(step.state_dict()["gradients"].values()), found)


def test_a_state_loaded_where_part_of_the_window_is_frozen_moves_nothing_frozen(model, optimizer):
    """Found by fuzzing: the gradient went to the frozen parameter, and at the end of the window the optimizer moved it."""
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    step(BATCHES[0])
    state, before = step.state_dict(), model[0].weight.clone()
    with frozen(model, "[0]"):
        step.load_state_dict(state)
        assert model[0].weight.grad is None
        assert step(BATCHES[1]).updated
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is None  # the window is over


@pytest.mark.parametrize("leftover", [False, True])
def test_what_is_set_aside_where_a_state_is_loaded_takes_no_part_in_it(leftover):
    model = make_model()
    step = train_step(torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2))(lambda batch: loss_of(model, batch))
    with frozen(model, "[0]"):
        step(BATCHES[0])
    state = step.state_dict()
    if leftover:
        loss_of(model, BATCHES[2]).backward()
    with frozen(model, "[0]"):
        step.load_state_dict(state)
    assert step(BATCHES[1]).updated
    theirs = make_model()
    (loss_of(theirs, BATCHES[0]) / 2).backward()
    theirs[0].zero_grad()
    (loss_of(theirs, BATCHES[1]) / 2).backward()
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    assert same_bits(list(model.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize("leftover", [False, True])
def test_what_a_block_within_the_micro_batch_sets_aside_takes_no_part_in_it(leftover):
    """It is put back before the micro-batch ends, or before its further loss."""
    model, theirs = make_model(), make_model()
    step = train_step(torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2))
    if leftover:
        loss_of(model, BATCHES[2]).backward()

    @step
    def step(batch):
        with frozen(model, "[0]"):
            step.backward(loss_of(model, batch))
        return model[0](batch[0]).pow(2).mean()

    for batch in BATCHES[:2]:
        step(batch)
        theirs[0].requires_grad_(False)
        (loss_of(theirs, batch) / 2).backward()
        theirs[0].requires_grad_(True)
        (theirs[0](batch[0]).pow(2).mean() / 2).backward()
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    assert same_bits(list(model.parameters()), list(theirs.parameters()))


def test_gradients_of_a_window_do_not_come_back_after_its_end(model, optimizer):
    """Set aside when it ends or is dropped, they would be put back into a loop by hand."""
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    for end in (step.discard, lambda: step(BATCHES[1])):
        step(BATCHES[0])
        with frozen(model, "[0]"):
            end()
        assert all(p.grad is None for p in model.parameters())


def test_zero_grad_is_seen_where_another_backward_follows_and_where_the_first_loss_left_nothing(model, optimizer):
    for _ in range(50):  # the new gradient may lie where the old one was
        step = train_step(optimizer, accumulate(3))(lambda batch: loss_of(model, batch))
        step(BATCHES[0])
        optimizer.zero_grad()
        loss_of(model, BATCHES[1]).backward()
        with pytest.raises(RuntimeError, match="changed from outside"):
            step(BATCHES[2])
    own = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    step = train_step(optimizer, accumulate(3))(lambda loss: loss)
    step(own * 1)
    step(loss_of(model, BATCHES[0]))
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="lost the gradients"):
        step(loss_of(model, BATCHES[0]))


def test_a_block_that_ends_with_the_micro_batch_puts_nothing_into_the_update(model, optimizer):
    loss_of(model, BATCHES[2]).backward()
    step, before = train_step(optimizer, accumulate(2)), model[0].weight.clone()
    for batch in BATCHES[:2]:
        with step as result, frozen(model, "[0]"):
            step.backward(loss_of(model, batch))
    assert result.updated and torch.equal(model[0].weight, before)
