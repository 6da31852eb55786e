"""The layers language: from a module and layers in words to parameters and modules.

    model.encoder.layer[:2]                  a submodule, or a slice of a ModuleList
    "encoder.layer[:2]"                      the same as a path, with Python's indices on containers
    "encoder.layer.*.attention"              `*` stands for anything within one component
    "**.LayerNorm", "**.bias"                `**` stands for any number of components, or none
    lambda name, parameter: ...              a predicate over the named parameters
    ["embeddings", "encoder.layer[:2]"]      several of these; [] is nothing
    ["**", "!head"]                          everything but the head, in any order

A path to a module means everything under it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

from torch import nn

Layers = str | nn.Module | nn.Parameter | Callable[[str, nn.Parameter], bool] | Iterable[Any]
_CONTAINERS = nn.ModuleList, nn.Sequential, nn.ParameterList
_COMPONENT = re.compile(
    r"\*\*|\[-?\d+\]|\[(-?\d+)?:(-?\d+)?(:(-?0*[1-9]\d*)?)?\]|(?!.*\*\*)[^\[\]]+", re.DOTALL
)


class Slot(NamedTuple):
    """A parameter, its name and its module. A tied parameter has several."""

    name: str
    owner: nn.Module
    parameter: nn.Parameter


class Selection(NamedTuple):
    """Selected parameters; modules that are selected, own a selected buffer, or contain layers.

    A module that contains layers which are not selected is no owner: its mode is for these.
    """

    slots: list[Slot]
    modules: list[nn.Module]
    buffer_owners: list[nn.Module]
    above: list[nn.Module]


class Chosen:
    """The selection of a context that is entered many times: computed again when modules change."""

    def __init__(self, module: nn.Module, layers: Layers) -> None:
        self._module, self.layers = module, normalise(layers)
        self._members, self._buffers, self._known = list[Any](), list[Any](), list[Any]()
        self.now()

    def __reduce__(self) -> tuple[Any, ...]:
        return Chosen, (self._module, self.layers)

    def now(self) -> Selection:
        """Select anew if modules, parameters or buffers were added or replaced."""
        now, known = self._structure(), self._known
        if len(now) != len(known) or not all(map(is_, now, known)):
            self._selection = select(self._module, self.layers)
            own = [x for m in self._module.modules() for x in (m._modules, m._parameters)]
            self._members = [view() for x in own for view in (x.keys, x.values)]
            self._buffers = [m._buffers.values() for m in self._module.modules()]
            self._known = self._structure()
        return self._selection

    def _structure(self) -> list[Any]:
        """All that selecting depends on. A step asks in every micro-batch: no loop in Python.

        Many modules replace their buffers in every forward, so only the type of a buffer counts: a
        tensor, or None.
        """
        return [self._module, *chain(*self._members), *map(type, chain(*self._buffers))]


def normalise(layers: Layers) -> tuple[Any, ...]:
    """Return layers as a tuple of single ones, which can be used many times."""
    words = tuple(layers) if isinstance(layers, Iterable) and not _is_layer(layers) else (layers,)
    for word in words:
        if not _is_layer(word):
            wanted = "a layer is a pattern, a submodule, a parameter or a predicate"
            raise TypeError(f"{wanted}, got {word!r:.60}: `model.head`")
    return words


def _is_layer(word: Any) -> bool:
    is_predicate = callable(word) and not isinstance(word, (type, Iterable))
    return is_predicate or isinstance(word, (str, nn.Module, nn.Parameter))


def check_module(module: Any, call: str) -> None:
    """Raise a TypeError that names the right ``call`` unless this is an initialised module."""
    if not isinstance(module, nn.Module) or not hasattr(module, "_modules"):
        raise TypeError(f"module is a torch.nn.Module, got a {type(module).__name__}: `{call}`")


def select(module: nn.Module, layers: tuple[Any, ...]) -> Selection:
    """Select the layers that ``normalise`` returned; ValueError if one of them matches nothing."""
    module = unwrapped(module)
    for part in module.modules():
        if hasattr(type(part), "set_reshard_after_backward"):
            part.reshard()  # type: ignore[operator]  # FSDP2 leaves it gathered after an evaluation
    minus = [layer for layer in layers if isinstance(layer, str) and layer.startswith("!")]
    plus = [layer for layer in layers if layer not in minus]
    if minus and not plus:
        raise ValueError(f'{minus[0]!r} takes layers out of nothing: `["**", "!head"]`')
    chosen = reach(module, plus) - reach(module, minus)
    modules = [m for m in module.modules() if id(m) in chosen]
    slots = [
        Slot(f"{path}.{name}".lstrip("."), owner, parameter)
        for path, owner in module.named_modules(remove_duplicate=False)
        for name, parameter in owner._parameters.items()
        if parameter is not None and id(parameter) in chosen
    ]
    # Other dtypes are masks and indices. The attention that owns them may have dropout.
    moving = chosen & {id(b) for b in module.buffers() if b.dtype.to_real().is_floating_point}
    inside = {m: {id(p) for c in m.children() for p in c.parameters()} for m in module.modules()}
    owners = [m for m in inside if inside[m] <= chosen and moving & {*map(id, m._buffers.values())}]
    return Selection(slots, modules, owners, [m for m in inside if inside[m] & chosen])


def reach(module: nn.Module, layers: Iterable[Any]) -> set[int]:
    """Ids of all that layers select: modules as a whole, parameters and buffers.

    Where all parameters of a module are selected, its buffers are too.
    """
    parts = [part for layer in layers for part in _find(module, layer)]
    own = [(*m.modules(), *m.parameters(), *m.buffers()) for m in parts if isinstance(m, nn.Module)]
    reached = set(map(id, chain(parts, *own)))
    for m in module.modules():
        if (inside := set(map(id, m.parameters()))) and inside <= reached:
            reached.update(map(id, m.buffers()))
    return reached


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's module, inside the wrappers of torch.compile and data parallelism."""
    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel
    while "_orig_mod" in module._modules or isinstance(module, wrappers):
        (module,) = module.children()
    return module


