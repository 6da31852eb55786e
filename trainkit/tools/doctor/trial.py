"""``doctor MODULE:FUNCTION``: the time, the memory and the largest batch of a step with each part.

Every variant trains a copy of the model on the same batch, with AdamW.
"""

from __future__ import annotations

import bisect
import copy
import gc
import math
import pkgutil
import statistics
import timeit
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainkit import amp, frozen, microbatch, recompute, train_step, trainable_parameters
from trainkit.chunks.batches import Batch, mapped
from trainkit.chunks.microbatching import is_out_of_memory
from trainkit.core.plan import check
from trainkit.core.precision import current_device
from trainkit.layers.language import unwrapped


class Task(NamedTuple):
    """What is trained; ``rows`` is None for a batch that cannot be cut."""

    model: nn.Module
    batch: Any
    loss_fn: Callable[[nn.Module, Any], Any]
    device: torch.device
    rows: int | None


MakePart = Callable[[Task], Any]


def run_trial(
    target: str, steps: int, device: str | None, layers: Sequence[str] | None
) -> dict[str, Any]:
    """Measure the user's model without and with each part; the model stays as it was."""
    task, rows = load(target, device), []
    for name, parts in make_variants(task, layers).items():
        row = measure(name, parts, task, steps)
        if task.rows and task.device.type != "cpu":
            row.largest_batch = largest_batch(parts, task, task.rows)
        rows.append(row)
    known = {"target": target, "device": str(task.device), "rows": task.rows, "steps": steps}
    return {**known, "variants": rows}


def load(target: str, device: str | None) -> Task:
    """Call the function that MODULE:FUNCTION names, and put the batch on the device."""
    made = pkgutil.resolve_name(target)()
    wanted = "`return model, batch, loss_fn`, where `loss_fn(model, batch)` is the loss"
    is_task = isinstance(made, tuple) and len(made) in (2, 3)
    check(is_task, TypeError, f"{target} returned {type(made).__name__}: {wanted}")
    model, batch, loss_fn = (*made, call_model)[:3]
    place = torch.device(device) if device else current_device()
    if place.index:
        torch.get_device_module(place).set_device(place)  # for synchronize and empty_cache
    batch, rows = mapped(batch, lambda tensor: tensor.to(place)), None
    with suppress(ValueError):  # microbatch says why this batch cannot be cut
        rows = Batch((batch,), {}).rows
    return Task(model, batch, loss_fn, place, rows)


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model that returns its own loss."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def make_variants(task: Task, layers: Sequence[str] | None) -> dict[str, list[MakePart]]:
    """Return the parts of each variant; the longest list of modules is the blocks by default."""
    lists = [
        (isinstance(module, nn.ModuleList), len(module), name)  # a Sequential may be a whole model
        for name, module in unwrapped(task.model).named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    ]
    lower = blocks = layers or []
    if lists and not layers:
        _, length, name = max(lists)
        lower, blocks = [f"{name}[:{length // 2}]"], [f"{name}[:]"]
    parts: dict[str, MakePart] = {
        "amp()": lambda task: amp(),
        f"frozen {' '.join(lower)}": lambda task: frozen(task.model, lower),
        f"microbatch({_quarter(task)})": lambda task: microbatch(_quarter(task)),
        f"recompute {' '.join(blocks)}": lambda task: recompute(task.model, blocks),
    }
    parts = {name: part for name, part in parts.items() if not name.endswith(" ")}  # no layers
    each = {name: [part] for name, part in parts.items()}
    return {"plain": [], **each, "all of these": list(parts.values())}


