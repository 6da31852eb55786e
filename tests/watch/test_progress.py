"""The bar of ``step.over(loader, progress=True)``."""

import gc
import io
import re
import sys

import pytest
import torch
from oracles import loss_of, make_batches, make_model
from tqdm import tqdm

from trainkit import accumulate, amp, resumable, train_step
from trainkit.core.update import Answer

BATCHES = make_batches([4] * 8, torch.float32)


@pytest.fixture
def output():
    return io.StringIO()


@pytest.fixture(autouse=True)
def no_bar_is_left_open():
    yield
    gc.collect()
    assert not tqdm._instances


def shown(output, **options):
    """Arguments for tqdm that write every update to ``output``."""
    return {"file": output, "mininterval": 0, "miniters": 1, "ncols": 200, **options}


def stepped(*parts, lr=0.1, weight=None, fused=False, **options):
    model = make_model(torch.float32)

    @train_step(torch.optim.SGD(model.parameters(), lr=lr, fused=fused), *parts, **options)
    def step(batch, factor=1):
        loss = loss_of(model, batch) * factor
        return loss if weight is None else (loss, weight)

    return step


def last_line(output):
    return output.getvalue().rpartition("\r")[2].strip()


def test_the_loop_has_the_length_of_its_loader(output):
    step = stepped()
    assert len(step.over(BATCHES, progress=shown(output))) == len(step.over(BATCHES)) == 8
    with pytest.raises(TypeError, match="no length"):
        len(step.over(iter(BATCHES), progress=shown(output)))


def test_it_shows_the_numbers_of_windows(output):
    step = stepped(accumulate(2), max_norm=100.0)
    results = [step(batch) for batch in step.over(BATCHES, progress=shown(output, desc="epoch 3"))]
    average = share = 0.0
    for result in results[1::2]:
        average, share = 0.9 * average + 0.1 * result.window_loss.item(), 0.9 * share + 0.1
    line = last_line(output)
    assert line.startswith("epoch 3: 100%") and " 8/8 " in line
    numbers = f", loss {average / share:.4g}, norm {results[-1].grad_norm.item():.4g}, lr 0.1, "
    assert numbers in line and "rows/s]" in line and "scale" not in line and "skipped" not in line


def test_it_shows_the_loss_scale_skipped_updates_and_tokens(output):
    step = stepped(amp(dtype=torch.float16), weight=300)
    factors = iter([1.0, 1e38] + [1.0] * 6)
    for batch in step.over(BATCHES, progress=shown(output)):
        step(batch, next(factors))
    assert re.search(r"lr 0.1, scale 32768, skipped 1, [\d.]+[kMG]? tokens/s\]$", last_line(output))


@pytest.mark.parametrize("form", [tuple, list, lambda pair: {"id": 3, "x": {"y": pair}}])
def test_rows_per_second_agree_with_batches_per_second(form, output):
    step = stepped()
    for batch in step.over(list(map(form, BATCHES)), progress=shown(output, smoothing=0)):
        step(batch["x"]["y"] if isinstance(batch, dict) else batch)
    found = re.search(r" ([\d.]+)it/s.* ([\d.]+)([kM]?) rows/s", last_line(output))
    rows = float(found[2]) * {"": 1, "k": 1e3, "M": 1e6}[found[3]]
    assert rows == pytest.approx(4 * float(found[1]), rel=0.2)


def test_all_steps_of_a_loop_are_shown(output):
    first, second = stepped(accumulate(2)), stepped(lr=0.5)
    for batch in first.over(BATCHES, second, progress=shown(output)):
        first(batch)
        second(batch)
    assert re.search(r"loss [\d.e-]+/[\d.e-]+, lr 0.1/0.5, ", last_line(output))


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
@pytest.mark.parametrize("where", ["loop", "loader"])
def test_it_is_closed_however_the_loop_ends(where, error, output):
    def loader():
        yield from BATCHES[:3]
        if where == "loader" and error is not None:
            raise error

    def loop():
        for seen, batch in enumerate(step.over(loader(), progress=shown(output))):
            result = step(batch)
            if where == "loop" and seen == 2:
                if error is None:
                    break
                raise error
        return result

    step = stepped(accumulate(2))
    if error is None:
        loop()
    else:
        with pytest.raises(error):
            loop()
    assert not tqdm._instances and output.getvalue().endswith("\n")


