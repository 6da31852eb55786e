"""A window: the micro-batches that make one update, with their weights and summed gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

Weight = float | Tensor  # a Python float, or a 0-d float64 tensor on the device of the loss
Size = int | Fraction
Versions = Sequence[tuple[nn.Parameter, Tensor | None, int]]


class Window:
    """Equivalent to one backward of ``sum(w_i * loss_i) / sum(w_i)``.

    The sum of the weights is known only at the end. So each loss enters backward with the share
    ``w_i / (reference * parts)``, and the sums are divided once, by ``divisor()``. Without weights
    w and reference are 1: the share is the usual ``1 / length``, and the divisor of a full window
    is exactly 1. The reference is a power of two near the mean weight of the window before. It
    cancels out, and keeps weights of 65,536 tokens from using up the range of the loss scale.

    Between micro-batches the sums are kept here. A backward finds them in ``.grad``, where autograd
    adds to them in place: ``lend`` and ``take`` move references.
    """

    can_fuse = True  # whether a fused optimizer may divide the sums
    can_watch = True  # whether only autograd changes a sum that is lent
    can_save = True  # whether a state_dict can hold the sums
    may_be_open = False  # whether a loop may begin with it open: it was loaded from a checkpoint
    # What a state_dict keeps of it.
    kept = ("length", "parts", "reference", "weighted", "size", "weights", "is_sum")

    def __init__(self, length: float, reference: Weight | None, is_sum: bool = False) -> None:
        self.length, self.is_sum = length, is_sum
        self.parts = 1 if is_sum or length == math.inf else length
        self.reference = reference  # None before the first weight of a run
        self.losses: list[Tensor] = []
        self.weights: list[Weight] = []
        self.weighted = False
        self.size: Size = 0  # in micro-batches; a chunk of one counts its fraction
        # By the position of the parameter. A sum that is lent lies in ``.grad`` as well.
        self.parameters: list[nn.Parameter] = []
        self.sums: list[Tensor | None] = []
        self.lent: list[bool] = []

    def share(self, weight: Weight | None, size: Size = 1) -> Weight:
        """Return the factor with which the gradient of a loss of this weight enters the sums."""
        if self.losses and self.weighted is (weight is None):
            came, were = ("without", "with") if self.weighted else ("with", "without")
            mixed = f"a loss came {came} a weight, after {len(self.losses)} {were} one"
            raise TypeError(f"{mixed}: give one with each, `return loss, weight`, or with none")
        if self.is_sum and weight is not None:
            fault = "got a weight, and reduction='sum' adds up losses as they are"
            raise TypeError(f"{fault}: `return loss`, or `accumulate(n)`")
        self.weighted = weight is not None
        if weight is None:
            return float(size) / self.parts
        if self.reference is None:
            self.reference = power_of_two_near(weight / float(size or 1))
        return weight / (self.reference * self.parts)

    def add(self, loss: Tensor, weight: Weight | None, size: Size = 1) -> None:
        """Count a micro-batch whose gradient is in."""
        self.losses.append(loss)
        self.weights.append(float(size) if weight is None else weight)
        self.size += size

    def total(self) -> Weight:
        """Return the sum of the weights."""
        return sum(self.weights)

    def divisor(self) -> Weight:
        """Return the number by which the sums are still to be divided."""
        if self.weighted and self.reference is not None:
            return self.total() / (self.reference * self.parts)
        return 1.0 if self.is_sum else float(self.size) / self.parts

    def is_empty(self) -> bool | Tensor:
        """Return whether all weights are zero; a 0-d tensor where only the device knows."""
        total = self.total() if self.weighted else 1.0
        return ~((total > 0) & (total < math.inf)) if isinstance(total, Tensor) else total <= 0

    def next_reference(self) -> Weight | None:
        """Return the reference for the next window: at least half, since this one may be small."""
        if not self.weighted or self.reference is None:
            return self.reference
        return power_of_two_near(
            self.total() / float(self.size), self.reference / 2, self.reference
        )

    def mean_loss(self, count: int) -> Tensor:
        """Return the weighted mean of the first losses, or their sum; nan without any weight."""
        divisor = 1.0 if self.is_sum else None
        return weighted_mean(self.losses[:count], self.weights[:count], divisor)

    def lend(self, parameters: list[nn.Parameter]) -> None:
        """Put the sums into ``.grad``, except the sums of frozen parameters."""
        count = len(parameters)
        if not self.parameters:  # as arrange() does, which takes longer
            self.parameters, self.sums, self.lent = [*parameters], [None] * count, [False] * count
        elif count != len(self.parameters) or not all(map(is_, parameters, self.parameters)):
            self.arrange(parameters)
        sums, lent = self.sums, self.lent
        for i, parameter in enumerate(parameters):
            if not lent[i] and parameter.requires_grad:
                lent[i] = True
                parameter.grad = sums[i]

    def arrange(self, parameters: list[nn.Parameter]) -> None:
        """Order the sums by the parameters. A sum follows its parameter to another place."""
        known = {id(p): i for i, p in enumerate(self.parameters)}
        places = [known.get(id(p), -1) for p in parameters]
        self.sums = [self.sums[i] if i >= 0 else None for i in places]
        self.lent = [i >= 0 and self.lent[i] for i in places]
        self.parameters = [*parameters]

    def note(self) -> Versions:
        """Note the sums, which a ``frozen`` block takes out of ``.grad``. Return their versions."""
        noted = []
        for i, parameter in enumerate(self.parameters):
            if self.lent[i]:
                self.sums[i] = self.sums[i] if parameter.grad is None else parameter.grad
                noted.append((parameter, self.sums[i]))
        return versions(noted)

    def take(self) -> None:
        """Take the sums out of ``.grad`` again. Where it is None, a ``frozen`` block holds it."""
        sums, lent = self.sums, self.lent
        for i, parameter in enumerate(self.parameters):
            if lent[i]:
                if (gradient := parameter.grad) is not None:
                    sums[i] = gradient
                    parameter.grad = None
                lent[i] = False

    def reduce(self, parameters: list[nn.Parameter]) -> bool:
        """Make an open window ready to be closed as it is. Return whether there is one."""
        return bool(self.losses)

    def close(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Lend the sums for the update, and return them."""
        self.lend(parameters)
        gradients = []
        for i, parameter in enumerate(parameters):
            gradient = parameter.grad
            if not self.lent[i]:
                parameter.grad = gradient = None  # or an optimizer would move a frozen parameter
            elif gradient is None and not parameter.requires_grad:
                gradient = self.sums[i]  # a ``frozen`` block around the yield holds it
            if gradient is not None:
                gradients.append(gradient)
        return gradients

    def narrow(self) -> None:
        """Give the gradients the dtype of their parameters, just before an update."""

    def drop(self) -> None:
        """Forget the sums, and clear ``.grad`` where they are lent."""
        for i, parameter in enumerate(self.parameters):
            if self.lent[i]:
                parameter.grad = None
        self.parameters, self.sums, self.lent = [], [], []

    def dtype_of(self, parameter: nn.Parameter) -> torch.dtype:
        """Return the dtype of the sum of a parameter's gradients."""
        return parameter.dtype

    def copied_sums(self) -> dict[int, Tensor]:
        """Return copies of the sums by the position of their parameters, for a state_dict."""
        return {i: s.detach().clone() for i, s in enumerate(self.sums) if s is not None}


