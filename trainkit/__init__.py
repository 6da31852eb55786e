"""trainkit: gradient accumulation, layer freezing and mixed precision for your own PyTorch training loop."""

from trainkit.checkpointing import resumable
from trainkit.compose import train_step
from trainkit.freezing import freeze, frozen, frozen_parameters, trainable_parameters, unfreeze
from trainkit.history import History
from trainkit.microbatching import microbatch
from trainkit.notebooks import load_ipython_extension as load_ipython_extension
from trainkit.parts import accumulate, amp
from trainkit.recomputation import recompute
from trainkit.result import StepResult
from trainkit.step import Step
from trainkit.summary import model_summary

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
