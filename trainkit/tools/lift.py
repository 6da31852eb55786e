"""Lifting: the code of some names, with all that it needs and nothing else, as one cell for a notebook.

Every file of the package is parsed. A top-level statement binds names, and uses others; those that are reached from the names
asked for are printed as they stand, in the order in which the files import each other, and imports of the package fall away.
That takes two promises of the package, which the tests hold it to: it imports from its own files at the top only, and under the
same name; and a name at the top of two files is the same thing in both.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import importlib.metadata
import importlib.resources
import symtable
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Statement(NamedTuple):
    """One at the top of a file: its first line, counted with the comments above it, its last, and its names."""

    node: ast.stmt
    begin: int
    end: int
    binds: frozenset[str]
    uses: frozenset[str]


class Source:
    """A file of the package."""

    def __init__(self, name: str) -> None:
        text = (
            importlib.resources.files("trainkit").joinpath(f"{name}.py").read_text(encoding="utf-8")
        )
        tree = ast.parse(text)
        self.name, self.lines, self.doc = name, text.splitlines(), ast.get_docstring(tree) or ""
        self.own: dict[str, str] = {}  # names from other files of the package, and the files
        self.foreign: dict[
            str, tuple[str | None, ast.alias]
        ] = {}  # names from elsewhere, and how they are imported
        self.statements: list[Statement] = []
        above = 0
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainkit."):
                self.own.update(
                    {
                        alias.name: (node.module or "").removeprefix("trainkit.")
                        for alias in node.names
                    }
                )
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                module = node.module if isinstance(node, ast.ImportFrom) else None
                self.foreign.update(
                    {(a.asname or a.name).partition(".")[0]: (module, a) for a in node.names}
                )
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                self.statements.append(self._statement(node, above))
            above = node.end_lineno or 0

    def _statement(self, node: ast.stmt, above: int) -> Statement:
        begin = min(n.lineno for n in (node, *getattr(node, "decorator_list", ()))) - 1
        while begin > above and self.lines[begin - 1].startswith("#"):
            begin -= 1
        end = node.end_lineno or begin
        table = symtable.symtable("\n".join(self.lines[begin:end]), self.name, "exec")
        binds = {
            s.get_name()
            for s in table.get_symbols()
            if s.is_assigned() or s.is_imported() or s.is_namespace()
        }
        return Statement(node, begin, end, frozenset(binds), frozenset(_globals(table)))


def _globals(table: symtable.SymbolTable) -> Iterator[str]:
    """The names that a statement looks up at the top of its file, in its annotations, too."""
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module"):
            yield symbol.get_name()
    for inner in table.get_children():
        yield from _globals(inner)


@functools.lru_cache(maxsize=1)
def _sources() -> dict[str, Source]:
    """All files that the package imports, each after those that it imports itself."""
    found: dict[str, Source] = {}

    def visit(name: str) -> None:
        source = Source(name)
        for other in source.own.values():
            if other not in found:
                visit(other)
        found[name] = source

    visit("__init__")
    return found


def public_names() -> list[str]:
    """What can be lifted: all that the package exports."""
    return list(importlib.import_module("trainkit").__all__)


def needed(names: Iterable[str]) -> set[tuple[str, str]]:
    """The names that are reached from some public ones: each with the file that binds or imports it."""
    sources = _sources()
    found: set[tuple[str, str]] = set()
    left = [("__init__", name) for name in names]
    while left:
        file, name = left.pop()
        source = sources[file]
        if name in source.own:
            left.append((source.own[name], name))
            continue
        binding = [statement for statement in source.statements if name in statement.binds]
        if (file, name) not in found and (binding or name in source.foreign):
            found.add((file, name))
            left += [
                (file, used) for statement in binding for used in statement.uses | statement.binds
            ]
    return found


def lift(names: Sequence[str], *, bare: bool = False, inline: bool = False) -> str:
    """The code of some public names as one file, which imports nothing but torch and the standard library.

    Equivalent to the package as far as these names go: the same statements, once each.

    Args:
        names: of what is to be in it, as "accumulate".
        bare: without docstrings.
        inline: to be pasted among other code, and not to be a file ``trainkit.py`` of its own.

    Raises:
        ValueError: for a name that the package does not export.

    Example:
        >>> from trainkit.tools.lift import lift
        >>> code = lift(["frozen"])
        >>> "class frozen:" in code, "class Step" in code, "from trainkit" in lift(["frozen"], bare=True)
        (True, False, False)
    """
    public = public_names()
    for name in names:
        if name not in public:
            near = difflib.get_close_matches(name, public, n=1) or ["accumulate"]
            raise ValueError(
                f"trainkit has no {name!r} to lift: `lift {near[0]}`; it has {', '.join(public)}"
            )
    reached = needed(names)
    printed: set[str] = set()
    code = "\n\n\n".join(
        part for source in _sources().values() for part in _printed(source, reached, printed, bare)
    )
    names = list(dict.fromkeys(names))
    exported = ", ".join(f'"{name}"' for name in names)
    words = " ".join([*names, "--bare"] if bare else names)
    head = f"# trainkit {_released()}, MIT license: what `python -m trainkit lift {words}` prints."
    left = sorted(set(public) - set(names))
    end = "" if inline else (_LACKING.format(words=words, left=left) if left else "") + _NO_COMMANDS
    return f"{head}\n\nfrom __future__ import annotations\n\n{_imports(reached)}\n\n{code}\n\n\n__all__ = [{exported}]\n{end}"


# What a file says that is found in the place of the package.
_LACKING = """

