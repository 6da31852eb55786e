"""A differential fuzzer: any sequence of what a loop may do, compared with plain torch each time.

The oracle keeps a copy of the model, takes the gradient of each micro-batch by itself, and computes
a window by its definition: sum(w_i * g_i) / sum(w_i), or sum(g_i). What happens to `.grad` between
micro-batches happens to our side only. Both sides start every operation from the same numbers, so a
difference is the fault of the last operation. ``HYPOTHESIS_PROFILE=deep`` runs 20,000 operations.
"""

import copy
import math
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn
from torch.nn import functional as F

from trainkit import accumulate, amp, freeze, frozen, train_step, unfreeze

OPERATIONS = 20_000 if settings.default.max_examples > 500 else 2_000


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, tokens):
        return F.linear(
            torch.tanh(self.body(self.embedding(tokens))), self.embedding.weight
        ).transpose(1, 2)


# Models, and their layers: a pattern or a list of patterns, the parameters it means, and the
# modules whose statistics it holds.
MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "tied": Tied,
    "conv": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    ),
    "norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)),
}
INPUTS = {"linear": (4,), "tied": (3,), "conv": (1, 4, 4), "norm": (4,)}
LAYERS = {
    "linear": [
        ("[0]", {"0.weight", "0.bias"}, ()),
        ("**.bias", {"0.bias", "2.bias"}, ()),
        ("2.weight", {"2.weight"}, ()),
        (["**", "!2"], {"0.weight", "0.bias"}, ()),
    ],
    "tied": [
        ("embedding", {"embedding.weight"}, ()),
        ("body", {"body.weight", "body.bias"}, ()),
        (["!body", "**"], {"embedding.weight"}, ()),
    ],
    "conv": [
        ("[:2]", {"0.weight", "1.weight", "1.bias"}, ("1",)),
        ("[1]", {"1.weight", "1.bias"}, ("1",)),
        ("**.weight", {"0.weight", "1.weight", "4.weight"}, ()),
        (["**", "!4"], {"0.weight", "1.weight", "1.bias"}, ("1",)),
        (["**", "![1]"], {"0.weight", "4.weight", "4.bias"}, ()),
    ],
    "norm": [
        ("[0]", {"0.weight", "0.bias"}, ()),
        ("[1]", {"1.weight", "1.bias"}, ()),
        ("[1:]", {"1.weight", "1.bias", "3.weight", "3.bias"}, ()),
    ],
}
# Epsilons are large: otherwise a gradient that is only rounding makes a step as large as the rate.
OPTIMIZERS = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {"eps": 1e-3}),
    (torch.optim.AdamW, {"eps": 1e-3, "amsgrad": True}),
    (torch.optim.AdamW, {"eps": 1e-3}),
    (torch.optim.Adagrad, {"eps": 1e-3}),
    (torch.optim.RMSprop, {"eps": 1e-3}),
]
FAULTS = [None] * 8 + [
    "forward",
    "backward",
    "update",
    "nan gradient",
    "inf gradient",
    "nan loss",
    "no graph",
]


class Boom(Exception):
    pass


class Faulty(torch.autograd.Function):
    """Changes nothing going forward; going backward, raises or spoils the gradient."""

    @staticmethod
    def forward(ctx, loss, fault):
        ctx.fault = fault
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.fault == "backward":
            raise Boom
        return gradient * (math.nan if ctx.fault == "nan gradient" else math.inf), None


def loss_of(model, batch, fault=None):
    x, y = batch
    loss = F.cross_entropy(model(x), y)
    if fault == "forward":
        raise Boom
    if fault in ("backward", "nan gradient", "inf gradient"):
        return Faulty.apply(loss, fault)
    return (
        loss * math.nan if fault == "nan loss" else loss.detach() if fault == "no graph" else loss
    )


def penalty_of(model):
    return 0.1 * sum(p.pow(2).mean() for p in model.parameters() if p.requires_grad)


