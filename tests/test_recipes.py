"""Training recipes that need more than one optimizer, step or backward, against the loop by hand.

By hand every forward has an autocast block of its own; in a step there is one around the whole
function. By hand every loss is divided by the length of its window, which the last window changes.
"""

import inspect
import math
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from oracles import (
    OPTIMIZERS,
    distance,
    loss_of,
    make_batches,
    make_model,
    same_bits,
    state_of,
    windows_of,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from trainkit import accumulate, amp, frozen, train_step

LOSSES = (Path(__file__).parents[1] / "docs" / "recipes" / "losses.md").read_text()
FULL, HALF = torch.float64, torch.float16
# The model computes in float64; or it is stored in float32, and computes in this under autocast.
precisions = pytest.mark.parametrize("dtype", [FULL, torch.bfloat16, HALF], ids=str)
STORED = {FULL: FULL, torch.bfloat16: torch.float32, HALF: torch.float32}
TOLERANCE = {FULL: 1e-12, torch.bfloat16: 1e-6, HALF: 1e-6}


def mixed(dtype, init_scale=2.0**10):
    """The parts that compute in this dtype."""
    return [] if dtype == FULL else [amp(dtype=dtype, init_scale=init_scale, growth_interval=2)]


def autocast(dtype):
    return nullcontext() if dtype == FULL else torch.autocast("cpu", dtype)


def scaler_for(dtype, init_scale=2.0**10):
    return torch.amp.GradScaler(
        "cpu", init_scale=init_scale, growth_interval=2, enabled=dtype == HALF
    )


def scale_of(step):
    return step.state_dict().get("loss_scale", 1.0)


def state(*pairs):
    """Every tensor of several models and their optimizers, counters too."""
    return [tensor.double() for model, optimizer in pairs for tensor in state_of(model, optimizer)]


def update_by_hand(scaler, optimizers, parameters, max_norm=math.inf):
    """One norm over everything, and all optimizers step or none."""
    # A scaler unscales once for each optimizer, also what two of them share; hence one for all.
    scaler.unscale_(torch.optim.SGD(parameters))
    if clip_grad_norm_(parameters, max_norm).isfinite():
        for optimizer in optimizers:
            optimizer.step()
    if scaler.is_enabled():
        scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad()


def train_by_hand(model, optimizers, batches, dtype, micro_batch, max_norm=math.inf):
    """Windows of two; ``micro_batch(batch, backward)`` hands its losses over. Returns the scale."""
    scaler = scaler_for(dtype)
    for window in windows_of(batches, 2):
        for batch in window:
            micro_batch(batch, lambda loss: scaler.scale(loss / len(window)).backward())  # noqa: B023
        update_by_hand(scaler, optimizers, list(model.parameters()), max_norm)
    return scaler.get_scale()


# Two steps: a GAN with the non-saturating loss (Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661).


def networks(dtype, batch_norm=False):
    g = make_model(STORED[dtype])
    normalised = nn.BatchNorm1d(6) if batch_norm else nn.Identity()
    d = nn.Sequential(
        nn.Linear(3, 6, bias=not batch_norm), normalised, nn.Tanh(), nn.Linear(6, 1)
    ).to(STORED[dtype])
    return g, d, OPTIMIZERS["SGD momentum"](g.parameters()), OPTIMIZERS["AdamW"](d.parameters())


def d_loss(d, real, fake):
    return F.softplus(-d(real)).mean() + F.softplus(d(fake)).mean()


def g_loss(g, d, z):
    return F.softplus(-d(g(z))).mean()


def train_gan_by_hand(g, d, optimizer_g, optimizer_d, batches, dtype, init_scale):
    """D is updated every two batches, G every three. D evaluates in G's turn, as if frozen."""
    scaler_d, scaler_g = scaler_for(dtype, init_scale), scaler_for(dtype, init_scale)
    for i, (z, real) in enumerate(batches, 1):
        is_last = i == len(batches) == 13  # and alone in both windows

        with torch.no_grad(), autocast(dtype):
            fake = g(z)
        with autocast(dtype):
            loss = d_loss(d, real, fake)
        scaler_d.scale(loss / (1 if is_last else 2)).backward()
        if i % 2 == 0 or is_last:
            update_by_hand(scaler_d, [optimizer_d], list(d.parameters()))

        d.requires_grad_(False).eval()
        with autocast(dtype):
            loss = g_loss(g, d, z)
        scaler_g.scale(loss / (1 if is_last else 3)).backward()
        d.requires_grad_(True).train()
        if i % 3 == 0 or is_last:
            update_by_hand(scaler_g, [optimizer_g], list(g.parameters()))
    return scaler_d.get_scale(), scaler_g.get_scale()


@pytest.mark.parametrize("g_is", ["detached", "frozen"])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("dtype, init_scale", [(FULL, 1.0), (HALF, 2.0**10), (HALF, 2.0**24)])
def test_two_steps_of_a_gan_whose_windows_are_open_at_the_same_time(
    dtype, init_scale, batch_norm, g_is
):
    batches = make_batches([4] * 12 + [2], STORED[dtype])
    eg, ed, their_g, their_d = networks(dtype, batch_norm)
    scales = train_gan_by_hand(eg, ed, their_g, their_d, batches, dtype, init_scale)

    g, d, optimizer_g, optimizer_d = networks(dtype, batch_norm)
    parts = mixed(dtype, init_scale)
    if g_is == "frozen":
        step_d = train_step(optimizer_d, accumulate(2), frozen(g), *parts)(
            lambda z, real: d_loss(d, real, g(z))
        )
    else:
        step_d = train_step(optimizer_d, accumulate(2), *parts)(
            lambda z, real: d_loss(d, real, g(z).detach())
        )
    step_g = train_step(optimizer_g, accumulate(3), frozen(d), *parts)(lambda z: g_loss(g, d, z))
    for z, real in step_d.over(batches, step_g):
        step_d(z, real)
        step_g(z)

    # float16 rounds by where G's short window is divided: each loss by 1, or the sum by 3.
    tolerance = 1e-3 if dtype == HALF else 1e-12
    assert (
        distance(state((g, optimizer_g), (d, optimizer_d)), state((eg, their_g), (ed, their_d)))
        <= tolerance
    )
    assert (scale_of(step_d), scale_of(step_g)) == scales
    assert (step_d.updates + step_d.skipped, step_g.updates + step_g.skipped) == (7, 5)
    assert (step_d.skipped > 0) == (step_g.skipped > 0) == (init_scale == 2.0**24)


def test_backward_of_g_through_a_trainable_d_adds_nothing_to_the_window_of_d():
    batches = make_batches([4, 4, 2])
    g, d, optimizer_g, optimizer_d = networks(FULL)
    step_d = train_step(optimizer_d, accumulate(2))(lambda z, real: d_loss(d, real, g(z).detach()))
    step_g = train_step(optimizer_g, accumulate(3))(lambda z: g_loss(g, d, z))
    for batch in batches[:2]:
        step_d(*batch)
        step_g(batch[0])
    _, expected, _, theirs = networks(FULL)
    for z, real in batches[:2]:
        (d_loss(expected, real, g(z).detach()) / 2).backward()
    theirs.step()
    assert distance(state((d, optimizer_d)), state((expected, theirs))) <= 1e-12


# One step with two optimizers.


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize(
    "kinds",
    [("AdamW", "SGD"), ("AdamW fused", "SGD momentum fused"), ("AdamW fused", "SGD momentum")],
)
@pytest.mark.parametrize("max_norm", [0.05, math.inf])
@precisions
def test_two_optimizers_in_one_step_have_one_norm_and_one_verdict(dtype, max_norm, kinds, shared):
    def build(a, b):
        model = make_model(STORED[dtype])
        parameters = list(model.parameters())
        return model, [
            OPTIMIZERS[a](parameters[:3]),
            OPTIMIZERS[b](parameters[2 if shared else 3 :]),
        ]

    def loss(model, batch, spike):
        return (
            loss_of(model, batch) + (model[2].bias * spike).sum()
        )  # a gradient for the second optimizer alone

    spikes = [0, 0, 0, math.inf, 0, 0, 0]
    batches = list(zip(make_batches([4] * 7, STORED[dtype]), spikes, strict=True))
    expected, theirs = build(*(kind.removesuffix(" fused") for kind in kinds))

    def micro_batch(batch, backward):
        with autocast(dtype):
            micro_batch_loss = loss(expected, *batch)
        backward(micro_batch_loss)

    scale = train_by_hand(expected, theirs, batches, dtype, micro_batch, max_norm)

    model, optimizers = build(*kinds)
    step = train_step(optimizers, accumulate(2), *mixed(dtype), max_norm=max_norm)(
        lambda b, spike: loss(model, b, spike)
    )
    results = [step(*batch) for batch in step.over(batches)]
    assert [result.updated for result in results if result.complete] == [True, False, True, True]
    assert (
        distance(state(*((model, o) for o in optimizers)), state(*((expected, o) for o in theirs)))
        <= TOLERANCE[dtype]
    )
    assert scale_of(step) == scale


@pytest.mark.parametrize("max_norm", [None, 0.05])
@precisions
def test_a_sparse_embedding_beside_dense_layers(dtype, max_norm):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3)).to(STORED[dtype])
        return model, [
            torch.optim.SparseAdam(model[0].parameters(), lr=0.05),
            OPTIMIZERS["AdamW fused"](model[1].parameters()),
        ]

    batches = [
        torch.tensor(row)
        for row in ([1, 2, 2, 3], [2, 5, 5, 5], [0, 0, 1, 8], [8, 8, 2, 2], [4, 4, 1, 4])
    ]
    model, optimizers = build()
    step = train_step(optimizers, accumulate(2), *mixed(dtype), max_norm=max_norm)(
        lambda rows: model(rows).square().mean()
    )
    norms = [step(rows).grad_norm for rows in step.over(batches)]

    expected, theirs = build()
    for window in windows_of(batches, 2):
        for rows in window:
            with autocast(dtype):
                loss = expected(rows).square().mean()
            (
                1024 * loss / len(window)
            ).backward()  # a power of two, so that in bfloat16 and float64 it is as good as none
        gradients = [parameter.grad for parameter in expected.parameters()]
        norm = torch.stack([gradient.to_dense().norm() for gradient in gradients]).norm() / 1024
        clip = 1 if max_norm is None else min(1, max_norm / (norm + 1e-6))
        for gradient in gradients:
            gradient.mul_(clip / 1024)
        for optimizer in theirs:
            optimizer.step()
            optimizer.zero_grad()
    ours = state(*((model, optimizer) for optimizer in optimizers))
    assert (
        distance(ours, state(*((expected, optimizer) for optimizer in theirs))) <= TOLERANCE[dtype]
    )
    assert max_norm is None or abs(norms[-1] - norm) <= TOLERANCE[dtype] * norm


