"""DistributedDataParallel: when it reduces gradients, and which of them."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainkit.core.plan import check


class Replica:
    """A DistributedDataParallel module. Its forward decides if the next backward reduces."""

    def __init__(self, module: DistributedDataParallel) -> None:
        self.module = module
        # A static graph is learnt from the first backward, which must therefore be reduced.
        self.may_wait = not module.static_graph
        # True after a forward, whose backward will reduce; False after that backward; else None.
        self.reduces: bool | None = None
        # The parameters that were trainable when the module was wrapped. Only the buckets of its
        # reducer know them. A bucket of sparse gradients raises: then nothing is checked.
        self._synchronised = set[int]()
        with suppress(RuntimeError):
            for bucket in module.reducer._get_zeros_like_grad_buckets():
                self._synchronised.update(map(id, bucket.parameters()))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are synchronised if trained, in one order on all ranks."""
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
        """Broadcast buffers once: a rank that retries its forward must not broadcast alone."""
        self.module.require_forward_param_sync = False

    def _check_frozen(self) -> None:
        """Raise ValueError if parameters were frozen or made trainable after the wrapping."""
        named, known = self.named_parameters(), self._synchronised
        if not known or not any(p.requires_grad for p in named.values()):  # frozen as a whole
            return
        added = [name for name, p in named.items() if p.requires_grad and id(p) not in known]
        frozen = [name for name, p in named.items() if not p.requires_grad and id(p) in known]
        fault = f"{len(added)} of {len(named)} parameters {added[:1]} became trainable after they"
        remedy = "`unfreeze(model, layers)` first, then `DistributedDataParallel(model)`"
        check(not added, ValueError, f"{fault} were wrapped, and are never reduced: {remedy}")
        fault = f"{len(frozen)} of {len(named)} parameters {frozen[:1]} were frozen after they"
        remedy = "`freeze(model, layers)` first, or wrap with `find_unused_parameters=True`"
        are_waited_for = bool(frozen) and not self.module.find_unused_parameters
        check(not are_waited_for, ValueError, f"{fault} were wrapped, and are waited for: {remedy}")
