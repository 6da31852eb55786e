"""Print how much code trainkit has, and how many Python calls a micro-batch takes.

python benchmarks/size.py

A line of code is a line that is not blank and holds more than a comment or a docstring, in a file
that ruff has formatted at 100 columns.
"""

from __future__ import annotations

import ast
import collections
import io
import sys
import tokenize
from pathlib import Path

import torch
from torch import nn

import trainkit
from trainkit import accumulate, amp, train_step
from trainkit.tools.lift import lift

PACKAGE = Path(trainkit.__file__).parent
CELLS = ("accumulate", "amp"), ("frozen",), ("freeze",)


def code_lines(source: str) -> set[int]:
    """Return the numbers of the lines that hold code."""
    lines = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT and token.string.strip():
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            lines.difference_update(lines_of(node))
    return lines


def lines_of(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def package_sizes() -> tuple[dict[str, int], dict[str, int]]:
    """Return the lines of code of each folder, and of each class."""
    folders, classes = collections.Counter[str](), collections.Counter[str]()
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = code_lines(source)
        folders["/".join(path.parts[len(PACKAGE.parts) - 1 : -1][:2])] += len(lines)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                classes[f"{path.stem}.{node.name}"] = len(lines.intersection(lines_of(node)))
    return folders, classes


def cell_size(*names: str) -> tuple[int, int]:
    """Return the lines of code and all lines of a lifted cell."""
    cell = lift(names)
    return len(code_lines(cell)), len(cell.splitlines())


def calls() -> list[tuple[int, int]]:
    """Count the Python calls of a micro-batch, and their files.

    First where the window stays open, then where it closes; with a weight, float16, clipping and
    ``after``.
    """
    model, x, files = nn.Linear(4, 4), torch.randn(3, 4), list[str]()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    after = torch.optim.lr_scheduler.ConstantLR(optimizer).step
    parts = accumulate(2), amp(dtype=torch.float16, device="cpu")

    @train_step(optimizer, *parts, max_norm=1.0, after=after)
    def step(x):
        return model(x).float().square().mean(), len(x)

    def record(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            files.append(frame.f_code.co_filename)

    counts = []
    for _ in range(8):
        files.clear()
        sys.setprofile(record)
        step(x)
        sys.setprofile(None)
        counts.append((len(files), len(set(files))))
    return counts[-2:]


if __name__ == "__main__":
    folders, classes = package_sizes()
    for folder, lines in [*folders.items(), ("in all", folders.total()), *classes.most_common(1)]:
        print(f"{lines:6,} {folder}")
    for names in CELLS:
        print("{:6,} of {:,} lines: lift".format(*cell_size(*names)), *names)
    for window, count in zip(("open", "closed"), calls(), strict=True):
        print("{:6,} calls in {} files, window".format(*count), window)
