"""``accumulate(n, dtype=torch.float32)``: sums of half-precision gradients, rounded once."""

import pytest
import torch
from oracles import OPTIMIZERS, distance, loss_of, make_batches, make_model
from torch import nn

from trainkit import accumulate, frozen, train_step

needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has none"
)


def wide(n, *module):
    return accumulate(n, *module, dtype=torch.float32)


def half_model(dtype=torch.bfloat16):
    """With a layer in float32 among those in half precision."""
    model = make_model(dtype)
    model[2].float()
    return model


def half_loss(model, batch):
    x, y = batch
    return (model[2](model[1](model[0](x)).float()) - y.float()).pow(2).mean()


def summed_in_float32(model, optimizer, batches, n, max_norm=None):
    """By hand: gradients in the dtype of the parameters, their sum in float32, rounded once."""
    parameters = list(model.parameters())
    for start in range(0, len(batches), n):
        window = batches[start : start + n]
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for batch in window:
            gradients = torch.autograd.grad(half_loss(model, batch), parameters)
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient
        means = [total / len(window) for total in sums]
        if max_norm is not None:
            norm = torch.stack([mean.norm() for mean in means]).norm().item()
            means = [mean * min(1.0, max_norm / (norm + 1e-6)) for mean in means]
        for parameter, mean in zip(parameters, means, strict=True):
            parameter.grad = mean.to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


@needs_grad_dtype
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "face"),
    [
        ("SGD", "return"),
        ("SGD", "yield"),
        ("AdamW fused", "return"),
        ("SGD momentum fused", "return"),
    ],
)
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_half_precision_is_summed_in_float32_and_rounded_once(kind, face, dtype, max_norm):
    batches = make_batches([4] * 139, dtype)
    ours, theirs = half_model(dtype), half_model(dtype)
    optimizer = OPTIMIZERS[kind](ours.parameters())

    def returning(batch):
        return half_loss(ours, batch)

    def yielding(batch):
        yield half_loss(ours, batch)
        optimizer.step()
        optimizer.zero_grad()

    function = yielding if face == "yield" else returning
    step = train_step(optimizer, wide(64), max_norm=max_norm)(function)
    for batch in step.over(batches):
        step(batch)
    summed_in_float32(theirs, OPTIMIZERS[kind](theirs.parameters()), batches, 64, max_norm)
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

        @accumulate(1024, nn.ParameterList([weight]), dtype=dtype)
        def step(weight=weight):
            yield weight.sum()
            found.append(weight.grad.item())

        for _ in range(1024):
            step()
    assert found == [0.25, 1.0]


@needs_grad_dtype
def test_gradients_are_divided_after_they_are_summed():
    """A third is not a number of bfloat16."""
    weight, found = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)), []
    xs = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1)).bfloat16()

    @wide(3, nn.ParameterList([weight]))
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
    step = train_step(optimizer, wide(8))(lambda: (weight * 2e4).sum())
    for _ in range(8):
        step()
    assert weight.tolist() == pytest.approx([-1.0] * 3, abs=2e-3)


@needs_grad_dtype
def test_sums_of_an_open_window_are_saved_loaded_frozen_and_dropped():
    model, theirs = half_model(), half_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = make_batches([4] * 4, torch.bfloat16)
    step = train_step(optimizer, wide(3))(lambda batch: half_loss(model, batch))
    step(batches[0])
    state = step.state_dict()
    assert {gradient.dtype for gradient in state["gradients"].values()} == {torch.float32}
    for between in (lambda: None, step.discard):
        between()
        half_loss(model, batches[3]).backward()  # other gradients have their own dtype
        assert all(p.grad.dtype == p.dtype for p in model.parameters())
        model.zero_grad()
    step(batches[3])
    step.load_state_dict(state)
    with frozen(model):  # the other half of a GAN does
        assert all(p.grad is None for p in model.parameters())
    step(batches[1])
    step(batches[2])
    summed_in_float32(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), batches[:3], 3)
    assert distance(list(model.parameters()), list(theirs.parameters())) < 1e-3
    narrow = train_step(optimizer, accumulate(3))(lambda batch: half_loss(model, batch))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        narrow.load_state_dict(state)


@needs_grad_dtype
def test_a_model_cast_afterwards_has_gradients_of_its_new_dtype():
    model = half_model()
    step = train_step(torch.optim.SGD(model.parameters(), lr=0.1), wide(1))
    step(lambda batch: half_loss(model, batch))(make_batches([4], torch.bfloat16)[0])
    model.float()
    loss_of(model, make_batches([4], torch.float32)[0]).backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@needs_grad_dtype
def test_windows_of_sums_that_begin_or_end_within_a_frozen_block():
    model = half_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = make_batches([4] * 4, torch.bfloat16)

    @wide(2, model)
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
