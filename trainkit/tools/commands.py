"""The commands of ``python -m trainkit``. Each is added by the file that does it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from trainkit.tools.doctor import add_doctor
from trainkit.tools.lift import add_lift


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainkit", description="Tools around training steps."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_lift(commands)
    add_doctor(commands)
    chosen = parser.parse_args(arguments)
    status: int = chosen.run(chosen)
    return status
