"""A window: the micro-batches that make one update, and what each of them weighs in it."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Weight = int | float | Tensor


class Chunk(NamedTuple):
    """What a micro-batch is of its batch, where ``microbatch`` cuts batches into chunks; else it is all of it.

    ``fraction``: of its rows; 0 for a chunk that is run again only because other ranks wait, and counts nothing. ``is_last``:
    whether the batch is over with it. ``stop``: the row where it ends.
    """

    fraction: float = 1
    is_last: bool = True
    stop: int = 0


_WHOLE = Chunk()


class Window:
    """The losses and weights of one window, as they come.

    Its gradient is that of ``sum(w_i * loss_i) / sum(w_i)``. The sum of the weights is known only at its end, so each
    micro-batch enters backward with the share ``w_i / (reference * length)``, and what has then added up is divided once, by
    ``divisor = sum(w_i) / (reference * length)``. Without weights every w is 1 and so is the reference: the share is the
    usual ``1 / length``, and the divisor of a full window exactly 1.

    Where a sum has more precision than what is added to it, ``parts`` is 1 and stands for that length: a third would be rounded.

    ``reference`` is a power of two near the mean weight of the window before. It cancels out, and keeps shares near
    ``1 / length``: those of 65,536 tokens would use up the range that the loss scale is there for.
    """

    def __init__(self, length: int, reference: Weight | None, parts: int | None = None) -> None:
        self.length = length
        self.parts = length if parts is None else parts
        self.batches = 0
        self.losses: list[Tensor] = []
        self.weights: list[Weight] = []
        self.total: Weight = 0
        self.count: float | Tensor = 0
        self.weighted: bool | None = None
        self.first_of_all = reference is None
        self.reference: Weight = 1.0 if reference is None else reference

    def share(self, weight: Weight | None, fraction: float = 1) -> float | Tensor:
        """The factor of a micro-batch's gradient on its way in; TypeError where weighted and unweighted losses would meet."""
        if self.losses and self.weighted is not (weight is not None):
            was, came = ("with", "without") if self.weighted else ("without", "with")
            raise TypeError(
                f"a loss came {came} a weight into a window whose losses so far ({len(self.losses)}) came {was} one; the mean "
                "over both is not defined: give a weight with every loss of a window, `return loss, weight`, or with none"
            )
        if weight is None:
            return fraction / self.parts
        if self.first_of_all:
            # There is no window before to take the reference from, so the first weight above zero gives it.
            near = _power_of_two_near(
                weight / (fraction or 1)
            )  # 1 for a weight of 0, whose share is 0 whatever it is
            if isinstance(self.total, Tensor):
                self.reference = _wide(torch.where(self.total > 0, self.reference, near))
            elif self.total == 0:
                self.reference = near
        share: float | Tensor = _wide(weight) / (self.reference * self.parts)
        return share

    def add(
        self,
        weight: Weight | None,
        chunk: Chunk = _WHOLE,
        present: float = 1,
        is_filler: bool = False,
    ) -> None:
        """Counts the weight of a micro-batch, whose loss joins ``losses`` when its backward is over.

        ``present``: the share of ranks that have one at this place. ``is_filler``: whether this rank has none; then it is only
        there so that the rank goes along with the others.
        """
        self.weighted = weight is not None
        if chunk.is_last:
            self.count += present
        latest: Weight = 0 if is_filler else chunk.fraction if weight is None else weight
        self.weights.append(latest)
        if isinstance(latest, float) or isinstance(
            self.total, float
        ):  # which torch adds to an int tensor as float32
            latest, self.total = _wide(latest), _wide(self.total)
        self.total = self.total + latest

    def mark(self) -> tuple[Any, ...]:
        """What there is, for ``rewind``."""
        return len(self.losses), self.total, self.count, self.weighted

    def rewind(self, mark: tuple[Any, ...]) -> None:
        """Takes back what was added since ``mark``."""
        size, self.total, self.count, self.weighted = mark
        del self.losses[size:], self.weights[size:]

    def agree_on_reference(self, largest: Tensor) -> None:
        """Takes the first reference of all from the largest weight with which a rank begins."""
        self.reference = _power_of_two_near(largest)
        self.first_of_all = False

    def divisor(self) -> float | Tensor:
        """What the gradients that have added up are still to be divided by."""
        if not self.weighted:
            return self.count / self.parts
        divisor: float | Tensor = _wide(self.total) / (self.reference * self.parts)
        return divisor

    def next_reference(self) -> Weight | None:
        """The reference for the window after this one."""
        found = None if self.first_of_all else self.reference
        if not self.weighted or (not isinstance(self.total, Tensor) and self.total <= 0):
            return found
        near = _power_of_two_near(_wide(self.total) / self.count)
        if isinstance(self.total, Tensor) and found is not None:
            near = _wide(torch.where(self.total > 0, near, found))
        return near

    def mean_loss(self, count: int) -> Tensor:
        """The weighted mean of the first ``count`` losses; 0-d, nan where they weigh nothing."""
        return weighted_mean(self.losses[:count], self.weights[:count])

    def empty(self) -> bool | Tensor:
        """Whether it weighs nothing, or nothing that is a number; a 0-d tensor where that is known only on the device."""
        if isinstance(self.total, Tensor):
            return ~((self.total > 0) & (self.total < math.inf))  # a nan compares false
        return bool(self.weighted) and self.total <= 0

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors; the gradients are the step's."""
        return {
            "length": self.length,
            "parts": self.parts,
            "reference": self.reference,
            "weighted": bool(self.weighted),
            "first_of_all": self.first_of_all,
            "count": self.count,
            "batches": self.batches,
            "losses": [loss.clone() for loss in self.losses],
            "weights": list(self.weights),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], reference: Weight | None) -> Window:
        """The window as it was, ``reference`` being that of the window before; ValueError for what none can have been."""
        window = cls(state["length"], reference, state.get("parts"))
        window.reference = state["reference"]
        for loss, weight in zip(state["losses"], state["weights"], strict=True):
            if not (
                isinstance(loss, Tensor)
                and loss.is_floating_point()
                and _is_number(loss)
                and _is_number(weight)
            ):
                raise ValueError(f"a loss of {loss!r} and a weight of {weight!r}")
            window.add(weight)
            window.losses.append(loss)
        window.weighted = state["weighted"]
        window.first_of_all = state.get("first_of_all", window.first_of_all)
        window.count = state.get("count", window.count)
        window.batches = state.get("batches", len(window.losses))
        numbers_of_it = (window.reference, window.count, 1.0 if reference is None else reference)
        if (
            not all(map(_is_number, numbers_of_it))
            or not type(window.weighted) is type(window.first_of_all) is bool
            or not type(window.length) is type(window.parts) is type(window.batches) is int
            or not 0 <= window.batches < window.length
            or window.parts < 1
        ):
            given = {key: value for key, value in state.items() if key not in ("losses", "weights")}
            raise ValueError(
                f"a window of {len(window.losses)} losses with {given}, after one with the reference {reference!r}"
            )
        return window


