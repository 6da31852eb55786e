"""DistributedDataParallel: when it reduces gradients, and of which parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.nn.parallel import DistributedDataParallel


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
        try:
            buckets: list[Any] = module.reducer._get_zeros_like_grad_buckets()
        except RuntimeError:
            buckets = []
        self._synchronised = {id(p) for bucket in buckets for p in bucket.parameters()}

    @contextmanager
    def around(self, closes: bool) -> Iterator[None]:
        """Reduce gradients in this micro-batch only if it closes a window."""
        self._check_frozen()
        module, self.reduces = self.module, None
        with ExitStack() as stack:
            if module.will_sync_module_buffers():  # type: ignore[no-untyped-call]
                stack.callback(module.module.register_forward_pre_hook(self._skip_broadcast).remove)
            if closes or not self.may_wait:
                stack.callback(module.register_forward_pre_hook(self._note_forward).remove)
            else:
                stack.enter_context(module.no_sync())
            yield

    def before_backward(self) -> None:
        """Raise RuntimeError if the gradients of a backward would not be reduced."""
        if self.reduces is False:
            late = "DistributedDataParallel has reduced this window and ignores a further loss"
            raise RuntimeError(f"{late}: add the losses, `step.backward(loss + further)`")
        self.reduces = False if self.reduces else None

    def _note_forward(self, *_: Any) -> None:
        self.reduces = True

    def _skip_broadcast(self, *_: Any) -> None:
        """Broadcast buffers once: a rank whose forward fails must not do it again on its own."""
        self.module.require_forward_param_sync = False

    def _check_frozen(self) -> None:
        """Raise ValueError if a part of the synchronised parameters is frozen, or others train."""
        module, known = self.module, self._synchronised
        ignored = module.parameters_to_ignore
        named = {id(p): (n, p) for n, p in module.module.named_parameters() if n not in ignored}
        trained = {key for key, (_, parameter) in named.items() if parameter.requires_grad}
        if not known or not trained or trained == known:  # all frozen: the step of another model
            return
        added = [name for key, (name, _) in named.items() if key in trained - known]
        frozen = [name for key, (name, _) in named.items() if key in known - trained]
        if added:
            came = f"{len(added)} of {len(named)} parameters (first {added[0]!r}) became trainable"
            remedy = "`unfreeze(model, layers)` first, then `DistributedDataParallel(model)`"
            raise ValueError(f"{came} after they were wrapped, and are never reduced: {remedy}")
        if not module.find_unused_parameters:
            came = f"{len(frozen)} of {len(named)} parameters (first {frozen[0]!r}) were frozen"
            remedy = "`freeze(model, layers)` first, or wrap with `find_unused_parameters=True`"
            raise ValueError(f"{came} after they were wrapped, and are waited for: {remedy}")
