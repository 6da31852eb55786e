"""The bar of ``step.over(loader, progress=True)``."""

import gc
import io
import re
import sys

import pytest
import torch
from oracles import loss_of, make_batches, make_model
from tqdm import tqdm

import trainkit.watch.progress
from trainkit import accumulate, amp, resumable, train_step
from trainkit.core.answer import Answer
from trainkit.watch.progress import _short

BATCHES = make_batches([4] * 8, torch.float32)


@pytest.fixture
def output():
    return io.StringIO()


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    gc.collect()
    assert not tqdm._instances


def shown(output, **options):
    """Arguments for tqdm: every update drawn, into this."""
    return {"file": output, "mininterval": 0, "miniters": 1, "ncols": 200, **options}


def stepped(*parts, lr=0.1, weight=None, **options):
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters(), lr=lr), *parts, **options)
    return step(
        lambda batch, factor=1: (
            (loss := loss_of(model, batch) * factor) if weight is None else (loss, weight)
        )
    )


def last_line(output):
    return output.getvalue().rpartition("\r")[2].strip()


def test_it_says_what_windows_came_to(output):
    step = stepped(accumulate(2), max_norm=100.0)
    results = [step(batch) for batch in step.over(BATCHES, progress=shown(output, desc="epoch 3"))]
    average = trainkit.watch.progress.Smoothed(0.1)
    losses = [average.add(result.window_loss.item()) for result in results if result.complete]
    line = last_line(output)
    assert line.startswith("epoch 3: 100%") and " 8/8 " in line
    assert (
        f", loss {losses[-1]:.4g}, norm {results[-1].grad_norm.item():.4g}, lr 0.1, " in line
        and "rows/s]" in line
    )
    assert "scale" not in line and "skipped" not in line


def test_it_has_the_loss_scale_the_skips_and_tokens(output):
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters(), lr=0.1), amp(dtype=torch.float16))
    step = step(lambda batch, factor: (loss_of(model, batch) * factor, 300))
    factors = iter([1.0, 1e38] + [1.0] * 6)
    for batch in step.over(BATCHES, progress=shown(output)):
        step(batch, next(factors))
    assert re.search(r"lr 0.1, scale 32768, skipped 1, [\d.]+[kMG]? tokens/s\]$", last_line(output))


def test_rows_per_second_are_those_of_the_batches_per_second(output):
    step = stepped()
    for batch in step.over(BATCHES, progress=shown(output, smoothing=0)):
        step(batch)
    found = re.search(r" ([\d.]+)it/s.* ([\d.]+)([kM]?) rows/s", last_line(output))
    rows = float(found[2]) * {"": 1, "k": 1e3, "M": 1e6}[found[3]]
    assert rows == pytest.approx(4 * float(found[1]), rel=0.2)


def test_all_steps_of_a_loop_are_shown(output):
    first, second = stepped(accumulate(2)), stepped(lr=0.5)
    for batch in first.over(BATCHES, second, progress=shown(output)):
        first(batch)
        second(batch)
    assert re.search(r"loss [\d.e-]+/[\d.e-]+, lr 0.1/0.5, ", last_line(output))
    assert not first._watchers and not second._watchers


def test_loaders_without_a_length_and_loops_in_loops(output):
    inner_output = io.StringIO()
    step, other = stepped(), stepped()
    for batch in step.over(iter(BATCHES), progress=shown(output)):
        step(batch)
        for inner in other.over(BATCHES[:2], progress=shown(inner_output, leave=False)):
            other(inner)
    assert last_line(output).startswith("8it [") and "2/2" in inner_output.getvalue()


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop, None])
def test_it_is_closed_however_the_loop_ends(error, output):
    step = stepped()

    def loop():
        for seen, batch in enumerate(step.over(BATCHES, progress=shown(output))):
            step(batch)
            if seen == 2 and error is None:
                break
            if seen == 2:
                raise error

    if error is None:
        loop()
    else:
        with pytest.raises(error):
            loop()
    assert not tqdm._instances and not step._watchers and not step._at_last_batch
    assert " 2/8 " in last_line(output) and output.getvalue().endswith("\n")


def test_it_is_closed_where_the_loader_fails(output):
    def loader():
        yield from BATCHES[:2]
        raise OSError

    step = stepped()
    with pytest.raises(OSError):
        for batch in step.over(loader(), progress=shown(output)):
            step(batch)
    assert not tqdm._instances and not step._watchers


