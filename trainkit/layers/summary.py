"""``model_summary``: what a model is made of, and what of it is trained, as a table."""

from __future__ import annotations

import html
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trainkit.layers.language import unwrapped


class SummaryRow(NamedTuple):
    """A module, or as many equal ones as ``module`` says. ``parameters``: in all of them and below, each counted once."""

    path: str
    module: str
    parameters: int
    state: str
    dtype: str
    tied: str


@dataclass(repr=False)
class ModelSummary:
    """What ``model_summary`` gives: a table where it is printed, and in a notebook."""

    rows: list[SummaryRow]
    totals: str

    def table(self, width: int) -> str:
        """As text of so many columns: with paths in full where they fit, else each under the one that it begins with."""
        lines = self._lines()
        if sum(_widths(lines)) + 2 * len(lines[0]) - 2 > width:
            for row, line in zip(self.rows, lines[1:], strict=True):
                line[0] = (
                    row.path
                    if row.path == "**"
                    else "  " * (row.path.count(".") + 1) + row.path.rpartition(".")[2]
                )
        widths = _widths(lines)
        for i in (0, -1) if len(widths) > 4 else (0,):
            widths[i] = max(
                min(widths[i], width - sum(widths) + widths[i] - 2 * len(widths) + 2),
                min(widths[i], 16),
            )
        ruler = "-" * (sum(widths) + 2 * len(widths) - 2)
        texts = [
            "  ".join(_fitted(cell, widths[i], i == 2) for i, cell in enumerate(line)).rstrip()
            for line in lines
        ]
        return "\n".join([texts[0], ruler, *texts[1:], ruler, self.totals])

    def __str__(self) -> str:
        return self.table(shutil.get_terminal_size().columns)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        # Colours that are inherited, or between black and white: a notebook may be light or dark.
        cell = "padding: 2px 16px 2px 0; background: transparent; color: inherit; text-align:"
        body = ""
        for i, line in enumerate(self._lines()):
            tag = "td" if i else "th"
            cells = (
                f'<{tag} style="{cell} {"right" if column == 2 else "left"}">{html.escape(text)}</{tag}>'
                for column, text in enumerate(line)
            )
            style = "background: transparent; border-bottom: 1px solid rgba(128, 128, 128, 0.3)"
            body += f'<tr style="{style}">{"".join(cells)}</tr>'
        style = "border-collapse: collapse; font-variant-numeric: tabular-nums; color: inherit"
        return f'<table style="{style}">{body}</table><p>{html.escape(self.totals).replace(chr(10), "<br>")}</p>'

    def _lines(self) -> list[list[str]]:
        """The cells, those of the head first. A dtype that all have says nothing, and often nothing is tied."""
        names = ["dtype"] * (len({row.dtype for row in self.rows} - {""}) > 1) + ["tied"] * any(
            row.tied for row in self.rows
        )
        rows = [
            [r.path, r.module, f"{r.parameters:,}", r.state, *(getattr(r, name) for name in names)]
            for r in self.rows
        ]
        return [["layer", "module", "parameters", "", *names], *rows]


def model_summary(module: nn.Module, depth: int | None = None) -> ModelSummary:
    """A table of the modules that have parameters or buffers; ``print(model_summary(model))``, or the last line of a cell.

    Its numbers are those of ``sum(p.numel() for p in part.parameters())``: a parameter that is shared counts once in every line,
    and once in the totals. Layers are named as ``freeze`` and ``frozen`` take them. Equal layers of a ModuleList or Sequential
    that follow each other are one line, ``encoder.layer[0:6]``, whose numbers are those of all six.

    No values are read: it works on the meta device, for quantised, sharded and compiled models, and for lazy ones, whose
    parameters count nothing before the first forward. Memory is that of this process, without gradients and optimizer states.

    Args:
        module: the model; what torch.compile and DistributedDataParallel put around it is left out.
        depth: how many components of a path are shown; 0 is the model in one line, None all.

    Returns:
        An object that prints as a table as wide as the terminal, and has its ``rows`` and ``totals``.

    Raises:
        TypeError, ValueError: for what is no module, or no depth.

    Example:
        >>> import torch
        >>> from trainkit import freeze, model_summary
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), *[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> names = freeze(model, "[0]")
        >>> print(model_summary(model).table(width=80))
        layer  module      parameters
        ----------------------------------------
        **     Sequential         100  part
        [0]    Embedding           40  frozen
        [1:4]  3 x Linear          60  trainable
        ----------------------------------------
        100 parameters: 60 trainable, 40 frozen
        0.4 KiB, with 0 numbers in buffers
    """
    if not isinstance(module, nn.Module) or not hasattr(module, "_modules"):
        raise TypeError(
            f"model_summary takes a torch.nn.Module, got an object of type {type(module).__name__}: `model_summary(model)`"
        )
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int)):
        raise TypeError(
            f"depth is a number of levels, or None for all, got {depth!r}: `model_summary(model, depth=2)`"
        )
    if depth is not None and depth < 0:
        raise ValueError(
            f"depth is a number of levels, got {depth}: `model_summary(model, depth=2)`"
        )
    module = unwrapped(module)
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    rows = list(_rows_of({"": module}, "", depth, names))
    parameters, buffers = list(module.parameters()), list(module.buffers())
    count, trainable = _count_of(parameters), _count_of(p for p in parameters if p.requires_grad)
    memory = sum(map(_bytes_of, [*parameters, *buffers])) / 2**10
    size = f"{memory:,.1f} KiB" if memory < 2**10 else f"{memory / 2**10:,.1f} MiB"
    totals = f"{count:,} parameters: {trainable:,} trainable, {count - trainable:,} frozen"
    if lazy := sum(map(is_lazy, parameters)):
        totals += f"; {lazy} have no shape before the first forward"
    totals += f"\n{size}, with {_count_of(buffers):,} numbers in buffers"
    return ModelSummary(rows, totals)


