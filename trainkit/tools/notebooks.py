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
    words, printed = line.split(), io.StringIO()
    # What is lifted makes the next cell; all else is shown as it comes, also where it ends in an exception.
    kept = (
        contextlib.redirect_stdout(printed) if words[:1] == ["lift"] else contextlib.nullcontext()
    )
    try:
        with kept:
            import_module("trainkit.tools.commands").main(words)
    except SystemExit:  # it has said what is wrong, or how it is used, and a notebook goes on
        print(printed.getvalue(), end="")
    else:
        if printed.getvalue():
            shell.set_next_input(printed.getvalue())
