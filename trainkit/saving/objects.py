"""The objects of a run: what each of them keeps, and how it is put back."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader

from trainkit.core.plan import check, parameters_of, shown
from trainkit.core.step import Step
from trainkit.core.warning import warn
from trainkit.saving.randomness import is_source
from trainkit.saving.storage import parts_of

T = TypeVar("T")
LOAD = Optimizer.load_state_dict


class Objects:
    """Objects by name; modules without what data parallelism and torch.compile put around them.

    Raises:
        TypeError: for an object without a state.
        ValueError: without a step, or for a module in FSDP1.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        from trainkit.layers.language import unwrapped

        for name, thing in given.items():
            _check_object(name, thing)
        self.names = set(given)
        self.sources = {name: thing for name, thing in given.items() if is_source(thing)}
        self.stateful = {
            name: unwrapped(thing) if isinstance(thing, nn.Module) else thing
            for name, thing in given.items()
            if name not in self.sources
        }
        self.steps = list(self.of(Step).values())
        advice = "`resumable(path, model=model, optimizer=optimizer, step=step)`"
        message = f"there is no step among the objects ({', '.join(given)}): {advice}"
        check(bool(self.steps), ValueError, message)

    def of(self, kind: type[T]) -> dict[str, T]:
        """Return the objects of a kind."""
        return {name: thing for name, thing in self.stateful.items() if isinstance(thing, kind)}

    @property
    def optimizers(self) -> dict[str, Any]:
        """What has groups of parameters, also if it is no ``torch.optim.Optimizer``."""
        return {name: o for name, o in self.stateful.items() if hasattr(o, "param_groups")}

    def warn_of_missing(self) -> None:
        """Warn if a step changes what is not among the objects."""
        given = {id(thing) for thing in self.stateful.values()}
        given |= {id(p) for module in self.of(nn.Module).values() for p in module.parameters()}
        used: list[Any] = []
        for plan in (step._plan for step in self.steps):
            owners = (getattr(call, "__self__", None) for call in plan.after)
            used += [*plan.optimizers, *plan.parameters()]
            used += [owner for owner in owners if hasattr(owner, "state_dict")]
        missing = dict.fromkeys(type(thing).__name__ for thing in used if id(thing) not in given)
        if missing:
            warn(
                f"the step changes {', '.join(missing)}, which would not be saved: give all of it, "
                "`resumable(path, model=model, optimizer=optimizer, schedule=schedule, step=step)`"
            )

    def not_finite(self) -> str:
        """Return the name of the first parameter that is not finite, or ""."""
        for name, module in self.of(nn.Module).items():
            for key, p in module.named_parameters():
                local = p.to_local() if hasattr(p, "to_local") else p
                # float8 has no isfinite; no optimizer trains it.
                if local.element_size() > 1 and not local.isfinite().all():
                    return f"{name}.{key}"
        return ""

    def states(self, positioned: Container[str]) -> dict[str, Any]:
        """Return states by name; None for generators, for ``positioned`` and for unread loaders."""
        states: dict[str, Any] = dict.fromkeys(self.names)
        for name, thing in self._kept(positioned):
            states[name] = thing if type(thing) in (list, dict) else thing.state_dict()
        return states

    def shared(self, states: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors in ``states`` that are the same on all ranks.

        They are the parameters of modules, and the states of optimizers.
        """
        found: dict[str, Tensor] = {}
        for name in self.optimizers:
            found.update(_tensors(name, states[name]))
        for name, module in self.of(nn.Module).items():
            known = {f"{name}.{key}" for key, _ in module.named_parameters(remove_duplicate=False)}
            found.update((key, t) for key, t in _tensors(name, states[name]) if key in known)
        return {key: tensor for key, tensor in found.items() if tensor.dim() > 0}

    def patterns(self) -> dict[str, Tensor]:
        """Return parameters by their keys in states, or by the beginning of their states' keys."""
        found: dict[str, Tensor] = {}
        for name, module in self.of(nn.Module).items():
            found.update(_tensors(name, module.state_dict()))
        for name, optimizer in self.optimizers.items():
            parameters = enumerate(parameters_of(optimizer))
            found.update((f"{name}.state.{i}", p.detach()) for i, p in parameters)
        return found

    def check_fit(self, states: Mapping[str, Any]) -> None:
        """Raise ValueError if states do not fit the names, the modules or the optimizers."""
        there, here = self._form(states), self._form(self.states(self.of(Step)))
        for key in {**there, **here}:
            was, now = there.get(key, "nothing"), here.get(key, "nothing")
            advice = (
                "give the same objects, or each stage a path, `resumable(f'{path}/stage2', ...)`"
            )
            message = f"the checkpoint has {was} as {key}, and now it is {now}: {advice}"
            check(was == now, ValueError, message)

    def _form(self, states: Mapping[str, Any]) -> dict[str, Any]:
        form: dict[str, Any] = {"objects": sorted(states)}
        for name in self.of(nn.Module):
            form |= {key: list(t.shape) for key, t in _tensors(name, states.get(name))}
        for name in self.optimizers:
            for key, group in _nodes(name, states.get(name)):
                if isinstance(group, dict) and isinstance(group.get("params"), list):
                    form[key] = f"{len(group['params'])} parameters"
        return form

    def check_rebuilt(self, states: Mapping[str, Any]) -> None:
        """Raise TypeError for what ``Optimizer.load_state_dict`` cannot put back."""
        for name, optimizer in self.optimizers.items():
            for key, kept in _kept_for_parameters(name, states[name]):
                is_own = key == name and type(optimizer).load_state_dict is not LOAD
                for place, value in () if is_own else _nodes(f"{key}.state", kept):
                    if isinstance(value, Iterable) and not isinstance(value, (Tensor, dict)):
                        try:
                            type(value)(part for part in value)  # type: ignore[call-arg]
                        except Exception as error:
                            came = f"{place} is of type {type(value).__name__}"
                            refused = f"`optimizer.load_state_dict` would fail ({shown(error)})"
                            advice = "keep a list or a tuple, `tuple(value)`"
                            raise TypeError(f"{came}, and {refused}: {advice}") from None

    def load(self, states: Mapping[str, Any], positioned: Container[str]) -> None:
        """Put back what ``states`` returned."""
        for name, thing in self._kept(positioned):
            if type(thing) is list:
                thing[:] = states[name]
            elif type(thing) is dict:
                thing.clear()
                thing.update(states[name])
            else:
                thing.load_state_dict(states[name])
            if name in self.optimizers:
                _undo_casts(thing.state_dict(), states[name])

    def _kept(self, positioned: Container[str]) -> Iterator[tuple[str, Any]]:
        for name, thing in self.stateful.items():
            # To ask a loader that is not being read for its state would start it.
            if name not in positioned and not isinstance(thing, DataLoader):
                yield name, thing


def _check_object(name: str, thing: Any) -> None:
    has_state = hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")
    advice = "give models, optimizers, schedulers, steps, generators, lists or dicts"
    message = f"{name}={thing!r:.80} has no state_dict and load_state_dict: {advice}, `{name}=[]`"
    check(has_state or is_source(thing) or type(thing) in (list, dict), TypeError, message)
    parts = thing.modules() if isinstance(thing, nn.Module) else ()
    is_fsdp1 = any(type(part).__name__ == "FullyShardedDataParallel" for part in parts)
    message = f"{name} is in FSDP1, whose states fit one number of ranks: use `fully_shard(model)`"
    check(not is_fsdp1, ValueError, message)


def _undo_casts(now: Any, was: Any) -> None:
    """Give what an optimizer keeps for its parameters the types and dtypes that it had.

    ``Optimizer.load_state_dict`` casts it to the dtypes of the parameters, and forgets the length
    of a deque. ``now`` holds the dicts of the optimizer itself.
    """
    found = dict(_kept_for_parameters("", now))
    for key, kept in _kept_for_parameters("", was):
        for index, values in kept.items():
            here = found.get(key, {}).get(index)
            for name in here.keys() & values.keys() if isinstance(here, dict) else ():
                devices = [t.device for t in tree_leaves(here[name]) if isinstance(t, Tensor)]
                to = functools.partial(Tensor.to, device=next(iter(devices), None))
                here[name] = tree_map_only(Tensor, to, values[name], is_leaf=_is_size)


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.Size)


def _kept_for_parameters(key: str, state: Any) -> Iterator[tuple[str, Any]]:
    """Yield what optimizers keep for their parameters, also of an optimizer within another."""
    for place, node in _nodes(key, state):
        if isinstance(node, dict) and "param_groups" in node and isinstance(node["state"], dict):
            yield place, node["state"]


def _tensors(key: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested containers, with their keys."""
    return ((place, node) for place, node in _nodes(key, state) if isinstance(node, Tensor))


def _nodes(key: str, state: Any) -> Iterator[tuple[str, Any]]:
    """Yield a state and all that it holds, with their keys."""
    yield key, state
    for name, part in parts_of(state):
        yield from _nodes(f"{key}.{name}", part)
