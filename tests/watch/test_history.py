"""History, against the lines that it replaces."""

import csv
import io
import math
import sys
from contextlib import suppress

import pytest
import torch
from launch import run
from oracles import loss_of, make_batches, make_model
from torch.nn.parallel import DistributedDataParallel

from trainkit import History, accumulate, amp, microbatch, resumable, train_step
from trainkit.core.update import Answer

BATCHES = make_batches([4, 2, 4, 1, 3, 4, 2, 4], torch.float32)


def stepped(*parts, fused=False, **options):
    """A step on batches; called with a weight, it gives one."""
    model = make_model(torch.float32)

    @train_step(torch.optim.SGD(model.parameters(), lr=0.1, fused=fused), *parts, **options)
    def step(batch, weight=None, factor=1.0):
        loss = loss_of(model, batch) * factor
        return loss if weight is None else (loss, weight)

    return step


@pytest.fixture
def late(monkeypatch):
    """Numbers do not arrive from the device until ``late.clear()``, and must not be waited for."""
    state, known, read = {"late"}, Answer.known, Answer.read

    def read_without_wait(answer):
        assert not state, "the host waits for the device"
        return read(answer)

    monkeypatch.setattr(Answer, "known", lambda answer: not state and known(answer))
    monkeypatch.setattr(Answer, "read", read_without_wait)
    return state


# What is recorded.


def by_hand(factors):
    """The usual float16 loop, which reads every number with a wait."""
    model = make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler = torch.amp.GradScaler("cpu", growth_interval=2)
    rows = []
    for start in range(0, len(BATCHES), 2):
        window = list(zip(BATCHES, factors, strict=True))[start : start + 2]
        total, mean = sum(len(x) for (x, _), _ in window), 0.0
        for batch, factor in window:
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, batch) * factor * len(batch[0]) / total
            scaler.scale(loss).backward()
            mean += loss.item()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        is_finite = norm < math.inf
        rate, scale = optimizer.param_groups[0]["lr"], scaler.get_scale()
        rows.append([len(rows) + 1, mean, norm, scale, rate, float(not is_finite), total])
        scaler.step(optimizer)
        scaler.update()
        if is_finite:
            schedule.step()
        optimizer.zero_grad()
    return rows


OVERFLOWING = [1.0, 1.0, 1.0, 1.0, 1e38, 1.0, 1.0, 1.0]  # in window 3, after the scale has grown


def recorded(factors=OVERFLOWING, fused=True, **options):
    model = make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    half = amp(dtype=torch.float16, growth_interval=2)

    @train_step(optimizer, accumulate(2), half, max_norm=0.5, after=schedule.step)
    def step(batch, factor):
        return loss_of(model, batch) * factor, len(batch[0])

    history = History(step, **options)
    for batch, factor in step.over(list(zip(BATCHES, factors, strict=True))):
        step(batch, factor)
    return history


@pytest.mark.parametrize("fused", [False, True])
def test_it_has_the_numbers_of_the_loop_by_hand(fused):
    history = recorded(fused=fused)
    names = ["update", "loss", "grad_norm", "loss_scale", "lr", "skipped", "weight"]
    assert history.columns == [*names, "seconds", "peak_memory"] and len(history) == 4
    for name, expected in zip(names, zip(*by_hand(OVERFLOWING), strict=True), strict=True):
        known = [(a, b) for a, b in zip(history[name], expected, strict=True) if math.isfinite(b)]
        found, wanted = zip(*known, strict=True)
        assert found == pytest.approx(wanted, rel=1e-2 if name in ("loss", "grad_norm") else 0)
    assert history["skipped"] == [0, 0, 1, 0]
    assert history["loss_scale"] == [65536, 65536, 131072, 65536]
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


class Halves(torch.optim.Optimizer):
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.mul_(0.5)


