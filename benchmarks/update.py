"""What an update costs, without the model: a float16 scaler, clipping and AdamW on parameters of several sizes.

    python benchmarks/update.py [--device cuda] [--rounds 20] [--threads 2]

Backward is a function that hands out gradients it has; its time, measured by itself in every round, is taken off. All
contenders take turns in one process, and take the same updates (the last column). Quoted are medians of the ratios to the loop
beside it in the same round.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch

from trainkit import amp, train_step

SCALE, MAX_NORM = 65536.0, 1.0
SIZES = {
    "1 M in 10 tensors": (10, 100_000),
    "10 M in 10 tensors": (10, 1_000_000),
    "40 M in 40 tensors": (40, 1_000_000),
    "4 k in 400 tensors": (400, 10),
}


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
    def __init__(self, tensors, size, device):
        generator = torch.Generator().manual_seed(0)
        self.parameters = [torch.nn.Parameter(torch.zeros(size, device=device)) for _ in range(tensors)]
        self.gradients = [(SCALE * torch.randn(size, generator=generator)).to(device) for _ in range(tensors)]

    def loss(self):
        return HandOut.apply(self.gradients, *self.parameters)


def by_hand(problem, fused):
    optimizer = torch.optim.AdamW(problem.parameters, fused=fused or None)
    device = problem.parameters[0].device.type
    scaler = torch.amp.GradScaler(device, init_scale=SCALE)

    def update():
        scaler.scale(problem.loss()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(problem.parameters, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return update


def with_trainkit(problem, fused, yields=False):
    optimizer = torch.optim.AdamW(problem.parameters, fused=fused or None)
    plan = train_step(optimizer, amp(dtype=torch.float16, init_scale=SCALE), max_norm=MAX_NORM)

    def yielding():
        yield problem.loss()
        optimizer.step()
        optimizer.zero_grad()

    return plan(yielding if yields else problem.loss)


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
    "by hand, default AdamW": lambda problem: by_hand(problem, False),
    "by hand, fused AdamW": lambda problem: by_hand(problem, True),
    "**train_step, returning, fused AdamW**": lambda problem: with_trainkit(problem, True),
    "train_step, yielding, fused AdamW": lambda problem: with_trainkit(problem, True, yields=True),
    "train_step, returning, default AdamW": lambda problem: with_trainkit(problem, False),
    "fused AdamW alone: no scaler, no clipping": bare,
}


def measure(size, device, rounds):
    """Seconds of each contender in each round, backward taken off, and the parameters it ends with."""
    problems = {name: Problem(*size, device) for name in ("backward", *CONTENDERS)}
    runs = {"backward": backward_alone(problems["backward"])}
    runs |= {name: make(problems[name]) for name, make in CONTENDERS.items()}
    repeat = max(1, 100_000 // (size[0] * size[1]))
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            if device != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append((time.perf_counter() - start) / repeat)
    off = seconds.pop("backward")
    seconds = {name: [t - o for t, o in zip(times, off, strict=True)] for name, times in seconds.items()}
    return seconds, {name: torch.cat([p.detach().flatten() for p in problems[name].parameters]) for name in CONTENDERS}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.machine()}, torch {torch.__version__}, {options.threads} threads, {options.rounds} rounds")
    for name, size in SIZES.items():
        seconds, parameters = measure(size, options.device, options.rounds)
        usual, fused, *_ = seconds.values()
        expected = parameters["by hand, fused AdamW"]
        print(f"\n{name}\n\n| contender | us | / fused by hand | / by hand | parameters off by |\n|---|---|---|---|---|")
        for contender, times in seconds.items():
            ratios = [statistics.median(t / o for t, o in zip(times, other, strict=True)) for other in (fused, usual)]
            distance = ((parameters[contender] - expected).norm() / expected.norm()).item()
            shown = "-" if "alone" in contender else f"{distance:.0e}"
            print(f"| {contender} | {1e6 * statistics.median(times):,.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {shown} |")


if __name__ == "__main__":
    main()