def __getattr__(name: str) -> object:
    if name in {left}:
        raise ImportError(f"{{name}} was not lifted into this file: `python -m trainkit lift {words} {{name}}`")
    raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")
"""
_NO_COMMANDS = """

if __name__ == "__main__":
    raise SystemExit("this trainkit.py is lifted code, without commands: run `python -m trainkit` in another folder")
"""


def _printed(
    source: Source, reached: set[tuple[str, str]], printed: set[str], bare: bool
) -> Iterator[str]:
    """The statements of a file that are needed; those that have no blank line between them in one piece."""
    pieces: list[list[str]] = []
    after = -1
    for statement in source.statements:
        code = ast.dump(statement.node)
        if code in printed or not any((source.name, name) in reached for name in statement.binds):
            continue
        printed.add(code)  # what two files have alike, as a TypeVar, is there once
        if statement.begin != after:
            pieces.append([])
        pieces[-1] += (
            _without_docstrings(source, statement)
            if bare
            else source.lines[statement.begin : statement.end]
        )
        after = statement.end
    if pieces:
        yield f"# {source.name}.py: {source.doc.splitlines()[0]}"
    for piece in pieces:
        yield "\n".join(piece)


def _without_docstrings(source: Source, statement: Statement) -> list[str]:
    lines: list[str | None] = list(source.lines)
    for node in ast.walk(statement.node):
        if (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and ast.get_docstring(node) is not None
        ):
            text, rest = node.body[0], node.body[1:]
            begin, end = text.lineno - 1, text.end_lineno or text.lineno
            lines[begin:end] = [None] * (end - begin)
            if not rest:
                lines[begin] = " " * text.col_offset + "..."
            elif not source.lines[end]:
                lines[end] = None
    return [line for line in lines[statement.begin : statement.end] if line is not None]


def _imports(reached: set[tuple[str, str]]) -> str:
    """The imports of what is used, by the standard library and torch, and each name once."""
    plain, members = set[str](), dict[str, set[str]]()
    for file, name in reached:
        if name in (foreign := _sources()[file].foreign):
            module, alias = foreign[name]
            text = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
            if module is None:
                plain.add(text)
            elif module != "__future__":
                members.setdefault(module, set()).add(text)
    lines = [f"import {text}" for text in plain] + [
        f"from {m} import {', '.join(sorted(members[m]))}" for m in members
    ]
    ours = [line for line in lines if line.split()[1].partition(".")[0] == "torch"]
    order = functools.partial(sorted, key=lambda line: (line.startswith("from"), line))
    return "\n".join([*order(set(lines) - set(ours)), "", *order(ours)]).strip("\n") + "\n"


def add_lift(commands: Any) -> None:
    """Adds ``lift`` to the commands of ``python -m trainkit``."""
    parser = commands.add_parser(
        "lift", help="prints the code of some names as one cell for a notebook"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(public_names()))
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--bare", action="store_true", help="without docstrings")
    inline = "to be pasted as it is, and not written to trainkit.py by its cell: it then defines a hundred names of its own there"
    parser.add_argument("--inline", action="store_true", help=inline)
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="write a file in place of printing a cell"
    )
    parser.set_defaults(run=functools.partial(_run, parser))


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if bool(arguments.names) == arguments.all:
        parser.error("give either names, `lift accumulate amp`, or `lift --all`")
    try:
        code = lift(arguments.names or public_names(), bare=arguments.bare, inline=arguments.inline)
    except ValueError as error:
        parser.error(str(error))
    if arguments.output is not None:
        try:
            arguments.output.write_text(code, encoding="utf-8")
        except OSError as error:
            parser.error(
                f"-o {arguments.output}: {error.strerror}; give a file in a folder that is there: `-o trainkit.py`"
            )
    else:
        print(code if arguments.inline else f"%%writefile trainkit.py\n{code}", end="")
    return 0


def _released() -> str:
    try:
        return importlib.metadata.version("trainkit")
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout"