# A gradient inside of the loss: WGAN-GP (Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028).


def critic_losses(d, real, fake):
    between = torch.lerp(
        real, fake, torch.linspace(0, 1, len(real)).to(real)[:, None]
    ).requires_grad_()
    (slope,) = torch.autograd.grad(d(between).sum(), between, create_graph=True)
    return d(fake).mean() - d(real).mean(), 10 * (slope.norm(dim=1) - 1).square().mean()


@pytest.mark.parametrize("given", ["returned", "as a further loss"])
@precisions
def test_a_gradient_penalty(dtype, given):
    batches = make_batches([4] * 5, STORED[dtype])
    batches = [(x[:, :3], y) for x, y in batches]
    _, expected, _, theirs = networks(dtype)

    def micro_batch(batch, backward):
        with autocast(dtype):
            loss, penalty = critic_losses(expected, *batch)
        if given == "returned":
            backward(loss + penalty)
        else:
            backward(penalty)
            backward(loss)

    scale = train_by_hand(expected, [theirs], batches, dtype, micro_batch)

    _, d, _, optimizer = networks(dtype)

    @train_step(optimizer, accumulate(2), *mixed(dtype))
    def step(real, fake):
        loss, penalty = critic_losses(d, real, fake)
        if given == "returned":
            return loss + penalty
        step.backward(penalty)
        return loss

    for batch in step.over(batches):
        step(*batch)
    assert distance(state((d, optimizer)), state((expected, theirs))) <= TOLERANCE[dtype]
    assert scale_of(step) == scale


