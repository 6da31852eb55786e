"""The result of one call of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trainkit.core.window import Window


class StepResult:
    """The result of one call of a step.

    Attributes:
        loss: of this micro-batch: 0-d, detached, unscaled. None in a block without a loss.
        output: what the step function returned or yielded, with every tensor in it detached. None
            in a block, from ``step.close()``, and for a value that cannot be copied.
        complete: whether this call closed a window.
        grad_norm: the norm of the window's true gradients before clipping: 0-d float32 or float64
            on the device. None where no norm was computed.
    """

    # On the class: a result is made for every micro-batch, and most of them keep most of these.
    loss: Tensor = None  # type: ignore[assignment]
    output: Any = None
    complete = False
    grad_norm: Tensor | None = None
    _skipped: bool | Tensor = False
    _settle: Callable[[], None] | None = None
    _window: Window | None = None
    _count = 0

    @property
    def window_loss(self) -> Tensor:
        """The weighted mean of the window's losses up to this call: 0-d, computed when read.

        Their sum with ``reduction="sum"``. None where a call counted no loss.
        """
        if self._window is None:
            return None  # type: ignore[return-value]
        return self._window.mean_loss(self._count)

    @property
    def updated(self) -> bool:
        """Whether this call applied an update that can have moved a parameter.

        Reading it may wait for the device. No other attribute waits.
        """
        if self._settle is not None:
            self._settle()
        return self.complete and not self._skipped

    def __repr__(self) -> str:
        shown = f"loss={self.loss}, complete={self.complete}, updated={self.updated}"
        return f"StepResult({shown}, grad_norm={self.grad_norm})"
