"""Facts, rules and report, on machines that are not there."""

import sys
import types
from pathlib import Path

import pytest
import torch
from oracles import make_model

import trainkit
from trainkit.tools.doctor.machine import advise, find_facts, find_faults, report

FACTS = {
    "torch": "2.13.0+cpu",
    "cuda": None,
    "driver": None,
    "devices": {"cpu": "Some CPU"},
    "kind": "cpu",
    "capability": (),
    "failures": [],
    "amp_dtype": "bfloat16",
    "native_bfloat16": True,
    "float32_matmul": "high",
    "cpus": 8,
    "threads": 8,
}


def cpu(**facts):
    return types.SimpleNamespace(**{**FACTS, **facts})


def gpu(*capability, **facts):
    native = capability >= (8, 0)
    known = {"cuda": "12.6", "kind": "cuda", "driver": "560.35.03", "capability": capability}
    known |= {"native_bfloat16": native, "amp_dtype": "bfloat16" if native else "float16"}
    return cpu(**{**known, "devices": {"cuda:0": "Some GPU, 16.0 GiB"}, **facts})


MAC = cpu(kind="mps", amp_dtype="float16", native_bfloat16=False, devices={"mps": "arm"})
MI300 = gpu(cuda=None, native_bfloat16=True, amp_dtype="bfloat16")
HEALTHY = [
    (gpu(6, 0), "float16", "little speed"),
    (gpu(6, 1), "float32", "no faster"),
    (gpu(7, 0), "float16", "bfloat16 is emulated"),
    (gpu(7, 5), "float16", "with a loss scale"),
    (gpu(8, 0), "bfloat16", "no loss scale"),
    (MI300, "bfloat16", "no loss scale"),
    (MAC, "float16", "memory"),
    (cpu(), "bfloat16", "no loss scale"),
    (cpu(native_bfloat16=False), "float32", "AVX512_BF16"),
    (gpu(7, 5, float32_matmul="highest"), "float16", ""),  # which has no TF32
    (gpu(7, 5, threads=1), "float16", ""),
    (cpu(cuda="12.6"), "bfloat16", ""),  # a torch for CUDA without a GPU
    (cpu(threads=4), "bfloat16", ""),  # one for every core of two threads
]


@pytest.mark.parametrize(("machine", "dtype", "reason"), HEALTHY)
def test_each_machine_gets_the_dtype_that_is_good_for_it(machine, dtype, reason):
    advice = advise(machine)
    assert advice["amp_dtype"] == dtype and advice["loss_scale"] is (dtype == "float16")
    assert reason in advice["reason"] and ("amp()" in advice["code"][-1]) is (dtype != "float32")
    assert find_faults(machine) == []


@pytest.mark.parametrize("machine", [cpu(cpus=2), cpu(native_bfloat16=False, cpus=1)])
def test_the_code_of_the_advice_runs(machine):
    space = {name: getattr(trainkit, name) for name in trainkit.__all__}
    space |= {"torch": torch, "model": make_model(torch.float32), "dataset": torch.ones(4, 2, 4)}
    space |= {"DataLoader": torch.utils.data.DataLoader}
    step = "def step(x):\n    return model(x).mean()"
    exec("\n".join([*advise(machine)["code"], step]), space)
    assert [space["step"](x).updated for x in space["dataset"]] == [False, False, False, True]
    assert space["optimizer"].defaults["fused"] and space["loader"].num_workers == 1


FAULTS = [
    (cpu(driver="550.54"), "error", "built for CPUs", "install torch"),
    (cpu(cuda="13.0", driver="470.1"), "error", "CUDA 13.0; the NVIDIA driver is 470.1", "update"),
    (gpu(6, 0, failures=["cuda:0: no kernel image"]), "error", "cuda:0: no kernel", "CUDA 12.6"),
    (cpu(cpus=2), "warning", "8 threads on 2 CPUs", "OMP_NUM_THREADS=2"),
    (gpu(7, 5, cpus=2), "warning", "8 threads on 2 CPUs", "OMP_NUM_THREADS=2"),
    (cpu(threads=1), "warning", "1 threads on 8 CPUs", "OMP_NUM_THREADS=8"),
    (gpu(8, 0, float32_matmul="highest"), "hint", "TF32", 'float32_matmul_precision("high")'),
]


