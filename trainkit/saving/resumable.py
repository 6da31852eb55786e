"""Stopping a training loop and resuming it: ``resumable``, a context around the loop."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import active_children
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any
from weakref import WeakSet

from trainkit.core.plan import check
from trainkit.core.warning import warn
from trainkit.core.window import Window
from trainkit.ranks.collectives import all_gather_objects, rank, world_size
from trainkit.saving.objects import Objects
from trainkit.saving.position import Position
from trainkit.saving.randomness import RandomStates
from trainkit.saving.storage import Checkpoints, check_storable, first_of_ranks, load

RUN = ".run"  # no object has this name
DUE = 1  # a request to save. Other requests are signals; SIGHUP, which has this number, is not ours


class resumable:
    """Saves checkpoints of a training loop, and resumes it from the newest one.

    **Stopping at any moment and running the script again gives the same bits as not stopping.**

    Args:
        path: a folder for the checkpoints of this run, which all ranks see.
        every: the time between two checkpoints; or an int, the number of updates.
        keep: the number of checkpoints that are kept.
        objects: all that changes in training: models, optimizers, schedulers, steps, anything with
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
        advice = "`every=timedelta(minutes=10)` or `every=1000`"
        message = f"every={every!r} is neither a time nor a number of updates: {advice}"
        check(isinstance(every, (timedelta, int)), TypeError, message)
        check(isinstance(every, timedelta) or every >= 1, ValueError, message)
        message = f"keep={keep!r} is not a number of checkpoints, at least 1: `keep=2`"
        check(isinstance(keep, int) and keep >= 1, ValueError, message)
        self._every = every
        self._checkpoints = Checkpoints(Path(path).absolute(), keep)  # the loop may change folders
        self._objects = Objects(objects)
        self._objects.warn_of_missing()
        self._readers: list[Any] = []  # how the steps read loaders outside of the block
        self.resumed_from: Path | None = None

    def __enter__(self) -> resumable:
        steps = self._objects.steps.values()
        for step in steps:
            if step._updater is None:
                step._prepare()  # on several ranks it then reads loaders in lockstep
        readers = [step._deliver for step in steps]
        is_free = all(getattr(read, "func", None) is not resumable._deliver for read in readers)
        advice = "give all objects to one `resumable(path, ...)`"
        check(is_free, RuntimeError, f"a step is in the block of another `resumable`: {advice}")
        is_joint = world_size() == 1 or all(hasattr(read, "keywords") for read in readers)
        apart = "ranks that train models of their own cannot share a checkpoint"
        check(is_joint, ValueError, f"{apart}: `DistributedDataParallel(model)` over all ranks")
        self._signals, random = _Signals(), RandomStates(self._objects.sources)
        loaders = self._objects.stateful
        self._position = Position(loaders, random, self._signals.blocked, self._begin_pass)
        self._is_nested = False
        self._first_updates, self._checked_sizes = self._updates(), list[int]()
        self._check_new_states()
        self._checkpoints.check_path()
        if (found := self._checkpoints.newest()) is not None:
            self._load(found)
            self.resumed_from = found
        self._note_time()
        self._readers = readers
        for step, read in zip(steps, readers, strict=True):
            step._deliver = functools.partial(resumable._deliver, self, read)
        self._signals.catch()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        try:
            if kind is None and self._is_changed and not self._signals.stopped:
                self._position.end_pass()
                self._save()
        finally:
            for step, read in zip(self._objects.steps.values(), self._readers, strict=True):
                step._deliver = read
            self._readers = []
            self._signals.release()
        self._signals.follow()

    def epochs(self, n: int) -> Iterator[int]:
        """Yield the numbers of the epochs that are left of 0 to n - 1.

        A second loop in the block continues to count.

        Raises:
            RuntimeError: outside of the block.
        """
        check(bool(self._readers), RuntimeError, "run.epochs outside of `with resumable() as run:`")
        for epoch in self._position.epochs(n):
            yield epoch
            if self._signals.stopped:
                return
            self._is_changed = True

    # Between two micro-batches.

    def _deliver(self, read: Any, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield what ``step.over`` reads in this block; see ``Position.run``."""

        def deliver(rest: Iterable[Any], last_batch: Any) -> Any:
            if world_size() == 1:
                return read(rest)
            exchange = functools.partial(self._exchange, read.keywords["exchange"])
            return read(rest, exchange=exchange, last_batch=last_batch)

        if self._position.current is not None or self._signals.stopped:
            # A loop in the body of another loop is a part of one of its micro-batches.
            self._position.inner += 1
            self._is_nested = True
            try:
                yield from read(loader)
            finally:
                self._is_nested = False
            return
        self._check_new_states()  # the loop before may have ended right after its first update
        for delivery in self._position.run(loader, deliver):
            self._is_changed = True
            yield delivery
            advice = "end the inner one first, or `step.over(zip(a, b), other_step)`"
            message = f"of two loops of `over` at once only one could be resumed: {advice}"
            check(not self._is_nested, RuntimeError, message)
            self._check_new_states()
            self._handle_request(self._current_request())

    def _begin_pass(self) -> None:
        can_save = all(window.can_save for window in self._open_windows())
        told = all_gather_objects((can_save, self._pending_request()))
        if self._is_changed and all(can for can, _ in told):
            self._handle_request(max(request for _, request in told))

    def _exchange(self, exchange: Any, *counts: int) -> Any:
        """Exchange batch counts between ranks, and with them requests, before a window."""
        told = exchange(*counts, self._pending_request(about_to_close=1))
        self._common_request = int(told[:, 2].max())
        now: Any = self._position.current
        if now.loader is not None and len(told[:, :2].unique(dim=0)) > 1:
            self._common_request = 0  # no resumed loader could give a rank its last batch again
        return told[:, :2]

    def _current_request(self) -> int:
        windows = self._open_windows()
        if world_size() > 1:
            return 0 if windows else self._common_request
        return self._pending_request() if all(window.can_save for window in windows) else 0

    def _open_windows(self) -> list[Window]:
        windows = (step._window for step in self._objects.steps.values())
        return [window for window in windows if window is not None and window.losses]

    def _pending_request(self, about_to_close: int = 0) -> int:
        """Return the pending signal; DUE if it is time to save by the clock of rank 0; else 0."""
        if self._signals.pending or rank() > 0:
            return self._signals.pending
        if isinstance(self._every, timedelta):
            return DUE * (time.monotonic() - self._saved_at >= self._every.total_seconds())
        return DUE * (self._updates() + about_to_close - self._saved_updates >= self._every)

    def _handle_request(self, request: int) -> None:
        if request and not self._signals.stopped:
            self._save()
        if request > DUE:
            self._signals.pending = request  # perhaps another rank received it
            self._signals.follow()

    def _updates(self) -> int:
        """Return the largest number of updates of a step, with skipped ones, without a wait."""
        return max(step._closed for step in self._objects.steps.values())

    # Saving and loading.

    def _check_new_states(self) -> None:
        """Check that states can be stored, whenever optimizers have new ones.

        They have none before the first update that is not skipped.
        """
        sizes = [len(getattr(o, "state", ())) for o in self._objects.optimizers.values()]
        sizes.append(self._updates() > self._first_updates)
        if sizes != self._checked_sizes:
            states = self._objects.states(self._objects.steps)  # states of steps can be stored
            check_storable(states, self._objects.shared(states))
            self._checked_sizes = sizes

    def _save(self) -> None:
        for step in self._objects.steps.values():
            step.settle()  # schedulers may be an update behind the parameters
        self._note_time()
        if broken := first_of_ranks(self._objects.not_finite()):
            warn(f"{broken} is not finite: nothing is written, and the newest checkpoint stays")
            return
        position = self._position.state_dict()
        states = self._objects.states(position["loaders"])
        run = {"form": self._objects.form(), "ranks": world_size(), "position": position}
        self._checkpoints.save({**states, RUN: run}, self._objects.shared(states))

    def _note_time(self) -> None:
        self._saved_at, self._saved_updates = time.monotonic(), self._updates()
        self._is_changed = False
        self._common_request = 0  # of several ranks

    def _load(self, path: Path) -> None:
        states = load(path, self._objects.parameters())
        run = states.pop(RUN)
        self._objects.check_form(run["form"])
        same_ranks = run["ranks"] == world_size()
        if not same_ranks:  # an open window has the sums of one rank
            for name in self._objects.steps:
                states[name].pop("window", None)
        self._objects.load(states)
        self._position.load_state_dict(run["position"], same_ranks)


class _Signals:
    """SIGINT and SIGTERM in a block: the first waits for a checkpoint, the second does not."""

    def __init__(self) -> None:
        self.pending = 0  # a signal that waits for a checkpoint
        self.stopped = False  # by a signal: nothing is saved any more
        self._came_at = 0.0
        self._handlers: dict[int, Any] = {}
        self._workers = WeakSet[Any]()  # processes that block the signals

    def catch(self) -> None:
        """Replace the handlers of signals, in the main thread, except of ignored signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not of Python
                    self._handlers[number] = signal.signal(number, self._handle)
            Finalize(None, self._end_workers, exitpriority=0)

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Block the signals in workers that start here.

        A signal to a whole process group would end them, and the next batch would be an error. Only
        forked workers inherit this: to spawn one, multiprocessing may unblock the signals first.
        """
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            yield
            return
        found, others = signal.pthread_sigmask(signal.SIG_BLOCK, self._handlers), active_children()
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, found)
            self._workers.update(set(active_children()).difference(others))

    def _end_workers(self) -> None:
        """End workers at exit, where multiprocessing sends SIGTERM and waits for them."""
        for worker in self._workers:
            worker.kill()

    def release(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def follow(self) -> None:
        """Call the usual handler of the pending signal."""
        number, self.pending = self.pending, 0
        if not number:
            return
        handler, self.stopped = self._handlers.get(number), True
        if not callable(handler):
            raise SystemExit(128 + number)
        handler(number, None)
        self.stopped = False  # the handler lets the run continue

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.pending:
            self.pending, self._came_at = number, now
        elif now - self._came_at > 1:  # torchrun sends the same signal twice at once
            self.release()
            self.pending = number
            self.follow()
