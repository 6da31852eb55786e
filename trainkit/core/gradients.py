"""The gradients that an update is made of, from one micro-batch to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trainkit.core.plan import Plan

Version = tuple[Tensor, int] | None
HALF = (torch.bfloat16, torch.float16)


class Gradients:
    """What lies in ``.grad`` of the parameters that a plan knows."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        # One parameter of each optimizer, with what its gradient was: see _version.
        self._watched: dict[nn.Parameter, Version] = {}
        self._rebuilt = 0
        self.buckets_rebuilt: Callable[[], int] = int
        # Those whose gradient frozen had set aside when the window began.
        self._aside: list[nn.Parameter] = []
        self._noted: list[tuple[nn.Parameter, Version]] = []

    def found(self) -> list[Tensor]:
        """Those of the window that are there."""
        self.drop_returned()
        return [gradient for p in self._plan.parameters() if (gradient := p.grad) is not None]

    def begin(self) -> None:
        """Sets all to None, for a window. Those that ``frozen`` has set aside are not the window's: see ``drop_returned``."""
        self.forget()
        for parameter in self._plan.parameters():
            parameter.grad = None
            if not parameter.requires_grad and _aside(parameter) is not None:
                self._aside.append(parameter)
        self._widen()

    def _widen(self) -> None:
        """Has autograd sum the gradients of half precision in more, where ``accumulate(dtype=...)`` asks for that."""
        if self._plan.sum_dtype is not None:
            for parameter in self._plan.parameters():
                if parameter.dtype in HALF:
                    parameter.grad = None
                    parameter.grad_dtype = self._plan.sum_dtype

    def fit(self) -> bool:
        """Whether ``narrow`` can be called before they are divided: a sum in float32 may be too large for float16."""
        return self._plan.sum_dtype is None or torch.float16 not in {
            parameter.dtype for parameter in self._plan.parameters()
        }

    def narrow(self) -> None:
        """Gives parameters the dtype of their gradients back, and rounds the sums to it: optimizers take no other."""
        if self._plan.sum_dtype is not None:
            for parameter in self._plan.parameters():
                if parameter.dtype in HALF:
                    gradient, parameter.grad = parameter.grad, None
                    parameter.grad_dtype = (
                        None  # any: its own dtype would stay where the model is cast later
                    )
                    parameter.grad = None if gradient is None else gradient.to(parameter.dtype)

    def drop(self) -> None:
        """Sets all of a window to None, also those that ``frozen`` has set aside since it began."""
        others = {id(parameter) for parameter in self._aside}
        for parameter in self._plan.parameters():
            parameter.grad = None
            if (
                not parameter.requires_grad
                and id(parameter) not in others
                and (hold := _hold(parameter)) is not None
            ):
                hold.grad = None
        self.narrow()
        self._watched, self._noted = {}, []  # and not _aside: what is dropped twice spares the same

    def drop_returned(self) -> None:
        """Drops what was set aside when the window began, and was put back since; it would count in the window."""
        for parameter in self._aside:
            if _aside(parameter) is None:
                parameter.grad = None
        self._aside = [parameter for parameter in self._aside if _aside(parameter) is not None]

    def forget(self) -> None:
        """Lets go of what was remembered of a window."""
        self._watched, self._aside, self._noted = {}, [], []

    def note(self) -> None:
        """Takes note of what is there before a block by hand, for ``touched``."""
        trainable = (
            next((p for p in ps if p.requires_grad), None)
            for ps in self._plan.parameters_by_optimizer()
        )
        self._noted = [(p, _version(p)) for p in trainable if p is not None]

    def touched(self) -> bool:
        """Whether gradients came since ``note``."""
        return any(p.grad is not None and not _is_still(p, left) for p, left in self._noted)

    def remember(self) -> None:
        """Takes note of what a micro-batch left, for ``disturbance``: of each optimizer the first parameter with a gradient."""
        if self._aside:
            self.drop_returned()
        if not self._watched:
            first = (
                next((p for p in ps if p.grad is not None), None)
                for ps in self._plan.parameters_by_optimizer()
            )
            self._watched = {p: None for p in first if p is not None}
        for parameter in self._watched:
            self._watched[parameter] = _version(parameter)
        if self._plan.modules:
            self._rebuilt = self.buckets_rebuilt()

    def disturbance(self) -> str:
        """What became of the gradients since ``remember``, in words about a window of {} micro-batches; "" for nothing."""
        if self._aside:
            self.drop_returned()
        for parameter, left in self._watched.items():
            if parameter.grad is None:
                # Of a parameter that is frozen just now the gradient is set aside.
                if left is not None and parameter.requires_grad:
                    return _WIPED
            elif not _is_still(parameter, left):
                if not any(gradient.any() for gradient in self.found()):
                    return _WIPED
                # Else it was set aside then, and is back; or DistributedDataParallel has put the same into a bucket of its own.
                if left is not None and self._rebuilt == self.buckets_rebuilt():
                    return _CHANGED
        return ""

    def versions(self) -> list[tuple[nn.Parameter, Version]]:
        """What there is now, for ``take``."""
        return [(parameter, _version(parameter)) for parameter in self._plan.parameters()]

    def take(self, before: list[tuple[nn.Parameter, Version]]) -> dict[nn.Parameter, Tensor]:
        """Takes out those that have changed since."""
        taken = {p: p.grad for p, found in before if p.grad is not None and not _is_still(p, found)}
        for parameter in taken:
            parameter.grad = None
        self.remember()
        return taken

    def state_dict(self) -> dict[int, Tensor]:
        """Copies, by the position of the parameter; also of those that ``frozen`` has set aside."""
        others = {id(parameter) for parameter in self._aside}
        found = (
            (i, _aside(p) if p.grad is None else p.grad)
            for i, p in enumerate(self._plan.parameters())
            if id(p) not in others
        )
        return {i: gradient.detach().clone() for i, gradient in found if gradient is not None}

    def check_state_dict(self, state: Mapping[int, Tensor]) -> None:
        """Raises ValueError where gradients of a state do not fit the parameters."""
        parameters = dict(enumerate(self._plan.parameters()))
        for i, gradient in state.items():
            here = None
            if (parameter := parameters.get(i)) is not None:
                wide = self._plan.sum_dtype if parameter.dtype in HALF else None
                here = tuple(parameter.shape), wide or parameter.dtype
            readable = isinstance(gradient, Tensor) and not (
                gradient.is_nested or gradient.is_meta or is_lazy(gradient)
            )
            there = (tuple(gradient.shape), gradient.dtype) if readable else type(gradient)
            if here != there:
                raise ValueError(
                    f"the state has a gradient of shape and dtype {there} for parameter {i}, and here it is {here}: build model "
                    "and optimizer as they were when the state was taken"
                )

    def load_state_dict(self, state: Mapping[int, Tensor]) -> None:
        """Puts copies in place, for what is frozen just now among what is set aside; None where the state has nothing."""
        self.forget()
        self._widen()
        for i, parameter in enumerate(self._plan.parameters()):
            gradient = state[i].to(parameter.device, copy=True) if i in state else None
            hold = _hold(parameter)
            if hold is None or parameter.requires_grad:
                parameter.grad = gradient
            elif gradient is not None:
                hold.grad = gradient
            elif hold.grad is not None:
                self._aside.append(parameter)
        self.remember()


