"""DistributedDataParallel: when it reduces gradients, and of which parameters."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainkit.core.plan import check


class Replica:
    """A DistributedDataParallel module. Its forward decides whether the next backward reduces."""

    def __init__(self, module: DistributedDataParallel) -> None:
        self.module = module
        # With a static graph it learns the graph from its first backward, which must be reduced.
        self.may_wait = not module.static_graph
        # Whether a backward would reduce gradients: one does, after a forward. None before any.
        self.reduces: bool | None = None
        # It synchronises what was trainable when it was made. Only the buckets of its reducer tell;
        # a bucket of sparse gradients does not, and then nothing is checked.
        self._synchronised = set[int]()
        with suppress(RuntimeError):
            for bucket in module.reducer._get_zeros_like_grad_buckets():
                self._synchronised.update(map(id, bucket.parameters()))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that it synchronises if they are trained, in the same order on all
        ranks."""
        named, ignored = self.module.module.named_parameters(), self.module.parameters_to_ignore
        return {name: parameter for name, parameter in named if name not in ignored}

    def enter(self, closes: bool, until: ExitStack) -> None:
        """Begin a micro-batch: reduce its gradients only if it closes a window."""
        self._check_frozen()
        module, self.reduces = self.module, None
        if module.will_sync_module_buffers():  # type: ignore[no-untyped-call]
            until.callback(module.module.register_forward_pre_hook(self._skip_broadcast).remove)
        if closes or not self.may_wait:
            until.callback(module.register_forward_pre_hook(self._note_forward).remove)
        else:
            until.enter_context(module.no_sync())

    def before_backward(self) -> None:
        """Raise RuntimeError if the gradients of a backward would not be reduced."""
        late = "DistributedDataParallel has reduced this window and ignores a further loss"
        remedy = "add the losses, `step.backward(loss + further)`"
        check(self.reduces is not False, RuntimeError, f"{late}: {remedy}")
        self.reduces = False if self.reduces else None

    def has_missed(self, parameters: list[nn.Parameter]) -> bool:
        """Return whether gradients of these parameters were not reduced."""
        if self.reduces is not None or self.module.require_forward_param_sync:
            return False
        own = set(map(id, self.named_parameters().values()))
        return any(id(p) in own and p.grad is not None for p in parameters)

    def _note_forward(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.reduces = True

    def _skip_broadcast(self, *_: Any) -> None:
        """Broadcast buffers once: a rank whose forward fails must not do it again on its own."""
        self.module.require_forward_param_sync = False

    def _check_frozen(self) -> None:
        """Raise ValueError if a part of the synchronised parameters is frozen, or others train."""
        named, known = self.named_parameters(), self._synchronised
        if not known or not any(p.requires_grad for p in named.values()):  # of another model's step
            return
        added = [name for name, p in named.items() if p.requires_grad and id(p) not in known]
        frozen = [name for name, p in named.items() if not p.requires_grad and id(p) in known]
        came = f"{len(added)} of {len(named)} parameters {added[:1]} became trainable after they"
        remedy = "`unfreeze(model, layers)` first, then `DistributedDataParallel(model)`"
        check(not added, ValueError, f"{came} were wrapped, and are never reduced: {remedy}")
        came = f"{len(frozen)} of {len(named)} parameters {frozen[:1]} were frozen after they"
        remedy = "`freeze(model, layers)` first, or wrap with `find_unused_parameters=True`"
        are_waited_for = bool(frozen) and not self.module.find_unused_parameters
        check(not are_waited_for, ValueError, f"{came} were wrapped, and are waited for: {remedy}")
