"""The numbers of every window that a step closes, read without waiting for the device."""

from __future__ import annotations

import math
import operator
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from trainkit.core.update import Answer, Verdict
from trainkit.core.window import Window

# The numbers of a window by name; None for a number that is still on the device.
Row = list[tuple[str, float | None]]


class Readings:
    """A watcher of a step that passes the numbers of every window to ``take``, in order.

    Numbers stay on the device until ``least`` windows are waiting and no earlier copy is pending.
    Then one copy takes all of them without blocking. The first window that closes after its arrival
    hands the numbers over. ``flush`` waits for the copy. Numbers of a CPU arrive at once.

    ``take`` receives a dict of floats by the names of ``History.columns``. Names without a number
    in this window are missing.
    """

    def __init__(self, step: Any, take: Callable[[dict[str, float]], None], least: int) -> None:
        count = len(step._plan.optimizers)
        self.rates = ["lr"] if count == 1 else [f"lr/{i}" for i in range(count)]
        self.began = time.perf_counter()
        self._step, self._take, self._least = step, take, least
        self._settings: dict[str, Any] = {}
        self._waiting: list[tuple[Row, Tensor]] = []
        self._copy: Answer | None = None
        self._copied: list[Row] = []
        self._arrived: deque[dict[str, float]] = deque()
        step._watchers = [*step._watchers, self]

    def before_update(self, step: Any) -> None:
        """Note the learning rates and the loss scale of the update."""
        none: dict[str, Any] = {}
        rates = [next(iter(o.param_groups), none).get("lr") for o in step._plan.optimizers]
        settings = dict(zip(self.rates, rates, strict=True), loss_scale=step._updater.scale)
        # A copy: schedulers and the loss scale change their tensors in place.
        self._settings = {
            name: value.clone().reshape(()) if isinstance(value, Tensor) else value
            for name, value in settings.items()
        }

    def after_update(self, step: Any, window: Window, verdict: Verdict) -> None:
        """Note the numbers of the window, and hand over what has arrived."""
        seconds = time.perf_counter() - self.began
        found = {"update": step._closed, "weighted": window.weighted, "seconds": seconds}
        found |= {"parts": 1.0 if window.is_sum else None}
        found |= {"skipped": verdict.skipped, "grad_norm": verdict.norm, **self._settings}
        pairs = [(name, value) for name, value in found.items() if value is not None]
        pairs += [("losses", loss) for loss in window.losses]
        pairs += [("weights", weight) for weight in window.weights]
        row = [(name, None if isinstance(value, Tensor) else value) for name, value in pairs]
        self._waiting += [(row, _joined([x for _, x in pairs if isinstance(x, Tensor)]))]
        self.ask(self._least)

    def ask(self, least: int = 1, wait: bool = False) -> None:
        """Hand over what has arrived, and start a copy if ``least`` windows are waiting for one."""
        self._hand_over(wait)
        if self._copy is None and len(self._waiting) >= least:
            self._start_copy()
            self._hand_over(wait)

    def flush(self) -> None:
        """Hand over the numbers of all windows, waiting for the device if necessary."""
        self.ask(wait=True)

    def close(self) -> None:
        """Stop watching the step."""
        self._step._watchers = [watcher for watcher in self._step._watchers if watcher is not self]

    @property
    def pending(self) -> int:
        """The number of windows that ``take`` has not received."""
        return len(self._waiting) + len(self._copied) + len(self._arrived)

    def _start_copy(self) -> None:
        numbers = torch.cat([tensor for _, tensor in self._waiting])
        rows = [row for row, _ in self._waiting]
        if numbers.is_cuda:  # once for all rows: this call takes as long as a small window
            peak = torch.cuda.max_memory_allocated(numbers.device)
            rows = [[*row, ("peak_memory", peak)] for row in rows]
        # One statement, so that Ctrl-C cannot lose or repeat a window. So is the one below.
        self._copy, self._copied, self._waiting = Answer(numbers), rows, []

    def _hand_over(self, wait: bool) -> None:
        if self._copy is not None and (wait or self._copy.known()):
            numbers = iter(self._copy.read().tolist())
            arrived = deque([_completed(row, numbers) for row in self._copied])
            self._copy, self._copied, self._arrived = None, [], arrived
        while self._arrived:
            self._take(self._arrived.popleft())


def _joined(numbers: list[Tensor]) -> Tensor:
    """Return a copy of 0-d tensors in one tensor, on the accelerator if one of them is there.

    A copy, because the next run of a CUDA graph writes its loss to the same memory.
    """
    device = next((x.device for x in numbers if not x.is_cpu), numbers[0].device)
    here = [x if x.device == device else x.to(device, non_blocking=True) for x in numbers]
    return torch.stack(here).detach()


def _completed(row: Row, arrived: Iterator[float]) -> dict[str, float]:
    """Return the numbers of a window as floats, with its loss."""
    values = defaultdict(list)
    for name, value in row:
        values[name].append(float(next(arrived) if value is None else value))
    losses, weights, (weighted,) = (values.pop(n) for n in ("losses", "weights", "weighted"))
    numbers = {name: value for name, (value,) in values.items()}
    total = sum(weights)
    parts = numbers.pop("parts", total)  # 1 for a sum
    numbers["loss"] = sum(map(operator.mul, losses, weights)) / parts if parts else math.nan
    if weighted:
        numbers["weight"] = total
    return numbers


class Smoothed:
    """An exponential moving average without bias at its start. New numbers weigh ``share``."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._sum = self._total = 0.0

    def add(self, value: float) -> float:
        """Add a number, and return the average. Infinities and nan are returned, not added."""
        if not math.isfinite(value):
            return value
        self._sum += self._share * (value - self._sum)
        self._total += self._share * (1 - self._total)
        return self._sum / self._total
