"""Print the code of some public names as one self-contained cell for a notebook.

The package is parsed, not imported. A top-level statement binds names and uses names. The statements that the names asked
for reach are printed unchanged, in the order in which the files import each other, and imports of trainkit fall away.

An import of trainkit inside a function is a seam: it marks code that most users do without, such as several ranks. Where the
cell has the target, the import falls away. Where it has not, the import and what follows it in its block become an ImportError
that names the word to add: ``python -m trainkit lift accumulate amp ranks``.
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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from importlib.abc import Traversable

ALWAYS = ("advice", "state")  # words of seams that every cell has: error messages and state_dict
Name = tuple[str, str]  # the file that binds a name, and the name
Edit = tuple[int, int, list[str]]  # replace lines [begin, end) by others


class Seam(NamedTuple):
    """An import of trainkit inside a function."""

    targets: frozenset[Name]
    begin: int
    end: int
    block_end: int
    is_alone: bool  # whether its block has no other statement

    def edit(self, lines: list[str], is_open: bool, message: str) -> Edit:
        """Remove the import, or replace it and the rest of its block by an ImportError."""
        indent = lines[self.begin][: -len(lines[self.begin].lstrip())]
        if not is_open:
            error = [f"{indent}raise ImportError(", f'{indent}    "{message}"', f"{indent})"]
            return self.begin, self.block_end, error
        if self.is_alone:
            return self.begin, self.end, [f"{indent}pass"]
        return self.begin, self.end + (not lines[self.end]), []


class Statement(NamedTuple):
    """A top-level statement with the comments above it, as lines [begin, end) of its file."""

    node: ast.stmt
    begin: int
    end: int
    seams: list[Seam]
    binds: frozenset[str]


class Source:
    """A file of the package, by its path without the suffix, such as ``core/step``."""

    def __init__(self, file: str, text: str) -> None:
        tree = ast.parse(text)
        self.file, self.lines, self.doc = file, text.splitlines(), ast.get_docstring(tree) or ""
        self.own: dict[str, str] = {}  # names imported from trainkit, and the files they are in
        self.foreign: dict[str, set[tuple[str, str]]] = {}  # other imports: module or "", and text
        self.statements: list[Statement] = []
        above = 0
        for node in tree.body:
            if _is_own(node):
                self.own |= {name: target for target, name in _targets(node)}
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", "")
                for alias in node.names:
                    text = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                    name = (alias.asname or alias.name).partition(".")[0]
                    self.foreign.setdefault(name, set()).add((module, text))
            elif not _has_no_effect(node):
                self.statements.append(self._statement(node, above))
            above = node.end_lineno or 0
        self._uses: dict[tuple[int, tuple[bool, ...]], set[str]] = {}

    def origin(self, name: str) -> str | None:
        """The file that a name is imported from, at the top or in a function."""
        optional = {name: file for seam in self.seams() for file, name in seam.targets}
        return self.own.get(name) or optional.get(name)

    def seams(self) -> Iterator[Seam]:
        """All seams in this file."""
        for statement in self.statements:
            yield from statement.seams

    def edited(self, statement: Statement, edits: Iterable[Edit]) -> list[str]:
        """The lines of a statement after some edits; an edit inside lines already replaced is void."""
        result, line = list[str](), statement.begin
        for begin, end, replacement in sorted(edits):
            if begin >= line:
                result += self.lines[line:begin] + replacement
                line = end
        return result + self.lines[line : statement.end]

    def uses(self, statement: Statement, is_open: Callable[[Seam], bool]) -> set[str]:
        """The global names that a statement looks up, in annotations too."""
        opened = tuple(is_open(seam) for seam in statement.seams)
        key = statement.begin, opened
        if key not in self._uses:
            pairs = zip(statement.seams, opened, strict=True)
            edits = [seam.edit(self.lines, is_open, "") for seam, is_open in pairs]
            code = "\n".join(self.edited(statement, edits))
            self._uses[key] = set(_globals(symtable.symtable(code, self.file, "exec")))
        return self._uses[key]

    def _statement(self, node: ast.stmt, above: int) -> Statement:
        begin = min(n.lineno for n in (node, *getattr(node, "decorator_list", ()))) - 1
        while begin > above and self.lines[begin - 1].startswith("#"):
            begin -= 1
        end = node.end_lineno or begin
        table = symtable.symtable("\n".join(self.lines[begin:end]), self.file, "exec")
        binds = frozenset(
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
        )
        return Statement(node, begin, end, list(_seams(node)), binds)


def _is_own(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainkit.")


def _targets(node: Any) -> list[Name]:
    file = node.module.removeprefix("trainkit.").replace(".", "/")
    return [(file, alias.name) for alias in node.names]


def _has_no_effect(node: ast.stmt) -> bool:
    """Whether a statement is a docstring or holds imports for type checkers alone."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test).endswith("TYPE_CHECKING")
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _seams(statement: ast.stmt) -> Iterator[Seam]:
    for parent in ast.walk(statement):
        for _, block in ast.iter_fields(parent):
            for node in block if isinstance(block, list) else ():
                if _is_own(node):
                    begin, end, last = node.lineno - 1, node.end_lineno, block[-1].end_lineno
                    yield Seam(frozenset(_targets(node)), begin, end, last, len(block) == 1)


