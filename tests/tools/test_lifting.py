"""lift: the code of some names, alone, is what the package is."""

import ast
import functools
import itertools
import os
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

import trainkit
from trainkit.tools.lift import lift, public_names

HERE = Path(__file__).parent
PACKAGE = Path(trainkit.__file__).parent
PRIMITIVES = ["accumulate", "amp", "frozen", "train_step", "microbatch", "recompute", "resumable"]


def command(*arguments, cwd=HERE.parent):
    run = [sys.executable, "-m", "trainkit", *arguments]
    return subprocess.run(
        run,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )


def imported(code):
    """The packages that code imports, at its top or anywhere."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_every_combination_runs_by_itself(monkeypatch):
    every = range(1, len(PRIMITIVES) + 1)
    seen = set()
    for count in (
        every if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else (1, 2, len(PRIMITIVES))
    ):
        for names in itertools.combinations(PRIMITIVES, count):
            code = lift(names, bare=True)
            body = code[code.index("from __future__") : code.index("__all__ =")]
            if body in seen:
                continue
            seen.add(body)
            assert set(imported(code)) <= {"torch", *sys.stdlib_module_names}
            module = types.ModuleType("lifted")
            monkeypatch.setitem(sys.modules, "lifted", module)
            exec(compile(code, "lifted", "exec"), vars(module))
            assert module.__all__ == list(names) and all(hasattr(module, name) for name in names)
    assert len(seen) > 15


@pytest.mark.parametrize("name", public_names())
def test_what_is_lifted_uses_nothing_that_is_not_there_and_imports_nothing_that_it_does_not_use(
    name, tmp_path
):
    (tmp_path / "trainkit.py").write_text(lift([name]))
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", str(tmp_path)]
    found = subprocess.run(ruff, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_in_a_cell_as_in_the_package_it_is_said_that_a_part_is_made_by_a_call(monkeypatch):
    cell = types.ModuleType("cell")
    monkeypatch.setitem(sys.modules, "cell", cell)
    exec(compile(lift(PRIMITIVES, bare=True, inline=True), "cell", "exec"), vars(cell))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))])
    for made_by, name in itertools.product(
        (trainkit, cell), [name for name in PRIMITIVES if name != "resumable"]
    ):
        with pytest.raises(TypeError, match=rf"is not a part; it makes one: `{name}\(\.\.\.\)`"):
            made_by.train_step(optimizer, getattr(made_by, name))
    for no_part in (lambda: None, trainkit.freeze):
        with pytest.raises(TypeError, match="what is called after each update goes by name"):
            trainkit.train_step(optimizer, no_part)


def test_only_what_is_needed():
    frozen = lift(["frozen"])
    assert (
        "class Selection" in frozen and "class Step" not in frozen and "def freeze(" not in frozen
    )
    step = lift(["accumulate", "amp"])
    assert "class Window" in step and not re.search(
        "class (frozen|ChunkedStep|recompute|resumable)", step
    )
    assert lift(["amp", "accumulate"]).split("\n", 1)[1].count("class Step(") == 1


@pytest.mark.parametrize(
    "files",
    [["freezing"], ["laws", "layers", "recipes", "compose", "parts", "result", "functional"]],
)
def test_the_tests_pass_against_the_cell(files, tmp_path):
    """In a process that has the cell and no package, and of the cell only what these tests import."""
    paths = [HERE / f"test_{file}.py" for file in files]
    nodes = [
        node
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
    ]
    names = {alias.name for node in nodes if node.module == "trainkit" for alias in node.names}
    assert names
    (tmp_path / "trainkit.py").write_text(lift(sorted(names), bare=True))
    (tmp_path / "alone.py").write_text(
        "import pathlib, trainkit\n"
        f"assert pathlib.Path(trainkit.__file__).parent == pathlib.Path({str(tmp_path)!r})\n"
        "assert not hasattr(trainkit, '__path__')\n"
    )
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "alone",
        "-p",
        "no:cacheprovider",
        "-x",
        *map(str, paths),
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HYPOTHESIS_PROFILE": "brief"}
    found = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert found.returncode == 0, found.stdout[-3000:]


def test_the_examples_of_the_docstrings_run_in_the_cell(tmp_path):
    (tmp_path / "trainkit.py").write_text(lift(public_names()))
    run = [sys.executable, "-m", "doctest", "trainkit.py"]
    found = subprocess.run(
        run,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert found.returncode == 0, found.stdout[-3000:]


def test_comments_and_docstrings_are_kept_and_bare_drops_docstrings_alone():
    whole, bare = lift(["train_step"]), lift(["train_step"], bare=True)
    assert "equivalent to this loop" in whole and "equivalent to this loop" not in bare
    assert all("# Known from the first call on" in code for code in (whole, bare))
    for node in ast.walk(ast.parse(bare)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node) is None
    statements = [
        ast.dump(node)
        for node in ast.parse(whole).body
        if not isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert len(set(statements)) == len(statements)


def test_a_name_at_the_top_of_two_files_is_the_same_thing_in_both():
    """And files import each other by the names that things have, at the top. Else a cell could not hold them all."""
    found = {}
    for path in sorted(PACKAGE.glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            for name in [
                getattr(node, "name", None),
                *(getattr(target, "id", None) for target in targets),
            ]:
                if name is not None and path.stem not in ("__init__", "__main__"):
                    earlier = found.setdefault(name, (path.stem, ast.dump(node)))
                    assert path.stem == earlier[0] or ast.dump(node) == earlier[1], (
                        f"{name} in {path.stem} and {earlier[0]}"
                    )
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("trainkit"):
                assert (node in tree.body and path.stem in ("__init__", "__main__")) or all(
                    a.asname is None for a in node.names
                )
                assert node in tree.body


def test_a_lifted_file_says_what_it_lacks_and_that_it_has_no_commands(tmp_path):
    (tmp_path / "trainkit.py").write_text(lift(["accumulate", "amp"], bare=True))
    lacking = [
        sys.executable,
        "-c",
        "import trainkit; assert not hasattr(trainkit, 'nothing'); from trainkit import History",
    ]
    run = functools.partial(
        subprocess.run,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    said = run(lacking).stderr.splitlines()[-1]
    assert said.startswith(
        "ImportError: History was not lifted into this file: `python -m trainkit lift accumulate amp --bare History`"
    )
    commands = run([sys.executable, "-m", "trainkit", "lift", "amp"])
    assert commands.returncode == 1 and "lifted code, without commands" in commands.stderr


def test_the_command():
    printed = command("lift", "frozen", "freeze")
    first, second = printed.stdout.splitlines()[:2]
    assert printed.returncode == 0 and first == "%%writefile trainkit.py"
    assert re.fullmatch(
        r"# trainkit \S+, MIT license: what `python -m trainkit lift frozen freeze` prints\.",
        second,
    )
    assert printed.stdout == f"{first}\n{lift(['frozen', 'freeze'])}"


def test_the_options_of_the_command(tmp_path):
    assert command("lift", "--inline", "--bare", "StepResult").stdout == lift(
        ["StepResult"], bare=True, inline=True
    )
    written = command("lift", "--all", "-o", "toolkit.py", cwd=tmp_path)
    assert written.returncode == 0 and written.stdout == ""
    assert (tmp_path / "toolkit.py").read_text() == lift(trainkit.__all__)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["acumulate"], "trainkit has no 'acumulate' to lift: `lift accumulate`; it has "),
        ([], "give either names, `lift accumulate amp`, or `lift --all`"),
        (["--all", "amp"], "give either names"),
    ],
)
def test_what_cannot_be_lifted(arguments, said):
    refused = command("lift", *arguments)
    assert refused.returncode == 2 and said in refused.stderr and not refused.stdout


@pytest.mark.parametrize("output", ["nowhere/trainkit.py", "."])
def test_a_file_that_cannot_be_written_is_said_in_one_line(output, tmp_path):
    refused = command("lift", "amp", "-o", output, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith(
        "python -m trainkit lift: error: -o "
    )
    assert f"-o {output}: " in refused.stderr and refused.stderr.endswith(": `-o trainkit.py`\n")


def test_it_needs_no_folder_of_the_package_and_no_encoding(tmp_path):
    package = zipfile.ZipFile(tmp_path / "package.zip", "w")
    with package:
        for path in PACKAGE.glob("*.py"):
            package.write(path, f"trainkit/{path.name}")
    environment = {**os.environ, "PYTHONPATH": package.filename, "PYTHONIOENCODING": "ascii"}
    run = [sys.executable, "-m", "trainkit", "lift", "--all", "--inline"]
    printed = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert printed.returncode == 0 and printed.stdout == lift(public_names(), inline=True), (
        printed.stderr
    )
