"""Print the code of some public names as one self-contained cell for a notebook.

The package is parsed, not imported. A top-level statement binds names and uses names. Statements
that the names asked for reach are printed unchanged, in the order in which the files import each
other, and imports of trainkit fall away.

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
import importlib.metadata
import importlib.resources
import re
import symtable
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from importlib.abc import Traversable

ALWAYS = ("advice", "state")  # words in every cell: long error messages, and `state_dict`
Name = tuple[str, str]  # a file, such as "core/step", and a name in it
Edit = tuple[int, int, list[str]]  # replaces the lines from one number up to another


class Seam(NamedTuple):
    """An import of trainkit inside a function: its lines, and the end of its block."""

    targets: frozenset[Name]
    begin: int
    end: int
    block_end: int

    def edit(self, lines: list[str], error: str | None) -> Edit:
        """Remove the import, or replace it and the rest of its block by an error."""
        if error is None:
            return self.begin, self.end + (not lines[self.end]), []
        indent = " " * (len(lines[self.begin]) - len(lines[self.begin].lstrip()))
        message = [f"{indent}raise ImportError(", f'{indent}    "{error}"', f"{indent})"]
        return self.begin, self.block_end, message


class Statement(NamedTuple):
    """A top-level statement with the comments above it."""

    node: ast.stmt
    lines: list[str]  # of the whole file
    begin: int
    end: int
    binds: frozenset[str]
    seams: list[Seam]

    def code(self, error: Callable[[Seam], str | None], edits: Iterable[Edit] = ()) -> list[str]:
        """The lines of this statement after some edits. A seam with an error is closed."""
        result, line = list[str](), self.begin
        of_seams = [seam.edit(self.lines, error(seam)) for seam in self.seams]
        for begin, end, replacement in sorted([*edits, *of_seams]):
            if begin >= line:  # not in lines that are gone
                result += self.lines[line:begin] + replacement
                line = end
        return result + self.lines[line : self.end]


class Source:
    """A file of the package."""

    def __init__(self, file: str, text: str) -> None:
        tree, lines, above = ast.parse(text), text.splitlines(), 0
        self.file, self.doc = file, ast.get_docstring(tree) or ""
        self.own: dict[str, str] = {}  # top-level imports from trainkit: the file of each name
        self.foreign: dict[str, set[tuple[str, str]]] = {}  # other imports: module and member
        self.statements: list[Statement] = []
        self.optional: dict[str, str] = {}  # imports in functions: the file of each name
        for node in tree.body:
            if targets := _targets(node):
                self.own |= {name: file for file, name in targets}
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    name = (alias.asname or alias.name).partition(".")[0]
                    imported = getattr(node, "module", ""), ast.unparse(alias)
                    self.foreign.setdefault(name, set()).add(imported)
            elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                pass  # the annotations of a cell are never evaluated
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                self.statements.append(_statement(node, lines, above))
            above = node.end_lineno or 0

        for seam in self.seams():
            self.optional |= {name: file for file, name in seam.targets}

    def seams(self) -> Iterator[Seam]:
        """All seams of this file."""
        for statement in self.statements:
            yield from statement.seams


def _targets(node: ast.AST) -> list[Name]:
    """What an import from trainkit imports."""
    if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("trainkit."):
        return []
    file = (node.module or "").removeprefix("trainkit.").replace(".", "/")
    return [(file, alias.name) for alias in node.names]


def _statement(node: ast.stmt, lines: list[str], above: int) -> Statement:
    begin = min(n.lineno for n in (node, *getattr(node, "decorator_list", ()))) - 1
    while begin > above and lines[begin - 1].startswith("#"):
        begin -= 1
    end = node.end_lineno or begin
    symbols = symtable.symtable("\n".join(lines[begin:end]), "cell", "exec").get_symbols()
    bound = (s for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace())
    binds = frozenset(symbol.get_name() for symbol in bound)
    return Statement(node, lines, begin, end, binds, list(_seams(node)))


def _blocks(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    for parent in ast.walk(statement):
        for _, field in ast.iter_fields(parent):
            if isinstance(field, list) and field and isinstance(field[0], ast.stmt):
                yield field


def _seams(statement: ast.stmt) -> Iterator[Seam]:
    for block in _blocks(statement):
        for node in block:
            if targets := _targets(node):
                lines = node.lineno - 1, node.end_lineno, block[-1].end_lineno
                yield Seam(frozenset(targets), *lines)


@functools.cache
def _used(code: str) -> frozenset[str]:
    """The global names that a top-level statement looks up, in annotations too."""
    tables, found = [symtable.symtable(code, "cell", "exec")], set[str]()
    for table in tables:  # grows
        is_top = table.get_type() == "module"
        symbols = (s for s in table.get_symbols() if s.is_referenced())
        found.update(s.get_name() for s in symbols if is_top or s.is_global())
        tables += table.get_children()
    return frozenset(found)


class Package:
    """The files that public names need, each after the files that it imports at its top."""

    def __init__(self, root: Traversable) -> None:
        self._root, self.sources = root, dict[str, Source]()
        initial = self._parse("__init__")
        exported = next(s.node for s in initial.statements if "__all__" in s.binds)
        self.public: list[str] = ast.literal_eval(exported.value)  # type: ignore[attr-defined]
        self._origin = {name: initial.own[name] for name in self.public}
        left, seams = list(self._origin.values()), list[Seam]()
        while left:
            for file in left:
                self._read(file)
            seams = [seam for source in self.sources.values() for seam in source.seams()]
            targets = frozenset[Name]().union(*(seam.targets for seam in seams))
            left = sorted({file for file, _ in targets}.difference(self.sources))
        self._alone = {name: self.reached([name], lambda seam: False) for name in self.public}
        self.words = sorted({self.word(seam) for seam in seams}.difference(self.public, ALWAYS))

    def _parse(self, file: str) -> Source:
        path = self._root.joinpath(*f"{file}.py".split("/"))
        return Source(file, path.read_text(encoding="utf-8"))

    def _read(self, file: str) -> None:
        if file not in self.sources:
            source = self._parse(file)
            for other in source.own.values():
                self._read(other)
            self.sources[file] = source

    def word(self, seam: Seam) -> str:
        """What `lift` calls the code behind a seam.

        The folder of its target, if nothing in there is public. Else the smallest public name that
        needs the target, or, if there is none, the file.
        """
        folder, _, file = min(seam.targets)[0].rpartition("/")
        if not any(origin.startswith(f"{folder}/") for origin in self._origin.values()):
            return folder
        needing = [name for name in self.public if seam.targets <= self._alone[name]]
        return min(needing, key=lambda name: len(self._alone[name]), default=file)

    def opener(self, names: Sequence[str]) -> Callable[[Seam], bool]:
        """Tell which seams are open in a cell of some names: by a name's needs, or by a word."""
        needed = set[Name]().union(*(self._alone.get(name, ()) for name in names))
        return lambda seam: seam.targets <= needed or self.word(seam) in (*names, *ALWAYS)

    def reached(self, names: Iterable[str], is_open: Callable[[Seam], bool]) -> set[Name]:
        """All that some public names need."""
        found, left = set[Name](), [(self._origin[name], name) for name in names]
        while left:
            file, name = left.pop()
            source = self.sources[file]
            binding = [statement for statement in source.statements if name in statement.binds]
            origin = source.own.get(name) or source.optional.get(name)
            if not binding and origin is not None:
                left.append((origin, name))
            elif (file, name) not in found and (binding or name in source.foreign):
                found.add((file, name))
                for statement in binding:
                    code = statement.code(lambda seam: None if is_open(seam) else "")
                    used = _used("\n".join(code)) | statement.binds
                    left += [(file, name) for name in used]
        return found


