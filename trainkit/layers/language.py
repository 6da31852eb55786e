"""The layers language: a module and some words for parts of it in; the parameters and buffers meant out.

    model.encoder.layer[:2]                  a submodule, or a slice of a ModuleList
    "encoder.layer[:2]"                      the same as a dotted path, with Python's indices on containers
    "encoder.layer.*.attention"              `*` stands for anything within one component
    "**.LayerNorm", "**.bias"                `**` for any number of components, none included
    lambda name, parameter: ...              a predicate over the named parameters
    ["embeddings", "encoder.layer[:2]"]      several of these; [] is nothing

A path to a module means everything under it.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Layer = str | nn.Module | nn.Parameter | Callable[[str, nn.Parameter], bool]
Layers = Layer | Iterable[Layer]


class Slot(NamedTuple):
    """A parameter, and where it is: in ``owner._parameters[name]``."""

    owner: nn.Module
    name: str
    parameter: nn.Parameter


class Selection(NamedTuple):
    """What was meant, each once: parameters, modules as a whole, and modules that own a buffer that was meant."""

    slots: list[Slot]
    modules: list[nn.Module]
    buffer_owners: list[nn.Module]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [slot.parameter for slot in self.slots]


class Chosen:
    """Layers of a module, for a context that is entered again and again: what they mean is found again where it may differ."""

    def __init__(self, module: nn.Module, layers: Layers) -> None:
        self.layers = normalise(layers)
        self._module = module
        self._known: list[Any] | None = None
        self._empty: list[Any] = []
        self.now()  # whatever is wrong with the layers is wrong here

    def now(self) -> Selection:
        """What the layers mean, anew where modules, parameters or buffers were added or replaced since."""
        if self._known is None or any(self._empty) or self._structure() != self._known:
            modules = list(self._module.modules())
            parts = [parts for m in modules for parts in (m._modules, m._parameters)]
            buffers = [m._buffers for m in modules]
            self._empty = [members for members in parts + buffers if not members]
            self._parts, self._buffers = (
                [members for members in found if members] for found in (parts, buffers)
            )
            self.selection = select(self._module, self.layers)
            self._known = self._structure()
            self._kept = [
                part for members in parts for part in members.values()
            ]  # or their ids could come again
        return self.selection

    def _structure(self) -> list[Any]:
        """Every module and parameter, and which buffers there are: a step asks for each micro-batch, so no loop in Python."""
        parts, buffers = (
            chain.from_iterable(map(methodcaller("values"), found))
            for found in (self._parts, self._buffers)
        )
        return [*map(id, parts), *map(type, buffers)]


def normalise(layers: Layers) -> tuple[Any, ...]:
    """One or several words for layers as a tuple, to be used again and again; TypeError for what is none."""
    if _is_layer(layers):
        return (layers,)
    if not isinstance(layers, Iterable):
        raise TypeError(
            f"layers are patterns, submodules, parameters or a predicate, got {layers!r}: `'**'` is all, `[]` nothing"
        )
    words = tuple(layers)
    for word in words:
        if not _is_layer(word):
            raise TypeError(
                f"a layer is a pattern, a submodule, a parameter or a predicate, got {word!r}: `model.head`"
            )
    return words


def _is_layer(word: Any) -> bool:
    if isinstance(word, nn.Module):
        return hasattr(word, "_modules")  # or its __init__ has not run
    return isinstance(word, (str, nn.Parameter)) or (
        callable(word) and not isinstance(word, (type, Iterable))
    )


def select(module: nn.Module, layers: tuple[Any, ...]) -> Selection:
    """What ``layers``, as ``normalise`` returns them, mean in ``module`` as it is now; ValueError where one means nothing."""
    module = unwrapped(module)
    _reshard(module)
    parameters: dict[int, nn.Parameter] = {}
    modules: dict[int, nn.Module] = {}
    owners: dict[int, nn.Module] = {}
    for layer in layers:
        for owner, found in _find(module, layer):
            if isinstance(found, nn.Module):
                modules.update((id(m), m) for m in found.modules())
                parameters.update((id(p), p) for p in found.parameters())
            elif isinstance(found, nn.Parameter):
                parameters[id(found)] = found
            elif _moves(found):
                owners[id(owner)] = owner
    # Whoever lists all parameters of a module, as a predicate does, means its buffers too.
    whole = dict(modules)
    for candidate in module.modules():
        inside = [] if id(candidate) in whole else list(candidate.parameters())
        if inside and all(id(p) in parameters for p in inside):
            whole.update((id(m), m) for m in candidate.modules())
    owners.update(
        (key, m) for key, m in whole.items() if any(map(_moves, m.buffers(recurse=False)))
    )
    slots = {
        id(p): Slot(m, name, p)
        for m in module.modules()
        for name, p in m._parameters.items()
        if p is not None
    }
    return Selection(
        [slots[key] for key in parameters], list(modules.values()), list(owners.values())
    )


def _reshard(module: nn.Module) -> None:
    """Puts sharded parameters of FSDP2 back in place: an evaluation leaves gathered ones there, which are other objects."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has not imported it has no such module
    for part in module.modules() if fsdp else ():
        if isinstance(part, getattr(fsdp, "FSDPModule", ())):
            part.reshard()  # type: ignore[operator]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that the user wrote, inside of what torch.compile and data parallelism put around it."""
    while "_orig_mod" in module._modules or isinstance(
        module, (nn.DataParallel, nn.parallel.DistributedDataParallel)
    ):
        (module,) = module.children()
    return module


