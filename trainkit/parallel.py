"""What DistributedDataParallel needs of a step: that the parameters it was told to synchronise are those that are trained."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Synchronised:
    """The parameters of a DistributedDataParallel module whose gradients it synchronises: those trainable when it was made."""

    def __init__(self, module: DistributedDataParallel) -> None:
        self._module = module
        # Only the reducer knows, and only its buckets tell. Without them nothing is checked.
        buckets: list[Any] = getattr(module.reducer, "_get_zeros_like_grad_buckets", list)()
        self._known = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}

    def check(self) -> None:
        """Raises ValueError where some of them are frozen now, or others are trained."""
        module = self._module
        named = [item for item in module.module.named_parameters() if item[0] not in module.parameters_to_ignore]
        trained = {id(parameter) for _, parameter in named if parameter.requires_grad}
        if not self._known or not trained or trained == self._known:  # around the step of another model all may be frozen
            return
        if added := [name for name, parameter in named if id(parameter) in trained - self._known]:
            raise ValueError(
                f"{len(added)} parameters became trainable after DistributedDataParallel was made, and it never synchronises "
                f"them (first {added[0]!r}): unfreeze before it, `unfreeze(model, layers)`, `DistributedDataParallel(model)`"
            )
        missing = [name for name, parameter in named if id(parameter) in self._known - trained]
        if not module.find_unused_parameters:
            raise ValueError(
                f"{len(missing)} parameters were frozen after DistributedDataParallel was made, which waits for their gradients "
                f"(first {missing[0]!r}): freeze before it, `freeze(model, layers)`, `DistributedDataParallel(model)`; "
                "or freeze all of it; or wrap with `find_unused_parameters=True`"
            )


def synchronised(modules: tuple[nn.Module, ...]) -> list[Synchronised]:
    """One for each module that is wrapped in DistributedDataParallel."""
    return [Synchronised(module) for module in modules if isinstance(module, DistributedDataParallel)]
