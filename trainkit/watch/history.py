"""``History``: what a training run was, window by window, recorded without waiting for the device."""

from __future__ import annotations

import csv
import importlib
import math
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from trainkit.core.step import Step
from trainkit.watch.plots import curves, png
from trainkit.watch.readings import Readings


class History:
    """Records every window that a step closes: a row per update, skipped ones included.

    ``history = History(step)``, before the loop, is equivalent to these lines after every update, without their waits::

        rows.append([updates, window_loss.item(), grad_norm.item(), optimizer.param_groups[0]["lr"], ...])

    Numbers stay on the device and are copied many windows at a time; reading them waits for those that are left. Shown by itself,
    as the last line of a notebook cell, a history is a plot. ``resumable(path, ..., history=history)`` keeps it.

    ``history[column]`` is a list of floats, nan where a window has no such number. ``history.columns`` are:

    - ``update``: the number of the window, 1 for the first of all; skipped updates are counted.
    - ``loss``: the weighted mean of the window's losses. On several ranks that of this rank, as all that is not of gradients.
    - ``grad_norm``: of the true gradients, before clipping; nan where nothing asked for a norm.
    - ``lr``: of the first parameter group; of several optimizers ``lr/0``, ``lr/1``. ``loss_scale``: in float16. Both are those
      that this update was made with: a scheduler, and an overflow, change that of the next one.
    - ``skipped``: 1 for an update that was skipped, else 0.
    - ``weight``: the sum of the weights, for instance tokens, in the window.
    - ``seconds``: since the history was made, when the host was done with the window. An accelerator may be a few windows behind.
    - ``peak_memory``: of the CUDA device, in bytes, as ``torch.cuda.max_memory_allocated``; asked for with every copy.

    Args:
        step: what ``train_step`` has made. It holds its histories: they record for as long as it is used.
        log: where rows go as well, as they arrive: a ``SummaryWriter`` of TensorBoard; a run of wandb, or the module; or a
            callable, ``log(numbers, update)``, which ``mlflow.log_metrics`` and ``fabric.log_dict`` are. Numbers that a step does
            not have are left out. On an accelerator rows come a little late, and at the end of ``step.over`` or at
            ``flush()`` the last of them; so wandb gets ``update`` as a number, and counts its own steps. What a log raises comes
            out of the step, whose update is made and recorded by then.

    Raises:
        TypeError: for another step or log.

    Example:
        >>> import torch
        >>> from trainkit import History, accumulate, train_step
        >>> weight = torch.nn.Parameter(torch.zeros(()))
        >>> step = train_step(torch.optim.SGD([weight], lr=0.25), accumulate(2), max_norm=10.0)(lambda x: (weight - x) ** 2)
        >>> history = History(step)
        >>> for x in step.over([1.0, 3.0, 1.0, 1.0]):
        ...     result = step(x)
        >>> history["loss"], history["grad_norm"], history["lr"]
        ([5.0, 0.0], [4.0, 0.0], [0.25, 0.25])
        >>> history
        History(2 updates, 0 skipped, last loss 0)
    """

    def __init__(self, step: Step[Any], *, log: Any = None) -> None:
        if not isinstance(step, Step):
            raise TypeError(
                f"a history is of a step, got an object of type {type(step).__name__}: `step = train_step(optimizer)(function)`, "
                "`History(step)`"
            )
        self._log = None if log is None else _logger(log)
        self._max_norm = step._plan.max_norm
        self._readings = Readings(step, self._take, least=256 if log is None else 1)
        self._names = ["update", "loss", "grad_norm", "loss_scale", *self._readings.rates]
        self._names += ["skipped", "weight", "seconds", "peak_memory"]
        self._numbers = array("d")  # row by row

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self._names)

    def __len__(self) -> int:
        """How many windows were recorded; waits for nothing."""
        return len(self._numbers) // len(self._names) + self._readings.pending

    def __iter__(self) -> Iterator[str]:
        """Goes over the names of the columns, as that of a DataFrame does; ``"loss" in history`` looks there, too."""
        return iter(self._names)

    def __getitem__(self, column: str) -> list[float]:
        """A column; KeyError for another name."""
        if column not in self._names:
            raise KeyError(f"{column!r} is none of the columns {', '.join(self._names)}")
        self.flush()
        return self._numbers[self._names.index(column) :: len(self._names)].tolist()

    def flush(self) -> None:
        """Waits for what has not arrived, and hands it to ``log``. Called by whatever reads, and at the end of ``step.over``."""
        self._readings.flush()

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes a file of comma-separated values, its first line the names."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self._names)
            for row in zip(*(self[name] for name in self), strict=True):
                writer.writerow([int(value) if value.is_integer() else value for value in row])

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``; ImportError without pandas."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError(
                "history.to_pandas() needs pandas, which is not installed: `pip install pandas`"
            ) from error
        return pandas.DataFrame({name: self[name] for name in self})

    def plot(self) -> Any:
        """A ``matplotlib.figure.Figure`` of loss, gradient norm, loss scale and learning rate, each where there is one.

        Losses are pale, and darker their moving average; dashed is the norm that gradients are clipped to; skipped updates are
        marked. Its background is transparent: it suits light and dark. ``figure.savefig("run.png")``

        Raises:
            ImportError: without matplotlib.
        """
        return curves({name: self[name] for name in self}, self._readings.rates, self._max_norm)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]] | None:
        try:
            return png(self.plot()) if len(self) else None
        except ImportError:
            return None

    def __repr__(self) -> str:
        if not len(self):
            return "History(no updates)"
        skipped = int(sum(self["skipped"]))
        return f"History({len(self) - skipped} updates, {skipped} skipped, last loss {self['loss'][-1]:.6g})"

    def state_dict(self) -> dict[str, Any]:
        """The columns, and their rows as a float64 tensor."""
        self.flush()
        rows = torch.tensor(self._numbers, dtype=torch.float64)
        return {"columns": self.columns, "rows": rows.reshape(-1, len(self._names))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what ``state_dict`` gave, in the place of all that was recorded; time goes on from its last row.

        Raises:
            ValueError: for another state, or one of a step with another number of optimizers; before anything is changed.
        """
        try:
            columns, rows = list(state["columns"]), state["rows"]
            if (
                not isinstance(rows, torch.Tensor)
                or rows.dtype != torch.float64
                or rows.shape[1:] != (len(columns),)
            ):
                raise ValueError("rows are a float64 tensor with a number for each column")
            numbers = array("d", rows.flatten().tolist())
        except Exception as error:  # whatever is in place of a state may raise whatever it likes
            raise ValueError(
                f"this is not the state of a history ({error!r}): give what `history.state_dict()` returned"
            ) from error
        if columns != self._names:
            raise ValueError(
                f"a history of {', '.join(map(str, columns))}, and this one has {', '.join(self._names)}"
            )
        self._readings.restart(rows[-1, columns.index("seconds")].item() if numbers else 0.0)
        self._numbers = numbers

    def _take(self, numbers: dict[str, float]) -> None:
        # In one call, which no signal comes between.
        self._numbers.extend([numbers.get(name, math.nan) for name in self._names])
        if self._log is not None:
            update = int(numbers.pop("update"))
            self._log(numbers, update)


def _logger(log: Any) -> Callable[[dict[str, float], int], Any]:
    """A callable of numbers and an update, for whatever can be logged to; else TypeError."""
    if not isinstance(log, type):
        if hasattr(log, "add_scalar"):
            return lambda numbers, update: [
                log.add_scalar(name, value, update) for name, value in numbers.items()
            ]
        if callable(getattr(log, "log", None)):
            return lambda numbers, update: log.log({"update": update, **numbers})
        if callable(log):
            return log  # type: ignore[no-any-return]
    raise TypeError(
        f"log is a SummaryWriter, a run of wandb or a callable, got {log!r}: `History(step, log=SummaryWriter())`, "
        "`History(step, log=wandb.init())` or `History(step, log=lambda numbers, update: print(update, numbers))`"
    )