def test_numbers_are_shown_when_they_have_arrived_and_nothing_waits_for_them(output, monkeypatch):
    late, waits = [True], []
    monkeypatch.setattr(Answer, "known", lambda self: not late)
    monkeypatch.setattr(
        Answer, "read", lambda self, read=Answer.read: waits.append(1) if late else read(self)
    )
    monkeypatch.setattr(
        torch.Tensor, "item", lambda self, item=torch.Tensor.item: waits.append(1) or item(self)
    )
    model = make_model(torch.float32)
    step = train_step(
        torch.optim.AdamW(model.parameters(), fused=True), accumulate(2), max_norm=1.0
    )
    step = step(lambda batch: loss_of(model, batch))
    for seen, batch in enumerate(step.over(BATCHES, progress=shown(output))):
        step(batch)
        if seen < 5:
            assert "loss" not in output.getvalue() and not waits
        else:
            late.clear()
    assert not waits and "loss" in last_line(output)


def test_a_loop_that_is_left_shows_the_last_numbers_too(output, monkeypatch):
    monkeypatch.setattr(Answer, "known", lambda self: False)
    step = stepped(max_norm=1.0)
    for batch in step.over(BATCHES, progress=shown(output)):
        if step._closed == 2:
            break
        last = step(batch)
    assert f"norm {last.grad_norm.item():.4g}" in last_line(output)


def test_it_is_the_same_run_with_a_bar_and_without(output):
    def weights(**options):
        step = stepped(accumulate(3), max_norm=1.0)
        losses = [step(batch).loss.item() for batch in step.over(BATCHES, **options)]
        return losses, step.updates

    assert (
        weights()
        == weights(progress=False)
        == weights(progress=shown(output))
        == weights(progress={"disable": True})
    )


def test_only_the_first_rank_shows_one(output, monkeypatch):
    monkeypatch.setattr(trainkit.watch.progress, "this_rank", lambda: 1)
    step = stepped()
    assert len([step(batch) for batch in step.over(BATCHES, progress=shown(output))]) == 8
    assert not output.getvalue()


def test_a_disabled_one_costs_nothing(output):
    step = stepped()
    for _ in step.over(BATCHES, progress={"disable": True}):
        assert not step._watchers


def test_what_was_done_before_a_run_was_stopped_is_done(output, tmp_path):
    def train(output, stop_after=None):
        model = make_model(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = train_step(optimizer)(lambda batch: loss_of(model, batch))
        with resumable(tmp_path, every=1, model=model, optimizer=optimizer, step=step) as run:
            for epoch in run.epochs(2):
                for _ in range(2):
                    for seen, batch in enumerate(
                        step.over(BATCHES, progress=shown(output, desc=f"epoch {epoch}"))
                    ):
                        step(batch)
                        if stop_after == (epoch, seen):
                            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(io.StringIO(), stop_after=(1, 5))
    train(output)
    first = re.search(
        r"epoch 1: .*\| (\d)/8", output.getvalue().partition("loss")[0].rpartition("\r")[2]
    )
    assert int(first[1]) == 6  # five, and the one that it has just made
    assert output.getvalue().count("8/8 [") >= 2


def test_a_pass_that_was_over_leaves_no_bar(output, tmp_path):
    def train(output, stop):
        model = make_model(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = train_step(optimizer)(lambda batch: loss_of(model, batch))
        with resumable(tmp_path, every=1, model=model, optimizer=optimizer, step=step):
            for name in ("first", "second"):
                for seen, batch in enumerate(step.over(BATCHES, progress=shown(output, desc=name))):
                    step(batch)
                    if stop and name == "second" and seen == 3:
                        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(io.StringIO(), stop=True)
    train(output, stop=False)
    assert "\n" not in output.getvalue().partition("second")[0] and last_line(output).startswith(
        "second: 100%"
    )


@pytest.mark.parametrize(
    "progress", [None, 1, "epoch 3", [("desc", "x")], {"description": "x"}, {3: "x"}]
)
def test_another_progress_is_refused(progress):
    step = stepped()
    with pytest.raises(TypeError, match=r"progress=True|keywords must be strings"):
        list(step.over(BATCHES, progress=progress))
    assert not step._watchers


def test_without_tqdm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="`pip install tqdm`"):
        stepped().over(BATCHES, progress=True)
    assert len(list(stepped().over(BATCHES))) == 8


def test_rates_have_three_digits():
    assert [_short(value) for value in (0.5, 9.876, 999, 1000, 12345, 1.5e7, 2e15, 999.6)] == [
        *("0.5", "9.88", "999", "1k", "12.3k", "15M", "2e+03T", "1k"),
    ]
