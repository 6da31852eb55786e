"""Mixed precision: the dtype of a device, and what autocast needs around forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Precision:
    """What ``amp`` asks for."""

    dtype: torch.dtype | None
    device: str | None
    init_scale: float
    growth_interval: int

    def resolve(self, device: torch.device) -> tuple[str, torch.dtype]:
        """Return the device type and the dtype of autocast for a model on ``device``."""
        kind = self.device or device.type
        return kind, self.dtype or native_dtype(kind)


def native_dtype(kind: str) -> torch.dtype:
    """Return the half precision that a device computes natively: bfloat16 if possible."""
    if kind == "cuda":  # without the argument torch answers True on a T4, which emulates bfloat16
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if is_native else torch.float16
    return torch.float16 if kind == "mps" else torch.bfloat16


def current_device() -> torch.device:
    """Return the accelerator of this machine if there is one that works, else the CPU."""
    # is_available first: without it torch names the accelerator that it was built for.
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def between_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Have torch.compile call this between two graphs, since a graph has no modes."""
    # The public torch.compiler.disable imports the compiler, which takes seconds.
    disable = getattr(getattr(torch, "_compile", None), "_disable_dynamo", None)
    return disable(function) if disable else function


def keep_casts_fresh(optimized: Iterable[Sequence[nn.Parameter]]) -> list[nn.Parameter]:
    """Clear autocast's copies of the weights whenever a gradient of them is taken.

    A step function may move weights along a gradient between two of its forwards, for example in
    SAM (Foret et al. 2021, https://arxiv.org/abs/2010.01412). The second forward would use the
    copies of the old weights. The last trained weight of each optimizer carries the hook: a hook on
    every weight would cost as much as backward through a small layer. Returns these weights.
    """
    found = []
    for parameters in optimized:
        weight = next((p for p in reversed(parameters) if p.requires_grad and p.dim() > 1), None)
        if weight is not None:
            found.append(weight)
            if _clear_casts not in (weight._backward_hooks or {}).values():
                weight.register_hook(_clear_casts)  # type: ignore[no-untyped-call]
    return found


def _clear_casts(gradient: Tensor) -> None:
    torch.clear_autocast_cache()
