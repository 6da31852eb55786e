"""A bar for a loop over a loader, with the numbers of the windows that close in it: ``step.over(loader, progress=True)``."""

from __future__ import annotations

import functools
import importlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from trainkit.chunks.batches import tensors
from trainkit.core.loaders import length_of
from trainkit.ranks.parallel import this_rank
from trainkit.watch.readings import Readings, Smoothed

T = TypeVar("T")
_BAR_EXAMPLE = (
    "`step.over(loader, progress=True)`, or with arguments for tqdm, `progress={'desc': 'epoch 3'}`"
)


def with_progress(
    batches: Iterator[T], loader: Iterable[T], steps: Sequence[Any], progress: Any
) -> Iterator[T]:
    """The batches of a loop over ``loader``, with a bar; on rank 0 alone. See ``Step.over``."""
    if progress is not True and not isinstance(progress, Mapping):
        raise TypeError(f"progress is True, False or a mapping, got {progress!r}: {_BAR_EXAMPLE}")
    try:
        tqdm = importlib.import_module("tqdm.auto").tqdm
    except ImportError as error:
        raise ImportError(
            "progress shows a bar of tqdm, which is not installed: `pip install tqdm`"
        ) from error
    if this_rank() > 0:
        return batches
    options = {"total": length_of(loader) or None} | ({} if progress is True else dict(progress))
    return _with_bar(batches, functools.partial(tqdm, **options), steps)


def _with_bar(batches: Iterator[T], make_bar: Any, steps: Sequence[Any]) -> Iterator[T]:
    resumable = steps[0]._resumable
    outer = None if resumable is None else resumable._place.current
    try:
        bar = make_bar()
    except KeyError as error:  # so tqdm says it
        raise TypeError(f"progress has what tqdm does not take, {error}: {_BAR_EXAMPLE}") from error
    if bar.disable:
        yield from batches
        return
    numbers = _Numbers(bar, steps)
    try:
        for batch in batches:
            if (
                resumable is not None
                and not numbers.batches
                and resumable._place.current is not outer
            ):
                # Resuming has passed over these, and they took no time.
                bar.initial = bar.n = bar.last_print_n = (
                    bar.initial + resumable._place.current.delivered - 1
                )
                bar.unpause()
            numbers.count(batch)
            yield batch
            if (
                time.time() - bar.last_print_t >= bar.mininterval
            ):  # and not every time that it will not be seen
                numbers.ask()
                numbers.show()
            bar.update()
    finally:
        try:
            batches.close()  # type: ignore[attr-defined]  # which waits for the last numbers
        finally:
            numbers.close()


class _Numbers:
    """What a bar says behind it: the latest numbers that have arrived, of all steps that go over the loader."""

    def __init__(self, bar: Any, steps: Sequence[Any]) -> None:
        self.batches = 0
        self._bar = bar
        self._rows = 0
        self._weight = 0.0  # of windows that have arrived
        self._losses = [Smoothed(0.1) for _ in steps]
        self._latest: list[dict[str, float]] = [{} for _ in steps]
        self._skipped = [0] * len(steps)
        self._readings = [
            Readings(step, functools.partial(self._take, i), least=256)
            for i, step in enumerate(steps)
        ]

    def count(self, batch: Any) -> None:
        self.batches += 1
        self._rows += next(map(len, tensors(batch)), 0)

    def close(self) -> None:
        """Watches no longer, and leaves the bar as it is now."""
        for readings in self._readings:
            readings.close()
        self.show()
        if not self.batches:
            self._bar.leave = False  # nothing came: an epoch that was over before a run was stopped
        self._bar.close()

    def _take(self, i: int, numbers: dict[str, float]) -> None:
        self._latest[i] = numbers | {"loss": self._losses[i].add(numbers["loss"])}
        self._skipped[i] += bool(numbers["skipped"])
        if i == 0:
            self._weight += numbers.get("weight", 0.0)

    def ask(self) -> None:
        """Takes what has arrived, and has the device send what is new."""
        for readings in self._readings:
            readings.ask()

    def show(self) -> None:
        """Has the bar say them when it is drawn next."""
        self._bar.set_postfix_str(", ".join(self._texts()), refresh=False)

    def _texts(self) -> Iterator[str]:
        rates = dict.fromkeys(name for readings in self._readings for name in readings.rates)
        for name, columns in (
            ("loss", ["loss"]),
            ("norm", ["grad_norm"]),
            ("lr", rates),
            ("scale", ["loss_scale"]),
        ):
            form = ".6g" if name == "scale" else ".4g"
            values = [
                format(latest[column], form)
                for latest in self._latest
                for column in columns
                if column in latest
            ]
            if values:
                yield f"{name} {'/'.join(values)}"
        if any(self._skipped):
            yield f"skipped {'/'.join(map(str, self._skipped))}"
        state = self._bar.format_dict
        done = self._bar.n - (self._bar.initial or 0)
        rate = state["rate"] or (done / state["elapsed"] if state["elapsed"] else 0)
        # Weights may be rows, and windows lag behind batches.
        amount, unit = (
            (self._weight, "tokens") if self._weight > self._rows else (self._rows, "rows")
        )
        if rate and amount:
            yield f"{_short(amount / self.batches * rate)} {unit}/s"


def _short(value: float) -> str:
    """Three digits: 12.3, 1.23k, 45.6M."""
    value = float(f"{value:.3g}")
    power = min(int(math.log10(value)) // 3, 4) if value >= 1 else 0
    return f"{value / 1000**power:.3g}{['', 'k', 'M', 'G', 'T'][power]}"
