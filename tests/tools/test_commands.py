"""python -m trainkit, as it is typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainkit.tools.commands import main

PACKAGE = Path(__file__).parents[2]


def run(*arguments, cwd=PACKAGE):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "trainkit", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


def test_without_a_command_it_says_how_it_is_used():
    done = run()
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr.startswith("usage: python -m trainkit [-h] COMMAND")
    )


@pytest.mark.parametrize(
    ("arguments", "said"), [(["docter"], "'docter'"), (["doctor", "--jsno"], "arguments: --jsno")]
)
def test_what_is_no_command_is_refused(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_doctor_reports():
    done = run("doctor", "--no-compile")
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert (
        done.stdout.startswith("torch ") and "@train_step(optimizer, accumulate(4)" in done.stdout
    )
    assert "torch.compile   not tried" in done.stdout


def test_the_doctor_prints_one_json_object(capsys):
    main(["doctor", "--json", "--no-compile"])
    printed = capsys.readouterr()
    assert list(json.loads(printed.out)) == ["machine", "advice", "findings"] and printed.err == ""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.Linear(2, 1), torch.ones(8, 2), lambda model, batch: model(batch).pow(2).mean()\n"
        "def fails():\n"
        "    raise KeyError('mine')\n"
    )
    return tmp_path


def test_a_model_in_the_current_folder_is_tried_and_nothing_is_written(folder):
    done = run("doctor", "mine:make", "--steps", "1", "--device", "cpu", cwd=folder)
    assert done.returncode == 0 and done.stderr == "" and "microbatch(2)" in done.stdout, (
        done.stderr
    )
    assert {path.name for path in folder.iterdir()} <= {"mine.py", "__pycache__"}


def test_what_cannot_be_tried_is_one_line_and_an_error_of_the_users_own_is_left(
    folder, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(str(folder))
    assert main(["doctor", "mine:mkae"]) == 2
    said = "python -m trainkit doctor: mine has no function 'mkae': `python -m trainkit doctor mine:make`\n"
    assert capsys.readouterr() == ("", said)
    with pytest.raises(KeyError, match="mine"):
        main(["doctor", "mine:fails"])


def test_what_the_users_own_code_prints_is_not_part_of_the_json_object(folder, monkeypatch, capsys):
    (folder / "loud.py").write_text(
        "print('imported')\nimport mine\ndef make():\n    print('made')\n    return mine.make()\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    assert main(["doctor", "loud:make", "--steps", "1", "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["target"] == "loud:make" and printed.err == "imported\nmade\n"
