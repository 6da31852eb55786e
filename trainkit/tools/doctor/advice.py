"""What to use on a machine, and what to change: two tables of rules, read from top to bottom.

A condition looks at the machine ``m`` and at one of its devices ``d``; the texts may quote both.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

from trainkit.tools.doctor.facts import Device, Machine

Condition = Callable[[Machine, Device], Any]

_FAST = ((5, 3), (6, 0), (6, 2))  # fast in float16, although without tensor cores

# Condition, whether amp() pays, why. The first rule that applies to the first device counts.
# Source: the throughput of float16 by compute capability,
# https://docs.nvidia.com/cuda/archive/12.6.0/cuda-c-programming-guide/#arithmetic-instructions
PRECISION: tuple[tuple[Condition, bool, str], ...] = (
    (lambda m, d: m.native_bfloat16, True, "this device computes in it; no loss scale needed"),
    (lambda m, d: m.kind == "cpu", False, "this CPU emulates bfloat16: no AVX512_BF16, no AMX"),
    (lambda m, d: d.capability >= (7, 0), True, "with a loss scale; bfloat16 is emulated, slow"),
    (lambda m, d: d.capability in _FAST, True, "with a loss scale; less memory, little speed"),
    (lambda m, d: d.capability, False, "float16 is no faster here than float32"),
    (lambda m, d: True, True, "it halves the memory of activations"),
)

_INSTALL = "https://pytorch.org/get-started/locally"

# Level, condition, what was found and why it matters, what to do; the worst first. Every rule that
# applies is a finding.
FAULTS: tuple[tuple[str, Condition, str, str], ...] = (
    (
        "error",
        lambda m, d: m.kind == "cpu" and m.driver and not m.cuda,
        "torch was built without CUDA and leaves the NVIDIA GPU idle (driver {m.driver})",
        f"install torch for CUDA: {_INSTALL}",
    ),
    (
        "error",
        lambda m, d: m.kind == "cpu" and m.cuda and (m.driver or m.cuda_warning),
        "torch for CUDA {m.cuda} cannot use the NVIDIA driver ({m.driver}). {m.cuda_warning}",
        f"`nvidia-smi`; update the driver or install torch for an older CUDA: {_INSTALL}",
    ),
    (
        "error",
        lambda m, d: d.failure,
        "a product of two small matrices fails on {d.place} ({d.name}): {d.failure}",
        "no kernel image: install a torch that was built for this GPU (the one for CUDA 12.6 has "
        f"compute capabilities 5.0 to 9.0: {_INSTALL}); else: `nvidia-smi`, restart",
    ),
    (
        "warning",
        lambda m, d: m.threads > m.cpus or (m.kind == "cpu" and 2 * m.threads < m.cpus),
        "{m.threads} threads on {m.cpus} CPUs: more wait for each other, fewer leave CPUs idle",
        "`export OMP_NUM_THREADS={m.cpus}`; torchrun sets 1 if nothing is set",
    ),
    (
        "hint",
        lambda m, d: len(m.devices) > 1 and m.ranks == 1,
        "one process trains on one device, and there are several",
        "`torchrun --nproc-per-node gpu train.py`, with the model in DistributedDataParallel",
    ),
    (
        "hint",
        lambda m, d: m.float32_matmul == "highest" and d.capability >= (8, 0),
        "TF32 is off, the default of torch: float32 products do not use the tensor cores",
        '`torch.set_float32_matmul_precision("high")`, if 10 bits of mantissa are enough',
    ),
)


def advise(machine: Machine) -> dict[str, Any]:
    """Return what to use on the first device; float32 means no ``amp()``."""
    rules = (rule for rule in PRECISION if rule[0](machine, machine.devices[0]))
    _, use_amp, reason = next(rules)
    dtype = machine.amp_dtype if use_amp else "float32"
    workers = max(machine.cpus - 1, 1)  # one CPU is for the process that trains
    fused = ", fused=True" if "AdamW" in machine.fused else ""
    code = [
        f"loader = DataLoader(dataset, num_workers={workers}, pin_memory={machine.kind == 'cuda'})",
        f"optimizer = torch.optim.AdamW(trainable_parameters(model){fused})",
        f"@train_step(optimizer, accumulate(4), {'amp(), ' * use_amp}max_norm=1.0)",
    ]
    return {"amp_dtype": dtype, "loss_scale": dtype == "float16", "reason": reason, "code": code}


def find_faults(machine: Machine) -> list[dict[str, str]]:
    """Return what to change, the worst first: ``level``, ``found`` and ``remedy``."""
    findings: list[dict[str, str]] = []
    for level, applies, found, remedy in FAULTS:
        for device in machine.devices:
            if applies(machine, device):
                texts = [text.format(m=machine, d=device) for text in (found, remedy)]
                finding = {"level": level, "found": texts[0], "remedy": texts[1]}
                findings += [finding] if finding not in findings else []
    return findings


def report(machine: Machine, advice: dict[str, Any], findings: list[dict[str, str]]) -> str:
    """Return facts, advice and findings as text of at most 100 columns."""
    rows = [(name, str(value)) for name, value in vars(machine).items() if name != "devices"]
    rows += [(d.place, f"{d.name}, {d.memory / 2**30:.1f} GiB") for d in machine.devices]
    rows += [("", ""), ("use", f"{advice['amp_dtype']}: {advice['reason']}")]
    rows += [("", line) for line in advice["code"]]
    for finding in findings:
        rows += [("", ""), (finding["level"], finding["found"]), ("", finding["remedy"])]
    wrap = textwrap.TextWrapper(100, subsequent_indent=" " * 17, break_long_words=False)
    return "\n".join(wrap.fill(f"{name:<17}{text}") for name, text in rows)
