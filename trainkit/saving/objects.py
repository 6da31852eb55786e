"""The objects of a run, their states, and loading these states."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.data import DataLoader

from trainkit.core.plan import check, parameters_of
from trainkit.core.step import Step
from trainkit.core.warning import warn
from trainkit.saving.randomness import is_source
from trainkit.saving.storage import parts_of


class Objects:
    """Objects by name. Modules are without the wrappers of data parallelism and torch.compile.

    Raises:
        TypeError: for an object without a state.
        ValueError: without a step, or for a module in FSDP1.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        from trainkit.layers.language import unwrapped

        for name, thing in given.items():
            _check_object(name, thing)
        self.sources = {name: thing for name, thing in given.items() if is_source(thing)}
        self.stateful: dict[str, Any] = {
            name: unwrapped(thing) if isinstance(thing, nn.Module) else thing
            for name, thing in given.items()
            if name not in self.sources
        }
        things = self.stateful.items()
        self.modules = {name: thing for name, thing in things if isinstance(thing, nn.Module)}
        self.steps = {name: thing for name, thing in things if isinstance(thing, Step)}
        # An optimizer need not derive from torch.optim.Optimizer.
        self.optimizers = {name: thing for name, thing in things if hasattr(thing, "param_groups")}
        advice = "`resumable(path, model=model, optimizer=optimizer, step=step)`"
        message = f"there is no step among the objects ({', '.join(given)}): {advice}"
        check(bool(self.steps), ValueError, message)

    def warn_of_missing(self) -> None:
        """Warn if a step changes what is not among the objects."""
        given = {id(thing) for thing in self.stateful.values()}
        given |= {id(p) for module in self.modules.values() for p in module.parameters()}
        used: list[Any] = []
        for plan in (step._plan for step in self.steps.values()):
            owners = (getattr(call, "__self__", None) for call in plan.after)
            used += [*plan.optimizers, *plan.parameters()]
            used += [owner for owner in owners if hasattr(owner, "state_dict")]
        missing = dict.fromkeys(type(thing).__name__ for thing in used if id(thing) not in given)
        if missing:
            warn(
                f"the step changes {', '.join(missing)}, which would not be saved: give all of it, "
                "`resumable(path, model=model, optimizer=optimizer, scheduler=scheduler, ...)`"
            )

    def not_finite(self) -> str:
        """Return the name of the first trained parameter that is not finite, or ""."""
        plans = [step._plan for step in self.steps.values()]
        trained = {id(p) for plan in plans for p in plan.parameters() if p.requires_grad}
        for key, p in self.parameters().items():
            local = p.to_local() if hasattr(p, "to_local") else p
            if id(p) in trained and not local.isfinite().all():
                return key
        return ""

    def form(self) -> dict[str, Any]:
        """Return names, shapes in modules, and sizes of parameter groups, to compare runs."""
        form: dict[str, Any] = {"objects": sorted([*self.stateful, *self.sources])}
        for name, module in self.modules.items():
            form |= {key: list(t.shape) for key, t in _tensors(name, module.state_dict())}
        for name, optimizer in self.optimizers.items():
            for i, group in enumerate(optimizer.param_groups):
                form[f"{name}.param_groups.{i}"] = f"{len(group['params'])} parameters"
        return form

    def check_form(self, there: Mapping[str, Any]) -> None:
        """Raise ValueError for a checkpoint with other names, modules or parameter groups."""
        here = self.form()
        for key in {**there, **here}:
            was, now = there.get(key, "nothing"), here.get(key, "nothing")
            fault = f"the checkpoint has {was} for {key}, and this run has {now}"
            advice = "give the same objects, or each stage its path, `resumable('run/stage2', ...)`"
            check(was == now, ValueError, f"{fault}: {advice}")

    def states(self, without: Container[str]) -> dict[str, Any]:
        """Return states by name, but for ``without`` and for loaders that are not being read."""
        return {
            name: thing if type(thing) in (list, dict) else thing.state_dict()
            for name, thing in self.stateful.items()
            # Asking such a loader for its state would start it.
            if name not in without and not isinstance(thing, DataLoader)
        }

    def shared(self, states: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors in ``states`` that are the same on all ranks.

        They are the parameters of modules, and the states of optimizers.
        """
        parameters, optimizers = self.parameters(), self.optimizers
        return {
            key: tensor
            for name, state in states.items()
            for key, tensor in _tensors(name, state)
            if tensor.dim() > 0 and (key in parameters or name in optimizers)
        }

    def parameters(self) -> dict[str, Tensor]:
        """Return parameters by key.

        The key of a parameter of a module is its key in the states. For a parameter of an optimizer
        it is the beginning of the keys of the tensors that the optimizer keeps for it.
        """
        found: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            found.update(module.named_parameters(name, remove_duplicate=False))
        for name, optimizer in self.optimizers.items():
            parameters = enumerate(parameters_of(optimizer))
            found.update((f"{name}.state.{i}", p) for i, p in parameters)
        return found

    def load(self, states: Mapping[str, Any]) -> None:
        """Load what ``states`` returned."""
        for name, state in states.items():
            thing = self.stateful[name]
            if type(thing) is list:
                thing[:] = state
            elif type(thing) is dict:
                thing.clear()
                thing.update(state)
            elif name in self.optimizers:
                _load_optimizer(thing, state)
            else:
                thing.load_state_dict(state)


def _check_object(name: str, thing: Any) -> None:
    has_state = hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")
    advice = "give models, optimizers, schedulers, steps, generators, lists or dicts"
    message = f"{name}={thing!r:.80} has no state_dict and load_state_dict: {advice}, `{name}=[]`"
    check(has_state or is_source(thing) or type(thing) in (list, dict), TypeError, message)
    parts = thing.modules() if isinstance(thing, nn.Module) else ()
    is_fsdp1 = any(type(part).__name__ == "FullyShardedDataParallel" for part in parts)
    message = f"{name} is in FSDP1, whose states fit one number of ranks: use `fully_shard(model)`"
    check(not is_fsdp1, ValueError, message)


def _load_optimizer(optimizer: Any, state: Any) -> None:
    """Load a state, and keep the types and dtypes of what is in it for each parameter.

    ``Optimizer.load_state_dict`` casts tensors to the dtypes of the parameters. It rebuilds
    containers, which loses the ``maxlen`` of a deque, and raises an error for an array.
    """
    is_own = type(optimizer).load_state_dict is not Optimizer.load_state_dict
    saved = {key: {**part["state"]} for key, part in _optimizer_states("", state)}
    for key, part in _optimizer_states("", state):
        if key or not is_own:
            part["state"] = tree_map(_hidden, part["state"], is_leaf=_is_special_tuple)
    optimizer.load_state_dict(state)
    for key, part in _optimizer_states("", optimizer.state_dict()):
        for index, loaded in part["state"].items():
            values = saved.get(key, {}).get(index, {})
            for name in loaded.keys() & values.keys() if isinstance(loaded, dict) else ():
                devices = [t.device for t in tree_leaves(loaded[name]) if isinstance(t, Tensor)]
                to = functools.partial(Tensor.to, device=next(iter(devices), None))
                loaded[name] = tree_map_only(Tensor, to, values[name], is_leaf=_is_special_tuple)


def _hidden(value: Any) -> Any:
    """Return None in place of a container that ``Optimizer.load_state_dict`` would rebuild."""
    return value if isinstance(value, Tensor) or not isinstance(value, Iterable) else None


def _is_special_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and type(value) is not tuple


def _optimizer_states(key: str, state: Any) -> Iterator[tuple[str, Any]]:
    """Yield the states of an optimizer and of optimizers within it, with their keys."""
    for place, node in _nodes(key, state):
        has_groups = isinstance(node, dict) and "param_groups" in node
        if has_groups and isinstance(node.get("state"), dict):
            yield place, node


def _tensors(key: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested containers, with their keys."""
    return ((place, node) for place, node in _nodes(key, state) if isinstance(node, Tensor))


def _nodes(key: str, state: Any) -> Iterator[tuple[str, Any]]:
    """Yield a state and all that it holds, with their keys."""
    yield key, state
    for name, part in parts_of(state):
        yield from _nodes(f"{key}.{name}", part)
