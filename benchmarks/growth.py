"""How the cost grows with the number of parameter tensors and with n: measured, stored and drawn.

python benchmarks/growth.py docs/benchmarks_cpu.json     draws the stored figures again
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path

import contenders
import steps
import update
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

TENSORS, LENGTHS = [4, 16, 64, 256, 1024], [1, 2, 4, 8, 16, 32]
# The first is what the others are compared with.
UPDATES = [update.BY_HAND, update.USUAL, update.TRAINKIT, update.BARE]
STEPS = [steps.BY_HAND, steps.USUAL, steps.TRAINKIT, *sorted(contenders.LIBRARIES)]
# Readable on a light and on a dark page.
INK, OURS = "#808080", "#3b8ed0"


def measure(device, rounds):
    """The ratio of each contender to the correct loop by hand, median of the rounds."""
    updates = [update.compete(count, 10, device, rounds) for count in TENSORS]
    micro_batches = [steps.compete(steps.tiny(device, n), rounds) for n in LENGTHS]
    return {
        "An update alone": {
            "about": "float16 scaler and clipping",
            "x": "parameter tensors of 10 elements",
            "places": TENSORS,
            "ratios": _ratios(updates, UPDATES),
        },
        "A step of a tiny model": {
            "about": "where all is overhead",
            "x": "n, micro-batches in a window",
            "places": LENGTHS,
            "ratios": _ratios(micro_batches, STEPS),
        },
    }


def _ratios(taken, names):
    def ratio(times, name):
        rounds = zip(times[name], times[names[0]], strict=True)
        return round(statistics.median(ours / theirs for ours, theirs in rounds), 3)

    in_all = [name for name in names if all(name in times for times in taken)]
    return {name: [ratio(times, name) for times in taken] for name in in_all}


def draw(figures, path):
    """A panel for each, one above the other, with the name of each line at its end."""
    figure = Figure(figsize=(5.6, 6.6), layout="constrained", facecolor="none")
    for axes, (title, panel) in zip(figure.subplots(2, 1), figures.items(), strict=True):
        _draw_panel(axes, panel)
        axes.set_title(f"{title}: {panel['about']}", color=INK, fontsize=12, loc="left")
    figure.savefig(path, dpi=200)


def _draw_panel(axes, panel):
    places, ratios = panel["places"], panel["ratios"]
    low = min(map(min, ratios.values()))
    high = max(map(max, ratios.values()))
    axes.set(xscale="log", xlabel=panel["x"], xticks=places, facecolor="none")
    axes.set(ylim=(low - 0.1, high + 0.1), ylabel="time, relative to the loop by hand")
    axes.set_xlim(places[0] / 1.2, places[-1] * 1.2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.1f}x"))
    heights = _apart({name: line[-1] for name, line in ratios.items()}, (high - low + 0.2) / 17)
    for name, line in ratios.items():
        is_ours = name.startswith("**")  # as in the tables
        style = {"color": OURS, "linewidth": 3, "zorder": 3} if is_ours else {"color": INK}
        axes.plot(places, line, marker="o", markersize=4, **style)
        axes.annotate(
            "trainkit" if is_ours else name.split(", fused")[0].split(":")[0],
            (places[-1] * 1.3, heights[name]),
            annotation_clip=False,
            color=OURS if is_ours else INK,
            fontsize=10,
            fontweight="bold" if is_ours else "normal",
            va="center",
        )
    axes.grid(alpha=0.25)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(INK)


def _apart(heights, least):
    """The same heights, in the same order, moved until each is ``least`` above the one below."""
    found = dict(sorted(heights.items(), key=lambda item: item[1]))
    names = list(found)
    for _ in range(50):
        for below, above in itertools.pairwise(names):
            if (missing := least - found[above] + found[below]) > 0:
                found[below] -= missing / 2
                found[above] += missing / 2
    return found


if __name__ == "__main__":
    stored = Path(sys.argv[1])
    draw(json.loads(stored.read_text()), stored.with_suffix(".png"))