@functools.cache
def this_package() -> Package:
    """trainkit itself."""
    return Package(importlib.resources.files("trainkit"))


def lift(
    names: Sequence[str],
    *,
    docs: bool = False,
    bare: bool = False,
    inline: bool = False,
    package: Package | None = None,
) -> str:
    """Return the code of some public names as one file that needs only torch.

    Equivalent to the package for these names: the same statements, each once.

    Args:
        names: public names, such as "accumulate", and words of optional code, such as "ranks".
        docs: keep docstrings whole. By default they end after their law.
        bare: drop docstrings.
        inline: make code to paste among other code, instead of a file ``trainkit.py``.
        package: lift from another copy of the package.

    Raises:
        ValueError: for a name that the package does not have, or if no name is public.

    Example:
        >>> from trainkit.tools.lift import lift
        >>> code = lift(["frozen"])
        >>> "class frozen:" in code, "class Step" in code, "from trainkit" in code
        (True, False, False)
    """
    package, names = package or this_package(), list(dict.fromkeys(names))
    known = [*package.public, *package.words]
    for name in names:
        if name not in known and name not in ALWAYS:
            near = (difflib.get_close_matches(name, known, n=1) or known)[0]
            listed = ", ".join(known)
            raise ValueError(f"trainkit has no {name!r} to lift: `lift {near}`; it has {listed}")
    exported = [name for name in names if name in package.public]
    if not exported:
        raise ValueError(f"no public name in {names}: `lift {' '.join(['accumulate', *names])}`")
    arguments = " ".join([*names, *["--docs"] * docs, *["--bare"] * bare])
    command = f"python -m trainkit lift {arguments}"
    error = f"{{name}} was not lifted into this file: `{command} {{name}}`"
    is_open = package.opener(names)
    reached = package.reached(exported, is_open)

    def code(statement: Statement) -> list[str]:
        def closed(seam: Seam) -> str | None:
            return None if is_open(seam) else error.format(name=package.word(seam))

        return statement.code(closed, [] if docs else _docstrings(statement, bare))

    head = f"# trainkit {_released()}, MIT license: what `{command}` prints."
    start = [head, "", "from __future__ import annotations", "", *_imports(package, reached)]
    listed = ", ".join(f'"{name}"' for name in exported)
    cell = [*start, *_statements(package, reached, code), "", "", f"__all__ = [{listed}]"]
    if not inline:
        left = " ".join(name for name in package.public if name not in exported)
        cell += [_GETATTR.format(left=left, error=error)] * bool(left) + [_NO_COMMANDS]
    return "\n".join(cell).rstrip("\n") + "\n"


