"""Mixed precision: what ``amp`` asks for, and the half precision of a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

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
