"""``History``: every window of a training run, recorded without waiting for the device."""

from __future__ import annotations

import csv
import math
import os
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from trainkit.core.plan import check
from trainkit.core.step import Step
from trainkit.watch.optional import optional
from trainkit.watch.plots import curves, png
from trainkit.watch.readings import Readings


class History:
    """Record every window that a step closes: one row per update, skipped updates included.

    Equivalent to this line after every update, without its waits for the device::

        rows.append([update, window_loss.item(), grad_norm.item(), group["lr"], ...])

    ``history[column]`` is a list of floats, nan where a window has no such number.
    docs/primitives/history.md defines ``history.columns``. In a notebook a history is a plot.

    Args:
        step: a step, for example of ``train_step``. Make the history before the loop.
        log: receives every row too: a TensorBoard ``SummaryWriter``, a run of wandb, or a callable
            ``log(numbers, update)``. If it raises, the update has been made all the same.

    Raises:
        TypeError: for another ``step`` or ``log``.

    Example:
        >>> import torch
        >>> from trainkit import History, accumulate, train_step
        >>> w = torch.nn.Parameter(torch.zeros(()))
        >>> step = train_step(torch.optim.SGD([w], lr=0.25), accumulate(2))(lambda x: (w - x) ** 2)
        >>> history = History(step)
        >>> results = [step(x) for x in step.over([1.0, 3.0, 1.0, 1.0])]
        >>> history["loss"], history["lr"], history
        ([5.0, 0.0], [0.25, 0.25], History(2 updates, 0 skipped, last loss 0))
    """

    def __init__(self, step: Step[Any], *, log: Any = None) -> None:
        kind = type(step).__name__
        message = f"History records a step, got {kind}: `History(train_step(optimizer)(function))`"
        check(isinstance(step, Step), TypeError, message)
        self._log = None if log is None else _logger(log)
        self._max_norm = step._plan.max_norm
        self._readings = Readings(step, self._record, least=256 if log is None else 1)
        self.columns = ["update", "loss", "grad_norm", "loss_scale", *self._readings.rates]
        self.columns += ["skipped", "weight", "seconds", "peak_memory"]
        self._numbers = array("d")  # row after row

    def __len__(self) -> int:
        """Return the number of recorded windows, without waiting for the device."""
        return len(self._numbers) // len(self.columns) + self._readings.pending

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the columns, as a DataFrame does."""
        return iter(self.columns)

    def __getitem__(self, column: str) -> list[float]:
        """Return a column, waiting for its last values if necessary; KeyError for another name."""
        check(column in self.columns, KeyError, f"{column!r} is none of {self.columns}")
        self.flush()
        return self._numbers[self.columns.index(column) :: len(self.columns)].tolist()

    def flush(self) -> None:
        """Wait for the values that are still on the device, and pass them to ``log``.

        The end of ``step.over``, and all methods that read columns, call this.
        """
        self._readings.flush()

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a file of comma-separated values. Its first line has the names of the columns."""
        rows = zip(*(self[name] for name in self), strict=True)
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            for row in rows:
                writer.writerow([int(value) if value.is_integer() else value for value in row])

    def to_pandas(self) -> Any:
        """Return the columns as a ``pandas.DataFrame``; ImportError without pandas."""
        pandas = optional("pandas", "history.to_pandas()")
        return pandas.DataFrame({name: self[name] for name in self})

    def plot(self) -> Any:
        """Return a ``matplotlib.figure.Figure`` of loss, gradient norm, loss scale, learning rate.

        The dark line over the losses is their moving average. The dashed line is ``max_norm``. Red
        marks are skipped updates. A constant learning rate is left out.
        ``figure.savefig("run.png")`` writes the figure to a file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return curves({name: self[name] for name in self}, self._max_norm)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]] | None:
        try:
            return png(self.plot()) if len(self) else None
        except ImportError:
            return None

    def __repr__(self) -> str:
        if not len(self):
            return "History(no updates)"
        skipped, loss = int(sum(self["skipped"])), self["loss"][-1]
        return f"History({len(self) - skipped} updates, {skipped} skipped, last loss {loss:.6g})"

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the columns, and the rows as a float64 tensor."""
        self.flush()
        rows = torch.tensor(self._numbers, dtype=torch.float64).reshape(-1, len(self.columns))
        return {"columns": list(self.columns), "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all rows with those in ``state``. ``seconds`` continues from its last row.

        Raises:
            ValueError: for the state of a history with other columns. Nothing changes.
        """
        found = state if isinstance(state, Mapping) else {}
        columns, rows = found.get("columns"), found.get("rows", torch.empty(0))
        shape = getattr(rows, "shape", ())[1:]
        message = f"got a state with columns {columns!r}, and this history has {self.columns!r}: "
        message += "`history.load_state_dict(other_history.state_dict())`"
        check(columns == self.columns and shape == (len(self.columns),), ValueError, message)
        self.flush()
        seconds = rows[-1, self.columns.index("seconds")].item() if len(rows) else 0.0
        self._numbers = array("d", rows.flatten().tolist())
        self._readings.began = time.perf_counter() - seconds

    def _record(self, numbers: dict[str, float]) -> None:
        # One call, so that Ctrl-C cannot leave half a row.
        self._numbers.extend([numbers.get(name, math.nan) for name in self.columns])
        if self._log is not None:
            update = int(numbers.pop("update"))
            self._log(numbers, update)


def _logger(log: Any) -> Callable[[dict[str, float], int], Any]:
    """Return a callable that passes numbers and their update to ``log``."""
    if not isinstance(log, type):
        if hasattr(log, "add_scalar"):
            return lambda numbers, update: [
                log.add_scalar(name, value, update) for name, value in numbers.items()
            ]
        if callable(getattr(log, "log", None)):
            return lambda numbers, update: log.log({"update": update, **numbers})
    message = f"log is a SummaryWriter, a run of wandb or a callable, got {log!r}: "
    is_callable = callable(log) and not isinstance(log, type)
    check(is_callable, TypeError, message + "`History(step, log=SummaryWriter())`")
    return log  # type: ignore[no-any-return]