def _rows_of(
    same: dict[str, nn.Module], path: str, depth: int | None, names: dict[int, list[str]]
) -> Iterator[SummaryRow]:
    """The lines of a module and what is in it, or of several equal ones in one: by their names."""
    modules = list(same.values())
    parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
    if not parameters and not any(True for module in modules for _ in module.buffers()):
        return
    states = {p.requires_grad for p in parameters}
    state = (
        "part"
        if len(states) > 1
        else {True: "trainable", False: "frozen"}.get(next(iter(states), None), "")
    )  # type: ignore[arg-type]
    dtypes = {str(p.dtype).removeprefix("torch.") for p in parameters}
    dtype = "mixed" if len(dtypes) > 1 else "".join(dtypes)
    count = f"{len(same)} x " if len(same) > 1 else ""
    is_list = isinstance(modules[0], nn.ModuleList)
    if not (is_list and path):  # of a list there is nothing to say but what is in it
        name = type(modules[0]).__name__
        yield SummaryRow(
            path or "**", count + name, _count_of(parameters), state, dtype, _tied(same, names)
        )
    for component, children in _groups(same):
        is_index = component.startswith("[")
        deeper = depth if depth is None or (is_index and path) else depth - 1
        if deeper is None or deeper >= 0:
            inner = path + component if is_index else f"{path}.{component}".lstrip(".")
            yield from _rows_of(children, inner, deeper, names)


def _groups(same: dict[str, nn.Module]) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """The children of equal modules by name; of a container, those that are equal and follow each other, by a slice."""
    first = next(iter(same.values()))
    names = [name for name, child in first._modules.items() if child is not None]
    is_container = isinstance(first, (nn.ModuleList, nn.Sequential)) and names == [
        str(i) for i in range(len(names))
    ]
    forms = [_form(first._modules[name]) for name in names] if is_container else names
    start = 0
    while start < len(names):
        stop = start + 1
        while is_container and stop < len(names) and forms[stop] == forms[start]:
            stop += 1
        component = (
            names[start]
            if not is_container
            else f"[{start}]"
            if stop == start + 1
            else f"[{start}:{stop}]"
        )
        children = {
            f"{place}.{name}".lstrip("."): m._modules[name]
            for place, m in same.items()
            for name in names[start:stop]
        }
        yield component, children  # type: ignore[misc]
        start = stop


def _form(module: nn.Module | None) -> Any:
    """What two modules have the same where they can be one line."""
    if module is None:
        return None
    own = [
        (name, tuple(t.shape) if not is_lazy(t) else None, t.dtype, t.requires_grad)
        for members in (module._parameters, module._buffers)
        for name, t in members.items()
        if t is not None
    ]
    return type(module), own, [(name, _form(child)) for name, child in module._modules.items()]


def _tied(same: dict[str, nn.Module], names: dict[int, list[str]]) -> str:
    """The name of a parameter of another module that is one of these modules' own, too; of one of several that share theirs."""
    own = [p for module in same.values() for p in module._parameters.values() if p is not None]
    shared = [name for p in own for name in names[id(p)] if len(names[id(p)]) > 1]
    others = (name for name in shared if name.rpartition(".")[0] not in same)
    return next(others, shared[0] if shared and len(same) > 1 else "")


def _count_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors if not is_lazy(t))


def _bytes_of(tensor: Tensor) -> int:
    """The memory of a tensor here; of one that is made of others, as sharded and quantised ones are, of these."""
    if is_lazy(tensor):
        return 0
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _widths(lines: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _fitted(text: str, width: int, is_number: bool) -> str:
    """The text in so many columns; of one that is longer the end, which tells more than the beginning."""
    if len(text) > width:
        text = text.strip().rjust(width)
        text = (
            text
            if len(text) == width
            else "\N{HORIZONTAL ELLIPSIS}" + text[len(text) - width + 1 :]
        )
    return text.rjust(width) if is_number else text.ljust(width)
