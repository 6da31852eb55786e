"""What a notebook gets by ``%load_ext trainkit``: the commands of ``python -m trainkit`` as a magic."""

from __future__ import annotations

import contextlib
import io
from importlib import import_module
from typing import Any


def load_ipython_extension(shell: Any) -> None:
    """Adds ``%trainkit``: ``%trainkit lift accumulate amp`` fills the next cell, ``%trainkit doctor`` prints its report."""
    shell.register_magic_function(lambda line: _trainkit(shell, line), "line", "trainkit")


def _trainkit(shell: Any, line: str) -> None:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            import_module("trainkit.commands").main(line.split())
    except SystemExit:  # it has said what is wrong, and a notebook goes on
        return
    if line.split()[0] == "lift" and printed.getvalue():
        shell.set_next_input(printed.getvalue())
    else:
        print(printed.getvalue(), end="")