def power_of_two_near(weight):
    return 2.0 ** round(math.log2(weight)) if weight > 0 else 1.0


class Optimizers(list):
    """One or two, each with a scheduler."""

    def __init__(self, optimizers):
        super().__init__(optimizers)
        self.schedulers = [
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95) for optimizer in optimizers
        ]

    def step(self):
        for optimizer in self:
            optimizer.step()

    def schedule(self):
        for scheduler in self.schedulers:
            scheduler.step()

    def zero_grad(self, **options):
        for optimizer in self:
            optimizer.zero_grad(**options)

    def rates(self):
        return [group["lr"] for optimizer in self for group in optimizer.param_groups]

    def state_of(self, parameter):
        return {
            key: value
            for optimizer in self
            for key, value in optimizer.state.get(parameter, {}).items()
        }


@dataclass
class Job:
    """One micro-batch."""

    batch: tuple
    weight: float | None
    as_tensor: bool
    fault: str | None
    penalty: bool

    def handed_over(self, loss):
        if self.weight is None:
            return loss
        if isinstance(self.weight, float):
            weight = (
                torch.tensor(self.weight, dtype=torch.float64) if self.as_tensor else self.weight
            )
            return {"loss": loss, "weight": weight}
        return loss, torch.tensor(self.weight) if self.as_tensor else self.weight


@dataclass
class Setup:
    """What is drawn once for a sequence."""

    kind: str
    dtype: torch.dtype  # of the parameters
    autocast: torch.dtype | None  # as given to amp; None for no amp
    optimizer: tuple
    several: bool  # two optimizers in one step
    implementation: dict
    rates: tuple
    decays: tuple
    lengths: list  # None: only `close`, `last` and the end of `over` end a window
    is_sum: bool  # reduction="sum"
    max_norm: float | None
    norm_type: float
    yields: bool
    by_module: bool  # accumulate(n, module) in place of train_step(optimizer)
    part: tuple | None  # layers frozen as a part of the step
    init_scale: float
    seed: int

    def make_model(self):
        torch.manual_seed(self.seed)
        return MODELS[self.kind]().to(self.dtype)

    def make_optimizers(self, model, implementation):
        parameters = list(model.parameters())
        groups = [
            {"params": ps, "lr": lr, "weight_decay": decay}
            for ps, lr, decay in zip(
                (parameters[:1], parameters[1:]), self.rates, self.decays, strict=True
            )
        ]
        optimizer_class, options = self.optimizer
        owned = [[group] for group in groups] if self.several else [groups]
        return Optimizers(
            [optimizer_class(part, lr=0.1, **options, **implementation) for part in owned]
        )

    @property
    def parts(self):
        return [] if self.part is None else [self.part]

    @property
    def half(self):
        return self.autocast in (torch.float16, torch.bfloat16)

    @property
    def checked(self):
        return self.autocast is not None or self.max_norm is not None


