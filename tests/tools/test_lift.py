"""lift: the code of some names, alone, does what the package does."""

import ast
import builtins
import itertools
import json
import os
import re
import subprocess
import symtable
import sys
import textwrap
import types
import warnings
import zipfile
from pathlib import Path

import pytest

import trainkit
from trainkit.tools.commands import main
from trainkit.tools.lift import ALWAYS, Package, lift, this_package

TESTS = Path(__file__).parents[1]
PACKAGE = Path(trainkit.__file__).parent


def python(*arguments, cwd, path=PACKAGE.parent, **environment):
    """Run Python in a folder, with one folder on its path."""
    environment = {**os.environ, "PYTHONPATH": str(path), **environment}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment
    )


def command(*arguments, cwd=TESTS):
    return python("-m", "trainkit", *arguments, cwd=cwd)


def run(code, name="cell"):
    """The module that a cell defines."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    try:
        exec(compile(code, name, "exec"), vars(module))
    finally:
        del sys.modules[name]
    return module


def unbound(code):
    """The global names that code looks up and nothing binds."""
    top = symtable.symtable(code, "cell", "exec")
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    bound |= {s.get_name() for s in top.get_symbols() if s.is_namespace()} | set(dir(builtins))
    tables, used = [top], set()
    for table in tables:
        for s in table.get_symbols():
            if s.is_referenced() and (table is top or s.is_global()):
                used.add(s.get_name())
        tables += table.get_children()
    return used - bound - {"__name__", "__file__"}


# A small package with a seam of each kind.

FILES = {
    "__init__": """
        from trainkit.core.loop import loop, twice
        from trainkit.saving.disk import save
        from trainkit.tools.magic import load as load

        __all__ = ["loop", "save", "twice"]
        """,
    "core/loop": '''
        """The loop."""

        from __future__ import annotations

        import json
        import math as mathematics
        from contextlib import suppress
        from typing import TYPE_CHECKING, Any, TypeVar

        from trainkit.core.warning import warn

        if TYPE_CHECKING:
            from decimal import Decimal

            from trainkit.saving.disk import save

        T = TypeVar("T")
        # Why it is two.
        TWO = 2


        def twice(x: T) -> T:
            """Equivalent to ``x + x``.

            A second paragraph.

            Args:
                x: a number.
            """
            return x * TWO


        class loop:
            """Go over a loader.

            Equivalent to::

                for x in loader:

                    yield x

            A paragraph after the law.

            Example:
                >>> from trainkit import loop
                >>> loop().go(3)
                6
            """

            def go(self, x: Any, ranks: bool = False, bar: bool = False, hint: Decimal = None):
                """Go."""
                if ranks:
                    from trainkit.ranks.join import join, leave

                    x = json.loads(str(join(x)))
                    if bar:
                        from trainkit.core.bar import show

                        show(x)
                    return leave(x)
                elif bar:
                    from trainkit.core.bar import (
                        show,
                    )

                    return show(x)
                if x is None:
                    from trainkit.core.advice import explain

                    raise ValueError(explain(x))
                return twice(x)

            def state(self):
                from trainkit.saving.state import state_of

                return state_of(self)

            def store(self):
                """Store it."""
                from trainkit.saving.disk import save

                return save(mathematics.pi)

            def complain(self):
                warn("complaint")

            def evident(self):
                found = "nothing"
                with suppress(ImportError):
                    from trainkit.core.evidence import look

                    found = look()
                return found
        ''',
    "core/bar": '"""The bar."""\n\ndef show(x):\n    return f"[{x}]"\n',
    "core/evidence": '"""Evidence."""\n\ndef look():\n    return "something"\n',
    "core/advice": '"""Advice."""\n\ndef explain(x):\n    return f"{x!r} is not a number"\n',
    "ranks/join": '''
        """Ranks."""

        from typing import TypeVar

        from trainkit.core.loop import twice

        T = TypeVar("T")


        def join(x: T) -> T:
            """Join."""
            return twice(x) + 1


        def leave(x):
            return [x]
        ''',
    "saving/state": '"""State."""\n\ndef state_of(x):\n    return {"state": type(x).__name__}\n',
    "saving/disk": '"""Saving."""\n\ndef save(x):\n    return round(x)\n',
    "tools/magic": '"""Magic."""\n\ndef load():\n    from trainkit.tools.gone import gone\n',
}


@pytest.fixture
def small(small_package, monkeypatch):
    monkeypatch.setattr("trainkit.tools.lift.this_package", lambda: small_package)
    return small_package


@pytest.fixture(scope="module")
def small_package(tmp_path_factory):
    root = tmp_path_factory.mktemp("small") / "trainkit"
    for file, text in FILES.items():
        path = root / f"{file}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())
    (root / "core" / "warning.py").write_text((PACKAGE / "core" / "warning.py").read_text())
    return Package(root)


def test_an_import_in_a_function_is_an_error_that_names_the_word_to_add(small):
    cell = run(code := lift(["loop"]))
    assert cell.loop().go(3) == 6
    for word, options in (("ranks", {"ranks": True}), ("bar", {"bar": True})):
        with pytest.raises(ImportError, match=f"`python -m trainkit lift loop {word}`"):
            cell.loop().go(3, **options)
    with pytest.raises(ImportError, match=r"`python -m trainkit lift loop --bare ranks`"):
        run(lift(["loop"], bare=True)).loop().go(3, ranks=True)
    assert "json" not in code and "def show" not in code  # only code behind the import needs them
    assert not unbound(code)


def test_the_word_opens_it(small):
    cell = run(lift(["loop", "ranks"]))
    assert cell.loop().go(3, ranks=True) == [7] and cell.__all__ == ["loop"]
    with pytest.raises(ImportError, match="`python -m trainkit lift loop ranks bar`"):
        cell.loop().go(3, ranks=True, bar=True)
    cell = run(lift(["loop", "bar", "ranks"]))
    assert cell.loop().go(3, bar=True) == "[3]" and cell.loop().go(3, True, True) == [7]


def test_a_public_name_opens_what_it_needs(small):
    with pytest.raises(ImportError, match="lift loop disk`"):
        run(lift(["loop"])).loop().store()
    assert run(lift(["loop", "save"])).loop().store() == 3


def test_what_a_cell_may_do_without_falls_away(small):
    code = lift(["loop"])
    assert run(code).loop().evident() == "nothing" and "suppress" not in code
    assert run(lift(["loop", "evidence"])).loop().evident() == "something"


def test_state_and_advice_are_in_every_cell_that_uses_them(small):
    cell = run(lift(["loop"]))
    assert cell.loop().state() == {"state": "loop"}
    with pytest.raises(ValueError, match="None is not a number"):
        cell.loop().go(None)
    assert "explain" not in lift(["twice"])


def test_the_words_are_folders_without_a_public_name_and_else_files(small):
    assert small.words == ["bar", "disk", "evidence", "ranks"]
    with pytest.raises(
        ValueError, match=r"no 'rank' to lift: `lift ranks`; there is loop, .*ranks"
    ):
        lift(["loop", "rank"])
    with pytest.raises(ValueError, match=r"no public name in \['ranks'\]: `lift accumulate ranks`"):
        lift(["ranks"])


def test_docstrings_end_after_their_law(small):
    def docstrings(**options):
        code = lift(["loop", "twice", "ranks"], **options)
        found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)]
        kinds = (ast.FunctionDef, ast.ClassDef)
        return {node.name: ast.get_docstring(node) for node in found if isinstance(node, kinds)}

    law, whole = docstrings(), docstrings(docs=True)
    assert law["twice"] == "Equivalent to ``x + x``."
    block = "Equivalent to::\n\n    for x in loader:\n\n        yield x"
    assert law["loop"] == f"Go over a loader.\n\n{block}"
    assert whole["loop"].startswith(law["loop"]) and ">>> loop().go(3)" in whole["loop"]
    assert whole["twice"].endswith("x: a number.") and whole["go"] == law["go"] == "Go."
    assert whole["join"] == "Join." and law["join"] is None  # it is not public
    assert set(docstrings(bare=True).values()) == {None}


@pytest.mark.parametrize("options", [{}, {"docs": True}, {"bare": True}])
def test_statements_are_printed_once_in_order_and_with_their_comments(small, options):
    code = lift(["loop", "ranks", "bar"], **options)
    assert code.count('T = TypeVar("T")') == 1 and "# Why it is two.\nTWO = 2\n" in code
    assert code.index("# core/loop.py: The loop.") < code.index("# ranks/join.py: Ranks.")
    assert "from typing import Any, TypeVar\n" in code
    assert "import math as mathematics\n" in lift(["loop", "save"])
    assert "Decimal" not in code.replace("hint: Decimal", "") and "trainkit." not in code.replace(
        "trainkit.py", ""
    )


@pytest.mark.parametrize("form", ["file", "pasted"])
def test_a_warning_points_at_the_line_of_the_user(form, small, tmp_path, monkeypatch):
    code = lift(["loop"], inline=form == "pasted")
    (tmp_path / "lifted.py").write_text(code)
    script = ("from lifted import loop" if form == "file" else code) + "\nloop().complain()"
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(script, "script.py", "exec"), {"__name__": "script"})
    sys.modules.pop("lifted", None)
    lines = [(warning.filename, warning.lineno) for warning in caught]
    assert lines == [("script.py", len(script.splitlines()))]


# The package itself.


def everything():
    return [*trainkit.__all__, *this_package().words]


def cells():
    """The cell of every public name, of every two, and of everything."""
    public = this_package().public
    for count in (1, 2):
        yield from itertools.combinations(public, count)
    yield public
    yield everything()
    yield from (["accumulate", "amp", word] for word in this_package().words)


ALONE = """
import importlib.abc, json, sys, types

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "trainkit", f"a cell imports {name}"

