"""What trainkit says to its user: one table to read, by what the user calls.

A row is a call, the kind of what is raised or warned, the value received, a word of the reason, and
the corrected call, which stands in backquotes. A function that yields prepares first; the call to
look at is below its yield.
"""

import contextlib
import copy
import functools
import hashlib
import inspect
import io
import json
import math
import pickle
import re
import runpy
import sys
import types
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from trainkit import (
    History,
    accumulate,
    amp,
    freeze,
    frozen,
    frozen_parameters,
    microbatch,
    model_summary,
    recompute,
    resumable,
    train_step,
    trainable_parameters,
    unfreeze,
)
from trainkit.tools.lift import lift

HERE = Path(__file__)
AT_MOST = 300  # characters


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings, self.head = nn.Linear(2, 2), nn.Linear(2, 1)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x):
        for layer in (self.embeddings, *self.encoder.layer, self.head):
            x = layer(x)
        return x


class Around:
    """An optimizer around another, of which the class alone has all that a step asks for."""

    param_groups = property(lambda self: self.optimizer.param_groups)
    state_dict = property(lambda self: self.optimizer.state_dict)
    step = property(lambda self: self.optimizer.step)
    zero_grad = property(lambda self: self.optimizer.zero_grad)

    def __init__(self, optimizer):
        self.optimizer = optimizer


class World:
    """What a user has: ``w`` in the table."""

    def __init__(self, path):
        torch.manual_seed(0)
        self.path, self.x, self.model = path, torch.ones(4, 2), Net()
        self.optimizer = SGD(self.model.parameters(), lr=0.1)
        self.by_hand = train_step(self.optimizer, accumulate(2))
        self.step = self.by_hand(self.loss_of)

    def loss_of(self, x):
        return self.model(x).square().mean()

    def loss(self):
        return self.loss_of(self.x)

    def returns(self, wrap):
        """Call a step that returns, in place of its loss, what ``wrap`` makes of it."""
        return train_step(self.optimizer)(lambda: wrap(self.loss()))()

    def yields(self, losses):
        """Call a step that yields these losses."""

        @accumulate(1, self.model)
        def step():
            yield from losses()

        step()

    def fits(self, *parts, **options):
        return train_step(self.optimizer, *parts, **options)

    def resumable(self, **options):
        objects = {"model": self.model, "optimizer": self.optimizer, "step": self.step}
        return resumable(self.path / "run", **{**objects, **options})

    def train(self, batches=1, **options):
        with self.resumable(**options):
            for x in self.step.over([self.x] * batches):
                self.step(x)

    def again(self, **options):
        """The script run again, up to the entry of its block."""
        World(self.path).resumable(**options).__enter__()

    def what_may_change(self):
        tensors = [*self.model.parameters(), *self.model.buffers()]
        grads = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        flags = [p.requires_grad for p in self.model.parameters()]
        modes = [module.training for module in self.model.modules()]
        state = copy.deepcopy(self.optimizer.state_dict()["state"])
        return [t.detach().clone() for t in tensors], grads, flags, modes, state


@contextlib.contextmanager
def one_rank():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


# The longer calls of the table.


def decorated_method(w):
    class Experiment:
        @train_step(w.optimizer)
        def loss(self):
            return w.loss()

    yield
    Experiment().loss()


def without_a_number(w):
    @accumulate
    def step(x, y):
        return x


def a_parameter_twice(w):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch
        optimizer = torch.optim.SGD([*w.model.parameters()] * 2)
    train_step(optimizer)(w.loss)()


def float16_parameters(w):
    w.model.half()
    yield
    amp(w.optimizer, dtype=torch.float16)(lambda: w.model.head.weight.float().sum())()


def weight_now_and_then(w):
    step = w.fits(accumulate(3))(lambda *weight: (w.loss(), *weight) if weight else w.loss())
    step()
    yield
    step(3)


def in_no_grad(w):
    loss = w.loss()
    with torch.no_grad():
        yield loss


def hooked(w):
    w.model.head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    yield
    w.step(w.x)


def within_itself(w):
    step = w.fits()(lambda: step())
    step()


def clip(w):
    clip_grad_norm_(w.model.parameters(), 0.1)


def clips(w):
    def step():
        loss = w.loss()
        clip_grad_norm_(w.model.parameters(), 0.1)
        return loss

    w.fits()(step)


def yields_with_after(w):
    def step():
        yield w.loss()

    w.fits(after=print)(step)()


def skips(w, *parts, **options):
    step = w.fits(*parts, max_skips=3, **options)(lambda factor: w.loss() * factor)
    step(1.0)
    for _ in range(3):
        step(math.nan)