def test_a_step_has_a_learning_rate_for_each_optimizer_or_none():
    model = make_model(torch.float32)
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second, without = torch.optim.SGD(model[2].parameters(), lr=0.2), Halves(model.parameters(), {})
    for optimizers, expected in (
        ([first, second], {"lr/0": [0.1], "lr/1": [0.2]}),
        (first, {"lr": [0.1]}),
        (without, {"lr": pytest.approx([math.nan], nan_ok=True)}),
    ):
        step = train_step(optimizers)(lambda batch: loss_of(model, batch))
        history = History(step)
        step(BATCHES[0])
        assert {name: history[name] for name in history if "lr" in name} == expected

    @accumulate(2, model)
    def without_optimizer(batch):
        yield loss_of(model, batch)

    assert not [name for name in History(without_optimizer) if "lr" in name]


class Relative(torch.optim.Optimizer):
    """Picks its step size itself, as Adafactor does: its ``lr`` is None."""

    def __init__(self, params):
        super().__init__(params, {"lr": None})

    def step(self, closure=None):
        pass


@pytest.mark.parametrize("log", [None, lambda numbers, update: None])
def test_an_optimizer_whose_learning_rate_is_none(log, capsys):
    model = make_model()
    step = train_step(Relative(model.parameters()), max_norm=1.0)(lambda b: loss_of(model, b))
    history = History(step, log=log)
    for batch in step.over(make_batches([4] * 3), progress={"mininterval": 0}):
        step(batch)
    assert all(map(math.isnan, history["lr"])) and len(history) == 3
    assert " lr " not in capsys.readouterr().err
    assert [axes.get_title() for axes in history.plot().axes] == ["loss", "gradient norm"]