class Oracle:
    """The same in plain torch, as slow and as plain as can be."""

    def __init__(self, setup):
        self.setup = setup
        self.model = setup.make_model()
        self.optimizers = setup.make_optimizers(self.model, {"foreach": False})
        self.scale = setup.init_scale if setup.autocast == torch.float16 else 1.0
        self.tracker = self.updates = self.skipped = 0
        self.reference = None
        self.blocks = []  # the layers held by frozen blocks that are open now
        self.for_good = [set(), set()]  # parameters and modules that freeze holds
        self.jobs = []
        self.gradients = {}

    def frozen_now(self, *more):
        blocks = [*self.blocks, *more]
        names = self.for_good[0].union(*(names for _, names, _ in blocks))
        return names, self.for_good[1].union(*(modules for _, _, modules in blocks))

    def set_flags(self, *more):
        names, modules = self.frozen_now(*more)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in names)
        self.model.train()
        for name in modules:
            self.model.get_submodule(name).eval()

    def discard(self):
        self.jobs, self.gradients = [], {}

    def length(self):
        lengths = self.setup.lengths
        return lengths[self.updates % len(lengths)] or math.inf

    def parts(self):
        """By how many micro-batches a share is divided beforehand."""
        return 1 if self.setup.is_sum or self.length() == math.inf else self.length()

    def seed(self, weight):
        """What backward starts from, as half precision rounds by it: all we take from ours."""
        if not self.setup.half:
            return 1.0
        if not self.jobs:
            self.window_reference = 1.0 if self.reference is None else self.reference
        if weight is None:
            return self.scale / self.parts()
        if self.reference is None and not self.jobs:  # 1 for a weight of 0
            self.window_reference = power_of_two_near(weight)
        return self.scale * weight / (self.window_reference * self.parts())

    def micro_batch(self, job, last, in_function):
        """What a call should return, (loss, complete, updated, norm), or raise."""
        self.set_flags(*self.setup.parts)
        try:
            return self._micro_batch(job, last, in_function)
        finally:
            self.set_flags()

    def _micro_batch(self, job, last, in_function):
        context = torch.autocast("cpu", self.setup.autocast) if self.setup.half else nullcontext()
        losses = []
        try:
            with context:
                if in_function and job.penalty:
                    losses.append(penalty_of(self.model))
                loss = loss_of(self.model, job.batch, job.fault)
                if not in_function and job.penalty:
                    losses.append(penalty_of(self.model))
        except Boom:
            if losses:  # a part of the micro-batch went in before
                self.discard()
            return Boom
        if job.fault == "no graph":
            if losses and in_function:
                self.discard()
            return ValueError
        names, parameters = zip(
            *((n, p) for n, p in self.model.named_parameters() if p.requires_grad), strict=True
        )
        weight = 1 if job.weight is None else job.weight
        seed = self.seed(job.weight)
        try:
            for one in (loss, *losses):
                start = torch.tensor(seed, dtype=torch.float64).to(one.dtype)
                found = torch.autograd.grad(one, parameters, start, allow_unused=True)
                for name, gradient in zip(names, found, strict=True):
                    if gradient is not None:
                        true = gradient.double() * (weight / start.item() if seed else 1.0)
                        self.gradients[name] = self.gradients.get(name, 0) + true
        except Boom:
            self.discard()
            return Boom
        self.jobs.append(job)
        self.losses = [*self.losses, loss.detach()] if len(self.jobs) > 1 else [loss.detach()]
        self.last_weights = [job.weight for job in self.jobs]
        if len(self.jobs) < self.length() and not last:
            return loss, False, False, None
        return self.close(job, loss)

    def close_by_hand(self):
        self.set_flags(*self.setup.parts)
        try:
            return self.close(self.jobs[-1], None)
        finally:
            self.set_flags()

    def close(self, job, loss):
        weights = [1 if job.weight is None else job.weight for job in self.jobs]
        total = 1 if self.setup.is_sum else sum(weights)
        weighted = job.weight is not None
        # At the end of a window what is frozen has no gradient, whatever it had before.
        parameters = {
            n: p
            for n, p in self.model.named_parameters()
            if p.requires_grad and n in self.gradients
        }
        true = {name: self.gradients[name] / (total or 1) for name in parameters}
        norm, clip, finite = None, 1.0, True
        # Whether the weights sum to 0 is known at once only without a device.
        if self.setup.checked and (total > 0 or any(job.as_tensor for job in self.jobs)):
            norm = torch.linalg.vector_norm(
                torch.cat([g.flatten() for g in true.values()]), self.setup.norm_type
            ).item()
            finite = norm < math.inf
            if self.setup.max_norm is not None:
                clip = min(1.0, self.setup.max_norm / (norm + 1e-6))
        apply = total > 0 and finite
        if apply and job.fault == "update" and self.setup.yields:
            self.discard()
            return Boom
        if apply:
            for name, parameter in parameters.items():
                parameter.grad = (true[name] * clip).to(parameter.dtype)
            self.optimizers.step()
            self.optimizers.schedule()
        self.model.zero_grad()
        if norm is not None and self.setup.autocast == torch.float16:
            self.tracker = self.tracker + 1 if finite else 0
            self.scale *= 1.0 if finite else 0.5
            if self.tracker == 2:
                self.scale, self.tracker = self.scale * 2, 0
        if weighted and self.setup.half:  # the weight of one window may be small
            known = max(power_of_two_near(total / len(self.jobs)), self.window_reference / 2)
            self.reference = known if total > 0 else self.window_reference
        self.updates += apply
        self.skipped += not apply
        self.discard()
        return loss, True, apply, norm if total > 0 else None

    def update_by_hand(self, batch):
        self.optimizers.zero_grad()
        loss_of(self.model, batch).backward()
        self.optimizers.step()
        self.optimizers.zero_grad()

    def forward(self, batch, *blocks, inside=False):
        """Of a loss that the window does not take in: only statistics move."""
        self.set_flags(*blocks, *self.setup.parts if inside else ())
        half = torch.autocast("cpu", self.setup.autocast) if self.setup.half else nullcontext()
        with torch.no_grad(), half if inside else nullcontext():
            loss_of(self.model, batch)
        self.set_flags()


