"""``model_summary``: what a model is made of, and what of it is trained, as a table."""

from __future__ import annotations

import html
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trainkit.layers.language import check_module, unwrapped


class SummaryRow(NamedTuple):
    """One module, or several equal ones: their parameters, each counted once, and their state."""

    path: str
    module: str
    parameters: int
    state: str
    dtype: str
    tied: str


@dataclass(repr=False)
class ModelSummary:
    """What ``model_summary`` returns: a table in a terminal and in a notebook."""

    rows: list[SummaryRow]
    totals: str

    def table(self, width: int) -> str:
        """Return the table as text, with nested names where whole paths do not fit ``width``."""
        lines = self._lines()
        if sum(_widths(lines)) + 2 * len(lines[0]) - 2 > width:
            for row, line in zip(self.rows, lines[1:], strict=True):
                depth = row.path.count(".") + (row.path != "**")
                line[0] = "  " * depth + row.path.rpartition(".")[2]
        widths = _widths(lines)
        for i in (0, -1) if len(widths) > 4 else (0,):
            excess = max(sum(widths) + 2 * len(widths) - 2 - width, 0)
            widths[i] = max(widths[i] - excess, min(widths[i], 16))
        texts = [
            "  ".join(_fitted(cell, widths[i], i == 2) for i, cell in enumerate(line)).rstrip()
            for line in lines
        ]
        ruler = "-" * (sum(widths) + 2 * len(widths) - 2)
        return "\n".join([texts[0], ruler, *texts[1:], ruler, self.totals])

    def __repr__(self) -> str:
        return self.table(shutil.get_terminal_size().columns)

    def _repr_html_(self) -> str:
        rows = ""
        for line in self._lines():
            sides = ("right" if column == 2 else "left" for column in range(len(line)))
            cells, tag = zip(sides, map(html.escape, line), strict=True), "td" if rows else "th"
            row = (f'<{tag} style="text-align: {side}">{text}</{tag}>' for side, text in cells)
            rows += f"<tr>{''.join(row)}</tr>"
        return f"<table>{rows}</table><p>{html.escape(self.totals)}</p>".replace("\n", "<br>")

    def _lines(self) -> list[list[str]]:
        """The head and the rows. dtype and tied are columns only where they tell rows apart."""
        dtypes = {row.dtype for row in self.rows} - {""}
        more = ["dtype"] * (len(dtypes) > 1) + ["tied"] * any(row.tied for row in self.rows)
        lines = [["layer", "module", "parameters", "", *more]]
        for row in self.rows:
            values = [getattr(row, name) for name in more]
            lines.append([row.path, row.module, f"{row.parameters:,}", row.state, *values])
        return lines


def model_summary(module: nn.Module, depth: int | None = None) -> ModelSummary:
    """Lists the modules that have parameters or buffers: ``print(model_summary(model))``.

    Numbers are equivalent to ``sum(p.numel() for p in part.parameters())``, and paths are patterns
    for ``freeze``. Equal neighbours in a ModuleList or Sequential share a line. No value is read.

    Args:
        module: the model. Wrappers of torch.compile and DistributedDataParallel are left out.
        depth: number of components in a path; 0 shows the model in one line, None shows all.

    Raises:
        TypeError, ValueError: for another type, or a negative depth.

    Example:
        >>> import torch
        >>> from trainkit import model_summary
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> print(model_summary(model).table(width=80))
        layer  module      parameters
        ----------------------------------------
        **     Sequential          60  trainable
        [0:3]  3 x Linear          60  trainable
        ----------------------------------------
        60 parameters: 60 trainable, 0 frozen
        0.2 KiB, with 0 numbers in buffers
    """
    check_module(module, "model_summary(model)")
    if depth is not None and (type(depth) is not int or depth < 0):
        kind = ValueError if type(depth) is int else TypeError
        call = "`model_summary(model, depth=2)`"
        raise kind(f"depth is a number of levels, or None for all, got {depth!r}: {call}")
    module = unwrapped(module)
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    rows = list(_rows({"": module}, "", float("inf") if depth is None else depth, names))
    parameters, buffers = list(module.parameters()), list(module.buffers())
    count, trainable = _count(parameters), _count(p for p in parameters if p.requires_grad)
    memory = sum(_bytes(t) for t in [*parameters, *buffers] if not is_lazy(t)) / 2**10
    size = f"{memory:,.1f} KiB" if memory < 2**10 else f"{memory / 2**10:,.1f} MiB"
    totals = f"{count:,} parameters: {trainable:,} trainable, {count - trainable:,} frozen"
    if lazy := sum(map(is_lazy, parameters)):
        totals += f"; {lazy} have no shape before the first forward"
    return ModelSummary(rows, f"{totals}\n{size}, with {_count(buffers):,} numbers in buffers")


