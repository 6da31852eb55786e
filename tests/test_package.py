"""What the package promises about itself: who imports what, and which names are public."""

import ast
import io
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch

import trainkit

PACKAGE = Path(trainkit.__file__).parent
ROOT = PACKAGE.parent

# What files may import at their top besides torch, the standard library and their own folder. The
# flat files, `advice.py` for example, stand here as folders of their own.
ALLOWED = {
    "core": {"core"},
    "layers": {"layers"},
    "chunks": {"chunks", "core", "ranks"},
    "ranks": {"ranks", "core"},
    "watch": {"watch", "core"},
    "saving": {"saving", "core", "ranks"},
    "advice": {"core"},
    "evidence": {"core"},
    "wide": {"core"},
    "__main__": {"tools"},
}  # tools/ and __init__.py may import all

# Imports every file, and prints each import that ran meanwhile: the file, and what it asked for.
LOG_IMPORTS = """
import builtins, importlib, importlib.util, pathlib, sys

import torch

def logged(name, given=None, local=None, names=(), level=0, load=builtins.__import__):
    file = (given or {}).get("__name__", "")
    if file.partition(".")[0] == "trainkit":
        asked = importlib.util.resolve_name("." * level + name, (given or {})["__package__"])
        print(file, *([f"trainkit.{n}" for n in names or ()] if asked == "trainkit" else [asked]))
    return load(name, given, local, names, level)

builtins.__import__ = logged
sys.path.insert(0, sys.argv[1])
for file in sorted(pathlib.Path(sys.argv[1], "trainkit").rglob("*.py")):
    try:
        importlib.import_module(".".join(file.relative_to(sys.argv[1]).with_suffix("").parts))
    except (Exception, SystemExit):  # the tests of that file say so
        pass
"""


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def forbidden(root):
    """Files and what they import against the promise, found in a process of its own."""
    found = set()
    for line in run(LOG_IMPORTS, root).splitlines():
        file, *asked = line.split()
        folder = f"{file}.__init__".split(".")[1]
        for module in asked if folder in ALLOWED else ():
            package, _, inner = module.partition(".")
            if package == "trainkit":
                fits = inner.partition(".")[0] in ALLOWED[folder]
            else:
                fits = package == "torch" or package in sys.stdlib_module_names
            found |= set() if fits else {(file.removeprefix("trainkit."), module)}
    return found


def test_every_folder_imports_what_it_may():
    kinds = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py"}
    kinds |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert kinds == {*ALLOWED, "tools", "__init__"}
    assert forbidden(ROOT) == set()


AGAINST_THE_PROMISE = {
    "core/window.py": "trainkit.watch",
    "core/plan.py": "trainkit.layers.language",
    "core/loop.py": "numpy",
    "core/fused.py": "trainkit.advice",
    "layers/blocks.py": "trainkit.core.warning",
    "chunks/batches.py": "trainkit.layers.language",
    "ranks/collectives.py": "trainkit.saving",
    "watch/plots.py": "trainkit.ranks",
    "saving/state.py": "trainkit.watch",
    "advice.py": "trainkit.wide",
    "wide.py": "trainkit.frozen",
}


def test_an_import_against_the_promise_is_found(tmp_path):
    copy, future = tmp_path / "trainkit", "from __future__ import annotations\n"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file, module in AGAINST_THE_PROMISE.items():
        line = f"import {module}" if file != "wide.py" else "from trainkit import frozen"
        text = (copy / file).read_text()
        tried = f"{future}try:\n    {line}\nexcept Exception:\n    pass\n"
        (copy / file).write_text(tried + text.replace(future, ""))
    expected = {
        (f.removesuffix(".py").replace("/", "."), m) for f, m in AGAINST_THE_PROMISE.items()
    }
    assert forbidden(tmp_path) == expected


def test_import_trainkit_loads_torch_and_the_standard_library_alone():
    """And of torch and trainkit, only what every user needs."""
    code = "import sys, torch; old = {*sys.modules}; import trainkit; print(*{*sys.modules} - old)"
    loaded = run(code).split()
    foreign = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    by_torch = {"torch"}
    ours = "trainkit.advice", "trainkit.wide", "trainkit.tools.doctor", "trainkit.tools.lift"
    late = {"torch.distributed.checkpoint", "torch._dynamo", "torch.utils.checkpoint"}
    if torch.__version__ < (2, 7):  # later versions load it themselves, and without sympy
        by_torch |= {"mpmath", "sympy"}
        late -= {"torch.utils.checkpoint"}
    assert "trainkit" in foreign and foreign <= by_torch | {"trainkit"}
    assert not {*ours, *late, "tqdm", "matplotlib", "pandas"} & set(loaded)
    # `saving` asks for what ranks say to each other, and for no wrapper.
    ranks = {name for name in loaded if name.startswith("trainkit.ranks")}
    assert ranks <= {"trainkit.ranks", "trainkit.ranks.collectives"}


def test_nothing_else_is_public():
    assert trainkit.__all__ == [
        "History",
        "Step",
        "StepResult",
        "accumulate",
        "amp",
        "freeze",
        "frozen",
        "frozen_parameters",
        "microbatch",
        "model_summary",
        "recompute",
        "resumable",
        "train_step",
        "trainable_parameters",
        "unfreeze",
    ]
    assert all(getattr(trainkit, name).__doc__ for name in trainkit.__all__)
    assert dir(trainkit) == trainkit.__all__


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_folder_has_its_line(page):
    lines = [line.strip("| `") for line in (ROOT / page).read_text().splitlines()]
    for folder in (path.parent.name for path in PACKAGE.glob("*/__init__.py")):
        told = [line for line in lines if line.startswith(f"{folder}/")]
        assert len(told) == 1 and len(told[0].split()) > 2, folder


# What the core does not know.

UNKNOWN = "ddp", "fsdp", "distributeddataparallel", "history", "tqdm", "resumable", "chunk"


def mentioned(source):
    """Words of ``UNKNOWN`` in code: not in comments, docstrings, or imports inside of functions."""
    tree, spared = ast.parse(source), set()
    for node in ast.walk(tree):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_docstring or isinstance(node, ast.ImportFrom):
            spared.update(range(node.lineno, node.end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    for token in tokens:
        if token.type != tokenize.COMMENT and token.start[0] not in spared:
            yield from (
                (word, token.string.strip()) for word in UNKNOWN if word in token.string.lower()
            )


def test_the_core_does_not_know_what_attaches_to_it():
    for file in sorted((PACKAGE / "core").glob("*.py")):
        assert not [*mentioned(file.read_text())], file.name


def test_a_mention_in_the_core_is_found():
    source = '"""History"""\n# tqdm\ndef f():\n    from trainkit.ranks.ddp import x\n    '
    assert not [*mentioned(source + "return x\n")]
    for code in ("return isinstance(x, FSDPModule)", "is_ddp = x", "raise ValueError('resumable')"):
        assert len([*mentioned(source + code + "\n")]) == 1
