"""Step functions that yield their loss, and have their own update code below the yield."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch


def run_to_yield(
    generator: types.GeneratorType[Any, None, Any], after: Sequence[Callable[[], Any]]
) -> Any:
    """Runs a generator down to its loss. ``after`` must be empty: what follows an update is below the yield, too."""
    if after:
        raise ValueError(
            "`after` was given to a step function that yields its loss; it has its own update code, and the call belongs there, "
            "below the yield"
        )
    modes = _modes()
    try:
        output = next(generator)
    except StopIteration:
        raise TypeError(
            "this generator function ended without a loss: put `yield loss` where `loss.backward()` stood"
        ) from None
    if _modes() != modes:
        generator.close()  # whatever it left on is turned off before autocast is
        raise RuntimeError(
            "autocast, no_grad or inference_mode is still on at the yield, and would be for backward and the update: "
            "end that `with` block above `yield loss`"
        )
    return output


def run_to_end(generator: types.GeneratorType[Any, None, Any]) -> None:
    """Runs its update code, below the yield; ValueError where it yields again."""
    try:
        next(generator)
    except StopIteration:
        return
    raise ValueError(
        "this step function yielded twice; a loss is yielded once, further ones go to `step.backward(loss)`"
    )


def _modes() -> tuple[Any, ...]:
    """What a `with` block left open over a yield may have changed."""
    # The number of autocast blocks, and not the state: one more of the same would go unseen. torch.autocast counts so too.
    try:
        torch.autocast_increment_nesting()
    finally:
        nesting = torch.autocast_decrement_nesting()
    return nesting, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
