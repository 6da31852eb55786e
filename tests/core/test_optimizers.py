"""Optimizers by what they can: which ones a step steps itself, and which need a yield."""

import pytest
import torch
from oracles import BATCHES, loss_of, same_bits, state_of

from trainkit import accumulate, microbatch, train_step


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


class TwoSteps(torch.optim.SGD):
    """As SAM has it."""

    def first_step(self):
        pass

    def second_step(self):
        torch.optim.SGD.step(self)


@pytest.mark.parametrize("make", [NeedsClosure, TwoSteps, torch.optim.LBFGS])
def test_an_optimizer_that_runs_the_loss_again_is_refused_unless_the_step_yields(make, model):
    optimizer = make(model.parameters(), lr=0.1)
    before = state_of(model, optimizer)
    step = train_step(optimizer)
    with pytest.raises(TypeError, match=r"closure.*yield loss"):
        step(lambda batch: loss_of(model, batch))(BATCHES[0])
    with pytest.raises(TypeError, match=r"closure.*yield loss"), step:
        step.backward(loss_of(model, BATCHES[0]))
    assert same_bits(state_of(model, optimizer), before)

    @train_step(optimizer, accumulate(2))
    def yielding(batch):
        yield loss_of(model, batch)
        closure = lambda: loss_of(model, batch)  # noqa: E731
        optimizer.second_step() if make is TwoSteps else optimizer.step(closure)

    for batch in yielding.over(BATCHES):
        yielding(batch)
    assert yielding.updates == 2 and not same_bits(state_of(model, optimizer)[:4], before[:4])


@pytest.mark.parametrize("missing", ["param_groups", "step", "zero_grad", "state_dict"])
def test_what_an_object_lacks_to_be_an_optimizer_is_named(missing, model):
    class Partly:
        pass

    one, inner = Partly(), torch.optim.SGD(model.parameters())
    for name in {"param_groups", "step", "zero_grad", "state_dict"} - {missing}:
        setattr(one, name, getattr(inner, name))
    with pytest.raises(TypeError, match=missing):
        train_step(one)


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_an_attribute_of_an_optimizer_of_ones_own_stays(name, model):
    class Own(torch.optim.Optimizer):
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                parameter.data -= getattr(self, name) * parameter.grad

    optimizer = Own(model.parameters(), {})
    setattr(optimizer, name, 2)
    step = train_step(optimizer)(lambda batch: loss_of(model, batch))
    assert [step(batch).updated for batch in BATCHES] == [True] * 3
    step.discard()
    assert getattr(optimizer, name) == 2


@pytest.mark.parametrize("change", ["removed in place", "removed", "a group of its own"])
@pytest.mark.parametrize("chunk", [None, 1, "auto"])
def test_groups_may_change_in_an_open_window(change, chunk):
    """The gradient of a parameter stays with it."""
    a, b, c = (torch.nn.Parameter(torch.zeros(())) for _ in range(3))
    optimizer = torch.optim.SGD([a, b, c], lr=1.0)
    parts = [] if chunk is None else [microbatch(chunk)]
    step = train_step(optimizer, accumulate(2), *parts)(lambda x: (a + 10 * b + 100 * c) * x.mean())
    step(torch.ones(2))
    (group,) = optimizer.param_groups
    if change == "removed in place":
        del group["params"][0]
    else:
        group["params"] = [b, c] if change == "removed" else [a, c]
    if change == "a group of its own":
        optimizer.add_param_group({"params": [b]})
    assert step(torch.ones(2)).updated
    moved = -1 if change == "a group of its own" else 0
    assert [a.item(), b.item(), c.item()] == [moved, -10, -100]