sys.meta_path.insert(0, Refuse())
module = sys.modules["cell"] = types.ModuleType("cell")
for names, code, use in json.load(open(sys.argv[1])):
    vars(module).clear()
    module.__name__ = "cell"
    exec(compile(code, "cell", "exec"), vars(module))
    missing = [name for name in module.__all__ if not callable(vars(module)[name])]
    assert set(module.__all__) <= set(names) and not missing, missing
    exec(compile(use, str(names), "exec"), vars(module))
"""
START = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
batches = [torch.ones(4, 2)] * 3
def loss(x): return model(x).sum()
def train(step):
    for x in step.over(batches): step(x)
    step.load_state_dict(step.state_dict())
    assert step.updates > 0
"""
USES = {
    "accumulate": """
@accumulate(2, module=model)
def step(x):
    yield loss(x)
    optimizer.step()
train(step)""",
    "amp": "train(amp(optimizer, dtype=torch.bfloat16)(loss))",
    "frozen": "with frozen(model, '0'): assert not model[0].weight.requires_grad",
    "freeze": "freeze(model, '0')",
    "microbatch": "microbatch(2)",
    "recompute": "with recompute(model, '0'): loss(batches[0]).backward()",
    "train_step": "train(train_step(optimizer, max_norm=1.0)(loss))",
    "accumulate train_step": "train(train_step(optimizer, accumulate(2))(loss))",
    "microbatch train_step": "train(train_step(optimizer, microbatch(2))(loss))",
    "History train_step": """
step = train_step(optimizer)(loss)
history = History(step)
train(step)
assert len(history["loss"]) == 3""",
    "resumable train_step": """
import tempfile
step = train_step(optimizer)(loss)
folder = tempfile.mkdtemp()
for _ in 1, 2:
    with resumable(folder, model=model, optimizer=optimizer, step=step) as run:
        for epoch in run.epochs(1):
            train(step)
assert step.updates == 3""",
}


