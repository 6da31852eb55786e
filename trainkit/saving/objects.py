"""The objects of a run: what each of them keeps, and how it is put back."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from trainkit.core.plan import check
from trainkit.core.step import Step
from trainkit.core.warning import warn
from trainkit.saving.randomness import is_source

T = TypeVar("T")


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
        for name in self.of(Optimizer):
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
        for name, optimizer in self.of(Optimizer).items():
            parameters = (p.detach() for group in optimizer.param_groups for p in group["params"])
            found.update((f"{name}.state.{i}", p) for i, p in enumerate(parameters))
        return found

    def check_fit(self, states: Mapping[str, Any]) -> None:
        """Raise ValueError if states do not fit the names, the modules or the optimizers."""
        there, here = self._form(states), self._form(self.states(self.of(Step)))
        for key in {**there, **here}:
            was, now = there.get(key, "nothing"), here.get(key, "nothing")
            advice = "give the same objects, or another path to begin anew"
            message = f"the checkpoint has {was} as {key}, and now it is {now}: {advice}"
            check(was == now, ValueError, message)

    def _form(self, states: Mapping[str, Any]) -> dict[str, Any]:
        form: dict[str, Any] = {"objects": sorted(states)}
        for name in self.of(nn.Module):
            form |= {key: list(t.shape) for key, t in _tensors(name, states.get(name))}
        for name in self.of(Optimizer):
            groups = states.get(name, {}).get("param_groups", ())
            form[f"{name}.param_groups"] = [
                f"{len(group['params'])} parameters" for group in groups
            ]
        return form

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


def _tensors(key: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts, with their keys."""
    if isinstance(state, Tensor):
        yield key, state
    elif isinstance(state, dict):
        for name, part in state.items():
            yield from _tensors(f"{key}.{name}", part)
