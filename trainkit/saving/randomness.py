"""Random states of a training run, as values that can be kept and put back."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import torch

from trainkit.core.precision import current_device

# How sources give and take states: torch.Generator and numpy.random; random; torch.mps.
METHODS = (("get_state", "set_state"), ("getstate", "setstate"), ("get_rng_state", "set_rng_state"))
# The attributes under which loaders and progress bars hold each other.
INNER = ("iterable", "dataset", "batch_sampler", "sampler")


def is_source(thing: Any) -> bool:
    """Whether a thing is a generator of random numbers that has a state."""
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if numpy := sys.modules.get("numpy.random"):
        kinds += (numpy.Generator, numpy.RandomState)
    return isinstance(thing, kinds) and not isinstance(thing, random.SystemRandom)


def within(loader: Any, names: Iterable[str]) -> list[Any]:
    """The loader, the values of its attributes of these names, their attributes, and so on."""
    found = [loader]
    for part in found:
        attributes = getattr(part, "__dict__", {})
        held = [attributes[name] for name in names if name in attributes]
        found += [thing for thing in held if all(thing is not other for other in found)]
    return found


class RandomStates:
    """Of Python, NumPy, torch, accelerators, ``given`` generators, and generators in loaders."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._generators = {f"given {name}": source for name, source in given.items()}
        self._waiting: dict[str, Any] = {}  # states of generators in loaders that are still unread

    def add_from(self, loader: Iterable[Any]) -> None:
        """Add the generators of a loader and its samplers, and set states that wait for them."""
        for part in within(loader, INNER):
            for source in getattr(part, "__dict__", {}).values():
                known = self._sources().values()
                if is_source(source) and all(source is not other for other in known):
                    name = f"loader {len(self._generators)}"
                    self._generators[name] = source
                    self.set({name: self._waiting.pop(name)} if name in self._waiting else {})

    def now(self) -> dict[str, Any]:
        """The states, as values that do not change."""
        return {name: _methods(source)[0]() for name, source in self._sources().items()}

    def set(self, states: Mapping[str, Any]) -> None:
        """Put states back; those of generators in unread loaders wait for ``add_from``."""
        if "numpy" in states:
            import_module("numpy.random")
        if any(name.startswith("device ") for name in states):
            _devices(start=True)
        sources = self._sources()
        for name, state in states.items():
            if name in sources:
                _methods(sources[name])[1](state)
            elif name.startswith("loader "):
                self._waiting[name] = state

    def _sources(self) -> dict[str, Any]:
        sources = {"python": random, "torch": torch.default_generator}
        if numpy := sys.modules.get("numpy.random"):
            sources["numpy"] = numpy
        devices = {f"device {i}": source for i, source in enumerate(_devices())}
        return {**sources, **devices, **self._generators}


def _devices(start: bool = False) -> list[Any]:
    """The generators of the accelerators; empty before this process uses one."""
    device = current_device()
    if device.type == "cpu":
        return []
    module: Any = torch.get_device_module(device)
    if start and hasattr(module, "init"):
        module.init()
    # On MPS the module itself has the state.
    whole = [module] if hasattr(module, "get_rng_state") else []
    return list(getattr(module, "default_generators", whole))


def _methods(source: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """What gets the state of a source, and what sets it."""
    for get, put in METHODS:
        if hasattr(source, get):
            return getattr(source, get), getattr(source, put)
    bits = source.bit_generator  # of a numpy.random.Generator
    return functools.partial(getattr, bits, "state"), functools.partial(setattr, bits, "state")
