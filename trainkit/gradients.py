"""The gradients that an update is made of, from one micro-batch to the next."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from trainkit.plan import Plan


class Gradients:
    """What lies in ``.grad`` of the parameters that a plan knows."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        # One parameter of each optimizer, with the gradient that the last micro-batch left it, and its version.
        self._watched: list[tuple[nn.Parameter, Tensor | None, int]] = []

    def found(self) -> list[Tensor]:
        """Those that are there."""
        return [p.grad for p in self._plan.parameters() if p.grad is not None]

    def drop(self) -> None:
        """Sets all to None."""
        self._watched.clear()
        for parameter in self._plan.parameters():
            parameter.grad = None

    def watch(self) -> None:
        """Picks the parameters that ``remember`` and ``wiped`` look at: of each optimizer the first one with a gradient."""
        self._watched.clear()
        for parameters in self._plan.parameters_by_optimizer():
            self._watched += [(p, None, 0) for p in parameters if p.grad is not None][:1]
        self.remember()

    def remember(self) -> None:
        """Takes note of what a micro-batch left, for ``wiped``."""
        self._watched = [(p, p.grad, 0 if p.grad is None else p.grad._version) for p, _, _ in self._watched]

    def wiped(self) -> bool:
        """Whether gradients were set to None or to zero since ``remember``."""
        for parameter, left, version in self._watched:
            found = parameter.grad
            if found is left and (found is None or found._version == version):
                continue  # nobody touched it
            # Of a parameter that is frozen just now the gradient is set aside.
            if parameter.requires_grad if found is None else not found.any():
                return True
        return False

    def touched(self) -> bool:
        """Whether somebody else left gradients: where there were none, or in those that ``remember`` saw."""
        if not self._watched:
            return bool(self.found())
        return any(
            p.grad is not None and (p.grad is not left or p.grad._version != version) for p, left, version in self._watched
        )

    def state_dict(self) -> dict[int, Tensor]:
        """Copies, by the position of the parameter."""
        return {i: p.grad.clone() for i, p in enumerate(self._plan.parameters()) if p.grad is not None}

    def check_state_dict(self, state: Mapping[int, Tensor]) -> None:
        """Raises ValueError where gradients of a state do not fit the parameters."""
        parameters = dict(enumerate(self._plan.parameters()))
        for i, gradient in state.items():
            shape = tuple(parameters[i].shape) if i in parameters else None
            if shape != tuple(gradient.shape):
                raise ValueError(
                    f"the state has a gradient of shape {tuple(gradient.shape)} for parameter {i}, whose shape here is {shape}: "
                    "build model and optimizer as they were when the state was taken"
                )

    def load_state_dict(self, state: Mapping[int, Tensor]) -> None:
        """Puts copies in place; None where the state has nothing."""
        for i, parameter in enumerate(self._plan.parameters()):
            parameter.grad = state[i].to(parameter.device, copy=True) if i in state else None
        self.watch()
