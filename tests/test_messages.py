"""Everything that trainkit says to its user, word for word, and the line that it points at.

To be read as a page: by what the user calls, each message with what brings it about. In the texts, PATH is the folder of the
checkpoints, and ADDRESS what ``repr`` gives. From the line of the user three calls or fewer lead to the one that raises, so that
it is among the last four of a traceback. A number says how many there are elsewhere: in the update, in loops over loaders, in
values within values, and with PyTorch in between.
"""

import ast
import contextlib
import functools
import json
import math
import pickle
import re
import runpy
import sys
import tempfile
import traceback
import types
import warnings
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import trainkit
from trainkit import (
    Step,
    accumulate,
    amp,
    freeze,
    frozen,
    frozen_parameters,
    microbatch,
    recompute,
    resumable,
    train_step,
    trainable_parameters,
    unfreeze,
)
from trainkit.saving.storage import _hash, _write_manifest
from trainkit.tools.lift import lift

HERE, PACKAGE = Path(__file__), Path(trainkit.__file__).parent


class Block(nn.Linear):
    """A layer that may be given a cache."""

    def forward(self, x, cache=None):
        return super().forward(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Linear(2, 2)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList([Block(2, 2), Block(2, 2)])
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        for layer in (self.embeddings, *self.encoder.layer, self.head):
            x = layer(x)
        return x


class World:
    """What a user has, in the folder of a run."""

    def __init__(self, path):
        torch.manual_seed(0)
        self.path, self.x = path, torch.ones(4, 2)
        self.model = Net()
        self.optimizer = SGD(self.model.parameters(), lr=0.1)
        self.by_hand = train_step(self.optimizer, accumulate(2))
        self.step = self.by_hand(self.loss_of)

    def loss_of(self, x):
        return self.model(x).square().mean()

    def loss(self):
        return self.loss_of(self.x)

    def returning(self, wrap):
        """A call of a step that returns, in place of its loss, what ``wrap`` makes of it."""
        return train_step(self.optimizer)(lambda: wrap(self.loss()))()

    def weighing(self, weight):
        return self.returning(lambda loss: (loss, weight))

    def objects(self, **others):
        return {"model": self.model, "optimizer": self.optimizer, "step": self.step, **others}

    def resumable(self, **options):
        return resumable(self.path / "run", **{**self.objects(), **options})

    def train(self, loader, /, stop=math.inf, **options):
        """Over a loader, stopped after some batches, with a checkpoint after each."""
        with contextlib.suppress(Stopped), self.resumable(every=timedelta(0), **options):
            for i, x in enumerate(self.step.over(loader)):
                if i == stop:
                    raise Stopped
                self.step(x)

    def afresh(self):
        """The script run again."""
        return World(self.path)

    def set_manifest(self, **changes):
        file = self.path / "run" / "00000001" / "manifest.json"
        manifest = json.loads(file.read_bytes().partition(b"\n")[2])
        _write_manifest(file, {**manifest, **changes})


class Stopped(Exception):
    pass


@contextlib.contextmanager
def one_rank():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def generator_function():
    yield


# train_step, and what goes into it.

TRAIN_STEP = [
    (
        TypeError,
        "got 3 where an optimizer belongs: `train_step(optimizer, ...)` or `amp(optimizer, ...)`, with `optimizer = "
        "torch.optim.AdamW(model.parameters())`",
        lambda w: train_step(3),
    ),
    (
        TypeError,
        "got a module, of type Net, where an optimizer belongs: `train_step(optimizer, ...)` or `amp(optimizer, ...)`, "
        "with `optimizer = torch.optim.AdamW(model.parameters())`",
        lambda w: train_step(w.model),
    ),
    (
        TypeError,
        "got torch.float16 where an optimizer belongs: for the dtype of autocast, `amp(dtype=torch.float16)`",
        lambda w: amp(torch.float16),
    ),
    (
        TypeError,
        "LBFGS.step needs a closure that evaluates the loss again, and a step function is called once: call "
        "`optimizer.step(closure)` yourself",
        lambda w: train_step(torch.optim.LBFGS(w.model.parameters())),
    ),
    (
        ValueError,
        "got no optimizer: `train_step(optimizer)`, or several as `train_step([optimizer_a, optimizer_b])`",
        lambda w: train_step([]),
    ),
    (
        ValueError,
        "the same optimizer was given twice, and would step twice: give each once, `train_step([optimizer_a, optimizer_b])`",
        lambda w: train_step([w.optimizer, w.optimizer]),
    ),
    (
        ValueError,
        "optimizers were given twice; give them together: `train_step([optimizer_a, optimizer_b], ...)`",
        lambda w: train_step(w.optimizer, amp(w.optimizer)),
    ),
    (
        ValueError,
        "amp was given twice, and a step runs in one precision: leave out one of the two",
        lambda w: train_step(w.optimizer, amp(), amp(dtype=torch.float16)),
    ),
    (
        ValueError,
        "max_norm was given twice, 2.0 and 1.0: leave out one of the two",
        lambda w: train_step(w.optimizer, amp(max_norm=1.0), max_norm=2.0),
    ),
    (
        ValueError,
        "norm_type was given twice, inf and 1.0: leave out one of the two",
        lambda w: train_step(w.optimizer, amp(norm_type=1), norm_type=math.inf),
    ),
    (
        ValueError,
        "max_skips was given twice, 4 and 3: leave out one of the two",
        lambda w: train_step(w.optimizer, amp(max_skips=3), max_skips=4),
    ),
    (
        ValueError,
        "microbatch was given twice, 2 and 'auto': leave out one of the two",
        lambda w: train_step(w.optimizer, microbatch(2), microbatch("auto")),
    ),
    (
        TypeError,
        "module must be the torch.nn.Module to be trained, got an object of type int: `module=model`",
        lambda w: train_step(w.optimizer, module=3),
    ),
    (
        TypeError,
        "module must be the torch.nn.Module to be trained, got an object of type SGD: optimizers go to "
        "`train_step(optimizer, ...)`",
        lambda w: train_step(w.optimizer, module=w.optimizer),
    ),
    (
        TypeError,
        "max_norm must be a number, got '1.0': `max_norm=1.0`",
        lambda w: train_step(w.optimizer, max_norm="1.0"),
    ),
    (
        ValueError,
        "max_norm must be above 0 and in the range of float32, got 0: `max_norm=1.0` clips, `math.inf` only checks for "
        "finite gradients",
        lambda w: train_step(w.optimizer, max_norm=0),
    ),
    (
        TypeError,
        "norm_type must be a number, got None: `norm_type=2.0`",
        lambda w: train_step(w.optimizer, max_norm=1.0, norm_type=None),
    ),
    (
        ValueError,
        "norm_type must be 1, 2 or math.inf, got 3: `norm_type=2.0`; 0 would miss a nan, and large ones overflow",
        lambda w: train_step(w.optimizer, max_norm=1.0, norm_type=3),
    ),
    (
        TypeError,
        "max_skips counts updates, an int or math.inf, got 0.5: `max_skips=25`",
        lambda w: train_step(w.optimizer, max_skips=0.5),
    ),
    (
        ValueError,
        "max_skips must be at least 1, got 0: `max_skips=25`, or `math.inf` to go on for ever",
        lambda w: train_step(w.optimizer, max_skips=0),
    ),
    (
        TypeError,
        "after takes callables without arguments, got 3: `after=scheduler.step`",
        lambda w: train_step(w.optimizer, after=3),
    ),
    (
        TypeError,
        "ReduceLROnPlateau.step needs a metric: call `scheduler.step(metric)` after each evaluation yourself",
        lambda w: train_step(w.optimizer, after=ReduceLROnPlateau(w.optimizer).step),
    ),
    (
        TypeError,
        "4 is not a part; for windows of 4 micro-batches: `accumulate(4)`",
        lambda w: train_step(w.optimizer, 4),
    ),
    (
        TypeError,
        "Net is not a part; a module goes by name: `train_step(optimizer, module=model)`",
        lambda w: train_step(w.optimizer, w.model),
    ),
    (
        TypeError,
        "SGD is not a part; several optimizers go in one list: `train_step([optimizer_a, optimizer_b])`",
        lambda w: train_step(w.optimizer, w.optimizer),
    ),
    (
        TypeError,
        "<torch.optim.lr_scheduler.StepLR object at ADDRESS> is not a part; a scheduler's step goes by name: "
        "`train_step(optimizer, after=scheduler.step)`",
        lambda w: train_step(w.optimizer, StepLR(w.optimizer, 1)),
    ),
    (
        TypeError,
        "1.0 is not a part; gradients are clipped by `train_step(optimizer, max_norm=1.0)`",
        lambda w: train_step(w.optimizer, 1.0),
    ),
    (
        TypeError,
        "[accumulate(2), amp(dtype=None)] is not a part; they stand one by one: `train_step(optimizer, accumulate(4), amp())`, "
        "or `train_step(optimizer, *parts)`",
        lambda w: train_step(w.optimizer, [accumulate(2), amp()]),
    ),
    (
        TypeError,
        "<function amp at ADDRESS> is not a part; it makes one: `amp(...)`",
        lambda w: train_step(w.optimizer, amp),
    ),
    (
        TypeError,
        "<built-in function print> is not a part; what is called after each update goes by name: "
        "`train_step(optimizer, after=scheduler.step)`",
        lambda w: train_step(w.optimizer, print),
    ),
    (
        TypeError,
        "'amp' is not a part; parts are `accumulate(4)`, `amp()`, `frozen(module)`",
        lambda w: train_step(w.optimizer, "amp"),
    ),
    (
        TypeError,
        "only functions are decorated, got 3; parts go together in `train_step(optimizer, a, b)`",
        lambda w: train_step(w.optimizer)(3),
    ),
    (
        TypeError,
        "only functions are decorated, got amp(dtype=None); parts go together in `train_step(optimizer, a, b)`",
        lambda w: train_step(w.optimizer)(amp()),
    ),
    (
        TypeError,
        "this step has no function yet, and was called with something else: decorate one, "
        "`step = train_step(optimizer, ...)(function)`, or give it the loss by hand, `with step: step.backward(loss)`",
        lambda w: train_step(w.optimizer)(w.x, w.x),
    ),
    (
        TypeError,
        "steps are made by `train_step(optimizer)(function)`, and not of 3 and None",
        lambda w: Step(3),
    ),
    (
        TypeError,
        "the method 'loss' of the class Experiment was decorated, and all instances would share one state: leave the "
        "method as it is and write `self.step = train_step(...)(self.loss)` in __init__",
        lambda w: decorated_method(w),
    ),
]


def without_a_number():
    @accumulate
    def step(x, y):
        return x


def decorated_method(w):
    class Experiment:
        @train_step(w.optimizer)
        def loss(self):
            return w.loss()

    Experiment().loss()


# accumulate

ACCUMULATE = [
    (
        TypeError,
        "accumulate takes a number, or a function of the number of updates, got 'step', which takes something else: a step "
        "function is decorated by `@accumulate(4)`",
        lambda w: without_a_number(),
    ),
    (
        TypeError,
        "accumulate got 0.5; n counts the micro-batches of a window, an int: `accumulate(4)`",
        lambda w: accumulate(0.5),
    ),
    (
        ValueError,
        "accumulate got 0; a window has at least one micro-batch: `accumulate(1)` changes nothing",
        lambda w: accumulate(0),
    ),
    (
        ValueError,
        "accumulate got a number of 1329 bits; a window that ends only with its loader is `accumulate(sys.maxsize)`",
        lambda w: accumulate(10**400),
    ),
    (
        TypeError,
        "<lambda> returned 2.0; n counts the micro-batches of a window, an int: `accumulate(4)`",
        lambda w: train_step(w.optimizer, accumulate(lambda updates: 2.0))(w.loss)(),
        6,
    ),
    (
        TypeError,
        "module must be the torch.nn.Module to be trained, got an object of type SGD: optimizers go to "
        "`train_step(optimizer, ...)`",
        lambda w: accumulate(4, w.optimizer),
    ),
    (
        ValueError,
        "gradients are summed in torch.float32, or for None in their own dtype, got torch.float64: `accumulate(4, "
        "dtype=torch.float32)`",
        lambda w: accumulate(4, dtype=torch.float64),
    ),
    (
        ValueError,
        "nothing in this plan knows the parameters: give an optimizer, `train_step(optimizer, ...)` or `amp(optimizer)`, "
        "or the module, `accumulate(4, module=model)`",
        lambda w: accumulate(4)(generator_function)(),
        4,
    ),
    (
        ValueError,
        "a step function that returns its loss leaves the update to trainkit, and no optimizer was given: decorate it "
        "with `train_step(optimizer, ...)`, or `yield loss` and go on with your own update",
        lambda w: accumulate(4, w.model)(w.loss)(),
    ),
    (
        ValueError,
        "accumulate(dtype=torch.float32) is for one process, and for a torch whose tensors have a `grad_dtype`: keep "
        "parameters in float32, `model.float()`, and compute in half precision, `amp(dtype=torch.bfloat16)`",
        lambda w: sums_with_ddp(w),
        4,
    ),
]


def sums_with_ddp(w):
    with one_rank():
        train_step(
            w.optimizer, accumulate(4, dtype=torch.float32), module=DistributedDataParallel(w.model)
        )(w.loss)()


# amp

AMP = [
    (
        ValueError,
        "dtype must be torch.bfloat16, torch.float16 or torch.float32, got torch.float64: `amp(dtype=torch.float16)`",
        lambda w: amp(dtype=torch.float64),
    ),
    (
        ValueError,
        "device must be a type of device that has autocast, got 'gpu': `amp(device='cuda')`",
        lambda w: amp(device="gpu"),
    ),
    (
        ValueError,
        "device must be a type of device that has autocast, got 'meta': `amp(device='cuda')`",
        lambda w: amp(device="meta"),
    ),
    (
        ValueError,
        "init_scale must be a finite float32 above 0, got 0: `amp(init_scale=65536.0)`",
        lambda w: amp(init_scale=0),
    ),
    (
        ValueError,
        "growth_interval counts updates, an int32 >= 1, got 0.5: `amp(growth_interval=2000)`",
        lambda w: amp(growth_interval=0.5),
    ),
    (
        ValueError,
        "8 of 8 parameters are float16 themselves (first of shape (2, 2)), and their gradients cannot be unscaled; amp "
        "keeps parameters in float32 and casts in forward: load the model with `dtype=torch.float32`, or call "
        "`model.float()` before the optimizer is made",
        lambda w: float16_parameters(w),
        4,
    ),
]


def float16_parameters(w):
    w.model.half()
    amp(w.optimizer, dtype=torch.float16)(lambda: w.model.head.weight.float().sum())()


# frozen, freeze, unfreeze, frozen_parameters, trainable_parameters: the layers

FREEZING = [
    (
        TypeError,
        "frozen takes a torch.nn.Module, got an object of type str: `frozen(model, 'embeddings')`",
        lambda w: frozen("embeddings"),
    ),
    (
        TypeError,
        "freeze takes a torch.nn.Module, got an object of type SGD: `freeze(model, 'embeddings')`",
        lambda w: freeze(w.optimizer),
    ),
    (
        TypeError,
        "unfreeze takes a torch.nn.Module, got an object of type int: `unfreeze(model, 'embeddings')`",
        lambda w: unfreeze(3),
    ),
    (
        TypeError,
        "frozen_parameters takes a torch.nn.Module, got an object of type list: `frozen_parameters(model)`",
        lambda w: frozen_parameters([w.model]),
    ),
    (
        TypeError,
        "trainable_parameters takes a torch.nn.Module, got an object of type NoneType: `trainable_parameters(model)`",
        lambda w: trainable_parameters(None),
    ),
    (
        TypeError,
        "layers are patterns, submodules, parameters or a predicate, got None: `'**'` is all, `[]` nothing",
        lambda w: freeze(w.model, None),
    ),
    (
        TypeError,
        "a layer is a pattern, a submodule, a parameter or a predicate, got 3: `model.head`",
        lambda w: freeze(w.model, ["head", 3]),
    ),
    (
        TypeError,
        "eval_mode is True or False, got 'yes': `frozen(model, layers, eval_mode=True)`",
        lambda w: frozen(w.model, eval_mode="yes"),
    ),
    (
        TypeError,
        "the predicate given for layers answers for 'embeddings.weight' with an object of type Tensor, which is neither "
        "yes nor no: `lambda name, parameter: parameter.ndim == 1`",
        lambda w: freeze(w.model, lambda name, parameter: parameter > 0),
        5,
    ),
    (
        ValueError,
        "the predicate given for layers is true for no parameter; `[]` means nothing",
        lambda w: freeze(w.model, lambda name, parameter: False),
    ),
    (
        ValueError,
        "the Linear is not in the Net: give a part of it, `model.head`",
        lambda w: freeze(w.model, nn.Linear(2, 2)),
    ),
    (
        ValueError,
        "the pattern 'encoder.layer[0:x]' cannot be read at 'layer[0:x]'; it is made of names, `*`, `**` and indices, "
        "with dots between: 'encoder.layer[:2].attention', '**.bias'",
        lambda w: freeze(w.model, "encoder.layer[0:x]"),
        4,
    ),
    (
        ValueError,
        "the pattern 'layer[0]' matches nothing in the Net; did you mean '**.layer[0]'?",
        lambda w: freeze(w.model, "layer[0]"),
    ),
    (
        ValueError,
        "the pattern 'Encoder.layers' matches nothing in the Net; the nearest names are 'encoder.layer', "
        "'encoder.layer.1', 'encoder.layer.0'",
        lambda w: freeze(w.model, "Encoder.layers"),
    ),
    (
        ValueError,
        "the pattern '**.wieght' matches nothing in the Net; the nearest names are '**.weight'",
        lambda w: freeze(w.model, "**.wieght"),
    ),
    (
        ValueError,
        "the pattern 'decoder' matches nothing in the Net; the nearest names are 'encoder', 'encoder.layer', 'encoder.layer.1'",
        lambda w: freeze(w.model, "decoder"),
    ),
    (
        TypeError,
        "frozen decorates functions, got 3: `with frozen(model, layers):`",
        lambda w: frozen(w.model)(3),
    ),
    (
        TypeError,
        "frozen decorates functions, got amp(dtype=None): `with frozen(model, layers):`",
        lambda w: frozen(w.model)(amp()),
    ),
    (
        TypeError,
        "<function generator_function at ADDRESS> only starts to run after its call, and would do so outside of the "
        "frozen block: hand frozen over as a part, `train_step(optimizer, frozen(model, layers))`",
        lambda w: frozen(w.model)(generator_function),
    ),
    (
        TypeError,
        "<function <lambda>.<locals>.<lambda> at ADDRESS> only starts to run after its call, and would do so outside of "
        "the frozen block: hand frozen over as a part, `train_step(optimizer, frozen(model, layers))`",
        lambda w: frozen(w.model)(lambda: generator_function())(),
    ),
]

# microbatch

MICROBATCH = [
    (
        TypeError,
        "size counts the rows of a chunk, an int, or is 'auto'; got 0.5: `microbatch(8)`",
        lambda w: microbatch(0.5),
    ),
    (ValueError, "a chunk has at least one row, got 0: `microbatch(8)`", lambda w: microbatch(0)),
    (
        ValueError,
        "microbatch found no tensor to cut in ['int', 'str']; it cuts tensors along their first dimension, also in "
        "tuples, lists and mappings: `step(inputs, targets)`",
        lambda w: train_step(w.optimizer, microbatch(2))(w.loss_of)(3, name="x"),
    ),
    (
        ValueError,
        "microbatch cuts tensors along their first dimension, and these differ in it: [(4, 2), (3,)]; bind what is no "
        "part of the batch beforehand, `functools.partial(function, table=table)`",
        lambda w: train_step(w.optimizer, microbatch(2))(w.loss_of)(w.x, torch.ones(3)),
    ),
    (
        ValueError,
        "microbatch cuts the arguments of a step function, and a block by hand has none: decorate a function, "
        "`train_step(optimizer, microbatch(8))(function)`",
        lambda w: microbatch_by_hand(w),
    ),
    (
        ValueError,
        "microbatch('auto') where every forward or backward needs all ranks, as under FSDP, with a static graph or with "
        "SyncBatchNorm: one that runs out of memory and tries again leaves the others waiting. Give a number, "
        "`microbatch(8)`",
        lambda w: auto_where_ranks_wait(w),
    ),
    (
        UserWarning,
        "memory ran out with 4 rows of 2 numbers, and microbatch('auto') goes on with 2; what it finds is in "
        "`step.chunk_sizes`, and is said only once",
        lambda w: memory_for(2)(w)(w.x),
    ),
    (
        UserWarning,
        "memory ran out with 4 rows of 2 numbers, and microbatch('auto') goes on with 2; what it finds is in "
        "`step.chunk_sizes`, and is said only once",
        lambda w: memory_for(2)(w).last(w.x),
    ),
    (
        torch.OutOfMemoryError,
        "CUDA out of memory. Tried to allocate 4 GiB.\n"
        "A single row does not fit into memory. What makes it smaller: shorter rows; activation checkpointing; freezing "
        "the lower layers, `freeze(model, layers)`; half precision, `amp()`",
        lambda w: memory_for(0)(w)(w.x[:1]),
    ),
]


def microbatch_by_hand(w):
    with train_step(w.optimizer, microbatch(2)) as step:
        step.backward(w.loss())


def auto_where_ranks_wait(w):
    w.model.norm = nn.SyncBatchNorm(2)
    train_step(w.optimizer, microbatch("auto"), module=w.model)(w.loss_of)(w.x)


def memory_for(rows):
    def loss_of(w, x):
        if len(x) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB.")
        return w.loss_of(x)

    return lambda w: train_step(w.optimizer, microbatch("auto"))(functools.partial(loss_of, w))


# recompute

RECOMPUTE = [
    (
        TypeError,
        "recompute takes a torch.nn.Module, got an object of type str: `recompute(model, 'encoder.layer')`",
        lambda w: recompute("encoder", "layer"),
    ),
    (
        ValueError,
        "'**.bias' means no module with a forward in the Net, and only these can be run again: name the blocks, "
        "`recompute(model, 'encoder.layer')`",
        lambda w: recompute(w.model, "**.bias"),
    ),
    (
        TypeError,
        "recompute decorates functions that run when they are called, got <function generator_function at ADDRESS>: hand "
        "it over as a part, `train_step(optimizer, recompute(model, layers))`, or `with recompute(model, layers):`",
        lambda w: recompute(w.model, "head")(generator_function),
    ),
    (
        ValueError,
        "a recomputed Block was given a key-value cache, and would write to it again in backward: `model(..., use_cache=False)`",
        lambda w: recomputed_with_cache(w),
    ),
    (
        RuntimeError,
        "parameters of a recomputed Linear were changed between its forward and its backward, which runs the forward "
        "again: update after the last backward, or leave this layer out of `recompute`",
        lambda w: updated_before_backward(w),
        math.inf,
    ),
]


def recomputed_with_cache(w):
    with recompute(w.model, "encoder.layer"):
        w.model.encoder.layer[0](w.x, types.SimpleNamespace(get_seq_length=int))


def updated_before_backward(w):
    with recompute(w.model, "embeddings"):
        early = w.model.embeddings(w.x).sum()
        w.loss().backward()
        w.optimizer.step()
        early.backward()


# A call of a step: what its function returns or yields

CALLS = [
    (
        TypeError,
        "a step function hands over the loss of one micro-batch, and not 0.14202767610549927 (float): return (or yield) "
        "`loss`, `loss, weight`, `{'loss': loss, 'weight': weight}`, or a model's output that has a loss",
        lambda w: w.returning(lambda loss: loss.item()),
    ),
    (
        TypeError,
        "a step function hands over the loss of one micro-batch, and not None (NoneType): return (or yield) `loss`, "
        "`loss, weight`, `{'loss': loss, 'weight': weight}`, or a model's output that has a loss (a model's output has a "
        "loss only when labels were given)",
        lambda w: w.returning(lambda loss: None),
    ),
    (
        TypeError,
        "a step function hands over the loss of one micro-batch, and not a tuple of 3: return (or yield) `loss`, `loss, "
        "weight`, `{'loss': loss, 'weight': weight}`, or a model's output that has a loss",
        lambda w: w.returning(lambda loss: (loss, 0.9, "logits")),
    ),
    (
        TypeError,
        "a step function hands over the loss of one micro-batch, and not {'logits': tensor([[1., 1., 1.], [1., 1., 1.]])}"
        " (dict): return (or yield) `loss`, `loss, weight`, `{'loss': loss, 'weight': weight}`, or a model's output that "
        "has a loss",
        lambda w: w.returning(lambda loss: {"logits": torch.ones(2, 3)}),
    ),
    (
        ValueError,
        "the loss must be a single number, but has shape (4, 1): `loss.mean()` over the micro-batch is what is averaged "
        "over the window",
        lambda w: w.returning(lambda loss: w.model(w.x)),
    ),
    (
        TypeError,
        "the loss is the first of two values, and this one came second: `return loss, weight`",
        lambda w: train_step(w.optimizer)(lambda: (4, w.loss()))(),
    ),
    (
        TypeError,
        "the second of two values is the weight: how many things (rows, tokens) the loss is the mean of, an int or an "
        "integer 0-d tensor; got a torch.float32 tensor on cpu. Return `loss, mask.sum()`; or, if this is a metric or a "
        "prediction, the loss alone; or, for a real-valued weight, `{'loss': loss, 'weight': weight}`",
        lambda w: w.returning(lambda loss: (torch.tensor(3), loss)),
    ),
    (
        TypeError,
        "the loss must be a floating-point tensor, but is torch.int64: the first of two values is the loss",
        lambda w: w.returning(lambda loss: torch.tensor(3)),
    ),
    (
        ValueError,
        "the loss has no graph, so nothing would be learned: return it without `.item()`, `.detach()` or "
        "`torch.no_grad()`, and check that not every parameter it depends on is frozen (a tied head is, with its "
        "embedding); under frozen layers, activation checkpointing needs `use_reentrant=False`",
        lambda w: w.returning(lambda loss: loss.detach()),
    ),
    (
        TypeError,
        "the second of two values is the weight: how many things (rows, tokens) the loss is the mean of, an int or an "
        "integer 0-d tensor; got 0.9 (float). Return `loss, mask.sum()`; or, if this is a metric or a prediction, the "
        "loss alone; or, for a real-valued weight, `{'loss': loss, 'weight': weight}`",
        lambda w: w.weighing(0.9),
    ),
    (
        TypeError,
        "the second of two values is the weight: how many things (rows, tokens) the loss is the mean of, an int or an "
        "integer 0-d tensor; got a tensor of shape (4, 3). Return `loss, mask.sum()`; or, if this is a metric or a "
        "prediction, the loss alone; or, for a real-valued weight, `{'loss': loss, 'weight': weight}`",
        lambda w: w.weighing(torch.ones(4, 3)),
    ),
    (
        TypeError,
        "the second of two values is the weight: how many things (rows, tokens) the loss is the mean of, an int or an "
        "integer 0-d tensor; got a torch.float32 tensor on cpu. Return `loss, mask.sum()`; or, if this is a metric or a "
        "prediction, the loss alone; or, for a real-valued weight, `{'loss': loss, 'weight': weight}`",
        lambda w: w.weighing(torch.tensor(0.9)),
    ),
    (
        ValueError,
        "a weight says how many things the loss is the mean of; it must be finite and >= 0, got -1: `len(batch)`",
        lambda w: w.weighing(-1),
    ),
    (
        ValueError,
        "a weight says how many things the loss is the mean of; it must be finite and >= 0, got nan: `len(batch)`",
        lambda w: w.returning(lambda loss: {"loss": loss, "weight": math.nan}),
    ),
    (
        TypeError,
        "a loss came with a weight into a window whose losses so far (1) came without one; the mean over both is not "
        "defined: give a weight with every loss of a window, `return loss, weight`, or with none",
        lambda w: weight_now_and_then(w),
        4,
    ),
    (
        ValueError,
        "`after` was given to a step function that yields its loss; it has its own update code, and the call belongs "
        "there, below the yield",
        lambda w: yielding_with_after(w),
    ),
    (
        TypeError,
        "this generator function ended without a loss: put `yield loss` where `loss.backward()` stood",
        lambda w: yielding(w, lambda: iter(())),
    ),
    (
        RuntimeError,
        "autocast, no_grad or inference_mode is still on at the yield, and would be for backward and the update: end that"
        " `with` block above `yield loss`",
        lambda w: yielding(w, lambda: in_no_grad(w)),
    ),
    (
        ValueError,
        "this step function yielded twice; a loss is yielded once, further ones go to `step.backward(loss)`",
        lambda w: yielding(w, lambda: iter((w.loss(), w.loss()))),
        4,
    ),
    (
        RuntimeError,
        "this step is under way already and cannot be entered from within; for a further loss of the same micro-batch "
        "call `step.backward(loss)`",
        lambda w: within_itself(w),
    ),
    (
        RuntimeError,
        "an open window has lost the gradients of its 1 micro-batch(es): something like `optimizer.zero_grad()` runs for "
        "every micro-batch; move it below the yield, or remove it from a step that returns its loss. (`freeze`, and two "
        "steps over the same parameters, do this too.)",
        lambda w: wiped(w),
    ),
    (
        RuntimeError,
        "the gradients of an open window of 1 micro-batch(es) were changed from outside, as by the backward of another "
        "loss: freeze these parameters meanwhile, `with frozen(model):` or `train_step(other_optimizer, frozen(model))`; "
        "a further loss of this step goes to `step.backward(loss)`",
        lambda w: changed(w),
    ),
    (
        ValueError,
        "parameters have post-accumulate-gradient hooks, as for an optimizer that steps within backward: these see "
        "gradients that are scaled and incomplete. Remove them, `handle.remove()`, and leave the update to the step; "
        "hooks that only look are those of `parameter.register_hook`",
        lambda w: hooked(w),
        4,
    ),
    (
        ValueError,
        "max_skips counts gradients that are not finite, and nothing here looks: add `max_norm=math.inf`",
        lambda w: train_step(w.optimizer, max_skips=3)(w.loss)(),
        4,
    ),
    (
        FloatingPointError,
        "3 updates in a row were skipped, because gradients are not finite: those of 8 of 8 parameters, first params[0] "
        "of param_groups[0] of SGD with shape (2, 2), params[1] of param_groups[0] of SGD with shape (2,), params[2] of "
        "param_groups[0] of SGD with shape (2, 2). The last good update was number 1, and the parameters are as it left "
        "them. Look at the loss and the data of these windows, or go back to a checkpoint with a lower learning rate; "
        "`max_skips=math.inf` goes on for ever",
        lambda w: skipping(w, max_norm=1.0),
        4,
    ),
    (
        FloatingPointError,
        "3 updates in a row were skipped, because gradients are not finite: those of 8 of 8 parameters, first "
        "'embeddings.weight', 'embeddings.bias', 'encoder.layer.0.weight'. The last good update was number 1, and the "
        "parameters are as it left them; the loss scale is 128. Look at the loss and the data of these windows, or go "
        "back to a checkpoint with a lower learning rate; `max_skips=math.inf` goes on for ever",
        lambda w: skipping(w, amp(dtype=torch.float16, init_scale=1024.0), module=w.model),
        4,
    ),
    (
        ValueError,
        "2 of 8 parameters came to fused SGD with momentum and dampening=0.5 after its first step, which its kernel "
        "cannot take: make it with `fused=False`",
        lambda w: joining_late(w),
        5,
    ),
    (
        UserWarning,
        "none of 8 trainable parameters got a gradient, and nothing is learned: the loss is of other ones, as where a model was "
        "copied or made again after its optimizer; make the optimizer last",
        lambda w: train_step(w.optimizer)(lambda: Net()(w.x).sum())(),
    ),
    (
        UserWarning,
        "only 2 of 8 trainable parameters got a gradient in the first window; if layers below the others are frozen, this"
        " is what reentrant activation checkpointing does: use `use_reentrant=False`",
        lambda w: train_step(w.optimizer)(lambda: w.model.head(w.x).sum())(),
    ),
    (
        ValueError,
        "2 of 8 parameters became trainable after DistributedDataParallel was made, and it never synchronises them (first"
        " 'head.weight'): unfreeze before it, `unfreeze(model, layers)`, `DistributedDataParallel(model)`",
        lambda w: unfrozen_under_ddp(w),
        6,
    ),
    (
        ValueError,
        "2 of 8 parameters were frozen after DistributedDataParallel was made, which waits for their gradients (first "
        "'head.weight'): freeze before it, `freeze(model, layers)`, `DistributedDataParallel(model)`; or freeze all of "
        "it; or wrap with `find_unused_parameters=True`",
        lambda w: frozen_under_ddp(w),
        6,
    ),
    (
        RuntimeError,
        "a further loss of the last micro-batch of a window, after the backward that DistributedDataParallel reduces the "
        "gradients in: add the losses, `step.backward(loss + further)`, or call the model again between the two",
        lambda w: further_under_ddp(w),
        4,
    ),
]


def weight_now_and_then(w):
    step = train_step(w.optimizer, accumulate(2))(
        lambda *weight: (w.loss(), *weight) if weight else w.loss()
    )
    step()
    step(3)


def yielding_with_after(w):
    @train_step(w.optimizer, after=print)
    def step():
        yield w.loss()

    step()


def yielding(w, losses):
    @accumulate(1, w.model)
    def step():
        yield from losses()

    step()


def in_no_grad(w):
    loss = w.loss()
    with torch.no_grad():
        yield loss


def within_itself(w):
    @train_step(w.optimizer)
    def step():
        step()

    step()


def wiped(w):
    for _ in range(2):
        w.optimizer.zero_grad()
        w.step(w.x)


def changed(w):
    w.step(w.x)
    w.loss().backward()
    w.step(w.x)


def hooked(w):
    w.model.head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    w.step(w.x)


def skipping(w, *parts, **options):
    step = train_step(w.optimizer, *parts, max_skips=3, **options)(lambda factor: w.loss() * factor)
    step(1.0)
    for _ in range(3):
        step(math.nan)


def joining_late(w):
    optimizer = SGD(w.model.parameters(), lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    step = train_step(optimizer)(w.loss)
    with frozen(w.model, "head"):
        step()
    step()


def under_ddp(w, losses=lambda loss: loss):
    wrapped = DistributedDataParallel(w.model)
    return train_step(w.optimizer, module=wrapped)(lambda: losses(wrapped(w.x).square().mean()))


def unfrozen_under_ddp(w):
    freeze(w.model, "head")
    with one_rank():
        step = under_ddp(w)
        unfreeze(w.model)
        step()


def frozen_under_ddp(w):
    with one_rank():
        step = under_ddp(w)
        freeze(w.model, "head")
        step()


def further_under_ddp(w):
    with one_rank():
        step = under_ddp(w, lambda loss: step.backward(loss) or loss)
        step()


# By hand: `with step`, step.backward

BY_HAND = [
    (
        RuntimeError,
        "step.backward(loss) must be called inside a micro-batch: within `with step:` or the step function",
        lambda w: w.by_hand.backward(w.loss()),
    ),
    (
        RuntimeError,
        "step.backward(loss) below the yield, where gradients are complete, true and clipped already: give a further loss"
        " above the yield, or add to the gradients yourself, `loss.backward()`",
        lambda w: backward_below_the_yield(w),
    ),
    (
        TypeError,
        "the losses of a micro-batch share one weight, but the first came with 3, this one with 4: give it with the "
        "first, `step.backward(first, weight)`",
        lambda w: two_weights(w),
    ),
    (
        UserWarning,
        "a micro-batch ended without a loss but left gradients, which the step does not count: call `step.backward(loss)`"
        " in place of `loss.backward()`",
        lambda w: loss_backward_in_the_block(w),
    ),
]


def backward_below_the_yield(w):
    @accumulate(1, w.model)
    def step():
        yield w.loss()
        step.backward(w.loss())

    step()


def two_weights(w):
    with w.by_hand:
        w.by_hand.backward(w.loss(), 3)
        w.by_hand.backward(w.loss(), 4)


def loss_backward_in_the_block(w):
    with w.by_hand:
        w.loss().backward()


# step.over

OVER = [
    (
        TypeError,
        "step.over takes what a loop can go over, got 3: `step.over(loader)`",
        lambda w: w.step.over(3),
    ),
    (
        TypeError,
        "step.over takes a loader and then steps, got <bound method World.loss of <test_messages.World object at "
        "ADDRESS>>: `step_d.over(loader, step_g)`",
        lambda w: w.step.over([w.x], w.loss),
    ),
    (
        UserWarning,
        "the last batch did not reach a step (or the loader ended before its length), and 1 micro-batch(es) wait in its "
        "open window: `step.discard()` drops them",
        lambda w: the_last_batch_is_left_out(w),
    ),
    (
        UserWarning,
        "several micro-batches came at the last batch of `step.over`, and each of them ends a window: let the loop over "
        "micro-batches be the one that goes through `step.over`",
        lambda w: several_at_the_last_batch(w),
    ),
]


def the_last_batch_is_left_out(w):
    for i, x in enumerate(w.step.over([w.x] * 4)):
        if i != 3:
            w.step(x)


def several_at_the_last_batch(w):
    for x in w.step.over([w.x]):
        w.step(x[:2])
        w.step(x[2:])


# state dicts

STATES = [
    (
        RuntimeError,
        "step.state_dict() within a micro-batch, which is half done: call it between two micro-batches",
        lambda w: state_within(w),
    ),
    (
        RuntimeError,
        "step.state_dict() in an open window under FSDP2, which keeps its gradients to itself until the window closes: "
        "call it between two windows, where `result.complete`",
        lambda w: state_under_fsdp2(w),
    ),
    (
        ValueError,
        "this is not the state of a step (KeyError('skipped')): give what `step.state_dict()` returned",
        lambda w: w.step.load_state_dict({"model": {}}),
    ),
    (
        ValueError,
        "this is not the state of a step (ValueError('not a number of updates: 0.5')): give what `step.state_dict()` returned",
        lambda w: w.step.load_state_dict(w.step.state_dict() | {"updates": 0.5}),
    ),
    (
        ValueError,
        "this is not the state of a step (ValueError('a loss scale of inf')): give what `step.state_dict()` returned",
        lambda w: w.step.load_state_dict(
            w.step.state_dict() | {"loss_scale": math.inf, "growth_tracker": 0}
        ),
    ),
    (
        ValueError,
        "this is not the state of a step (ValueError('a loss of None and a weight of 1')): give what `step.state_dict()` "
        "returned",
        lambda w: w.step.load_state_dict(open_window(w, losses=[None])),
    ),
    (
        ValueError,
        "this is not the state of a step (ValueError(\"a window of 1 losses with {'length': 1, 'parts': 2, 'reference': "
        "1.0, 'weighted': False, 'first_of_all': True, 'count': 1, 'batches': 1}, after one with the reference None\")): "
        "give what `step.state_dict()` returned",
        lambda w: w.step.load_state_dict(open_window(w, length=1)),
    ),
    (
        ValueError,
        "the state has a gradient of shape and dtype ((2, 2), torch.float32) for parameter 0, and here it is ((3, 2), "
        "torch.float32): build model and optimizer as they were when the state was taken",
        lambda w: other_gradients(w),
    ),
]


def state_within(w):
    with w.by_hand:
        w.by_hand.backward(w.loss())
        w.by_hand.state_dict()


def state_under_fsdp2(w):
    with one_rank():
        fully_shard(w.model, mesh=init_device_mesh("cpu", (1,)))
        step = train_step(w.optimizer, accumulate(2), module=w.model)(w.loss)
        step()
        step.state_dict()


def open_window(w, **changes):
    w.step(w.x)
    state = w.step.state_dict()
    return {**state, "window": {**state["window"], **changes}}


def other_gradients(w):
    state = open_window(w)
    w.model.embeddings.weight.data = torch.ones(3, 2)
    w.step.load_state_dict(state)


# resumable

RESUMABLE = [
    (
        TypeError,
        "every is a time or a number of updates, got 60.0: `every=timedelta(minutes=10)` or `every=1000`",
        lambda w: w.resumable(every=60.0),
    ),
    (
        ValueError,
        "every must be a time >= 0 or a number of updates >= 1, got 0: `every=1000`",
        lambda w: w.resumable(every=0),
    ),
    (
        TypeError,
        "keep is a number of checkpoints, got 2.0: `keep=2`",
        lambda w: w.resumable(keep=2.0),
    ),
    (
        ValueError,
        "keep=0 would leave no checkpoint: `keep=2` has one to fall back on",
        lambda w: w.resumable(keep=0),
    ),
    (
        ValueError,
        "no checkpoint can be written to HERE (Not a directory): give a path that can be written; to go on from what lies there,"
        " a copy of it, `shutil.copytree(old, new)`",
        lambda w: resumable(HERE, **w.objects()).__enter__(),
    ),
    (
        TypeError,
        "history is (1, 2), and has no state_dict and load_state_dict: objects are models, optimizers, schedulers, steps,"
        " generators of random numbers, lists, dicts and whatever has these two",
        lambda w: w.resumable(history=(1, 2)),
    ),
    (
        ValueError,
        "got model, optimizer, and no step, which knows the places between two micro-batches: `resumable(path, "
        "model=model, optimizer=optimizer, step=step)`",
        lambda w: resumable(w.path, model=w.model, optimizer=w.optimizer),
    ),
    (
        ValueError,
        "model is wrapped in FullyShardedDataParallel, whose state is of one number of ranks: wrap with FSDP2, "
        "`torch.distributed.fsdp.fully_shard(model)`",
        lambda w: of_fsdp1(w),
    ),
    (
        UserWarning,
        "the step changes what is not among the objects, and would not go on from where it was: SGD, 8 parameters; give "
        "it, `resumable(path, model=model, optimizer=optimizer, schedule=schedule, step=step)`",
        lambda w: resumable(w.path, step=w.step),
    ),
    (
        RuntimeError,
        "this block was entered before, and its objects are where it left them: make a new `resumable`",
        lambda w: entered_twice(w),
    ),
    (
        RuntimeError,
        "a step is in the block of another `resumable`: give all objects to one of them",
        lambda w: in_two_blocks(w),
    ),
    (
        TypeError,
        "run.epochs takes the number of epochs in all, got [1, 2]: `for epoch in run.epochs(3):`",
        lambda w: w.resumable().epochs([1, 2]),
    ),
    (
        RuntimeError,
        "run.epochs outside of its block, where nothing is saved: `with resumable(...) as run:`",
        lambda w: w.resumable().epochs(3),
    ),
    (
        RuntimeError,
        "two loops of `over` are under way at once, and only one of them could be found again: end the inner before the "
        "next batch of the outer, or loop over both loaders together, `step.over(zip(a, b), other_step)`",
        lambda w: two_loops(w),
    ),
    (
        ValueError,
        "the checkpoint PATH/run/00000001 is of model, optimizer, step, and the objects given are ema, model, optimizer, "
        "step: give the same names, or another path to begin anew",
        lambda w: (w.train([w.x]), w.resumable(ema=[]).__enter__()),
    ),
    (
        ValueError,
        "the checkpoint PATH/run/00000001 is of something else, since model.head.weight was float32[1, 2], and is "
        "float32[3, 2]: make the objects as they were, or give another path to begin anew",
        lambda w: (w.train([w.x]), other_model(w.afresh()).resumable().__enter__()),
    ),
    (
        ValueError,
        "the checkpoint was written in a pass over 8 batches, and the loader has 4 now: give the loader that it was "
        "written with, or another path to begin anew",
        lambda w: (w.train([w.x] * 8, stop=5), w.afresh().train([w.x] * 4)),
        4,
    ),
    (
        RuntimeError,
        "the checkpoint was written after 5 batches of this pass, and the loader has 2: give the loader that it was "
        "written with, or another path to begin anew",
        lambda w: (w.train(iter([w.x] * 8), stop=5), w.afresh().train(iter([w.x] * 2))),
    ),
    (
        ValueError,
        "the checkpoint was written in a pass over 'loader', and this one is over a loader that is no object: give the "
        "same objects, and the loader to `over`",
        lambda w: with_and_without_a_loader(w),
        4,
    ),
    (
        ValueError,
        "'data' is a part of the loader, and both it and `over` would find the place: leave it out of the objects; or "
        "give a loader with a state of its own, as torchdata's StatefulDataLoader, in its place",
        lambda w: a_part_of_the_loader(w),
        4,
    ),
    (
        UserWarning,
        "model.head.bias is not finite, and no checkpoint is written: the newest in PATH/run stays",
        lambda w: nan_at_the_end(w),
    ),
    (
        UserWarning,
        "model.embeddings.weight is not finite, and no checkpoint is written: the newest in PATH/run stays",
        lambda w: nan_between_two_batches(w),
    ),
    (
        TypeError,
        "history.0.loss is of type builtins.object, and a checkpoint holds no objects but numbers, strings, None, lists, "
        "tuples, sets, dicts, bytes, strided or COO tensors and NumPy arrays",
        lambda w: w.train([w.x], history=[{"loss": object()}]),
        13,
    ),
    (
        TypeError,
        "history.0 is of type Tagged and layout torch.strided, and a checkpoint holds only numbers, strings, None, "
        "lists, tuples, sets, dicts, bytes, strided or COO tensors and NumPy arrays",
        lambda w: w.train(
            [w.x], history=[torch.eye(2).as_subclass(type("Tagged", (torch.Tensor,), {}))]
        ),
        11,
    ),
    (
        UserWarning,
        "the checkpoint PATH/run/00000002 is damaged (manifest.json does not have the hash that it begins with); going on"
        " from PATH/run/00000001, the one before",
        lambda w: damaged(w, 2),
    ),
    (
        RuntimeError,
        "the checkpoint PATH/run/00000001 is damaged (manifest.json does not have the hash that it begins with), and "
        "there is no other: to begin anew, delete PATH/run or give another path",
        lambda w: damaged(w, 1),
    ),
    (
        ValueError,
        "PATH/run/00000001/manifest.json is of format 2, which this version of trainkit does not know: update trainkit, "
        "or give another path to begin anew",
        lambda w: (w.train([w.x]), w.set_manifest(format=2), w.afresh().resumable().__enter__()),
        4,
    ),
    (
        ValueError,
        "PATH/run/00000001/.metadata asks for builtins.print, which no checkpoint needs: it is not loaded",
        lambda w: forged(w),
        5,
    ),
]


def of_fsdp1(w):
    with one_rank():
        w.resumable(model=FullyShardedDataParallel(w.model, device_id=torch.device("cpu")))


def entered_twice(w):
    run = w.resumable()
    with run:
        pass
    with run:
        pass


def in_two_blocks(w):
    with w.resumable(), w.resumable():
        pass


def two_loops(w):
    other = train_step(w.optimizer)(w.loss_of)
    with w.resumable(other=other):
        for _ in zip(w.step.over([w.x] * 2), other.over([w.x] * 2), strict=True):
            pass


def other_model(w):
    w.model.head.weight.data = torch.ones(3, 2)
    return w


class StatefulLoader:
    def __iter__(self):
        return iter([torch.ones(4, 2)] * 4)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def with_and_without_a_loader(w):
    loader = StatefulLoader()
    w.train(loader, stop=2, loader=loader)
    w.afresh().train([w.x] * 4, loader=StatefulLoader())


def a_part_of_the_loader(w):
    data = StatefulLoader()
    w.train(types.SimpleNamespace(dataset=data, __iter__=None, __getitem__=None), data=data)


def nan_at_the_end(w):
    with w.resumable():
        for x in w.step.over([w.x]):
            w.step(x)
        w.model.head.bias.data.fill_(math.nan)


def nan_between_two_batches(w):
    with w.resumable(every=1):
        for x in w.step.over([w.x] * 2):
            w.step(x)
            w.model.head.bias.data.fill_(math.nan)
        w.model.head.bias.data.zero_()


def damaged(w, checkpoints):
    w.train([w.x] * checkpoints)
    (w.path / "run" / f"{checkpoints:08d}" / "manifest.json").write_text("a half")
    with w.afresh().resumable():
        pass


def forged(w):
    w.train([w.x])
    metadata = w.path / "run" / "00000001" / ".metadata"
    metadata.write_bytes(pickle.dumps(print))
    w.set_manifest(files={".metadata": _hash(metadata)})
    with w.afresh().resumable():
        pass


MESSAGES = {
    f"{group}-{i}": message
    for group, messages in {
        "train_step": TRAIN_STEP,
        "accumulate": ACCUMULATE,
        "amp": AMP,
        "freezing": FREEZING,
        "microbatch": MICROBATCH,
        "recompute": RECOMPUTE,
        "call": CALLS,
        "by hand": BY_HAND,
        "over": OVER,
        "state_dict": STATES,
        "resumable": RESUMABLE,
    }.items()
    for i, message in enumerate(messages)
}


class Heard(NamedTuple):
    """``lines``: files and lines that it came from. ``file``: the one that it points at. ``calls``: how many there are from the
    line of the user to the one that raises."""

    kind: type
    text: str
    lines: frozenset[tuple[str, int]]
    file: str
    calls: int = 0


@functools.cache
def hear(name):
    """What a user is told, which is one thing."""
    heard = []

    def show(message, category, filename, *_):
        frames, frame = [], sys._getframe(1)
        while frame is not None:
            frames.append((frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back
        frames = [
            (file, line)
            for file, line in frames
            if Path(file).name not in ("warnings.py", "_py_warnings.py")
        ]
        if Path(frames[0][0]).parent == PACKAGE:  # and not of torch
            heard.append(Heard(category, str(message), frozenset(frames), filename))

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("always")
        warnings.showwarning = show
        try:
            MESSAGES[name][2](World(Path(folder)))
        except Exception as error:
            frames = list(traceback.walk_tb(error.__traceback__))
            files = [frame.f_code.co_filename for frame, _ in frames]
            heard.append(
                Heard(
                    type(error),
                    str(error),
                    frozenset(map(origin, links(error))),
                    files[-1],
                    files[::-1].index(str(HERE)),
                )
            )
    (said,) = heard
    return said._replace(
        text=re.sub(
            "0x[0-9a-f]+", "ADDRESS", said.text.replace(folder, "PATH").replace(str(HERE), "HERE")
        )
    )


def links(error):
    """The error, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def origin(error):
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename, line


@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_said_word_for_word(name):
    kind, text, *_ = MESSAGES[name]
    said = hear(name)
    assert (said.kind, said.text) == (kind, text)


# Where it points.


@pytest.mark.parametrize("name", MESSAGES)
def test_the_line_of_the_user_is_named_by_a_warning_and_near_the_end_of_a_traceback(name):
    said = hear(name)
    deepest = MESSAGES[name][3:] or (3,)
    if issubclass(said.kind, Warning):
        assert said.file == str(HERE)
    assert said.calls <= deepest[0]


def by_hand(step, loss_of, x):
    with step:
        step.backward(loss_of(x))


def yields(loss_of):
    def function(x):
        yield loss_of(x)

    return function


WAYS = {
    "call": lambda w, *parts: train_step(w.optimizer, *parts)(head_only(w))(w.x),
    "last": lambda w, *parts: train_step(w.optimizer, *parts)(head_only(w)).last(w.x),
    "by hand": lambda w, *parts: by_hand(train_step(w.optimizer, *parts), head_only(w), w.x),
    "generator function": lambda w, *parts: train_step(w.optimizer, *parts)(yields(head_only(w)))(
        w.x
    ),
    "microbatch": lambda w, *parts: train_step(w.optimizer, microbatch(2), *parts)(head_only(w))(
        w.x
    ),
    "microbatch, last": lambda w, *parts: train_step(w.optimizer, microbatch(2), *parts)(
        head_only(w)
    ).last(w.x),
}


def head_only(w):
    return lambda x: w.model.head(x).square().mean()


@pytest.mark.parametrize("way", WAYS)
def test_a_warning_points_at_the_line_from_every_way_into_a_step(way, tmp_path):
    for surrounding in (
        amp(dtype=torch.float32),
        frozen(World(tmp_path).model),
        recompute(World(tmp_path).model, "head"),
    ):
        with pytest.warns(UserWarning, match="only 2 of 8 trainable parameters") as said:
            WAYS[way](World(tmp_path), surrounding)
        assert [warning.filename for warning in said] == [str(HERE)]


SCRIPT = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1), torch.nn.Linear(1, 1))
step = train_step(torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2), microbatch(1))(lambda x: model[2](x).sum())
def loop():
    for x in step.over([torch.ones(2, 1)] * 3):
        if step.updates < 1: step(x)  # here
loop()  # or here
"""


@pytest.mark.parametrize("form", ["package", "file", "pasted"])
def test_a_warning_points_at_the_line_also_where_the_code_was_lifted(form, tmp_path, monkeypatch):
    """A file that is imported, from the folder of the script; and the code at the top of the script, in whose own file it is."""
    names = ["accumulate", "microbatch", "train_step"]
    code = (
        "from trainkit import *\n"
        if form == "package"
        else "from lifted import *\n"
        if form == "file"
        else lift(names)
    )
    (tmp_path / "lifted.py").write_text(lift(names))
    monkeypatch.syspath_prepend(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(code + SCRIPT)
    with pytest.warns(UserWarning, match="only 2 of 6 trainable parameters") as said:
        runpy.run_path(str(script), run_name="script")
    sys.modules.pop("lifted", None)
    lines = [
        script.read_text().splitlines()[warning.lineno - 1]
        for warning in said
        if warning.filename == str(script)
    ]
    assert len(lines) == len(said) and all(
        line.endswith("# or here" if form == "pasted" else "# here") for line in lines
    )


# Nothing is left out.

ELSEWHERE = {
    # files, and texts that are not said to one process
    "lifting.py": "a command's, in tests/test_lifting.py",
    "trial.py": "a command's, in tests/test_trial.py",
    "the loaders of ranks": "several ranks, in tests/test_loaders.py",
    "a loader of length": "several ranks, in tests/test_loaders.py",
    "ranks run, and would each train": "several ranks, in tests/test_ranks.py",
    "FullyShardedDataParallel leaves each rank": "several ranks, in tests/test_ranks.py",
    # files that are not there in every version
    "diagnosis.py": "has its own table, in tests/test_diagnosis.py",
    "history.py": "has its own table, in tests/test_history.py",
    "plots.py": "has its own table, in tests/test_plots.py",
    "progress.py": "has its own table, in tests/test_progress.py",
    "summary.py": "has its own table, in tests/test_summary.py",
}
ERRORS = {"TypeError", "ValueError", "RuntimeError", "FloatingPointError"}


def messages_of(file):
    """First and last line of every statement that raises or warns, and its code."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else node
        name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
        if name in ERRORS if isinstance(node, ast.Raise) else name in ("warn", "warnings.warn"):
            yield node.lineno, node.end_lineno, ast.unparse(node)


def test_every_message_of_the_package_is_among_these():
    lines = frozenset().union(*(hear(name).lines for name in MESSAGES))
    missing, found, elsewhere = [], 0, set()
    for file in sorted(PACKAGE.glob("*.py")):
        for first, last, code in messages_of(file):
            found += 1
            if not any((str(file), line) in lines for line in range(first, last + 1)):
                place = next((key for key in ELSEWHERE if key == file.name or key in code), None)
                elsewhere.add(place)
                missing += [] if place else [f"{file.name}:{first}: {code}"]
    assert not missing, "\n".join(missing)
    assert found > 100 and elsewhere >= {key for key in ELSEWHERE if not key.endswith(".py")}, (
        "what is elsewhere is here too"
    )
