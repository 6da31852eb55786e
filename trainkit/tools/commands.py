"""``python -m trainkit``: each command adds itself to one parser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from trainkit.tools.doctor import add_doctor
from trainkit.tools.lift import add_lift


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser("python -m trainkit", description="Tools for training steps.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_lift(commands)
    add_doctor(commands)
    chosen = parser.parse_args(arguments)
    return int(chosen.run(chosen))
