"""Training recipes that need more than one optimizer, step or backward, against the loop by hand.

By hand every forward has an autocast block of its own; in a step there is one around the whole
function. By hand every loss is divided by the length of its window, which the last window changes.
"""

import math
from contextlib import contextmanager, nullcontext

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
    yield
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
    "recipe, face", [(awp, "block"), (awp_first, "block"), (sam, "block"), (awp_first, "function")]
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

    if face == "function":
        step = step(function)
    for batch in step.over(batches):
        found = [parameter.detach().clone() for parameter in parameters]
        if face == "function":
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
