"""python -m trainkit, as it is typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainkit.tools.commands import main
from trainkit.tools.doctor import facts
from trainkit.tools.doctor.facts import Device

PACKAGE = Path(__file__).parents[2]


def run(*arguments, cwd=PACKAGE):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "trainkit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


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
    done = run("doctor", "mine:make", "--steps", "1", "--device", "cpu", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "") and "\nmicrobatch(2) " in done.stdout
    assert {path.name for path in folder.iterdir()} <= {"mine.py", "__pycache__"}


def test_the_result_is_one_json_object_whatever_the_users_code_prints(folder, capsys):
    assert main(["doctor", "mine:make", "--steps", "1", "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    keys = ["target", "device", "rows", "steps", "variants", "advice"]
    assert list(json.loads(printed.out)) == keys and printed.err == "imported\nmade\n"


def test_a_wrong_target_is_one_line(folder, capsys):
    assert main(["doctor", "mine:mkae"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("python -m trainkit doctor: mine has no function 'mkae': `doctor mine:")
    assert out == "imported\n" and err.count("\n") == 1


@pytest.mark.parametrize(("failure", "status"), [("", 0), ("CUDA error", 1)])
def test_the_report_and_its_status(monkeypatch, capsys, failure, status):
    machine = facts.examine()
    machine.devices = [Device("cpu", "Some CPU", 2**34, (), failure)]
    machine.driver = None
    monkeypatch.setattr(facts, "examine", lambda: machine)
    assert main(["doctor"]) == status
    assert "@train_step(optimizer, accumulate(4)" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == status
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert list(found) == ["machine", "advice", "findings"] and err == ""
    assert found["machine"]["devices"][0]["name"] == "Some CPU"
    assert any(finding["level"] == "error" for finding in found["findings"]) is bool(status)