def _globals(table: symtable.SymbolTable) -> Iterator[str]:
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module"):
            yield symbol.get_name()
    for inner in table.get_children():
        yield from _globals(inner)


class Package:
    """The files that the public names reach, each after the files that it imports at its top."""

    def __init__(self, root: Traversable) -> None:
        self.root, self.sources = root, dict[str, Source]()
        initial = Source("__init__", self._text("__init__"))
        exported = next(s.node for s in initial.statements if "__all__" in s.binds)
        self.public: list[str] = ast.literal_eval(exported.value)  # type: ignore[attr-defined]
        self._origin = {name: initial.own[name] for name in self.public}
        left = list(self._origin.values())
        for file in left:  # grows
            for source in self._read(file):
                left += [target for seam in source.seams() for target, _ in seam.targets]
        self._alone = {name: self.reached([name]) for name in self.public}
        everything = self.reached(self.public, None)
        seams = (
            seam
            for source in self.sources.values()
            for statement in source.statements
            if not everything.isdisjoint((source.file, name) for name in statement.binds)
            for seam in statement.seams
        )
        self.words = sorted({self.word(seam) for seam in seams} - {*self.public, *ALWAYS})

    def _text(self, file: str) -> str:
        return self.root.joinpath(*f"{file}.py".split("/")).read_text(encoding="utf-8")

    def _read(self, file: str) -> Iterator[Source]:
        if file not in self.sources:
            source = Source(file, self._text(file))
            for other in source.own.values():
                yield from self._read(other)
            self.sources[file] = source
            yield source

    def word(self, seam: Seam) -> str:
        """What `lift` calls the target of a seam.

        The smallest public name that reaches it; or else its folder, if that has no public name; or else its file.
        """
        reaching = [name for name in self.public if seam.targets <= self._alone[name]]
        if reaching:
            return min(reaching, key=lambda name: len(self._alone[name]))
        folder, _, file = next(iter(seam.targets))[0].rpartition("/")
        has_public = any(origin.startswith(f"{folder}/") for origin in self._origin.values())
        return file if has_public else folder

    def is_open(self, seam: Seam, reached: set[Name], words: Collection[str] | None) -> bool:
        """Whether a cell has the target of a seam. None for words opens every seam."""
        if words is None or seam.targets <= reached:
            return True
        return bool(words) and self.word(seam) in words

    def reached(self, names: Iterable[str], words: Collection[str] | None = ()) -> set[Name]:
        """The names that some public names need, with the seams of some words open."""
        before: set[Name] | None = None
        found = set[Name]()
        while found != before:  # a seam opens where its target was reached another way
            before, found = found, set()
            left = [(self._origin[name], name) for name in names]
            is_open = functools.partial(self.is_open, reached=before, words=words)
            while left:
                file, name = left.pop()
                source = self.sources[file]
                binding = [s for s in source.statements if name in s.binds]
                origin = None if binding else source.origin(name)
                if origin is not None:
                    left.append((origin, name))
                elif (file, name) not in found and (binding or name in source.foreign):
                    found.add((file, name))
                    for s in binding:
                        left += [(file, used) for used in source.uses(s, is_open) | s.binds]
        return found


