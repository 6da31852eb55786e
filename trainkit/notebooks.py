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
    printed, is_done = io.StringIO(), False
    # Leaving, it has said what is wrong, or how it is used, and a notebook goes on.
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        import_module("trainkit.commands").main(line.split())
        is_done = True
    if is_done and line.split()[0] == "lift" and printed.getvalue():
        shell.set_next_input(printed.getvalue())
    else:
        print(printed.getvalue(), end="")