@pytest.mark.parametrize(("machine", "level", "found", "remedy"), FAULTS)
def test_what_is_wrong_is_found_and_nothing_else(machine, level, found, remedy):
    (finding,) = find_faults(machine)
    assert finding["level"] == level and found in finding["found"] and remedy in finding["remedy"]


def test_the_worst_comes_first():
    machine = gpu(8, 0, failures=["cuda:0: broken"], cpus=1, float32_matmul="highest")
    assert [finding["level"] for finding in find_faults(machine)] == ["error", "warning", "hint"]


@pytest.mark.parametrize("machine", [HEALTHY[0][0], FAULTS[0][0], FAULTS[-1][0]])
def test_the_report_has_facts_advice_and_findings(machine):
    found = {"machine": machine, "advice": advise(machine), "findings": find_faults(machine)}
    text = report(found)
    said = [text for finding in found["findings"] for text in finding.values()]
    for expected in (machine.torch, *machine.devices.values(), *found["advice"]["code"], *said):
        assert expected in text


def with_cuda(monkeypatch, name, capability, hip=None):
    """Have torch answer as if there were two of these GPUs, with 16 GiB each."""
    native = hip is not None or capability >= (8, 0)
    properties = types.SimpleNamespace(name=name, total_memory=2**34)
    monkeypatch.setattr(torch.version, "cuda", None if hip else "12.6")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    # A T4 answers True where emulation counts.
    answer = lambda including_emulation=True: including_emulation or native  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)


def with_file(monkeypatch, path, text):
    """Have this file, and no other, be read."""

    def read_text(found):
        if str(found) != path:
            raise FileNotFoundError(found)
        return text

    monkeypatch.setattr(Path, "read_text", read_text)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((9, 0), "bfloat16")])
def test_a_gpu_is_described(monkeypatch, capability, dtype):
    with_cuda(monkeypatch, "Some GPU", capability)
    found = find_facts()
    assert (found.kind, found.cuda, found.amp_dtype) == ("cuda", "12.6", dtype)
    assert found.capability == capability and found.native_bfloat16 is (dtype == "bfloat16")
    assert found.devices == {f"cuda:{i}": "Some GPU, 16.0 GiB" for i in range(2)}
    assert len(found.failures) == 2  # torch for CPUs cannot compute on it


def test_the_digits_of_an_amd_gpu_are_not_a_compute_capability(monkeypatch):
    with_cuda(monkeypatch, "AMD Instinct MI300X", (9, 4), hip="6.2")
    found = find_facts()
    assert found.capability == () and found.native_bfloat16 and found.cuda is None


def test_a_device_that_does_not_compute_says_why(monkeypatch):
    assert find_facts().failures == []
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", lambda self, other: self)
        assert "wrong" in find_facts().failures[0]
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda self, other: 1 / 0)
    assert find_facts().failures == [
        f"{device}: division by zero" for device in find_facts().devices
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="nvidia-smi is found by the shell")
def test_the_driver_is_found_without_torch_unless_the_gpus_are_hidden(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '| Driver Version: 550.54.15   CUDA |'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_facts().driver == "550.54.15"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_facts().driver is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    smi.write_text("#!/bin/sh\necho Failed to initialize NVML\nexit 18\n")
    assert find_facts().driver is None


@pytest.mark.parametrize(
    ("flags", "native"),
    [("avx2 avx512_bf16", True), ("amx_tile amx_bf16", True), ("bf16", True), ("avx512f", False)],
)
def test_bfloat16_of_a_cpu_is_read_from_its_flags(monkeypatch, flags, native):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with_file(monkeypatch, "/proc/cpuinfo", f"flags\t\t: fpu {flags}\n")
    assert find_facts().native_bfloat16 is native


@pytest.mark.parametrize(
    ("limit", "local_ranks", "cpus"),
    [("150000 100000\n", 1, 2), ("max 100000\n", 1, 8), ("", 4, 2), ("", 16, 1)],
)
def test_a_rank_has_its_share_of_the_cpus_of_its_container(monkeypatch, limit, local_ranks, cpus):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    with_file(monkeypatch, "/sys/fs/cgroup/cpu.max", limit)
    assert find_facts().cpus == cpus
