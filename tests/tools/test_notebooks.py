"""%load_ext trainkit, as IPython calls it."""

import pytest

from trainkit import load_ipython_extension
from trainkit.tools.lift import lift


class Shell:
    """What of a notebook is used."""

    def __init__(self):
        self.magics, self.cells = {}, []

    def register_magic_function(self, function, kind, name):
        assert kind == "line"
        self.magics[name] = function

    def set_next_input(self, text):
        self.cells.append(text)


def test_lift_fills_the_next_cell(capsys):
    shell = Shell()
    load_ipython_extension(shell)
    shell.magics["trainkit"]("lift accumulate amp")
    assert (
        shell.cells == ["%%writefile trainkit.py\n" + lift(["accumulate", "amp"])]
        and capsys.readouterr().out == ""
    )


def test_what_is_wrong_is_said_and_no_cell_is_filled(capsys, tmp_path):
    shell = Shell()
    load_ipython_extension(shell)
    for line in ("lift acumulate", "lift", "", "lfit amp"):
        shell.magics["trainkit"](line)
        assert "error: " in capsys.readouterr().err
    shell.magics["trainkit"](f"lift frozen -o {tmp_path / 'trainkit.py'}")
    assert shell.cells == [] and (tmp_path / "trainkit.py").read_text() == lift(["frozen"])


def test_help_is_shown(capsys):
    shell = Shell()
    load_ipython_extension(shell)
    for line, said in (("-h", "lift"), ("lift --help", "--inline")):
        shell.magics["trainkit"](line)
        assert said in capsys.readouterr().out and not shell.cells


def test_what_was_printed_before_an_exception_is_shown(capsys, tmp_path, monkeypatch):
    (tmp_path / "stumbles.py").write_text("def make():\n    print('so far')\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    shell = Shell()
    load_ipython_extension(shell)
    with pytest.raises(ZeroDivisionError):
        shell.magics["trainkit"]("doctor stumbles:make")
    assert capsys.readouterr().out == "so far\n" and not shell.cells
