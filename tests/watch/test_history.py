"""History, against the lines that it replaces."""

import csv
import math
from contextlib import suppress

import pytest
import torch
from launch import run
from oracles import loss_of, make_batches, make_model
from torch.nn.parallel import DistributedDataParallel

import trainkit.watch.history
from trainkit import History, accumulate, amp, microbatch, resumable, train_step
from trainkit.core.answer import Answer

BATCHES = make_batches([4, 2, 4, 1, 3, 4, 2, 4], torch.float32)


def by_hand(factors, n=2, growth_interval=2):
    """float16 on a CPU: the rows of the usual loop, every number read with a wait."""
    model = make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler = torch.amp.GradScaler("cpu", growth_interval=growth_interval)
    rows = []
    for start in range(0, len(BATCHES), n):
        window = list(zip(BATCHES[start : start + n], factors[start : start + n], strict=True))
        total, losses = sum(len(x) for (x, _), _ in window), []
        for batch, factor in window:
            with torch.autocast("cpu", torch.float16):
                losses.append(loss_of(model, batch) * factor)
            scaler.scale(losses[-1] * len(batch[0]) / total).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        mean = (
            sum(loss.item() * len(x) for loss, ((x, _), _) in zip(losses, window, strict=True))
            / total
        )
        rows.append(
            [
                len(rows) + 1,
                mean,
                norm,
                scaler.get_scale(),
                optimizer.param_groups[0]["lr"],
                float(not norm < math.inf),
                total,
            ]
        )
        scaler.step(optimizer)
        scaler.update()
        if norm < math.inf:
            schedule.step()
        optimizer.zero_grad()
    return rows


def recorded(factors, fused=False, **options):
    model = make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    @train_step(
        optimizer,
        accumulate(2),
        amp(dtype=torch.float16, growth_interval=2),
        max_norm=0.5,
        after=schedule.step,
    )
    def step(batch, factor):
        return loss_of(model, batch) * factor, len(batch[0])

    history = History(step, **options)
    for batch, factor in step.over(list(zip(BATCHES, factors, strict=True))):
        step(batch, factor)
    return history


@pytest.mark.parametrize("fused", [False, True])
def test_it_has_the_numbers_of_the_loop_by_hand(fused):
    factors = [
        1.0,
        1.0,
        1.0,
        1.0,
        1e38,
        1.0,
        1.0,
        1.0,
    ]  # the third window overflows, after the scale has grown
    history = recorded(factors, fused=fused)
    rows = by_hand(factors)
    names = ["update", "loss", "grad_norm", "loss_scale", "lr", "skipped", "weight"]
    assert history.columns == [*names, "seconds", "peak_memory"] and len(history) == 4
    for name, expected in zip(names, zip(*rows, strict=True), strict=True):
        known = [(a, b) for a, b in zip(history[name], expected, strict=True) if math.isfinite(b)]
        assert [a for a, _ in known] == pytest.approx(
            [b for _, b in known], rel=1e-2 if name in ("loss", "grad_norm") else 0
        )
    assert history["skipped"] == [0, 0, 1, 0] and history["loss_scale"] == [
        65536,
        65536,
        131072,
        65536,
    ]
    assert history["lr"] == [0.1, 0.05, 0.025, 0.025]
    assert history["seconds"] == sorted(history["seconds"]) and history["seconds"][0] > 0
    assert all(map(math.isnan, history["peak_memory"]))
    assert repr(history) == f"History(3 updates, 1 skipped, last loss {history['loss'][-1]:.6g})"


def test_a_generator_that_moves_the_learning_rate_used_the_one_before():
    model = make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    @train_step(optimizer)
    def step(batch):
        yield loss_of(model, batch)
        optimizer.step()
        schedule.step()  # in place: the rate is a tensor
        optimizer.zero_grad()

    history = History(step)
    losses = [step(batch).loss.item() for batch in BATCHES[:3]]
    assert history["lr"] == [0.5, 0.25, 0.125] and history["loss"] == losses
    assert all(map(math.isnan, history["grad_norm"] + history["loss_scale"] + history["weight"]))


def test_without_an_optimizer_there_is_no_learning_rate_and_with_two_there_are_two():
    model = make_model(torch.float32)
    optimizers = [
        torch.optim.SGD(layer.parameters(), lr=lr)
        for layer, lr in ((model[0], 0.1), (model[2], 0.2))
    ]

    @accumulate(2, model)
    def step(batch):
        yield loss_of(model, batch)

    assert not [name for name in History(step).columns if "lr" in name]
    both = train_step(optimizers)(lambda batch: loss_of(model, batch))
    history = History(both)
    both(BATCHES[0])
    assert (history["lr/0"], history["lr/1"]) == ([0.1], [0.2])


