"""Backward, without what costs as much as a small layer does."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    # All that is left of Tensor.backward where the seed is known to fit the loss. What it checks and carries over to the threads
    # of devices takes 15 us, as long as backward through two small layers.
    from torch.autograd import Variable
    from torch.autograd.graph import _engine_run_backward

    _run_in_this_thread = Variable._execution_engine.run_backward
except (ImportError, AttributeError):
    _engine_run_backward = None  # type: ignore[assignment]


def run_backward(loss: Tensor, seed: Tensor, device_type: str) -> None:
    """``loss.backward(gradient=seed)``, with autocast for ``device_type`` off."""
    if torch.is_autocast_enabled(device_type):  # in a block by hand, or around the whole loop
        with torch.autocast(device_type, enabled=False):
            run_backward(loss, seed, device_type)
        # Its cache would serve the old weights to every forward after they have moved.
        torch.clear_autocast_cache()
    elif _engine_run_backward is None or type(loss) is not Tensor:
        loss.backward(gradient=seed)  # type: ignore[no-untyped-call]
    else:
        run = _run_in_this_thread if loss.is_cpu else _engine_run_backward
        run((loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def explain(error: BaseException) -> None:
    """Adds to an error of backward what it comes from as a rule, in a step; torch's own advice is for other loops."""
    for said, remedy in _REMEDIES.items():
        if isinstance(error, RuntimeError) and said in str(error):
            error.args = (f"{error}\n{remedy}",)


_REMEDIES = {
    "backward through the graph a second time": "In a step function: the step runs backward of its loss, so remove "
    "`loss.backward()`; a further loss goes to `step.backward(loss)`, before the one that is returned or yielded.",
    "modified by an inplace operation": "In a step function: the step updates after backward, so remove `optimizer.step()`, or "
    "put it below the yield.",
}
