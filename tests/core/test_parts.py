"""Parts are inert pieces of a plan: they add up in any order, and one serves many steps."""

import itertools

import pytest
import torch
from oracles import BATCHES, loss_of, make_batches, make_model, same_bits, state_of

from trainkit import Step, accumulate, amp, frozen, train_step

FLOAT32 = make_batches([4, 4, 2], torch.float32)


def run(compose):
    """The bits that a step leaves, made by ``compose(optimizer, parts, function)``."""
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    parts = accumulate(2), amp(dtype=torch.bfloat16), frozen(model, "[0]")
    step = compose(optimizer, parts, lambda batch: loss_of(model, batch))
    assert isinstance(step, Step)
    for batch in step.over(FLOAT32):
        step(batch)
    assert step.updates == 2
    return state_of(model, optimizer)


def test_parts_are_handed_over_or_applied_in_any_order_and_make_the_same_step():
    expected = run(lambda optimizer, parts, f: train_step(optimizer, *parts, max_norm=0.1)(f))

    def in_order(order):
        return lambda optimizer, parts, f: train_step(
            optimizer, *(parts[i] for i in order), max_norm=0.1
        )(f)

    for order in itertools.permutations(range(3)):
        assert same_bits(expected, run(in_order(order)))
    for compose in (
        lambda o, parts, f: train_step(o, max_norm=0.1)(parts[0](parts[1](parts[2](f)))),
        lambda o, parts, f: parts[2](parts[1](parts[0](train_step(o, max_norm=0.1)(f)))),
        lambda o, parts, f: parts[0](train_step(o, parts[1], max_norm=0.1)(parts[2](f))),
        lambda o, parts, f: parts[2](parts[0](parts[1](train_step(o, max_norm=0.1))))(f),
        lambda o, parts, f: amp(o, dtype=torch.bfloat16, max_norm=0.1)(parts[2](parts[0](f))),
    ):
        assert same_bits(expected, run(compose))


def test_a_part_serves_many_steps_and_changes_none_of_them():
    part, models = accumulate(3), (make_model(), make_model())
    steps = []
    for model in models:
        step = train_step(torch.optim.SGD(model.parameters()))(lambda b, m=model: loss_of(m, b))
        steps.append(part(step))
        steps.append(part(steps[-1]))
        assert step(BATCHES[0]).complete  # the step that a part is applied to stays as it was
    complete = [[step(BATCHES[0]).complete for _ in range(9)] for step in steps]
    assert complete == [[False, False, True] * 3, [False] * 8 + [True]] * 2


def test_amp_with_an_optimizer_alone_is_a_context(model, optimizer):
    scaled = amp(optimizer, dtype=torch.float32, max_norm=1e-3)
    with scaled as result:
        scaled.backward(loss_of(model, BATCHES[0]))
    assert result.complete and result.updated and result.grad_norm > 1e-3 and scaled.updates == 1


def test_several_optimizers_take_one_norm_and_step_all_or_none():
    models = make_model(torch.float32), make_model(torch.float32)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    step = train_step(optimizers, max_norm=1e9)(
        lambda scale: loss_of(models[0], FLOAT32[0]) + scale * loss_of(models[1], FLOAT32[0])
    )
    parameters = [p for model in models for p in model.parameters()]
    gradients = torch.autograd.grad(loss_of(models[0], FLOAT32[0]), [*models[0].parameters()])
    norm = torch.nn.utils.get_total_norm([*gradients, *gradients])
    assert torch.allclose(step(1.0).grad_norm, norm)
    before = [p.clone() for p in parameters]
    assert not step(float("inf")).updated and same_bits(before, parameters)


@pytest.mark.parametrize("returned", [0, 2.0, "2", True])
def test_a_length_that_is_not_a_number_of_micro_batches_is_refused_at_the_call(returned):
    model = make_model()

    @accumulate(lambda updates: returned, model)
    def step():
        yield model[0].weight.sum()

    with pytest.raises((TypeError, ValueError), match=r"`accumulate\(4\)`"):
        step()
    assert model[0].weight.grad is None