def _moves(buffer: Tensor) -> bool:
    # A bool is a mask and never moves; the attention that owns it has dropout to keep.
    return buffer.dtype != torch.bool


def _find(module: nn.Module, layer: Any) -> list[tuple[nn.Module, Any]]:
    """(owner, module or parameter or buffer) for everything that one word means."""
    if isinstance(layer, str):
        found = list(_match(module, _parse(layer)))
        if not found:
            raise ValueError(_no_match(module, layer))
    elif isinstance(layer, (nn.Module, nn.Parameter)):
        layer = unwrapped(layer) if isinstance(layer, nn.Module) else layer
        inside = {id(part) for part in (*module.modules(), *module.parameters())}
        # A slice of a container is a new container of the same parts.
        sliced = isinstance(layer, (nn.ModuleList, nn.Sequential, nn.ParameterList))
        if id(layer) not in inside and not (sliced and all(id(part) in inside for part in layer)):
            raise ValueError(
                f"the {type(layer).__name__} is not in the {type(module).__name__}: give a part of it, `model.head`"
            )
        found = [(module, layer)]
    else:
        found = [
            (module, p)
            for name, p in module.named_parameters(remove_duplicate=False)
            if _says_yes(layer, name, p)
        ]
        if not found:
            raise ValueError(
                "the predicate given for layers is true for no parameter; `[]` means nothing"
            )
    return found


def _says_yes(predicate: Any, name: str, parameter: nn.Parameter) -> bool:
    answer = predicate(name, parameter)
    try:
        return bool(answer)
    except (
        Exception
    ) as error:  # a tensor of several numbers raises a RuntimeError, an array a ValueError
        raise TypeError(
            f"the predicate given for layers answers for {name!r} with an object of type {type(answer).__name__}, which is "
            "neither yes nor no: `lambda name, parameter: parameter.ndim == 1`"
        ) from error


class _Component(NamedTuple):
    """One component of a pattern: ``layer[:2][0]`` is a name and two indices; None for a name is ``**``."""

    name: re.Pattern[str] | None
    indices: tuple[int | slice, ...]


def _parse(pattern: str) -> list[_Component]:
    components = []
    for text in pattern.split("."):
        parsed = re.fullmatch(
            r"([^\[\]]*)((?:\[(?:-?\d+|(?:-?\d+)?:(?:-?\d+)?(?::(?:-?0*[1-9]\d*)?)?)\])*)", text
        )
        if not text or parsed is None or ("**" in text and text != "**"):
            raise ValueError(
                f"the pattern {pattern!r} cannot be read at {text!r}; it is made of names, `*`, `**` and indices, with dots "
                "between: 'encoder.layer[:2].attention', '**.bias'"
            )
        name, brackets = parsed.groups()
        indices = tuple(_index(inside) for inside in re.findall(r"\[(.*?)\]", brackets))
        regex = None if text == "**" else re.compile(re.escape(name).replace(r"\*", ".*"))
        components.append(_Component(regex, indices))
    return components


def _index(text: str) -> int | slice:
    if ":" not in text:
        return int(text)
    return slice(*(int(bound) if bound else None for bound in text.split(":")))


def _match(module: nn.Module, components: list[_Component]) -> Iterator[tuple[nn.Module, Any]]:
    component, rest = components[0], components[1:]
    if component.name is None:
        if not rest:
            yield module, module
        for inner in module.modules() if rest else ():
            yield from _match(inner, rest)
        return
    # A component of indices alone, "[0]", is about the module itself.
    found = (
        [module]
        if not component.name.pattern
        else [m for name, m in _members(module) if component.name.fullmatch(name)]
    )
    for index in component.indices:
        found = [item for container in found for item in _at(container, index)]
    for item in found:
        if not rest:
            yield module, item
        elif isinstance(item, nn.Module):
            yield from _match(item, rest)


def _members(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for members in (module._modules, module._parameters, module._buffers):
        yield from ((name, member) for name, member in members.items() if member is not None)
    if parametrize.is_parametrized(module):
        # `weight` is computed now, from parameters that live in here.
        yield from module.parametrizations.items()  # type: ignore[union-attr, operator]


def _at(container: Any, index: int | slice) -> list[Any]:
    items = (
        list(container)
        if isinstance(container, (nn.ModuleList, nn.Sequential, nn.ParameterList))
        else []
    )
    if isinstance(index, slice):
        return items[index]
    return [items[index]] if -len(items) <= index < len(items) else []


def _no_match(module: nn.Module, pattern: str) -> str:
    names = [name for name, _ in module.named_modules() if name] + [
        name for name, _ in module.named_parameters()
    ]
    if next(_match(module, _parse(f"**.{pattern}")), None):
        hint = f"did you mean '**.{pattern}'?"
    else:
        anywhere, path = ("**.", pattern[3:]) if pattern.startswith("**.") else ("", pattern)
        # At any depth it is the last component that was mistaken.
        known = [name.rpartition(".")[2] if anywhere else name for name in names]
        spelled = {name.lower(): name for name in reversed(known)}
        near = difflib.get_close_matches(re.sub(r"\[.*?\]", "", path).lower(), spelled, 3, 0.5)
        near = [anywhere + spelled[name] for name in near] or [
            name for name in names if "." not in name
        ][:8]
        hint = "the nearest names are " + ", ".join(map(repr, near))
    return f"the pattern {pattern!r} matches nothing in the {type(module).__name__}; {hint}"
