"""``accumulate(n, dtype=torch.float32)``: sums of half-precision gradients, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainkit.core.plan import check
from trainkit.core.window import Weight, Window


class WideWindow(Window):
    """A window in which autograd adds up half-precision gradients in float32, rounded once.

    In bfloat16 a sum of 256 equal gradients no longer grows. Nothing is divided before it is
    summed, since a third would be rounded. A scaled sum in float32 may be too large for float16:
    there no fused kernel divides it, and the true sum is rounded.
    """

    def __init__(self, length: float, reference: Weight | None, is_sum: bool = False) -> None:
        check(
            hasattr(torch.Tensor, "grad_dtype"),
            ValueError,
            "accumulate(dtype=torch.float32) needs a torch whose tensors have `grad_dtype`: keep "
            "parameters in float32, `model.float()`, and compute in half, `amp()`",
        )
        super().__init__(length, reference, is_sum)
        self.parts = 1

    def lend(self, parameters: list[nn.Parameter]) -> None:
        """Lend the sums. Until they are taken, gradients of these parameters are float32."""
        self.can_fuse = all(p.dtype != torch.float16 for p in parameters)
        for p in filter(_is_half, parameters):
            if p.requires_grad and (p.grad is None or p.grad.dtype != torch.float32):
                p.grad = None
                p.grad_dtype = torch.float32
        super().lend(parameters)

    def dtype_of(self, parameter: nn.Parameter) -> torch.dtype:
        """Return the dtype of the sum of a parameter's gradients."""
        return torch.float32 if _is_half(parameter) else parameter.dtype

    def take(self) -> None:
        """Take the sums, and let other gradients have their own dtype again."""
        super().take()
        _restore(self.parameters)

    def narrow(self) -> None:
        """Round the sums to the dtype of their parameters, which optimizers require."""
        for p in filter(_is_half, self.parameters):
            if p.grad is not None:
                gradient, p.grad = p.grad.to(p.dtype), None
                p.grad_dtype = None  # any: its own would stay if the model is cast later
                p.grad = gradient

    def drop(self) -> None:
        """Forget the sums, and let other gradients have their own dtype again."""
        parameters = self.parameters
        super().drop()
        _restore(parameters)


def _restore(parameters: list[nn.Parameter]) -> None:
    for p in filter(_is_half, parameters):
        if p.grad is None:
            p.grad_dtype = None


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)
