import functools

import pytest
import torch
from oracles import BATCHES, loss_of, make_batches, make_model, same_bits, state_of

import trainkit.core.backward
from trainkit import accumulate, amp, train_step


def test_without_the_private_backward_of_torch_the_result_is_the_same(monkeypatch):
    states = []
    for present in (True, False):
        if not present:
            monkeypatch.setattr(trainkit.core.backward, "_engine_run_backward", None)
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        step = train_step(optimizer, accumulate(2))(
            lambda batch, model=model: loss_of(model, batch)
        )
        for batch in step.over(BATCHES):
            step(batch)
        states.append(state_of(model, optimizer))
    assert same_bits(*states)


def test_a_loss_of_a_tensor_subclass_runs_its_own_backward(model, optimizer):
    seen = []

    class Loss(torch.Tensor):
        def backward(self, gradient=None):
            seen.append(gradient)
            super().backward(gradient)

    train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch).as_subclass(Loss))(
        BATCHES[0]
    )
    assert [seed.item() for seed in seen] == [0.5]


@pytest.mark.parametrize("parts", [[], [amp(dtype=torch.bfloat16)]])
def test_an_autocast_around_the_loop_does_not_serve_old_weights(parts):
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters(), lr=0.5), *parts)(
        lambda batch: loss_of(model, batch)
    )
    batch = make_batches([4], torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert len({step(batch).loss.item() for _ in range(3)}) == 3


def test_backward_in_a_block_without_autocast_leaves_it_off():
    model = make_model(torch.float32)
    step = amp(torch.optim.SGD(model.parameters()), dtype=torch.bfloat16)
    x, _ = make_batches([2], torch.float32)[0]
    with step, torch.autocast("cpu", enabled=False):
        step.backward(model(x).mean())
        assert model(x).dtype == torch.float32


def test_backward_leaves_autocast_on_for_the_forward_that_follows():
    model = make_model(torch.float32)
    step = amp(torch.optim.SGD(model.parameters()), dtype=torch.bfloat16)
    x, _ = make_batches([2], torch.float32)[0]
    with step:
        step.backward(model(x).float().mean())
        assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize("generator", [False, True])
def test_a_backward_or_an_update_of_the_users_own_is_explained(model, generator):
    """Torch's own advice, retain_graph and anomaly detection, is for other loops."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def twice(x):
        loss = model(x).square().mean()
        loss.backward()
        return loss

    def moved(x):
        loss = model(x).square().mean()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return loss

    def yielding(x, function):
        yield function(x)

    for function, remedy in (
        (twice, r"retain_graph=True(?s:.*)remove `loss.backward\(\)`"),
        (moved, r"remove `optimizer.step\(\)`"),
    ):
        body = functools.partial(yielding, function=function) if generator else function
        step = train_step(optimizer, accumulate(2))(body)
        with pytest.raises(RuntimeError, match=remedy):
            step(torch.ones(2, 4).double())
        assert step.updates == 0 and all(parameter.grad is None for parameter in model.parameters())
