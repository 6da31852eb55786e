"""Print the code of some public names as one self-contained cell for a notebook.

The package is parsed, not imported. A top-level statement binds names and uses names. Statements
that the names asked for reach are printed unchanged, in the order in which the files import each
other, and imports of trainkit fall away. Docstrings of public names are cut to
their law, and others are dropped.

An import of trainkit inside a function is a seam. It marks code that many users never run, such as
the code for several ranks. If the cell has the target, the import falls away. If not, the import
and the rest of its block become an ImportError that names the word to add:
``python -m trainkit lift accumulate amp ranks``.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import importlib.resources
import re
import symtable
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ALWAYS = ("advice", "language", "state")  # words that go without saying
Name = tuple[str, str]  # a file, such as "core/step", and a name in it
Edit = tuple[int, int, list[str]]  # replaces the lines from one number up to another
Missing = dict["Seam", str]  # seams whose targets are not in the cell, and their words


class Seam(NamedTuple):
    """An import of trainkit inside a function: its lines, and the end of its block."""

    file: str
    targets: frozenset[Name]
    begin: int
    end: int
    block_end: int

    def edit(self, lines: list[str], missing: str | None, error: str) -> Edit:
        """Remove the import, or replace it and the rest of its block by an error."""
        if missing is None:
            return self.begin, self.end + (not lines[self.end]), []
        indent = " " * (len(lines[self.begin]) - len(lines[self.begin].lstrip()))
        message = f'{indent}    "{error.format(name=missing)}"'
        return self.begin, self.block_end, [f"{indent}raise ImportError(", message, f"{indent})"]


class Statement:
    """A top-level statement with the comments above it."""

    def __init__(self, node: ast.stmt, lines: list[str]) -> None:
        self.node, self.lines, self.seams = node, lines, list(_seams(node))
        self.begin = min(n.lineno for n in (node, *getattr(node, "decorator_list", ()))) - 1
        while lines[self.begin - 1].startswith("#"):
            self.begin -= 1
        self.end = node.end_lineno or 0
        self.text = "\n".join(lines[self.begin : self.end])
        symbols = symtable.symtable(self.text, "cell", "exec").get_symbols()
        self.binds = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}

    def code(self, missing: Missing, error: str = "", edits: Iterable[Edit] = ()) -> list[str]:
        """The lines of this statement after some edits, with an error for what is missing."""
        result, line = list[str](), self.begin
        of_seams = [seam.edit(self.lines, missing.get(seam), error) for seam in self.seams]
        for begin, end, replacement in sorted([*edits, *of_seams]):
            if begin >= line:  # not in lines that are gone
                result += self.lines[line:begin] + replacement
                line = end
        return result + self.lines[line : self.end]


class Source:
    """A file of the package."""

    def __init__(self, file: str, text: str) -> None:
        tree, lines = ast.parse(text), text.splitlines()
        self.file, self.doc = file, ast.get_docstring(tree) or ""
        self.statements: list[Statement] = []
        self.own: dict[str, str] = {}  # names imported from trainkit, and their files
        self.foreign: dict[str, set[tuple[str, str]]] = {}  # other imports: module and member
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                own = {name: file for file, name in _targets(node)}
                self.own |= own
                for alias in () if own else node.names:
                    name = (alias.asname or alias.name).partition(".")[0]
                    imported = getattr(node, "module", ""), ast.unparse(alias)
                    self.foreign.setdefault(name, set()).add(imported)
            elif not ast.unparse(node).startswith("if TYPE_CHECKING:"):  # for annotations alone
                self.statements.append(Statement(node, lines))
        self.imports = list(self.own.values())
        self.seams = [seam for statement in self.statements for seam in statement.seams]
        self.own |= {name: file for seam in self.seams for file, name in seam.targets}


def _targets(node: Any) -> list[Name]:
    """What an import from trainkit imports."""
    module = getattr(node, "module", None) or ""
    names = node.names if module.startswith("trainkit.") else ()
    file = module.removeprefix("trainkit.").replace(".", "/")
    return [(file, alias.name) for alias in names]


def _blocks(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    for parent in ast.walk(statement):
        for _, field in ast.iter_fields(parent):
            if isinstance(field, list) and field and isinstance(field[0], ast.stmt):
                yield field


def _seams(statement: ast.stmt) -> Iterator[Seam]:
    for block in _blocks(statement):
        for node in block:
            if targets := _targets(node):
                end, block_end = node.end_lineno or 0, block[-1].end_lineno or 0
                yield Seam(targets[0][0], frozenset(targets), node.lineno - 1, end, block_end)


@functools.cache
def _used(code: str) -> frozenset[str]:
    """The global names that a top-level statement looks up, in annotations too."""
    tables, found = [symtable.symtable(code, "cell", "exec")], set[str]()
    for table in tables:  # grows
        symbols = (s for s in table.get_symbols() if s.is_referenced())
        found.update(s.get_name() for s in symbols if s.is_global())
        tables += table.get_children()
    return frozenset(found)


class Package:
    """The files that public names need, each after the files that it imports at its top."""

    def __init__(self, root: Any) -> None:
        self._root, self.sources = root, dict[str, Source]()
        initial = self._parse("__init__")
        exported = next(s.node for s in initial.statements if "__all__" in s.binds)
        self.public: list[str] = ast.literal_eval(exported.value)  # type: ignore[attr-defined]
        self._origin = {name: initial.own[name] for name in self.public}
        for file in self._origin.values():
            self._read(file)
        seams = [seam for source in self.sources.values() for seam in source.seams]
        self._words = {seam: self._word(seam) for seam in seams}
        self.words = sorted({*self._words.values()}.difference(self.public, ALWAYS))

    def _parse(self, file: str) -> Source:
        path = self._root.joinpath(*f"{file}.py".split("/"))
        return Source(file, path.read_text(encoding="utf-8"))

    def _read(self, file: str) -> None:
        if file not in self.sources:
            source = self._parse(file)
            for other in source.imports:
                self._read(other)
            self.sources.setdefault(file, source)
            for seam in source.seams:
                self._read(seam.file)

    def _word(self, seam: Seam) -> str:
        """The folder of the target of a seam if nothing in there is public, else the file."""
        folder, _, file = seam.file.rpartition("/")
        is_public = any(origin.startswith(f"{folder}/") for origin in self._origin.values())
        return file if is_public or not folder else folder

    def missing(self, names: Sequence[str]) -> Missing:
        """The seams whose targets are not in a cell of some names, and the words to add."""
        needed, given = self.reached(names, self._words), {*names, *ALWAYS}
        words = self._words.items()
        return {s: word for s, word in words if word not in given and not s.targets <= needed}

    def reached(self, names: Iterable[str], missing: Missing) -> set[Name]:
        """All that some names need."""
        found = set[Name]()
        left = [(self._origin[name], name) for name in names if name in self.public]
        for file, name in left:  # grows
            if (file, name) not in found:
                found.add((file, name))
                source = self.sources[file]
                left.append((source.own.get(name, file), name))
                for statement in source.statements:
                    if name in statement.binds:
                        used = _used("\n".join(statement.code(missing)))
                        left += [(file, name) for name in used | statement.binds]
        return found


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
    error = f"{{name}} was not lifted into this file: `{command} {{name}}`"
    missing = package.missing(names)
    reached = package.reached(names, missing)
    version = import_module("trainkit").__version__
    head = f"# trainkit {version}, MIT license: what `{command}` prints."
    cell = [head, "", "from __future__ import annotations", "", *_imports(package, reached)]
    for above, statement in _statements(package, reached):
        drop = bare or statement.binds.isdisjoint(package.public)
        edits = [] if docs else _docstrings(statement, drop)
        cell += above + statement.code(missing, error, edits)
    listed = ", ".join(f'"{name}"' for name in exported)
    cell += ["", "", f"__all__ = [{listed}]"]
    if not inline:
        left = " ".join(name for name in package.public if name not in exported)
        cell += _END.format(version=version, left=left, error=error).splitlines()
    return "\n".join(cell) + "\n"


_END = """__version__ = "{version}"