@functools.lru_cache(maxsize=1)
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
    """Return the code of some public names as one file that imports torch and the standard library alone.

    Equivalent to the package for these names: the same statements, each once.

    Args:
        names: public names, such as "accumulate", and words of optional code, such as "ranks".
        docs: keep docstrings whole; otherwise each is cut to its law, the text down to its first block of code.
        bare: drop docstrings.
        inline: make code to paste among other code instead of a file ``trainkit.py`` of its own.
        package: the package to lift from, this one by default.

    Raises:
        ValueError: for a name that the package does not have, and if no public name is given.

    Example:
        >>> from trainkit.tools.lift import lift
        >>> code = lift(["frozen"])
        >>> "class frozen:" in code, "class Step" in code, "from trainkit" in lift(["frozen"], bare=True)
        (True, False, False)
    """
    package = package or this_package()
    known = [*package.public, *package.words]
    for name in names:
        if name not in known and name not in ALWAYS:
            near = (difflib.get_close_matches(name, known, n=1) or known)[0]
            listed = ", ".join(known)
            raise ValueError(f"trainkit has no {name!r} to lift: `lift {near}`; it has {listed}")
    names = list(dict.fromkeys(names))
    exported = [name for name in names if name in package.public]
    if not exported:
        raise ValueError(f"no public name in {names}: `lift {' '.join(['accumulate', *names])}`")
    arguments = " ".join([*names, *["--docs"] * docs, *["--bare"] * bare])
    words = {*names, *ALWAYS}
    reached = package.reached(exported, words)

    def edits(source: Source, statement: Statement) -> Iterator[Edit]:
        for seam in statement.seams:
            message = _LACKING.format(name=package.word(seam), arguments=arguments)
            yield seam.edit(source.lines, package.is_open(seam, reached, words), message)
        if not docs:
            yield from _docstring_edits(source.lines, statement.node, bare)

    code = "\n\n\n".join(_pieces(package, reached, edits))
    head = (
        f"# trainkit {_released()}, MIT license: what `python -m trainkit lift {arguments}` prints."
    )
    start = f"{head}\n\nfrom __future__ import annotations\n\n{_imports(package, reached)}"
    everything = ", ".join(f'"{name}"' for name in exported)
    cell = f"{start}\n\n{code}\n\n\n__all__ = [{everything}]\n"
    left = sorted({*package.public} - {*exported})
    if left and not inline:
        cell += _GETATTR.format(
            left=left, message=_LACKING.format(name="{name}", arguments=arguments)
        )
    return cell if inline else cell + _NO_COMMANDS


_LACKING = "{name} was not lifted into this file: `python -m trainkit lift {arguments} {name}`"
_GETATTR = """

def __getattr__(name: str) -> object:
    if name in {left}:
        raise ImportError(f"{message}")
    raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")
"""
_NO_COMMANDS = """

if __name__ == "__main__":
    raise SystemExit("this trainkit.py is lifted code, without commands: run `python -m trainkit` in another folder")
"""


def _pieces(
    package: Package, reached: set[Name], edits: Callable[[Source, Statement], Iterable[Edit]]
) -> Iterator[str]:
    """The statements of a cell; statements without a blank line between them are one piece."""
    printed = set[str]()
    for source in package.sources.values():
        pieces: list[list[str]] = []
        after = -1
        for statement in source.statements:
            code = ast.dump(statement.node)
            if code in printed or reached.isdisjoint((source.file, n) for n in statement.binds):
                continue
            printed.add(code)  # what two files have alike, such as a TypeVar, is printed once
            if statement.begin != after:
                pieces.append([])
            pieces[-1] += source.edited(statement, edits(source, statement))
            after = statement.end
        if pieces:
            yield f"# {source.file}.py: {source.doc.splitlines()[0]}"
            yield from ("\n".join(piece) for piece in pieces)


