"""Hashes of 1,500 small trainings, to show that two versions of trainkit compute the same bits.

    PYTHONPATH=old python benchmarks/hashes.py old.json
    PYTHONPATH=new python benchmarks/hashes.py new.json
    python benchmarks/hashes.py --compare old.json new.json

Only public names of trainkit are used, so one script runs with every version. The configurations
are each option alone in each form of a step, and then a seeded random sample of all combinations.
One that raises is recorded with the type of its exception and with what it trained until then.
Bits depend on the machine and on the version of torch: compare files made with the same ones.
"""

import hashlib
import json
import math
import random
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, lr_scheduler

import trainkit as tk

COUNT, BATCHES, LAYERS = 1500, 10, ["stem", "norm"]
RESUMED_AT = 5  # within a window, unless windows have one micro-batch

OPTIMIZERS = {
    "SGD": lambda p: [SGD(p, lr=0.1)],
    "momentum-fused": lambda p: [SGD(p, lr=0.1, momentum=0.9, fused=True)],
    "AdamW": lambda p: [AdamW(p, lr=0.01)],
    "AdamW-fused": lambda p: [AdamW(p, lr=0.01, fused=True)],
    "Adagrad-fused": lambda p: [Adagrad(p, lr=0.05, fused=True)],
    "two": lambda p: [SGD(p[:4], lr=0.1), AdamW(p[4:], lr=0.01)],
    "two-fused": lambda p: [AdamW(p[:4], lr=0.01, fused=True), Adagrad(p[4:], fused=True)],
}
LENGTHS = {"3": [3], "1": [1], "product": [2, 2], "callable": [lambda updates: 1 + updates % 3]}
NORMS = {"none": (None, 2), "2": (0.1, 2), "inf": (math.inf, 2), "1": (1, 1)}
NORMS["max"] = (0.1, math.inf)
OVERFLOWS = {"none": (), "once": (4,), "often": range(2, BATCHES)}
# The first value of each option is its default, and not part of a name.
OPTIONS = {
    "face": ["return", "yield", "yield-alone", "hand"],  # alone: the plan knows no optimizer
    "optimizer": [*OPTIMIZERS],
    "precision": ["none", "bfloat16", "float16", "float32"],
    "overflow": [*OVERFLOWS],
    "dtype": ["float32", "float64", "bfloat16", "bfloat16-summed"],
    "accumulate": [*LENGTHS],
    "end": ["over", "last", "open"],
    "weight": ["none", "int", "tensor", "float", "zeros"],
    "clip": [*NORMS],
    "layers": ["none", "part", "decorator", "block", "freeze", "unfreeze"],
    "chunk": ["", "2", "3"],
}
SWITCHES = ["max_skips", "second_loss", "after", "recompute", "resume", "history"]
OPTIONS |= {switch: ["", "yes"] for switch in SWITCHES}


