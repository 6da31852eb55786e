"""Where random numbers come from in a training run: what has a state, as values that can be kept and put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import torch

from trainkit.core.precision import current_device

# Two methods with which sources give and take their states: torch.Generator and numpy.random; Python's random; torch.mps.
METHODS = (("get_state", "set_state"), ("getstate", "setstate"), ("get_rng_state", "set_rng_state"))
# What loaders and progress bars hold within each other.
INNER = ("iterable", "dataset", "batch_sampler", "sampler")


def is_source(thing: Any) -> bool:
    """Whether a thing is a generator of random numbers."""
    numpy = sys.modules.get("numpy.random")
    kinds = (
        torch.Generator,
        random.Random,
        *((numpy.Generator, numpy.RandomState) if numpy else ()),
    )
    return isinstance(thing, kinds) and not isinstance(
        thing, random.SystemRandom
    )  # which has no state


def within(loader: Any, names: Iterable[str]) -> list[Any]:
    """The loader, and what it holds under these names, and that again."""
    found = [loader]
    for part in found:
        held = getattr(part, "__dict__", {})
        found += [
            held[name]
            for name in names
            if name in held and all(held[name] is not other for other in found)
        ]
    return found


class RandomStates:
    """Python, NumPy, torch, the accelerators, generators that were ``given``, and those found in loaders."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given, self._found = dict(given), dict[str, Any]()
        self._waiting: dict[str, Any] = {}

    def add_from(self, loader: Iterable[Any]) -> None:
        """Takes in the generators of a loader and its samplers. States that were set for them before take effect now."""
        known = {id(source) for source in self._sources().values()}
        for part in within(loader, INNER):
            for source in getattr(part, "__dict__", {}).values():
                if is_source(source) and id(source) not in known:
                    known.add(id(source))
                    name = f"loader {len(self._found)}"
                    self._found[name] = source
                    if name in self._waiting:
                        _set(source, self._waiting.pop(name))

    def now(self) -> dict[str, Any]:
        """The states, as values that do not change."""
        return {name: _get(source) for name, source in self._sources().items()}

    def set(self, states: Mapping[str, Any]) -> None:
        """Puts states back; those of generators that are not there yet wait for ``add_from``."""
        if "numpy" in states:
            import_module("numpy.random")
        if any(name.startswith("device ") for name in states):
            _devices(start=True)
        sources = self._sources()
        for name, state in states.items():
            if name in sources:
                _set(sources[name], state)
        self._waiting |= {
            name: state
            for name, state in states.items()
            if name.startswith("loader ") and name not in sources
        }

    def _sources(self) -> dict[str, Any]:
        found = {
            "python": random,
            "torch": torch.default_generator,
            "numpy": sys.modules.get("numpy.random"),
        }
        devices = {f"device {i}": source for i, source in enumerate(_devices())}
        given = {f"given {name}": source for name, source in self._given.items()}
        return {
            name: source
            for name, source in {**found, **devices, **given, **self._found}.items()
            if source is not None
        }


def _devices(start: bool = False) -> list[Any]:
    """The generators of the accelerators of this process, once it uses one."""
    device = current_device()
    if device.type == "cpu":
        return []
    module: Any = torch.get_device_module(device)
    if start and hasattr(module, "init"):
        module.init()
    # Empty until the device is in use, and then it has no state either. That of MPS is the module.
    return list(
        getattr(module, "default_generators", [module] if hasattr(module, "get_rng_state") else [])
    )


def _get(source: Any) -> Any:
    for get, _ in METHODS:
        if hasattr(source, get):
            return getattr(source, get)()
    return source.bit_generator.state  # of a numpy.random.Generator


def _set(source: Any, state: Any) -> None:
    for _, put in METHODS:
        if hasattr(source, put):
            getattr(source, put)(state)
            return
    source.bit_generator.state = state