LENGTHS = st.sampled_from([1, 2, 2, 3, 3, 4, None])


@st.composite
def setups(draw):
    kind = draw(st.sampled_from(list(MODELS)))
    autocast = draw(
        st.sampled_from([None, None, torch.float32, torch.bfloat16, torch.float16, torch.float16])
    )
    half = autocast in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half else draw(st.sampled_from([torch.float32, torch.float64]))
    optimizer = draw(st.sampled_from(OPTIMIZERS))
    implementations = [{"foreach": False}, {"foreach": True}]
    if optimizer[0] is not torch.optim.RMSprop and not optimizer[1].get("dampening"):
        implementations += [{"fused": True}] * 2
    implementation = draw(st.sampled_from(implementations))
    yields = draw(st.booleans())
    max_norm = draw(st.sampled_from([None, 0.05, 1.0, math.inf]))
    # Without the optimizer only the user can seed fused SGD, and max_norm goes to amp only.
    by_module = (
        yields
        and not (implementation.get("fused") and optimizer[1].get("momentum"))
        and draw(st.booleans())
    )
    return Setup(
        kind=kind,
        dtype=dtype,
        autocast=autocast,
        optimizer=optimizer,
        several=draw(st.booleans()),
        implementation=implementation,
        rates=draw(st.sampled_from([(0.1, 0.1), (0.01, 0.1)])),
        decays=draw(st.sampled_from([(0.0, 0.0), (0.1, 0.0)])),
        lengths=draw(st.lists(LENGTHS, min_size=1, max_size=3)),
        is_sum=draw(st.sampled_from([False, False, True])),
        max_norm=None if by_module and autocast is None else max_norm,
        norm_type=draw(st.sampled_from([1.0, 2.0, math.inf])),
        yields=yields,
        by_module=by_module,
        part=draw(st.sampled_from([None, None, *LAYERS[kind]])),
        init_scale=draw(st.sampled_from([65536.0, 256.0, 2.0**24])),
        seed=draw(st.integers(0, 5)),
    )


WEIGHTS = st.sampled_from([0, 1, 1, 2, 3, 7, 1000, 0.5, 2.5])
JOBS = st.tuples(
    st.integers(1, 4),
    st.integers(0, 99),
    WEIGHTS,
    st.booleans(),
    st.sampled_from(FAULTS),
    st.sampled_from([0, 0, 1]),
)
FACES = st.sampled_from(["call", "call", "call", "last", "block"])
DISTURBANCES = [
    *["zero_grad", "zeros", "backward", "written"],
    *["another step", "another step that yields"],
]
MILD = [None, "nan gradient", "inf gradient", "nan loss"]


