"""The laws. Each is stated once, for whatever hypothesis finds, against the loops in oracles.py."""

import copy
import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import (
    OPTIMIZERS,
    distance,
    full_batch_gradient,
    gradients_of,
    loss_of,
    make_batches,
    make_model,
    plain_loop,
    same_bits,
    scaler_loop,
    state_of,
    windows_of,
)
from torch.nn import functional as F

from trainkit import accumulate, amp, frozen, train_step

FEW = settings(max_examples=settings.default.max_examples // 3)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

sizes = st.lists(st.integers(1, 5), min_size=1, max_size=9)
lengths = st.integers(1, 5)
dtypes = st.sampled_from([torch.float64, torch.float32])
optimizers = st.sampled_from(sorted(OPTIMIZERS))
norms = st.none() | st.sampled_from([0.05, 1.0, float("inf")])


def run(step, batches):
    return [step(batch) for batch in step.over(batches)]


def made(kind, dtype=torch.float64):
    model = make_model(dtype)
    return model, OPTIMIZERS[kind](model.parameters())


@FEW
@given(sizes, dtypes, optimizers)
def test_law_1_train_step_is_the_plain_loop(sizes, dtype, kind):
    batches = make_batches(sizes, dtype)
    expected, theirs = made(kind, dtype)
    plain_loop(expected, theirs, batches)
    for parts in ([], [accumulate(1)], [amp(dtype=torch.float32)]):
        model, optimizer = made(kind, dtype)
        run(
            train_step(optimizer, *parts)(lambda batch, model=model: loss_of(model, batch)), batches
        )
        assert same_bits(state_of(model, optimizer), state_of(expected, theirs)), parts


@FEW
@given(sizes, st.integers(1, 3), st.integers(1, 3), optimizers)
def test_law_2_accumulations_multiply(sizes, a, b, kind):
    batches = make_batches(sizes)
    states = []
    for parts in ([accumulate(a), accumulate(b)], [accumulate(a * b)]):
        model, optimizer = made(kind)
        run(
            train_step(optimizer, *parts)(lambda batch, model=model: loss_of(model, batch)), batches
        )
        states.append(state_of(model, optimizer))
    assert same_bits(*states)


@FEW
@given(
    sizes,
    lengths,
    optimizers,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.permutations(range(4)),
)
def test_law_3_the_order_of_parts_does_not_matter(sizes, n, kind, dtype, order):
    batches = make_batches(sizes, torch.float32)
    states = []
    for indices, nested in itertools.product(([0, 1, 2, 3], order), (False, True)):
        model, optimizer = made(kind, torch.float32)
        parts = [
            accumulate(n),
            amp(dtype=dtype),
            frozen(model, "[0]"),
            train_step(optimizer, max_norm=0.1),
        ]

        def step(batch, model=model):
            return loss_of(model, batch)

        if nested:
            for index in indices:
                step = parts[index](step)
        else:
            step = train_step(
                optimizer, *[parts[index] for index in indices if index < 3], max_norm=0.1
            )(step)
        run(step, batches)
        states.append(state_of(model, optimizer))
    assert all(same_bits(states[0], other) for other in states[1:])


@FEW
@given(sizes, lengths, dtypes, optimizers, norms, st.sampled_from([1.0, 2.0, float("inf")]))
def test_law_4_a_window_is_one_batch(sizes, n, dtype, kind, max_norm, norm_type):
    """The last, short one too: Lightning#19987, transformers#38837."""
    batches = make_batches(sizes, dtype)
    expected, theirs = made(kind, dtype)
    plain_loop(expected, theirs, batches, n, max_norm=max_norm, norm_type=norm_type)
    model, optimizer = made(kind, dtype)
    step = train_step(optimizer, accumulate(n), max_norm=max_norm, norm_type=norm_type)
    results = run(step(lambda batch: loss_of(model, batch)), batches)
    assert distance(state_of(model, optimizer), state_of(expected, theirs)) <= TOLERANCE[dtype]
    assert sum(result.updated for result in results) == -(-len(sizes) // n)


@example([2, 1, 2], 3, torch.float64, "SGD", None, "either")
@FEW
@given(
    sizes, lengths, dtypes, optimizers, norms, st.sampled_from(["int", "tensor", "real", "either"])
)
def test_law_4_with_weights(sizes, n, dtype, kind, max_norm, given_as):
    batches = make_batches(sizes, dtype)
    expected, theirs = made(kind, dtype)
    plain_loop(expected, theirs, batches, n, sizes, max_norm)
    model, optimizer = made(kind, dtype)

    @train_step(optimizer, accumulate(n), max_norm=max_norm)
    def step(batch):
        loss, weight = loss_of(model, batch), len(batch[0])
        if given_as == "real":
            return {"loss": loss, "weight": float(weight)}
        if given_as == "tensor" or (given_as == "either" and weight % 2):
            weight = torch.tensor(weight)
        return loss, weight

    results = run(step, batches)
    assert distance(state_of(model, optimizer), state_of(expected, theirs)) <= TOLERANCE[dtype]
    for window, seen in zip(windows_of(batches, n), windows_of(results, n), strict=True):
        assert len(seen) == len(window) and [result.complete for result in seen] == [False] * (
            len(window) - 1
        ) + [True]


@FEW
@given(sizes, lengths, st.integers(0, 2**31))
def test_law_4_the_gradient_is_that_of_the_full_batch(sizes, n, seed):
    """Of unequal batches: transformers#24725, transformers#34242."""
    batches = make_batches(sizes, seed=seed)
    seen = []
    model = make_model()

    @accumulate(n, model)
    def step(batch):
        yield loss_of(model, batch), len(batch[0])
        seen.append(gradients_of(model))

    run(step, batches)
    for window, gradients in zip(windows_of(batches, n), seen, strict=True):
        assert distance(gradients, full_batch_gradient(make_model(), window)) <= 1e-12


@FEW
@given(sizes, lengths, optimizers, st.sampled_from([None, 0.05]))
def test_bfloat16_autocast_is_the_loop_with_autocast(sizes, n, kind, max_norm):
    """In full windows. A short one divides later than by hand, so bfloat16 rounds otherwise."""
    batches = make_batches(sizes * n, torch.float32)
    expected, theirs = made(kind, torch.float32)
    scaler_loop(expected, theirs, batches, n, torch.bfloat16, max_norm)
    model, optimizer = made(kind, torch.float32)
    run(
        train_step(optimizer, amp(dtype=torch.bfloat16), accumulate(n), max_norm=max_norm)(
            lambda b: loss_of(model, b)
        ),
        batches,
    )
    assert distance(state_of(model, optimizer), state_of(expected, theirs)) <= 1e-5


@given(
    st.data(),
    lengths,
    optimizers,
    st.sampled_from([None, 0.05]),
    st.sampled_from([2.0**8, 2.0**16, 2.0**30]),
    st.booleans(),
)
def test_float16_takes_the_same_trajectory_as_a_hand_written_scaler(
    data, n, kind, max_norm, init_scale, yields
):
    windows = data.draw(st.integers(1, 5))
    batches = make_batches([4] * (n * windows), torch.float32)
    for broken in data.draw(st.sets(st.integers(0, len(batches) - 1), max_size=2)):
        batches[broken][0][0, 0] = float("inf")

    # The reference is not fused: fused SGD makes nan of weights if its first step overflows.
    expected, theirs = made(kind.removesuffix(" fused"), torch.float32)
    their_schedule = torch.optim.lr_scheduler.StepLR(theirs, 1, 0.9)
    scales = scaler_loop(
        expected, theirs, batches, n, torch.float16, max_norm, init_scale, 2, their_schedule.step
    )

    model, optimizer = made(kind, torch.float32)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    scaler = amp(dtype=torch.float16, init_scale=init_scale, growth_interval=2)

    def yielding(batch):
        yield loss_of(model, batch)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    if yields:
        step = train_step(optimizer, accumulate(n), scaler, max_norm=max_norm)(yielding)
    else:
        step = train_step(optimizer, accumulate(n), scaler, max_norm=max_norm, after=schedule.step)(
            lambda b: loss_of(model, b)
        )
    seen = [step.state_dict()["loss_scale"] for batch in step.over(batches) if step(batch).complete]

    assert seen == scales
    assert schedule.last_epoch == their_schedule.last_epoch == step.updates
    assert step.skipped == windows - step.updates
    assert distance([*model.parameters()], [*expected.parameters()]) <= 1e-5


@FEW
@given(
    sizes,
    lengths,
    st.sampled_from(["SGD momentum", "AdamW", "AdamW fused"]),
    st.integers(0, 8),
    st.booleans(),
    st.booleans(),
)
def test_law_7_stopping_anywhere_changes_nothing(sizes, n, kind, stop, weighted, half):
    batches = make_batches(sizes, torch.float32)

    def build():
        model, optimizer = made(kind, torch.float32)

        @train_step(
            optimizer,
            accumulate(n),
            amp(dtype=torch.float16 if half else torch.float32),
            max_norm=0.1,
        )
        def step(batch):
            return (
                (loss_of(model, batch), torch.tensor(len(batch[0])))
                if weighted
                else loss_of(model, batch)
            )

        return model, optimizer, step

    model, optimizer, step = build()
    results = run(step, batches)
    resumed, other, again = build()
    for batch in batches[:stop]:
        (again.last if batch is batches[-1] else again)(batch)
    saved = copy.deepcopy((resumed.state_dict(), other.state_dict())), again.state_dict()

    resumed, other, again = build()
    resumed.load_state_dict(saved[0][0])
    other.load_state_dict(saved[0][1])
    again.load_state_dict(saved[1])
    rest = [(again.last if batch is batches[-1] else again)(batch) for batch in batches[stop:]]
    assert same_bits(state_of(model, optimizer), state_of(resumed, other))
    assert again.state_dict() == step.state_dict()
    for ours, theirs in zip(rest, results[stop:], strict=True):
        assert torch.equal(ours.window_loss, theirs.window_loss)


@FEW
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=8),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["SGD", "AdamW fused"]),
)
def test_two_steps_of_a_gan_do_not_disturb_each_other(sizes, n_d, n_g, kind):
    """accelerate#668, #1414. The oracle uses autograd.grad: nothing can leak through `.grad`."""
    noise = make_batches(sizes)

    def networks():
        g, d = (
            torch.nn.Linear(4, 3).double(),
            torch.nn.Sequential(
                torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
            ).double(),
        )
        torch.manual_seed(5)
        for parameter in [*g.parameters(), *d.parameters()]:
            torch.nn.init.normal_(parameter)
        return g, d, OPTIMIZERS[kind](g.parameters()), OPTIMIZERS[kind](d.parameters())

    def d_loss(g, d, z, real):
        return F.softplus(-d(real)).mean() + F.softplus(d(g(z).detach())).mean()

    def g_loss(g, d, z):
        return F.softplus(-d(g(z))).mean()

    g, d, opt_g, opt_d = networks()
    shared = amp(dtype=torch.float32)
    step_d = train_step(opt_d, accumulate(n_d), shared)(lambda z, real: d_loss(g, d, z, real))
    step_g = train_step(opt_g, shared, accumulate(n_g), frozen(d))(lambda z, real: g_loss(g, d, z))
    for z, real in step_d.over(noise, step_g):
        step_d(z, real)
        step_g(z, real)

    eg, ed, eopt_g, eopt_d = networks()
    sums = {}
    for i, (z, real) in enumerate(noise, 1):
        for loss, model, optimizer, n in (
            (d_loss(eg, ed, z, real), ed, eopt_d, n_d),
            (None, eg, eopt_g, n_g),
        ):
            parameters = list(model.parameters())
            loss = g_loss(eg, ed, z) if loss is None else loss
            new = torch.autograd.grad(loss, parameters)
            sums.setdefault(n if model is ed else -n, []).append(new)
            window = sums[n if model is ed else -n]
            if len(window) == n or i == len(noise):
                for parameter, *grads in zip(parameters, *window, strict=True):
                    parameter.grad = sum(grads) / len(window)
                optimizer.step()
                window.clear()
    assert distance(state_of(g, opt_g), state_of(eg, eopt_g)) <= 1e-12
    assert distance(state_of(d, opt_d), state_of(ed, eopt_d)) <= 1e-12


@pytest.mark.parametrize("weight", [1, 4096, 65536, 10**7])
@pytest.mark.parametrize("on_device", [False, True])
def test_large_weights_do_not_use_up_the_loss_scale(weight, on_device):
    model, optimizer = made("AdamW fused", torch.float32)

    @train_step(optimizer, accumulate(4), amp(dtype=torch.float16))
    def step(batch):
        return loss_of(model, batch), (torch.tensor(weight) if on_device else weight)

    run(step, make_batches([4] * 16, torch.float32))
    assert (step.updates, step.skipped) == (4, 0)


@pytest.mark.parametrize("on_device", [False, True])
def test_weights_that_grow_cost_at_most_one_window(on_device):
    model, optimizer = made("AdamW fused", torch.float32)

    @train_step(optimizer, accumulate(4), amp(dtype=torch.float16))
    def step(batch, weight):
        return loss_of(model, batch), (torch.tensor(weight) if on_device else weight)

    for i, batch in enumerate(make_batches([4] * 24, torch.float32)):
        step(batch, 1 if i < 8 else 65536)
    assert step.updates + step.skipped == 6 and step.skipped <= 1
