"""The plot of a history."""

import io
import math

import pytest
from matplotlib import image

from trainkit.watch.plots import curves, png

NAN = [math.nan] * 6


def columns_of(**given):
    updates = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    rest = dict.fromkeys(("grad_norm", "loss_scale", "lr"), NAN)
    return (
        {"update": updates, "loss": [6.0, 5.0, 4.0, 3.0, 2.0, 1.0], "skipped": [0.0] * 6}
        | rest
        | given
    )


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes}


FULL = columns_of(
    grad_norm=[1.0, 2.0, math.inf, 1.0, 1.0, 1.0],
    loss_scale=[8.0, 8.0, 8.0, 4.0, 4.0, 4.0],
    lr=[0.1] * 6,
    skipped=[0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
)


def test_there_is_a_panel_for_all_that_there_is():
    assert list(panels(curves(FULL, ["lr"], 0.5))) == [
        "loss",
        "gradient norm",
        "loss scale",
        "learning rate",
    ]
    assert list(panels(curves(columns_of(lr=[0.1] * 6), ["lr"], None))) == ["loss", "learning rate"]
    assert list(panels(curves(columns_of(), [], None))) == ["loss"]
    assert list(panels(curves(columns_of(grad_norm=[1.0] * 6), ["lr"], None))) == [
        "loss",
        "gradient norm",
        "learning rate",
    ]


def test_losses_are_drawn_with_their_average_and_clipping_with_a_dashed_line():
    found = panels(curves(FULL, ["lr"], 0.5))
    raw, smooth, _ = found["loss"].lines
    assert list(raw.get_ydata()) == FULL["loss"] and raw.get_alpha() < 1
    assert smooth.get_ydata()[0] == 6 and smooth.get_ydata()[-1] > 1
    limit = next(line for line in found["gradient norm"].lines if line.get_linestyle() == "--")
    assert set(limit.get_ydata()) == {0.5} and limit.get_label() == "clipped to 0.5"
    for max_norm in (None, math.inf):
        assert "--" not in [
            line.get_linestyle()
            for line in panels(curves(FULL, ["lr"], max_norm))["gradient norm"].lines
        ]


def test_skipped_updates_are_marked_and_the_loss_scale_is_in_powers_of_two():
    found = panels(curves(FULL, ["lr"], 0.5))
    for name in ("loss", "gradient norm", "loss scale"):
        (mark,) = (line for line in found[name].lines if line.get_marker() == "|")
        assert list(mark.get_xdata()) == [3]
    assert (
        found["loss scale"].get_yscale() == "log"
        and found["loss scale"].yaxis.get_transform().base == 2
    )
    assert [text.get_text() for text in found["loss"].get_legend().get_texts()] == ["skipped"]


def test_several_learning_rates_have_names():
    columns = columns_of() | {"lr/0": [0.1] * 6, "lr/1": [0.2] * 6}
    axes = panels(curves(columns, ["lr/0", "lr/1"], None))["learning rate"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["lr/0", "lr/1"]
    assert panels(curves(FULL, ["lr"], None))["learning rate"].get_legend() is None


@pytest.mark.parametrize("loss", [[1.0], [math.nan], [math.inf, 1.0], []])
def test_any_history_can_be_drawn(loss):
    columns = {name: values[: len(loss)] for name, values in FULL.items()} | {"loss": loss}
    png(curves(columns, ["lr"], 1.0))


def test_its_background_is_transparent_and_its_pixels_are_twice_its_size():
    data, size = png(curves(FULL, ["lr"], 0.5))
    pixels = image.imread(io.BytesIO(data), format="png")
    assert pixels.shape == (2 * size["height"], 2 * size["width"], 4)
    assert pixels[0, 0, 3] == 0
    drawn = pixels[pixels[..., 3] > 0.9][:, :3].mean(axis=1)
    assert drawn.min() > 0.3 and drawn.max() < 0.7  # neither black nor white: to be read on both
