"""What a machine is, as far as training goes: facts, found by asking and by trying, and no opinion on them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import torch

from trainkit.core.plan import current_device, native_dtype


@dataclass(frozen=True)
class Device:
    """A device: memory in bytes, None where torch does not tell; ``capability`` is CUDA's, None elsewhere."""

    name: str
    total: int | None = None
    free: int | None = None
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Machine:
    """The facts that advice is drawn from.

    Attributes:
        python, torch: versions.
        cuda, rocm: the versions that torch was built for; None if for none.
        architectures: what its kernels were compiled for, as "sm_80".
        kind: the type of the devices to train on, as "cuda"; "cpu" if there are no others.
        devices: those of this kind.
        failure: what was raised by a product of matrices on the first of them; "" where it is right.
        amp_dtype: what ``amp()`` picks there.
        native_bfloat16: whether bfloat16 is computed there natively; None if not known.
        fused: the optimizers whose ``fused=True`` works there.
        compile_failure: what ``torch.compile`` raised; "" where it works, None if not tried.
        float32_matmul: "highest" is float32 throughout; "high" allows TF32.
        driver: the version of NVIDIA's driver, where it has a GPU, whether or not this torch can use it.
        cuda_warning: what torch said when it was asked for CUDA.
        visible: CUDA_VISIBLE_DEVICES.
        cpus: how many this process may use, by affinity and by the limit of its container.
        threads, omp_threads: how many torch uses, and OMP_NUM_THREADS.
        shared_memory: the size of /dev/shm in bytes; None where there is none.
        ranks, local_ranks, rank: as torchrun has set them; ``ranks`` is None without it.
    """

    python: str
    torch: str
    cuda: str | None
    rocm: str | None
    architectures: tuple[str, ...]
    kind: str
    devices: tuple[Device, ...]
    failure: str
    amp_dtype: str
    native_bfloat16: bool | None
    fused: tuple[str, ...]
    compile_failure: str | None
    float32_matmul: str
    driver: str | None
    cuda_warning: str
    visible: str | None
    cpus: int
    threads: int
    omp_threads: str | None
    shared_memory: int | None
    ranks: int | None
    local_ranks: int
    rank: int


def examine(try_compile: bool = True) -> Machine:
    """This machine. Trying ``torch.compile`` takes as long as everything else together, and up to a minute."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.is_available()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of what torch warns of later, such as an old GPU, findings say more
        kind = current_device().type
        return Machine(
            python=platform.python_version(),
            torch=torch.__version__,
            cuda=torch.version.cuda,
            rocm=torch.version.hip,
            architectures=tuple(torch.cuda.get_arch_list()),
            kind=kind,
            devices=_describe(kind),
            failure=_failure(kind),
            amp_dtype=str(native_dtype(kind)).removeprefix("torch."),
            native_bfloat16=_native_bfloat16(kind),
            fused=_fused(kind),
            compile_failure=_compile_failure(kind) if try_compile else None,
            float32_matmul=torch.get_float32_matmul_precision(),
            driver=_nvidia_driver(),
            cuda_warning=" ".join(" ".join(str(warning.message).split()) for warning in said),
            visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
            cpus=_cpus(),
            threads=torch.get_num_threads(),
            omp_threads=os.environ.get("OMP_NUM_THREADS"),
            shared_memory=shutil.disk_usage("/dev/shm").total
            if os.path.isdir("/dev/shm")
            else None,
            ranks=int(os.environ.get("WORLD_SIZE") or 0) or None,
            local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE") or 0) or 1,
            rank=int(os.environ.get("RANK") or 0),
        )


def _describe(kind: str) -> tuple[Device, ...]:
    if kind == "cpu":
        names = re.findall(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
        page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
        total = page * os.sysconf("SC_PHYS_PAGES") if page else None
        return (Device(names[0] if names else platform.processor() or platform.machine(), total),)
    module = torch.get_device_module(kind)
    if kind == "mps":
        return (Device(f"{platform.processor()} GPU", module.recommended_max_memory()),)
    found = []
    for index in range(module.device_count()):
        properties = module.get_device_properties(index)
        # Of ROCm these are the digits of an architecture, which mean something else.
        is_nvidia = kind == "cuda" and torch.version.hip is None
        capability = (properties.major, properties.minor) if is_nvidia else None
        try:
            free = module.mem_get_info(index)[0]
        except Exception:  # a device that torch cannot use is described all the same
            free = None
        found.append(Device(properties.name, properties.total_memory, free, capability))
    return tuple(found)


def _failure(kind: str) -> str:
    try:
        matrix = torch.ones(16, 16, device=kind)
        return (
            ""
            if (matrix @ matrix).sum().item() == 16**3
            else "a product of matrices comes out wrong"
        )
    except Exception as error:
        return str(error).partition("\n")[0]


def _native_bfloat16(kind: str) -> bool | None:
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind == "cpu" and (cpuinfo := _read("/proc/cpuinfo")):
        # As Linux calls them on x86, where one of two is enough, and on ARM.
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpuinfo.split()))
    return None


def _fused(kind: str) -> tuple[str, ...]:
    found = []
    for optimizer in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
        try:
            parameter = torch.ones(1, device=kind, requires_grad=True)
            parameter.grad = torch.ones_like(parameter)
            optimizer([parameter], lr=0.1, fused=True).step()
        except Exception:  # torch has several for what it has no kernel for
            continue
        found.append(optimizer.__name__)
    return tuple(found)


_TO_COMPILE = """
import sys, torch
try:
    x = torch.linspace(0, 1, 64, device=sys.argv[1], requires_grad=True)
    torch.compile(lambda x: (x.sin() + 1).sum())(x).backward()
    torch.testing.assert_close(x.grad, x.detach().cos())
except Exception as error:
    sys.exit(" ".join(str(error).strip().partition("\\n\\n")[0].split()))
"""


def _compile_failure(kind: str, seconds: float = 120) -> str:
    # By itself, since it may hang or take the process with it; and in a cache of its own, or nothing would be compiled.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", _TO_COMPILE, kind]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return f"not done after {seconds:.0f} seconds"
    last = done.stderr.strip().rpartition("\n")[2]
    return "" if done.returncode == 0 else last or f"exit status {done.returncode}"


def _nvidia_driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    except (OSError, subprocess.TimeoutExpired):
        pass
    # A container sees the host's /proc, and its GPUs only where it was given them.
    version = (
        re.search(r"\d+\.\d+(\.\d+)?", _read("/proc/driver/nvidia/version"))
        if glob("/dev/nvidia[0-9]*")
        else None
    )
    return version.group() if version else None


def _cpus(cgroup: str = "/sys/fs/cgroup") -> int:
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    version1 = [_read(f"{cgroup}/cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    quota, period, *_ = [*_read(f"{cgroup}/cpu.max").split(), *version1]
    if quota.isdigit() and period.isdigit():  # else "max", or -1, or there is none
        count = min(count, -(-int(quota) // int(period)))
    return max(count, 1)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
