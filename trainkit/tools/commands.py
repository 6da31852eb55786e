"""``python -m trainkit``: the command line of lift and doctor."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from trainkit.tools.doctor.machine import examine, report
from trainkit.tools.doctor.trial import run_trial, table
from trainkit.tools.lift import add_lift


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser("python -m trainkit", description="Tools for training steps.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_lift(commands)
    _add_doctor(commands)
    chosen = parser.parse_args(arguments)
    return int(chosen.run(chosen))


def _add_doctor(commands: Any) -> None:
    about = "says what to use on this machine, and what each part does for your own model"
    parser = commands.add_parser("doctor", help=about, description=about)
    returns = "a function of yours that returns (model, batch) or (model, batch, loss_fn)"
    parser.add_argument("target", metavar="MODULE:FUNCTION", nargs="?", help=returns)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.add_argument_group("with MODULE:FUNCTION")
    options.add_argument("--steps", type=int, default=5, help="steps of each variant (5)")
    options.add_argument("--device", help="the accelerator, or else the CPU, by default")
    layers = "what to freeze and recompute, may be repeated; by default half and all of the blocks"
    options.add_argument("--layers", metavar="PATTERN", action="append", help=layers)
    parser.set_defaults(run=_run_doctor)


def _run_doctor(options: argparse.Namespace) -> int:
    """Print the result; return 1 if training on the accelerator cannot work, else 0."""
    if options.target is None:
        found, show = examine(), report
    else:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result alone
            found = run_trial(options.target, options.steps, options.device, options.layers)
        show = table
    print(json.dumps(found, default=vars, indent=2) if options.json else show(found))
    return int(any(finding["level"] == "error" for finding in found.get("findings", [])))
