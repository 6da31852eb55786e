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
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that hold code."""
    lines = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE and token.string:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            text = body[0].value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                lines.difference_update(range(text.lineno, (text.end_lineno or 0) + 1))
    return lines


def package_sizes() -> tuple[dict[str, int], dict[str, int]]:
    """Lines of code of each folder, and of each class."""
    folders, classes = collections.Counter[str](), {}
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = code_lines(source)
        folders[path.relative_to(PACKAGE).parts[0].removesuffix(path.name)] += len(lines)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                inside = lines.intersection(range(node.lineno, (node.end_lineno or 0) + 1))
                classes[f"{path.stem}.{node.name}"] = len(inside)
    return dict(folders), classes


def cell_size(*names: str) -> tuple[int, int]:
    """Lines of code and all lines of a lifted cell."""
    cell = lift(names)
    return len(code_lines(cell)), len(cell.splitlines())


def calls() -> list[tuple[int, int]]:
    """Python calls and their files: in a micro-batch that leaves its window open, that closes it."""
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    after = torch.optim.lr_scheduler.ConstantLR(optimizer).step
    parts = accumulate(2), amp(dtype=torch.float16, device="cpu")

    @train_step(optimizer, *parts, max_norm=1.0, after=after)
    def step(x):
        return model(x).float().square().mean(), len(x)

    def traced() -> tuple[int, int]:
        files: list[str] = []

        def record(frame, event, arg):
            if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
                files.append(frame.f_code.co_filename)

        sys.setprofile(record)
        try:
            step(x)
        finally:
            sys.setprofile(None)
        return len(files), len(set(files))

    for _ in range(6):
        step(x)
    return [traced(), traced()]


if __name__ == "__main__":
    folders, classes = package_sizes()
    for folder, lines in folders.items():
        print(f"{lines:6,}  trainkit/{folder}")
    print(f"{sum(folders.values()):6,}  in all; the longest class is", end=" ")
    print(max((lines, name) for name, lines in classes.items()))
    for names in CELLS:
        code, lines = cell_size(*names)
        print(f"{code:6,}  lift {' '.join(names)}, a cell of {lines:,} lines")
    for window, (count, files) in zip(("stays open", "closes"), calls(), strict=True):
        print(f"{count:6,}  Python calls in {files} files where the window {window}")
