"""The facts, on a machine that is not there: torch answers as it does on each of these."""

import sys
import types
import warnings

import pytest
import torch

from trainkit import machine as found_by
from trainkit.tools.doctor.machine import Device, examine

GIB = 2**30
TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old\n(found version 11040)."


def with_cuda(monkeypatch, *gpus, architectures=("sm_60", "sm_90"), hip=None):
    """Has torch answer as if these (name, capability, GiB) were there; what really runs, runs on the CPU."""
    monkeypatch.setattr(torch.version, "cuda", None if hip else "12.6")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda index: (gpus[index][2] * GIB // 2, gpus[index][2] * GIB)
    )

    # A T4 answers True where emulation counts.
    native = hip is not None or any(capability >= (8, 0) for _, capability, _ in gpus)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )

    def properties(index):
        name, (major, minor), size = gpus[index]
        return types.SimpleNamespace(name=name, major=major, minor=minor, total_memory=size * GIB)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(found_by, "_failure", lambda kind: "")
    monkeypatch.setattr(found_by, "_fused", lambda kind: ("AdamW",))


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "native"),
    [
        ("Tesla P100-PCIE-16GB", (6, 0), "float16", False),
        ("Tesla V100-SXM2-16GB", (7, 0), "float16", False),
        ("Tesla T4", (7, 5), "float16", False),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "bfloat16", True),
        ("NVIDIA H100 80GB HBM3", (9, 0), "bfloat16", True),
    ],
)
def test_a_gpu_is_described(monkeypatch, name, capability, dtype, native):
    with_cuda(monkeypatch, (name, capability, 16), (name, capability, 16))
    found = examine(try_compile=False)
    assert (
        found.kind == "cuda" and found.devices == (Device(name, 16 * GIB, 8 * GIB, capability),) * 2
    )
    assert (found.amp_dtype, found.native_bfloat16, found.cuda, found.compile_failure) == (
        dtype,
        native,
        "12.6",
        None,
    )


def test_the_digits_of_an_amd_gpu_are_no_compute_capability(monkeypatch):
    with_cuda(monkeypatch, ("AMD Instinct MI300X", (9, 4), 192), hip="6.2")
    found = examine(try_compile=False)
    assert (
        found.devices[0].capability is None
        and found.native_bfloat16
        and found.rocm == "6.2"
        and found.cuda is None
    )


def test_a_gpu_that_does_not_tell_its_memory_is_described_all_the_same(monkeypatch):
    with_cuda(monkeypatch, ("Tesla T4", (7, 5), 16))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: 1 / 0)
    assert examine(try_compile=False).devices == (Device("Tesla T4", 16 * GIB, None, (7, 5)),)


def test_a_mac(monkeypatch):
    with_cuda(monkeypatch)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 11 * GIB)
    found = examine(try_compile=False)
    assert found.kind == "mps" and found.amp_dtype == "float16" and found.native_bfloat16 is None
    assert [device.total for device in found.devices] == [11 * GIB]


def test_what_torch_says_of_the_driver_is_kept_in_one_line(monkeypatch):
    def asked():
        warnings.warn(TOO_OLD, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", asked)
    assert examine(try_compile=False).cuda_warning == TOO_OLD.replace("\n", " ")


def test_this_machine_is_as_it_is(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = examine(try_compile=False)
    assert (
        found.torch == torch.__version__
        and found.python == sys.version.split()[0]
        and found.failure == ""
    )
    assert (found.ranks, found.local_ranks, found.rank, found.omp_threads, found.threads) == (
        4,
        2,
        3,
        "1",
        1,
    )
    assert (
        found.cpus >= 1 and len(found.devices) >= 1 and all(device.name for device in found.devices)
    )


@pytest.mark.parametrize(
    ("flags", "native"),
    [("avx2 avx512_bf16", True), ("amx_tile amx_bf16", True), ("bf16", True), ("avx512f", False)],
)
def test_bfloat16_of_a_cpu_is_read_from_its_flags(monkeypatch, flags, native):
    text = f"model name\t: Some CPU @ 2.00GHz\nflags\t\t: fpu {flags}\nmodel name\t: Some CPU @ 2.00GHz\n"
    monkeypatch.setattr(found_by, "_read", lambda path: text if path == "/proc/cpuinfo" else "")
    assert found_by._native_bfloat16("cpu") is native
    assert found_by._describe("cpu")[0].name == "Some CPU @ 2.00GHz"


def test_a_fused_optimizer_is_one_that_takes_a_step(monkeypatch):
    assert set(found_by._fused("cpu")) == {"Adam", "AdamW", "SGD", "Adagrad"}
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: 1 / 0)
    assert set(found_by._fused("cpu")) == {"Adam", "AdamW", "Adagrad"}
    assert found_by._fused("no such device") == ()


def test_a_device_that_does_not_compute_says_why(monkeypatch):
    assert found_by._failure("cpu") == "" and "no such device" in found_by._failure(
        "no such device"
    )
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda self, other: self)
    assert "wrong" in found_by._failure("cpu")


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
)
def test_the_limit_of_a_container_counts(monkeypatch, tmp_path, files, limit):
    monkeypatch.setattr(found_by.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert found_by._cpus(str(tmp_path)) == limit


def test_the_driver_is_that_of_a_gpu_that_is_there(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 550.54.15\necho 550.54.15\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert found_by._nvidia_driver() == "550.54.15"
    smi.write_text(
        "#!/bin/sh\necho Failed to initialize NVML: Driver/library version mismatch\nexit 18\n"
    )
    said = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
    )
    monkeypatch.setattr(found_by, "_read", lambda path: said)
    monkeypatch.setattr(found_by, "glob", lambda pattern: ["/dev/nvidia0"])
    assert found_by._nvidia_driver() == "535.104.05"
    monkeypatch.setattr(
        found_by, "glob", lambda pattern: []
    )  # as in a container to which it was not given
    assert found_by._nvidia_driver() is None


def test_compiling_is_tried_by_itself(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # as if it worked, without what it takes
    assert found_by._compile_failure("cpu") == ""
    assert found_by._compile_failure("cpu", 0.01) == "not done after 0 seconds"


def test_compiling_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    failure = found_by._compile_failure("cpu")
    assert "compiler" in failure and "\n" not in failure and "TORCHDYNAMO" not in failure


def test_a_process_that_dies_gives_its_status(monkeypatch):
    monkeypatch.setattr(found_by, "_TO_COMPILE", "import os; os._exit(7)")
    assert found_by._compile_failure("cpu") == "exit status 7"
