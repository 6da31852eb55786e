"""FSDP2 and FSDP1: when they reduce gradients, the sums that FSDP2 keeps, and norms of shards."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.fused import total_norm


def modules_of(modules: Iterable[nn.Module], name: str) -> list[Any]:
    """Return the modules of a class of torch.distributed.fsdp, given by name."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), name, ())  # () if not imported
    return [module for module in modules if isinstance(module, kind)]


def groups_of(sharded: Iterable[Any]) -> Iterator[Any]:
    """Yield the parameter groups of FSDP2 modules: what is public gathers all parameters first."""
    for module in sharded:
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # older versions of torch have one
        yield from groups or filter(None, [state._fsdp_param_group])


@contextmanager
def reducing(closes: bool, fsdp1: Iterable[Any], sharded: Iterable[Any]) -> Iterator[None]:
    """Reduce gradients in this micro-batch only if it closes a window; leave flags as found."""
    with ExitStack() as stack:
        for module in () if closes else fsdp1:
            stack.enter_context(module.no_sync())
        for group in groups_of(sharded):
            found = {name: getattr(group, name) for name in ("reduce_grads", "all_reduce_grads")}
            stack.callback(vars(group).update, found)
        for module in sharded:
            stack.callback(module.set_is_last_backward, True)
            module.set_requires_gradient_sync(closes, recurse=False)
            module.set_is_last_backward(closes)
        yield


class HiddenSums:
    """The sums of an open window under FSDP2, which keeps them unsharded outside of ``.grad``.

    They are lent and taken like other sums: FSDP2 would reduce them in any backward through the
    module, for example that of another step, and those of frozen layers too.
    """

    def __init__(self, sharded: Sequence[Any]) -> None:
        self.sharded = sharded
        self.sums: dict[Any, Sums | None] = {}
        self._lent: set[Any] = set()

    def lend(self) -> None:
        """Let FSDP2 have the sums, but for parameters that are frozen just now."""
        for group in groups_of(self.sharded):
            for parameter in set(group.fsdp_params) - self._lent:
                if parameter.sharded_param.requires_grad:
                    self._lent.add(parameter)
                    _set_sums(parameter, self.sums.pop(parameter, None))

    def take(self) -> None:
        """Take the sums from FSDP2 again."""
        for parameter in self._lent:
            self.sums[parameter] = _sums_of(parameter)
            _set_sums(parameter, None)
        self._lent = set()

    def waiting(self) -> list[bool]:
        """Return for every trained parameter whether a sum of it waits to be reduced."""
        parameters = [p for group in groups_of(self.sharded) for p in group.fsdp_params]
        sums = [
            self.sums.get(p) or _sums_of(p) for p in parameters if p.sharded_param.requires_grad
        ]
        return [total is not None for total in sums]

    def reduce(self) -> None:
        """Reduce the sums, as FSDP2 does after the last backward of a window."""
        self.lend()
        with reducing(True, (), self.sharded):
            for group in groups_of(self.sharded):
                if any(map(_sums_of, group.fsdp_params)):
                    group.post_backward()
            for module in self.sharded:
                if (state := module._get_fsdp_state())._is_root:
                    state._root_post_backward_final_callback()

    def drop(self) -> None:
        """Forget the sums, and what a failed backward left."""
        for module in self.sharded:
            # Otherwise FSDP2 takes the next backward for a part of this one, and never reduces it.
            module._get_fsdp_state()._state_ctx.post_backward_final_callback_queued = False
        self.take()
        self.sums = {}


# What FSDP2 has summed for a parameter, in the dtype that it reduces in or in its own.
Sums = tuple[Tensor | None, Tensor | None]


def _sums_of(parameter: Any) -> Sums | None:
    wide = parameter.unsharded_accumulated_grad
    own = getattr(getattr(parameter, "_unsharded_param", None), "grad", None)
    return None if wide is None and own is None else (wide, own)


def _set_sums(parameter: Any, sums: Sums | None) -> None:
    parameter.unsharded_accumulated_grad, own = sums or (None, None)
    if (unsharded := getattr(parameter, "_unsharded_param", None)) is not None:
        unsharded.grad = own


def sharded_norm(gradients: Sequence[Any], norm_type: float, zero: Tensor) -> Tensor:
    """Return the norm of gradients some or all of which are DTensors, as ``total_norm`` does."""
    shards: dict[Any, list[Any]] = {}
    for gradient in gradients:
        key = (gradient.device_mesh, gradient.placements) if hasattr(gradient, "to_local") else None
        shards.setdefault(key, []).append(gradient if key is None else gradient.to_local())
    norms = []
    for key, local in shards.items():
        # In float64 on all ranks: of an empty shard the norm is a float32 zero.
        norm = total_norm(local, norm_type, zero).double()
        norms.append(norm if key is None else _over_shards(norm, norm_type, *key).to(zero.device))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    wide = functools.reduce(torch.promote_types, {g.dtype for g in gradients}, torch.float32)
    return total.to(wide.to_real())


def _over_shards(norm: Tensor, norm_type: float, mesh: Any, placements: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial

    is_max = norm_type == math.inf
    # A maximum over ranks loses a nan.
    norm = torch.where(norm.isnan(), math.inf, norm) if is_max else norm**norm_type
    partial = Partial("max" if is_max else "sum")
    over = [partial if placement.is_shard() else placement for placement in placements]
    total: Tensor = DTensor.from_local(norm, mesh, over).full_tensor()
    return total if is_max else total ** (1 / norm_type)
