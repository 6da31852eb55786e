import math

import pytest
import torch
from oracles import loss_of, make_batches, make_model
from torch import nn
from torch.nn import functional as F

from trainkit import accumulate, amp, frozen, train_step, trainable_parameters
from trainkit.core.precautions import _drop_casts

BATCH = make_batches([4], torch.float32)[0]


def test_a_plan_that_knows_no_parameters_is_refused(model):
    def step(batch):
        yield loss_of(model, batch)

    for plan in (accumulate(2), amp()):
        with pytest.raises(ValueError, match="knows the parameters"):
            plan(step)(BATCH)


def test_float16_parameters_under_a_scaler_are_refused():
    """pytorch#74739: "Attempting to unscale FP16 gradients" does not say whose, nor what to do."""
    model = make_model(torch.float16)
    step = amp(torch.optim.SGD(model.parameters()), dtype=torch.float16)(
        lambda: model[0].weight.sum()
    )
    with pytest.raises(ValueError, match=r"4 of 4 parameters are float16 .* `dtype=torch.float32`"):
        step()
    assert model[0].weight.grad is None


def test_float16_parameters_that_are_frozen_are_not():
    """As long as they are: the base of an adapter, for one."""
    model = make_model(torch.float32)
    model[0].half()
    x, y = make_batches([4], torch.float32)[0]
    plan = torch.optim.SGD(model.parameters(), lr=0.1), amp(dtype=torch.float16)
    step = train_step(*plan, frozen(model, "[0]"))(lambda: F.mse_loss(model(x), y))
    assert step().updated
    step = train_step(*plan)(lambda: F.mse_loss(model(x), y))
    with frozen(model, "[0]"):
        assert step().updated
    with pytest.raises(ValueError, match="2 of 4 parameters are float16"):
        step()


def loss_after_a_move(step, model, of):
    """The loss that a micro-batch sees after its weights moved, and what it should be."""
    with step as result:
        weights = of(model)
        gradients = torch.autograd.grad(loss_of(model, BATCH), weights)
        with torch.no_grad():
            torch._foreach_add_(weights, list(gradients))
        step.backward(loss_of(model, BATCH))
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        ):
            return result.loss, loss_of(model, BATCH)


@pytest.mark.parametrize("stem_is_frozen", [False, True])
@pytest.mark.parametrize("of", [trainable_parameters, lambda model: [model[2].weight]])
def test_weights_that_move_along_a_gradient_are_cast_anew(stem_is_frozen, of):
    """Within one autocast block the second forward would use its copies of what they were."""
    model = make_model(torch.float32)
    parts = [frozen(model, "[0]")] * stem_is_frozen
    step = train_step(torch.optim.SGD(model.parameters()), amp(dtype=torch.bfloat16), *parts)
    seen, expected = loss_after_a_move(step, model, of)
    assert torch.equal(seen, expected)


def test_another_weight_stands_for_all_where_the_last_was_frozen():
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters()), amp(dtype=torch.bfloat16))
    loss_after_a_move(step, model, trainable_parameters)
    with frozen(model, "[2]"):
        seen, expected = loss_after_a_move(step, model, trainable_parameters)
    assert torch.equal(seen, expected)


def test_many_steps_over_a_model_leave_one_hook():
    model = make_model(torch.float32)
    for _ in range(3):
        train_step(torch.optim.SGD(model.parameters()), amp(dtype=torch.bfloat16))(
            lambda: loss_of(model, BATCH)
        )()
    assert list(model[2].weight._backward_hooks.values()) == [_drop_casts]


def test_parameters_that_nobody_has_named_and_the_default():
    bad = nn.Parameter(torch.ones(2))
    good = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(
        [{"params": [good]}, {"params": [good.new_ones(1).requires_grad_(), bad]}], lr=0.1
    )

    @train_step(optimizer, accumulate(1), max_norm=1.0)
    def step(factor):
        return (good.detach() * bad).sum() * factor

    with pytest.warns(UserWarning, match="only 1 of 3"):
        for _ in range(24):
            step(torch.tensor(math.nan))
    with pytest.raises(
        FloatingPointError,
        match=r"^25 .* of 1 of 3 parameters, first params\[1\] of param_groups\[1\] of SGD",
    ):
        step(torch.tensor(math.nan))
    bad.data.fill_(math.nan)
    with pytest.raises(
        FloatingPointError, match=r"with shape \(2,\) \(which is not finite itself\)"
    ):
        for _ in range(25):
            step(torch.tensor(math.nan))
    forever = train_step(optimizer, max_norm=1.0, max_skips=math.inf)(
        lambda: bad.sum() * torch.tensor(math.nan)
    )
    for _ in range(30):
        forever()
    assert forever.skipped == 30


def test_gradients_whose_norm_alone_is_not_finite():
    weight = nn.Parameter(torch.ones(2))
    step = train_step(torch.optim.SGD([weight], lr=0.1), max_norm=1.0, max_skips=1)(
        lambda: (weight * 3e38).sum()
    )
    with pytest.raises(FloatingPointError, match="each entry here is, but their norm is not"):
        step()


def test_max_skips_is_a_number_of_updates():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    for wrong in (True, 2.5, "25"):
        with pytest.raises(TypeError, match="max_skips counts updates"):
            train_step(optimizer, max_skips=wrong)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        amp(max_skips=0)
    with pytest.raises(ValueError, match="max_skips was given twice, 3 and 4"):
        train_step(optimizer, amp(max_skips=4), max_skips=3)
    with pytest.raises(ValueError, match=r"nothing here looks: add `max_norm=math.inf`"):
        train_step(optimizer, max_skips=3)(lambda: optimizer.param_groups[0]["params"][0].sum())()
