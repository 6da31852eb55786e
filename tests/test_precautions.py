import pytest
import torch
from oracles import loss_of, make_batches, make_model

from trainkit import amp, frozen, train_step, trainable_parameters
from trainkit.precautions import _drop_casts

BATCH = make_batches([4], torch.float32)[0]


def loss_after_a_move(step, model, of):
    """The loss that a micro-batch sees after its weights moved, and what it should be."""
    with step as result:
        weights = of(model)
        gradients = torch.autograd.grad(loss_of(model, BATCH), weights)
        with torch.no_grad():
            torch._foreach_add_(weights, list(gradients))
        step.backward(loss_of(model, BATCH))
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
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
        train_step(torch.optim.SGD(model.parameters()), amp(dtype=torch.bfloat16))(lambda: loss_of(model, BATCH))()
    assert list(model[2].weight._backward_hooks.values()) == [_drop_casts]
