"""Where a run is in its loops: epochs, passes over loaders, and batches; and how it comes there again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.data import DataLoader

from trainkit.core.loaders import Delivery, length_of
from trainkit.ranks.parallel import count_ranks
from trainkit.saving.randomness import INNER, RandomStates, within


@dataclass
class Pass:
    """One run over a loader, and how it is found again.

    The loader is read again up to the place, with the random states of its beginning. A batch that was read ahead follows, with
    those with which it was read, and then they are those of the checkpoint. A loader with a state of its own goes near the place
    first.
    """

    begin: dict[str, Any]  # random states
    loader: str | None  # the name under which a loader with a state of its own was given
    size: int  # of the loader; 0 where it has none
    ranks: int
    delivered: int = 0
    counted: int = 0  # those of them that were not given again to a rank that had run out
    read: int = 0
    ahead: dict[str, Any] | None = (
        None  # random states before the batch after the place was read, where it was
    )
    windows: list[int] = field(
        default_factory=list
    )  # their lengths as several ranks agreed on them


class Place:
    """The place of a run in its loops.

    ``objects`` by name: a loader among them with a state of its own finds its place itself.
    """

    def __init__(self, objects: Mapping[str, Any], random: RandomStates) -> None:
        self._objects, self._random = objects, random
        self.epoch = self._passes = 0
        self.current: Pass | None = None
        # By how much had been read: random states, and the state of a loader that has one, before more was read ahead.
        self._ahead: dict[int, tuple[dict[str, Any], Any]] = {}
        # Of loaders with states of their own: where the last pass over each of them ended.
        self._ends: dict[str, Any] = {}
        # What is left to do until the place is reached that was loaded.
        self._to_skip = 0
        self._to_resume: Pass | None = None
        self._then: dict[str, Any] = {}
        # Random states where the epoch began, or the last pass ended: what stands there may make a loader with them.
        self._before = random.now()

    @property
    def reached(self) -> bool:
        """Whether the run is where it was when its checkpoint was written."""
        return self._to_resume is None

    def begin_epoch(self) -> None:
        if self.reached:
            self._before = self._random.now()

    def next_epoch(self) -> None:
        self.epoch += 1
        self._passes = self._to_skip = 0
        self._to_resume = None

    def state_dict(self) -> dict[str, Any]:
        """Between two batches; with the states of loaders under their names in ``loaders``."""
        now, loaders = self.current, dict(self._ends)
        if now is not None:
            now.ahead, _ = self._ahead.get(now.counted, (None, None))
            if now.loader is not None:
                loaders[now.loader] = self._position(now)
        return {
            "epoch": self.epoch,
            "passes": self._passes,
            "pass": None if now is None else vars(now),
            "random": self._random.now(),
            "before": self._before,
            "loaders": loaders,
        }

    def load_state_dict(self, state: Mapping[str, Any], with_random: bool = True) -> None:
        self.epoch, self._passes = state["epoch"], state["passes"]
        self._to_skip, self._ends = self._passes, dict(state["loaders"])
        self._to_resume = resumed = None if state["pass"] is None else Pass(**state["pass"])
        for name, position in state["loaders"].items():
            self._objects[name].load_state_dict(position)
            if resumed is None or resumed.loader != name:
                next(
                    iter(self._objects[name]), None
                )  # nothing is left in that pass, and now it is over here, too
        self._then = state["random"] if with_random else self._random.now()
        self._before = (
            self._then if resumed is None or not with_random else state.get("before", self._then)
        )
        self._random.set(self._before)

    def run(
        self,
        loader: Iterable[Any],
        length: Callable[[], int],
        deliver: Callable[..., Iterator[Delivery]],
    ) -> Iterator[Delivery]:
        """One pass: what ``deliver(loader)`` gives, from the place on that was loaded. ``length``: of the next window."""
        self._random.add_from(loader)
        if self._to_skip:
            self._to_skip -= 1
            if not self._to_skip:
                self._random.set(self._before)
            return
        resumed, self._to_resume = self._to_resume, None
        name, size = self._name(loader), length_of(loader)
        if name is None:
            self._start_workers(loader)
        now = Pass(self._random.now(), name, size, count_ranks())
        found = (
            replace(now, read=-1, windows=[])
            if resumed is None
            else self._resume(now, resumed, length)
        )
        windows, self.current = iter(found.windows), now

        def agreed_length() -> int:
            now.windows.append(next(windows, 0) or length())
            return now.windows[-1]

        try:
            reading = _Reading(loader, self._read(loader, now, found), now.counted)
            for delivery in deliver(reading, window=agreed_length):
                now.delivered += 1
                now.counted += not delivery.is_filler
                if now.delivered > found.delivered:
                    yield delivery
            if now.delivered < found.delivered:
                raise RuntimeError(
                    f"the checkpoint was written after {found.delivered} batches of this pass, and the loader has "
                    f"{now.delivered}: give the loader that it was written with, or another path to begin anew"
                )
            self._end(now)
        except GeneratorExit:  # the loop was left early
            self._end(now)
            raise
        finally:
            self.current, self._passes, self._before = None, self._passes + 1, self._random.now()

    def _start_workers(self, loader: Iterable[Any]) -> None:
        """Has workers that persist start here, and no pass draw the random number that this takes: later ones do not either."""
        for part in within(loader, ("iterable",)):
            if isinstance(part, DataLoader) and part.persistent_workers and part._iterator is None:
                states = self._random.now()
                iter(part)
                self._random.set(states)

    def _end(self, now: Pass) -> None:
        if now.loader is not None:
            self._ends[now.loader] = self._position(now)

    def _resume(self, now: Pass, found: Pass, length: Callable[[], int]) -> Pass:
        """Begins the pass as the one that was found; returns that, as far as it is to be read again."""
        if now.loader != found.loader:
            was, this = (
                repr(name) if name else "a loader that is no object"
                for name in (found.loader, now.loader)
            )
            raise ValueError(
                f"the checkpoint was written in a pass over {was}, and this one is over {this}: give the same objects, and the "
                "loader to `over`"
            )
        if now.loader is None and found.ranks == now.ranks and now.size != found.size:
            raise ValueError(
                f"the checkpoint was written in a pass over {found.size} batches, and the loader has {now.size} now: give the "
                "loader that it was written with, or another path to begin anew"
            )
        now.begin = found.begin
        self._random.set(now.begin)
        if now.loader is not None:
            self._objects[
                now.loader
            ].state_dict()  # torchdata makes its iterator here, with a random number
            now.delivered, now.counted, now.read = found.delivered, found.counted, found.counted
            return replace(found, windows=[])
        if found.ranks == now.ranks:
            return found
        # The same share of what is divided among other ranks now, in whole windows.
        share = (
            found.delivered * now.size // found.size if now.size and found.size else found.delivered
        )
        share -= share % length()
        return replace(found, delivered=share, counted=share, read=share, ahead=None, windows=[])

    def _read(self, loader: Iterable[Any], now: Pass, found: Pass) -> Iterator[Any]:
        iterator = iter(loader)
        self._ahead = {}
        while True:
            if found.ahead is not None and now.read == found.counted:
                self._random.set(found.ahead)
            if now.read == found.read:
                self._random.set(self._then)
            if now.read > now.counted or now.read == now.size:
                position = (
                    None if now.loader is None else deepcopy(self._objects[now.loader].state_dict())
                )
                self._ahead = {i: kept for i, kept in self._ahead.items() if i >= now.counted}
                self._ahead[now.read] = self._random.now(), position
            try:
                batch = next(iterator)
            except StopIteration:
                return
            now.read += 1
            yield batch

    def _position(self, now: Pass) -> Any:
        """The state of its loader at the place."""
        assert now.loader is not None
        _, position = self._ahead.get(now.counted, (None, None))
        return position if position is not None else self._objects[now.loader].state_dict()

    def _name(self, loader: Iterable[Any]) -> str | None:
        """The name of a loader with a state of its own, also within a progress bar."""
        outer = {id(part) for part in within(loader, ("iterable",))}
        name = next((name for name, thing in self._objects.items() if id(thing) in outer), None)
        inner = {id(part) for part in within(loader, INNER)} - outer
        if name is None and (
            parts := [other for other, thing in self._objects.items() if id(thing) in inner]
        ):
            raise ValueError(
                f"{parts[0]!r} is a part of the loader, and both it and `over` would find the place: leave it out of the "
                "objects; or give a loader with a state of its own, as torchdata's StatefulDataLoader, in its place"
            )
        return name


class _Reading:
    """A loader of which ``skipped`` batches are not to come."""

    def __init__(self, loader: Iterable[Any], iterator: Iterator[Any], skipped: int) -> None:
        self._loader, self._iterator, self._skipped = loader, iterator, skipped

    def __iter__(self) -> Iterator[Any]:
        return self._iterator

    def __len__(self) -> int:
        return max(len(self._loader) - self._skipped, 0)  # type: ignore[arg-type]