def test_blocks_by_hand_and_chunks_are_recorded_once_per_window():
    def rows(use, *parts):
        model = make_model(torch.float32)
        step = train_step(
            torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2), *parts, max_norm=1.0
        )
        step = step if use == "block" else step(lambda x, y: loss_of(model, (x, y)))
        first, second = History(step), History(step)
        for batch in step.over(BATCHES[:3]):
            if use == "block":
                with step:
                    step.backward(loss_of(model, batch))
            else:
                step(*batch)
        assert first["loss"] == second["loss"]
        return [first[name] for name in ("update", "loss", "grad_norm")]

    expected = rows("call")
    assert expected[0] == [1, 2]
    assert rows("block") == expected
    for chunked, column in zip(rows("call", microbatch(3)), expected, strict=True):
        assert chunked == pytest.approx(column, rel=1e-5)


def test_open_and_discarded_windows_and_failed_calls_are_no_rows():
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters()), accumulate(2))(
        lambda batch: loss_of(model, batch)
    )
    history = History(step)
    step(BATCHES[0])
    step.discard()
    with pytest.raises(TypeError):
        step(3)
    step(BATCHES[0])
    assert (
        len(history) == 0
        and repr(history) == "History(no updates)"
        and history._repr_png_() is None
    )
    step(BATCHES[1])
    assert len(history) == 1


def test_it_waits_for_nothing_while_recording(monkeypatch):
    waits = []
    monkeypatch.setattr(Answer, "known", lambda self: False)
    monkeypatch.setattr(
        Answer, "read", lambda self, read=Answer.read: waits.append(1) or read(self)
    )
    monkeypatch.setattr(
        torch.Tensor, "item", lambda self, item=torch.Tensor.item: waits.append(1) or item(self)
    )
    model = make_model(torch.float32)
    step = train_step(
        torch.optim.AdamW(model.parameters(), fused=True), amp(dtype=torch.float16), max_norm=1.0
    )
    step = step(lambda batch: loss_of(model, batch))
    history = History(step, log=lambda numbers, update: None)
    for batch in BATCHES:
        step(batch)
    assert len(history) == len(BATCHES) and not waits
    assert len(history["loss"]) == len(BATCHES) and waits


# Where rows go as well.


class Writer:
    def __init__(self):
        self.rows = []

    def add_scalar(self, name, value, update):
        self.rows.append((name, value, update))


class Run:
    def __init__(self):
        self.rows = []

    def log(self, numbers):
        self.rows.append(numbers)


def test_rows_go_to_tensorboard_to_wandb_and_to_a_callable():
    writer, run_of_wandb, calls = Writer(), Run(), []
    factors = [1.0] * 4 + [1e38] + [1.0] * 3
    history = recorded(factors, log=writer)
    recorded(factors, log=run_of_wandb)
    recorded(factors, log=lambda numbers, update: calls.append((update, numbers)))
    names = [name for name in history.columns if name not in ("update", "peak_memory", "seconds")]
    for name in names:
        expected = pytest.approx(history[name], rel=0, abs=0, nan_ok=True)
        assert [value for key, value, _ in writer.rows if key == name] == expected
        assert [numbers[name] for numbers in run_of_wandb.rows] == expected
        assert [numbers[name] for _, numbers in calls] == expected
    assert [update for name, _, update in writer.rows if name == "loss"] == [1, 2, 3, 4]
    assert (
        [numbers["update"] for numbers in run_of_wandb.rows]
        == [1, 2, 3, 4]
        == [update for update, _ in calls]
    )
    assert "update" not in calls[0][1] and "peak_memory" not in calls[0][1]
    assert all(type(value) is float for value in calls[0][1].values())


def test_on_a_cpu_a_row_is_logged_at_once():
    calls, model = [], make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters()))(lambda batch: loss_of(model, batch))
    History(step, log=lambda numbers, update: calls.append(update))
    for update, batch in enumerate(BATCHES, 1):
        step(batch)
        assert calls[-1] == update


def test_a_log_that_fails_costs_no_row_and_no_update():
    def fails_at_the_second(numbers, update):
        logged.append(update)
        if update == 2:
            raise OSError("the disk is full")

    logged, model, applied = [], make_model(torch.float32), []
    step = train_step(
        torch.optim.SGD(model.parameters()), after=lambda: applied.append(step._closed)
    )(lambda batch: loss_of(model, batch))
    first, second = History(step, log=fails_at_the_second), History(step)
    for batch in BATCHES[:4]:
        with suppress(OSError):
            step(batch)
        assert len(applied) == step._closed and all(p.grad is None for p in model.parameters())
    assert logged == first["update"] == second["update"] == [1, 2, 3, 4]
    assert first["loss"] == second["loss"] and step.updates == 4


def test_the_window_at_which_a_run_gives_up_is_a_row():
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters()), max_norm=1.0, max_skips=3)(
        lambda batch: loss_of(model, batch) * math.inf
    )
    history = History(step)
    for batch in BATCHES[:2]:
        step(batch)
    with pytest.raises(FloatingPointError):
        step(BATCHES[2])
    assert history["update"] == [1, 2, 3] and history["skipped"] == [1, 1, 1]


