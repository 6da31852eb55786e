"""What an update costs without the model: a float16 scaler, clipping and AdamW in several sizes.

Backward is a function that hands out ready gradients. Each round measures and subtracts its time.
"""

from __future__ import annotations

import torch
from measure import in_turn, microseconds, ratio, table

from trainkit import amp, train_step

SCALE, MAX_NORM = 65536.0, 1.0


class HandOut(torch.autograd.Function):
    """A loss of 1 whose gradients are the ones given, whatever comes from above."""

    @staticmethod
    def forward(ctx, gradients, *parameters):
        ctx.gradients = gradients
        return parameters[0].new_ones(())

    @staticmethod
    def backward(ctx, _):
        return (None, *ctx.gradients)


class Problem:
    """Parameters with ready gradients, which are copies of the same tensors for all contenders."""

    def __init__(self, gradients):
        self.gradients = gradients
        self.parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]

    def loss(self):
        return HandOut.apply(self.gradients, *self.parameters)


def made_gradients(tensors, size, device):
    generator = torch.Generator().manual_seed(0)
    return [(SCALE * torch.randn(size, generator=generator)).to(device) for _ in range(tensors)]


def by_hand(problem, fused=True):
    optimizer = torch.optim.AdamW(problem.parameters, fused=fused or None)
    scaler = torch.amp.GradScaler(problem.parameters[0].device.type, init_scale=SCALE)

    def update():
        scaler.scale(problem.loss()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(problem.parameters, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return update


def returning(problem, fused=True):
    optimizer = torch.optim.AdamW(problem.parameters, fused=fused or None)
    return train_step(optimizer, amp(dtype=torch.float16, init_scale=SCALE), max_norm=MAX_NORM)(
        problem.loss
    )


def yielding(problem):
    optimizer = torch.optim.AdamW(problem.parameters, fused=True)

    @train_step(optimizer, amp(dtype=torch.float16, init_scale=SCALE), max_norm=MAX_NORM)
    def step():
        yield problem.loss()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bare(problem):
    optimizer = torch.optim.AdamW(problem.parameters, fused=True)

    def update():
        problem.loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def backward_alone(problem):
    def update():
        problem.loss().backward()
        for parameter in problem.parameters:
            parameter.grad = None

    return update


CONTENDERS = {
    "by hand, default AdamW": lambda problem: by_hand(problem, fused=False),
    "by hand, fused AdamW": by_hand,
    "**train_step, returning, fused AdamW**": returning,
    "train_step, yielding, fused AdamW": yielding,
    "train_step, returning, default AdamW": lambda problem: returning(problem, fused=False),
    "fused AdamW alone: no scaler, no clipping": bare,
}
USUAL, BY_HAND, TRAINKIT, *_, BARE = CONTENDERS
LARGE = 500_000_000  # parameters: each contender holds 12 bytes of each, and a GPU has 80 GB


def compete(tensors, size, device, rounds):
    """The seconds of each contender per update in each round, backward taken off."""
    gradients = made_gradients(tensors, size, device)
    names = CONTENDERS if tensors * size < LARGE else [BY_HAND, TRAINKIT, BARE]
    problems = {name: Problem(gradients) for name in ("backward", *names)}
    runs = {"backward": backward_alone(problems["backward"])}
    runs |= {name: CONTENDERS[name](problems[name]) for name in names}
    for run in runs.values():
        run()
    for name in set(names) - {BARE}:
        for mine, theirs in zip(
            problems[name].parameters, problems[BY_HAND].parameters, strict=True
        ):
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm(), f"{name} takes other updates"
    times = in_turn(runs, device, rounds, repeat=max(1, 100_000 // (tensors * size)))
    off = times.pop("backward")
    return {name: [t - o for t, o in zip(taken, off, strict=True)] for name, taken in times.items()}


def update_table(sizes, device, rounds):
    """Microseconds per update, and the ratio to the loop by hand with the same optimizer."""
    times = {title: compete(*size, device, rounds) for title, size in sizes.items()}
    rows = {
        name: [
            f"{microseconds(taken[name])}, {ratio(taken[name], taken[BY_HAND])}"
            if name in taken
            else "-"
            for taken in times.values()
        ]
        for name in CONTENDERS
    }
    for other in (USUAL, BARE):
        rows[f"train_step, returning, / {other}"] = [
            ratio(taken[TRAINKIT], taken[other]) if other in taken else "-"
            for taken in times.values()
        ]
    return table("", list(times), rows)


def peak(run, device):
    """The most bytes of tensors at a time while this runs, beyond those that are there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def waits(run):
    """Whether the host waits for the GPU while this runs."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def memory_table(device):
    """The peak of a second update of 10 M parameters, in sizes of gradients; whether it waits."""
    gradients = made_gradients(10, 1_000_000, device)
    size = sum(gradient.nbytes for gradient in gradients)
    columns, rows = ["peak, in sizes of the gradients"], {}
    for name, make in CONTENDERS.items():
        run = make(Problem(gradients))
        run()
        rows[name] = [f"{peak(run, device) / size:.2f}"]
        if device == "cuda":
            rows[name].append("yes" if waits(run) else "no")
    return table("", [*columns, "the host waits"] if device == "cuda" else columns, rows)