# Weights that move inside of a micro-batch.


@contextmanager
def moved(parameters, moves):
    """The parameters, in place, by so much; and back again, exactly."""
    found = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        torch._foreach_add_(parameters, moves)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, found)


def awp(parameters, forward, backward):
    """Adversarial weight perturbation (Wu et al. 2020, https://arxiv.org/abs/2004.05884)."""
    loss = forward()
    slopes = torch.autograd.grad(loss, parameters, retain_graph=True)
    backward(loss)
    with moved(
        parameters,
        [
            0.3 * p.detach().norm() / slope.norm() * slope
            for p, slope in zip(parameters, slopes, strict=True)
        ],
    ):
        backward(forward())


def awp_first(parameters, forward, backward):
    """The same the other way round, in a direction that needs no gradient."""
    with moved(parameters, [0.3 * parameter.detach().sign() for parameter in parameters]):
        backward(forward())
    backward(forward())


def sam(parameters, forward, backward):
    """Sharpness-aware minimisation (Foret et al. 2021, https://arxiv.org/abs/2010.01412)."""
    slopes = torch.autograd.grad(forward(), parameters)
    norm = torch.stack([slope.norm() for slope in slopes]).norm()
    with moved(parameters, [0.5 * slope / norm for slope in slopes]):
        backward(forward())


