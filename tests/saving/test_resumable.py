"""When resumable saves, how it is stopped, and what it refuses."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from datetime import timedelta

import pytest
import torch
from saving_runs import ALWAYS, Killed, batches, names, run_small, same, small, train
from torch import nn
from torch.utils.data import DataLoader

from trainkit import resumable, train_step
from trainkit.core.update import Answer

NEVER = 10**6


@pytest.fixture(autouse=True)
def usual_signals():
    """Those of a program in the foreground; a shell has one in the background ignore SIGINT."""
    found = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    found = {number: signal.signal(number, handler) for number, handler in found.items()}
    yield
    for number, handler in found.items():
        signal.signal(number, handler)


def raising(**signals):
    """Raises signals at batches: ``raising(SIGINT=3)``."""
    numbers = {count: getattr(signal, name) for name, count in signals.items()}
    return lambda count: count in numbers and signal.raise_signal(numbers[count])


# Signals.


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_waits_for_the_next_moment_between_two_batches(name, tmp_path):
    kind = "shuffled" if name == "SIGINT" else "stream"
    expected, total = train(None, kind)
    number = getattr(signal, name)
    found = signal.getsignal(number)
    for at in (0, 6):
        path = tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt if name == "SIGINT" else SystemExit) as stopped:
            train(path, kind, every=NEVER, at_batch=raising(**{name: at}))
        assert name == "SIGINT" or stopped.value.code == 128 + 15
        assert signal.getsignal(number) is found
        states, count = train(path, kind, every=NEVER)
        assert same(states, expected) and count == total - at - 1, at


def test_a_handler_of_a_signal_may_let_the_run_go_on(tmp_path):
    handled = []
    signal.signal(signal.SIGTERM, lambda number, frame: handled.append(number))
    expected, total = train(None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # and one that is ignored stays so
    states, count = train(tmp_path, at_batch=raising(SIGTERM=3, SIGINT=5), every=NEVER)
    assert same(states, expected) and count == total
    assert handled == [signal.SIGTERM]


def test_a_second_signal_does_not_wait(tmp_path, monkeypatch):
    late = time.monotonic() + 1e4
    after = []

    def twice(count):
        with monkeypatch.context() as patch:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # within a second: the same one, sent twice
            patch.setattr("time.monotonic", lambda: late)
            after.append("first")
            signal.raise_signal(signal.SIGINT)
            after.append("second")

    with pytest.raises(KeyboardInterrupt):
        run_small(tmp_path, at_batch=twice, every=NEVER)
    assert after == ["first"]
    with resumable(tmp_path, every=NEVER, **(objects := small())):
        try:
            for x in objects["step"].over(batches()):
                objects["step"](x)
                twice(0)
        except KeyboardInterrupt:
            pass  # and where it came, a state is not whole
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not names(tmp_path)


def test_a_signal_to_the_whole_process_group_leaves_the_workers(tmp_path):
    def at_batch(count):
        if count == 2:
            workers = [str(worker.pid) for worker in multiprocessing.active_children()]
            for name in ("INT", "TERM"):  # not sent by the parent
                subprocess.run(["kill", f"-{name}", *workers], check=True)
            time.sleep(0.2)
            signal.raise_signal(signal.SIGTERM)

    loader = DataLoader(batches(), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(SystemExit):
        run_small(tmp_path, loader=loader, at_batch=at_batch)
    assert run_small(tmp_path, loader=loader) == 8 - 3


def test_workers_end_with_the_process_that_started_them(tmp_path):
    loader = "DataLoader(batches(), num_workers=1, persistent_workers=True)"
    script = (
        f"from saving_runs import *; loader = {loader}; run_small({str(tmp_path)!r}, 1, loader)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True, env=environment)


def test_a_signal_between_two_epochs_and_one_after_the_last(tmp_path):
    for at in (0, 1):
        objects = small()
        with pytest.raises(KeyboardInterrupt), resumable(tmp_path / str(at), **objects) as run:
            for epoch in run.epochs(2):
                for x in objects["step"].over(batches()):
                    objects["step"](x)
                if epoch == at:
                    signal.raise_signal(signal.SIGINT)
        assert run_small(tmp_path / str(at), epochs=2) == (8 if at == 0 else 0)


def test_an_interrupt_that_the_block_catches_leaves_the_position(tmp_path):
    objects, at_batch = small(), raising(SIGINT=2)
    with resumable(tmp_path, every=2, **objects) as run:
        try:
            for _ in run.epochs(2):
                for i, x in enumerate(objects["step"].over(batches())):
                    objects["step"](x)
                    at_batch(i)
        except KeyboardInterrupt:
            for x in objects["step"].over(batches(7)):
                objects["step"](x)
    assert names(tmp_path) == ["00000001"]
    assert run_small(tmp_path, epochs=2) == 16 - 3


def test_in_another_thread_signals_are_left_alone(tmp_path):
    handlers = []

    def in_thread():
        with resumable(tmp_path, **small()):
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


# When it saves.


def test_an_interval_in_updates_or_time_and_how_many_are_kept(tmp_path, monkeypatch):
    run_small(tmp_path / "updates", every=2, keep=10)  # four updates, and the end of the epoch
    assert names(tmp_path / "updates") == ["00000001", "00000002", "00000003"]
    run_small(tmp_path / "two", every=1)
    assert names(tmp_path / "two") == ["00000004", "00000005"]
    clock = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    run_small(tmp_path / "time", every=timedelta(seconds=4), keep=10)
    assert len(names(tmp_path / "time")) == 3


def test_a_relative_path_is_that_of_where_the_block_was_made(tmp_path, monkeypatch):
    """And not of where a loop has gone by the time of a save: the next run would not look there."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run_small("checkpoints", at_batch=lambda count: monkeypatch.chdir(tmp_path / "elsewhere"))
    assert names(tmp_path) == ["checkpoints", "elsewhere"] and not names(tmp_path / "elsewhere")