def _find(module: nn.Module, layer: Any) -> list[Any]:
    if isinstance(layer, str):
        found = _match(module, layer.removeprefix("!"))
        if not found:
            raise ValueError(_no_match(module, layer))
    elif isinstance(layer, (nn.Module, nn.Parameter)):
        inside = set(map(id, (*module.modules(), *module.parameters())))
        layer = unwrapped(layer) if isinstance(layer, nn.Module) else layer
        is_slice = id(layer) not in inside and isinstance(layer, _CONTAINERS)
        found = list(layer) if is_slice else [layer]  # a slice is a new container
        if not inside.issuperset(map(id, found)):
            raise ValueError(f"the {type(layer).__name__} is not in the module: try `model.head`")
    else:
        found = [p for name, p in module.named_parameters(remove_duplicate=False) if layer(name, p)]
        if not found:
            raise ValueError("the predicate is true for no parameter: `[]` selects nothing")
    return found


def _match(module: nn.Module, pattern: str) -> list[Any]:
    found: list[Any] = [module]
    # `layer[:2].*.bias` has the components `layer`, `[:2]`, `*` and `bias`.
    for component in re.sub(r"(?<=[^.])(?<!\*\*)\[", ".[", pattern).split("."):
        if not _COMPONENT.fullmatch(component):
            raise ValueError(f"{pattern!r} cannot be read at {component!r}: try `'**.bias'`")
        modules = [part for part in found if isinstance(part, nn.Module)]
        if component == "**":
            found = [inner for m in modules for inner in m.modules()]
        elif component.startswith("["):
            items = _slice(component[1:-1])
            found = [part for m in modules if isinstance(m, _CONTAINERS) for part in list(m)[items]]
        else:
            name = re.compile(re.escape(component).replace(r"\*", ".*"))
            found = [member for m in modules for key, member in _members(m) if name.fullmatch(key)]
    return found


def _slice(index: str) -> slice:
    if ":" not in index:  # i is i:i+1, and -1 is -1:
        index = f"{index}:{int(index) + 1 or ''}"
    return slice(*(int(bound) if bound else None for bound in index.split(":")))


def _members(module: nn.Module) -> list[tuple[str, Any]]:
    """Members by name. A parametrized `weight` is what it is computed from."""
    computed: Any = getattr(module, "parametrizations", {})
    groups: Any = module._modules, module._parameters, module._buffers, computed
    return [(key, part) for group in groups for key, part in group.items() if part is not None]


def _no_match(module: nn.Module, layer: str) -> str:
    pattern = layer.removeprefix("!")
    owner, is_index, _ = pattern.rpartition("[")
    if is_index and any(isinstance(part, nn.Parameter) for part in _match(module, owner)):
        hook = "`weight.register_hook(lambda grad: grad.index_fill(0, rows, 0))`"
        return f"{layer!r} means rows, and a parameter freezes as a whole: {hook} holds its rows"
    names = [name for name, _ in (*module.named_modules(), *module.named_parameters()) if name]
    known = dict.fromkeys([*names, *("**." + name.rpartition(".")[2] for name in names)])
    deep = f"**.{pattern}"
    hints = [deep] if _match(module, deep) else difflib.get_close_matches(pattern, known, 3, 0.5)
    hints = hints or [name for name in names if "." not in name][:8]
    found = f"the pattern {layer!r} matches nothing in the {type(module).__name__}"
    sign = "!" * layer.startswith("!")
    return f"{found}; try {', '.join(repr(sign + hint) for hint in hints)}"
