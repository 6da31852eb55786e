"""Activation checkpointing: ``recompute`` runs layers once more in backward, and keeps only their inputs until then."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainkit.layers.language import Chosen, Layers, normalise, unwrapped

F = TypeVar("F", bound=Callable[..., Any])


class recompute(ContextDecorator):
    """Recomputes layers of a module in backward, inside a ``with`` block, a function or a training step: memory for time.

    Equivalent to this, where the forwards found are put back at the end, however the block is left::

        for layer in selected:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    but with the gradients, buffers and random numbers of the loop without it, bit by bit. The second run finds what the first one
    found, whatever came between: modes, ``requires_grad``, BatchNorm's statistics, numbers and tensors in attributes, autocast.
    Backward may come after the block. Where no gradient is taken, as in an evaluation, nothing is recomputed.

    Each layer selected is a region: of what it computes only its inputs are kept, and between regions all. So select every block
    of a model. The whole model as one region saves nothing, since all of it is there again when backward begins. Of layers
    within each other the outermost is the region, also over several contexts. Other effects of a forward, such as appending to
    a list that it was given, come twice. A compiled model takes one more graph.

    As a part, ``train_step(optimizer, accumulate(2), recompute(model, "encoder.layer"))``. As a decorator it takes functions.

    Args:
        module: what the layers belong to.
        layers: one or several of: a pattern ("encoder.layer", "encoder.layer[::2]", "**.mlp"; `*` within one component, `**` for
            any depth), a submodule or a slice of a ModuleList. A container without a forward, as a ModuleList, means its items.
            ``[]`` is nothing.

    Returns:
        ``with recompute(...) as names`` gives the names of the regions.

    Raises:
        TypeError: if module is not a torch.nn.Module, layers are of another type, or a generator function is decorated.
        ValueError: a pattern that matches nothing, or only parameters and buffers, a predicate, or a layer of another module;
            and where a region is called with a key-value cache.
        RuntimeError: in backward, where parameters of a region were changed since its forward.

    Example:
        >>> import torch
        >>> from trainkit import recompute
        >>> block = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> calls = block[1].register_forward_hook(lambda *_: print("forward"))
        >>> model = torch.nn.Sequential(block, torch.nn.Linear(2, 1))
        >>> with recompute(model, "[0]") as names:
        ...     loss = model(torch.ones(3, 2)).sum()
        forward
        >>> loss.backward()
        forward
        >>> names
        ['0']

    Source: https://docs.pytorch.org/docs/stable/checkpoint.html, and Chen et al. 2016, https://arxiv.org/abs/1604.06174
    """

    def __init__(self, module: nn.Module, layers: Layers) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"recompute takes a torch.nn.Module, got an object of type {type(module).__name__}: "
                "`recompute(model, 'encoder.layer')`"
            )
        self._module = module
        self._chosen = [Chosen(module, (layer,)) for layer in normalise(layers)]
        self._entered: list[AbstractContextManager[None]] = []
        for chosen in self._chosen:
            if not _regions(module, [chosen]):
                raise ValueError(
                    f"{chosen.layers[0]!r} means no module with a forward in the {type(module).__name__}, and only these can be "
                    "run again: name the blocks, `recompute(model, 'encoder.layer')`"
                )

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """The context, new, as a step enters it around each micro-batch."""
        regions = [_region_of(module) for module in _regions(self._module, self._chosen).values()]
        for region in regions:
            region.holders += 1
        try:
            yield
        finally:
            for region in regions:
                region.holders -= 1
                if not region.holders:
                    region.take_off()

    def __enter__(self) -> list[str]:
        context = self.around_step()
        context.__enter__()
        self._entered.append(context)
        return list(_regions(self._module, self._chosen))

    def __exit__(self, *exception: Any) -> None:
        self._entered.pop().__exit__(*exception)

    def __call__(self, function: F) -> F:
        if hasattr(function, "_add_part"):  # a training step: this joins its plan
            return function._add_part(self)  # type: ignore[no-any-return]
        runs_later = inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function)
        is_part = hasattr(function, "plan") or hasattr(function, "around_step")
        if runs_later or is_part or not callable(function) or isinstance(function, nn.Module):
            raise TypeError(
                f"recompute decorates functions that run when they are called, got {function!r}: hand it over as a part, "
                "`train_step(optimizer, recompute(model, layers))`, or `with recompute(model, layers):`"
            )
        return super().__call__(function)


def _regions(module: nn.Module, chosen: list[Chosen]) -> dict[str, nn.Module]:
    """The outermost of the chosen modules that have a forward, by their names."""
    inside = {id(m) for layers in chosen for m in layers.now().modules}
    found: dict[str, nn.Module] = {}

    def walk(name: str, module: nn.Module) -> None:
        has_forward = "forward" in vars(module) or type(module).forward is not nn.Module.forward
        if id(module) in inside and has_forward:
            found[name] = module
        else:
            for child_name, child in module.named_children():
                walk(f"{name}.{child_name}".lstrip("."), child)

    walk("", unwrapped(module))
    return found


def _region_of(module: nn.Module) -> _Region:
    """The one that is there, from another context, or a new one."""
    return getattr(vars(module).get("forward"), "_region", None) or _Region(module)


class _Region:
    """Puts another ``forward`` on a module: on the instance, where torch.compile notices it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forward, self.holders = module, module.forward, 0
        self.found = vars(module).get("forward")
        self.shadow = _shadow(self)
        vars(module).update({"forward": self.shadow, "__reduce_ex__": self.reduce})

    def take_off(self) -> None:
        vars(self.module).pop("__reduce_ex__", None)
        if (
            vars(self.module).get("forward") is self.shadow
        ):  # else somebody put another around it, which leads through it
            del vars(self.module)["forward"]
            if self.found is not None:
                vars(self.module)["forward"] = self.found

    def reduce(self, protocol: Any) -> tuple[Any, ...]:
        """What deepcopy and pickle see of the module: what was found."""
        now = {key: vars(self.module)[key] for key in ("forward", "__reduce_ex__")}
        self.take_off()
        try:
            return tuple(map(copy.copy, type(self.module).__reduce_ex__(self.module, protocol)))
        finally:
            vars(self.module).update(now)


