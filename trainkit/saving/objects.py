"""The objects of a run: what each of them keeps, and how it is put back."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from itertools import chain
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
        self.steps = [thing for thing in given.values() if isinstance(thing, Step)]
        advice = "`resumable(path, model=model, optimizer=optimizer, step=step)`"
        message = (
            f"got {', '.join(given) or 'no objects'}, and no step, between whose calls to save"
        )
        check(bool(self.steps), ValueError, f"{message}: {advice}")
        self.names = set(given)
        self.sources = {name: thing for name, thing in given.items() if is_source(thing)}
        self.stateful = {
            name: unwrapped(thing) if isinstance(thing, nn.Module) else thing
            for name, thing in given.items()
            if name not in self.sources
        }

    def of(self, kind: type[T]) -> dict[str, T]:
        """The objects of a kind."""
        return {name: thing for name, thing in self.stateful.items() if isinstance(thing, kind)}

    def warn_of_missing(self) -> None:
        """Warn if a step changes what is not among the objects."""
        given = {id(thing) for thing in self.stateful.values()}
        given |= {id(p) for module in self.of(nn.Module).values() for p in module.parameters()}
        plans = [step._plan for step in self.steps]
        owners = [getattr(call, "__self__", None) for plan in plans for call in plan.after]
        used: list[Any] = [optimizer for plan in plans for optimizer in plan.optimizers]
        used += [owner for owner in owners if hasattr(owner, "state_dict")]
        missing = [type(thing).__name__ for thing in used if id(thing) not in given]
        if unknown := sum(id(p) not in given for plan in plans for p in plan.parameters()):
            missing.append(f"{unknown} parameters")
        if missing:
            warn(
                f"the step changes {', '.join(missing)}, which would not be saved: give all of it, "
                "`resumable(path, model=model, optimizer=optimizer, schedule=schedule, step=step)`"
            )

    def not_finite(self) -> str:
        """The first parameter that is not finite, or buffer with a nan; "" if there is none."""
        for name, module in self.of(nn.Module).items():
            buffers = {id(buffer) for buffer in module.buffers()}
            for key, tensor in chain(module.named_parameters(), module.named_buffers()):
                if not (tensor.is_floating_point() or tensor.is_complex()):
                    continue
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                if local.element_size() == 1:  # float8 has no isnan
                    local = local.float()
                # A buffer may be a mask of -inf.
                if (local.isnan() if id(tensor) in buffers else ~local.isfinite()).any():
                    return f"{name}.{key}"
        return ""

    def states(self, positioned: Container[str]) -> dict[str, Any]:
        """The states by name; None for generators, for ``positioned`` and for unread loaders."""
        states: dict[str, Any] = dict.fromkeys(self.names)
        for name, thing in self._kept(positioned):
            states[name] = thing if type(thing) in (list, dict) else thing.state_dict()
        return states

    def shared(self, states: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors in ``states`` that all ranks share: parameters, states of optimizers."""
        found: dict[str, Tensor] = {}
        for name in self.of(Optimizer):
            found.update(_tensors(name, states[name]))
        for name, module in self.of(nn.Module).items():
            known = {f"{name}.{key}" for key, _ in module.named_parameters(remove_duplicate=False)}
            found.update((key, t) for key, t in _tensors(name, states[name]) if key in known)
        return {key: tensor for key, tensor in found.items() if tensor.dim() > 0}

    def patterns(self) -> dict[str, Tensor]:
        """Parameters, by their keys in states, or by the beginning of the keys of their states."""
        found: dict[str, Tensor] = {}
        for name, module in self.of(nn.Module).items():
            found.update(_tensors(name, module.state_dict()))
        for name, optimizer in self.of(Optimizer).items():
            parameters = (p.detach() for group in optimizer.param_groups for p in group["params"])
            found.update((f"{name}.state.{i}", p) for i, p in enumerate(parameters))
        return found

    def misfit(self, states: Mapping[str, Any]) -> str:
        """How states do not fit names, modules and optimizers, or ""; others check theirs."""
        was, now = (", ".join(sorted(names)) for names in (states, self.names))
        if was != now:
            return f"it is of {was}, and the objects are {now}"
        things: dict[str, Any] = {**self.of(nn.Module), **self.of(Optimizer)}
        for name, thing in things.items():
            there, here = _forms(name, thing, states[name]), _forms(name, thing, thing.state_dict())
            for key in {**there, **here}:
                was, now = there.get(key, "missing"), here.get(key, "missing")
                if was != now:
                    return f"{key} was {was} and is {now}"
        return ""

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
    is_kept = has_state or is_source(thing) or type(thing) in (list, dict)
    if isinstance(thing, type) or not is_kept:
        raise TypeError(
            f"{name}={thing!r} has no state_dict and load_state_dict: give models, optimizers, "
            f"schedulers, steps, generators, lists or dicts, `{name}=[...]`"
        )
    parts = thing.modules() if isinstance(thing, nn.Module) else ()
    is_fsdp1 = any(type(part).__name__ == "FullyShardedDataParallel" for part in parts)
    advice = "use FSDP2, `torch.distributed.fsdp.fully_shard(model)`"
    check(
        not is_fsdp1, ValueError, f"the state of {name}, in FSDP1, fits these ranks only: {advice}"
    )


def _tensors(key: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, by their keys."""
    if isinstance(state, Tensor):
        yield key, state
    elif isinstance(state, dict):
        for name, part in state.items():
            yield from _tensors(f"{key}.{name}", part)


def _forms(name: str, thing: nn.Module | Optimizer, state: Mapping[str, Any]) -> dict[str, str]:
    """What must fit: dtypes and shapes; of an optimizer, parameters and options of each group."""
    if isinstance(thing, nn.Module):
        found = _tensors(name, state)
        return {k: f"{t.dtype}{list(t.shape)}".removeprefix("torch.") for k, t in found}
    # Without flags: new versions of PyTorch add some, and fill them in.
    options = [k for k, v in thing.defaults.items() if not (v is None or isinstance(v, bool))]
    forms = {}
    for i, group in enumerate(state.get("param_groups", ())):
        known = [f"{len(group['params'])} parameters", *(k for k in options if k in group)]
        forms[f"{name}.param_groups.{i}"] = ", ".join(known)
    return forms