class Model(nn.Module):
    """It has a BatchNorm, a Dropout, and a branch that every other micro-batch leaves out."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.branch = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1))
        self.head = nn.Linear(8, 3)

    def forward(self, x, with_branch):
        h = self.body(self.norm(self.stem(x)).relu())
        return self.head(h + self.branch(h) if with_branch else h)


def is_valid(o):
    """Whether torch and trainkit take this combination, and each option has an effect."""
    # On the CPU, torch 2.13 leaves uninitialised memory in momentum buffers of bfloat16.
    no_bfloat16 = o.precision == "float16" or o.optimizer == "momentum-fused"
    # torch refuses a parameter whose first gradient comes late; trainkit helps if it knows.
    no_plan = o.face == "yield-alone" and (o.precision == "none" or o.optimizer == "momentum-fused")
    unchecked = o.precision == "none" and o.clip == "none"
    return not (
        (no_bfloat16 and o.dtype.startswith("bfloat16"))
        or (no_plan and (o.clip != "none" or o.optimizer == "momentum-fused"))
        or (unchecked and (o.overflow != "none" or o.max_skips))
        or (o.face == "hand" and (o.chunk or o.end == "last"))
        or (o.face.startswith("yield") and o.after)
        or (o.face != "return" and o.layers == "decorator")
    )


def configurations():
    """Options by name: each option alone in each form of a step, then random combinations."""
    default = {option: values[0] for option, values in OPTIONS.items()}
    faces = [default | {"face": face} for face in OPTIONS["face"]]
    alone = [face | {key: v} for face in faces for key, values in OPTIONS.items() for v in values]
    rng, found = random.Random(0), {}
    while len(found) < COUNT:
        drawn = {k: rng.choice(v if rng.random() < 0.6 else v[:1]) for k, v in OPTIONS.items()}
        o = SimpleNamespace(**(alone.pop(0) if alone else drawn))
        if is_valid(o):
            words = [f"{key}={value}" for key, value in vars(o).items() if value != default[key]]
            found[" ".join(words) or "default"] = o
    return found


def make_run(o):
    """A model with its optimizers, its step, and ``train``, which is called with a micro-batch."""
    torch.manual_seed(0)
    run = SimpleNamespace(model=Model().to(getattr(torch, o.dtype.removesuffix("-summed"))))
    run.optimizers = OPTIMIZERS[o.optimizer](list(run.model.parameters()))
    run.scheduler = lr_scheduler.ExponentialLR(run.optimizers[0], 0.9)
    if o.layers in ("freeze", "unfreeze"):
        tk.freeze(run.model, LAYERS)

    def weighted(loss, weight):
        if o.weight == "float":
            return {"loss": loss, "weight": 0.37 * weight}
        weight = torch.tensor(weight) if o.weight == "tensor" else weight
        return loss if o.weight == "none" else (loss, weight)

    def by_return(x, y, index):
        weight = 0 if o.weight == "zeros" and index % 3 == 1 else len(x) * (1 + index % 2)
        output = run.model(x, index % 2)
        if index in OVERFLOWS[o.overflow]:
            output.register_hook(lambda gradient: gradient * math.inf)
        if o.second_loss:
            penalty = 0.01 * run.model.head.weight.float().square().sum()
            run.step.backward(weighted(penalty, weight))
        return weighted(nn.functional.mse_loss(output.to(y.dtype), y), weight)

    def by_yield(*batch):
        yield by_return(*batch)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def by_hand(*batch):
        with run.step as result:
            run.step.backward(by_return(*batch))
        return result

    run.step = make_step(o, run, by_return if o.face == "return" else by_yield)
    run.train = by_hand if o.face == "hand" else run.step
    run.histories = [tk.History(run.step)] if o.history else []
    run.stateful = [run.model, *run.optimizers, run.scheduler, run.step, *run.histories]
    return run


def make_step(o, run, function):
    """The step: by hand ``train_step`` gets the parts, otherwise they decorate the function."""
    sum_dtype = torch.float32 if o.dtype == "bfloat16-summed" else None
    parts = [tk.frozen(run.model, LAYERS)] if o.layers == "decorator" else []
    parts += [tk.accumulate(n, run.model, dtype=sum_dtype) for n in LENGTHS[o.accumulate]]
    max_norm, norm_type = NORMS[o.clip]
    limits = {"max_norm": max_norm, "norm_type": norm_type, "max_skips": 2 if o.max_skips else None}
    if o.precision != "none":
        parts += [tk.amp(dtype=getattr(torch, o.precision), growth_interval=2, **limits)]
        limits = {}
    parts += [tk.frozen(run.model, LAYERS)] if o.layers == "part" else []
    parts += [tk.recompute(run.model, "body")] if o.recompute else []
    parts += [tk.microbatch(int(o.chunk))] if o.chunk else []
    after = run.scheduler.step if o.after else ()
    if o.face == "hand":
        return tk.train_step(run.optimizers, *parts, after=after, **limits)
    if o.face != "yield-alone":
        parts += [tk.train_step(run.optimizers, after=after, **limits)]
    for part in parts:
        function = part(function)
    return function


def resume(o, old):
    """A new run with the state of the old one, and the same random numbers to come."""
    random_state, new = torch.get_rng_state(), make_run(o)
    for thing, source in zip(new.stateful, old.stateful, strict=True):
        thing.load_state_dict(source.state_dict())
    torch.set_rng_state(random_state)
    return new


def train(o):
    """A hash of each kind of number, one of all of them, and the sum of the parameters."""
    run, seen = make_run(o), defaultdict(list)
    x = torch.randn(BATCHES, 8, 4).to(run.model.stem.weight.dtype)
    y = torch.randn(BATCHES, 8, 3, dtype=torch.float64 if o.dtype == "float64" else torch.float32)
    # 6 or 8 rows: no chunk has only one, which a BatchNorm refuses.
    batches = [(x[i, : 6 + i % 2 * 2], y[i, : 6 + i % 2 * 2], i) for i in range(BATCHES)]

    def train_one(*batch):
        if o.layers == "unfreeze" and batch[2] >= 4:
            tk.unfreeze(run.model, LAYERS)
        is_last = o.end == "last" and batch[2] == BATCHES - 1
        with tk.frozen(run.model, LAYERS if o.layers == "block" and batch[2] in (1, 2, 7) else []):
            result = (run.step.last if is_last else run.train)(*batch)
        for name in ("loss", "window_loss", "complete", "updated", "grad_norm"):
            seen[name].append(getattr(result, name))

    try:
        if o.resume:
            for batch in batches[:RESUMED_AT]:
                train_one(*batch)
            run, batches = resume(o, run), batches[RESUMED_AT:]
        for batch in run.step.over(batches) if o.end == "over" else batches:
            train_one(*batch)
    except Exception as raised:
        seen["error"] = [type(raised).__name__]
    seen["parameters"], seen["buffers"] = [*run.model.parameters()], [*run.model.buffers()]
    states = [opt.state.get(p, {}) for opt in run.optimizers for p in seen["parameters"]]
    seen["optimizer"] = [state[key] for state in states for key in sorted(state)]
    seen["lr"] = [group["lr"] for opt in run.optimizers for group in opt.param_groups]
    seen["counts"] = [run.step.updates, run.step.skipped]
    seen["loss_scale"] = [run.step.state_dict().get("loss_scale")]
    measured = ("seconds", "peak_memory")  # which no two runs have in common
    seen["history"] = [h[column] for h in run.histories for column in h if column not in measured]
    kinds = {kind: digest(b"".join(map(bits, values)))[:16] for kind, values in seen.items()}
    total = sum(parameter.detach().double().sum().item() for parameter in seen["parameters"])
    everything = digest(json.dumps(kinds, sort_keys=True).encode())
    return {"sha256": everything, "sum": f"{total:.12g}", "error": seen["error"], "kinds": kinds}


def digest(data):
    return hashlib.sha256(data).hexdigest()


def bits(value):
    if not isinstance(value, torch.Tensor):
        return repr(value).encode()
    flat = value.detach().flatten()
    if flat.is_floating_point():
        flat = flat.masked_fill(flat.isnan(), math.nan)  # the sign of a nan says nothing
    return repr((value.dtype, value.shape)).encode() + flat.view(torch.uint8).numpy().tobytes()


def compare(ours, theirs):
    """Print what differs and which options are among it; return how many do not agree."""
    both = sorted(ours.keys() & theirs.keys())
    differing = [name for name in both if ours[name]["sha256"] != theirs[name]["sha256"]]
    for name in differing:
        a, b = ours[name], theirs[name]
        kinds = sorted({kind for kind, _ in a["kinds"].items() ^ b["kinds"].items()})
        print(f"{name}\n    {', '.join(kinds)}: {a['sum']} {a['error']} | {b['sum']} {b['error']}")
    print(Counter(word for name in differing for word in name.split()).most_common(9))
    single = len(ours.keys() ^ theirs.keys())
    print(f"{len(both) - len(differing)} of {len(both)} agree; {single} are in one file only")
    return len(differing) + single


if __name__ == "__main__":
    if sys.argv[1] == "--compare":
        sys.exit(compare(*(json.loads(Path(path).read_text()) for path in sys.argv[2:])) > 0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {name: train(options) for name, options in configurations().items()}
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1))
    errors = Counter(error for entry in found.values() for error in entry["error"])
    print(f"{len(found)} configurations, raised: {dict(errors)}, with {tk.__file__}")
