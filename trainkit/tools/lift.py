"""Print the code of some public names as one self-contained cell for a notebook.

The package is parsed, not imported. A cell has one namespace, so a name at the top of several files
must mean the same thing in all of them. A top-level statement binds names and uses names. The cell
has the statements that the given names reach, unchanged, in the order in which the files import
each other, and without imports of trainkit. Docstrings of public names are cut to their law, and
others are dropped.

An import of trainkit inside a function is a seam. It marks code that many users never run, such as
the code for several ranks. If the cell has the target, the import falls away. If not, the import
and the rest of its block become an ImportError that names the word to add:
``python -m trainkit lift accumulate amp ranks``. A block under ``suppress(ImportError)`` falls away
as a whole.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import importlib.resources
import re
import symtable
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ALWAYS = ("advice", "language", "state")  # words that need not be given
Edit = tuple[int, int, tuple[str, ...]]  # replaces the lines from one number up to another


class Seam(NamedTuple):
    """An import of trainkit inside a function, and the edits for a cell with and without it."""

    word: str
    file: str
    names: frozenset[str]
    lifted: Edit
    missing: Edit


class Statement:
    """A top-level statement with the comments above it."""

    def __init__(self, node: ast.stmt, title: str, lines: list[str], seams: list[Seam]) -> None:
        self.node, self.title, self.lines, self.seams = node, title, lines, seams
        self.begin = min(n.lineno for n in (node, *getattr(node, "decorator_list", ()))) - 1
        while lines[self.begin - 1].startswith("#"):
            self.begin -= 1
        self.end = node.end_lineno or 0
        symbols = symtable.symtable("\n".join(self.code()), "cell", "exec").get_symbols()
        self.binds = {s.get_name() for s in symbols if s.is_assigned()}

    def code(self, missing: Collection[Seam] = (), edits: Iterable[Edit] = ()) -> list[str]:
        """The lines of this statement after some edits, without what needs missing seams."""
        result, line = list[str](), self.begin
        of_seams = [seam.missing if seam in missing else seam.lifted for seam in self.seams]
        for begin, end, replacement in sorted([*edits, *of_seams]):
            if begin >= line:  # not in lines that are gone
                result += [*self.lines[line:begin], *replacement]
                line = end
        return result + self.lines[line : self.end]


class Package:
    """What public names need, each file after the files that it imports at its top."""

    def __init__(self, root: Any) -> None:
        self._root, self._files = root, set[str]()
        self.statements: dict[str, Statement] = {}  # by the names that they bind
        self.foreign: dict[str, tuple[str, str]] = {}  # other imports: module and member
        initial = ast.parse(self._text("__init__"))
        exported = next(node.value for node in initial.body if isinstance(node, ast.Assign))
        self.public: list[str] = ast.literal_eval(exported)
        files = {name: file for node in initial.body for file, name in _targets(node)}
        public_files = [files[name] for name in self.public]
        self._public_folders = {file.partition("/")[0] for file in public_files}
        for file in public_files:
            self._read(file)
        self._seams = {seam for statement in self.statements.values() for seam in statement.seams}
        self.words = sorted({seam.word for seam in self._seams}.difference(self.public, ALWAYS))

    def _text(self, file: str) -> str:
        return str(self._root.joinpath(*f"{file}.py".split("/")).read_text(encoding="utf-8"))

    def _read(self, file: str) -> None:
        """Add the statements of a file, between those of its imports and those of its seams."""
        if file in self._files:
            return
        tree, lines = ast.parse(text := self._text(file)), text.splitlines()
        for node in tree.body:
            for other, _ in _targets(node):
                self._read(other)
        self._files.add(file)
        title, seams = f"# {file}.py: " + lines[0].strip('"'), list[Seam]()
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in () if _targets(node) else node.names:
                    imported = getattr(node, "module", ""), ast.unparse(alias)
                    self.foreign[alias.asname or alias.name] = imported
            else:
                statement = Statement(node, title, lines, list(_seams(node, lines, self._word)))
                seams += statement.seams
                for name in statement.binds:
                    self.statements.setdefault(name, statement)
        for seam in seams:
            self._read(seam.file)

    def _word(self, file: str) -> str:
        """The folder of a file if nothing in there is public, else its name."""
        folder, _, name = file.rpartition("/")
        return name if folder in ("", *self._public_folders) else folder

    def missing(self, names: Sequence[str]) -> set[Seam]:
        """The seams whose targets are not in a cell of some names."""
        needed, given = self.reached(names, self._seams), {*names, *ALWAYS}
        return {s for s in self._seams if s.word not in given and not s.names <= needed}

    def reached(self, names: Iterable[str], missing: Collection[Seam]) -> set[str]:
        """All names that some names need."""
        found, left = set[str](), [name for name in names if name in self.public]
        for name in left:  # grows
            if name not in found:
                found.add(name)
                if statement := self.statements.get(name):
                    left += _used("\n".join(statement.code(missing))) | statement.binds
        return found


def _targets(node: Any) -> list[tuple[str, str]]:
    """The files and names that an import from trainkit imports."""
    module = getattr(node, "module", None) or ""
    names = node.names if module.startswith("trainkit.") else ()
    file = module.removeprefix("trainkit.").replace(".", "/")
    return [(file, alias.name) for alias in names]


def _seams(statement: ast.stmt, lines: list[str], word_of: Callable[[str], str]) -> Iterator[Seam]:
    """The imports of trainkit in a statement."""
    for parent in ast.walk(statement):
        for block in vars(parent).values():
            for node in block if isinstance(block, list) else ():
                if targets := _targets(node):
                    file, word = targets[0][0], word_of(targets[0][0])
                    begin, end, block_end = node.lineno - 1, node.end_lineno, block[-1].end_lineno
                    error = f'raise ImportError(_NOT_LIFTED.format("{word}"))'
                    missing: Edit = begin, block_end, (" " * node.col_offset + error,)
                    if "suppress(ImportError)" in lines[begin - 1]:
                        missing = begin - 1, block_end, ()
                    lifted = begin, end + (not lines[end]), ()
                    yield Seam(word, file, frozenset(name for _, name in targets), lifted, missing)


@functools.cache
def _used(code: str) -> frozenset[str]:
    """The global names that a top-level statement looks up, in annotations too."""
    tables, found = [symtable.symtable(code, "cell", "exec")], set[str]()
    for table in tables:  # grows
        symbols = (s for s in table.get_symbols() if s.is_referenced())
        found.update(s.get_name() for s in symbols if s.is_global())
        tables += table.get_children()
    return frozenset(found)


@functools.cache
def this_package() -> Package:
    """trainkit itself."""
    return Package(importlib.resources.files("trainkit"))


def lift(
    names: Sequence[str], *, docs: bool = False, bare: bool = False, inline: bool = False
) -> str:
    """Return the code of some public names as one file that needs only torch.

    Equivalent to the package for these names: the same statements, each once.

    Args:
        names: public names, such as "accumulate", and words of optional code, such as "ranks".
        docs: keep docstrings whole. By default those of public names end after their law, and
            others are dropped.
        bare: drop docstrings.
        inline: make code to paste among other code, instead of a file ``trainkit.py``.

    Raises:
        ValueError: for a name that the package does not have, or if no name is public.

    Example:
        >>> from trainkit.tools.lift import lift
        >>> code = lift(["frozen"])
        >>> "class frozen" in code, "class Step" in code, "from trainkit" in code
        (True, False, False)
    """
    package, names = this_package(), list(dict.fromkeys(names))
    known = [*package.public, *package.words]
    for name in names:
        if name not in known and name not in ALWAYS:
            near = (difflib.get_close_matches(name, known, n=1) or known)[0]
            raise ValueError(f"no {name!r} to lift: `lift {near}`; there is {', '.join(known)}")
    exported = [name for name in names if name in package.public]
    if not exported:
        raise ValueError(f"no public name in {names}: `lift {' '.join(['accumulate', *names])}`")
    arguments = " ".join([*names, *["--docs"] * docs, *["--bare"] * bare])
    command = f"python -m trainkit lift {arguments}"
    missing = package.missing(names)
    reached = package.reached(names, missing)
    version = import_module("trainkit").__version__
    head = f"# trainkit {version}, MIT license: what `{command}` prints."
    cell = [head, "", "from __future__ import annotations", "", *_imports(package, reached)]
    title, end = "", 0
    for statement in dict.fromkeys(s for n, s in package.statements.items() if n in reached):
        if statement.title != title:
            cell += ["", "", statement.title]
        elif statement.begin != end:
            cell += ["", ""]
        drop = bare or statement.binds.isdisjoint(package.public)
        cell += statement.code(missing, [] if docs else _docstrings(statement, drop))
        title, end = statement.title, statement.end
    listed = ", ".join(f'"{name}"' for name in exported)
    cell += ["", "", f"__all__ = [{listed}]"]
    error = f"{{0}} was not lifted into this file: `{command} {{0}}`"
    if any("_NOT_LIFTED" in line for line in cell):
        cell += [f'_NOT_LIFTED = "{error}"']
    if not inline:
        left = " ".join(name for name in package.public if name not in exported)
        cell += _END.format(version=version, left=left, error=error).splitlines()
    return "\n".join(cell) + "\n"


_END = """__version__ = "{version}"


