"""python -m trainkit, as it is typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainkit.tools import commands
from trainkit.tools.commands import main
from trainkit.tools.doctor.machine import advise, find_facts, find_faults

PACKAGE = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "print('imported')\n"
        "import torch\n"
        "def make():\n"
        "    print('made')\n"
        "    loss_fn = lambda model, batch: model(batch).pow(2).mean()\n"
        "    return torch.nn.Linear(2, 1), torch.ones(8, 2), loss_fn\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "required: COMMAND"), (["docter"], "'docter'"), (["doctor", "--jsno"], "--jsno")],
)
def test_a_wrong_command_is_refused(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == "" and said in printed.err
    assert printed.err.startswith("usage: python -m trainkit")


def test_a_model_in_the_current_folder_is_tried_and_nothing_is_written(folder):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "CUDA_VISIBLE_DEVICES": ""}
    arguments = ["doctor", "mine:make", "--steps", "1", "--device", "cpu"]
    command = [sys.executable, "-m", "trainkit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert (done.returncode, done.stderr) == (0, "imported\nmade\n")
    assert done.stdout.startswith("mine:make on cpu") and "\nmicrobatch(2) " in done.stdout
    assert {path.name for path in folder.iterdir()} <= {"mine.py", "__pycache__"}


def test_the_result_is_one_json_object_whatever_the_users_code_prints(folder, capsys):
    assert main(["doctor", "mine:make", "--steps", "1", "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert list(found) == ["target", "device", "rows", "steps", "variants"]
    keys = ["name", "seconds", "peak_bytes", "largest_batch", "note", "failure"]
    assert list(found["variants"][0]) == keys and printed.err == "imported\nmade\n"


@pytest.mark.parametrize(("failures", "status"), [([], 0), (["cuda:0: CUDA error"], 1)])
def test_the_report_and_its_status(monkeypatch, capsys, failures, status):
    machine = find_facts()
    machine.failures, machine.driver = failures, None
    found = {"machine": machine, "advice": advise(machine), "findings": find_faults(machine)}
    monkeypatch.setattr(commands, "examine", lambda: found)
    assert main(["doctor"]) == status
    assert "@train_step(optimizer, accumulate(4)" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == status
    out, err = capsys.readouterr()
    assert json.loads(out)["machine"]["failures"] == failures and err == ""
    assert list(json.loads(out)) == ["machine", "advice", "findings"]
