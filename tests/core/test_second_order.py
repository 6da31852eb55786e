"""``step.backward(loss, create_graph=, retain_graph=, inputs=)``: passed to torch."""

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import BATCHES, distance, gradients_of, loss_of, make_batches, make_model, windows_of

from trainkit import accumulate, amp, train_step

FEW = settings(max_examples=settings.default.max_examples // 3)


def curvature_of(gradients, parameters):
    """The product of the Hessian with the gradient itself."""
    return torch.autograd.grad(gradients, parameters, [g.detach() for g in gradients])


class SecondOrder(torch.optim.Optimizer):
    """Records gradient and curvature, and moves along them."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.seen = []

    def step(self, closure=None):
        parameters = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        curved = curvature_of(gradients, parameters)
        self.seen.append([g.detach().clone() for g in (*gradients, *curved)])
        for p, gradient, curve in zip(parameters, gradients, curved, strict=True):
            p.data.sub_(0.1 * gradient.detach() / (1 + curve.abs()))


@pytest.mark.filterwarnings("ignore:Using backward")
@FEW
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([None, 0.05, math.inf]),
    st.sampled_from(["float64", "float16", "bfloat16"]),
    st.booleans(),
)
def test_curvature_is_that_of_the_true_gradient(sizes, n, weighted, max_norm, precision, is_sum):
    weighted = weighted and not is_sum
    dtype = torch.float64 if precision == "float64" else torch.float32
    batches = make_batches(sizes, dtype)
    model, expected = make_model(dtype), make_model(dtype)
    half = None if precision == "float64" else getattr(torch, precision)
    optimizer = SecondOrder(model.parameters())
    parts = [accumulate(n, reduction="sum" if is_sum else "mean")]
    parts += [] if half is None else [amp(dtype=half, init_scale=256.0)]
    step = train_step(optimizer, *parts, max_norm=max_norm)
    for batch in step.over(batches):
        with step:
            loss = loss_of(model, batch)
            weight = len(batch[0]) if weighted else None
            step.backward(loss, weight, create_graph=True)
    theirs = SecondOrder(expected.parameters())
    for window in windows_of(batches, n):
        weights = [len(b[0]) if weighted else 1 for b in window]
        total = 1 if is_sum else sum(weights)
        with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
            losses = [loss_of(expected, batch) for batch in window]
        loss = sum(one * (w / total) for one, w in zip(losses, weights, strict=True))
        loss.backward(create_graph=True)
        if max_norm is not None:  # clipping by a number: the norm is no part of the loss
            norm = torch.stack([p.grad.detach().norm() for p in expected.parameters()]).norm()
            clip = min(1.0, max_norm / (norm.item() + 1e-6))
            for p in expected.parameters():
                p.grad = p.grad * clip
        theirs.step()
        theirs.zero_grad()
    tolerance = 1e-10 if half is None else 5e-2
    for ours, by_hand in zip(optimizer.seen, theirs.seen, strict=True):
        for a, b in zip(ours, by_hand, strict=True):
            assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Using backward")
def test_no_graph_of_a_window_stays_alive_behind_its_update(model):
    class Token:
        pass

    class Held(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, token):
            ctx.token = token
            return x * 1.0

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.0, None

    step = train_step(SecondOrder(model.parameters()), accumulate(2))
    tokens = []
    for batch in step.over(BATCHES[:2]):
        with step as result:
            token = Token()
            tokens.append(weakref.ref(token))
            loss = Held.apply(loss_of(model, batch), token)
            del token
            step.backward(loss, create_graph=True)
            del loss
    assert result.updated and [token() for token in tokens] == [None, None]


def test_inputs_and_retain_graph_are_those_of_torch(model):
    head = list(model[2].parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = train_step(optimizer, accumulate(2))
    expected = make_model()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients_of(model)))
    for batch in BATCHES[:2]:
        with step:
            loss = loss_of(model, batch)
            step.backward(loss, retain_graph=True, inputs=head)
            step.backward(3 * loss)
        loss = loss_of(expected, batch)
        (loss / 2).backward(retain_graph=True, inputs=list(expected[2].parameters()))
        (3 * loss / 2).backward()
    assert distance(seen[0], gradients_of(expected)) <= 1e-12
    with pytest.raises(RuntimeError), step:
        loss = loss_of(model, batch)
        step.backward(loss)
        step.backward(loss)  # the graph is gone, as torch says
    assert step.updates == 1 and not step.close().complete
