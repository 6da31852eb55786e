"""The position of a run in its loops (epoch, pass over a loader, batch), and the way back to it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader

from trainkit.core.loop import Again, Batches, length_of
from trainkit.core.plan import check
from trainkit.core.warning import warn
from trainkit.saving.randomness import RandomStates, continues_generator, within


@dataclass
class Pass:
    """One pass over a loader, and what is needed to return to a position in it.

    The random states of the beginning are set, and the loader is read again up to the position. If
    batches were read ahead, the random states from before they were read are set, and they are
    read. At last the random states of the checkpoint are set. A loader with a state of its own is
    not read again: its state has its position.

    A loop with ``updates`` is one pass. Whenever the loop begins its loader again, ``begin``,
    ``counted`` and ``read`` begin again, too.
    """

    loader: str | None  # the name of a loader with a state of its own
    generators: list[str]  # the names of the generators of random numbers in the loader
    size: int  # of the loader; 0 without a length
    begin: dict[str, Any]  # random states
    ahead: dict[str, Any] | None = None  # random states before the batch after the position
    now: dict[str, Any] | None = None  # random states at the position
    delivered: int = 0
    counted: int = 0  # delivered batches, without those that a rank repeats at its end
    read: int = 0
    begun: int = 0  # windows that the step had closed before this loop of ``over(updates=N)``


class Position:
    """The position of a run.

    ``objects``, by name, may hold loaders with states of their own, which have their positions.
    ``starting`` is a context in which loaders start workers. ``begin`` is called before the first
    batch of a pass, unless the pass is resumed.
    """

    def __init__(
        self,
        objects: Mapping[str, Any],
        random: RandomStates,
        starting: Callable[[], AbstractContextManager[None]],
        begin: Callable[[], None],
    ) -> None:
        self._objects, self._random, self._starting, self._begin = objects, random, starting, begin
        self.epoch = 0
        # How many passes ended, before the first ``epochs``, in its epoch, after it, and so on.
        self._passes = [0]
        self.current: Pass | None = None
        self.inner = 0  # loops that began since the latest batch of the current pass
        # By the number of batches read: random states, and state of the loader, before reading on.
        self._ahead: dict[int, tuple[dict[str, Any], Any]] = {}
        # States of loaders with states of their own, at the end of the last pass over each.
        self._ends: dict[str, Any] = {}
        # For returning to a position that was loaded.
        self._passes_before: list[int] = []
        self._resumed: Pass | None = None
        self._begun: int | None = None
        self._has_warned = False
        # Random states at the beginning of the epoch, or after its latest pass. Code from there to
        # the next pass runs again, and may make a loader with random numbers.
        self._between = random.now()

    def epochs(self, n: int) -> Iterator[int]:
        """Yield the epochs that are left."""
        self.end_pass()
        self._passes.append(0)
        while self.epoch < n:
            if self._passes_before:
                self._random.set(self._between)
            else:
                self._between = self._random.now()
            yield self.epoch
            self.end_pass()
            self.epoch += 1
            self._passes[-1] = 0
            self._passes_before, self._resumed, self._begun = [], None, None
        self._passes.append(0)

    def end_pass(self) -> None:
        """End the current pass, also if a variable keeps its iterator after a ``break``."""
        if (now := self.current) is None:
            return
        if now.loader is not None:
            self._ends[now.loader] = self._loader_state(now)
        if self.inner:
            fault = "a variable keeps `step.over(loader)`, whose loop was left by `break`, and no"
            remedy = "end that one, `batches.close()`"
            warn(f"{fault} checkpoint was written in {self.inner} loop(s) after it: {remedy}")
        self._passes[-1] += 1 + self.inner
        self.current, self.inner, self._between = None, 0, self._random.now()

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two batches, with the states of loaders in ``loaders``."""
        current, now, loaders = self.current, self._random.now(), dict(self._ends)
        if current is not None:
            current.now, (current.ahead, _) = now, self._ahead.get(current.counted, (None, None))
            if current.loader is not None:
                loaders[current.loader] = self._loader_state(current)
        return {
            "epoch": self.epoch,
            "passes": self._passes,
            "pass": None if current is None else dict(vars(current)),
            "between": now if current is None else self._between,
            "loaders": loaders,
        }

    def load_state_dict(self, state: Mapping[str, Any], same_ranks: bool) -> None:
        """Load a position, or the beginning of its pass on another number of ranks."""
        self.epoch = state["epoch"]
        self._passes_before = state["passes"]
        self._begun = None if state["pass"] is None else state["pass"].get("begun")
        if not same_ranks:
            return
        self._ends = dict(state["loaders"])
        self._resumed = resumed = None if state["pass"] is None else Pass(**state["pass"])
        for name, loader_state in self._ends.items():
            self._objects[name].load_state_dict(loader_state)
            if resumed is None or resumed.loader != name:
                next(iter(self._objects[name]), None)  # end its pass: no batch is left
        self._between = state["between"]
        self._random.set(self._between)

    def run(
        self, loader: Iterable[Any], deliver: Callable[[Iterable[Any], Any], Iterator[Any]]
    ) -> Iterator[Any]:
        """Yield what ``deliver(rest of the loader, batch before the rest)`` yields."""
        inner = loader.loader if isinstance(loader, Again) else loader
        self._warn_of_generators(inner)
        if self._passes < self._passes_before[: len(self._passes)]:
            self._random.add_from(inner, self._passes, [])
            self._passes[-1] += 1
            self._random.set(self._between)
            return
        if self._passes != self._passes_before:  # the script has more epochs than before
            self._resumed = self._begun = None
        found, batch, states_at = self._resumed, None, dict[int, Any]()
        known = [] if found is None else found.generators
        generators = self._random.add_from(inner, self._passes, known)
        now = Pass(self._name(inner), generators, length_of(inner), self._random.now())
        if now.loader is None:
            self._start_workers(inner)
        if isinstance(loader, Again):
            loader.begun = now.begun = loader.begun if self._begun is None else self._begun
        if found is not None:
            states_at = {found.counted: found.ahead, found.read: found.now}
            now = self._return(found, now)
        self._passes_before, self._resumed, self._begun = [], None, None
        reading, self.current = self._read(loader, inner, now, states_at), now
        try:
            for _ in range(now.counted - now.read):
                batch = next(reading, self)
            message = f"{now.counted} batches of this pass, and the loader has {now.read}: {SAME}"
            check(batch is not self, ValueError, f"the checkpoint is from after {message}")
            rest = Batches(reading, max(length_of(loader) - now.counted, 0))
            for delivery in deliver(rest, batch):
                now.delivered += 1
                now.counted += not delivery.is_filler
                yield delivery._replace(number=now.delivered - 1)
                self.inner = 0
        finally:
            if self.current is now:
                self.inner = 0
                self.end_pass()

    def _return(self, found: Pass, begun: Pass) -> Pass:
        """Check that the loader is the same. Begin its pass with the random states of then."""
        was, now = (f"{p.size} batches of {p.loader or 'a loader'}" for p in (found, begun))
        message = f"the checkpoint is from a pass over {was}, and this one is over {now}: {SAME}"
        check(was == now, ValueError, message)
        self._random.set(found.begin)
        if found.loader is None:
            return replace(found, read=0)
        self._objects[found.loader].state_dict()  # torchdata draws a random number here, once
        return replace(found, read=found.counted)

    def _read(
        self, loader: Iterable[Any], inner: Iterable[Any], now: Pass, states_at: Mapping[int, Any]
    ) -> Generator[Any]:
        """Yield the batches of a loader, or of the inner loader of an ``Again``, pass after pass.

        ``states_at``: random states to set before the batch of this index, in the first pass.
        """
        iterator = self._iterate(inner)
        if not states_at:
            self._begin()
        while True:
            if (states := states_at.get(now.read)) is not None:
                self._random.set(states)
            if now.read > now.counted or now.read == now.size:
                state = deepcopy(self._objects[now.loader].state_dict()) if now.loader else None
                self._ahead = {i: kept for i, kept in self._ahead.items() if i >= now.counted}
                self._ahead[now.read] = self._random.now(), state
            if (batch := next(iterator, self)) is not self:
                now.read += 1
                yield batch
            elif not isinstance(loader, Again) or now.read < now.counted:
                return
            elif now.read == 0:
                loader.has_ended = True
                return
            else:
                now.begin, now.read, now.counted, states_at = self._random.now(), 0, 0, {}
                iterator = self._iterate(inner)

    def _iterate(self, loader: Iterable[Any]) -> Iterator[Any]:
        self._ahead = {}
        with self._starting():
            return iter(loader)

    def _warn_of_generators(self, loader: Iterable[Any]) -> None:
        """Warn, once, if a later loop continues a generator."""
        if self.epoch + sum(self._passes) and not self._has_warned and continues_generator(loader):
            fault = "a loop continues a generator that was read from before, and a resumed run"
            advice = "loop over what it reads, `step.over(loader, updates=N)`"
            warn(f"{fault} would read it from its beginning: {advice}")
            self._has_warned = True

    def _start_workers(self, loader: Iterable[Any]) -> None:
        """Start workers that persist, and undo the random number that their start draws."""
        for part in within(loader):
            if isinstance(part, DataLoader) and part.persistent_workers and part._iterator is None:
                states = self._random.now()
                self._iterate(part)
                self._random.set(states)

    def _loader_state(self, now: Pass) -> Any:
        """Return the state of a loader at the position, also if it was read further."""
        _, state = self._ahead.get(now.counted, (None, None))
        return self._objects[now.loader or ""].state_dict() if state is None else state

    def _name(self, loader: Iterable[Any]) -> str | None:
        """Return the name of a loader with a state of its own, also within a progress bar."""
        for name, thing in self._objects.items():
            if any(thing is part for part in within(loader)):
                advice = f"leave it out, or give a StatefulDataLoader, `{name}=loader`"
                message = f"{name} is a part of the loader, whose position `over` finds: {advice}"
                check(thing is loader or isinstance(thing, DataLoader), ValueError, message)
                return name
        return None


SAME = "give that loader, `step.over(loader)`, and the same objects, or a new path"
