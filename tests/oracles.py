"""Plain PyTorch loops, written out to be checked by eye. They share no code with trainkit."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SGD momentum": lambda parameters: torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9, weight_decay=0.01
    ),
    "SGD dampening": lambda parameters: torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9, dampening=0.5
    ),
    "SGD dampening fused": lambda parameters: torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9, dampening=0.5, fused=True
    ),
    "SGD momentum fused": lambda parameters: torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True
    ),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
    "Adagrad fused": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05, fused=True),
}


def make_model(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def make_batches(sizes, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 4, generator=generator, dtype=dtype),
            torch.randn(size, 3, generator=generator, dtype=dtype),
        )
        for size in sizes
    ]


def loss_of(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def windows_of(items, n):
    return [items[start : start + n] for start in range(0, len(items), n)]


def plain_loop(model, optimizer, batches, n=1, weights=None, max_norm=None, norm_type=2.0):
    """One update of every n micro-batches: the gradient of the weighted mean of a window."""
    weights = [1] * len(batches) if weights is None else weights
    for window in windows_of(list(zip(batches, weights, strict=True)), n):
        total = sum(weight for _, weight in window)
        optimizer.zero_grad()
        for batch, weight in window:
            (loss_of(model, batch) * (weight / total)).backward()
        if max_norm is not None:
            clip_grad_norm_(model.parameters(), max_norm, norm_type)
        optimizer.step()
    optimizer.zero_grad()


def scaler_loop(
    model,
    optimizer,
    batches,
    n=1,
    dtype=torch.float16,
    max_norm=None,
    init_scale=65536.0,
    growth_interval=3,
    after=None,
):
    """The loop of PyTorch's amp examples; returns the loss scale after every window."""
    scaler = torch.amp.GradScaler(
        "cpu",
        init_scale=init_scale,
        growth_interval=growth_interval,
        enabled=dtype == torch.float16,
    )
    scales = []
    for window in windows_of(batches, n):
        optimizer.zero_grad()
        for batch in window:
            with torch.autocast("cpu", dtype):
                loss = loss_of(model, batch)
            scaler.scale(loss / len(window)).backward()
        scaler.unscale_(optimizer)
        norm = clip_grad_norm_(
            model.parameters(), max_norm if max_norm is not None else float("inf")
        )
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        skipped = scales[-1] < before if scaler.is_enabled() else not norm.isfinite()
        if after is not None and not skipped:
            after()
    optimizer.zero_grad()
    return scales


def full_batch_gradient(model, batches):
    """The gradient of the mean over all rows of all batches, as one batch."""
    model.zero_grad()
    loss_of(model, tuple(torch.cat(parts) for parts in zip(*batches, strict=True))).backward()
    return gradients_of(model)


def gradients_of(model):
    return [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]


def state_of(model, optimizer):
    """Every tensor of a model and its optimizer."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        tensors += [
            value
            for value in optimizer.state.get(parameter, {}).values()
            if isinstance(value, torch.Tensor)
        ]
    return [tensor.detach().clone() for tensor in tensors]


def distance(ours, theirs):
    """The largest relative L2 distance between tensors of two lists."""
    assert len(ours) == len(theirs) > 0
    return max(
        ((a - b).norm() / b.norm().clamp(min=1e-30)).item() if b.numel() else 0.0
        for a, b in zip(ours, theirs, strict=True)
    )


def same_bits(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def snapshot(model, optimizer):
    return state_of(model, optimizer), [
        None if p.grad is None else p.grad.clone() for p in model.parameters()
    ]


def unchanged(before, model, optimizer):
    after = snapshot(model, optimizer)
    grads = all(
        a is b is None or torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True)
    )
    return same_bits(before[0], after[0]) and grads


BATCHES = make_batches([4, 4, 2])


def same_values(ours, theirs):
    """Whether two results, for example state dicts, have the same bits. A nan equals a nan."""
    if isinstance(ours, dict):
        return (
            isinstance(theirs, dict)
            and ours.keys() == theirs.keys()
            and all(same_values(ours[key], theirs[key]) for key in ours)
        )
    if isinstance(ours, (list, tuple)):
        return (
            isinstance(theirs, (list, tuple))
            and len(ours) == len(theirs)
            and all(map(same_values, ours, theirs))
        )
    if isinstance(ours, torch.Tensor):
        return (
            isinstance(theirs, torch.Tensor)
            and ours.dtype == theirs.dtype
            and ours.shape == theirs.shape
            and bool(((ours == theirs) | ((ours != ours) & (theirs != theirs))).all())
        )
    return type(ours) is type(theirs) and (ours == theirs or (ours != ours and theirs != theirs))
