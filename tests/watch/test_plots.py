"""The plot of a history."""

import io
import math

import pytest
import torch
from matplotlib import image
from oracles import loss_of, make_batches, make_model

from trainkit import History, amp, train_step
from trainkit.watch.plots import curves, png

BATCHES = make_batches([4] * 6, torch.float32)


def trained(*parts, factors=(1.0,) * 6, lrs=(0.1,), decay=0.9, **options):
    model = make_model(torch.float32)
    layers = (model,) if len(lrs) == 1 else (model[0], model[2])
    pairs = zip(layers, lrs, strict=True)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=lr) for layer, lr in pairs]
    step = train_step(optimizers, *parts, **options)
    step = step(lambda batch, factor: loss_of(model, batch) * factor)
    history = History(step)
    for batch, factor in zip(BATCHES, factors, strict=False):
        step(batch, factor)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] *= decay
    return history


def panels(history):
    return {axes.get_title(): axes for axes in history.plot().axes}


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.fixture(scope="module")
def full():
    """float16, its third update skipped, gradients clipped."""
    factors = (1.0, 1.0, math.inf, 1.0, 1.0, 1.0)
    return trained(amp(dtype=torch.float16), factors=factors, max_norm=0.5)


def test_what_there_is_has_a_panel_of_its_own(full):
    found = panels(full)
    assert list(found) == ["loss", "gradient norm", "loss scale", "learning rate"]
    raw, smooth, _ = found["loss"].lines
    assert list(raw.get_ydata()) == full["loss"] and raw.get_alpha() < 1
    finite = [loss for loss in full["loss"] if loss < math.inf]
    assert smooth.get_ydata()[0] == pytest.approx(finite[0])
    assert min(finite) < smooth.get_ydata()[-1] < max(finite)
    limit = next(line for line in found["gradient norm"].lines if line.get_linestyle() == "--")
    assert set(limit.get_ydata()) == {0.5} and legend(found["gradient norm"]) == ["clipped to 0.5"]
    assert found["loss scale"].get_yscale() == "log"
    for name in ("loss", "gradient norm", "loss scale"):
        (marks,) = (line for line in found[name].lines if line.get_marker() == "|")
        assert list(marks.get_xdata()) == [3]
    assert legend(found["loss"]) == ["skipped"] and not found["learning rate"].get_legend()


def test_several_learning_rates_have_names_and_an_infinite_limit_no_line():
    found = panels(trained(lrs=(0.1, 0.2), max_norm=math.inf))
    assert list(found) == ["loss", "gradient norm", "learning rate"]
    assert legend(found["learning rate"]) == ["lr/0", "lr/1"]
    assert "--" not in [line.get_linestyle() for line in found["gradient norm"].lines]


@pytest.mark.parametrize("lrs", [(0.1,), (0.1, 0.2)])
def test_a_learning_rate_that_does_not_change_has_no_panel(lrs):
    assert list(panels(trained(lrs=lrs, decay=1.0))) == ["loss"]


@pytest.mark.parametrize("factors", [(), (math.nan,), (math.inf, 1.0)])
def test_any_history_can_be_drawn(factors):
    history = trained(factors=factors)
    assert next(iter(panels(history))) == "loss"
    assert (history._repr_png_() is not None) is bool(factors)


def test_an_average_leaves_out_what_is_not_finite_and_has_no_bias_at_its_start():
    columns = {"update": [1.0, 2.0, 3.0], "loss": [3.0, math.inf, 3.0], "skipped": [0.0] * 3}
    smooth = curves(columns, None).axes[0].lines[1]
    assert list(smooth.get_ydata()) == pytest.approx([3.0, math.inf, 3.0])


def test_its_background_is_transparent_and_its_pixels_are_twice_its_size(full):
    data, size = png(full.plot())
    pixels = image.imread(io.BytesIO(data), format="png")
    assert pixels.shape == (2 * size["height"], 2 * size["width"], 4)
    assert pixels[0, 0, 3] == 0
    drawn = pixels[pixels[..., 3] > 0.9][:, :3].mean(axis=1)
    assert drawn.min() > 0.3 and drawn.max() < 0.7  # readable on white and on black