def test_after_an_exception_nothing_is_written(tmp_path):
    def fail(count):
        return 1 / (count - 2)

    with pytest.raises(ZeroDivisionError):
        run_small(tmp_path / "run", at_batch=fail)
    assert not names(tmp_path / "run")


def test_a_run_at_its_end_has_nothing_left_to_do_and_may_be_made_longer(tmp_path):
    whole, parts, path = small(), small(), tmp_path / "parts"
    run_small(tmp_path / "whole", 3, objects=whole)
    assert run_small(path, 2) == 16
    before = names(path)
    assert run_small(path, 2) == 0
    assert names(path) == before
    for found, where in ((path / before[-1], path), (None, tmp_path / "new")):
        with resumable(where, **small()) as run:
            assert run.resumed_from == found
    assert run_small(path, 3, objects=parts) == 8
    assert same(parts["model"].state_dict(), whole["model"].state_dict())


def test_nothing_is_written_while_a_parameter_is_not_finite(tmp_path):
    objects = small()
    model = objects["model"]

    def spoil(count):
        if count == 2:
            assert names(tmp_path) == ["00000001"]
            with torch.no_grad():
                model[0].bias[0] = torch.nan

    with pytest.warns(UserWarning, match=r"model\.0\.\w+ is not finite"):
        run_small(tmp_path, loader=batches(4), objects=objects, at_batch=spoil, every=1)
    assert names(tmp_path) == ["00000001"]


@pytest.mark.filterwarnings("error")
def test_a_mask_with_minus_infinity_that_nothing_trains_is_saved(tmp_path):
    """Frozen among the parameters of the optimizer, and trainable outside of it."""
    objects = small()
    objects["model"].mask = nn.Parameter(torch.tensor([0, -torch.inf]), requires_grad=False)
    objects["optimizer"].add_param_group({"params": [objects["model"].mask]})
    objects["masked"] = nn.ParameterList([torch.tensor([0, -torch.inf])])
    run_small(tmp_path, objects=objects)
    assert names(tmp_path) == ["00000001"]


