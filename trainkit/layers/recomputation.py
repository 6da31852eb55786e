"""Activation checkpointing: ``recompute`` runs layers again in backward, and keeps their inputs."""

from __future__ import annotations

import copy
import functools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from trainkit.layers.blocks import Block
from trainkit.layers.language import Chosen, Layers, check_module, reach, unwrapped


class recompute(Block):
    """Recomputes layers in backward, inside a ``with`` block, a function or a training step.

    Equivalent to this; BatchNorm and dropout have the same bits as without it, too::

        for layer in selected:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    Only the inputs of each selected layer are kept, so select every block of a model, and not the
    whole model. Backward may come after the block. Without gradients nothing is recomputed.

    Args:
        module: the module that the layers belong to.
        layers: patterns ("encoder.layer", "**.mlp") or submodules, one or several, as for
            ``frozen``. A container without a forward, such as a ModuleList, means its items.

    Raises:
        TypeError, ValueError: for another type, layers that match no module, a key-value cache.
        RuntimeError: in backward, if parameters of a layer were changed since its forward.

    Example:
        >>> import torch
        >>> from trainkit import recompute
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Linear(8, 1))
        >>> with recompute(model, "[0]") as names:
        ...     model(torch.ones(3, 2)).sum().backward()

    Source: Chen et al. 2016, https://arxiv.org/abs/1604.06174
    """

    def __init__(self, module: nn.Module, layers: Layers) -> None:
        super().__init__()
        check_module(module, "recompute(model, 'encoder.layer')")
        self._module, self._chosen = module, Chosen(module, layers)
        for layer in self._chosen.layers:
            if not _regions(module, reach(unwrapped(module), [layer])):
                raise ValueError(
                    f"{layer!r:.60} selects no module with a forward, and only modules can run "
                    "again: name the blocks, `recompute(model, 'encoder.layer')`"
                )
        for name, part in _regions(module, set(map(id, self._chosen.now().modules))).items():
            if any(isinstance(inner, torch.jit.ScriptModule) for inner in part.modules()):
                raise TypeError(
                    f"{name!r} contains a TorchScript module, whose state cannot be put back for a "
                    f"second run: leave it out, `recompute(model, [..., '!name'])`"
                )

    @contextmanager
    def around_step(self) -> Iterator[list[str]]:
        """Return a new context, which a step enters around each micro-batch."""
        chosen, holder = set(map(id, self._chosen.now().modules)), object()
        modules = _regions(self._module, chosen)
        regions: list[_Region] = []
        try:
            for module in modules.values():
                on = vars(module).get("__reduce_ex__")
                region = getattr(on, "__self__", None) or _Region(module)
                regions.append(region)
                region.holders.add(holder)
                region.put_on()
            yield list(modules)
        finally:
            try:
                _take_off(regions, holder)
            except BaseException:
                _take_off(regions, holder)  # the rest, after Ctrl-C
                raise


def _regions(module: nn.Module, chosen: set[int]) -> dict[str, nn.Module]:
    """The outermost modules that are chosen with all in them and have a forward, by name."""
    found, outer = dict[str, nn.Module](), "."  # no name begins with "."
    for name, part in unwrapped(module).named_modules(remove_duplicate=False):
        has_forward = "forward" in vars(part) or type(part).forward is not nn.Module.forward
        is_inner = name.startswith(outer)  # what is in a module comes directly after it
        if has_forward and not is_inner and chosen.issuperset(map(id, part.modules())):
            found[name], outer = part, name and f"{name}."
    return found


def _take_off(regions: list[_Region], holder: object) -> None:
    for region in regions:
        region.holders.discard(holder)
        if not region.holders:
            region.take_off()
            region.shadow = None  # which refers to the region: a cycle would keep the module alive