def weighted_mean(losses: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """0-d, in the dtype of the losses; nan where they weigh nothing."""
    total: Tensor = sum(
        _wide(loss) * weight for loss, weight in zip(losses, weights, strict=True)
    ) / sum(weights)
    return total.to(losses[0].dtype)


def widened(weight: Weight, device: torch.device) -> Weight:
    """The weight on that device, in a type whose sums stay exact: four times 200 is 32 in uint8, and in NumPy's too."""
    if isinstance(weight, Tensor) and weight.is_cpu and device.type != "cpu":
        weight = weight.item()  # no wait, as a copy to the device may be
    if not isinstance(weight, Tensor):
        return int(weight) if isinstance(weight, numbers.Integral) else float(weight)
    weight = weight.detach().to(device)
    wide: Tensor = _wide(weight) if weight.is_floating_point() else weight.to(torch.int64)
    return wide


def _is_number(value: Any) -> bool:
    """Whether it is a number as a window has them: of Python, or a real tensor without dimensions."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not (
            value.is_meta or value.is_complex() or value.is_sparse or value.is_quantized
        )
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # a nan compares false


def _wide(value: Any) -> Any:
    """As a float: of Python, or float64 where the device has it (``int_tensor / 3`` is float32 in torch, 6e-8 off)."""
    if isinstance(value, Tensor):
        return value.to(torch.float32 if value.device.type == "mps" else torch.float64)
    return float(value)


def _power_of_two_near(weight: Weight) -> Weight:
    """2 ** round(log2(weight)), or 1 for a weight that has none, computed where the weight lies."""
    if isinstance(weight, Tensor):
        wide = _wide(weight)
        return torch.where((wide > 0) & (wide < math.inf), wide.log2().round().exp2(), 1.0)
    return 2.0 ** round(math.log2(weight)) if weight > 0 else 1.0
