"""Stopping and going on: ``resumable``, a context around a training loop."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor

from trainkit.core.loaders import Delivery
from trainkit.core.step import Step
from trainkit.core.warning import warn
from trainkit.ranks.parallel import count_ranks, everyone, tell_all, this_rank
from trainkit.saving.objects import Objects
from trainkit.saving.position import Place
from trainkit.saving.randomness import RandomStates
from trainkit.saving.storage import Checkpoints, Saved

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PLACE = ".place"  # no object has this name
DUE = 1  # told where a signal's number would be: it is time for a checkpoint. SIGHUP, which has this number, is not ours.


class resumable:
    """Makes a training loop one that can be stopped: run the script again, and it goes on.

    **Stopping at any moment and running the script again gives the same bits as not stopping**, with this loop::

        with resumable("checkpoints", model=model, optimizer=optimizer, schedule=schedule, step=step) as run:
            for epoch in run.epochs(3):          # those that are left
                for batch in step.over(loader):  # from the batch after the last one that counted
                    step(batch)

    The block begins by loading the newest checkpoint, where there is one. Checkpoints are written between two micro-batches, when
    ``over`` is asked for the next one: every so often, on SIGTERM and SIGINT (Ctrl-C, the stop button of a notebook), and when
    the block ends. They hold the objects, the open window of a step, the states of Python's, NumPy's, torch's and the devices'
    random numbers, and the place in the loader. What is killed without notice repeats at most the work since the last one.

    A checkpoint is written aside and renamed, so that there is never half of one, and nothing is written where a parameter is not
    finite. All bytes are checked before any is loaded; where the newest is damaged, the one before it is taken, with a warning.
    Loading runs no code from the files. One process, DistributedDataParallel and FSDP2 write the same format, and read each
    other's on any number of ranks (``path`` is then a folder that all of them see).

    Args:
        path: a folder for the checkpoints of this run, made where it is missing.
        every: the time between two checkpoints; or an int, the number of updates.
        keep: how many checkpoints are kept.
        objects: the step or steps, and everything that changes while they train, each under a name of its own: whatever has
            ``state_dict`` and ``load_state_dict``, generators of random numbers, and lists and dicts, which are filled in
            place. States hold numbers, strings, None, lists, tuples, sets, dicts, bytes, tensors and NumPy arrays.

    Nothing is printed. ``run.resumed_from`` is the checkpoint that was loaded, or None; a run that was at its end does nothing.

    The place in the loader is found by reading again, with the random states with which the pass began, the batches that counted.
    So the loader must give the same batches for the same random states, whether training goes on meanwhile or not; with workers
    that persist, datasets must not draw random numbers of their own, and ``over`` needs the loader itself: ``zip(a, b)`` and
    ``enumerate(loader)`` start them unseen. A loader with a state of its own, as torchdata's ``StatefulDataLoader``, is given
    with the objects, and finds its place itself.

    What else stands in an epoch runs again where the epoch was not at its end: it should do no harm twice. Before the loop it
    draws the random numbers that it drew then, so a loader can be made there. Loops over loaders without ``run.epochs`` are
    counted from the first; those that were at their end give nothing.

    The first signal waits for the next place between two micro-batches, and with several ranks between two windows; a second one,
    a second or more after it, does not. What was set to handle the signal follows, KeyboardInterrupt for SIGINT, else
    ``SystemExit(128 + number)``. After another exception nothing is written. Outside of the main thread signals are left alone.

    On another number of ranks each goes on after the same share of its loader, in whole windows, and ranks that are new take what
    differs between ranks from rank 0; random states only where they were the same on all, else they keep their own.

    Raises:
        TypeError: for an object that has no state that can be kept, before anything is written.
        ValueError: for arguments that do not fit, a path that cannot be written, or a checkpoint that does not fit the objects;
            before anything is changed.
        RuntimeError: where all checkpoints are damaged.

    Warns:
        UserWarning: where the newest checkpoint is damaged, parameters are not finite, or the step uses what was not given.

    Example:
        >>> import tempfile, torch
        >>> from trainkit import resumable, train_step
        >>> def train(path, epochs):
        ...     model, losses = torch.nn.Linear(1, 1), []
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     step = train_step(optimizer)(lambda x: model(x).square().mean())
        ...     with resumable(path, model=model, optimizer=optimizer, step=step, losses=losses) as run:
        ...         for epoch in run.epochs(epochs):
        ...             for x in step.over([torch.ones(1, 1), torch.ones(2, 1)]):
        ...                 losses.append(step(x).loss.item())
        ...     return losses
        >>> with tempfile.TemporaryDirectory() as path:
        ...     first, both = train(path, 1), train(path, 2)
        >>> len(both), both[:2] == first
        (4, True)

    Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html; what a resumed run needs besides its parameters,
    https://docs.pytorch.org/docs/stable/notes/randomness.html
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
        self._path, self._every = Path(path), _check_interval(every)
        if isinstance(keep, bool) or not isinstance(keep, int):
            raise TypeError(f"keep is a number of checkpoints, got {keep!r}: `keep=2`")
        if keep < 1:
            raise ValueError(
                f"keep={keep} would leave no checkpoint: `keep=2` has one to fall back on"
            )
        self._objects = Objects(objects)
        self._objects.warn_of_missing()
        self._place = Place(self._objects.others, RandomStates(self._objects.sources))
        self._checkpoints = Checkpoints(self._path.absolute(), keep)  # wherever the loop goes
        self.resumed_from: Path | None = None
        self._is_entered = self._is_changed = self._is_nested = False
        self._is_stopped = (
            False  # by a signal: whatever the block still does is not part of the run
        )
        # When to save.
        self._saved_at, self._saved_updates = 0.0, 0
        self._signal, self._signal_at = 0, 0.0
        self._handlers: dict[int, Any] = {}
        # With several ranks: what they want together, and after how many batches they are at the end of a window.
        self._wished, self._meeting = 0, 0

    def __enter__(self) -> resumable:
        if self._is_entered:
            raise RuntimeError(
                "this block was entered before, and its objects are where it left them: make a new `resumable`"
            )
        if any(step._resumable is not None for step in self._objects.steps):
            raise RuntimeError(
                "a step is in the block of another `resumable`: give all objects to one of them"
            )
        # Now, and not when the first hours are to be saved. Steps are not asked: they prepare themselves at their first call.
        self._checkpoints.check(
            self._objects.states(self._objects.of(Step)), self._objects.shared()
        )
        if (saved := self._checkpoints.newest()) is not None:
            self._load(saved)
            self.resumed_from = saved.path
        self._note_time()
        self._is_entered = True
        for step in self._objects.steps:
            step._resumable = self
        if threading.current_thread() is threading.main_thread():
            heeded = [
                number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
            ]
            self._handlers = {number: signal.signal(number, self._note_signal) for number in heeded}
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        try:
            if kind is None and self._is_changed and not self._is_stopped:
                self._save()
        finally:
            for step in self._objects.steps:
                step._resumable = None
            handlers = self._restore_handlers()
        _follow(self._signal, handlers)

    def epochs(self, n: int) -> Iterator[int]:
        """The numbers from 0 to n - 1 of the epochs that are left. A second loop of this kind in a block counts on."""
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(
                f"run.epochs takes the number of epochs in all, got {n!r}: `for epoch in run.epochs(3):`"
            )
        if not any(step._resumable is self for step in self._objects.steps):
            raise RuntimeError(
                "run.epochs outside of its block, where nothing is saved: `with resumable(...) as run:`"
            )
        return self._count_to(n)

    def _count_to(self, n: int) -> Iterator[int]:
        while self._place.epoch < n:
            if self._place.current is None and self._place.reached and not self._is_stopped:
                self._heed(max(everyone(self._wish())))
            self._place.begin_epoch()
            yield self._place.epoch
            if self._is_stopped:
                return
            self._place.next_epoch()
            self._is_changed = True

    # Between two micro-batches: what Step.over calls to have its loader read.

    def _deliver(self, loader: Iterable[Any], step: Step[Any]) -> Iterator[Delivery]:
        # A loop in the body of another is a part of that one's micro-batch.
        is_inner = self._place.current is not None or self._is_stopped
        deliver = functools.partial(step._deliveries, tell=tell_all if is_inner else self._tell)
        if is_inner:
            self._is_nested = True
            try:
                yield from deliver(loader)
            finally:
                self._is_nested = False
            return
        for delivery in self._place.run(loader, step._length, deliver):
            self._is_changed = True
            yield delivery
            if self._is_nested:
                raise RuntimeError(
                    "two loops of `over` are under way at once, and only one of them could be found again: end the inner before "
                    "the next batch of the outer, or loop over both loaders together, `step.over(zip(a, b), other_step)`"
                )
            self._heed(self._wish() if count_ranks() == 1 else self._wish_of_all())

    def _tell(self, group: Any, *numbers: int) -> Tensor:
        """What ranks tell each other before a window, and with it what they want of this run."""
        said = tell_all(group, *numbers, self._wish(about_to_close=1))
        now = self._place.current
        assert now is not None
        self._wished, self._meeting = int(said[:, 2].max()), now.delivered + int(said[:, 0].max())
        if now.loader is not None and any(len(set(column)) > 1 for column in said.T.tolist()[:2]):
            self._wished = 0  # the loader of a rank that ran out before others cannot give its last batch again
        return said[:, :2]

    def _wish_of_all(self) -> int:
        now = self._place.current
        open_windows = any(
            step._window is not None and step._window.losses for step in self._objects.steps
        )
        return (
            self._wished
            if now is not None and now.delivered == self._meeting and not open_windows
            else 0
        )

    def _wish(self, about_to_close: int = 0) -> int:
        """The number of a signal that came, DUE for a checkpoint by the clock of rank 0, or 0."""
        if self._signal:
            return self._signal
        if isinstance(self._every, timedelta):
            due = time.monotonic() - self._saved_at >= self._every.total_seconds()
        else:
            due = self._updates() + about_to_close - self._saved_updates >= self._every
        return DUE if due and this_rank() == 0 else 0

    def _heed(self, wish: int) -> None:
        if wish:
            self._save()
        if wish > DUE:
            self._is_stopped, self._signal = True, 0
            try:
                _follow(wish, self._handlers)
            except KeyboardInterrupt as error:
                error.args = error.args or (f"saved in {self._path}: run it again to go on",)
                raise
            self._is_stopped = False  # who handles it has the run go on

    def _updates(self) -> int:
        """Of the step with most, skipped ones included, whose number is known without waiting for the device."""
        return max(step._closed for step in self._objects.steps)

    # Signals.

    def _note_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal, self._signal_at = number, now
        elif now - self._signal_at > 1:  # torchrun sends the same once more at once
            self._is_stopped, self._signal = True, 0
            self._restore_handlers()
            signal.raise_signal(number)
            self._is_stopped = False

    def _restore_handlers(self) -> dict[int, Any]:
        handlers, self._handlers = self._handlers, {}
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        return handlers

    # Saving and loading.

    def _save(self) -> None:
        for step in self._objects.steps:
            step.settle()  # schedulers and the like are then where the parameters are
        self._note_time()
        if broken := next(filter(None, everyone(self._objects.not_finite())), ""):
            warn(
                f"{broken} is not finite, and no checkpoint is written: the newest in {self._path} stays"
            )
            return
        place = self._place.state_dict()
        self._checkpoints.save(
            {**self._objects.states(place["loaders"]), PLACE: place}, self._objects.shared()
        )

    def _note_time(self) -> None:
        self._saved_at, self._saved_updates, self._is_changed = (
            time.monotonic(),
            self._updates(),
            False,
        )

    def _load(self, saved: Saved) -> None:
        if (there := saved.names - {PLACE}) != self._objects.names:
            raise ValueError(
                f"the checkpoint {saved.path} is of {', '.join(sorted(there))}, and the objects given are "
                f"{', '.join(sorted(self._objects.names))}: give the same names, or another path to begin anew"
            )
        states = saved.load(self._objects.sharded())
        place = states.pop(PLACE)
        if misfit := self._objects.misfit(states):
            raise ValueError(
                f"the checkpoint {saved.path} is of something else, since {misfit}: make the objects as they were, or give "
                "another path to begin anew"
            )
        if len(saved.ranks) != count_ranks():  # an open window is the share of one of those ranks
            for name in self._objects.of(Step):
                states[name] = {
                    key: value
                    for key, value in states[name].items()
                    if key not in ("window", "gradients")
                }
        self._objects.load(states, place["loaders"])
        self._place.load_state_dict(
            place, with_random=saved.is_own or saved.same_on_all_ranks(PLACE, "random")
        )


def _check_interval(every: Any) -> timedelta | int:
    if isinstance(every, bool) or not isinstance(every, (int, timedelta)):
        raise TypeError(
            f"every is a time or a number of updates, got {every!r}: `every=timedelta(minutes=10)` or `every=1000`"
        )
    if (every < timedelta(0)) if isinstance(every, timedelta) else (every < 1):
        raise ValueError(
            f"every must be a time >= 0 or a number of updates >= 1, got {every!r}: `every=1000`"
        )
    return every


def _follow(number: int, handlers: Mapping[int, Any]) -> None:
    """What a signal would have done, had it not been noted."""
    if number:
        handler = handlers.get(number, signal.getsignal(number))
        if callable(handler):
            handler(number, None)
        elif handler is not signal.SIG_IGN:
            raise SystemExit(128 + number)
