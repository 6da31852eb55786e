"""What to use on this machine: the facts, the rules that follow from them, and the report."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import collect_env

from trainkit.core.precision import current_device, native_dtype


def examine() -> dict[str, Any]:
    """Return the facts, what to use and what to change, as ``--json`` prints them."""
    facts = find_facts()
    return {"machine": facts, "advice": advise(facts), "findings": find_faults(facts)}


def find_facts() -> SimpleNamespace:
    """Return what matters for training, from torch and the operating system."""
    find_driver: Any = collect_env.get_nvidia_driver_version
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    device = current_device()
    half, names = native_dtype(device.type), _name_devices(device.type)
    flags = set(_read("/proc/cpuinfo").split()) & {"avx512_bf16", "amx_bf16", "bf16"}  # bf16: ARM
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return SimpleNamespace(
        torch=torch.__version__,
        cuda=torch.version.cuda,  # that torch was built for
        driver=None if is_hidden else find_driver(collect_env.run),  # even if torch cannot use it
        devices=names,
        kind=device.type,
        capability=torch.cuda.get_device_capability() if is_nvidia else (),
        failures=[f"{name}: {error}" for name in names if (error := _find_failure(name))],
        amp_dtype=str(half).removeprefix("torch."),
        native_bfloat16=half == torch.bfloat16 and (device.type != "cpu" or bool(flags)),
        float32_matmul=torch.get_float32_matmul_precision(),  # "highest" is without TF32
        cpus=max(_count_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1),  # of a rank
        threads=torch.get_num_threads(),
    )


def _name_devices(kind: str) -> dict[str, str]:
    """Return the name and the memory of each device of a type."""
    if kind in ("cpu", "mps"):
        return {kind: platform.processor() or platform.machine()}
    module = torch.get_device_module(kind)
    found = [module.get_device_properties(index) for index in range(module.device_count())]
    names = [f"{device.name}, {device.total_memory / 2**30:.1f} GiB" for device in found]
    return {f"{kind}:{index}": name for index, name in enumerate(names)}


def _find_failure(device: str) -> str:
    """Return the error of a product of two matrices on a device; "" if it is right."""
    try:
        matrix = torch.ones(16, 16, device=device)
        return "" if (matrix @ matrix).sum().item() == 16**3 else "the product is wrong"
    except Exception as error:
        return str(error).partition("\n")[0]


def _count_cpus() -> int:
    """Return how many CPUs the affinity and the quota of the container leave."""
    affinity = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count() or 1))
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    limit = -(-int(quota) // int(period)) if quota.isdigit() else sys.maxsize
    return min(len(affinity(0)), limit)


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text()
    return ""


def advise(m: SimpleNamespace) -> dict[str, Any]:
    """Return what to use on the first device; float32 means no ``amp()``."""
    # Condition, whether amp() pays, why: the first rule that applies counts. Source:
    # https://docs.nvidia.com/cuda/archive/12.6.0/cuda-c-programming-guide/#arithmetic-instructions
    rules = (
        (m.native_bfloat16, True, "this device computes in it; no loss scale needed"),
        (m.kind == "cpu", False, "this CPU emulates bfloat16: no AVX512_BF16, no AMX"),
        (m.capability >= (7, 0), True, "with a loss scale; bfloat16 is emulated, slow"),
        (m.capability == (6, 0), True, "with a loss scale; less memory, little speed"),
        (m.capability, False, "float16 is no faster here than float32"),
        (True, True, "it halves the memory of activations"),
    )
    use_amp, reason = next(rule[1:] for rule in rules if rule[0])
    dtype = m.amp_dtype if use_amp else "float32"
    workers = max(m.cpus - 1, 1)  # one CPU is for the process that trains
    code = [  # fused: on every type of device that torch supports
        f"loader = DataLoader(dataset, num_workers={workers}, pin_memory={m.kind == 'cuda'})",
        "optimizer = torch.optim.AdamW(trainable_parameters(model), fused=True)",
        f"@train_step(optimizer, accumulate(4), {'amp(), ' * use_amp}max_norm=1.0)",
    ]
    return {"amp_dtype": dtype, "loss_scale": dtype == "float16", "reason": reason, "code": code}


def find_faults(m: SimpleNamespace) -> list[dict[str, str]]:
    """Return what to change, the worst first: its level, what was found, and the remedy."""
    found = []
    if m.kind == "cpu" and m.driver:
        built = f"CUDA {m.cuda}" if m.cuda else "CPUs alone"
        text = f"torch is built for {built}; the NVIDIA driver is {m.driver}"
        found += [("error", text, _WRONG_TORCH)]
    if m.failures:
        text = f"a product of two small matrices fails on {'; '.join(m.failures)}"
        found += [("error", text, _NO_KERNEL)]
    if m.threads > m.cpus or (m.kind == "cpu" and m.cpus > 2 * m.threads):
        text = f"{m.threads} threads on {m.cpus} CPUs: too many wait, too few leave CPUs idle"
        remedy = f"`export OMP_NUM_THREADS={m.cpus}`; torchrun sets 1 if nothing is set"
        found += [("warning", text, remedy)]
    if m.float32_matmul == "highest" and m.capability >= (8, 0):
        found += [("hint", _TF32_OFF, _TF32_ON)]
    return [{"level": level, "found": text, "remedy": remedy} for level, text, remedy in found]


_INSTALL = "https://pytorch.org/get-started/locally"
_WRONG_TORCH = (
    "`nvidia-smi`; update the driver, or install torch for a CUDA it supports: " + _INSTALL
)
_NO_KERNEL = (
    "no kernel image: install a torch that was built for this GPU (the one for CUDA 12.6 has "
    f"compute capabilities 5.0 to 9.0: {_INSTALL}); else: `nvidia-smi`, restart"
)
_TF32_OFF = "TF32 is off, the default of torch: float32 products do not use the tensor cores"
_TF32_ON = '`torch.set_float32_matmul_precision("high")`, if 10 bits of mantissa are enough'


def report(found: dict[str, Any]) -> str:
    """Return the result of ``examine`` as text."""
    machine, advice = dict(vars(found["machine"])), found["advice"]
    rows = [*machine.pop("devices").items(), *machine.items()]
    rows += [("", ""), ("use", f"{advice['amp_dtype']}: {advice['reason']}")]
    rows += [("", line) for line in advice["code"]]
    for finding in found["findings"]:
        rows += [("", ""), (finding["level"], finding["found"]), ("", finding["remedy"])]
    return "\n".join(f"{name:<17}{text}" for name, text in rows)