def _rows(
    equal: dict[str, nn.Module], path: str, depth: float, names: dict[int, list[str]]
) -> Iterator[SummaryRow]:
    """The rows of equal modules, given by name, and of the modules in them."""
    modules = list(equal.values())
    parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
    if not parameters and not any(list(module.buffers()) for module in modules):
        return
    words = {(): "", (True,): "trainable", (False,): "frozen"}
    state = words.get(tuple({p.requires_grad for p in parameters}), "part")
    dtypes = {str(p.dtype).removeprefix("torch.") for p in parameters}
    dtype = "mixed" if len(dtypes) > 1 else "".join(dtypes)
    if not (path and isinstance(modules[0], nn.ModuleList)):  # the rows of its items say all
        kind = f"{len(equal)} x " * (len(equal) > 1) + type(modules[0]).__name__
        count, tied = _count(parameters), _tied(equal, names)
        yield SummaryRow(path or "**", kind, count, state, dtype, tied)
    for component, children in _groups(equal):
        is_index = component.startswith("[")
        left = depth if is_index and path else depth - 1
        if left >= 0:
            inner = path + component if is_index else f"{path}.{component}".lstrip(".")
            yield from _rows(children, inner, left, names)


def _groups(equal: dict[str, nn.Module]) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """Children of equal modules, with their component of a path: a name, an index or a slice."""
    container = next(iter(equal.values()))
    children = {name: child for name, child in container._modules.items() if child is not None}
    is_container = isinstance(container, (nn.ModuleList, nn.Sequential))
    is_container = is_container and list(children) == [str(i) for i in range(len(children))]
    for _, group in groupby(children, lambda n: _form(children[n]) if is_container else n):
        first, *rest = group
        end = f":{int(first) + 1 + len(rest)}" if rest else ""
        inner: dict[str, Any] = {
            f"{path}.{name}".lstrip("."): m._modules[name]
            for path, m in equal.items()
            for name in (first, *rest)
        }
        yield f"[{first}{end}]" if is_container else first, inner


def _form(module: nn.Module) -> Any:
    """What two modules have in common if they share a row."""
    kinds = [(name, type(m)) for name, m in module.named_modules()]
    named = [*module.named_parameters(), *module.named_buffers()]
    return kinds, [(name, is_lazy(t) or t.shape, t.dtype, t.requires_grad) for name, t in named]


def _tied(equal: dict[str, nn.Module], names: dict[int, list[str]]) -> str:
    """Another name of a tied parameter: outside of these modules, or else among them."""
    own = [p for m in equal.values() for p in m.parameters(recurse=False)]
    shared = [name for p in own for name in names[id(p)] if len(names[id(p)]) > 1]
    others = (name for name in shared if name.rpartition(".")[0] not in equal)
    return next(others, shared[0] if shared and len(equal) > 1 else "")


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors if not is_lazy(t))


def _bytes(tensor: Tensor) -> int:
    """Memory of a tensor in this process: the sum of its parts if it is sharded or quantised."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _widths(lines: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _fitted(text: str, width: int, is_number: bool) -> str:
    if len(text) > width:  # the end of a path tells more than its beginning
        text = "\N{HORIZONTAL ELLIPSIS}" + text[len(text) - width + 1 :]
    return text.rjust(width) if is_number else text.ljust(width)
