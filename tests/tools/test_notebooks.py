"""%load_ext trainkit, as IPython calls it."""

import subprocess
import sys

import pytest

from trainkit import load_ipython_extension
from trainkit.tools.lift import lift


class Shell:
    """What the extension uses of a notebook."""

    def __init__(self):
        self.magics, self.cells = {}, []
        load_ipython_extension(self)
        self.run = self.magics["trainkit"]

    def register_magic_function(self, function, kind, name):
        assert kind == "line"
        self.magics[name] = function

    def set_next_input(self, text):
        self.cells.append(text)


def test_lift_fills_the_next_cell(capsys):
    shell = Shell()
    shell.run("lift frozen")
    assert shell.cells == ["%%writefile trainkit.py\n" + lift(["frozen"])]
    assert capsys.readouterr().out == ""


def test_a_mistake_is_printed_and_no_cell_is_filled(capsys):
    shell = Shell()
    for line in ("lift frozzen", "lift", "", "lfit amp"):
        shell.run(line)
        assert "error: " in capsys.readouterr().err and not shell.cells


def test_help_is_shown(capsys):
    shell = Shell()
    for line, said in (("-h", "lift"), ("lift --help", "--inline"), ("doctor -h", "--steps")):
        shell.run(line)
        assert said in capsys.readouterr().out and not shell.cells


def test_what_was_printed_before_an_exception_is_shown(capsys, tmp_path, monkeypatch):
    (tmp_path / "stumbles.py").write_text("def make():\n    print('so far')\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        Shell().run("doctor stumbles:make")
    assert capsys.readouterr().out == "so far\n"


def test_importing_the_package_does_not_import_its_commands():
    code = (
        "import sys, trainkit; print([m for m in sys.modules if m.startswith('trainkit.tools.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['trainkit.tools.notebooks']\n"
