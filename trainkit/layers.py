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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

Layer = str | nn.Module | nn.Parameter | Callable[[str, nn.Parameter], bool]
Layers = Layer | Iterable[Layer]


class Selection(NamedTuple):
    """What was meant, each once: parameters, modules as a whole, and modules that own a buffer that was meant."""

    parameters: list[nn.Parameter]
    modules: list[nn.Module]
    buffer_owners: list[nn.Module]


def normalise(layers: Layers) -> tuple[Any, ...]:
    """One or several words for layers as a tuple, so that they can be used again and again; TypeError for what is none."""
    if isinstance(layers, (str, nn.Module, nn.Parameter)) or (callable(layers) and not isinstance(layers, Iterable)):
        layers = (layers,)
    if not isinstance(layers, Iterable):
        raise TypeError(
            f"layers are patterns, submodules, parameters or a predicate, got {layers!r}: '**' is all of a module, [] is nothing"
        )
    words = tuple(layers)
    for layer in words:
        if not isinstance(layer, (str, nn.Module, nn.Parameter)) and not callable(layer):
            raise TypeError(
                f"a layer is a pattern, a submodule, a parameter or a predicate, got {layer!r}: `['embeddings', model.head]`"
            )
    return words


def select(module: nn.Module, layers: tuple[Any, ...]) -> Selection:
    """What ``layers``, as ``normalise`` returns them, mean in ``module`` as it is now; ValueError where one means nothing."""
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
            else:
                owners[id(owner)] = owner
    for candidate in module.modules():
        own = list(candidate.parameters(recurse=False))
        # Whoever lists all parameters of a BatchNorm means its statistics too.
        whole = id(candidate) in modules or (own and all(id(p) in parameters for p in own))
        # A bool buffer is a mask. It never moves, and the attention that owns it has dropout to keep.
        if whole and any(b.dtype != torch.bool for b in candidate.buffers(recurse=False)):
            owners[id(candidate)] = candidate
    return Selection(list(parameters.values()), list(modules.values()), list(owners.values()))


def _find(module: nn.Module, layer: Any) -> list[tuple[nn.Module, Any]]:
    """(owner, module or parameter or buffer) for everything that one word means; at least one."""
    if isinstance(layer, str):
        found = list(_match(_unwrapped(module), _parse(layer)))
        if not found:
            raise ValueError(_no_match(module, layer))
    elif isinstance(layer, nn.Module):
        inside = {id(m) for m in module.modules()}
        # A slice of a ModuleList is a new ModuleList of the same layers.
        if id(layer) not in inside and not all(id(child) in inside for child in layer.children()):
            raise ValueError(f"the {type(layer).__name__} is not in the {type(module).__name__}: `frozen(model, model.head)`")
        found = [(module, layer)]
    elif isinstance(layer, nn.Parameter):
        if all(p is not layer for p in module.parameters()):
            raise ValueError(f"a parameter of shape {tuple(layer.shape)} is not in the {type(module).__name__}")
        found = [(module, layer)]
    else:
        found = [(module, p) for name, p in module.named_parameters(remove_duplicate=False) if layer(name, p)]
        if not found:
            raise ValueError("the predicate given for layers is true for no parameter; `[]` means nothing")
    return found


class _Component(NamedTuple):
    """One component of a pattern: ``layer.*[0][:2]`` has two; None as a name is ``**``."""

    name: re.Pattern[str] | None
    indices: tuple[int | slice, ...]


def _parse(pattern: str) -> list[_Component]:
    components = []
    for text in pattern.split("."):
        parsed = re.fullmatch(r"([^\[\]]*)((?:\[-?\d*(?::-?\d*){0,2}\])*)", text)
        if not text or parsed is None or "[]" in text or ("**" in text and text != "**"):
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
    found = [module] if not component.name.pattern else [m for name, m in _members(module) if component.name.fullmatch(name)]
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


def _at(container: Any, index: int | slice) -> list[nn.Module]:
    items = list(container._modules.values()) if isinstance(container, (nn.ModuleList, nn.Sequential)) else []
    if isinstance(index, slice):
        return items[index]
    return [items[index]] if -len(items) <= index < len(items) else []


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module that the user wrote, inside of what torch.compile and data parallelism put around it."""
    while isinstance(inner := getattr(module, "_orig_mod", None) or module._modules.get("module"), nn.Module):
        if len(module._modules) != 1:
            break
        module = inner
    return module


def _no_match(module: nn.Module, pattern: str) -> str:
    module = _unwrapped(module)
    names = [name for name, _ in module.named_modules() if name] + [name for name, _ in module.named_parameters()]
    if next(_match(module, _parse(f"**.{pattern}")), None):
        hint = f"did you mean '**.{pattern}'?"
    else:
        near = difflib.get_close_matches(pattern, names, 3, 0.5) or [name for name in names if "." not in name][:8]
        hint = "the nearest names are " + ", ".join(map(repr, near))
    return f"the pattern {pattern!r} matches nothing in the {type(module).__name__}; {hint}"