@pytest.mark.parametrize(
    "recipe, face",
    [
        (awp, "block"),
        (awp_first, "block"),
        (sam, "block"),
        (awp_first, "function"),
        (sam, "generator"),
    ],
)
@precisions
def test_weights_that_move_between_two_forwards(dtype, recipe, face):
    """The second forward sees the weights as they are, and no copy that autocast made before."""
    batches = make_batches([4] * 5, STORED[dtype])
    expected = make_model(STORED[dtype])
    theirs = OPTIMIZERS["AdamW"](expected.parameters())

    def micro_batch(batch, backward):
        def forward():
            with autocast(dtype):
                return loss_of(expected, batch)

        recipe(list(expected.parameters()), forward, backward)

    scale = train_by_hand(expected, [theirs], batches, dtype, micro_batch)

    model = make_model(STORED[dtype])
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS["AdamW"](parameters)
    step = train_step(optimizer, accumulate(2), *mixed(dtype))

    def function(batch):  # awp_first, where the last loss is returned
        with moved(parameters, [0.3 * parameter.detach().sign() for parameter in parameters]):
            step.backward(loss_of(model, batch))
        return loss_of(model, batch)

    def generator(batch):  # sam, whose last backward is at the yield
        slopes = torch.autograd.grad(loss_of(model, batch), parameters)
        norm = torch.stack([slope.norm() for slope in slopes]).norm()
        with moved(parameters, [0.5 * slope / norm for slope in slopes]):
            yield loss_of(model, batch)
        optimizer.step()

    if face != "block":
        step = step(function if face == "function" else generator)
    for batch in step.over(batches):
        found = [parameter.detach().clone() for parameter in parameters]
        if face != "block":
            result = step(batch)
        else:
            with step as result:
                recipe(parameters, lambda: loss_of(model, batch), step.backward)  # noqa: B023
        assert result.updated or same_bits(found, parameters)
    assert distance(state((model, optimizer)), state((expected, theirs))) <= TOLERANCE[dtype]
    assert scale_of(step) == scale


# Manual optimisation.


@precisions
def test_two_optimizers_stepped_below_the_yield_in_a_way_of_ones_own(dtype):
    def build():
        model = make_model(STORED[dtype])
        return (
            model,
            OPTIMIZERS["AdamW"](model[0].parameters()),
            OPTIMIZERS["SGD momentum"](model[2].parameters()),
        )

    batches = make_batches([4] * 9, STORED[dtype])
    expected, their_body, their_head = build()
    scaler = scaler_for(dtype)
    for i, window in enumerate(windows_of(batches, 2)):
        for batch in window:
            with autocast(dtype):
                loss = loss_of(expected, batch)
            scaler.scale(loss / len(window)).backward()
        scaler.unscale_(their_body)
        scaler.unscale_(their_head)
        clip_grad_norm_(expected[2].parameters(), 0.01)
        scaler.step(their_head)
        if i % 2 == 0:
            scaler.step(their_body)
        scaler.update()
        expected.zero_grad()

    model, body, head = build()

    @train_step([body, head], accumulate(2), *mixed(dtype))
    def step(batch):
        yield loss_of(model, batch)
        clip_grad_norm_(model[2].parameters(), 0.01)
        head.step()
        if step.updates % 2 == 0:
            body.step()
        model.zero_grad()

    for batch in step.over(batches):
        step(batch)
    ours, theirs = (
        state((model, head), (model, body)),
        state((expected, their_head), (expected, their_body)),
    )
    assert distance(ours, theirs) <= TOLERANCE[dtype]
    assert scale_of(step) == scaler.get_scale()


