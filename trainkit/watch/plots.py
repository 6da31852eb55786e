"""The plot of a history."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainkit.watch.optional import optional
from trainkit.watch.readings import Smoothed

# Medium brightness is readable on a light and on a dark background.
INK, LINE, LIMIT, SKIPPED = "#808080", "#3b8ed0", "#d9822b", "#dd4444"
_TITLES = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "loss_scale": "loss scale",
    "lr": "learning rate",
}
Columns = Mapping[str, Sequence[float]]


def curves(columns: Columns, max_norm: float | None) -> Any:
    """Return a matplotlib Figure with a panel for each quantity that has a finite value.

    A learning rate has a panel only if it changes.
    """
    figures = optional("matplotlib.figure", "history.plot()")
    known = [c for c, values in columns.items() if c == "loss" or any(map(math.isfinite, values))]
    found = {name: [c for c in known if c.partition("/")[0] == name] for name in _TITLES}
    if all(len(set(columns[name])) == 1 for name in found["lr"]):
        found["lr"] = []
    panels = {name: shown for name, shown in found.items() if shown}
    rows = 2 if len(panels) == 4 else 1
    across = len(panels) // rows
    size = (4.2 * across, 2.7 * rows)
    figure = figures.Figure(figsize=size, layout="constrained", facecolor="none")
    all_axes = figure.subplots(rows, across, squeeze=False).flat
    for axes, (name, shown) in zip(all_axes, panels.items(), strict=True):
        _draw(axes, columns, shown)
        if name == "grad_norm" and max_norm is not None and max_norm < math.inf:
            label = f"clipped to {max_norm:g}"
            axes.axhline(max_norm, color=LIMIT, linestyle="--", linewidth=1.2, label=label)
        if name == "loss_scale":
            axes.set_yscale("log", base=2)
        _style(axes, _TITLES[name])
    return figure


def png(figure: Any) -> tuple[bytes, dict[str, int]]:
    """Return the image of a figure, and the size to show it at: half its size in pixels."""
    width, height = (int(inches * 100) for inches in figure.get_size_inches())
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=200, format="png")
    return buffer.getvalue(), {"width": width, "height": height}


def _draw(axes: Any, columns: Columns, shown: Sequence[str]) -> None:
    updates = columns["update"]
    is_loss, is_rate = shown[0] == "loss", shown[0].startswith("lr")
    for column, style in zip(shown, itertools.cycle(["-", "--", ":", "-."]), strict=False):
        look = {"color": LINE, "linewidth": 1.2, "alpha": 0.45 if is_loss else 1.0}
        label = column if len(shown) > 1 else None
        axes.plot(updates, columns[column], style, label=label, **look)
    if is_loss:
        average = Smoothed(2 / (len(updates) / 50 + 2))
        axes.plot(updates, list(map(average.add, columns["loss"])), color=LINE, linewidth=1.8)
    skipped = list(itertools.compress(updates, columns["skipped"]))
    if skipped and not is_rate:
        marks = {"color": SKIPPED, "markersize": 8, "label": "skipped" if is_loss else None}
        at_foot = axes.get_xaxis_transform()
        axes.plot(skipped, [0.03] * len(skipped), "|", transform=at_foot, **marks)


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, color=INK, fontsize=10)
    axes.set_xlabel("update", color=INK, fontsize=8)
    axes.set_facecolor("none")
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=INK, alpha=0.2, linewidth=0.6)
    axes.locator_params(axis="x", nbins=6, integer=True)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=INK, alpha=0.6)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
