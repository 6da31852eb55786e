"""The facts about this machine that matter for training, from torch and the operating system."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import collect_env

from trainkit.core.precision import current_device, native_dtype

Machine = SimpleNamespace


@dataclass(frozen=True)
class Device:
    """One device to train on.

    Attributes:
        place: "cpu" or, for example, "cuda:0".
        memory: in bytes; 0 if unknown.
        capability: the compute capability of an NVIDIA GPU, (7, 5) for a T4; else empty.
        failure: the error of a product of two matrices on this device; "" without one.
    """

    place: str
    name: str
    memory: int
    capability: tuple[int, ...] = ()
    failure: str = ""


def examine() -> Machine:
    """Return the facts as attributes of one object.

    Attributes of the result:
        torch, python: versions.
        cuda: the version of CUDA that torch was built for; None without CUDA.
        driver: the version of the NVIDIA driver, even if torch cannot use it; None if there is no
            GPU or if CUDA_VISIBLE_DEVICES hides all of them.
        cuda_warning: what torch warned of when asked for CUDA: a driver that it cannot use.
        kind: the type of the devices to train on, for example "cuda".
        devices: a ``Device`` for each of them.
        amp_dtype: the dtype that ``amp()`` picks on them.
        native_bfloat16: whether they compute in bfloat16; None if unknown.
        fused: the optimizers whose ``fused=True`` works on them.
        float32_matmul: "highest" is full float32, "high" allows TF32.
        cpus: the CPUs for each rank, by affinity and by the quota of the container.
        threads: the number of threads that torch uses.
        ranks: WORLD_SIZE of torchrun; 1 without it.
    """
    find_driver: Any = collect_env.get_nvidia_driver_version
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    with warnings.catch_warnings(record=True) as caught:  # the findings say more than later ones
        warnings.simplefilter("always")
        torch.cuda.is_available()
        cuda_warning = " ".join(str(warning.message) for warning in caught)
        kind = current_device().type
        return Machine(
            torch=torch.__version__,
            python=platform.python_version(),
            cuda=torch.version.cuda,
            driver=None if is_hidden else find_driver(collect_env.run),
            cuda_warning=" ".join(cuda_warning.split()),
            kind=kind,
            devices=_devices(kind),
            amp_dtype=str(native_dtype(kind)).removeprefix("torch."),
            native_bfloat16=_native_bfloat16(kind),
            fused=[name for name in ("AdamW", "Adam", "SGD", "Adagrad") if has_fused(name, kind)],
            float32_matmul=torch.get_float32_matmul_precision(),
            cpus=max(_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1),
            threads=torch.get_num_threads(),
            ranks=int(os.environ.get("WORLD_SIZE", 1)),
        )


def _devices(kind: str) -> list[Device]:
    if kind in ("cpu", "mps"):
        has_sysconf = hasattr(os, "sysconf")  # not on Windows
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if has_sysconf else 0
        return [
            Device(kind, platform.processor() or platform.machine(), memory, (), _failure(kind))
        ]
    devices, module = [], torch.get_device_module(kind)
    for place in (f"{kind}:{index}" for index in range(module.device_count())):
        found = module.get_device_properties(place)
        # ROCm has the digits of an architecture in place of a compute capability.
        capability = (found.major, found.minor) if torch.version.cuda else ()
        devices.append(Device(place, found.name, found.total_memory, capability, _failure(place)))
    return devices


def _failure(place: str) -> str:
    try:
        matrix = torch.ones(16, 16, device=place)
        return "" if (matrix @ matrix).sum().item() == 16**3 else "the product is wrong"
    except Exception as error:
        return str(error).partition("\n")[0]


def _native_bfloat16(kind: str) -> bool | None:
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = set(_read("/proc/cpuinfo").split()) if kind == "cpu" else set()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & flags) if flags else None  # bf16: on ARM


def has_fused(optimizer: str, kind: str) -> bool:
    """Whether an optimizer of torch takes a step with ``fused=True`` on this type of device."""
    try:
        parameter = torch.ones(1, device=kind, requires_grad=True)
        parameter.grad = torch.ones_like(parameter)
        getattr(torch.optim, optimizer)([parameter], lr=0.1, fused=True).step()
        return True
    except Exception:  # torch raises several types where it has no kernel
        return False


def _cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count() or 1))
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    limit = -(-int(quota) // int(period)) if quota.isdigit() else sys.maxsize
    return min(len(affinity(0)), limit)


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text()
    return ""