def _quarter(task: Task) -> int:
    return -(-(task.rows or 1) // 4)


def measure(name: str, parts: Sequence[MakePart], task: Task, steps: int) -> SimpleNamespace:
    """Measure a variant: the median of the time of the steps after a first one, and the memory.

    Return a row of the table; None was not measured.
    """
    row = SimpleNamespace(name=name, seconds=None, peak_bytes=None, largest_batch=None, failure="")

    def clock() -> float:
        torch.get_device_module(task.device).synchronize()
        return timeit.default_timer()

    try:
        step = make_step(task, parts)
        step()
        seconds = timeit.repeat(step, timer=clock, repeat=steps, number=1)
        row.seconds, row.peak_bytes = statistics.median(seconds), peak_memory(step, task.device)
    except Exception as error:
        if not parts and not is_out_of_memory(error):
            raise  # the user's own error
        row.failure = f"{type(error).__name__}: {error}"
    return row


def make_step(task: Task, parts: Sequence[MakePart]) -> Callable[[], Any]:
    """Return a step of a copy of the model, without arguments."""
    gc.collect()  # frees what the last measurement has left
    getattr(torch.get_device_module(task.device), "empty_cache", bool)()
    torch.manual_seed(0)
    model = copy.deepcopy(task.model).to(task.device).train()
    task = task._replace(model=model)
    optimizer = torch.optim.AdamW(trainable_parameters(model), fused=True)

    @train_step(optimizer, *(make_part(task) for make_part in parts))
    def step(batch: Any) -> Any:
        # In containers of its own, since the function may take things out of them.
        return task.loss_fn(model, mapped(batch, lambda tensor: tensor))

    return lambda: step(task.batch)


def peak_memory(step: Callable[[], Any], device: torch.device) -> int:
    """Return the peak memory of a call, in bytes.

    Where torch counts its memory, this is all that it has allocated. Elsewhere, on a CPU for
    example, it is the tensors that the operations of the call make: neither those from before nor
    the scratch memory inside a kernel.
    """
    module: Any = torch.get_device_module(device)
    if hasattr(module, "max_memory_allocated"):
        module.reset_peak_memory_stats(device)
        step()
        return int(module.max_memory_allocated(device))
    with _Allocations() as allocations:
        step()
    return int(allocations.peak)


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the most bytes of storages made by operations that are alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = WeakSet[torch.UntypedStorage]()
        self.peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self.alive.update(_storages(result) - _storages((args, kwargs)))
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive))
        return result


def _storages(values: Any) -> set[torch.UntypedStorage]:
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    return {tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided}


def largest_batch(parts: Sequence[MakePart], task: Task, rows: int) -> int:
    """Return how many rows fit, to 1/16 of the batch and up to 64 times the batch; 0 if none."""

    def fails(count: int) -> bool:
        index = torch.arange(count, device=task.device) % rows
        batch = mapped(task.batch, lambda tensor: tensor[index] if tensor.dim() else tensor)
        try:
            step = make_step(task._replace(batch=batch, rows=count), parts)
            step()
            step()  # with the state of the optimizer
        except Exception:  # out of memory, or of the limits of a kernel
            return True
        return False

    unit = max(rows // 16, 1)
    return unit * bisect.bisect_left(range(unit, 64 * rows + 1, unit), True, key=fails)


def table(found: dict[str, Any]) -> str:
    """Return the result of ``run_trial`` as text; nan was not measured."""
    title = "{target} on {device}, a batch of {rows} rows; the median of {steps} steps"
    heads = f"{'':<40} {'seconds':>18} {'peak memory':>20} {'largest batch':>14}"
    lines, rows = [title.format(**found), "", heads], found["variants"]
    plain_seconds, plain_peak = rows[0].seconds or math.nan, rows[0].peak_bytes or math.nan
    for row in rows:
        seconds, peak = row.seconds or math.nan, row.peak_bytes or math.nan
        time = f"{seconds:10.4f} {seconds / plain_seconds:6.2f}x"
        memory = f"{peak / 2**20:8.1f} MiB {peak / plain_peak:6.2f}x"
        lines.append(f"{row.name:<40} {time} {memory} {row.largest_batch or '-':>14}")
    lines += [f"{row.name}: {row.failure}" for row in rows if row.failure]
    return "\n".join(lines)
