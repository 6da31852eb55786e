"""The facts, on machines that are not there: torch answers as it does on each of them."""

import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from trainkit.tools.doctor.facts import examine, has_fused

GIB = 2**30
TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old\n(found version 11040)."


def with_cuda(monkeypatch, *gpus, hip=None):
    """Have torch answer as if these (name, capability) were there, with 16 GiB each."""
    native = hip is not None or any(capability >= (8, 0) for _, capability in gpus)

    def properties(place):
        name, (major, minor) = gpus[int(place.removeprefix("cuda:"))]
        return types.SimpleNamespace(name=name, major=major, minor=minor, total_memory=16 * GIB)

    monkeypatch.setattr(torch.version, "cuda", None if hip else "12.6")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    # A T4 answers True where emulation counts.
    answer = lambda including_emulation=True: including_emulation or native  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)


def with_files(monkeypatch, **texts):
    """Have these files, and no others, be read."""
    texts = {f"/{name.replace('__', '/')}": text for name, text in texts.items()}

    def read_text(path, *args, **kwargs):
        if str(path) not in texts:
            raise FileNotFoundError(path)
        return texts[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    [
        ("Tesla P100-PCIE-16GB", (6, 0), "float16"),
        ("Tesla T4", (7, 5), "float16"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "bfloat16"),
    ],
)
def test_a_gpu_is_described(monkeypatch, name, capability, dtype):
    with_cuda(monkeypatch, (name, capability), (name, capability))
    found = examine()
    assert (found.kind, found.cuda, found.amp_dtype) == ("cuda", "12.6", dtype)
    assert found.native_bfloat16 is (dtype == "bfloat16")
    assert [device.place for device in found.devices] == ["cuda:0", "cuda:1"]
    for device in found.devices:
        assert (device.name, device.memory, device.capability) == (name, 16 * GIB, capability)


def test_the_digits_of_an_amd_gpu_are_not_a_compute_capability(monkeypatch):
    with_cuda(monkeypatch, ("AMD Instinct MI300X", (9, 4)), hip="6.2")
    found = examine()
    assert found.devices[0].capability == () and found.native_bfloat16 and found.cuda is None


def test_a_device_that_does_not_compute_says_why(monkeypatch):
    assert examine().devices[0].failure == ""
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", lambda self, other: self)
        assert "wrong" in examine().devices[0].failure
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda self, other: 1 / 0)
    assert examine().devices[0].failure == "division by zero"


def test_the_warning_of_torch_about_the_driver_is_kept_in_one_line(monkeypatch):
    def is_available():
        warnings.warn(TOO_OLD, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert examine().cuda_warning == TOO_OLD.replace("\n", " ")


@pytest.mark.skipif(sys.platform != "linux", reason="nvidia-smi is found by the shell")
def test_the_driver_is_found_without_torch_unless_the_gpus_are_hidden(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho '| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA |'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert examine().driver == "550.54.15"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert examine().driver is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    smi.write_text("#!/bin/sh\necho Failed to initialize NVML\nexit 18\n")
    assert examine().driver is None


@pytest.mark.parametrize(
    ("flags", "native"),
    [("avx2 avx512_bf16", True), ("amx_tile amx_bf16", True), ("bf16", True), ("avx512f", False)],
)
def test_bfloat16_of_a_cpu_is_read_from_its_flags(monkeypatch, flags, native):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with_files(monkeypatch, proc__cpuinfo=f"flags\t\t: fpu {flags}\n")
    assert examine().native_bfloat16 is native


@pytest.mark.parametrize(
    ("limit", "local_ranks", "cpus"),
    [("150000 100000\n", 1, 2), ("max 100000\n", 1, 8), (None, 1, 8), (None, 4, 2), (None, 16, 1)],
)
def test_a_rank_has_its_share_of_the_cpus_of_its_container(monkeypatch, limit, local_ranks, cpus):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    with_files(monkeypatch, **({} if limit is None else {"sys__fs__cgroup__cpu.max": limit}))
    assert examine().cpus == cpus


def test_a_fused_optimizer_is_one_that_takes_a_step(monkeypatch):
    assert examine().fused == ["AdamW", "Adam", "SGD", "Adagrad"]
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: 1 / 0)
    assert examine().fused == ["AdamW", "Adam", "Adagrad"]
    assert not has_fused("AdamW", "no such device")
