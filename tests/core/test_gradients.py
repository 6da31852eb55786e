import warnings
import weakref

import pytest
import torch
from oracles import (
    BATCHES,
    OPTIMIZERS,
    distance,
    gradients_of,
    loss_of,
    make_batches,
    make_model,
    same_bits,
    state_of,
)
from torch import nn

from trainkit import accumulate, amp, frozen, train_step
from trainkit.core.gradients import Gradients
from trainkit.core.plan import Plan


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
    with pytest.raises(
        RuntimeError,
        match=r"1 micro-batch\(es\) were changed from outside.*`with frozen\(model\):`",
    ):
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
    for run in (
        by_call,
        lambda batch: [
            step.__enter__(),
            step.backward(loss_of(model, batch)),
            step.__exit__(None, None, None),
        ],
    ):
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
    step = train_step(torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2))(
        lambda batch: loss_of(model, batch)
    )
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


def test_zero_grad_is_seen_where_another_backward_follows_and_where_the_first_loss_left_nothing(
    model, optimizer
):
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


needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has none"
)


def half_model(dtype=torch.bfloat16):
    """With a layer in float32 among those in half precision."""
    model = make_model(dtype)
    model[2].float()
    return model


def half_loss(model, batch):
    x, y = batch
    return (model[2](model[1](model[0](x)).float()) - y.float()).pow(2).mean()


def summed_in_float32(model, optimizer, batches, n, max_norm=None):
    """The loop by hand: gradients of a micro-batch in the dtype of the parameters, their sum in float32, rounded once."""
    for start in range(0, len(batches), n):
        window = batches[start : start + n]
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
        for batch in window:
            for total, gradient in zip(
                sums,
                torch.autograd.grad(half_loss(model, batch), list(model.parameters())),
                strict=True,
            ):
                total += gradient
        factor = 1 / len(window)
        if max_norm is not None:
            factor *= min(
                1.0,
                max_norm / (torch.stack([(s * factor).norm() for s in sums]).norm().item() + 1e-6),
            )
        for parameter, total in zip(model.parameters(), sums, strict=True):
            parameter.grad = (total * factor).to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


@needs_grad_dtype
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["SGD", "AdamW fused", "SGD momentum fused", "generator"])
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_half_precision_is_summed_in_float32_and_rounded_once(kind, dtype, max_norm):
    batches = make_batches([4] * 555, dtype)
    ours, theirs = half_model(dtype), half_model(dtype)
    make = OPTIMIZERS["SGD" if kind == "generator" else kind]
    optimizer = make(ours.parameters())

    def returns(batch):
        return half_loss(ours, batch)

    def yields(batch):
        yield half_loss(ours, batch)
        optimizer.step()
        optimizer.zero_grad()

    wide = accumulate(256, dtype=torch.float32)
    step = train_step(optimizer, wide, max_norm=max_norm)(
        yields if kind == "generator" else returns
    )
    for batch in step.over(batches):
        step(batch)
    summed_in_float32(theirs, make(theirs.parameters()), batches, 256, max_norm)
    assert step.updates == 3
    epsilon = torch.finfo(dtype).eps
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.dtype == expected.dtype and mine.grad is None
        assert torch.allclose(mine.float(), expected.float(), rtol=2 * epsilon, atol=1e-2 * epsilon)


@needs_grad_dtype
def test_a_sum_in_bfloat16_stands_still_and_one_in_float32_does_not():
    found = []
    for dtype in (None, torch.float32):
        weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([weight], lr=0.0)

        @accumulate(1024, nn.ParameterList([weight]), dtype=dtype)
        def step(weight=weight, optimizer=optimizer):
            yield weight.sum()
            found.append(weight.grad.item())
            optimizer.zero_grad()

        for _ in range(1024):
            step()
    assert found == [0.25, 1.0]


@needs_grad_dtype
def test_gradients_are_divided_after_they_are_summed():
    """A third is not a number of bfloat16."""
    weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    xs = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = []

    @accumulate(3, nn.ParameterList([weight]), dtype=torch.float32)
    def step(x):
        yield (weight * x).sum()
        found.append(weight.grad)

    for x in xs:
        step(x)
    assert torch.equal(found[0], (xs.float().sum(0) / 3).bfloat16())


