"""``%load_ext trainkit``: the commands of ``python -m trainkit`` as the magic ``%trainkit``.

``%trainkit lift accumulate amp`` fills the next cell; ``%trainkit doctor`` prints its report.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any


def load_ipython_extension(shell: Any) -> None:
    """Add ``%trainkit`` to a notebook."""
    shell.register_magic_function(lambda line: _trainkit(shell, line), "line", "trainkit")


def _trainkit(shell: Any, line: str) -> None:
    from trainkit.tools.commands import main  # not needed by ``import trainkit``

    words, output = line.split(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            main(words)
    except SystemExit:  # argparse has printed an error or the help; the notebook continues
        words = []
    show = shell.set_next_input if words[:1] == ["lift"] else print
    if output.getvalue():
        show(output.getvalue())