def _docstring_edits(lines: list[str], statement: ast.stmt, bare: bool) -> Iterator[Edit]:
    """Cut the docstrings in a statement to their law, or drop them."""
    for node in ast.walk(statement):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if ast.get_docstring(node) is not None:
            text = node.body[0]
            begin, end = text.lineno - 1, text.end_lineno or text.lineno
            if not bare:
                yield begin, end, _law(lines[begin:end])
            elif len(node.body) == 1:
                yield begin, end, [" " * text.col_offset + "..."]
            else:
                yield begin, end + (not lines[end]), []


_SECTION = re.compile(r" *(Args|Attributes|Examples?|Raises|Returns|Source|Warns|Yields):")


def _law(lines: list[str]) -> list[str]:
    """A docstring down to the end of its first block of code, or without one its first paragraph."""
    sections = (i for i, line in enumerate(lines) if _SECTION.match(line))
    head = lines[: next(sections, len(lines))]
    block = next((i for i, line in enumerate(head) if line.endswith("::")), None)
    if block is None:
        end = head.index("") if "" in head else len(head)
    else:
        inside = re.match(" *", lines[block])[0] + " "  # type: ignore[index]
        rest = range(block + 1, len(head))
        end = next((i for i in rest if head[i] and not head[i].startswith(inside)), len(head))
    law = "\n".join(lines[:end]).rstrip()
    if end == len(lines) or lines[end].endswith('"""') and lines[end].strip() == '"""':
        return lines
    indent = re.match(" *", lines[0])[0]  # type: ignore[index]
    return f'{law}\n{indent}"""'.splitlines() if "\n" in law else [f'{law}"""']


def _imports(package: Package, reached: set[Name]) -> str:
    """The imports of a cell: the standard library, then torch, each name once."""
    found = {
        imported
        for file, name in reached
        for imported in package.sources[file].foreign.get(name, ())
    }
    members: dict[str, list[str]] = {}
    for module, text in sorted(found):
        members.setdefault(module, []).append(text)
    lines = [f"import {text}" for text in members.pop("", [])]
    lines += [f"from {m} import {', '.join(members[m])}" for m in members if m != "__future__"]
    ours = [line for line in lines if line.split()[1].partition(".")[0] == "torch"]
    others = [line for line in lines if line not in ours]
    return "\n".join([*others, "", *ours]).strip("\n") + "\n"


def add_lift(commands: Any) -> None:
    """Add ``lift`` to the commands of ``python -m trainkit``."""
    parser = commands.add_parser("lift", help="print the code of some names as one notebook cell")
    names = "what `from trainkit import ...` gives, and words of optional code, such as ranks"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    parser.add_argument("--all", action="store_true", help="everything, optional code included")
    parser.add_argument("--docs", action="store_true", help="keep docstrings whole")
    parser.add_argument("--bare", action="store_true", help="drop docstrings")
    inline = "print code to paste as it is; it defines a hundred names beside yours"
    parser.add_argument("--inline", action="store_true", help=inline)
    output = "write a file instead of printing a cell"
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help=output)
    parser.set_defaults(run=functools.partial(_run, parser))


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    names, output = arguments.names, arguments.output
    if bool(names) == arguments.all:
        parser.error("give either names, `lift accumulate amp`, or `lift --all`")
    if arguments.docs and arguments.bare:
        parser.error("give either --docs or --bare")
    package = this_package()
    options = {name: getattr(arguments, name) for name in ("docs", "bare", "inline")}
    try:
        code = lift(names or [*package.public, *package.words], **options)
    except ValueError as error:
        parser.error(str(error))
    if output is None:
        print(code if arguments.inline else f"%%writefile trainkit.py\n{code}", end="")
        return 0
    try:
        output.write_text(code, encoding="utf-8")
    except OSError as error:
        remedy = "give a file in a folder that exists: `-o trainkit.py`"
        parser.error(f"-o {output}: {error.strerror}; {remedy}")
    return 0


def _released() -> str:
    try:
        return importlib.metadata.version("trainkit")
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout"
