"""What each window of a step came to, in numbers that nobody waits for: what ``History`` keeps and a progress bar shows."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainkit.core.answer import Answer
from trainkit.core.window import Window


class Readings:
    """Watches a step, and hands the numbers of every window that it closes to ``take``, in order, as they arrive.

    A window leaves its numbers on the device. When those of ``least`` windows are there and no others are on their way, all of
    them are copied together, without waiting; the end of the first window that finds a copy arrived hands it over. ``flush``
    waits. From a CPU they arrive at once.

    ``take`` gets a dict, without what a step does not have: ``update``, the number of the window, skipped ones counted; ``loss``,
    the weighted mean of the window; ``grad_norm``, as ``StepResult`` has it; ``lr`` or ``lr/0``, ``lr/1``, of the first group of
    each optimizer, and ``loss_scale``: both as this update was made with them; ``skipped``; ``weight``, the sum of the weights;
    ``seconds`` since this was made; ``peak_memory``, in bytes, when the copy was asked for.
    """

    def __init__(self, step: Any, take: Callable[[dict[str, float]], None], least: int) -> None:
        count = len(step._plan.optimizers)
        self.rates = ["lr"] if count == 1 else [f"lr/{i}" for i in range(count)]
        self._step, self._take, self.least = step, take, least
        self._began = time.perf_counter()
        self._used: dict[str, Any] = {}
        # A row has numbers, and tensors of one dimension or none in the place of numbers that have not arrived.
        self._waiting: list[dict[str, Any]] = []
        self._coming: deque[dict[str, Any]] = deque()
        self._answers: list[tuple[Answer, list[tuple[dict[str, Any], str, int]]]] = []
        step._watchers = [*step._watchers, self]

    def before_update(self) -> None:
        """Notes what the update is made with: the scale moves in place after it, a learning rate in the code of a generator."""
        groups, scale = (
            (o.param_groups[0] for o in self._step._plan.optimizers),
            self._step._scaler.loss_scale,
        )
        self._used = {
            name: _kept(group["lr"])
            for name, group in zip(self.rates, groups, strict=True)
            if "lr" in group
        }
        if scale is not None:
            self._used["loss_scale"] = _kept(scale.value)

    def after_update(self, window: Window, skipped: bool | Tensor, norm: Tensor | None) -> None:
        """Notes what the update came to."""
        # A copy now: the output of a CUDA graph is another at its next run.
        losses, weights = torch.stack(window.losses), window.weights
        row = self._used | {
            "update": self._step._closed,
            "losses": losses,
            "weights": _stacked(weights, losses.device)
            if any(isinstance(weight, Tensor) for weight in weights)
            else weights,
            "is_weighted": window.weighted,
            "skipped": skipped,
            "seconds": time.perf_counter() - self._began,
        }
        if norm is not None:
            row["grad_norm"] = norm
        self._waiting += [row]

    def ask(self, least: int = 1) -> None:
        """Hands over what has arrived, and has what waits copied, if that is so many windows; waits for nothing."""
        self._hand_over()
        if not self._answers and len(self._waiting) >= least:
            self._send()
            self._hand_over()

    def flush(self) -> None:
        """Hands over all there is; waits for it."""
        while self._answers or self._waiting or self._coming:
            self._hand_over(wait=True)
            self._send()

    def restart(self, seconds: float) -> None:
        """Forgets what was not handed over, and goes on counting time from there."""
        self._waiting, self._answers, self._began = [], [], time.perf_counter() - seconds
        self._coming.clear()

    def close(self) -> None:
        """Watches no longer."""
        self._step._watchers = [watcher for watcher in self._step._watchers if watcher is not self]

    @property
    def pending(self) -> int:
        """How many windows were not handed over."""
        return len(self._waiting) + len(self._coming)

    def _send(self) -> None:
        """Has the numbers of all windows that wait copied from the device: as a rule, in one piece."""
        rows = self._waiting
        if not rows:
            return
        memory = _peak_memory(rows[-1]["losses"].device)
        pieces: dict[Any, list[tuple[dict[str, Any], str, Tensor]]] = {}
        for row in rows:
            row.update(memory)
            for name, value in row.items():
                if isinstance(value, Tensor):
                    pieces.setdefault((value.device, value.dtype), []).append(
                        (row, name, value.reshape(-1))
                    )
        answers = [
            (
                Answer(torch.cat([part for *_, part in found])),
                [(row, name, part.numel()) for row, name, part in found],
            )
            for found in pieces.values()
        ]
        # In one assignment, which no signal comes between.
        self._answers, self._coming, self._waiting = answers, deque(rows), []

    def _hand_over(self, wait: bool = False) -> None:
        if self._answers and (wait or all(answer.known() for answer, _ in self._answers)):
            for answer, places in self._answers:
                numbers = iter(answer.read().tolist())  # type: ignore[union-attr]
                for row, name, count in places:
                    row[name] = [next(numbers) for _ in range(count)]
            self._answers = []
        while self._coming and not self._answers:
            self._take(_numbers(self._coming.popleft()))


def _kept(value: Any) -> Any:
    """A number as it is now: tensors change in place."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _stacked(weights: Sequence[Any], device: torch.device) -> Tensor:
    # A number goes to the device as an operation, which nothing waits for, as for a copy.
    return torch.stack(
        [w if isinstance(w, Tensor) else torch.full((), w, device=device) for w in weights]
    )


def _peak_memory(device: torch.device) -> dict[str, int]:
    # Once for all windows of a copy: asking takes as long as a small window.
    return {"peak_memory": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """A row that has arrived, as ``take`` gets it."""
    losses, weights, is_weighted = row.pop("losses"), row.pop("weights"), row.pop("is_weighted")
    numbers = {
        name: float(value[0] if isinstance(value, list) else value) for name, value in row.items()
    }
    total = float(sum(weights))
    numbers["loss"] = (
        sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / total
        if total
        else math.nan
    )
    if is_weighted:
        numbers["weight"] = total
    return numbers


class Smoothed:
    """A moving average of finite numbers, each of which takes the share ``share``; from the first on without a bias."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._sum = self._total = 0.0

    def add(self, value: float) -> float:
        """The average with one more number; or this itself where it is not finite, and then it is left out."""
        if not math.isfinite(value):
            return value
        self._sum += self._share * (value - self._sum)
        self._total += self._share * (1 - self._total)
        return self._sum / self._total