@needs_grad_dtype
def test_a_sum_that_float16_cannot_hold():
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=1e-4, fused=True)
    step = train_step(optimizer, accumulate(8, dtype=torch.float32))(lambda: (weight * 2e4).sum())
    for _ in range(8):
        step()
    assert weight.tolist() == pytest.approx([-1.0] * 3, abs=2e-3)


@needs_grad_dtype
def test_sums_of_an_open_window_are_saved_put_aside_and_dropped():
    model, theirs = half_model(), half_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = make_batches([4] * 6, torch.bfloat16)
    step = train_step(optimizer, accumulate(3, dtype=torch.float32))(
        lambda batch: half_loss(model, batch)
    )
    step(batches[0])
    state = step.state_dict()
    assert {g.dtype for g in state["gradients"].values()} == {torch.float32}
    step.discard()
    assert all(
        p.grad is None and p.grad_dtype is None
        for p in model.parameters()
        if p.dtype == torch.bfloat16
    )
    step(batches[3])
    step.load_state_dict(state)
    with frozen(model):  # as the step of a GAN's other half does
        assert all(p.grad is None for p in model.parameters())
    step(batches[1])
    step(batches[2])
    summed_in_float32(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), batches[:3], 3)
    assert distance(list(model.parameters()), list(theirs.parameters())) < 1e-3
    with pytest.raises(ValueError, match="the state has a gradient of shape and dtype"):
        train_step(optimizer, accumulate(3))(lambda batch: half_loss(model, batch)).load_state_dict(
            state
        )


def test_the_dtype_of_sums_is_float32():
    with pytest.raises(
        ValueError,
        match=r"summed in torch.float32, or for None in their own dtype, got torch.float64",
    ):
        accumulate(2, dtype=torch.float64)


def test_a_torch_without_grad_dtype_is_refused(monkeypatch, model, optimizer):
    monkeypatch.setattr(
        "trainkit.core.precautions.hasattr",
        lambda thing, name: name != "grad_dtype" and hasattr(thing, name),
        raising=False,
    )
    step = train_step(optimizer, accumulate(2, dtype=torch.float32))(
        lambda batch: loss_of(model, batch)
    )
    with pytest.raises(ValueError, match=r"keep parameters in float32, `model.float\(\)`"):
        step(BATCHES[0])


def test_an_exception_in_after_keeps_what_frozen_has_set_aside():
    """The window is dropped once when it closes, and once more on the way out of the call."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model[0].parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    step = train_step(optimizer, frozen(model, "[0]"), after=lambda: 1 / 0)(
        lambda batch: loss_of(model, batch)
    )
    with pytest.raises(ZeroDivisionError):
        step(BATCHES[0])
    assert step.updates == 1 and all((p.grad == 7.0).all() for p in model[0].parameters())
    assert all(p.grad is None for p in model[2].parameters())


@needs_grad_dtype
def test_a_model_cast_afterwards_has_gradients_of_its_new_dtype():
    model = half_model()
    step = train_step(
        torch.optim.SGD(model.parameters(), lr=0.1), accumulate(1, dtype=torch.float32)
    )
    step(lambda batch: half_loss(model, batch))(make_batches([4], torch.bfloat16)[0])
    model.float()
    loss_of(model, make_batches([4], torch.float32)[0]).backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@needs_grad_dtype
def test_windows_of_sums_that_begin_or_end_within_a_frozen_block():
    model = half_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = make_batches([4] * 4, torch.bfloat16)

    @accumulate(2, model, dtype=torch.float32)
    def step(batch):
        yield half_loss(model, batch)
        optimizer.step()
        optimizer.zero_grad()

    step(batches[0])
    with frozen(model, "[0]"):
        step(batches[1])
    half_loss(model, batches[2]).backward()
    with frozen(model, "[0]"):
        step(batches[2])
    assert step(batches[3]).updated