@pytest.mark.parametrize("log", [3, "runs", Writer, torch.nn.ReLU])
def test_what_cannot_be_logged_to_is_refused(log):
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters()))(lambda batch: loss_of(model, batch))
    with pytest.raises(TypeError, match=r"log=SummaryWriter\(\)"):
        History(step, log=log)
    assert not step._watchers


@pytest.mark.parametrize("thing", [None, 3, make_model(), History, train_step])
def test_a_history_is_of_a_step(thing):
    with pytest.raises(
        TypeError, match=r"`step = train_step\(optimizer\)\(function\)`, `History\(step\)`"
    ):
        History(thing)


# Reading, and going on.


def test_a_file_has_what_the_columns_have(tmp_path):
    history = recorded([1.0] * 8)
    history.to_csv(tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="") as file:
        names, *rows = csv.reader(file)
    assert names == history.columns and [row[0] for row in rows] == ["1", "2", "3", "4"]
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        assert list(map(float, column)) == pytest.approx(history[name], rel=0, nan_ok=True)


def test_a_table_of_pandas_has_what_the_columns_have():
    pytest.importorskip("pandas")
    history = recorded([1.0] * 8)
    table = history.to_pandas()
    assert list(table) == history.columns and table["loss"].tolist() == history["loss"]


@pytest.mark.parametrize("method, package", [("to_pandas", "pandas"), ("plot", "matplotlib")])
def test_what_is_not_installed_is_named(method, package, monkeypatch):
    history = recorded([1.0] * 8)
    for name in (package, f"{package}.figure"):
        monkeypatch.setitem(trainkit.watch.history.importlib.sys.modules, name, None)
    with pytest.raises(ImportError, match=f"`pip install {package}`"):
        getattr(history, method)()
    assert (history._repr_png_() is None) is (package == "matplotlib")


def test_another_column_is_a_key_error():
    history = recorded([1.0] * 8)
    assert "loss" in history and "losses" not in history and list(history) == history.columns
    with pytest.raises(KeyError, match="'losses' is none of the columns update, loss"):
        history["losses"]


def test_a_run_that_is_stopped_goes_on_with_its_history(tmp_path):
    def train(path, stop_after=None):
        model = make_model(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
        history = History(step)
        with resumable(path, every=1, model=model, optimizer=optimizer, step=step, history=history):
            for seen, batch in enumerate(step.over(BATCHES)):
                step(batch)
                if seen == stop_after:
                    raise ZeroDivisionError
        return history

    whole = train(tmp_path / "whole")
    with suppress(ZeroDivisionError):
        train(tmp_path / "stopped", stop_after=4)
    resumed = train(tmp_path / "stopped")
    assert len(whole) == 4 and resumed["update"] == [1, 2, 3, 4]
    assert resumed["loss"] == whole["loss"]
    assert resumed["seconds"] == sorted(resumed["seconds"])


def test_what_was_recorded_since_gives_way_to_a_state_that_is_loaded():
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters()))(lambda batch: loss_of(model, batch))
    history = History(step)
    for batch in BATCHES[:3]:
        step(batch)
    state = history.state_dict()
    for batch in BATCHES:
        step(batch)
    history.load_state_dict(state)
    assert history["update"] == [1, 2, 3]
    history.load_state_dict(History(step).state_dict())
    assert len(history) == 0 and history["update"] == []


def test_another_state_is_refused_and_changes_nothing():
    history = recorded([1.0] * 8)
    state = history.state_dict()
    columns = state["columns"]
    other = {"columns": [*columns[:-1], "x"], "rows": state["rows"]}
    bad = [
        None,
        {},
        {"columns": columns},
        {"columns": columns, "rows": torch.ones(4)},
        {"columns": 3, "rows": 3},
        other,
    ]
    for wrong in bad:
        with pytest.raises(ValueError, match=r"history\.state_dict\(\)|this one has"):
            history.load_state_dict(wrong)
    assert len(history) == 4
    fresh = recorded([1.0] * 8)
    fresh.load_state_dict(state)
    assert all(fresh[name] == pytest.approx(history[name], rel=0, nan_ok=True) for name in columns)


def recorded_on(rank, ranks):
    model = make_model()
    wrapped = DistributedDataParallel(model)
    step = train_step(
        torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2), module=wrapped, max_norm=1.0
    )
    step = step(lambda batch: (loss_of(wrapped, batch), len(batch[0])))
    history = History(step)
    for batch in step.over(make_batches([[4, 2, 3], [1, 5, 2, 2]][rank], seed=rank)):
        step(batch)
    return [history[name] for name in ("update", "loss", "grad_norm", "weight")]


def test_each_rank_has_its_own_losses_and_all_the_same_norm():
    first, second = run(recorded_on, 2)
    assert first[0] == second[0] == [1, 2] and first[2] == second[2]
    assert first[1] != second[1] and (first[3], second[3]) == (
        [6, 3],
        [6, 4],
    )  # what a rank got again counts nothing