# What it refuses.


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"every": 60.0}, TypeError, "60.0 `every=timedelta(minutes=10)`"),
        ({"every": 0}, ValueError, "every=0 `every=1000`"),
        ({"keep": 0}, ValueError, "keep=0 `keep=2`"),
        ({"log": (1, 2)}, TypeError, "log=(1, 2) state_dict `log=[]`"),
        ({"step": []}, ValueError, "model, optimizer, step no step `resumable(path, model=model"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_with_the_corrected_call(options, error, words):
    with pytest.raises(error) as raised:
        resumable("x", **{**small(), **options})
    assert all(word in str(raised.value) for word in words.split())


def test_a_step_is_in_one_block_at_a_time_and_a_block_may_be_entered_again(tmp_path):
    objects = small()
    with pytest.raises(RuntimeError, match="`with resumable"):
        next(resumable("x", **objects).epochs(2))
    with (
        resumable(tmp_path / "a", **objects) as run,
        pytest.raises(RuntimeError, match=r"in the block of another.*`resumable"),
    ):
        resumable(tmp_path / "b", **objects).__enter__()
    with resumable(tmp_path / "b", **objects):  # the step was given back
        pass
    for expected in (2, 0):
        with run:
            assert len(list(run.epochs(2))) == expected


def test_a_path_that_cannot_be_written_is_refused_before_the_loop(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file.*: give a writable path"):
        resumable(tmp_path / "file" / "run", **small()).__enter__()
    run_small(tmp_path / "run")

    def is_read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkdtemp", is_read_only)
    with pytest.raises(ValueError, match=r"Read-only file system.*`shutil\.copytree"):
        run_small(tmp_path / "run")


def test_what_the_step_changes_and_was_not_given_is_warned_of(tmp_path):
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = train_step(optimizer, after=[schedule.step, lambda: None])(lambda x: model(x).mean())
    with pytest.warns(UserWarning, match="SGD, Parameter, ExponentialLR.*`resumable"):
        resumable(tmp_path, step=step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumable(tmp_path, step=step, model=model, optimizer=optimizer, schedule=schedule)


@pytest.mark.filterwarnings("ignore:the step changes")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda o: o.update(ema=[]), "objects.*'ema', 'model', 'optimizer', 'step'"),
        (lambda o: o["model"].append(nn.Linear(8, 8)), r"model\.3\.weight.*\[8, 8\]"),
        (lambda o: o["model"].__setitem__(2, nn.Linear(32, 9)), r"\[8, 32\].*\.2\..*\[9, 32\]"),
        (
            lambda o: o["optimizer"].add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
            r"nothing for optimizer\.param_groups\.1.* 1 parameters",
        ),
    ],
)
def test_a_checkpoint_of_something_else_changes_nothing(change, words, tmp_path):
    run_small(tmp_path)
    objects = small()
    change(objects)
    before = [p.clone() for p in objects["model"].parameters()]
    with pytest.raises(ValueError, match=words), resumable(tmp_path, **objects):
        pass
    assert all(map(torch.equal, before, objects["model"].parameters()))
    assert objects["step"].updates == 0


def test_stages_with_a_path_each_are_resumed_in_either(tmp_path):
    """The second stage trains more layers, with another optimizer."""

    def run(path, stop=None, is_apart=True):
        torch.manual_seed(0)
        model, seen = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 8)), []
        for stage, layers in enumerate((model[2], model)):
            optimizer = torch.optim.AdamW(layers.parameters())
            step = train_step(optimizer)(lambda x: model(x).square().mean())
            objects = {"model": model, "optimizer": optimizer, "step": step}
            folder = path / f"stage{stage}" if is_apart else path
            with resumable(folder, every=ALWAYS, **objects) as resumed:
                for _ in resumed.epochs(2):
                    for x in step.over(batches(3)):
                        if len(seen) == stop:
                            raise Killed
                        step(x)
                        seen.append(stage)
        return model.state_dict(), torch.rand(())

    expected = run(tmp_path / "whole")
    for stop in (4, 6, 8):
        with pytest.raises(Killed):
            run(tmp_path / str(stop), stop)
        assert same(run(tmp_path / str(stop)), expected), stop
    with pytest.raises(ValueError, match=r"optimizer\.param_groups\.0.*`resumable\(.*stage2"):
        run(tmp_path / "one", is_apart=False)


def test_a_scheduler_that_an_update_still_owes_runs_first(tmp_path, monkeypatch):
    """On an accelerator ``after`` runs late; the checkpoint has the update and what follows it."""
    monkeypatch.setattr(Answer, "known", lambda answer: False)
    for expected in (0, 8):
        objects = small()
        schedule = torch.optim.lr_scheduler.ExponentialLR(objects["optimizer"], 0.9)
        step = train_step(objects["optimizer"], after=schedule.step)(
            lambda x, model=objects["model"]: model(x).mean()
        )
        with resumable(tmp_path, every=ALWAYS, schedule=schedule, **objects | {"step": step}):
            assert schedule.last_epoch == step.updates == expected
            for x in step.over(batches()):
                step(x)
