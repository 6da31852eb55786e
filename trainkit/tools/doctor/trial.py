"""``doctor MODULE:FUNCTION``: the time, the memory and the largest batch of a step with each part.

Every variant trains a copy of the model on the same batch, with AdamW, or with SGD where gradients
are sparse or complex. Before a variant is measured, its gradient is compared with the gradient of
the plain step.
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
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainkit import amp, frozen, microbatch, recompute, train_step, trainable_parameters
from trainkit.chunks.batches import Batch, mapped
from trainkit.chunks.microbatching import is_out_of_memory
from trainkit.core.plan import check
from trainkit.core.precision import current_device
from trainkit.layers.language import unwrapped


class Task(NamedTuple):
    """What is trained; ``rows``, along ``dim``, is None for a batch that cannot be cut."""

    model: nn.Module
    batch: Any
    loss_fn: Callable[[nn.Module, Any], Any]
    device: torch.device
    rows: int | None
    dim: int = 0


MakePart = Callable[[Task], Any]
Parts = Sequence[MakePart]


def run_trial(
    target: str, steps: int, device: str | None, layers: Sequence[str] | None
) -> dict[str, Any]:
    """Measure the user's model without and with each part; the model stays as it was."""
    task, rows = choose_dim(load(target, device)), []
    variants = make_variants(task, layers)
    for name, parts in variants.items():
        row = measure(name, parts, task, steps)
        if row.failure.startswith(NotExact.__name__):
            variants["all of these"].remove(*parts)
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
    return Task(model, mapped(batch, lambda tensor: tensor.to(place)), loss_fn, place, None)


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model that returns its own loss."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def choose_dim(task: Task) -> Task:
    """Return the task with its rows, along the dimension in which ``microbatch`` is exact, if any.

    A batch that cannot be cut keeps no rows: ``microbatch`` says why.
    """
    otherwise = task
    for dim in (0, 1):
        with suppress(Exception):
            found = task._replace(rows=Batch((task.batch,), {}, dim).rows, dim=dim)
            otherwise = otherwise if dim else found
            try:
                compare(found, [_microbatch])
                return found
            except NotExact:
                otherwise = otherwise if otherwise.rows else found
    return otherwise


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
        "amp()": lambda task: amp(init_scale=1024.0),
        f"frozen {' '.join(lower)}": lambda task: frozen(task.model, lower),
        f"microbatch({_quarter(task)}{f', dim={task.dim}' * bool(task.dim)})": _microbatch,
        f"recompute {' '.join(blocks)}": lambda task: recompute(task.model, blocks),
    }
    parts = {name: part for name, part in parts.items() if not name.endswith(" ")}  # no layers
    each = {name: [part] for name, part in parts.items()}
    return {"plain": [], **each, "all of these": list(parts.values())}


def _quarter(task: Task) -> int:
    return -(-(task.rows or 1) // 4)


def _microbatch(task: Task) -> Any:
    return microbatch(_quarter(task), task.dim)


def measure(name: str, parts: Parts, task: Task, steps: int) -> SimpleNamespace:
    """Measure a variant: the median of the time of the steps after a first one, and the memory.

    Return a row of the table, with None for what was not measured.
    """
    row = SimpleNamespace(name=name, seconds=None, peak_bytes=None, largest_batch=None)
    row.note = row.failure = ""

    def clock() -> float:
        torch.get_device_module(task.device).synchronize()
        return timeit.default_timer()

    try:
        if parts and name != "all of these":
            row.note = compare(task, parts, _EXPECTED.get(name.split()[0], ""))
        step = make_step(task, parts)
        step()
        seconds = timeit.repeat(step, timer=clock, repeat=steps, number=1)
        row.seconds, row.peak_bytes = statistics.median(seconds), peak_memory(step, task.device)
        if task.device.type == "cuda" and not parts:
            row.note = advise(kernel_times(step), row.seconds)
    except Exception as error:
        if not parts and not is_out_of_memory(error):
            raise  # the user's own error
        row.failure = f"{type(error).__name__}: {error}"
    return row


def kernel_times(step: Callable[[], Any]) -> dict[str, float]:
    """Return the seconds of each CUDA kernel in a call."""
    cuda = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[cuda], acc_events=True) as found:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in found.key_averages() if not event.is_user_annotation]
    return {kernel.key: kernel.self_device_time_total / 1e6 for kernel in kernels}


def advise(kernels: dict[str, float], seconds: float) -> str:
    """Return what helps a plain step of so many seconds on a GPU, by the times of its kernels."""
    idle = 1 - sum(kernels.values()) / seconds
    rules = (
        (idle > 0.3, f"the GPU is idle for {idle:.0%} of a step, which is {_LAUNCHES}"),
        (any("cudnn" in name and "sdpa" in name for name in kernels), _CUDNN),
    )
    return "; ".join(text for holds, text in rules if holds)


_LAUNCHES = "bound by the launches of kernels: use a larger batch or `torch.compile`"
_CUDNN = (
    "attention runs in cuDNN, which makes a plan for each new shape: pad to multiples of 64, or "
    "`torch.backends.cuda.enable_cudnn_sdp(False)`"
)