def test_a_closed_bar_watches_no_longer(output, monkeypatch):
    step = stepped()
    for batch in step.over(BATCHES, progress=shown(output)):
        step(batch)
    monkeypatch.setattr(Answer, "__init__", lambda *args: pytest.fail("a number is copied"))
    for _ in range(300):
        step(BATCHES[0])


def test_numbers_are_shown_when_they_have_arrived_without_a_wait(output, monkeypatch):
    late, read = [True], Answer.read
    monkeypatch.setattr(Answer, "known", lambda answer: not late)
    monkeypatch.setattr(Answer, "read", lambda a: pytest.fail("waits") if late else read(a))
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: pytest.fail("waits"))
    step = stepped(accumulate(2), fused=True, max_norm=1.0)
    for seen, batch in enumerate(step.over(BATCHES, progress=shown(output))):
        step(batch)
        if seen < 5:
            assert "loss" not in output.getvalue()
        else:
            late.clear()
    assert "loss" in last_line(output)


def test_a_loop_that_is_left_shows_the_last_numbers_too(output, monkeypatch):
    monkeypatch.setattr(Answer, "known", lambda answer: False)
    step = stepped(max_norm=1.0)
    for seen, batch in enumerate(step.over(BATCHES, progress=shown(output))):
        if seen == 2:
            break
        last = step(batch)
    assert f"norm {last.grad_norm.item():.4g}" in last_line(output)


def test_a_bar_changes_no_number(output):
    def losses(**options):
        step = stepped(accumulate(3), max_norm=1.0)
        return [step(batch).loss.item() for batch in step.over(BATCHES, **options)]

    assert losses() == losses(progress=False) == losses(progress=shown(output))
    assert losses() == losses(progress=shown(disabled := io.StringIO(), disable=True))
    assert not disabled.getvalue()


def train(output, path, passes, stop=None):
    """Passes over the batches, each with a bar of its name; ``stop`` is a pass and a batch."""
    model = make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = train_step(optimizer)(lambda batch: loss_of(model, batch))
    with resumable(path, every=1, model=model, optimizer=optimizer, step=step):
        for name in passes:
            bar = shown(output, desc=name)
            for seen, batch in enumerate(step.over(BATCHES, progress=bar)):
                step(batch)
                if (name, seen) == stop:
                    raise ZeroDivisionError


def test_a_resumed_bar_starts_where_the_run_was_stopped(output, tmp_path):
    with pytest.raises(ZeroDivisionError):
        train(io.StringIO(), tmp_path, ["a", "b", "c"], stop=("b", 5))
    train(output, tmp_path, ["a", "b", "c"])
    text = output.getvalue()
    assert "\n" not in text.partition("b: ")[0]  # the pass that was over leaves no bar
    first = re.search(r"b: .*\| (\d)/8", text.partition("loss")[0].rpartition("\r")[2])
    assert int(first[1]) == 6  # five, and the one that it has just made
    assert last_line(output).startswith("c: 100%") and text.count("8/8 [") >= 2


@pytest.mark.parametrize("progress", [None, 1, "epoch 3", [("desc", "x")], {"description": "x"}])
def test_another_progress_is_refused(progress):
    with pytest.raises(TypeError, match=r"(?s)`step\.over\(loader, progress=True\)`"):
        list(stepped().over(BATCHES, progress=progress))


def test_without_tqdm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="`pip install tqdm`"):
        stepped().over(BATCHES, progress=True)
    assert len(list(stepped().over(BATCHES))) == 8
