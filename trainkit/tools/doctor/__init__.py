"""``python -m trainkit doctor``: what to use on this machine, and what each part does for a model.

The exit status is 1 if training on the accelerator cannot work, 2 if a target cannot be tried.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import Any

from trainkit.tools.doctor import advice, facts, trial
from trainkit.tools.doctor.target import WrongTarget


def add_doctor(commands: Any) -> None:
    """Add ``doctor`` to the commands of ``python -m trainkit``."""
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
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.target is not None:
        try:
            # Only the result goes to stdout with --json, whatever the user's code prints.
            with contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
                found = trial.run_trial(
                    options.target, options.steps, options.device, options.layers
                )
        except WrongTarget as error:
            print(f"python -m trainkit doctor: {error}", file=sys.stderr)
            return 2
        print(json.dumps(found, indent=2) if options.json else trial.table(found))
        return 0
    machine = facts.examine()
    use, findings = advice.advise(machine), advice.find_faults(machine)
    if options.json:
        found = {"machine": machine, "advice": use, "findings": findings}
        print(json.dumps(found, default=vars, indent=2))
    else:
        print(advice.report(machine, use, findings))
    return int(any(finding["level"] == "error" for finding in findings))