# Whether a region is running: what lies within it is part of it.
_inside: ContextVar[bool] = ContextVar("_inside", default=False)


def _shadow(region: _Region) -> Callable[..., Any]:
    # A plain function: torch.compile knows it again by its code, where it would compile anew for each new object.
    @functools.wraps(region.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        is_outermost = torch.compiler.is_compiling() or not _inside.get()
        if not (region.holders and is_outermost and torch.is_grad_enabled()):
            return region.forward(*args, **kwargs)
        values = (*args, *kwargs.values())
        if any(hasattr(value, "get_seq_length") for value in values):
            raise ValueError(
                f"a recomputed {type(region.module).__name__} was given a key-value cache, and would write to it again in "
                "backward: `model(..., use_cache=False)`"
            )
        # Each by itself, also those with names: in these torch looks for devices, and for changes in place.
        return checkpoint(_Call(region, tuple(kwargs)), *values, use_reentrant=False)

    forward._region = region  # type: ignore[attr-defined]
    return forward


class _Call:
    """One call of a region, run a second time in backward, when its modules hold again what they held at the first."""

    def __init__(self, region: _Region, names: tuple[str, ...]) -> None:
        self.region, self.names = region, names
        self.held: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def __call__(self, *values: Any) -> Any:
        count = len(values) - len(self.names)
        args, kwargs = values[:count], dict(zip(self.names, values[count:], strict=True))
        if (
            torch.compiler.is_compiling()
        ):  # forward and backward into one graph, with nothing in between
            return self.region.forward(*args, **kwargs)
        token = _inside.set(True)
        try:
            with self._as_held() if self.held else self._hold():
                return self.region.forward(*args, **kwargs)
        finally:
            _inside.reset(token)

    def _hold(self) -> AbstractContextManager[None]:
        module = self.region.module
        owners = [owner for m in module.modules() for owner in (vars(m), m._parameters, m._buffers)]
        self.held = [
            (owner, {k: _without_graph(v) for k, v in owner.items() if isinstance(v, _HELD)})
            for owner in owners
        ]
        # Integers are quantised weights, or tables, and do not move; but a single one counts something.
        self.buffers = {
            id(b): b.detach().clone()
            for b in module.buffers()
            if b.is_floating_point() or b.numel() == 1
        }
        self.parameters = [(p, p.requires_grad, p._version) for p in module.parameters()]
        return nullcontext()

    @contextmanager
    def _as_held(self) -> Iterator[None]:
        if any(p._version != version for p, _, version in self.parameters):
            raise RuntimeError(
                f"parameters of a recomputed {type(self.region.module).__name__} were changed between its forward and its "
                "backward, which runs the forward again: update after the last backward, or leave this layer out of `recompute`"
            )
        buffers = {key: buffer.clone() for key, buffer in self.buffers.items()}
        slots = [
            (owner, key, buffers.get(id(v), v))
            for owner, held in self.held
            for key, v in held.items()
            if key in owner
        ]
        slots = [
            (owner, key, v)
            for owner, key, v in slots
            if owner[key] is not v and not _is_sharded(v, owner[key])
        ]
        found = [(owner, key, owner[key]) for owner, key, _ in slots]
        flags = [(p, flag) for p, flag, _ in self.parameters if p.requires_grad != flag]
        try:
            for owner, key, value in slots:
                owner[key] = value
            for parameter, flag in flags:
                parameter.requires_grad = flag
            yield
        finally:
            for owner, key, value in found:
                owner[key] = value
            for parameter, flag in flags:
                parameter.requires_grad = not flag


_HELD = (Tensor, bool, int, float, str, type(None))


def _without_graph(value: Any) -> Any:
    # This call would keep the graph of the one before, which keeps that of the one before it.
    is_inner = isinstance(value, Tensor) and value.grad_fn is not None
    return value.detach().requires_grad_() if is_inner else value


def _is_sharded(*values: Any) -> bool:
    """FSDP2 exchanges its parameters, sharded and whole, by itself."""
    return any(hasattr(value, "full_tensor") for value in values)
