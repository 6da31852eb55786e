"""Stopping a training loop and resuming it: ``resumable``, a context around the loop."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainkit.core.plan import check
from trainkit.core.step import Step
from trainkit.core.warning import warn
from trainkit.ranks.collectives import all_gather_objects, rank, world_size
from trainkit.saving.objects import Objects
from trainkit.saving.position import Position
from trainkit.saving.randomness import RandomStates
from trainkit.saving.storage import Checkpoints, Saved, check_storable, first_of_ranks, load

POSITION = ".position"  # no object has this name
DUE = 1  # a request to save. Other requests are signals; SIGHUP, which has this number, is not ours


class resumable:
    """Saves checkpoints of a training loop, and resumes it from the newest one.

    **Stopping at any moment and running the script again gives the same bits as not stopping.**

    Args:
        path: a folder for the checkpoints of this run, which all ranks see.
        every: the time between two checkpoints; or an int, the number of updates.
        keep: the number of checkpoints that are kept.
        objects: all that changes in training: models, optimizers, schedulers, steps, whatever has
            ``state_dict`` and ``load_state_dict``, generators of random numbers, lists, dicts.

    Raises: TypeError for an object whose state cannot be stored. ValueError for a path that cannot
        be written, or a checkpoint of other objects. RuntimeError if all checkpoints are damaged.

    Example:
        >>> import tempfile, torch, trainkit
        >>> path, model = tempfile.mkdtemp(), torch.nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters())
        >>> step = trainkit.train_step(optimizer)(lambda x: model(x).mean())
        >>> with trainkit.resumable(path, model=model, optimizer=optimizer, step=step) as run:
        ...     for epoch in run.epochs(3):  # those that are left
        ...         complete = [step(x).complete for x in step.over([torch.ones(1)])]

    Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        /,
        *,
        every: timedelta | int = timedelta(minutes=10),
        keep: int = 2,
        **objects: Any,
    ) -> None:
        is_time = isinstance(every, timedelta)
        advice = "`every=timedelta(minutes=10)` or `every=1000`"
        message = f"every={every!r} is no time and no number of updates: {advice}"
        check(is_time or _is_int(every), TypeError, message)
        amount = every.total_seconds() + 1 if isinstance(every, timedelta) else every
        check(amount >= 1, ValueError, f"every={every!r} is too small: {advice}")
        check(_is_int(keep), TypeError, f"keep={keep!r} is no number of checkpoints: `keep=2`")
        check(keep >= 1, ValueError, f"keep={keep} keeps no checkpoint to fall back on: `keep=2`")
        self._every, self._path = every, Path(path)
        self._objects = Objects(objects)
        self._objects.warn_of_missing()
        self._position = Position(self._objects.stateful, RandomStates(self._objects.sources))
        self._checkpoints = Checkpoints(self._path.absolute(), keep)  # the loop may change folders
        self.resumed_from: Path | None = None
        self._signals = _Signals()
        self._readers: list[Any] = []  # how the steps read loaders before
        self._is_entered = self._is_changed = self._is_nested = self._is_checked = False
        self._saved_at, self._saved_updates = 0.0, 0
        # On several ranks: what they request together, and the end of the window in this pass.
        self._common_request, self._window_end = 0, 0

    def __enter__(self) -> resumable:
        advice = "its objects are where it left them: make a new `resumable(path, ...)`"
        check(not self._is_entered, RuntimeError, f"this block was entered before, and {advice}")
        found = [step._deliver for step in self._objects.steps]
        is_free = not any(getattr(read, "func", None) is resumable._deliver for read in found)
        advice = "give all objects to one `resumable(path, ...)`"
        check(is_free, RuntimeError, f"a step is in the block of another `resumable`: {advice}")
        self._check_storable()
        self._checkpoints.check_path()
        if (saved := self._checkpoints.newest()) is not None:
            self._load(saved)
            self.resumed_from = saved.path
        self._note_time()
        self._is_entered = True
        steps = self._objects.steps
        for step in steps:
            if world_size() > 1 and step._updater is None:
                step._prepare()  # the step then reads in lockstep
        self._readers = [step._deliver for step in steps]
        for step, read in zip(steps, self._readers, strict=True):
            step._deliver = functools.partial(resumable._deliver, self, step, read)
        self._signals.catch()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        try:
            if kind is None and self._is_changed and not self._signals.stopped:
                self._save()
        finally:
            for step, read in zip(self._objects.steps, self._readers, strict=True):
                step._deliver = read
            self._readers = []
            self._signals.release()
        self._signals.follow()

    def epochs(self, n: int) -> Iterator[int]:
        """The numbers of the epochs that are left, of 0 to n - 1. A second loop counts on.

        Raises:
            TypeError: if ``n`` is no int.
            RuntimeError: outside of the block.
        """
        check(_is_int(n), TypeError, f"run.epochs({n!r}): give the number of all, `run.epochs(3)`")
        check(bool(self._readers), RuntimeError, "run.epochs outside of `with resumable() as run:`")
        return self._epochs(n)

    def _epochs(self, n: int) -> Iterator[int]:
        for epoch in self._position.epochs(n, self._begin_epoch, lambda: self._signals.stopped):
            yield epoch
            self._is_changed = True

    def _begin_epoch(self) -> None:
        if self._position.current is None and not self._signals.stopped:
            self._handle_request(max(all_gather_objects(self._pending_request())))

    # Between two micro-batches.

    def _deliver(
        self, step: Step[Any], read: Any, loader: Iterable[Any], *updates: int
    ) -> Iterator[Any]:
        """How ``step.over`` reads a loader in this block; see ``Position.run``."""

        def deliver(rest: Iterable[Any], last_batch: Any) -> Any:
            if world_size() == 1:
                return read(rest)
            exchange = functools.partial(self._exchange, read.keywords["exchange"])
            return read(rest, exchange=exchange, last_batch=last_batch)

        if self._position.current is not None or self._signals.stopped:
            # A loop in the body of another one is a part of that one's micro-batch.
            self._is_nested = True
            try:
                yield from read(loader, *updates)
            finally:
                self._is_nested = False
            return
        for delivery in self._position.run(loader, deliver, lambda: step._closed, *updates):
            self._is_changed = True
            yield delivery
            advice = "end the inner one first, or `step.over(zip(a, b), other_step)`"
            message = f"of two loops of `over` at once only one could be resumed: {advice}"
            check(not self._is_nested, RuntimeError, message)
            if not self._is_checked and self._updates() > self._saved_updates:
                self._check_storable()  # optimizers have their states now
                self._is_checked = True
            self._handle_request(self._current_request())

    def _exchange(self, exchange: Any, *counts: int) -> Any:
        """Exchange batch counts between ranks, and with them requests, before a window."""
        told = exchange(*counts, self._pending_request(about_to_close=1))
        now = self._position.current
        assert now is not None
        self._window_end = now.delivered + int(told[:, 0].max())
        self._common_request = int(told[:, 2].max())
        if now.loader is not None and len(told[:, :2].unique(dim=0)) > 1:
            self._common_request = 0  # a loader with a state cannot give its last batch again
        return told[:, :2]

    def _current_request(self) -> int:
        if world_size() == 1:
            return self._pending_request()
        now, steps = self._position.current, self._objects.steps
        is_end = now is not None and now.delivered == self._window_end
        is_open = any(step._window is not None and step._window.losses for step in steps)
        return self._common_request if is_end and not is_open else 0

    def _pending_request(self, about_to_close: int = 0) -> int:
        """A signal that came; DUE if it is time to save, by the clock of rank 0; else 0."""
        if self._signals.pending or rank() > 0:
            return self._signals.pending
        if isinstance(self._every, timedelta):
            return DUE * (time.monotonic() - self._saved_at >= self._every.total_seconds())
        return DUE * (self._updates() + about_to_close - self._saved_updates >= self._every)

    def _handle_request(self, request: int) -> None:
        if request:
            self._save()
        if request > DUE:
            self._signals.pending = request  # it may have come to another rank
            try:
                self._signals.follow()
            except KeyboardInterrupt as error:
                error.args = error.args or (f"saved in {self._path}: run it again to resume",)
                raise

    def _updates(self) -> int:
        """Of the step with most, skipped ones included: their number waits for no device."""
        return max(step._closed for step in self._objects.steps)

    # Saving and loading.

    def _check_storable(self) -> None:
        states = self._objects.states(self._objects.of(Step))  # a step's state can be stored
        check_storable(states, self._objects.shared(states))

    def _save(self) -> None:
        for step in self._objects.steps:
            step.settle()  # so that schedulers are where the parameters are
        self._note_time()
        if broken := first_of_ranks(self._objects.not_finite()):
            warn(f"{broken} is not finite: nothing is written, the newest in {self._path} stays")
            return
        position = self._position.state_dict()
        states = self._objects.states(position["loaders"])
        self._checkpoints.save({**states, POSITION: position}, self._objects.shared(states))

    def _note_time(self) -> None:
        self._saved_at, self._saved_updates = time.monotonic(), self._updates()
        self._is_changed = False

    def _load(self, saved: Saved) -> None:
        states = load(saved, self._objects.patterns())
        position = states.pop(POSITION)
        if misfit := self._objects.misfit(states):
            advice = "give the same objects, or another path to begin anew"
            raise ValueError(f"the checkpoint {saved.path} does not fit: {misfit}; {advice}")
        same_ranks = saved.ranks == world_size()
        if not same_ranks:  # an open window is the share of one of those ranks
            for name in self._objects.of(Step):
                for key in ("window", "gradients"):
                    states[name].pop(key, None)
        self._objects.load(states, position["loaders"])
        self._position.load_state_dict(position, same_ranks)


class _Signals:
    """SIGINT and SIGTERM in a block: the first waits for a checkpoint, a second one does not."""

    def __init__(self) -> None:
        self.pending = 0  # the signal that came
        self.stopped = False  # by a signal: what the block still does is no part of the run
        self._came_at = 0.0
        self._handlers: dict[int, Any] = {}

    def catch(self) -> None:
        """Replace the handlers of signals, in the main thread, except of ignored signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._handle)

    def release(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def follow(self) -> None:
        """Do what the pending signal would have done."""
        number, self.pending = self.pending, 0
        if not number:
            return
        handler = self._handlers.get(number, signal.getsignal(number))
        self.stopped = True
        if callable(handler):
            handler(number, None)
        elif handler is not signal.SIG_IGN:
            raise SystemExit(128 + number)
        self.stopped = False  # the handler lets the run go on

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.pending:
            self.pending, self._came_at = number, now
        elif now - self._came_at > 1:  # torchrun sends the same one twice at once
            self.release()
            self.pending = number
            self.follow()


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