def test_every_two_names_run_without_the_package_and_bind_all_they_use(tmp_path):
    found = {}
    for names in cells():
        code = lift(names)
        body = code[code.index("from __future__") : code.index("__all__ =")]
        uses = [START + USES[use] for use in USES if use.split() == sorted(names)]
        if (body, *uses) not in found:
            found[(body, *uses)] = names, code, "".join(uses)
            assert not unbound(code), names
    assert sum(bool(use) for _, _, use in found.values()) == len(USES)
    (tmp_path / "cells.json").write_text(json.dumps(list(found.values())))
    done = python("-c", ALONE, str(tmp_path / "cells.json"), cwd=tmp_path, path="")
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_cell_imports_what_it_uses_and_nothing_else(tmp_path):
    for name in this_package().public:
        (tmp_path / f"{name}.py").write_text(lift([name]))
    done = python("-m", "ruff", "check", "--isolated", "--select", "F,E9", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("options", [{"docs": True}, {"bare": True}, {"inline": True}])
def test_every_option_makes_code_that_runs(options):
    code = lift(this_package().public, **options)
    module = run(code)
    assert sorted(module.__all__) == sorted(trainkit.__all__)
    assert ("__getattr__" in vars(module)) == ("inline" not in options)


def test_only_what_is_needed():
    frozen, step = lift(["frozen"]), lift(["accumulate", "amp"])
    assert "class frozen" in frozen
    assert "class Step" not in frozen and "def freeze(" not in frozen
    assert step.count("class Step(") == 1 and "class Window" in step
    assert not re.search("class (frozen|recompute|resumable|History)", step)


def trees():
    """The files that may be lifted, parsed, by their path in the package."""
    for path in PACKAGE.glob("*/*.py"):
        if path.parent.name != "tools":
            yield path.relative_to(PACKAGE), ast.parse(path.read_text())
    for path in PACKAGE.glob("[!_]*.py"):
        yield path.relative_to(PACKAGE), ast.parse(path.read_text())


def test_a_name_at_the_top_of_two_files_is_the_same_thing_in_both():
    """Else one cell could not hold both."""
    found = {}
    for file, tree in trees():
        for node in tree.body:
            is_import = isinstance(node, (ast.Import, ast.ImportFrom))
            if is_import and "trainkit" in ast.unparse(node):
                continue
            text, names = ast.unparse(node), node.names if is_import else ()
            top = symtable.symtable(text, "statement", "exec").get_symbols()
            bound = {s.get_name(): text for s in top if s.is_assigned()}
            assert not (isinstance(node, ast.Import) and "." in text), f"{file}: {text}"
            module = getattr(node, "module", "")
            bound |= {a.asname or a.name: f"{module} {ast.unparse(a)}" for a in names}
            for name, text in bound.items():
                first, known = found.setdefault(name, (file, text))
                assert file == first or text == known, f"{name} in {first} and {file}"


def test_files_import_names_from_the_files_that_bind_them():
    """`from trainkit.folder.file import name`, at the top or in a function, and never renamed."""
    for file, tree in trees():
        inside = {id(node) for function in tree.body for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("trainkit") for alias in node.names), file
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("trainkit"):
                continue
            target = PACKAGE / f"{node.module.partition('.')[2].replace('.', '/')}.py"
            assert target.is_file() and id(node) in inside, f"{file}: {ast.unparse(node)}"
            top = symtable.symtable(target.read_text(), "file", "exec")
            for alias in node.names:
                assert alias.asname is None, f"{file}: {ast.unparse(node)}"
                symbol = top.lookup(alias.name)
                assert symbol.is_assigned() or symbol.is_namespace(), f"{file}: {alias.name}"
        for parent in ast.walk(tree):
            for block in vars(parent).values() if parent is not tree else ():
                last = block[-1] if isinstance(block, list) and block else None
                alone = isinstance(last, ast.ImportFrom) and "from trainkit." in ast.unparse(last)
                assert not alone, f"{file}: an import at the end of its block"


SLOW = {"test_compile.py", "test_fuzz.py", "test_interruption.py"}


def public_tests():
    """The tests of core and layers that import public names alone; the slow ones in deep runs."""
    skipped = set() if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else SLOW
    for path in sorted([*TESTS.glob("core/test_*.py"), *TESTS.glob("layers/test_*.py")]):
        if path.name in skipped:
            continue
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names if alias.name.startswith("trainkit")}
            elif isinstance(node, ast.ImportFrom) and node.module.startswith("trainkit"):
                is_public = node.module == "trainkit"
                names |= {alias.name if is_public else node.module for alias in node.names}
        if names and names <= set(trainkit.__all__):
            yield path


