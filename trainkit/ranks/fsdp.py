"""FSDP: when it reduces gradients, the sums that FSDP2 keeps, and the norm of shards."""

from __future__ import annotations

import functools
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.fused import total_norm


def modules_of(modules: Iterable[nn.Module], name: str) -> list[Any]:
    """Return the modules of a class of torch.distributed.fsdp, given by name."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), name, ())  # () if not imported
    return [module for module in modules if isinstance(module, kind)]


def groups_of(sharded: Iterable[Any]) -> Iterator[Any]:
    """Yield the parameter groups of FSDP2 modules.

    The public attributes would gather all parameters first.
    """
    for module in sharded:
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # older versions of torch have one
        yield from groups or filter(None, [state._fsdp_param_group])


def set_reducing(is_reducing: bool, sharded: Iterable[Any], until: ExitStack) -> None:
    """Have FSDP2 reduce gradients, or only add them up. ``until`` restores its flags."""
    for group in groups_of(sharded):
        found = {name: getattr(group, name) for name in ("reduce_grads", "all_reduce_grads")}
        until.callback(vars(group).update, found)
    for module in sharded:
        until.callback(module.set_is_last_backward, True)
        module.set_requires_gradient_sync(is_reducing, recurse=False)
        module.set_is_last_backward(is_reducing)


class Unsharded:
    """A parameter of FSDP2 before it is sharded, for a window that lends and takes its sums.

    FSDP2 keeps the sums of an open window outside of ``.grad``, and would reduce them in any
    backward through the module, for example in a step of another window.
    """

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter

    @property
    def requires_grad(self) -> bool:
        """Whether the parameter is trained."""
        return bool(self._parameter.sharded_param.requires_grad)

    @property
    def grad(self) -> Tensor | None:
        """The sum so far, in the dtype of the parameter or of the reduction."""
        total: Tensor | None = self._parameter.unsharded_accumulated_grad
        own = getattr(self._parameter, "_unsharded_param", None)
        return getattr(own, "grad", None) if total is None else total

    @grad.setter
    def grad(self, total: Tensor | None) -> None:
        self._parameter.unsharded_accumulated_grad = total
        if (own := getattr(self._parameter, "_unsharded_param", None)) is not None:
            own.grad = None


def reduce_sums(sharded: Sequence[Any]) -> None:
    """Reduce the sums of an open window, as FSDP2 does after its last backward."""
    with ExitStack() as stack:
        set_reducing(True, sharded, stack)
        for group in groups_of(sharded):
            if any(Unsharded(parameter).grad is not None for parameter in group.fsdp_params):
                group.post_backward()
        for module in sharded:
            if (state := module._get_fsdp_state())._is_root:
                state._root_post_backward_final_callback()


def sharded_norm(gradients: Sequence[Any], norm_type: float, zero: Tensor) -> Tensor:
    """Return ``total_norm`` of gradients of which some are DTensors."""
    from torch.distributed.tensor import DTensor, Partial

    shards = defaultdict[Any, list[Any]](list)
    for gradient in gradients:
        is_sharded = hasattr(gradient, "to_local")
        key = (gradient.device_mesh, gradient.placements) if is_sharded else (None, ())
        shards[key].append(gradient.to_local() if is_sharded else gradient)
    norms, is_max = [], norm_type == math.inf
    for (mesh, placements), local in shards.items():
        # In float64, so that all ranks reduce one dtype: the norm of an empty shard is float32.
        norm = total_norm(local, norm_type, zero).double()
        if mesh is not None:
            # A maximum over ranks would drop a nan.
            norm = torch.where(norm.isnan(), math.inf, norm) if is_max else norm**norm_type
            partial = Partial("max" if is_max else "sum")
            over = [partial if placement.is_shard() else placement for placement in placements]
            norm = DTensor.from_local(norm, mesh, over).full_tensor()
            norm = (norm if is_max else norm ** (1 / norm_type)).to(zero.device)
        norms.append(norm)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    wide = functools.reduce(torch.promote_types, {g.dtype for g in gradients}, torch.float32)
    return total.to(wide.to_real())
