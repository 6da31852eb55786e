import pytest
import torch
from oracles import loss_of, make_batches, make_model

from trainkit import amp, frozen, train_step
from trainkit.precautions import _drop_casts

BATCH = make_batches([4], torch.float32)[0]


@pytest.mark.parametrize("parts", [lambda model: [], lambda model: [frozen(model, "[0]")]])
@pytest.mark.parametrize(
    "of", [lambda model: [p for p in model.parameters() if p.requires_grad], lambda model: [model[2].weight]]
)
def test_weights_that_move_along_a_gradient_are_cast_anew(parts, of):
    """Within one autocast block the second forward would use its copies of what they were."""
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters()), amp(dtype=torch.bfloat16), *parts(model))
    with step as result:
        weights = of(model)
        gradients = torch.autograd.grad(loss_of(model, BATCH), weights)
        with torch.no_grad():
            torch._foreach_add_(weights, list(gradients))
        step.backward(loss_of(model, BATCH))
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            expected = loss_of(model, BATCH)
    assert torch.equal(result.loss, expected)


def test_many_steps_over_a_model_leave_one_hook():
    model = make_model(torch.float32)
    for _ in range(3):
        train_step(torch.optim.SGD(model.parameters()), amp(dtype=torch.bfloat16))(lambda: loss_of(model, BATCH))()
    assert list(model[2].weight._backward_hooks.values()) == [_drop_casts]