class Fuzz(RuleBasedStateMachine):
    operations = 0

    @initialize(setup=setups())
    def begin(self, setup):
        torch.set_num_threads(1)
        self.setup = setup
        self.oracle = Oracle(setup)
        self.model = setup.make_model()
        self.optimizers = setup.make_optimizers(self.model, setup.implementation)
        self.blocks = []
        self.others = {}
        self.step = self.make_step()

    def make_step(self):
        setup, model = self.setup, self.model

        def forward(job):
            if job.penalty:
                self.step.backward(job.handed_over(penalty_of(model)))
            return job.handed_over(loss_of(model, job.batch, job.fault))

        def yielding(job):
            yield forward(job)
            if job.fault == "update":
                raise Boom
            self.optimizers.step()
            self.optimizers.schedule()
            self.optimizers.zero_grad()

        clipping = {"max_norm": setup.max_norm, "norm_type": setup.norm_type}
        length = accumulate(
            lambda updates: setup.lengths[updates % len(setup.lengths)],
            model if setup.by_module else None,
            reduction="sum" if setup.is_sum else "mean",
        )
        parts = [frozen(model, pattern) for pattern, *_ in setup.parts]
        if setup.autocast is not None:
            parts.append(
                amp(
                    dtype=setup.autocast,
                    init_scale=setup.init_scale,
                    growth_interval=2,
                    **clipping if setup.by_module else {},
                )
            )
        if setup.by_module:
            step = length(yielding)
            for part in parts:
                step = part(step)
            return step
        after = () if setup.yields else self.optimizers.schedule
        return train_step(list(self.optimizers), length, *parts, after=after, **clipping)(
            yielding if setup.yields else forward
        )

    def batch(self, rows, seed):
        generator = torch.Generator().manual_seed(seed)
        shape = (rows, *INPUTS[self.setup.kind])
        if self.setup.kind == "tied":
            return torch.randint(7, shape, generator=generator), torch.randint(
                7, shape, generator=generator
            )
        return torch.randn(shape, generator=generator).to(self.setup.dtype), torch.randint(
            3, (rows,), generator=generator
        )

    def job(self, drawn, weighted, faults=FAULTS):
        rows, seed, weight, as_tensor, fault, penalty = drawn
        fault = fault if fault in faults and (self.setup.checked or fault not in MILD) else None
        if self.oracle.jobs:
            weighted = self.oracle.jobs[0].weight is not None
        weighted = weighted and not self.setup.is_sum
        return Job(
            self.batch(rows, seed),
            weight if weighted else None,
            as_tensor and weighted,
            fault,
            bool(penalty),
        )

    # Operations.

    @rule(drawn=st.lists(st.tuples(JOBS, FACES), min_size=1, max_size=4), weighted=st.booleans())
    def micro_batches(self, drawn, weighted):
        for one, face in drawn:
            job = self.job(one, weighted)
            by_hand = face == "block" and not self.setup.yields
            expected = self.oracle.micro_batch(job, face == "last", not by_hand)
            self.compare(
                job,
                expected,
                self.by_hand if by_hand else self.step.last if face == "last" else self.step,
            )
            self.nothing_differs()

    def by_hand(self, job):
        caught = None
        with self.step as result:
            loss = loss_of(self.model, job.batch, job.fault)
            penalty = penalty_of(self.model)
            try:
                self.step.backward(job.handed_over(loss))
            except (Boom, ValueError) as error:
                caught = error
            else:
                if job.penalty:
                    self.step.backward(penalty)
        if caught is not None:
            raise caught
        return result

    def compare(self, job, expected, call):
        if isinstance(expected, type):
            try:
                call(job)
            except expected:
                return
            raise AssertionError(f"no {expected}")
        result = call(job)
        loss, complete, updated, norm = expected
        if job is not None:
            self.close(result.loss, loss, "loss")
        weights = torch.tensor(
            [1.0 if w is None else w for w in self.oracle.last_weights], dtype=torch.float64
        )
        losses = torch.stack(self.oracle.losses).double()
        if weights.sum() > 0 and not losses.isnan().any():
            total = 1 if self.setup.is_sum else weights.sum()
            self.close(result.window_loss, (losses * weights).sum() / total, "window_loss")
        assert (result.complete, result.updated) == (complete, updated)
        if norm is not None and norm < math.inf:
            self.close(result.grad_norm, norm, "norm")

    @rule(jobs=st.lists(JOBS, min_size=1, max_size=5), weighted=st.booleans(), sized=st.booleans())
    def over(self, jobs, weighted, sized):
        if self.oracle.jobs:
            weighted = self.oracle.jobs[0].weight is not None
        jobs = [self.job(drawn, weighted, MILD) for drawn in jobs]
        for i, job in enumerate(self.step.over(jobs if sized else iter(jobs)), 1):
            self.compare(job, self.oracle.micro_batch(job, i == len(jobs), True), self.step)

    @precondition(lambda self: None not in self.setup.lengths)
    @rule(
        jobs=st.lists(JOBS, min_size=1, max_size=3),
        weighted=st.booleans(),
        updates=st.integers(1, 3),
    )
    def over_again_and_again(self, jobs, weighted, updates):
        if self.oracle.jobs:
            weighted = self.oracle.jobs[0].weight is not None
        jobs = [self.job(drawn, weighted, MILD) for drawn in jobs]
        closed = self.oracle.updates + self.oracle.skipped
        for job in self.step.over(jobs, updates=updates):
            assert self.oracle.updates + self.oracle.skipped < closed + updates
            self.compare(job, self.oracle.micro_batch(job, False, True), self.step)
        assert self.oracle.updates + self.oracle.skipped == closed + updates

    @rule()
    def close_by_hand(self):
        if not self.oracle.jobs:
            result = self.step.close()
            assert (result.complete, result.updated, result.window_loss) == (False, False, None)
        elif self.setup.yields:
            with pytest.raises(RuntimeError):
                self.step.close()
        else:
            self.compare(None, self.oracle.close_by_hand(), lambda _: self.step.close())

    @rule()
    def discard(self):
        self.step.discard()
        self.oracle.discard()

    @precondition(lambda self: self.oracle.jobs)
    @rule(drawn=JOBS)
    def mixing_weights_is_refused(self, drawn):
        job = self.job(drawn, False, [])
        job.weight, job.as_tensor, job.penalty = 3 if job.weight is None else None, False, False
        self.compare(job, TypeError, self.step)
        self.oracle.forward(job.batch, inside=True)

    @rule(drawn=JOBS, how=st.sampled_from(["zero_grad", "zeros", "backward"]))
    def a_change_inside_a_micro_batch_is_refused(self, drawn, how):
        """Between two losses. The window is dropped."""
        job = self.job(drawn, False, [])
        job.penalty = False

        def call(job):
            with self.step:
                self.step.backward(job.handed_over(loss_of(self.model, job.batch)))
                self.disturb(how, job.batch, [])
                self.step.backward(job.handed_over(penalty_of(self.model)))

        if not self.setup.yields:
            self.compare(job, RuntimeError, call)
            self.oracle.forward(job.batch, inside=True)
            if how == "backward":
                self.oracle.forward(job.batch, inside=True)
            self.oracle.discard()

    def disturb(self, how, batch, layers):
        """Do to `.grad` what a step must not notice between two micro-batches."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if how == "zero_grad":
            self.optimizers.zero_grad()
        elif how == "zeros":
            self.optimizers.zero_grad(set_to_none=False)
        elif how == "backward":
            (100 * loss_of(self.model, batch)).backward()
        elif how == "written":
            for p in parameters:
                p.grad = torch.full_like(p, math.nan)
        else:
            self.other_step(how)()

    def other_step(self, kind):
        """Another step over the same parameters, with a window of its own. It moves nothing."""
        if kind not in self.others:
            model, part = self.model, accumulate(2, self.model)
            if kind == "another step":
                part = train_step(torch.optim.SGD(model.parameters(), lr=0.0), accumulate(3))

            def yielding():
                yield penalty_of(model)

            self.others[kind] = part(
                (lambda: penalty_of(model)) if kind == "another step" else yielding
            )
        return self.others[kind]

    @rule(
        how=st.lists(st.sampled_from(DISTURBANCES), min_size=1, max_size=3),
        rows=st.integers(2, 4),
        seed=st.integers(0, 99),
        block=st.none() | st.integers(0, 2),
    )
    def disturbances(self, how, rows, seed, block):
        layers = LAYERS[self.setup.kind]
        layers = None if block is None else layers[block % len(layers)]
        if layers is None or self.leaves_something(layers):
            with nullcontext() if layers is None else frozen(self.model, layers[0]):
                for one in how:
                    self.disturb(one, self.batch(rows, seed), layers)
                    if one == "backward":  # statistics move
                        self.oracle.forward(
                            self.batch(rows, seed), *[layers] * (layers is not None)
                        )

    @rule(
        some=st.lists(st.booleans(), min_size=12, max_size=12),
        times=st.integers(1, 2),
        with_graph=st.booleans(),
    )
    def foreign_backward(self, some, times, with_graph):
        """Of something else, into any of the parameters, also in place of what is there."""
        pairs = zip(self.model.parameters(), some, strict=False)
        chosen = [p for p, is_chosen in pairs if is_chosen and p.requires_grad]
        for _ in range(times if chosen else 0):
            penalty_of(self.model).backward(inputs=chosen, create_graph=with_graph)

    @rule(rows=st.integers(1, 4), in_block=st.booleans())
    def evaluation(self, rows, in_block):
        self.model.eval()
        with torch.no_grad(), self.step if in_block else amp(dtype=torch.bfloat16):
            loss_of(self.model, self.batch(rows, 0))
        self.model.train()

    @precondition(lambda self: not self.oracle.jobs and not self.torch_would_raise())
    @rule(rows=st.integers(2, 4), seed=st.integers(0, 99), leftover=st.booleans())
    def an_update_by_hand(self, rows, seed, leftover):
        batch = self.batch(rows, seed)
        self.optimizers.zero_grad()
        loss_of(self.model, batch).backward()
        self.optimizers.step()
        if not leftover:  # into a window that follows they must not get
            self.optimizers.zero_grad()
        self.oracle.update_by_hand(batch)

    def torch_would_raise(self):
        """Fused SGD with momentum does, where a parameter joins later."""
        return self.setup.optimizer[0] is torch.optim.SGD and "fused" in self.setup.implementation

    def layers(self, choice, buffers=True):
        pattern, names, modules = LAYERS[self.setup.kind][choice % len(LAYERS[self.setup.kind])]
        return pattern, names, modules if buffers else ()

    @rule(choice=st.integers(0, 4), buffers=st.booleans())
    def enter_frozen(self, choice, buffers):
        layers = self.layers(choice, buffers)
        if self.leaves_something(layers):
            block = frozen(self.model, layers[0], buffers=buffers)
            block.__enter__()
            self.blocks.append(block)
            self.oracle.blocks.append(layers)

    def leaves_something(self, layers):
        names, _ = self.oracle.frozen_now(layers, *self.setup.parts)
        return names != {name for name, _ in self.model.named_parameters()}

    @precondition(lambda self: self.blocks)
    @rule(which=st.integers(0, 9))
    def leave_frozen(self, which):
        which %= len(self.blocks)
        self.blocks.pop(which).__exit__(None, None, None)
        self.oracle.blocks.pop(which)

    @rule(choice=st.integers(0, 4), thaw=st.booleans(), buffers=st.booleans())
    def freeze_or_unfreeze(self, choice, thaw, buffers):
        pattern, names, modules = layers = self.layers(choice, buffers or thaw)
        if thaw:
            unfreeze(self.model, pattern)
            self.oracle.for_good = [
                self.oracle.for_good[0] - names,
                self.oracle.for_good[1] - {*modules},
            ]
        elif not thaw and self.leaves_something(layers):
            freeze(self.model, pattern, buffers=buffers)
            self.oracle.for_good = [
                self.oracle.for_good[0] | names,
                self.oracle.for_good[1] | {*modules},
            ]

    @rule(wipe=st.booleans())
    def save_and_load(self, wipe):
        state = copy.deepcopy(self.step.state_dict())
        self.step = self.make_step()
        if wipe:
            for parameter in self.model.parameters():
                parameter.grad = None
        self.step.load_state_dict(state)

    # What holds after each of them.

    def close(self, ours, theirs, what):
        rtol, atol = {
            torch.float64: (1e-9, 1e-11),
            torch.float32: (2e-3, 1e-4) if self.setup.half else (1e-4, 1e-6),
        }[self.setup.dtype]
        ours, theirs = (torch.as_tensor(value, dtype=torch.float64) for value in (ours, theirs))
        assert torch.allclose(ours, theirs, rtol, atol, equal_nan=True), (
            f"{what}: {ours} is not {theirs}"
        )

    @invariant()
    def nothing_differs(self):
        if not hasattr(self, "step"):
            return
        Fuzz.operations += 1
        self.oracle.set_flags()
        assert (self.step.updates, self.step.skipped) == (self.oracle.updates, self.oracle.skipped)
        assert self.optimizers.rates() == self.oracle.optimizers.rates()
        assert [m.training for m in self.model.modules()] == [
            m.training for m in self.oracle.model.modules()
        ]
        assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
        if self.setup.autocast == torch.float16:
            state = self.step.state_dict()
            assert (state["loss_scale"], state["growth_tracker"]) == (
                self.oracle.scale,
                self.oracle.tracker,
            )
        with torch.no_grad():
            for (name, ours), theirs in zip(
                self.model.named_buffers(), self.oracle.model.buffers(), strict=True
            ):
                self.close(ours, theirs, name)
                theirs.copy_(ours)
            for (name, ours), theirs in zip(
                self.model.named_parameters(), self.oracle.model.parameters(), strict=True
            ):
                assert ours.requires_grad == theirs.requires_grad, name
                self.close(ours, theirs, name)
                theirs.copy_(ours)
                their_state = self.oracle.optimizers.state_of(theirs)
                for key, value in self.optimizers.state_of(ours).items():
                    if isinstance(value, torch.Tensor):
                        expected = their_state.get(key)
                        # A step that was skipped may leave zeros where the oracle has nothing yet.
                        self.close(
                            value,
                            torch.zeros_like(value) if expected is None else expected,
                            f"{key} of {name}",
                        )
                        if expected is not None:
                            expected.copy_(value)

    def teardown(self):
        with ExitStack() as stack:
            for block in getattr(self, "blocks", ()):
                stack.push(block)
        if hasattr(self, "model"):  # else steps of later tests warn of unfrozen parameters
            self.model.zero_grad()


def test_fuzz(capsys):
    Fuzz.operations = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while Fuzz.operations < OPERATIONS:
            run_state_machine_as_test(
                Fuzz,
                settings=settings(
                    max_examples=100, stateful_step_count=25, report_multiple_bugs=False
                ),
            )
    with capsys.disabled():
        print(f"\n{Fuzz.operations:,} operations without a difference")
