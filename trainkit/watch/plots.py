"""The plot of a history."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainkit.watch.readings import Smoothed

# In the middle between black and white, and colours of about that brightness: to be read on both.
INK, LINE, LIMIT, SKIPPED = "#808080", "#3b8ed0", "#d9822b", "#dd4444"
_TITLES = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "loss_scale": "loss scale",
    "lr": "learning rate",
}


def curves(
    columns: Mapping[str, Sequence[float]], rates: Sequence[str], max_norm: float | None
) -> Any:
    """A matplotlib Figure of the columns of a history; ImportError without matplotlib."""
    try:
        figures, ticker = (
            importlib.import_module(f"matplotlib.{name}") for name in ("figure", "ticker")
        )
    except ImportError as error:
        raise ImportError(
            "history.plot() needs matplotlib, which is not installed: `pip install matplotlib`"
        ) from error
    wanted = [
        "loss",
        *(name for name in ("grad_norm", "loss_scale") if any(map(math.isfinite, columns[name]))),
    ]
    wanted += ["lr"] if rates else []
    count = len(wanted)
    across = count if count < 4 else 2
    figure = figures.Figure(
        figsize=(4.2 * across, 2.7 * (count // across)), layout="constrained", facecolor="none"
    )
    updates = columns["update"]
    for axes, name in zip(
        figure.subplots(1 if count < 4 else 2, across, squeeze=False).flat, wanted, strict=True
    ):
        _style(axes, ticker, _TITLES[name])
        if name == "loss":
            average = Smoothed(2 / (len(updates) / 50 + 2))
            axes.plot(updates, columns[name], color=LINE, alpha=0.45, linewidth=1)
            axes.plot(updates, list(map(average.add, columns[name])), color=LINE, linewidth=1.8)
        elif name == "lr":
            for rate, style in zip(rates, ["-", "--", ":", "-."] * len(rates), strict=False):
                axes.plot(
                    updates,
                    columns[rate],
                    style,
                    color=LINE,
                    linewidth=1.5,
                    label=rate if len(rates) > 1 else None,
                )
        else:
            axes.plot(updates, columns[name], color=LINE, linewidth=1)
        if name == "grad_norm" and max_norm is not None and max_norm < math.inf:
            axes.axhline(
                max_norm,
                color=LIMIT,
                linestyle="--",
                linewidth=1.2,
                label=f"clipped to {max_norm:g}",
            )
        if name == "loss_scale":
            axes.set_yscale("log", base=2)
        skipped = [
            update
            for update, is_skipped in zip(updates, columns["skipped"], strict=True)
            if is_skipped
        ]
        if skipped and name != "lr":
            foot = axes.get_xaxis_transform()
            label = "skipped" if name == "loss" else None
            axes.plot(
                skipped,
                [0.03] * len(skipped),
                "|",
                color=SKIPPED,
                markersize=8,
                transform=foot,
                label=label,
            )
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _style(axes: Any, ticker: Any, title: str) -> None:
    axes.set_facecolor("none")
    axes.set_title(title, color=INK, fontsize=10)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=INK, alpha=0.2, linewidth=0.6)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.set_xlabel("update", color=INK, fontsize=8)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=INK, alpha=0.6)


def png(figure: Any) -> tuple[bytes, dict[str, int]]:
    """The figure for a notebook, with twice as many pixels as it takes there, and the size it takes."""
    width, height = (int(inches * 100) for inches in figure.get_size_inches())
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=200, format="png")
    return buffer.getvalue(), {"width": width, "height": height}