def test_the_tests_of_the_package_pass_against_the_cell(tmp_path):
    """In a process that has the cell and no package."""
    paths = list(public_tests())
    assert {"test_laws.py", "test_recipes.py"} & {path.name for path in paths}
    (tmp_path / "trainkit.py").write_text(lift(everything()))
    (tmp_path / "alone.py").write_text(
        f"import trainkit\nassert trainkit.__file__ == {str(tmp_path / 'trainkit.py')!r}\n"
    )
    options = ["-p", "alone", "-p", "no:cacheprovider", "--numprocesses=0", *map(str, paths)]
    done = python("-m", "pytest", *options, cwd=tmp_path, path=tmp_path, HYPOTHESIS_PROFILE="brief")
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_examples_of_the_docstrings_run_in_the_cell(tmp_path):
    (tmp_path / "trainkit.py").write_text(lift(everything(), docs=True))
    done = python("-m", "doctest", "trainkit.py", cwd=tmp_path, path=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_lifted_file_says_what_it_lacks_and_that_it_has_no_commands(tmp_path):
    (tmp_path / "trainkit.py").write_text(lift(["accumulate", "amp"], bare=True))
    lacking = "import trainkit; assert not hasattr(trainkit, 'x'); from trainkit import History"
    said = python("-c", lacking, cwd=tmp_path, path="").stderr.splitlines()[-1]
    assert said == (
        "ImportError: History was not lifted into this file: "
        "`python -m trainkit lift accumulate amp --bare History`"
    )
    commands = python("-m", "trainkit", "lift", "amp", cwd=tmp_path, path="")
    assert commands.returncode == 1 and "lifted code, without commands" in commands.stderr
    # How IPython asks for an extension.
    asked = "import trainkit; hasattr(trainkit, 'load_ipython_extension')"
    said = python("-c", asked, cwd=tmp_path, path="").stderr.splitlines()[-1]
    assert said.startswith(f"ImportError: {tmp_path / 'trainkit.py'} hides the package")
    assert "`%load_ext trainkit`" in said


# The command.


def test_the_command():
    printed = command("lift", "frozen", "freeze")
    first, second = printed.stdout.splitlines()[:2]
    assert printed.returncode == 0 and first == "%%writefile trainkit.py"
    header = r"# trainkit \S+, MIT license: what `python -m trainkit lift frozen freeze` prints\."
    assert re.fullmatch(header, second)
    assert printed.stdout == f"{first}\n{lift(['frozen', 'freeze'])}"


def test_the_options_of_the_command(tmp_path, capsys):
    assert main(["lift", "--inline", "--bare", "StepResult", ALWAYS[0]]) == 0
    assert capsys.readouterr().out == lift(["StepResult", ALWAYS[0]], bare=True, inline=True)
    assert main(["lift", "--all", "--docs", "-o", str(tmp_path / "toolkit.py")]) == 0
    assert (tmp_path / "toolkit.py").read_text() == lift(everything(), docs=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["acumulate"], "no 'acumulate' to lift: `lift accumulate`; there is "),
        ([], "give either names, `lift accumulate amp`, or `lift --all`"),
        (["--all", "amp"], "give either names"),
        (["--docs", "--bare", "amp"], "not allowed with"),
        (["amp", "-o", "nowhere/trainkit.py"], "No such file or directory: 'nowhere/trainkit.py'"),
        (["amp", "-o", "."], "error: [Errno "),
    ],
)
def test_what_cannot_be_lifted(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["lift", *arguments])
    printed = capsys.readouterr()
    assert said in printed.err.splitlines()[-1] and not printed.out


def test_it_needs_no_folder_of_the_package_and_no_encoding(tmp_path):
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as package:
        for path in PACKAGE.rglob("*.py"):
            package.write(path, f"trainkit/{path.relative_to(PACKAGE).as_posix()}")
    run = ["-m", "trainkit", "lift", "--all", "--inline"]
    printed = python(*run, cwd=tmp_path, path=package.filename, PYTHONIOENCODING="ascii")
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == lift(everything(), inline=True)