def test_blocks_by_hand_and_chunks_are_recorded_once_per_window():
    def rows(use, *parts):
        model = make_model(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = train_step(optimizer, accumulate(2), *parts, max_norm=1.0)
        if use == "call":
            step = step(lambda x, y: loss_of(model, (x, y)))
        first, second = History(step), History(step)
        for batch in step.over(BATCHES[:3]):
            if use == "call":
                step(*batch)
            else:
                with step:
                    step.backward(loss_of(model, batch))
        assert first["loss"] == second["loss"]
        return [first[name] for name in ("update", "loss", "grad_norm")]

    expected = rows("call")
    assert expected[0] == [1, 2] and rows("block") == expected
    for chunked, column in zip(rows("call", microbatch(3)), expected, strict=True):
        assert chunked == pytest.approx(column, rel=1e-5)


def test_open_and_discarded_windows_and_failed_calls_are_no_rows():
    step = stepped(accumulate(2))
    history = History(step)
    step(BATCHES[0])
    step.discard()
    with pytest.raises(TypeError):
        step(3)
    step(BATCHES[0])
    assert len(history) == 0 and repr(history) == "History(no updates)"
    step(BATCHES[1])
    assert len(history) == 1


def test_weights_may_be_numbers_and_tensors_in_one_window():
    step = stepped(accumulate(3))
    history = History(step)
    weights = [1, torch.tensor(2, dtype=torch.uint8), 5]
    losses = [step(*pair).loss.item() for pair in zip(BATCHES[:3], weights, strict=True)]
    assert history["weight"] == [8]
    mean = (losses[0] + 2 * losses[1] + 5 * losses[2]) / 8
    assert history["loss"] == pytest.approx([mean], rel=1e-6)


def test_a_window_that_weighs_nothing_has_no_mean():
    step = stepped(max_norm=1.0)
    history = History(step)
    step(BATCHES[0], 0)
    step(BATCHES[1], torch.tensor(0))
    assert history["skipped"] == [1, 1] and history["weight"] == [0, 0]
    assert all(map(math.isnan, history["loss"] + history["grad_norm"]))


def test_the_window_at_which_a_run_gives_up_is_a_row():
    step = stepped(max_norm=1.0, max_skips=3)
    history = History(step)
    with pytest.raises(FloatingPointError):
        for batch in BATCHES:
            step(batch, factor=math.inf)
    assert history["update"] == [1, 2, 3] and history["skipped"] == [1, 1, 1]


# When it is read.


def test_numbers_are_read_when_they_have_arrived_and_then_in_order(late, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: pytest.fail("the host waits"))
    rows = []
    step = stepped(amp(dtype=torch.float16), fused=True, max_norm=1.0)
    history, quiet = History(step, log=lambda numbers, update: rows.append(update)), History(step)
    for batch in BATCHES[:5]:
        step(batch)
    assert rows == [] and len(history) == len(quiet) == 5
    late.clear()
    step(BATCHES[5])
    assert rows == history["update"] == quiet["update"] == [1, 2, 3, 4, 5, 6]


def test_copies_are_few(monkeypatch):
    copies, begin = [], Answer.__init__
    monkeypatch.setattr(Answer, "__init__", lambda *args: copies.append(1) or begin(*args))
    step = stepped()
    history = History(step)
    for _ in range(300):
        step(BATCHES[3])
    assert len(copies) == 1 and len(history["loss"]) == 300 and len(copies) == 2


def test_the_end_of_a_loop_flushes_however_it_ends(monkeypatch):
    monkeypatch.setattr(Answer, "known", lambda answer: False)
    rows, step = [], stepped(accumulate(2))
    History(step, log=lambda numbers, update: rows.append(update))
    for batch in step.over(BATCHES[:3]):
        step(batch)
    assert rows == [1, 2]
    for batch in step.over(BATCHES):
        if step(batch).complete:
            break
    assert rows == [1, 2, 3]


def test_an_interrupted_copy_loses_nothing(monkeypatch):
    def interrupted(answer, numbers):
        raise KeyboardInterrupt

    step = stepped()
    history = History(step, log=lambda numbers, update: None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Answer, "__init__", interrupted)
        step(BATCHES[0])
    step(BATCHES[1])
    assert history["update"] == [1, 2] and step.updates == 2


def test_a_loss_whose_memory_is_used_again_was_copied():
    step = stepped()
    history, losses = History(step), []
    for batch in BATCHES[:2]:
        loss = step(batch).loss
        losses.append(loss.item())
        loss.zero_()  # as the next run of a CUDA graph does
    assert history["loss"] == losses


# Where rows go as well.


class Writer:
    def __init__(self):
        self.rows = {}

    def add_scalar(self, name, value, update):
        self.rows.setdefault(update, {})[name] = value


class Run:
    def __init__(self):
        self.rows = {}

    def log(self, numbers):
        self.rows[numbers.pop("update")] = numbers


def test_rows_go_to_tensorboard_to_wandb_and_to_a_callable():
    writer, wandb_run, calls = Writer(), Run(), {}
    logs = (writer, wandb_run, lambda numbers, update: calls.update({update: numbers}))
    histories = [recorded(log=log) for log in logs]
    for history, rows in zip(histories, (writer.rows, wandb_run.rows, calls), strict=True):
        assert list(rows) == history["update"] == [1, 2, 3, 4]
        names = [name for name in history if name not in ("update", "peak_memory")]
        for i, row in enumerate(rows.values()):
            assert row == pytest.approx({name: history[name][i] for name in names}, nan_ok=True)
            assert {type(value) for value in row.values()} == {float}


def test_on_a_cpu_a_row_is_logged_at_once():
    rows, step = [], stepped()
    History(step, log=lambda numbers, update: rows.append(update))
    for update, batch in enumerate(BATCHES, 1):
        step(batch)
        assert rows[-1] == update


def test_a_log_that_fails_costs_no_row_and_no_update():
    def fails_at_the_second(numbers, update):
        logged.append(update)
        if update == 2:
            raise OSError("the disk is full")

    logged, applied = [], []
    step = stepped(after=lambda: applied.append(1))
    first, second = History(step, log=fails_at_the_second), History(step)
    for update, batch in enumerate(BATCHES[:4], 1):
        with suppress(OSError) if update != 2 else pytest.raises(OSError):
            step(batch)
        assert len(applied) == step.updates == update
    assert logged == first["update"] == second["update"] == [1, 2, 3, 4]
    assert first["loss"] == second["loss"]


@pytest.mark.parametrize("log", [3, "runs", Writer])
def test_what_cannot_be_logged_to_is_refused(log):
    with pytest.raises(TypeError, match=r"(?s)got .*`History\(step, log="):
        History(stepped(), log=log)


@pytest.mark.parametrize("thing", [None, make_model(), History])
def test_only_a_step_has_a_history(thing):
    with pytest.raises(TypeError, match=f"got {type(thing).__name__}.*`History"):
        History(thing)


# Reading and resuming.


def test_a_file_and_a_table_have_what_the_columns_have(tmp_path):
    history = recorded()
    history.to_csv(tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="") as file:
        names, *rows = csv.reader(file)
    assert names == history.columns and [row[0] for row in rows] == ["1", "2", "3", "4"]
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        assert list(map(float, column)) == pytest.approx(history[name], rel=0, nan_ok=True)
    pytest.importorskip("pandas")
    table = history.to_pandas()
    assert list(table) == history.columns and table["loss"].tolist() == history["loss"]


@pytest.mark.parametrize("method, package", [("to_pandas", "pandas"), ("plot", "matplotlib")])
def test_a_missing_package_is_named(method, package, monkeypatch):
    history = recorded()
    for name in ("pandas", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"{method}.* needs {package}.*`pip install {package}`"):
        getattr(history, method)()
    assert history._repr_png_() is None


def test_another_column_is_a_key_error():
    history = History(stepped())
    assert "loss" in history and "losses" not in history and list(history) == history.columns
    with pytest.raises(KeyError, match=r"losses.*loss"):
        history["losses"]


def test_a_run_that_is_stopped_resumes_with_its_history(tmp_path):
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
    assert resumed["update"] == [1, 2, 3, 4] and resumed["loss"] == whole["loss"]
    assert resumed["seconds"] == sorted(resumed["seconds"])


def test_a_state_that_is_loaded_replaces_all_rows():
    step = stepped()
    history = History(step)
    for batch in BATCHES[:3]:
        step(batch)
    state = history.state_dict()
    for batch in BATCHES:
        step(batch)
    history.load_state_dict(state)
    assert history["update"] == [1, 2, 3]
    step(BATCHES[0])
    assert history["update"] == [1, 2, 3, 12] and history["seconds"] == sorted(history["seconds"])
    history.load_state_dict(History(step).state_dict())
    assert len(history) == 0 and history["update"] == []


def test_another_state_is_refused_and_changes_nothing():
    history = recorded()
    state = history.state_dict()
    columns, rows = state["columns"], state["rows"]
    bad = [None, {}, {"columns": columns}, {"columns": columns, "rows": torch.ones(4)}]
    bad += [{"columns": 3, "rows": 3}, {"columns": [*columns[:-1], "x"], "rows": rows}]
    for wrong in bad:
        with pytest.raises(ValueError, match=r"got .*`history\.load_state_dict"):
            history.load_state_dict(wrong)
    assert torch.equal(history.state_dict()["rows"].nan_to_num(), rows.nan_to_num())


def recorded_on(rank, ranks):
    model = make_model()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = train_step(optimizer, accumulate(2), module=wrapped, max_norm=1.0)
    step = step(lambda batch: (loss_of(wrapped, batch), len(batch[0])))
    history, bar = History(step), io.StringIO()
    batches = make_batches([[4, 2, 3], [1, 5, 2, 2]][rank], seed=rank)
    for batch in step.over(batches, progress={"file": bar}):
        step(batch)
    columns = [history[name] for name in ("update", "loss", "grad_norm", "weight")]
    return [*columns, bar.getvalue()]


def test_ranks_have_losses_of_their_own_the_same_norm_and_one_bar():
    first, second = run(recorded_on, 2)
    assert first[0] == second[0] == [1, 2] and first[2] == second[2]
    # What the shorter rank was given again counts nothing.
    assert first[1] != second[1] and (first[3], second[3]) == ([6, 3], [6, 4])
    assert "loss" in first[4] and not second[4]