def __getattr__(name: str) -> object:
    if name in "{left}".split():
        raise ImportError("{error}".format(name))
    if name == "load_ipython_extension":
        raise ImportError(f"{{__file__}} hides the package: `%load_ext trainkit` in another folder")
    raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")


if __name__ == "__main__":
    raise SystemExit("this is lifted code, without commands: run `python -m trainkit` elsewhere")
"""


def _imports(package: Package, reached: set[str]) -> list[str]:
    """The imports of a cell: the standard library, then torch, each name once."""
    members: dict[str, list[str]] = {}
    for module, member in sorted(package.foreign[n] for n in package.foreign.keys() & reached):
        members.setdefault(module, []).append(member)
    lines = [f"import {member}" for member in members.pop("", [])]
    lines += [f"from {module} import {', '.join(found)}" for module, found in members.items()]
    ours = [line for line in lines if re.match(r"\w+ torch\b", line)]
    others = [line for line in lines if line not in ours]
    return [*others, *[""] * bool(others), *ours]


def _docstrings(statement: Statement, drop: bool) -> Iterator[Edit]:
    """Drop the docstrings in a statement, or cut them to their law."""
    lines = statement.lines
    for node in ast.walk(statement.node):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            first = node.body[0]
            begin, end = first.lineno - 1, first.end_lineno or 0
            if not drop:
                yield begin, end, _law(lines[begin:end])
            elif len(node.body) == 1:
                yield begin - 1, end, (f"{lines[begin - 1]} ...",)
            else:
                yield begin, end + (not lines[end]), ()


def _law(lines: list[str]) -> tuple[str, ...]:
    """A docstring down to the end of its first block of code, or else its first paragraph."""
    text = "\n".join(lines).rstrip().removesuffix('"""').rstrip()
    indent = " " * (len(text) - len(text.lstrip()))
    paragraphs = re.split(rf"\n\n(?={indent}\S)", text)  # each with the code under it
    count = next((i for i, text in enumerate(paragraphs, 1) if "::\n" in text), 1)
    law = "\n\n".join(paragraphs[:count])
    return (*law.splitlines(), f'{indent}"""') if "\n" in law else (f'{law}"""',)


def add_lift(commands: Any) -> None:
    """Add ``lift`` to the commands of ``python -m trainkit``."""
    parser = commands.add_parser("lift", help="print the code of some names as one notebook cell")
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to print, or words: ranks")
    parser.add_argument("--all", action="store_true", help="everything, optional code too")
    docstrings = parser.add_mutually_exclusive_group()
    docstrings.add_argument("--docs", action="store_true", help="keep docstrings whole")
    docstrings.add_argument("--bare", action="store_true", help="drop docstrings")
    parser.add_argument("--inline", action="store_true", help="print code to paste as it is")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write a file instead")
    parser.set_defaults(run=functools.partial(_run, parser))


def _run(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    if bool(given.names) == given.all:
        parser.error("give either names, `lift accumulate amp`, or `lift --all`")
    names = given.names or [*this_package().public, *this_package().words]
    try:
        code = lift(names, docs=given.docs, bare=given.bare, inline=given.inline)
        if given.output is None:
            print(code if given.inline else f"%%writefile trainkit.py\n{code}", end="")
        else:
            given.output.write_text(code, encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0
