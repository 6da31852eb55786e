"""``doctor MODULE:FUNCTION``: the time, the memory and the largest batch of a step with each part.

Every variant trains a copy of the same model on the same batch with AdamW, and the variants take
turns. The seconds are those of a step after a first one, the median of several. The peak memory
is, on an accelerator, all that torch has allocated; on a CPU, the tensors that the step makes. The
largest batch is found by running out of the memory of an accelerator, up to 64 times the batch.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainkit import amp, frozen, microbatch, recompute, train_step, trainable_parameters
from trainkit.chunks.batches import Batch, mapped
from trainkit.chunks.microbatching import is_out_of_memory
from trainkit.core.precision import current_device
from trainkit.layers.language import unwrapped
from trainkit.tools.doctor.facts import has_fused
from trainkit.tools.doctor.memory import peak_memory
from trainkit.tools.doctor.target import Target, WrongTarget, load

Row = dict[str, Any]
_NO_MEMORY = "out of memory"


class Variant(NamedTuple):
    """The parts of a step: the patterns of ``frozen`` and ``recompute``; four chunks if cut."""

    name: str
    has_amp: bool = False
    to_freeze: Sequence[str] = ()
    is_cut: bool = False
    to_recompute: Sequence[str] = ()


def run_trial(target: str, steps: int, device: str | None, layers: Sequence[str] | None) -> Row:
    """Measure the user's model without and with each part; the model stays as it was."""
    model, batch, loss_fn = load(target)
    place = torch.device(device) if device else current_device()
    if place.index:
        torch.get_device_module(place).set_device(place)  # for synchronize and empty_cache
    given = Target(model, mapped(batch, lambda tensor: tensor.to(place)), loss_fn)
    count = None
    with suppress(ValueError):  # microbatch says why this batch cannot be cut
        count = Batch((batch,), {}).rows
    variants = make_variants(model, layers, count)
    keys = {"name": "", "seconds": None, "peak_bytes": None, "largest_batch": None, "failure": ""}
    rows: list[Row] = [{**keys, "name": v.name, "seconds": []} for v in variants]
    pairs = list(zip(variants, rows, strict=True))
    for variant, row in pairs * steps:
        try:
            if not row["failure"]:
                seconds, row["peak_bytes"] = measure(variant, given, place, count)
                row["seconds"].append(seconds)
        except Exception as error:
            if variant.name == "plain" and not is_out_of_memory(error):
                raise  # the user's own error
            reason = f"{type(error).__name__}: {error}"
            row["failure"] = _NO_MEMORY if is_out_of_memory(error) else reason
    for variant, row in pairs:
        row["seconds"] = statistics.median(row["seconds"]) if row["seconds"] else None
        if place.type != "cpu" and count and row["failure"] in ("", _NO_MEMORY):
            row["largest_batch"] = largest_batch(variant, given, place, count)
    known = {"target": target, "device": str(place), "rows": count, "steps": steps}
    return {**known, "variants": rows, "advice": conclude(rows)}


def make_variants(
    model: nn.Module, layers: Sequence[str] | None, rows: int | None
) -> list[Variant]:
    """Return what to measure, by default with the longest list of modules as the blocks."""
    lower = blocks = layers or []
    if not layers:
        lists = [
            (isinstance(module, nn.ModuleList), len(module), name)  # a Sequential may be a model
            for name, module in unwrapped(model).named_modules()
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
        ]
        for _, length, name in sorted(lists, key=lambda item: item[:2])[-1:]:
            lower, blocks = [f"{name}[:{length // 2}]"], [f"{name}[:]"]
    try:
        with frozen(model, lower):
            if not layers and not trainable_parameters(model):  # of blocks that share parameters
                lower = []
    except ValueError as error:
        raise WrongTarget(f"--layers: {error}") from error
    variants = [
        Variant("plain"),
        Variant("amp()", has_amp=True),
        Variant(f"frozen {' '.join(lower)}", to_freeze=lower),
        Variant(f"microbatch({_quarter(rows)})", is_cut=True),
        Variant(f"recompute {' '.join(blocks)}", to_recompute=blocks),
        Variant("all of these", True, lower, True, blocks),
    ]
    return [variant for variant in variants if not variant.name.endswith(" ")]