# A D whose BatchNorm sees its batches while G learns (docs/recipes/gan.md).


def holds_d(how, d):
    """The parts that make D a constant in the step of G, and leave its BatchNorm alone."""
    return [frozen(d, buffers=False)] if how == "buffers=False" else []


@pytest.mark.parametrize(
    "how",
    [
        "nothing",
        pytest.param(
            "buffers=False",
            marks=pytest.mark.skipif(
                "buffers" not in inspect.signature(frozen).parameters, reason="no buffers="
            ),
        ),
    ],
)
def test_a_d_that_keeps_its_batch_statistics(how):
    batches = make_batches([4] * 5)
    eg, ed, their_g, their_d = networks(FULL, batch_norm=True)
    for window in windows_of(batches, 2):
        for i, (z, real) in enumerate(window, 1):
            (d_loss(ed, real, eg(z).detach()) / len(window)).backward()
            if i == len(window):
                their_d.step()
                their_d.zero_grad()
            ed.requires_grad_(False)
            (g_loss(eg, ed, z) / len(window)).backward()
            ed.requires_grad_(True)
        their_g.step()
        their_g.zero_grad()

    g, d, optimizer_g, optimizer_d = networks(FULL, batch_norm=True)
    step_d = train_step(optimizer_d, accumulate(2))(lambda z, real: d_loss(d, real, g(z).detach()))
    step_g = train_step(optimizer_g, accumulate(2), *holds_d(how, d))(lambda z: g_loss(g, d, z))
    for z, real in step_d.over(batches, step_g):
        step_d(z, real)
        step_g(z)
    assert (
        distance(state((g, optimizer_g), (d, optimizer_d)), state((eg, their_g), (ed, their_d)))
        <= 1e-12
    )
    assert torch.equal(d[1].num_batches_tracked, torch.tensor(15))  # real, fake, and of G


# Losses that are no plain mean over rows (docs/recipes/losses.md).

CLASS_WEIGHT = torch.tensor([1.0, 8.0, 0.25], dtype=FULL)


def labelled(sizes):
    generator = torch.Generator().manual_seed(4)
    return [(x, torch.randint(3, (len(x),), generator=generator)) for x, _ in make_batches(sizes)]


def gradient_of(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def gradients_by(step, model, batches, *counts):
    """The gradient of each window of a step that keeps its gradients."""
    for batch in step.over(batches):
        step(*batch, *counts)
    return model.seen


def keeps_gradients(model, *parts):
    """A step over SGD with a learning rate of 0 that records the gradients of its windows."""
    model.seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: model.seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    )
    return train_step(optimizer, *parts)