def joins_late(w):
    optimizer = SGD(w.model.parameters(), lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    step = train_step(optimizer)(w.loss)
    with frozen(w.model, "head"):
        step()
    yield
    step()


def below_the_yield(w):
    @accumulate(1, w.model)
    def step():
        yield w.loss()
        step.backward(w.loss())

    step()


def inside(block):
    def call(w):
        with w.by_hand:
            block(w.by_hand, w)

    return call


def last_batch_left_out(w):
    for i, x in enumerate(w.step.over([w.x] * 4)):
        if i != 3:
            w.step(x)


def several_at_the_last_batch(w):
    for x in w.step.over([w.x]):
        w.step(x[:2])
        w.step(x[2:])


def generator():
    yield


def out_of_memory(rows, x):
    """A step with "auto" on a device that has memory for so many rows."""

    def call(w):
        def loss(x):
            if len(x) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB.")
            return w.loss_of(x)

        w.fits(microbatch("auto"))(loss)(w.x[:x])

    return call


def with_cache(w):
    class Attention(nn.Linear):
        def forward(self, x, cache=None):
            return super().forward(x)

    model = nn.Sequential(Attention(2, 2))
    with recompute(model, "[0]"):
        model[0](w.x, types.SimpleNamespace(get_seq_length=int))


def moved_before_backward(w):
    with recompute(w.model, "embeddings"):
        early = w.model.embeddings(w.x).sum()
        w.loss().backward()
        w.optimizer.step()
        early.backward()


def unfrozen_under_ddp(w, before=freeze, after=unfreeze):
    before(w.model, "head")
    with one_rank():
        ddp = DistributedDataParallel(w.model)
        after(w.model, "head")
        yield
        w.fits(module=ddp)(lambda: ddp(w.x).square().mean())()


frozen_under_ddp = functools.partial(unfrozen_under_ddp, before=unfreeze, after=freeze)


def further_loss_under_ddp(w):
    with one_rank():
        ddp = DistributedDataParallel(w.model)
        step = w.fits(module=ddp)(lambda: step.backward(loss := ddp(w.x).mean()) or loss)
        step()


def float32_sums_under_ddp(w):
    with one_rank():
        ddp = DistributedDataParallel(w.model)
        w.fits(accumulate(4, dtype=torch.float32), module=ddp)(w.loss)()


def of_fsdp1(w):
    with one_rank():
        fsdp1 = FullyShardedDataParallel(w.model, device_id=torch.device("cpu"))
        yield
        w.resumable(model=fsdp1)


def two_blocks(w):
    with w.resumable(), w.resumable():
        pass


def two_loops(w):
    other = w.fits()(w.loss_of)
    with w.resumable(other=other):
        for _ in zip(w.step.over([w.x] * 2), other.over([w.x] * 2), strict=True):
            pass


def other_objects(w):
    w.train()
    yield
    w.again(ema=[])


def other_shapes(w):
    w.train()
    w.model.head = nn.Linear(2, 3)
    yield
    w.resumable().__enter__()


def not_finite(w):
    with w.resumable():
        for x in w.step.over([w.x]):
            w.step(x)
        w.model.head.bias.data.fill_(math.nan)


def damaged(w, checkpoints=1):
    with w.resumable(every=1):
        for x in w.step.over([w.x] * 2 * checkpoints):
            w.step(x)
    newest = max((w.path / "run").glob("0*"))
    (newest / "manifest.json").write_text("a half")
    yield
    w.again()


def other_format(w):
    w.train()
    file = max((w.path / "run").glob("0*")) / "manifest.json"
    _, _, rest = file.read_bytes().partition(b"\n")
    text = json.dumps({**json.loads(rest), "format": 1000}).encode()
    file.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    yield
    w.again()


T, V, R, W = TypeError, ValueError, RuntimeError, UserWarning
TABLE = {
    "train_step": [
        (lambda w: train_step(3), T, "int 3", "an optimizer", "AdamW(model.parameters())"),
        (lambda w: train_step(w.model), T, "Net", "an optimizer", "AdamW(model.parameters())"),
        (lambda w: amp(torch.half), T, "float16", "optimizer", "amp(dtype=torch.float16)"),
        (lambda w: train_step(lambda x: x), T, "func", "an optimizer", "@train_step(optimizer)"),
        (lambda w: train_step([]), V, "no optimizer", "", "train_step([optimizer_a,"),
        (lambda w: train_step([w.optimizer] * 2), V, "twice", "twice", "[optimizer_a,"),
        (a_parameter_twice, V, "twice", "twice", "dict.fromkeys(parameters)"),
        (lambda w: train_step(torch.optim.LBFGS(w.model.parameters()))(w.loss)(),
            T, "LBFGS", "closure", "yield loss"),
        (lambda w: train_step(StepLR(w.optimizer, 1)),
            T, "StepLR", "an optimizer", "after=scheduler.step"),
        (lambda w: train_step(types.SimpleNamespace(step=print, zero_grad=print)),
            T, "namespace", "without param_groups, state_dict", "self.optimizer.param_groups"),
        (lambda w: train_step([[w.optimizer]]), T, "list [SGD", "", "[optimizer_a, optimizer_b]"),
        (lambda w: train_step({"g": w.optimizer}), T, "dict {'g'", "an optimizer", "[optimizer_a,"),
        (lambda w: train_step(Around), T, "class Around", "", "Around(model.parameters())"),
        (lambda w: train_step(SGD), T, "class SGD", "an optimizer", "SGD(model.parameters())"),
        (lambda w: train_step(w.model.parameters()), T, "generator", "an optimizer", "AdamW(model"),
        (lambda w: train_step(w.x), T, "(4, 2)", "an optimizer", "AdamW(model.parameters())"),
        (lambda w: w.fits(scheduler=3), T, "'scheduler'", "keyword", "after=scheduler.step"),
        (lambda w: w.fits(accumulate_grad_batches=4), T, "batches'", "keyword", "accumulate(4)"),
        (lambda w: w.fits(grad_clip=1.0), T, "'grad_clip'", "keyword", "max_norm=1.0"),
        (lambda w: w.fits(scaler=3), T, "'scaler'", "keyword", "amp()"),
        (lambda w: w.fits(bf16=True), T, "'bf16'", "keyword", "amp()"),
        (lambda w: w.fits(model=w.model), T, "'model'", "have the parameters", "module=model"),
        (lambda w: w.fits(loss_fn=w.loss), T, "'loss_fn'", "", "train_step(optimizer)(function)"),
        (clips, W, "clipped", "only after its return", "max_norm=1.0"),
        (lambda w: copy.copy(w.step), T, "", "copied", "train_step(...)(f)"),
        (lambda w: copy.deepcopy(w.by_hand), T, "", "copied", "step.state_dict()"),
        (lambda w: pickle.dumps(w.step), T, "", "not copied or pickled", "train_step(...)(f)"),
        (lambda w: torch.save(w.step, io.BytesIO()), T, "", "copied", "step.state_dict()"),
        (lambda w: w.fits(amp(w.optimizer)), V, "SGD", "two parts", None),
        (lambda w: w.fits(amp(), amp(dtype=torch.half)), V, "amp()", "two parts", None),
        (lambda w: w.fits(amp(max_norm=1.5), max_norm=2.5), V, "2.5 and 1.5", "two parts", None),
        (lambda w: w.fits(microbatch(2), microbatch(3)), V, "microbatch()", "two parts", None),
        (lambda w: w.fits(module=3), T, "int", "torch.nn.Module", "module=model"),
        (lambda w: w.fits(max_norm="1.0"), T, "'1.0'", "a number", "max_norm="),
        (lambda w: w.fits(max_norm=0), V, "got 0", "above 0", "max_norm=1.0"),
        (lambda w: w.fits(max_norm=math.nan), V, "got nan", "above 0", "max_norm=1.0"),
        (lambda w: w.fits(norm_type=None), T, "None", "a number", "norm_type="),
        (lambda w: w.fits(norm_type=3), V, "got 3", "1, 2 or math.inf", "norm_type=2"),
        (lambda w: w.fits(max_skips=0.5), T, "0.5", "counts updates", "max_skips=25"),
        (lambda w: w.fits(max_skips=0), V, "got 0", "counts updates", "max_skips=25"),
        (lambda w: w.fits(after=3), T, "got 3", "callables", "after=scheduler.step"),
        (lambda w: w.fits(after=ReduceLROnPlateau(w.optimizer).step),
            T, "ReduceLROnPlateau", "without arguments", "plateau.step(metric)"),
        (lambda w: w.fits(4), T, "4 is not", "not a part", "accumulate(4)"),
        (lambda w: w.fits(w.model), T, "Net", "not a part", "module=model"),
        (lambda w: w.fits(w.optimizer), T, "SGD", "not a part", "[a, b]"),
        (lambda w: w.fits(StepLR(w.optimizer, 1)),
            T, "StepLR", "not a part", "after=scheduler.step"),
        (lambda w: w.fits([amp()]), T, "[amp()", "not a part", "accumulate(4), amp()"),
        (lambda w: w.fits(amp), T, "function amp", "not a part", "amp()"),
        (lambda w: w.fits()(3), T, "got 3", "decorates", "train_step(optimizer, a, b)"),
        (lambda w: w.fits()(frozen(w.model)), T, "frozen", "decorates", "train_step("),
        (lambda w: w.fits()(w.x), T, "", "no function", "train_step(...)(function)"),
        (decorated_method, T, "method", "share its state", "train_step(...)(self.loss)"),
    ],
    "accumulate": [
        (without_a_number, T, "'step'", "a number", "@accumulate(4)"),
        (lambda w: accumulate(steps=4), T, "'steps'", "keyword", "accumulate(4)"),
        (lambda w: accumulate(0.5), T, "0.5", "counts micro-batches", "accumulate(4)"),
        (lambda w: accumulate(0), V, "got 0", "at least 1", "accumulate(4)"),
        (lambda w: accumulate(10**400), V, "1000", "micro-batches", "accumulate(4)"),
        (lambda w: w.fits(accumulate(lambda updates: 2.0))(w.loss)(),
            T, "got 2.0", "counts micro-batches", "accumulate(4)"),
        (lambda w: accumulate(4, w.optimizer), T, "SGD", "torch.nn.Module", "module=model"),
        (lambda w: accumulate(4, dtype=torch.float64),
            V, "torch.float64", "torch.float32", "dtype=torch.float32"),
        (lambda w: accumulate(4)(generator)(), V, "no parameters", "", "train_step(optimizer)"),
        (lambda w: accumulate(4, w.model)(w.loss)(),
            V, "no optimizer", "", "train_step(optimizer)"),
        (lambda w: accumulate(4).__enter__(), V, "", "no optimizer", "train_step("),
    ],
    "amp": [
        (lambda w: amp(enabled=False), T, "'enabled'", "keyword", "amp(dtype=torch.float32)"),
        (lambda w: amp(device_type="cuda"), T, "'device_type'", "keyword", "amp(device='cuda')"),
        (lambda w: amp(dtype=torch.double), V, "float64", "", "amp(dtype=torch.float16)"),
        (lambda w: amp(dtype="float16"), V, "'float16'", "", "amp(dtype=torch.float16)"),
        (lambda w: amp(device="gpu"), V, "'gpu'", "device", "amp(device='cuda')"),
        (lambda w: amp(device="meta"), V, "'meta'", "autocast", "amp(device='cuda')"),
        (lambda w: amp(init_scale=0), V, "got 0", "above 0", "init_scale=65536.0"),
        (lambda w: amp(init_scale=math.inf), V, "inf", "float32", "init_scale=65536.0"),
        (lambda w: amp(growth_interval=0.5), V, "0.5", "updates", "growth_interval=2000"),
        (float16_parameters, V, "(2, 2)", "float32 parameters", "dtype=torch.float32"),
    ],
    "step(...)": [
        (lambda w: w.returns(lambda loss: loss.item()), T, "float", "no graph", "loss.item()"),
        (lambda w: w.returns(lambda loss: loss.detach().numpy()),
            T, "ndarray", "no graph", "return loss"),
        (lambda w: w.returns(lambda loss: {"loss": 0.25}), T, "0.25", "no graph", "return loss"),
        (lambda w: w.returns(lambda loss: None), T, "None", "given labels", "return loss"),
        (lambda w: w.returns(lambda loss: types.SimpleNamespace(loss=None)),
            T, "namespace(", "given labels", "return loss"),
        (lambda w: w.returns(lambda loss: OrderedDict(loss=None, logits=w.x)),
            T, "OrderedDict of 'loss', 'logits'", "missing or None", "{'loss': loss,"),
        (lambda w: w.returns(lambda loss: [loss, 3]), T, "a list of 2", "", "loss, weight"),
        (lambda w: w.returns(lambda loss: (loss, 1, 2)), T, "a tuple of 3", "", "loss, weight"),
        (lambda w: w.returns(lambda loss: {"logits": torch.ones(9, 9)}),
            T, "dict of 'logits'", "given labels", "{'loss': loss, 'weight': weight}"),
        (lambda w: w.returns(lambda loss: w.model(w.x)), V, "(4, 1)", "single", "loss.mean()"),
        (lambda w: w.returns(lambda loss: torch.tensor(3)), T, "int64", "floating", "return loss"),
        (lambda w: w.returns(lambda loss: loss.detach()), V, "", "no graph", ".detach()"),
        (lambda w: w.returns(lambda loss: (4, loss)), T, "4 (int)", "a loss", "loss, weight"),
        (lambda w: w.returns(lambda loss: (loss, 0.9)), T, "0.9", "the weight", "mask.sum()"),
        (torch.no_grad()(lambda w: w.step(w.x)), V, "no_grad", "a step trains", "amp():"),
        (torch.inference_mode()(lambda w: w.step(w.x)), V, "", "a step trains", "amp():"),
        (lambda w: w.returns(lambda loss: (loss, w.x)), T, "(4, 2)", "0-d", "'weight': weight"),
        (lambda w: w.returns(lambda loss: (loss, loss)), T, "float32", "integer", "mask.sum()"),
        (lambda w: w.returns(lambda loss: (loss, -1)), V, "-1", "at least 0", "len(batch)"),
        (lambda w: w.returns(lambda loss: {"loss": loss, "weight": math.nan}),
            V, "nan", "finite", "len(batch)"),
        (weight_now_and_then, T, "after 1", "with", "return loss, weight"),
        (within_itself, R, "", "already running", "step.backward(loss)"),
        (hooked, V, "hooks", "partial sums", "handle.remove()"),
        (lambda w: w.fits(max_skips=3)(w.loss)(),
            V, "max_skips", "finite check", "max_norm=math.inf"),
        (lambda w: skips(w, max_norm=1.0),
            FloatingPointError, "3 updates", "not finite", "max_skips=math.inf"),
        (lambda w: skips(w, amp(dtype=torch.half, init_scale=1024.0), module=w.model),
            FloatingPointError, "'embeddings.weight'", "loss scale is 128", "max_skips=math.inf"),
        (joins_late, V, "2 of 8", "dampening", "fused=False"),
        (lambda w: w.fits()(lambda: Net()(w.x).sum())(),
            W, "0 of 8", "Make the optimizer last", None),
        (lambda w: w.fits()(lambda: w.model.head(w.x).sum())(),
            W, "2 of 8", "checkpointed", "use_reentrant=False"),
    ],
    "a step that yields": [
        (yields_with_after, V, "after", "below the yield", None),
        (lambda w: w.yields(lambda: iter(())), T, "", "without a loss", "yield loss"),
        (lambda w: w.yields(lambda: in_no_grad(w)), R, "no_grad", "at the yield", "yield loss"),
        (lambda w: w.yields(lambda: iter((w.loss(), w.loss()))),
            V, "twice", "yielded", "step.backward(loss)"),
        (below_the_yield, R, "", "below a yield", "loss.backward()"),
    ],
    "with step": [
        (lambda w: w.by_hand.backward(w.loss()), R, "", "inside a micro-batch", "with step:"),
        (inside(lambda step, w: [step.backward(w.loss(), n) for n in (3, 4)]),
            T, "3.0 and 4.0", "share one weight", "step.backward(first, weight)"),
        (inside(lambda step, w: [step.backward(w.loss(), n) for n in (None, torch.tensor(3))]),
            T, "None and 3.0", "share one weight", "step.backward(first, weight)"),
        (inside(lambda step, w: w.loss().backward()),
            R, "", "without a loss", "step.backward(loss)"),
        (inside(lambda step, w: [step.backward(w.loss()), w.optimizer.zero_grad()]),
            R, "zero_grad()", "changed gradients", "with step:"),
        (inside(lambda step, w: [step.backward(w.loss()), clip(w)]),
            R, "clipping", "changed gradients", "max_norm=1.0"),
        (inside(lambda step, w: step.last()), T, "last()", "without a function", "step.close()"),
        (lambda w: w.fits(microbatch(2)).__enter__(),
            V, "", "no arguments to cut", "train_step(optimizer, ...)(function)"),
    ],
    "step.over": [
        (lambda w: w.step.over(3), T, "int", "a loader", "step.over(loader"),
        (lambda w: w.step.over([], w.loss), T, "method", "then steps", "step.over(loader, other"),
        (lambda w: w.step.over([], progress=3), T, "got 3", "a bool", "progress=True"),
        (lambda w: next(w.step.over([1], progress={"colour": 3, "no": 4})),
            T, "no", "tqdm refuses", "step.over(loader, progress="),
        (last_batch_left_out, W, "1 micro-batch", "still open", "step.close()"),
        (several_at_the_last_batch, W, "", "several micro-batches", "step.over"),
    ],
    "state_dict": [
        (inside(lambda step, w: [step.backward(w.loss()), step.state_dict()]),
            R, "state_dict()", "inside a micro-batch", None),
        (lambda w: w.step.load_state_dict({"model": 1}),
            V, "'skipped'", "does not fit", "step.state_dict()"),
        (lambda w: w.step.load_state_dict({**w.step.state_dict(), "updates": "a"}),
            V, "'a'", "does not fit", "step.state_dict()"),
    ],
    "frozen, freeze": [
        (lambda w: frozen("head"), T, "str", "torch.nn.Module", "frozen(model"),
        (lambda w: freeze(w.optimizer), T, "SGD", "torch.nn.Module", "freeze(model"),
        (lambda w: unfreeze(3), T, "int", "torch.nn.Module", "unfreeze(model"),
        (lambda w: frozen_parameters([]), T, "list", "nn.Module", "frozen_parameters(model)"),
        (lambda w: trainable_parameters(3), T, "int", "Module", "trainable_parameters(model)"),
        (lambda w: freeze(w.model, None), T, "None", "pattern", "model.head"),
        (lambda w: freeze(w.model, ["head", 3]), T, "got 3", "pattern", "model.head"),
        (lambda w: freeze(w.model, lambda n, p: False), V, "no parameter", "predicate", "[]"),
        (lambda w: freeze(w.model, nn.Linear(2, 2)), V, "Linear", "not in", "model.head"),
        (lambda w: freeze(w.model, "a[0:x]"), V, "'a[0:x]'", "cannot be read", "'**.bias'"),
        (lambda w: freeze(w.model, "layer[0]"), V, "'layer[0]'", "'**.layer[0]'", None),
        (lambda w: freeze(w.model, "Encoder.layers"),
            V, "'Encoder.layers'", "'encoder.layer'", None),
        (lambda w: freeze(w.model, "**.wieght"), V, "'**.wieght'", "'**.weight'", None),
        (lambda w: frozen(w.model)(3), T, "got 3", "decorates functions", "with frozen("),
        (lambda w: frozen(w.model)(generator)(),
            T, "function generator", "outside", "train_step(optimizer, frozen(model, layers))"),
    ],
    "recompute": [
        (lambda w: recompute("encoder", "**"), T, "str", "torch.nn.Module", "recompute(model"),
        (lambda w: recompute(w.model, "**.bias"), V, "'**.bias'", "no module", "recompute(model,"),
        (with_cache, V, "Attention", "cache", "use_cache=False"),
        (moved_before_backward, R, "Linear", "were changed", None),
    ],
    "microbatch": [
        (lambda w: microbatch(0.5), T, "0.5", "int", "microbatch(8)"),
        (lambda w: microbatch(0), V, "got 0", "at least 1", "microbatch(8)"),
        (lambda w: w.fits(microbatch(2))(w.loss_of)(3, name="x"),
            V, "got none in", "cuts tensors", "step(inputs, targets)"),
        (lambda w: w.fits(microbatch(2))(w.loss_of)(w.x, torch.ones(3)),
            V, "(4, 2), (3,)", "differ", "functools.partial(function, table=table)"),
        (out_of_memory(2, 4), W, "4 rows of 2", "memory ran out", "step.chunk_sizes"),
        (out_of_memory(0, 1), torch.OutOfMemoryError, "4 GiB", "single row", "amp()"),
    ],
    "History": [
        (lambda w: History(3), T, "int", "records a step", "History(train_step(optimizer)"),
        (lambda w: History(w.step, log=3), T, "got 3", "SummaryWriter", "log=SummaryWriter()"),
        (lambda w: History(w.step).load_state_dict({"columns": ["lr"]}),
            V, "['lr']", "columns", "other_history.state_dict()"),
    ],
    "resumable": [
        (lambda w: w.resumable(every=60.0), T, "60.0", "a", "every=timedelta(minutes=10)"),
        (lambda w: w.resumable(every=0), V, "every=0", "number of updates", "every=1000"),
        (lambda w: w.resumable(keep=2.0), V, "2.0", "checkpoints", "keep=2"),
        (lambda w: w.resumable(keep=0), V, "0", "checkpoint", "keep=2"),
        (lambda w: resumable(HERE, step=w.step, o=w.optimizer, m=w.model).__enter__(),
            V, str(HERE), "written", "shutil.copytree(old, new)"),
        (lambda w: w.resumable(history=(1, 2)), T, "history=(1, 2)", "state_dict", "history=[]"),
        (lambda w: resumable(w.path, model=w.model), V, "model", "no step", "step=step)"),
        (of_fsdp1, V, "model", "FSDP1", "fully_shard(model)"),
        (lambda w: resumable(w.path, step=w.step), W, "SGD", "saved", "model=model,"),
        (two_blocks, R, "", "another `resumable`", "resumable(path, ...)"),
        (lambda w: next(w.resumable().epochs(3)), R, "", "outside", "with resumable() as run:"),
        (two_loops, R, "two loops", "", "step.over(zip(a, b), other_step)"),
        (other_objects, V, "ema", "this run has", None),
        (other_shapes, V, "head", "this run has", None),
        (lambda w: w.train(history=[generator()]),
            T, "generator", "stored", "{'basis': tensor}"),
        (not_finite, W, "model.head.bias", "not finite", None),
        (functools.partial(damaged, checkpoints=2), W, "00000002", "damaged", None),
        (damaged, R, "00000001", "no other", None),
        (other_format, V, "1000", "format", None),
    ],
    "model_summary": [
        (lambda w: model_summary(3), T, "int", "Module", "model_summary(model)"),
        (lambda w: model_summary(w.model, depth=-1), V, "-1", "levels", "model, depth=2"),
        (lambda w: model_summary(w.model, depth="1"), T, "'1'", "levels", "model, depth=2"),
    ],
    "ranks": [
        (float32_sums_under_ddp, V, "float32", "one process", "model.float()"),
        (unfrozen_under_ddp,
            V, "2 of 8", "became trainable after", "DistributedDataParallel(model)"),
        (frozen_under_ddp, V, "2 of 8", "frozen after", "find_unused_parameters=True"),
        (further_loss_under_ddp, R, "", "further loss", "step.backward(loss + further)"),
    ],
    "lift": [
        (lambda w: lift(["acumulate"]), V, "'acumulate'", "to lift", "lift accumulate"),
    ],
}  # fmt: skip
ROWS = {f"{called}-{i}": row for called, rows in TABLE.items() for i, row in enumerate(rows)}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.filterwarnings("always")
def test_a_message_has_the_value_the_reason_and_the_corrected_call(row, tmp_path):
    call, kind, value, reason, remedy = ROWS[row]
    w = World(tmp_path)
    if inspect.isgeneratorfunction(inspect.unwrap(getattr(call, "func", call))):
        prepared = call(w)
        next(prepared)
        call = lambda w: next(prepared, None)  # noqa: E731
    before = w.what_may_change()
    if issubclass(kind, Warning):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            call(w)
        (said,) = [warning for warning in said if warning.category is kind]
        text = str(said.message)
        assert said.filename == str(HERE)
    else:
        with warnings.catch_warnings(), pytest.raises(kind) as raised:
            warnings.simplefilter("ignore")
            call(w)
        assert raised.type is kind
        text = str(raised.value)
    if kind in (TypeError, ValueError):
        torch.testing.assert_close(w.what_may_change(), before, rtol=0, atol=0)
    assert value in text and reason in text
    assert remedy is None or any(remedy in code for code in re.findall("`(.+?)`", text, re.DOTALL))
    assert len(text.replace(str(tmp_path), "")) <= AT_MOST and text.count("\n") <= 1


def test_a_graph_that_was_freed_is_explained_by_both_causes(tmp_path):
    """A hidden state without detach, and a backward within the function. Torch's text stays."""
    w = World(tmp_path)
    rnn, state = nn.RNN(2, 2), [torch.zeros(1, 2)]

    def carried(x):
        output, state[0] = rnn(x, state[0])
        return output.sum()

    def twice(x):
        loss = w.loss_of(x)
        loss.backward()
        return loss

    step = train_step(SGD(rnn.parameters(), lr=0.1))(carried)
    step(w.x)
    for broken in (step, w.fits()(twice)):
        with pytest.raises(RuntimeError, match="a second time") as raised:
            broken(w.x)
        said = str(raised.value)
        assert said.count("\n") == 1
        for remedy in ("state.detach()", "loss.backward()", "step.backward(loss)"):
            assert remedy in said


def test_the_remedy_for_an_optimizer_around_another_makes_it_one(tmp_path):
    """And a wrapper that hands on whatever it is asked for is one without it."""

    class HandsOn:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def __getattr__(self, name):
            return getattr(self.optimizer, name)

    for kind in (Around, HandsOn):
        w = World(tmp_path)
        before = w.model.head.weight.clone()
        assert train_step(kind(w.optimizer))(w.loss_of)(w.x).updated
        assert not w.model.head.weight.equal(before)


def test_torch_compile_above_a_step_says_where_it_goes(tmp_path):
    w = World(tmp_path)
    with pytest.warns(UserWarning, match=r"without `over`.*`@torch\.compile` below"):
        torch.compile(w.step, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w.fits()(torch.compile(w.loss_of, backend="eager"))
    with warnings.catch_warnings():  # what reads every attribute of an object still may
        warnings.simplefilter("ignore")
        assert dict(inspect.getmembers(w.step))["updates"] == 0


def test_clipping_where_there_are_gradients_is_not_warned_of(tmp_path):
    w = World(tmp_path)

    def yields():
        yield w.loss()
        clip_grad_norm_(w.model.parameters(), 0.1)
        w.optimizer.step()

    def of_another_model():
        other = Net()
        other(w.x).sum().backward()
        clip_grad_norm_(other.parameters(), 0.1)
        return w.loss()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for function in (yields, of_another_model, w.loss_of, functools.partial(w.loss_of, w.x)):
            w.fits()(function)


# What a person prints.


def test_the_repr_of_a_step_shows_its_plan_and_where_it_is(tmp_path):
    w, called = World(tmp_path), []
    parts = accumulate(2), frozen(w.model, "head"), amp(dtype=torch.bfloat16), microbatch(2)
    step = w.fits(*parts, max_norm=0.5, after=lambda: called.append(1))(w.loss_of)
    plan = "train_step(SGD, accumulate(2), frozen(...), amp(), microbatch(...), max_norm=0.5)"
    assert repr(step) == f"<{plan}(World.loss_of): updates=0, skipped=0>"
    step(w.x)
    assert repr(step).endswith(": updates=0, skipped=0, open window of 1>")
    step(w.x), step(w.x * math.nan), step(w.x)
    assert called == [1] and repr(step).endswith(": updates=1, skipped=1>")
    with w.by_hand as result:
        assert repr(w.by_hand) == "<train_step(SGD, accumulate(2)): updates=0, skipped=0>"
    assert not result.complete


def test_the_repr_of_a_part_is_the_call_that_makes_it():
    def size(updates):
        return updates + 1

    made = accumulate(4), accumulate(None), amp(), amp(max_norm=0.5)
    shown = "(accumulate(4), accumulate(None), amp(), amp(), max_norm=0.5)"
    assert repr(made) == shown
    assert "size" in repr(accumulate(size))
    assert "partial" in repr(accumulate(functools.partial(size)))
    step = accumulate(4)(functools.partial(size, 1))
    assert repr(step) == "<accumulate(4)(partial): updates=0, skipped=0>"


def test_a_part_may_be_copied_and_sent(tmp_path):
    """It is inert: only a step has state."""
    w = World(tmp_path)
    for copied in (copy.copy, copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))):
        parts = copied(accumulate(2)), copied(amp(dtype=torch.float32, max_norm=1.0))
        step = w.fits(*parts)(w.loss_of)
        assert [step(w.x).updated for _ in range(4)] == [False, True, False, True]
        with copied(amp(dtype=torch.bfloat16)):
            assert w.model(w.x).dtype == torch.bfloat16


