"""Several losses of one micro-batch, with layers frozen for some of them, as in a GAN."""

import math

import pytest
import torch
from oracles import distance
from torch import nn
from torch.nn.utils import clip_grad_norm_

from trainkit import accumulate, amp, frozen, train_step


def networks():
    torch.manual_seed(0)
    return nn.Linear(3, 1).double(), nn.Linear(2, 3).double()


def data():
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(2, 4, 3, generator=generator).double().unbind() for _ in range(5)]
    return [(real, noise[:, :2]) for real, noise in made]


def loss_of_critic(critic, maker, real, noise):
    return critic(maker(noise).detach()).tanh().mean() - critic(real).tanh().mean()


def loss_of_maker(critic, maker, noise):
    return -critic(maker(noise)).tanh().mean()


def by_hand(n, max_norm):
    critic, maker = networks()
    parameters = [*critic.parameters(), *maker.parameters()]
    optimizer, batches = torch.optim.SGD(parameters, lr=0.1), data()
    for start in range(0, len(batches), n):
        window = batches[start : start + n]
        for real, noise in window:
            (loss_of_critic(critic, maker, real, noise) / len(window)).backward()
            critic.requires_grad_(False)
            (loss_of_maker(critic, maker, noise) / len(window)).backward()
            critic.requires_grad_(True)
        clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return parameters


@pytest.mark.parametrize("face", ["block", "returns", "yields", "yields while frozen"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("max_norm", [math.inf, 0.01])
@pytest.mark.parametrize("n", [1, 2])
def test_a_part_may_be_frozen_for_the_second_loss(face, scaled, max_norm, n):
    critic, maker = networks()
    parameters = [*critic.parameters(), *maker.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    precision = [amp(dtype=torch.float16, init_scale=1024.0)] if scaled else []
    step = train_step(optimizer, accumulate(n), *precision, max_norm=max_norm)

    def first(real, noise):
        with torch.autocast("cpu", enabled=False):  # in float64, as by hand
            return loss_of_critic(critic, maker, real, noise)

    def second(noise):
        with torch.autocast("cpu", enabled=False):
            return loss_of_maker(critic, maker, noise)

    def returns(real, noise):
        step.backward(first(real, noise))
        with frozen(critic):
            return second(noise)

    def yields(real, noise):
        step.backward(first(real, noise))
        with frozen(critic):
            loss = second(noise)
        yield loss
        optimizer.step()

    def yields_while_frozen(real, noise):
        step.backward(first(real, noise))
        with frozen(critic):
            yield second(noise)
        optimizer.step()

    faces = {"returns": returns, "yields": yields, "yields while frozen": yields_while_frozen}
    step = step(faces[face]) if face in faces else step
    for real, noise in step.over(data()):
        if face in faces:
            step(real, noise)
        else:
            with step:
                step.backward(first(real, noise))
                with frozen(critic):
                    step.backward(second(noise))
    assert distance(parameters, by_hand(n, max_norm)) <= 1e-12
    assert all(p.grad is None and p.requires_grad for p in parameters)


def test_a_skipped_update_leaves_nothing_where_a_block_is_open_at_the_yield():
    critic, maker = networks()
    parameters = [*critic.parameters(), *maker.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)

    @train_step(optimizer, max_norm=1.0)
    def step(real, noise, factor):
        step.backward(loss_of_critic(critic, maker, real, noise) * factor)
        with frozen(critic):
            yield loss_of_maker(critic, maker, noise)
        optimizer.step()

    real, noise = data()[0]
    assert not step(real, noise, math.inf).updated
    assert all(p.grad is None and p.requires_grad for p in parameters)
    assert step(real, noise, 1.0).updated


def test_gradients_below_a_yield_are_gone_after_it():
    """Left behind, they would come back at the end of the next frozen block, and move its layer."""
    critic, maker = networks()
    optimizer = torch.optim.SGD([*critic.parameters(), *maker.parameters()], lr=0.1)

    @train_step(optimizer)
    def step(is_frozen):
        _, noise = data()[0]
        if is_frozen:
            with frozen(critic):
                yield loss_of_maker(critic, maker, noise)
        else:
            yield critic(maker(noise)).square().mean()
        optimizer.step()

    step(False)
    before = critic.weight.detach().clone()
    step(True)
    assert torch.equal(critic.weight, before)


def test_what_a_block_discarded_is_not_in_its_loss():
    weight = nn.Parameter(torch.ones(()))
    step, history = train_step(torch.optim.SGD([weight], lr=1.0), accumulate(2)), []
    with step as result:
        step.backward(100 * weight)
        step.discard()
        step.backward(3 * weight)
    with step as last:
        step.backward(5 * weight)
    history.append(last.window_loss.item())
    assert result.loss == 3 and history == [4.0] and weight == 1 - 4