def make_step(task: Task, parts: Parts) -> Callable[[], Any]:
    """Return a step of a copy of the model, without arguments."""
    gc.collect()  # frees what the last measurement has left
    getattr(torch.get_device_module(task.device), "empty_cache", bool)()
    task = copied(task, seed=0)
    parameters = trainable_parameters(task.model)
    is_sparse = any(getattr(module, "sparse", False) for module in task.model.modules())
    if is_sparse or any(map(torch.is_complex, parameters)):
        return bind(task, parts, torch.optim.SGD(parameters))
    return bind(task, parts, torch.optim.AdamW(parameters, fused=True))


def copied(task: Task, seed: int) -> Task:
    """Return the task with a copy of its model, in training mode, and seed the random numbers."""
    torch.manual_seed(seed)
    return task._replace(model=copy.deepcopy(task.model).to(task.device).train())


def bind(task: Task, parts: Parts, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """Return a step of the model itself, without arguments."""
    part: Any = train_step(optimizer, *(make_part(task) for make_part in parts))
    step = part(lambda batch: task.loss_fn(task.model, batch))
    # In new containers, since the function may take things out of them.
    return lambda: step(mapped(task.batch, lambda tensor: tensor))


class NotExact(Exception):
    """The gradient of a variant is not the gradient of the plain step."""


# Why a variant may have another gradient than the plain step.
_EXPECTED = {"amp()": "half precision rounds it", "frozen": "frozen layers are in evaluation mode"}
_DROPOUT = "dropout draws other numbers for each chunk"
# The reason if the difference vanishes once only modules of these kinds are in training mode. cuDNN
# has no backward for a recurrent network in evaluation mode.
_REASONS: dict[Any, str] = {
    (_BatchNorm, nn.RNNBase): _DROPOUT,
    nn.RNNBase: "BatchNorm takes the statistics of other rows",
}
_NO_MEAN = "the loss is not a mean over rows: `return loss, count`, or are rows another dim?"


def compare(task: Task, parts: Parts, expected: str = "") -> str:
    """Return by how much the gradient of a variant differs from the plain one, and why.

    Return "" if they differ by rounding alone. Raise NotExact if they should be equal and are not.
    Of a batch that does not fit into memory, a part is compared.
    """
    try:
        size = difference(task, parts)
        reason = expected or find_reason(task, parts) if size else ""
    except Exception as error:
        if task.rows in (None, 1) or not is_out_of_memory(error):
            raise
    else:
        differs = f"the gradient differs by {size:.2g}: {reason}"
        check(reason in ("", expected, _DROPOUT), NotExact, differs)
        return reason and differs
    # Outside of the handler, where the tensors that the error held are free.
    return compare(resized(task, (task.rows or 1) // 2), parts, expected)


def find_reason(task: Task, parts: Parts) -> str:
    """Return why the gradient of a variant differs."""
    for kinds, reason in _REASONS.items():
        if not difference(task, parts, kinds):
            return reason
    is_random = difference(task, [], nn.RNNBase, seed=1)
    return "the function draws random numbers" if is_random else _NO_MEAN


def difference(task: Task, parts: Parts, kinds: Any = nn.Module, seed: int = 0) -> float:
    """Return the norm of the difference from the plain gradient, relative to the plain one.

    Return 0.0 if they differ by rounding alone, and nan for a variant without an update.
    """
    plain, found = gradient(task, [], kinds, 0), gradient(task, parts, kinds, seed)
    off = math.hypot(*(float((one - plain[name]).norm()) for name, one in found.items()))
    size = math.hypot(*(float(plain[name].norm()) for name in found)) or 1.0
    rounding = max(torch.finfo(p.dtype).eps for p in trainable_parameters(task.model)) ** 0.5
    return (0.0 if off / size <= rounding else off / size) if found else math.nan


def gradient(task: Task, parts: Parts, kinds: Any, seed: int) -> dict[str, Tensor]:
    """Return the gradient of a variant. Modules of these kinds are in training mode."""
    task, found = copied(task, seed), dict[str, Tensor]()
    for module in task.model.modules():
        module.training &= isinstance(module, kinds)
        if isinstance(module, nn.RNNBase) and kinds is not nn.Module:
            module.dropout = 0.0
    # A fused optimizer would divide the gradients by the loss scale itself.
    optimizer = torch.optim.SGD(trainable_parameters(task.model), fused=False)
    noted = ((n, p.grad) for n, p in task.model.named_parameters() if p.grad is not None)
    optimizer.register_step_pre_hook(lambda *_: found.update(noted))
    bind(task, parts, optimizer)()
    return found


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


def largest_batch(parts: Parts, task: Task, rows: int) -> int:
    """Return how many rows fit, to 1/16 of the batch and up to 64 times the batch; 0 if none."""

    def fails(count: int) -> bool:
        try:
            step = make_step(resized(task, count), parts)
            step()
            step()  # with the state of the optimizer
        except Exception:  # out of memory, or of the limits of a kernel
            return True
        return False

    unit = max(rows // 16, 1)
    return unit * bisect.bisect_left(range(unit, 64 * rows + 1, unit), True, key=fails)


def resized(task: Task, rows: int) -> Task:
    """Return the task with so many rows, which repeat the rows of the batch."""
    index = [row % (task.rows or 1) for row in range(rows)]

    def take(value: Any, dim: int) -> Any:
        if isinstance(value, (list, tuple)):
            return [value[row] for row in index]
        return value[index] if not dim else value[:, index]

    (batch,), _ = Batch((task.batch,), {}, task.dim).cut(take)
    return task._replace(batch=batch, rows=rows)


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
    lines += [f"{row.name}: {row.failure or row.note}" for row in rows if row.failure or row.note]
    return "\n".join(lines)