def test_a_loop_has_the_length_of_its_loader(tmp_path):
    tqdm = pytest.importorskip("tqdm").tqdm
    w = World(tmp_path)
    assert len(w.step.over([w.x] * 3)) == 3
    assert tqdm(w.step.over([w.x] * 3), disable=True).total == 3
    assert tqdm(w.step.over(iter([w.x] * 3)), disable=True).total is None


# Where a warning points, from every way into a step.


def head_only(w):
    return lambda x: w.model.head(x).square().mean()


def by_hand(step, loss, x):
    with step:
        step.backward(loss(x))


def yields(loss):
    def function(x):
        yield loss(x)

    return function


WAYS = {
    "call": lambda w, *parts: w.fits(*parts)(head_only(w))(w.x),
    "last": lambda w, *parts: w.fits(*parts)(head_only(w)).last(w.x),
    "by hand": lambda w, *parts: by_hand(w.fits(*parts), head_only(w), w.x),
    "yield": lambda w, *parts: w.fits(*parts)(yields(head_only(w)))(w.x),
    "microbatch": lambda w, *parts: w.fits(microbatch(2), *parts)(head_only(w))(w.x),
    "microbatch, last": lambda w, *parts: w.fits(microbatch(2), *parts)(head_only(w)).last(w.x),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_warning_points_at_the_line_from_every_way_into_a_step(way, tmp_path):
    for part in (amp(dtype=torch.float32), frozen(Net()), recompute(Net(), "head")):
        with pytest.warns(UserWarning, match="only 2 of 8") as said:
            WAYS[way](World(tmp_path), part)
        assert {warning.filename for warning in said} == {str(HERE)}


SCRIPT = """
import torch
model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(3)])
step = train_step(torch.optim.SGD(model.parameters()), accumulate(2))(lambda x: model[2](x).sum())
def loop():
    for x in step.over([torch.ones(2, 2)] * 3):
        if step.updates < 1: step(x)  # here
loop()  # or here
"""


@pytest.mark.parametrize("form", ["package", "file", "pasted"])
def test_a_warning_points_at_the_line_also_where_the_code_was_lifted(form, tmp_path, monkeypatch):
    """Into a file that is imported, or pasted at the top of the script itself."""
    code = lift(["accumulate", "train_step"])
    (tmp_path / "lifted.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    imports = {"package": "from trainkit import *", "file": "from lifted import *", "pasted": code}
    script = tmp_path / "script.py"
    script.write_text(imports[form] + "\n" + SCRIPT)
    with pytest.warns(UserWarning, match="only 2 of 6") as said:
        runpy.run_path(str(script), run_name="script")
    sys.modules.pop("lifted", None)
    lines = script.read_text().splitlines()
    for warning in said:
        assert warning.filename == str(script)
        end = "# or here" if form == "pasted" else "# here"
        assert lines[warning.lineno - 1].endswith(end)
