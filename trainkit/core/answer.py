"""Numbers that a device has, and nobody waits for until they matter."""

from __future__ import annotations

import torch
from torch import Tensor


class Answer:
    """Numbers on their way from the device.

    A CPU has them at once. From an accelerator a copy is started, and the host need not wait for it until they matter.
    """

    def __init__(self, numbers: bool | Tensor) -> None:
        self._numbers = numbers
        self._event: torch.Event | None = None
        if isinstance(numbers, Tensor) and numbers.device.type in ("cuda", "xpu"):
            self._numbers = numbers.to("cpu", non_blocking=True)
            self._event = torch.Event(numbers.device)
            self._event.record()

    def known(self) -> bool:
        """Whether they are there without waiting for them."""
        return self._event is None or self._event.query()

    def read(self) -> bool | Tensor:
        """They themselves; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers
