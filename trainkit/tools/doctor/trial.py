"""``python -m trainkit doctor MODULE:FUNCTION``: what each part does for your own model, in time and memory.

Each part takes steps from the same parameters, on the same batch, with AdamW, one part after the other and again. A time is
that of a step after another, and the median of several. Memory is the peak of such a step: on an accelerator all that torch
has allocated, parameters and optimizer included; on a CPU what the step itself allocates, as torch.profiler records it. The
largest batch is looked for on an accelerator, by running out of its memory, and up to 64 times the batch given.
With ``--json``: ``target``, ``device``, ``rows`` of the batch, ``steps``, ``variants``, each a ``Measurement``, and ``advice``.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import json
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import nn

from trainkit.chunks.batches import Batch, mapped
from trainkit.chunks.microbatching import is_out_of_memory, microbatch
from trainkit.core.compose import train_step
from trainkit.core.parts import amp
from trainkit.layers.freezing import frozen, trainable_parameters
from trainkit.layers.language import unwrapped
from trainkit.layers.recomputation import recompute
from trainkit.tools.doctor.allocation import allocated_by
from trainkit.tools.doctor.targets import WrongTarget, find_function, make, place_of

T = TypeVar("T")


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


def run_trial(
    target: str, steps: int, device: str | None, layers: Sequence[str] | None, as_json: bool
) -> str:
    """Measures what the function returns with each part, and all of them; returns a table, or a JSON object."""
    if steps < 1:
        raise WrongTarget(f"--steps is the number to take the median of, got {steps}: `--steps 5`")
    model, batch, loss_fn = make(target, find_function(target))
    place = place_of(device)
    modes = [(module, module.training) for module in model.modules()]
    trial = _Trial(
        model.to(place).train(), mapped(batch, lambda tensor: tensor.to(place)), loss_fn, place
    )
    try:
        variants = _variants(model, layers, trial.rows)
        measured = trial.measure(variants, steps)
    finally:  # in a notebook it may be the model that training goes on with
        trial.restore()
        for module, mode in modes:
            module.training = mode
    advice = _conclusions(measured)
    if as_json:
        known = {"target": target, "device": str(place), "rows": trial.rows, "steps": steps}
        return json.dumps(
            {**known, "variants": [dataclasses.asdict(m) for m in measured], "advice": advice},
            indent=2,
        )
    size = "" if trial.rows is None else f", a batch of {trial.rows} rows"
    counted = "what a step allocates" if place.type == "cpu" else "all that is allocated"
    lines = [
        f"{target} on {place}{size}",
        f"the median of {steps} steps; memory: the peak of {counted}",
        "",
        *_table(measured),
    ]
    return "\n".join([*lines, "", *advice])


def _variants(model: nn.Module, layers: Sequence[str] | None, rows: int | None) -> list[_Variant]:
    frozen_layers = recomputed = list(layers or [])
    if layers is None:
        lists = [
            (name, m)
            for name, m in unwrapped(model).named_modules()
            if isinstance(m, (nn.ModuleList, nn.Sequential))
        ]
        # The longest; a ModuleList before a Sequential, which may hold other things than blocks.
        name, blocks = max(
            lists,
            key=lambda item: (isinstance(item[1], nn.ModuleList), len(item[1])),
            default=("", []),
        )
        frozen_layers, recomputed = (
            ([f"{name}[:{len(blocks) // 2}]"], [f"{name}[:]"]) if len(blocks) > 1 else ([], [])
        )
    try:
        nothing, freezing, recomputing = (
            frozen(model, []),
            frozen(model, frozen_layers),
            recompute(model, recomputed),
        )
    except ValueError as error:
        raise WrongTarget(f"--layers: {error}") from error
    with freezing:
        trained = trainable_parameters(model)
    if layers is None and not trained:  # the blocks are shared, or nothing else has parameters
        freezing, frozen_layers = nothing, []
    variants = [_Variant("plain", nothing), _Variant("amp()", nothing, (amp(),))]
    if frozen_layers:
        variants.append(_Variant(f"frozen {' '.join(frozen_layers)}", freezing, (freezing,)))
    variants.append(_Variant(f"microbatch({_quarter(rows)})", nothing, cut=True))
    if recomputed:
        variants.append(_Variant(f"recompute {' '.join(recomputed)}", nothing, (recomputing,)))
    return [*variants, _Variant("all of these", freezing, (amp(), freezing, recomputing), cut=True)]


def _quarter(rows: int | None) -> int:
    return max(-(-(rows or 1) // 4), 1)


class _Trial:
    """A model and a batch that steps are taken with, and the parameters that each begins from."""

    def __init__(
        self, model: nn.Module, batch: Any, loss_fn: Callable[..., Any] | None, place: torch.device
    ) -> None:
        self.model, self.batch, self.loss_fn, self.place = model, batch, loss_fn, place
        self.module = torch.get_device_module(place)
        if place.index:
            self.module.set_device(place)  # whose memory is then asked for
        self.values = [*model.parameters(), *model.buffers()]
        self.found = [value.detach().to("cpu", copy=True) for value in self.values]
        self.rows: int | None = None
        with suppress(
            ValueError
        ):  # without tensors, or of different lengths, there is nothing to cut, and microbatch says so
            self.rows = Batch((batch,), {}).rows

    def measure(self, variants: list[_Variant], steps: int) -> list[Measurement]:
        measured = [Measurement(variant.name) for variant in variants]
        seconds: list[list[float]] = [[] for _ in variants]
        for variant, result in zip(variants, measured, strict=True):  # which also warms up
            result.peak_bytes, result.failure = self.attempt(
                self.peak, variant, self.batch, self.rows
            )
        for _ in range(steps):
            for variant, result, times in zip(variants, measured, seconds, strict=True):
                if not result.failure:
                    taken, result.failure = self.attempt(
                        self.seconds, variant, self.batch, self.rows
                    )
                    times += [] if taken is None else [taken]
        for variant, result, times in zip(variants, measured, seconds, strict=True):
            result.seconds = statistics.median(times) if times else None
            if self.place.type != "cpu" and self.rows and result.failure in ("", _NO_MEMORY):
                result.largest_batch = self.largest(variant, self.rows)
        return measured

    def largest(self, variant: _Variant, rows: int) -> int:
        def fits(count: int) -> bool:
            batch = mapped(
                self.batch,
                lambda t: t[torch.arange(count, device=t.device) % rows] if t.dim() else t,
            )
            return not self.attempt(self.peak, variant, batch, count)[1]

        return largest_that(fits, rows)

    def attempt(
        self,
        measure: Callable[[Callable[[], Any]], T],
        variant: _Variant,
        batch: Any,
        rows: int | None,
    ) -> tuple[T | None, str]:
        """What is measured of a step, or None; and why it could not be, or nothing."""
        try:
            return measure(self.step(variant, batch, rows)), ""
        except Exception as error:
            is_own = (
                variant.name == "plain" and batch is self.batch
            )  # or the user's function, and not due to a part or a size
            if is_own and not is_out_of_memory(error):
                raise
            return None, _NO_MEMORY if is_out_of_memory(
                error
            ) else f"{type(error).__name__}: {error}"

    def step(self, variant: _Variant, batch: Any, rows: int | None) -> Callable[[], Any]:
        """A step from the parameters found, after a first one, which made the state of the optimizer."""
        gc.collect()  # or what an earlier step has left, whole or out of memory, would count for this one
        getattr(self.module, "empty_cache", bool)()
        self.restore()
        torch.manual_seed(0)
        with variant.freezing:
            parameters = trainable_parameters(self.model)
        if not parameters:
            raise ValueError("nothing is left to train: name less, `--layers PATTERN`")
        try:
            optimizer = torch.optim.AdamW(parameters, fused=True)
        except RuntimeError:  # not on this device
            optimizer = torch.optim.AdamW(parameters)
        parts = (*variant.parts, microbatch(_quarter(rows))) if variant.cut else variant.parts
        step = train_step(optimizer, *parts)(self.loss)
        step(batch)
        return lambda: step(batch)

    def restore(self) -> None:
        """Puts back the parameters and buffers found, without gradients."""
        with torch.no_grad():
            for value, found in zip(self.values, self.found, strict=True):
                value.copy_(found)
                value.grad = None

    def seconds(self, step: Callable[[], Any]) -> float:
        synchronize = getattr(self.module, "synchronize", bool)
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        return time.perf_counter() - start

    def peak(self, step: Callable[[], Any]) -> int | None:
        if self.place.type == "cpu":
            return allocated_by(step)
        getattr(self.module, "reset_peak_memory_stats", bool)()
        step()
        return getattr(self.module, "max_memory_allocated", lambda: None)()

    def loss(self, batch: Any) -> Any:
        batch = mapped(
            batch, lambda tensor: tensor
        )  # the function may take things out of it, and it comes again
        if self.loss_fn is not None:
            return self.loss_fn(self.model, batch)
        keywords = batch if isinstance(batch, Mapping) else {}
        values = () if keywords else batch if isinstance(batch, (tuple, list)) else (batch,)
        try:
            inspect.signature(self.model.forward).bind(*values, **keywords)
        except TypeError as error:
            raise WrongTarget(
                f"the batch does not fit the forward of a {type(self.model).__name__} ({error}): `return model, batch, loss_fn`, "
                "where `loss_fn(model, batch)` is the loss"
            ) from error
        output = self.model(*values, **keywords)
        if getattr(output, "loss", None) is None and not (
            isinstance(output, Mapping) and "loss" in output
        ):
            raise WrongTarget(
                f"the model returns a {type(output).__name__} without a loss: put labels into the batch, or "
                "`return model, batch, loss_fn`, where `loss_fn(model, batch)` is one"
            )
        return output


_NO_MEMORY = "out of memory"


def largest_that(fits: Callable[[int], bool], rows: int, times: int = 64) -> int:
    """The largest number of rows that fits, to within 1/16; no more than ``times * rows`` are tried. 0 where not one fits."""
    fitting, failing = 0, rows
    while failing <= times * rows and fits(failing):
        fitting, failing = failing, 2 * failing
    while failing <= times * rows and failing - fitting > max(1, fitting // 16):
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if fits(middle) else (fitting, middle)
    return fitting


def _table(measured: list[Measurement]) -> list[str]:
    plain, width = measured[0], max(30, *(len(m.name) for m in measured))
    lines = [f"{'':<{width}} {'seconds':>10} {'':>6} {'memory':>10} {'':>6} {'largest batch':>14}"]
    for m in measured:
        seconds = "-" if m.seconds is None else f"{m.seconds:.4f}"
        peak = "-" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:.1f} MiB"
        times, memory = _ratio(m.seconds, plain.seconds), _ratio(m.peak_bytes, plain.peak_bytes)
        largest = "-" if m.largest_batch is None else str(m.largest_batch)
        lines.append(
            f"{m.name:<{width}} {seconds:>10} {times:>6} {peak:>10} {memory:>6} {largest:>14}"
        )
    failures = {
        m.failure: ", ".join(other.name for other in measured if other.failure == m.failure)
        for m in measured
        if m.failure
    }
    return lines + [
        line
        for failure, names in failures.items()
        for line in textwrap.wrap(f"{names}: {failure}", 100)
    ]


def _ratio(value: float | None, plain: float | None) -> str:
    return f"{value / plain:.2f}x" if value is not None and plain else "-"


def _conclusions(measured: list[Measurement]) -> list[str]:
    plain, half, *others = measured
    if plain.failure:
        fitting = [m.name for m in measured if not m.failure]
        return [
            f"This batch does not fit as it is; it does with {', '.join(fitting) or 'none of these'}."
        ]
    lines = []
    if plain.seconds and half.seconds:
        ratio = half.seconds / plain.seconds
        saves = half.peak_bytes and plain.peak_bytes and half.peak_bytes < 0.95 * plain.peak_bytes
        verdict = (
            "use it"
            if ratio < 0.95
            else "leave it out, unless for memory"
            if saves
            else "leave it out"
        )
        lines.append(f"amp() takes {ratio:.2f}x the time: {verdict}.")
    exact = [
        m
        for m in others
        if m.name.startswith(("microbatch", "recompute")) and m.seconds and m.peak_bytes
    ]
    saving = [m for m in exact if plain.peak_bytes and (m.peak_bytes or 0) < 0.9 * plain.peak_bytes]
    if saving:
        best = min(saving, key=lambda m: m.seconds or 0)
        memory, times = (
            _ratio(best.peak_bytes, plain.peak_bytes),
            _ratio(best.seconds, plain.seconds),
        )
        lines.append(f"Where memory is short, first {best.name}: {memory} memory, {times} time.")
    return lines