def off(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def joined(batches):
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights(smoothing):
    batches, model = labelled([4, 7, 2, 5, 3]), make_model()

    def loss_of_rows(x, y):
        return F.cross_entropy(model(x), y, weight=CLASS_WEIGHT, label_smoothing=smoothing)

    step = keeps_gradients(model, accumulate(3))(
        lambda x, y: {"loss": loss_of_rows(x, y), "weight": CLASS_WEIGHT[y].sum()}
    )
    for ours, window in zip(
        gradients_by(step, model, batches), windows_of(batches, 3), strict=True
    ):
        theirs = gradient_of(loss_of_rows(*joined(window)), model)
        assert off(ours, theirs) <= 1e-12
        rows = sum(gradient_of(loss_of_rows(x, y), model) * len(x) for x, y in window)
        assert off(rows / sum(len(x) for x, _ in window), theirs) > 0.1  # rows are no weight here


def two_terms(model, x, y, rows, boxes):
    classes = F.cross_entropy(model(x), y, reduction="sum")
    return classes / rows + (model(x)[y == 1] - 1).square().sum() / boxes


def counts_of(y):
    return len(y), max(1, int((y == 1).sum()))


def test_two_denominators_in_one_loss():
    batches, model = labelled([4, 7, 2, 5, 3]), make_model()
    step = keeps_gradients(model, accumulate(None, reduction="sum"))(
        lambda *batch: two_terms(model, *batch)
    )
    windows = windows_of(batches, 3)
    for window in windows:
        counts = counts_of(torch.cat([y for _, y in window]))
        for x, y in window:
            step(x, y, *counts)
        step.close()
    exact = [
        gradient_of(two_terms(model, *joined(w), *counts_of(joined(w)[1])), model) for w in windows
    ]
    assert max(map(off, model.seen, exact)) <= 1e-12

    step = keeps_gradients(model, accumulate(3))(
        lambda x, y: (two_terms(model, x, y, *counts_of(y)), len(y))
    )
    worst = max(map(off, gradients_by(step, model, batches), exact))
    (said,) = re.findall(r"a weight of rows gives a gradient that is off by (\d+) %", LOSSES)
    assert round(100 * worst) == int(said)


def contrast(log_scale, images, texts):
    logits, target = log_scale.exp() * images @ texts.T, torch.arange(len(images))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def test_contrastive_losses_over_cached_features():
    model = nn.ModuleDict({"image": make_model(), "text": make_model()})
    with torch.no_grad():
        model["text"][0].weight.mul_(-0.7)
    model.log_scale = nn.Parameter(torch.tensor(0.5, dtype=FULL))
    generator = torch.Generator().manual_seed(4)
    window = [torch.randn(2, 3, 4, generator=generator, dtype=FULL) for _ in range(4)]

    def encode(batch):
        dropped = torch.nn.functional.dropout
        with torch.random.fork_rng():
            torch.manual_seed(int(batch.sum() * 1e6))  # the same dropout in both runs
            return [dropped(model[which](x), 0.2) for which, x in zip(model, batch, strict=True)]

    def step(*window):
        with torch.no_grad():
            features = zip(*map(encode, window), strict=True)
        images, texts = (torch.cat(f).requires_grad_() for f in features)
        loss = contrast(model.log_scale, images, texts)
        slopes = torch.autograd.grad(loss, [images, texts], retain_graph=True)
        for batch, *parts in zip(window, *(s.split(3) for s in slopes), strict=True):
            step.backward(sum((f * s).sum() for f, s in zip(encode(batch), parts, strict=True)))
        return loss

    step = keeps_gradients(model)(step)
    step(*window)
    images, texts = (torch.cat(f) for f in zip(*map(encode, window), strict=True))
    assert off(model.seen[0], gradient_of(contrast(model.log_scale, images, texts), model)) <= 1e-12


# Gradients (docs/recipes/gradients.md).


def without_conflict(first, second):
    def against(mine, other):
        return mine - (mine @ other).clamp(max=0) / (other @ other) * other

    return against(first, second) + against(second, first)


def test_gradients_of_tasks_are_combined_in_each_micro_batch():
    batches, model = make_batches([4, 4, 2]), make_model()

    def losses(x, y):
        return F.mse_loss(model(x), y), F.mse_loss(model(x), -2 * y)

    combined = [
        without_conflict(*(gradient_of(loss, model) for loss in losses(*b))) for b in batches
    ]

    @keeps_gradients(model, accumulate(2))
    def step(x, y):
        parameters = list(model.parameters())
        found = without_conflict(*(gradient_of(loss, model) for loss in losses(x, y)))
        pieces = found.split([p.numel() for p in parameters])
        return sum((p * g.view_as(p)).sum() for p, g in zip(parameters, pieces, strict=True))

    first, last = gradients_by(step, model, batches)
    assert off(first, (combined[0] + combined[1]) / 2) <= 1e-12
    assert off(last, combined[2]) <= 1e-12
    plain = sum(gradient_of(loss, model) for batch in batches[:2] for loss in losses(*batch)) / 2
    assert off(plain, first) > 0.01  # there was a conflict


@pytest.mark.parametrize("is_linear", [True, False], ids=["a mask", "clipping by value"])
def test_a_hook_is_exact_where_it_is_linear(is_linear):
    """A hook sees gradients with the share and the loss scale of the micro-batch in them."""
    batches = make_batches([4, 4], torch.float32)

    def hook(gradient):
        return gradient * 2 if is_linear else gradient.clamp(-0.05, 0.05)

    model, expected = make_model(torch.float32), make_model(torch.float32)
    for batch in batches:
        with autocast(HALF):
            loss = loss_of(expected, batch)
        (loss / 2).backward()
    for parameter in expected.parameters():
        parameter.grad = hook(parameter.grad)
    for parameter in model.parameters():
        parameter.register_hook(hook)
    step = keeps_gradients(model, accumulate(2), *mixed(HALF))(lambda *batch: loss_of(model, batch))
    (ours,) = gradients_by(step, model, batches)
    theirs = torch.cat([p.grad.flatten() for p in expected.parameters()])
    assert (off(ours, theirs) <= 2e-3) is is_linear


# Sets of parameters and optimizers.


@pytest.mark.parametrize("kind", ["AdamW fused", "SGD momentum", "Adagrad"])
def test_one_row_of_an_embedding(kind):
    embedding = nn.Embedding(5, 3)
    mask = torch.tensor([0.0, 0, 0, 1, 0])[:, None]
    embedding.weight.register_hook(lambda gradient: gradient * mask)
    optimizer = OPTIMIZERS[kind](embedding.parameters())
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = embedding.weight.detach().clone()
    step = train_step(optimizer, accumulate(2), max_norm=0.1)(
        lambda words: embedding(words).square().sum()
    )
    results = [step(torch.tensor(words)) for words in step.over([[0, 3], [1, 3], [2, 4], [3, 3]])]
    moved = (embedding.weight != before).any(dim=1)
    assert moved.tolist() == [False, False, False, True, False]
    assert results[1].grad_norm.item() == pytest.approx((2 * before[3]).norm().item(), rel=1e-6)


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2024, https://arxiv.org/abs/2405.15682)."""

    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    def switch(self, to_train):
        for group in self.param_groups:
            if group["train_mode"] is not to_train:
                group["train_mode"], beta = to_train, group["beta"]
                for p in group["params"]:
                    z = self.state[p].setdefault("z", p.detach().clone())
                    p.data.lerp_(z, 1 - beta if to_train else 1 - 1 / beta)

    def train(self):
        self.switch(True)

    def eval(self):
        self.switch(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"], "an update outside of train()"
            group["k"] += 1
            weight, beta = 1 / group["k"], group["beta"]
            for p in group["params"]:
                z = self.state[p]["z"]
                x = p.lerp(z, 1 - 1 / beta)
                z.sub_(p.grad, alpha=group["lr"])
                p.copy_(x.lerp(z, weight).lerp(z, 1 - beta))


def test_a_schedule_free_optimizer():
    batches = make_batches([4] * 5)
    expected, model = make_model(), make_model()
    theirs, optimizer = (ScheduleFree(m.parameters(), lr=0.1) for m in (expected, model))
    step = train_step(optimizer, accumulate(2), max_norm=0.5)(lambda *batch: loss_of(model, batch))
    for _ in range(2):
        theirs.train()
        for window in windows_of(batches, 2):
            for batch in window:
                (loss_of(expected, batch) / len(window)).backward()
            clip_grad_norm_(expected.parameters(), 0.5)
            theirs.step()
            theirs.zero_grad()
        theirs.eval()

        optimizer.train()
        for batch in step.over(batches):
            step(*batch)
        optimizer.eval()
        assert distance(state((model, optimizer)), state((expected, theirs))) <= 1e-12


# The smallest migration (docs/recipes/loops.md).


@pytest.mark.parametrize("n", [1, 2])
def test_a_body_that_keeps_its_zero_grad_and_its_step(n):
    batches = make_batches([4] * 5)
    expected = make_model()
    theirs = OPTIMIZERS["AdamW"](expected.parameters())
    for window in windows_of(batches, n):
        theirs.zero_grad()
        for batch in window:
            (loss_of(expected, batch) / len(window)).backward()
        theirs.step()

    model = make_model()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())

    @train_step(optimizer, accumulate(n))
    def step(x, y):
        optimizer.zero_grad()
        yield loss_of(model, (x, y))
        optimizer.step()

    for batch in step.over(batches):
        step(*batch)
    ours, theirs = state((model, optimizer)), state((expected, theirs))
    assert same_bits(ours, theirs) if n == 1 else distance(ours, theirs) <= 1e-12
