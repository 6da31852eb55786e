"""Step functions that yield their loss and have their own update code below the yield."""

from __future__ import annotations

from types import GeneratorType
from typing import Any

import torch


def run_to_yield(generator: GeneratorType[Any, None, Any]) -> Any:
    """Run a step function down to its loss, and return it."""
    modes = _modes()
    try:
        output = next(generator)
    except StopIteration:
        raise TypeError("the step function ended without a loss: `yield loss`") from None
    if _modes() != modes:
        generator.close()
        on = "autocast, no_grad or inference_mode is on at the yield, and would be in backward"
        raise RuntimeError(f"{on}: end that `with` block above `yield loss`")
    return output


def run_to_end(generator: GeneratorType[Any, None, Any]) -> None:
    """Run the update code below the yield."""
    try:
        next(generator)
    except StopIteration:
        return
    raise ValueError("the step function yielded twice: give other losses to `step.backward(loss)`")


def _modes() -> tuple[Any, ...]:
    """Return what an open ``with`` block may have changed; autocast by its depth of nesting."""
    try:
        torch.autocast_increment_nesting()
    finally:
        nesting = torch.autocast_decrement_nesting()
    return nesting, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
