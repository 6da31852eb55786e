"""``python -m trainkit doctor MODULE:FUNCTION``: what each part does for your own model, in time and memory.

Each part takes steps from the same parameters, on the same batch, with AdamW, one part after the other and again. A time is
that of a step after the first, and the median of several. Memory is the peak of such a step: on an accelerator all that torch
has allocated, parameters and optimizer included; on a CPU what the step itself allocates, as torch.profiler records it.
With ``--json``: ``target``, ``device``, ``rows`` of the batch, ``steps``, ``variants``, each a ``Measurement``, and ``advice``.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import gc
import importlib
import inspect
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from trainkit.compose import train_step
from trainkit.freezing import frozen, trainable_parameters
from trainkit.microbatching import Batch, is_out_of_memory
from trainkit.parts import amp, microbatch
from trainkit.recomputation import recompute


class WrongTarget(ValueError):
    """What was asked for on the command line cannot be tried; the message says what can."""


@dataclasses.dataclass
class Measurement:
    """What was measured with some parts: None where it was not, or could not be; ``failure`` says why."""

    name: str
    seconds: float | None = None
    peak_bytes: int | None = None
    largest_batch: int | None = None
    failure: str = ""


@dataclasses.dataclass(frozen=True)
class _Variant:
    """Parts of a step. ``cut``: the batch goes through it in four."""

    name: str
    freezing: frozen
    parts: tuple[Any, ...] = ()
    cut: bool = False


def run_trial(target: str, steps: int, device: str | None, layers: Sequence[str] | None, as_json: bool) -> str:
    """Measures what the function returns with each part, and all of them; returns a table, or a JSON object."""
    if steps < 1:
        raise WrongTarget(f"--steps is the number to take the median of, got {steps}: `--steps 5`")
    model, batch, loss_fn = _made(target, find_function(target))
    place = _place(device)
    trial = _Trial(model.to(place).train(), mapped(batch, lambda tensor: tensor.to(place)), loss_fn, place)
    variants = _variants(model, layers)
    measured = trial.measure(variants, steps)
    advice = _conclusions(measured)
    if as_json:
        known = {"target": target, "device": str(place), "rows": trial.rows, "steps": steps}
        return json.dumps({**known, "variants": [dataclasses.asdict(m) for m in measured], "advice": advice}, indent=2)
    size = "" if trial.rows is None else f", a batch of {trial.rows} rows"
    counted = "what a step allocates" if place.type == "cpu" else "all that is allocated"
    lines = [f"{target} on {place}{size}; the median of {steps} steps; memory: the peak of {counted}", "", *_table(measured)]
    return "\n".join([*lines, "", *advice])


def find_function(target: str) -> Callable[[], Any]:
    """The function that MODULE:FUNCTION names; WrongTarget, with the corrected form, where there is none."""
    path, _, name = target.partition(":")
    module_name = path.removesuffix(".py").strip("./").replace("/", ".")
    if path != module_name or not name.isidentifier():
        corrected = f"{module_name or 'train'}:{name if name.isidentifier() else 'make_model'}"
        raise WrongTarget(f"{target!r} is not MODULE:FUNCTION: `python -m trainkit doctor {corrected}`")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        here = sorted(path.stem for path in Path().glob("*.py"))
        near = difflib.get_close_matches(module_name, here, 1) or here[:1] or ["train"]
        raise WrongTarget(f"there is no module {error.name!r} here: `python -m trainkit doctor {near[0]}:{name}`") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module_name]
        near = difflib.get_close_matches(name, known, 1) or known[:1] or ["make_model"]
        what = "has no function" if function is None else f"has a {type(function).__name__}, and no function,"
        raise WrongTarget(f"{module_name} {what} {name!r}: `python -m trainkit doctor {module_name}:{near[0]}`")
    needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty and p.kind not in (2, 4)]
    if needed:
        raise WrongTarget(f"{name} is called without arguments, and needs {', '.join(needed)}: give them defaults")
    return function  # type: ignore[no-any-return]


def _made(target: str, function: Callable[[], Any]) -> tuple[nn.Module, Any, Callable[..., Any] | None]:
    made = function()
    model, batch, loss_fn = (*made, None, None, None)[:3] if isinstance(made, (tuple, list)) else (None, None, None)
    is_batch = isinstance(batch, (Tensor, tuple, list, Mapping))
    fits = isinstance(made, (tuple, list)) and len(made) in (2, 3) and isinstance(model, nn.Module) and is_batch
    if not fits or not (loss_fn is None or callable(loss_fn)):
        came = [type(item).__name__ for item in made] if isinstance(made, (tuple, list)) else type(made).__name__
        raise WrongTarget(
            f"{target} returned {came}: `return model, batch` or `return model, batch, loss_fn`, a module, a tensor, tuple or "
            "mapping, and a function of both"
        )
    return model, batch, loss_fn


def _place(device: str | None) -> torch.device:
    if device is None:
        return (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")
    try:
        return torch.ones(1, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch has both for a device that is not there
        reason = str(error).partition("\n")[0]
        raise WrongTarget(f"nothing runs on --device {device}: {reason}; `--device cpu` runs everywhere") from error


def _variants(model: nn.Module, layers: Sequence[str] | None) -> list[_Variant]:
    frozen_layers = recomputed = list(layers or [])
    if layers is None:
        lists = [(name, m) for kind in (nn.ModuleList, nn.Sequential) for name, m in model.named_modules() if type(m) is kind]
        # Of all the containers the longest; a ModuleList before a Sequential, which holds other things than blocks too.
        name, blocks = max(lists, key=lambda item: (type(item[1]) is nn.ModuleList, len(item[1])), default=("", nn.ModuleList()))
        frozen_layers, recomputed = ([f"{name}[:{len(blocks) // 2}]"], [f"{name}[:]"]) if len(blocks) > 1 else ([], [])
    try:
        nothing, freezing, recomputing = frozen(model, []), frozen(model, frozen_layers), recompute(model, recomputed)
    except ValueError as error:
        raise WrongTarget(f"--layers: {error}") from error
    variants = [_Variant("plain", nothing), _Variant("amp()", nothing, (amp(),))]
    if frozen_layers:
        variants.append(_Variant(f"frozen {' '.join(frozen_layers)}", freezing, (freezing,)))
    variants.append(_Variant("microbatch, in four", nothing, cut=True))
    if recomputed:
        variants.append(_Variant(f"recompute {' '.join(recomputed)}", nothing, (recomputing,)))
    return [*variants, _Variant("all of these", freezing, (amp(), freezing, recomputing), cut=True)]


class _Trial:
    """A model and a batch that steps are taken with, and the parameters that each begins from."""

    def __init__(self, model: nn.Module, batch: Any, loss_fn: Callable[..., Any] | None, place: torch.device) -> None:
        self.model, self.batch, self.loss_fn, self.place = model, batch, loss_fn, place
        self.module = torch.get_device_module(place)
        self.values = [*model.parameters(), *model.buffers()]
        self.found = [value.detach().to("cpu", copy=True) for value in self.values]
        self.rows: int | None = None
        try:
            self.rows = Batch((batch,), {}).rows
        except ValueError:  # no tensors, or of different lengths: there is nothing to cut, and microbatch says so
            pass

    def measure(self, variants: list[_Variant], steps: int) -> list[Measurement]:
        measured = [Measurement(variant.name) for variant in variants]
        seconds: list[list[float]] = [[] for _ in variants]
        for turn in range(steps):
            for variant, result, times in zip(variants, measured, seconds, strict=True):
                if not result.failure:
                    outcome = self.attempt(variant, self.batch, self.rows, memory=turn == 0)
                    if isinstance(outcome, str):
                        result.failure = outcome
                    else:
                        times.append(outcome[0])
                        result.peak_bytes = result.peak_bytes or outcome[1]
        for variant, result, times in zip(variants, measured, seconds, strict=True):
            result.seconds = statistics.median(times) if times else None
            if self.place.type != "cpu" and self.rows and result.failure in ("", _NO_MEMORY):
                result.largest_batch = self.largest(variant, self.rows)
        return measured

    def largest(self, variant: _Variant, rows: int) -> int:
        def fits(count: int) -> bool:
            batch = mapped(self.batch, lambda t: t[torch.arange(count, device=t.device) % rows] if t.dim() else t)
            return not isinstance(self.attempt(variant, batch, count), str)

        return largest_that(fits, rows)

    def attempt(self, variant: _Variant, batch: Any, rows: int | None, memory: bool = False) -> tuple[float, int | None] | str:
        """Seconds and peak memory of a step; or why there are none."""
        try:
            return self.take(variant, batch, rows, memory)
        except Exception as error:
            if not is_out_of_memory(error) and (variant.name == "plain" or isinstance(error, WrongTarget)):
                raise
            failure = _NO_MEMORY if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        gc.collect()  # only here, where the error is gone, its frames hold no activations
        getattr(self.module, "empty_cache", bool)()
        return failure

    def take(self, variant: _Variant, batch: Any, rows: int | None, memory: bool) -> tuple[float, int | None]:
        with torch.no_grad():
            for value, found in zip(self.values, self.found, strict=True):
                value.copy_(found)
                value.grad = None
        torch.manual_seed(0)
        with variant.freezing:
            parameters = trainable_parameters(self.model)
        try:
            optimizer = torch.optim.AdamW(parameters, fused=True)
        except RuntimeError:  # not on this device
            optimizer = torch.optim.AdamW(parameters)
        parts = (*variant.parts, microbatch(max(-(-(rows or 1) // 4), 1))) if variant.cut else variant.parts
        step = train_step(optimizer, *parts)(self.loss)
        synchronize = getattr(self.module, "synchronize", bool)
        step(batch)  # which makes the state of the optimizer, and whatever is made once
        synchronize()
        getattr(self.module, "reset_peak_memory_stats", bool)()
        start = time.perf_counter()
        step(batch)
        synchronize()
        seconds = time.perf_counter() - start
        if self.place.type == "cpu":
            return seconds, allocated_by(lambda: step(batch)) if memory else None
        return seconds, getattr(self.module, "max_memory_allocated", lambda: None)()

    def loss(self, batch: Any) -> Any:
        if self.loss_fn is not None:
            return self.loss_fn(self.model, batch)
        if isinstance(batch, Mapping):
            output = self.model(**batch)
        else:
            output = self.model(*batch) if isinstance(batch, (tuple, list)) else self.model(batch)
        if getattr(output, "loss", None) is None and not (isinstance(output, Mapping) and "loss" in output):
            raise WrongTarget(
                f"the model returns a {type(output).__name__} without a loss: `return model, batch, loss_fn`, where "
                "`loss_fn(model, batch)` is one"
            )
        return output


_NO_MEMORY = "out of memory"


def largest_that(fits: Callable[[int], bool], rows: int, most: int = 2**20) -> int:
    """The largest number of rows that fits, to within 1/16, and at most ``most``; 0 where one does not."""
    fitting, failing = 0, most + 1
    while fitting < most and failing - fitting > max(1, fitting // 16):
        count = min(rows, most) if not fitting else min(2 * fitting, most) if failing > most else (fitting + failing) // 2
        if not fitting and failing <= most:
            count = failing // 2
        if count and fits(count):
            fitting = count
        else:
            failing = count
    return fitting


def allocated_by(function: Callable[[], Any]) -> int:
    """The most bytes of CPU memory that were allocated at once while a function ran, over those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = [event["args"] for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    totals = [change["Total Allocated"] for change in changes]
    return max(totals) - (totals[0] - changes[0]["Bytes"]) if changes else 0


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A batch with a function applied to each of its tensors, in tuples, lists and mappings at any depth."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [mapped(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        found = copy.copy(value) if isinstance(value, MutableMapping) else dict(value)
        for name, item in value.items():
            found[name] = mapped(item, function)
        return found
    return value


def _table(measured: list[Measurement]) -> list[str]:
    plain, width = measured[0], max(30, *(len(m.name) for m in measured))
    lines = [f"{'':<{width}} {'seconds':>10} {'':>6} {'memory':>10} {'':>6} {'largest batch':>14}"]
    for m in measured:
        seconds = "-" if m.seconds is None else f"{m.seconds:.4f}"
        peak = "-" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:.1f} MiB"
        times, memory = _ratio(m.seconds, plain.seconds), _ratio(m.peak_bytes, plain.peak_bytes)
        largest = "-" if m.largest_batch is None else str(m.largest_batch)
        lines.append(f"{m.name:<{width}} {seconds:>10} {times:>6} {peak:>10} {memory:>6} {largest:>14}")
    return lines + [f"{m.name}: {' '.join(m.failure.split())}" for m in measured if m.failure]


def _ratio(value: float | None, plain: float | None) -> str:
    return f"{value / plain:.2f}x" if value is not None and plain else "-"


def _conclusions(measured: list[Measurement]) -> list[str]:
    plain, amp_, *others = measured
    lines = []
    if plain.seconds and amp_.seconds:
        ratio = amp_.seconds / plain.seconds
        line = f"amp() takes {ratio:.2f}x the time of plain: " + ("use it." if ratio < 0.95 else "leave it out, unless for memory.")
        lines.append(line)
    exact = [m for m in others if m.name.startswith(("microbatch", "recompute")) and m.seconds and m.peak_bytes]
    saving = [m for m in exact if plain.peak_bytes is None or (m.peak_bytes or 0) < 0.9 * plain.peak_bytes]
    if saving:
        best = min(saving, key=lambda m: m.seconds or 0)
        memory = _ratio(best.peak_bytes, plain.peak_bytes)
        lines.append(f"Where memory is short, {best.name} first: {memory} of it in {_ratio(best.seconds, plain.seconds)} the time.")
    return lines
