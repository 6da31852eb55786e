"""The objects of a run: what each of them keeps, and how that is put back."""

from __future__ import annotations

from collections.abc import Container, Mapping
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from trainkit.core.step import Step
from trainkit.core.warning import warn
from trainkit.layers.language import unwrapped
from trainkit.ranks.parallel import Wrappers
from trainkit.saving.randomness import is_source

T = TypeVar("T")


class Objects:
    """Objects by name; modules without what data parallelism and torch.compile have put around them.

    Raises:
        TypeError: for an object without a state.
        ValueError: where no step is among them, or a module is wrapped in FSDP1.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        for name, thing in given.items():
            _check_object(name, thing)
        self.steps = [thing for thing in given.values() if isinstance(thing, Step)]
        if not self.steps:
            raise ValueError(
                f"got {', '.join(given) or 'no objects'}, and no step, which knows the places between two micro-batches: "
                "`resumable(path, model=model, optimizer=optimizer, step=step)`"
            )
        self.sources = {name: thing for name, thing in given.items() if is_source(thing)}
        self.others = {
            name: unwrapped(thing) if isinstance(thing, nn.Module) else thing
            for name, thing in given.items()
            if name not in self.sources
        }
        self.names = set(given)

    def warn_of_missing(self) -> None:
        """Warns where a step changes what is not among them."""
        known = {id(thing) for thing in self.others.values()}
        plans = [step._plan for step in self.steps]
        called = (getattr(call, "__self__", None) for plan in plans for call in plan.after)
        used = chain(
            (o for plan in plans for o in plan.optimizers),
            (thing for thing in called if hasattr(thing, "state_dict")),
        )
        missing = [type(thing).__name__ for thing in used if id(thing) not in known]
        parameters = {id(p) for module in self.of(nn.Module).values() for p in module.parameters()}
        if unknown := sum(id(p) not in parameters for plan in plans for p in plan.parameters()):
            missing.append(f"{unknown} parameters")
        if missing:
            warn(
                f"the step changes what is not among the objects, and would not go on from where it was: {', '.join(missing)}; "
                "give it, `resumable(path, model=model, optimizer=optimizer, schedule=schedule, step=step)`"
            )

    def not_finite(self) -> str:
        """The first parameter that is not finite, or buffer with a nan; else "". A mask may hold -inf."""
        for name, module in self.of(nn.Module).items():
            buffers = (
                (key, ~found.isnan())
                for key, buffer in module.named_buffers()
                if (found := _floats(buffer)) is not None
            )
            parameters = (
                (key, found.isfinite())
                for key, p in module.named_parameters()
                if (found := _floats(p)) is not None
            )
            for key, good in chain(parameters, buffers):
                if not good.all():
                    return f"{name}.{key}"
        return ""

    def of(self, kind: type[T]) -> dict[str, T]:
        """Those of a kind."""
        return {name: thing for name, thing in self.others.items() if isinstance(thing, kind)}

    def states(self, placed: Container[str]) -> dict[str, Any]:
        """The states by name; None for those that ``placed`` has, for generators, and for loaders nobody has read yet."""
        found: dict[str, Any] = dict.fromkeys(self.names)
        for name, thing in self.others.items():
            if name not in placed and not isinstance(
                thing, DataLoader
            ):  # asking one that is not read would disturb it
                found[name] = thing if type(thing) in (list, dict) else thing.state_dict()
        return found

    def shared(self) -> set[str]:
        """The keys of states, ``"model.0.weight"``, and names, below which all ranks have the same. Buffers need not be."""
        modules = self.of(nn.Module).items()
        return set(self.of(Optimizer)) | {
            f"{name}.{key}"
            for name, module in modules
            for key, _ in module.named_parameters(remove_duplicate=False)
        }

    def sharded(self) -> dict[str, Tensor]:
        """DTensors: by the key of a parameter, and by the key below which an optimizer keeps what is of the same shape."""
        found: dict[str, Any] = {}
        for name, thing in self.others.items():
            if isinstance(thing, nn.Module):
                found.update({f"{name}.{key}": value for key, value in thing.state_dict().items()})
            elif isinstance(thing, Optimizer):
                parameters = (p for group in thing.param_groups for p in group["params"])
                found.update({f"{name}.state.{i}": p.detach() for i, p in enumerate(parameters)})
        return {key: value for key, value in found.items() if hasattr(value, "full_tensor")}

    def misfit(self, states: Mapping[str, Any]) -> str:
        """How the states of models and optimizers do not fit, or ""; the others see to it themselves."""
        for name, thing in self.others.items():
            if not isinstance(thing, (nn.Module, Optimizer)):
                continue
            was, now = _forms(thing, states[name]), _forms(thing, thing.state_dict())
            for key in {**was, **now}:
                if was.get(key) != now.get(key):
                    return f"{name}.{key} was {was.get(key, 'not there')}, and is {now.get(key, 'not there')}"
        return ""

    def load(self, states: Mapping[str, Any], placed: Mapping[str, Any]) -> None:
        """Puts back what ``states`` gave."""
        for name, thing in self.others.items():
            state = states[name]
            if name in placed or isinstance(thing, DataLoader):
                continue
            if type(thing) is list:
                thing[:] = state
            elif type(thing) is dict:
                thing.clear()
                thing.update(state)
            else:
                if isinstance(thing, nn.Module) and hasattr(
                    fresh := thing.state_dict(), "_metadata"
                ):
                    state._metadata = (
                        fresh._metadata
                    )  # the versions of its modules, which this one has, too
                thing.load_state_dict(state)


def _check_object(name: str, thing: Any) -> None:
    is_stateful = (
        hasattr(thing, "state_dict")
        and hasattr(thing, "load_state_dict")
        and not isinstance(thing, type)
    )
    if not (is_stateful or is_source(thing) or type(thing) in (list, dict)):
        raise TypeError(
            f"{name} is {thing!r}, and has no state_dict and load_state_dict: objects are models, optimizers, schedulers, steps, "
            "generators of random numbers, lists, dicts and whatever has these two"
        )
    if isinstance(thing, nn.Module) and Wrappers((thing,)).shard_norms:
        raise ValueError(
            f"{name} is wrapped in FullyShardedDataParallel, whose state is of one number of ranks: wrap with FSDP2, "
            "`torch.distributed.fsdp.fully_shard(model)`"
        )


def _forms(thing: nn.Module | Optimizer, state: Mapping[str, Any]) -> dict[str, str]:
    """What of a state must fit the object: shapes and dtypes of a module; of an optimizer, how many parameters, with what set."""
    if isinstance(thing, Optimizer):
        # A step of AdamW fails without the betas that SGD has not. Flags are more from version to version, and torch adds them.
        known = [
            key
            for key, value in thing.defaults.items()
            if not (value is None or isinstance(value, bool))
        ]
        groups = (
            [f"of {len(group['params'])} parameters", *(k for k in known if k in group)]
            for group in state["param_groups"]
        )
        return {f"param_groups.{i}": ", ".join(words) for i, words in enumerate(groups)}
    tensors = ((key, value) for key, value in state.items() if isinstance(value, Tensor))
    return {
        key: f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        for key, value in tensors
    }


def _floats(tensor: Tensor) -> Tensor | None:
    """What this rank has of a tensor of floats; None for another."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return (
        local.float() if local.element_size() == 1 else local
    )  # float8 knows neither inf nor how to be asked
