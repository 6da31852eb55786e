"""trainkit: gradient accumulation, layer freezing and mixed precision for your own PyTorch loop."""

from trainkit.chunks.microbatching import microbatch
from trainkit.core.parts import accumulate, amp, train_step
from trainkit.core.result import StepResult
from trainkit.core.step import Step
from trainkit.layers.freezing import (
    freeze,
    frozen,
    frozen_parameters,
    trainable_parameters,
    unfreeze,
)
from trainkit.layers.recomputation import recompute
from trainkit.layers.summary import model_summary
from trainkit.saving.resumable import resumable
from trainkit.tools.notebooks import load_ipython_extension as load_ipython_extension
from trainkit.watch.history import History

__all__ = [
    "History",
    "Step",
    "StepResult",
    "accumulate",
    "amp",
    "freeze",
    "frozen",
    "frozen_parameters",
    "microbatch",
    "model_summary",
    "recompute",
    "resumable",
    "train_step",
    "trainable_parameters",
    "unfreeze",
]
__version__ = "0.1.0"  # setup.cfg reads it here


def __dir__() -> list[str]:
    return __all__