def _quarter(rows: int | None) -> int:
    return max(-(-(rows or 1) // 4), 1)


def measure(
    variant: Variant, given: Target, place: torch.device, rows: int | None
) -> tuple[float, int]:
    """Return the seconds and the peak memory of a step after a first one, of a copy."""
    device = torch.get_device_module(place)
    gc.collect()  # frees what the last measurement has left
    getattr(device, "empty_cache", bool)()
    torch.manual_seed(0)
    model = copy.deepcopy(given.model).to(place).train()
    freezing = frozen(model, variant.to_freeze)
    with freezing:
        parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, fused=has_fused("AdamW", place.type))
    parts = (
        (amp(), variant.has_amp),
        (freezing, variant.to_freeze),
        (microbatch(_quarter(rows)), variant.is_cut),
        (recompute(model, variant.to_recompute), variant.to_recompute),
    )

    @train_step(optimizer, *(part for part, is_used in parts if is_used))
    def step(batch: Any) -> Any:
        # In containers of its own, since the function may take things out of them.
        return given.loss_fn(model, mapped(batch, lambda tensor: tensor))

    step(given.batch)
    device.synchronize()
    start = time.perf_counter()
    step(given.batch)
    device.synchronize()
    seconds = time.perf_counter() - start
    return seconds, peak_memory(lambda: step(given.batch), place)


def largest_batch(variant: Variant, given: Target, place: torch.device, rows: int) -> int:
    """Return how many rows fit, to within 1/16 and up to 64 times the batch; 0 if not one does."""
    fitting, failing, count = 0, 64 * rows + 1, rows
    while failing - fitting > max(1, fitting // 16):
        index = torch.arange(count, device=place) % rows

        def repeated(tensor: Tensor, index: Tensor = index) -> Tensor:
            return tensor[index] if tensor.dim() else tensor

        try:
            measure(variant, given._replace(batch=mapped(given.batch, repeated)), place, count)
            fitting = count
        except Exception:  # out of memory, or of the limits of a kernel
            failing = count
        count = min(2 * fitting or failing, (fitting + failing) // 2)
    return fitting


def conclude(rows: list[Row]) -> list[str]:
    """Return what follows from the measurements."""
    plain, half, *others = rows
    if plain["failure"]:
        fitting = [row["name"] for row in rows if not row["failure"]] or ["none of these"]
        return [f"This batch does not fit as it is; it does with {', '.join(fitting)}."]
    lines = []
    if half["seconds"]:
        ratio = half["seconds"] / plain["seconds"]
        verdict = "use it" if ratio < 0.95 else "leave it out, unless for its memory"
        lines.append(f"amp() takes {ratio:.2f}x the time: {verdict}.")
    exact = [row for row in others if row["name"].startswith(("microbatch", "recompute"))]
    limit = 0.9 * (plain["peak_bytes"] or 0)
    saving = [row for row in exact if row["seconds"] and row["peak_bytes"] < limit]
    if saving:
        best = min(saving, key=lambda row: row["seconds"])
        lines.append(f"If memory is short, use {best['name']} first.")
    return lines


def table(trial: Row) -> str:
    """Return the result of ``run_trial`` as text of 100 columns; nan was not measured."""
    title = "{target} on {device}, a batch of {rows} rows; the median of {steps} steps"
    lines = [title.format(**trial), ""]
    lines.append(
        f"{'':<40} {'seconds':>10} {'':>7} {'peak memory':>12} {'':>7} {'largest batch':>14}"
    )
    of_plain = [trial["variants"][0][key] or math.nan for key in ("seconds", "peak_bytes")]
    for row in trial["variants"]:
        seconds, peak = row["seconds"] or math.nan, row["peak_bytes"] or math.nan
        lines.append(
            f"{row['name']:<40} {seconds:10.4f} {seconds / of_plain[0]:6.2f}x "
            f"{peak / 2**20:8.1f} MiB {peak / of_plain[1]:6.2f}x {row['largest_batch'] or '-':>14}"
        )
    failures = [f"{row['name']}: {row['failure']}" for row in trial["variants"] if row["failure"]]
    return "\n".join([*lines, *failures, "", *trial["advice"]])