_GETATTR = """
def __getattr__(name: str) -> object:
    if name in "{left}".split():
        raise ImportError(
            f"{error}"
        )
    raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")
"""
_NO_COMMANDS = """
if __name__ == "__main__":
    raise SystemExit(
        "this trainkit.py is lifted code, without commands: run `python -m trainkit` elsewhere"
    )
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


def _statements(
    package: Package, reached: set[Name], code: Callable[[Statement], list[str]]
) -> Iterator[str]:
    """The lines of a cell. What two files have alike, such as a TypeVar, is printed once."""
    printed = set[str]()
    for source in package.sources.values():
        title = f"# {source.file}.py: {source.doc.partition(chr(10))[0]}"
        gap, after = ["", "", title, ""], -1
        for statement in source.statements:
            dump = ast.dump(statement.node)
            needed = any((source.file, name) in reached for name in statement.binds)
            if needed and dump not in printed:
                printed.add(dump)
                yield from [] if statement.begin == after else gap
                yield from code(statement)
                gap, after = ["", ""], statement.end


def _docstrings(statement: Statement, bare: bool) -> Iterator[Edit]:
    """Cut the docstrings in a statement to their law, or drop them."""
    lines = statement.lines
    for block in _blocks(statement.node):
        first = block[0]
        if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
            begin, end = first.lineno - 1, first.end_lineno or first.lineno
            if not bare:
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
    law = (head[: block.end()] if block else head.partition("\n\n")[0]).rstrip()
    if text[len(law) :].strip() in ("", '"""'):
        return lines
    return [*law.splitlines(), f'{indent}"""'] if "\n" in law else [f'{law}"""']


def add_lift(commands: Any) -> None:
    """Add ``lift`` to the commands of ``python -m trainkit``."""
    parser = commands.add_parser("lift", help="print the code of some names as one notebook cell")
    names = "what `from trainkit import ...` gives, and words of optional code, such as ranks"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    inline = "print code to paste as it is; it defines a hundred names beside yours"
    parser.add_argument("--all", action="store_true", help="everything, optional code too")
    docstrings = parser.add_mutually_exclusive_group()
    docstrings.add_argument("--docs", action="store_true", help="keep docstrings whole")
    docstrings.add_argument("--bare", action="store_true", help="drop docstrings")
    parser.add_argument("--inline", action="store_true", help=inline)
    output = "write a file instead of printing a cell"
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help=output)
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
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        remedy = "give a file in a folder that exists: `-o trainkit.py`"
        parser.error(f"-o {given.output}: {error.strerror}; {remedy}")
    return 0


def _released() -> str:
    try:
        return importlib.metadata.version("trainkit")
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout"
