"""%load_ext trainkit, as IPython calls it."""

import subprocess
import sys

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


def test_anything_else_is_printed_and_no_cell_is_filled(capsys):
    shell = Shell()
    for line in ("lift frozzen", "lift", "", "lfit amp"):
        shell.run(line)
        assert "error: " in capsys.readouterr().err
    for line, said in (("-h", "lift"), ("lift -h", "--inline"), ("doctor", "@train_step")):
        shell.run(line)
        assert said in capsys.readouterr().out
    assert not shell.cells


def test_importing_the_package_does_not_import_its_commands():
    code = (
        "import sys, trainkit; print([m for m in sys.modules if m.startswith('trainkit.tools.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['trainkit.tools.notebooks']\n"
