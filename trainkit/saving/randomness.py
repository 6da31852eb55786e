"""Random states of a training run, as values that can be kept and put back."""

from __future__ import annotations

import functools
import gc
import hashlib
import inspect
import random
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from itertools import chain, cycle, islice
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from trainkit.core.precision import current_device
from trainkit.core.warning import warn

# Methods of torch.Generator and numpy.random, of random, of torch.mps.
METHODS = (("get_state", "set_state"), ("getstate", "setstate"), ("get_rng_state", "set_rng_state"))
# The attributes under which loaders and progress bars hold each other.
PARTS = ("iterable", "dataset", "batch_sampler", "sampler")
# Iterators over iterators, and the tuple in which some hold others.
ITERATORS = (types.GeneratorType, chain, cycle, enumerate, filter, islice, map, tuple, zip)


def is_source(thing: Any) -> bool:
    """Return whether a thing is a generator of random numbers."""
    is_of_numpy = type(thing).__module__ in ("numpy.random._generator", "numpy.random.mtrand")
    return is_of_numpy or isinstance(thing, (torch.Generator, random.Random))


def within(loader: Any) -> list[Any]:
    """Return the loader, its parts, their parts, and so on."""
    found = [loader]
    for thing in found:
        held = getattr(thing, "__dict__", {})
        parts = [part for name, part in held.items() if name in PARTS]
        parts += held.get("datasets", ()) if isinstance(thing, Dataset) else ()
        found += [part for part in parts if all(part is not other for other in found)]
    return found


def continues_generator(loader: Any) -> bool:
    """Return whether a loader is a generator that was read from, or an iterator over one."""
    found, known = within(loader), set[int]()
    for thing in found:
        if type(thing) in ITERATORS and id(thing) not in known:
            known.add(id(thing))
            found += [part for part in gc.get_referents(thing) if type(part) in ITERATORS]
    generators = [thing for thing in found if type(thing) is types.GeneratorType]
    return any(inspect.getgeneratorstate(g) != inspect.GEN_CREATED for g in generators)


class RandomStates:
    """The states of all random numbers.

    Python, NumPy, torch, accelerators, ``given`` generators, and generators in loaders have one.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._generators = {f"given {name}": source for name, source in given.items()}
        # Generators in loaders, as long as the script keeps them.
        self._found = WeakValueDictionary[str, Any]()
        self._waiting: dict[str, Any] = {}  # for generators in loaders that are not read yet

    def add_from(self, loader: Iterable[Any], place: list[int], names: list[str]) -> list[str]:
        """Add the generators in a loader, and set the states that wait for them.

        Return the names of the generators, which are ``names`` if the checkpoint is from this pass.
        A new name has the place of the pass in the script, and the state at first sight. So a
        resumed process finds the names again, and a generator with a new seed is another one.
        """
        held = [thing for p in within(loader) for thing in getattr(p, "__dict__", {}).values()]
        generators, found = {id(thing): thing for thing in held if is_source(thing)}, []
        for i, source in enumerate(generators.values()):
            sources = self._sources()
            known = next((name for name, other in sources.items() if other is source), "")
            name = names[i] if i < len(names) else known or f"loader {place}.{i} {_digest(source)}"
            if name != known:
                if name in sources and place[-1]:
                    fault = "two generators in loaders began with one seed, and are resumed as one"
                    warn(f"{fault}: give them other seeds, or make the loader once")
                self._found.pop(known, None)
                try:
                    self._found[name] = source
                except TypeError:  # NumPy's and older torch's have no weak reference
                    self._generators[name] = source
            found.append(name)
        waiting, self._waiting = self._waiting, {}
        self.set(waiting)
        return found

    def now(self) -> dict[str, Any]:
        """Return copies of the states."""
        return {name: _access(source)[0]() for name, source in self._sources().items()}

    def set(self, states: Mapping[str, Any]) -> None:
        """Set states. A state whose generator is not known yet waits for ``add_from``."""
        if "numpy" in states:
            import_module("numpy.random")
        sources = self._sources(start=any(name.startswith("device ") for name in states))
        self._waiting |= {name: state for name, state in states.items() if name not in sources}
        for name in states.keys() & sources:
            _access(sources[name])[1](states[name])

    def _sources(self, start: bool = False) -> dict[str, Any]:
        sources = {"python": random, "torch": torch.default_generator}
        if numpy := sys.modules.get("numpy.random"):
            sources["numpy"] = numpy
        # An accelerator has no generators before its first use. For MPS the module has the state.
        module: Any = torch.get_device_module(current_device())
        if start and hasattr(module, "init"):
            module.init()
        whole = [module] if hasattr(module, "get_rng_state") else []
        devices = enumerate(getattr(module, "default_generators", whole))
        sources |= {f"device {i}": source for i, source in devices}
        return {**sources, **self._generators, **self._found}


def _digest(source: Any) -> str:
    leaves = [getattr(leaf, "tolist", leaf.__str__)() for leaf in tree_leaves(_access(source)[0]())]
    return hashlib.sha256(str(leaves).encode()).hexdigest()


def _access(source: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Return a function that gets the state of a source, and one that sets it."""
    for get, put in METHODS:
        if hasattr(source, get):
            return getattr(source, get), getattr(source, put)
    bits = source.bit_generator  # of a numpy.random.Generator
    return functools.partial(getattr, bits, "state"), functools.partial(setattr, bits, "state")