_WIPED = (
    "an open window has lost the gradients of its {} micro-batch(es): something like `optimizer.zero_grad()` runs for every "
    "micro-batch; move it below the yield, or remove it from a step that returns its loss. (`freeze`, and two steps over the "
    "same parameters, do this too.)"
)
_CHANGED = (
    "the gradients of an open window of {} micro-batch(es) were changed from outside, as by the backward of another loss: freeze "
    "these parameters meanwhile, `with frozen(model):` or `train_step(other_optimizer, frozen(model))`; a further loss of this "
    "step goes to `step.backward(loss)`"
)


def _version(parameter: nn.Parameter) -> Version:
    """Which tensor the gradient is, and how often it was written to; None for no gradient."""
    gradient = parameter.grad
    return None if gradient is None else (gradient, gradient._version)


def _is_still(parameter: nn.Parameter, version: Version) -> bool:
    """Whether the gradient, which is there, is what it was."""
    return (
        version is not None and parameter.grad is version[0] and version[0]._version == version[1]
    )


def _hold(parameter: nn.Parameter) -> Any:
    """What ``frozen`` keeps for a parameter that it holds: ``hold.grad`` is the gradient set aside. None where it does not."""
    return getattr(parameter, "_trainkit_hold", None) or None


def _aside(parameter: nn.Parameter) -> Tensor | None:
    hold = _hold(parameter)
    return None if hold is None else hold.grad
