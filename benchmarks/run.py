"""Measures everything on one device, and writes tables and a plot into BENCHMARKS.md.

    python benchmarks/run.py                    on the CPU; make bench
    python benchmarks/run.py --device cuda      make bench DEVICE=cuda
    python benchmarks/run.py --quick --output copy.md     two rounds of a part, into a copy

Contenders take turns in one process. They take the same updates, which is checked. The tables show
the median time, and the median and both quartiles of the ratio to the loop in the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import platform
import re
from pathlib import Path

import growth
import steps
import torch
import update

ROOT = Path(__file__).resolve().parents[1]


def machine(device):
    """What was measured on, and when."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        found = re.search(r"model name\s*: (.*)", cpu)
        name = f"{found[1] if found else platform.processor()}, {torch.get_num_threads()} threads"
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "accelerate", "lightning-fabric", "pytorch-ignite"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return f"{name}; {', '.join(versions)}; {datetime.date.today()}."


def draw_growth(device, rounds, path):
    """How the cost grows, measured and drawn; the figures are stored beside the picture."""
    figures = growth.measure(device, rounds)
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    growth.draw(figures, path)


def step_tables(tasks, rounds):
    """On a CPU one table of all tasks; on a GPU one for each, with the times of host and GPU."""
    if all(task.device == "cpu" for task in tasks.values()):
        return steps.steps_table(tasks, rounds)
    return "\n\n".join(f"{title}:\n\n{steps.gpu_table(t, rounds)}" for title, t in tasks.items())


def gpt2_section(device, precisions, quick):
    """GPT-2, which a CPU takes seconds for."""
    if device == "cpu" or quick:
        return ""
    tasks = {f"GPT-2 in {name}": steps.gpt2(device, precision=p) for name, p in precisions.items()}
    return f"""
### A step of GPT-2

{step_tables(tasks, 5)}

124 M parameters, n = 4, micro-batches of 8 x 512 tokens, no dropout.
"""


def measured(device, quick, picture):
    """Everything on a device, in Markdown."""
    rounds, few = (2, 2) if quick else (80, 25) if device == "cpu" else (40, 10)
    threads = torch.get_num_threads()
    title = f"Measured on {machine(device)}"
    torch.set_num_threads(1)  # where there is hardly any work, a second one adds noise
    tiny = {
        "n = 4": steps.tiny(device),
        "n = 1": steps.tiny(device, 1),
        "n = 32": steps.tiny(device, 32),
        "n = 4, bfloat16": steps.tiny(device, precision=torch.bfloat16),
        "n = 4, float16": steps.tiny(device, precision=torch.float16),
    }
    tiny = step_tables(tiny, rounds)
    draw_growth(device, few, picture)
    torch.set_num_threads(threads)
    precisions = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if device == "cpu":
        del precisions["float16"]  # ten times as slow as float32 there: nobody trains so
    encoder = {
        name: steps.encoder(device, precision=precision) for name, precision in precisions.items()
    }
    sentences, tokens = steps.ENCODER_BATCH[device]
    sizes = {
        "1 M in 10 tensors": (10, 100_000),
        "10 M in 10 tensors": (10, 1_000_000),
        "40 M in 40 tensors": (40, 1_000_000),
        "100 M in 100 tensors": (100, 1_000_000),
        "4,000 in 400 tensors": (400, 10),
    }
    if device == "cuda":
        sizes["1 G in 100 tensors"] = (100, 10_000_000)
    if quick:
        encoder, sizes = {"float32": encoder["float32"]}, {"1 M in 10 tensors": (10, 100_000)}
    return f"""{title}

### A step of a tiny model, where all is overhead

{tiny}

Four layers of 8 x 8, clipping, one thread.
Microseconds per micro-batch, and the ratio to the correct loop by hand.

### A step of an encoder

{step_tables(encoder, few)}

A BERT of six layers, 384 wide, 11.4 M parameters;
n = 4, micro-batches of {sentences} sentences of {tokens} tokens, no dropout.
{gpt2_section(device, precisions, quick)}

### An update alone

{update.update_table(sizes, device, few)}

float16 scaler, clipping and AdamW; microseconds per update, the time of backward taken off.

### Memory of an update

{update.memory_table(device)}

10 M parameters, scaler and clipping. The gradients themselves are 1.00.

### How it grows

![Time of an update and of a micro-batch, relative to a loop by hand](docs/{picture.name})

Every contender without another optimizer in its name has fused AdamW."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--quick", action="store_true", help="two rounds of a part of it: that everything runs"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "BENCHMARKS.md",
        help="where the section is written (%(default)s)",
    )
    options = parser.parse_args()
    begin, end = f"<!-- measured: {options.device} -->\n", f"<!-- end: {options.device} -->"
    before, _, rest = options.output.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(
            f"{options.output} has no place for this: a line {begin.strip()} and a line {end}"
        )
    picture = options.output.parent / "docs" / f"benchmarks_{options.device}.png"
    picture.parent.mkdir(exist_ok=True)
    options.output.write_text(
        f"{before}{begin}{measured(options.device, options.quick, picture)}\n{end}{after}"
    )


if __name__ == "__main__":
    main()
