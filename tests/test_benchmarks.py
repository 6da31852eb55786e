"""That what BENCHMARKS.md is made with works; nothing here looks at a time."""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 4])
def test_contenders_take_the_same_updates(module, precision, n):
    steps = module("steps")
    times = steps.compete(
        steps.tiny("cpu", n, precision), rounds=2
    )  # which compares the parameters
    assert {steps.USUAL, steps.BY_HAND, steps.TRAINKIT} <= set(times)
    assert all(len(taken) == 2 for taken in times.values())


def test_a_contender_that_takes_other_updates_is_found_out(module, monkeypatch):
    steps = module("steps")
    task = steps.tiny("cpu")
    monkeypatch.setitem(
        steps.CONTENDERS, "other", lambda task: steps.CONTENDERS[steps.USUAL](task._replace(n=2))
    )
    with pytest.raises(AssertionError, match="other takes other updates"):
        steps.compete(task, rounds=1)


def refusing(task):
    """Refuses in its first epoch, as Fabric refuses to clip with a scaler and a fused optimizer."""
    model, _ = task.made(True)

    def epoch():
        raise NotImplementedError("no clipping")

    return model, epoch


def test_a_library_that_refuses_in_its_first_epoch_is_a_dash(module, monkeypatch, capsys):
    steps = module("steps")
    task = steps.tiny("cpu")
    monkeypatch.setitem(steps.CONTENDERS, "other", refusing)
    with pytest.raises(NotImplementedError, match="no clipping"):  # what is ours may not refuse
        steps.compete(task, rounds=1)
    monkeypatch.setattr(steps, "LIBRARIES", {*steps.LIBRARIES, "other"})
    assert "| other | - | - |" in steps.steps_table({"a": task, "b": task}, rounds=2)
    assert (
        "other refuses torch.float32: NotImplementedError('no clipping')" in capsys.readouterr()[1]
    )


def test_the_table_of_a_gpu_has_the_times_of_host_and_gpu(module, monkeypatch):
    steps = module("steps")
    monkeypatch.setitem(steps.CONTENDERS, "other", refusing)
    monkeypatch.setattr(steps, "LIBRARIES", {*steps.LIBRARIES, "other"})
    task = steps.tiny("cpu")
    monkeypatch.setattr(steps, "host_seconds", lambda epoch: 3e-6 * len(task.batches))
    monkeypatch.setattr(steps, "busy_seconds", lambda epoch: 0.0)
    rows = [row.strip("| ").split(" | ") for row in steps.gpu_table(task, rounds=2).splitlines()]
    cells = {name: cells for name, *cells in rows[2:]}
    assert cells[steps.BY_HAND][1:] == ["1.00 (1.00 to 1.00)", "3 us", "100%"]
    assert cells["other"] == ["-"] * 4


def test_updates_alone(module):
    update = module("update")
    assert set(update.compete(3, 50_000, "cpu", rounds=1)) == set(update.CONTENDERS)
    rows = update.memory_table("cpu").splitlines()
    peaks = {row.split(" | ")[0][2:]: float(row.split(" | ")[1].rstrip(" |")) for row in rows[2:]}
    assert math.isclose(peaks[update.BY_HAND], peaks[update.TRAINKIT], abs_tol=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_killed_run_and_damaged_checkpoints():
    """As benchmarks/kill.py does a hundred times. A process with threads cannot be forked."""
    command = [
        sys.executable,
        BENCHMARKS / "kill.py",
        "--kills",
        "1",
        "--flips",
        "3",
        "--sentences",
        "16",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]),
    }
    printed = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert "fell back 3, wrong 0" in printed and printed.endswith("wrong 0\n")


def test_the_section_of_a_device_is_written_and_the_others_are_left(module, monkeypatch, tmp_path):
    run = module("run")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- measured: cpu -->\nold\n<!-- end: cpu -->\nb\n")
    monkeypatch.setattr(
        run, "measured", lambda device, quick, picture: f"new, {device}, {picture.name}"
    )
    monkeypatch.setattr("sys.argv", ["run.py", "--output", str(page)])
    run.main()
    assert (
        page.read_text()
        == "a\n<!-- measured: cpu -->\nnew, cpu, benchmarks_cpu.png\n<!-- end: cpu -->\nb\n"
    )
    monkeypatch.setattr("sys.argv", ["run.py", "--device", "cuda", "--output", str(page)])
    with pytest.raises(SystemExit, match="has no place for this"):
        run.main()