def versions(found: Iterable[tuple[nn.Parameter, Tensor | None]]) -> Versions:
    """Return parameters and gradients with their versions, for ``is_changed``."""
    return [(p, grad, 0 if grad is None else grad._version) for p, grad in found]


def is_changed(before: Versions, are_lent: bool) -> bool:
    """Return whether gradients of trained parameters changed since ``versions``.

    Gradients that are not the window's may become None or zero: that ``zero_grad()`` is harmless.
    """
    for parameter, gradient, version in before:
        now = parameter.grad
        if now is gradient and (now is None or now._version == version):
            continue
        if parameter.requires_grad and (are_lent or (now is not None and bool(now.norm()))):
            return True
    return False


def as_weight(given: Any, device: torch.device) -> Weight:
    """Return a weight in a type whose sums are exact: four times 200 is 32 in uint8."""
    if not isinstance(given, Tensor) or (given.is_cpu and device.type != "cpu"):
        return float(given)  # no wait, which a copy to the device may be
    return given.detach().to(device, _wide(device))


def weighted_mean(
    losses: list[Tensor], weights: list[Weight], divisor: Weight | None = None
) -> Tensor:
    """Return the sum of weighted losses over the divisor, or else over the sum of the weights.

    0-d in the dtype of the losses; nan where all weights are zero.
    """
    pairs = zip(losses, weights, strict=True)
    total: Any = sum(loss.to(_wide(loss.device)) * weight for loss, weight in pairs)
    mean: Tensor = (total / (sum(weights) if divisor is None else divisor)).to(losses[0].dtype)
    return mean


def power_of_two_near(mean: Weight, least: Weight = 0.0, otherwise: Weight = 1.0) -> Weight:
    """Return 2 ** round(log2(mean)), at least ``least``; ``otherwise`` for a mean of 0. No wait."""
    if not isinstance(mean, Tensor):
        return max(2.0 ** round(math.log2(mean)), least) if mean > 0 else otherwise
    near = mean.log2().round().exp2().clamp(min=least)
    return torch.where((mean > 0) & (mean < math.inf), near, otherwise).to(mean.dtype)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
