"""Times contenders in turn, in one process: a machine that is slow for a while slows them all."""

from __future__ import annotations

import statistics
import time

import torch


def seconds(run, device):
    """How long this takes; on an accelerator between two events of its own clock."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_seconds(run):
    """How long the host takes to hand this to an idle GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def busy_seconds(run):
    """How long the GPU's kernels and copies take while this runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    marks = ("Optimizer.", "ProfilerStep")  # spans that torch names, which hold idle time as well
    return sum(e.time_range.elapsed_us() for e in on_gpu if not e.name.startswith(marks)) / 1e6


def in_turn(runs, device, rounds, repeat=1):
    """The seconds that each of several functions takes in each round."""
    times = {name: [] for name in runs}
    for run in runs.values():
        run()  # the first time is another: optimizers make their state
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(
                seconds(
                    run if repeat == 1 else lambda run=run: [run() for _ in range(repeat)], device
                )
                / repeat
            )
    return times


def ratio(times, others):
    """The median of the ratios in a round, and their quartiles: "0.91 (0.90 to 0.92)"."""
    low, middle, high = statistics.quantiles(
        [a / b for a, b in zip(times, others, strict=True)], method="inclusive"
    )
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def microseconds(times):
    return f"{1e6 * statistics.median(times):,.0f} us"


def table(corner, columns, rows):
    """A table in Markdown: what stands in its corner, its columns, and rows of a name and cells."""
    lines = [
        [corner, *columns],
        ["---"] * (len(columns) + 1),
        *([name, *cells] for name, cells in rows.items()),
    ]
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
        .replace("| --- ", "|---")
        .replace("--- |", "---|")
    )