class _Region:
    """Replaces ``forward`` of a module, on the instance, where torch.compile notices it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forward = module, module.forward
        self.found = {key: own for key, own in vars(module).items() if key == "forward"}
        self.holders: set[object] = set()
        self.shadow: Callable[..., Any] | None = _shadow(self)

    def put_on(self) -> None:
        if "__reduce_ex__" not in vars(self.module):
            vars(self.module).update({"forward": self.shadow, "__reduce_ex__": self.reduce})

    def take_off(self) -> None:
        own = vars(self.module)
        own.pop("__reduce_ex__", None)
        # A forward that the user put around the shadow stays, and leads through it.
        if own.get("forward", self) is self.shadow:
            del own["forward"]
            own.update(self.found)

    def reduce(self, protocol: Any) -> tuple[Any, ...]:
        """Let deepcopy and pickle see the module as it was found."""
        now = {key: vars(self.module)[key] for key in ("forward", "__reduce_ex__")}
        self.take_off()
        try:
            return tuple(map(copy.copy, type(self.module).__reduce_ex__(self.module, protocol)))
        finally:
            vars(self.module).update(now)


# Whether a region is running. A region inside another one is not recomputed on its own.
_inside: ContextVar[bool] = ContextVar("_inside", default=False)


def _shadow(region: _Region) -> Callable[..., Any]:
    # A function, because torch.compile compares its code. It would recompile for a new object.
    @functools.wraps(region.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        is_outermost = torch.compiler.is_compiling() or not _inside.get()
        if not (region.holders and is_outermost and torch.is_grad_enabled()):
            return region.forward(*args, **kwargs)
        values = (*args, *kwargs.values())
        if any(hasattr(value, "get_seq_length") for value in values):
            raise ValueError(
                f"a recomputed {type(region.module).__name__} was given a key-value cache, and "
                "would write to it again in backward: `model(..., use_cache=False)`"
            )
        # Keyword arguments go by position, where checkpoint looks for devices and changes.
        run = _runs(region, len(args), tuple(kwargs))
        return checkpoint(run, *values, use_reentrant=False)

    return forward


def _runs(region: _Region, count: int, names: tuple[str, ...]) -> Callable[..., Any]:
    """Return one call of a region. Backward runs it again, with the state of the first run."""
    state: _State | None = None

    def run(*values: Any) -> Any:
        nonlocal state
        args, kwargs = values[:count], dict(zip(names, values[count:], strict=True))
        if torch.compiler.is_compiling():  # nothing comes between forward and backward of a graph
            return region.forward(*args, **kwargs)
        block = state.in_place() if state else None
        state = state or _State(region.module)
        token = _inside.set(True)
        try:
            with block or state.watched():
                return region.forward(*args, **kwargs)
        finally:
            _inside.reset(token)

    return run


# Where a module keeps its parameters, buffers, modules and hooks.
_OF_TORCH = vars(nn.Module()).keys() - {"training"}


class _State:
    """Attributes, buffers, flags and versions of parameters, of a module and all in it."""

    def __init__(self, module: nn.Module) -> None:
        self.name, self.random = type(module).__name__, _random_states()
        owners = [own for m in module.modules() for own in (vars(m), m._parameters, m._buffers)]
        kinds = Tensor, bool, int, float, str, type(None), tuple, list, dict
        tensors: list[Tensor] = []

        def noted(value: Any) -> Any:
            if isinstance(value, Tensor):
                if value.grad_fn is not None:
                    # With its graph, each call would keep the graph of the call before it.
                    value = value.detach().requires_grad_()
                tensors.append(value)
            return value

        known: dict[int, Any] = {}
        self.values = [
            (owner, key, _mapped(noted, value, known))
            for owner in owners
            for key, value in owner.items()
            if isinstance(value, kinds) and key not in _OF_TORCH
        ]
        # Forward may change these in place. Many integers are a table or a quantised weight.
        buffers = {id(b) for b in module.buffers() if b.is_floating_point()}
        parameters = {id(p) for p in module.parameters()}
        constants = [t for t in tensors if not t.requires_grad and id(t) not in parameters]
        moving = [t for t in constants if id(t) in buffers or t.numel() <= 4096]
        self.copies = {id(tensor): tensor.clone() for tensor in moving}
        self.large = [(t, t._version) for t in moving if t.numel() > 4096 and not t.is_inference()]
        self.fixed: list[Any] = [(p, p.requires_grad, p._version) for p in module.parameters()]
        # With max_norm, the forward of an embedding changes its weight.
        inside = (m for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
        found: list[Any] = [m for m in inside if m.max_norm is not None]
        self.embeddings = {m.weight: (m, _directions(m)) for m in found}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """After the first run, drop copies of large tensors that it left unchanged."""
        yield
        for tensor, version in self.large:
            if tensor._version == version:
                self.copies.pop(id(tensor), None)
                self.fixed.append((tensor, False, version))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the state back for the second run, and the present state back after it."""
        changed = [p for p, _, version in self.fixed if p._version != version]
        if not all(map(self._is_same, changed)):
            raise RuntimeError(
                f"parameters or large buffers of a recomputed {self.name} were changed between its "
                "forward and its backward, which runs the forward again: update after the last "
                "backward, and leave out a layer that changes its own weight, `'!name'`"
            )
        copies = {key: copy.clone() for key, copy in self.copies.items()}
        flags = [(p, flag) for p, flag, _ in self.fixed if p.requires_grad != flag]
        replaced, random_now = [], _random_states()
        known: dict[int, Any] = {}
        for owner, key, value in self.values:
            then = _mapped(lambda leaf: copies.get(id(leaf), leaf), value, known)
            now = owner.get(key, then)
            # FSDP2 exchanges sharded and whole parameters by itself.
            if now is not then and not any(
                hasattr(leaf, "full_tensor") for leaf in tree_leaves((now, then))
            ):
                replaced.append((owner, key, now, then))
        try:
            for put, state in self.random:
                put(state)
            for owner, key, _, then in replaced:
                owner[key] = then
            for parameter, flag in flags:
                parameter.requires_grad = flag
            yield
        finally:
            for put, state in random_now:
                put(state)
            for owner, key, now, _ in replaced:
                owner[key] = now
            for parameter, flag in flags:
                parameter.requires_grad = not flag

    def _is_same(self, changed: Tensor) -> bool:
        if changed not in self.embeddings:
            return False
        embedding, then = self.embeddings[changed]
        tolerance = 64 * torch.finfo(changed.dtype).eps
        return torch.allclose(_directions(embedding), then, tolerance, tolerance)


def _random_states() -> list[tuple[Callable[[Any], None], Any]]:
    """The states of Python and NumPy, with what puts them back. ``checkpoint`` has torch's."""
    states: list[Any] = [(random.setstate, random.getstate())]
    if numpy := sys.modules.get("numpy.random"):
        states.append((numpy.set_state, numpy.get_state()))
    return states


def _directions(embedding: Any) -> Tensor:
    """A number for each row of a weight: ``max_norm`` keeps it, and an update changes it."""
    rows: Tensor = embedding.weight.detach().float()
    norms = rows.norm(embedding.norm_type, 1).clamp(min=embedding.max_norm)
    return (rows * torch.linspace(1, 2, rows.shape[1], device=rows.device)).sum(1).div(norms)


def _mapped(change: Callable[[Any], Any], value: Any, known: dict[int, Any]) -> Any:
    """Change a value, or those in a container, which is copied once however often it is found."""
    # Most tuples are sizes, and cost less as they are.
    is_size = isinstance(value, tuple) and set(map(type, value)) <= {int}
    if is_size or not isinstance(value, (tuple, list, dict)):
        return change(value)
    if id(value) not in known:
        known[id(value)] = tree_map(change, value)
    return known[id(value)]