def __getattr__(name: str) -> object:
    if name in "{left}".split():
        raise ImportError(f"{error}")
    if name == "load_ipython_extension":
        raise ImportError(f"{{__file__}} hides the package: `%load_ext trainkit` in another folder")
    raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")


if __name__ == "__main__":
    raise SystemExit("this is lifted code, without commands: run `python -m trainkit` elsewhere")
"""


def _imports(package: Package, reached: set[Name]) -> list[str]:
    """The imports of a cell: the standard library, then torch, each name once."""
    foreign = [package.sources[file].foreign.get(name, set()) for file, name in reached]
    members: dict[str, list[str]] = {}
    for module, member in sorted(set().union(*foreign)):
        members.setdefault(module, []).append(member)
    lines = [f"import {member}" for member in members.pop("", [])]
    lines += [f"from {module} import {', '.join(found)}" for module, found in members.items()]
    ours = [line for line in lines if re.match(r"\w+ torch\b", line)]
    others = [line for line in lines if line not in ours]
    return [*others, *[""] * bool(others), *ours]


def _statements(package: Package, reached: set[Name]) -> Iterator[tuple[list[str], Statement]]:
    """The statements of a cell, each once and with the lines above it."""
    printed = set[str]()
    for source in package.sources.values():
        title = f"# {source.file}.py: {source.doc.partition(chr(10))[0]}"
        above, end = ["", "", title], -1
        for statement in source.statements:
            needed = any((source.file, name) in reached for name in statement.binds)
            if needed and statement.text not in printed:  # two files may have the same TypeVar
                printed.add(statement.text)
                yield [] if statement.begin == end else above, statement
                above, end = ["", ""], statement.end


def _docstrings(statement: Statement, drop: bool) -> Iterator[Edit]:
    """Drop the docstrings in a statement, or cut them to their law."""
    lines = statement.lines
    for block in _blocks(statement.node):
        first = block[0]
        if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
            begin, end = first.lineno - 1, first.end_lineno or first.lineno
            if not drop:
                yield begin, end, _law(lines[begin:end])
            elif len(block) == 1:
                yield begin, end, [" " * first.col_offset + "..."]
            else:
                yield begin, end + (not lines[end]), []


_SECTION = re.compile(r"\n *(?:Args|Attributes|Examples?|Raises|Returns|Source|Warns|Yields):")


def _law(lines: list[str]) -> list[str]:
    """A docstring down to the end of its first block of code, or else its first paragraph."""
    text = "\n".join(lines)
    indent = " " * (len(text) - len(text.lstrip()))
    head = _SECTION.split(text)[0]
    block = re.search(rf"::\n(\n|{indent} .*\n?)+", head)
    law = head[: block.end()] if block else head.partition("\n\n")[0]
    law = law.rstrip().removesuffix('"""').rstrip()
    return [*law.splitlines(), f'{indent}"""'] if "\n" in law else [f'{law}"""']


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
