"""The rules, on facts that are made up here."""

import pytest
import torch
from oracles import make_model

import trainkit
from trainkit.tools.doctor.advice import advise, find_faults, report
from trainkit.tools.doctor.facts import Device, Machine

GIB = 2**30
FACTS = {
    "torch": "2.13.0+cpu",
    "python": "3.11.7",
    "cuda": None,
    "driver": None,
    "cuda_warning": "",
    "kind": "cpu",
    "devices": [Device("cpu", "Some CPU", 64 * GIB)],
    "amp_dtype": "bfloat16",
    "native_bfloat16": True,
    "fused": ["AdamW", "Adam", "SGD", "Adagrad"],
    "float32_matmul": "high",
    "cpus": 8,
    "threads": 8,
    "ranks": 1,
}


def cpu(**facts):
    return Machine(**{**FACTS, **facts})


def gpu(name, capability, failure="", count=1, **facts):
    native = capability >= (8, 0)
    devices = [Device(f"cuda:{i}", name, 16 * GIB, capability, failure) for i in range(count)]
    known = {"cuda": "12.6", "kind": "cuda", "driver": "560.35.03", "devices": devices}
    known |= {"native_bfloat16": native, "amp_dtype": "bfloat16" if native else "float16"}
    return cpu(**{**known, **facts})


def t4(**facts):
    return gpu("Tesla T4", (7, 5), **facts)


def a100(**facts):
    return gpu("NVIDIA A100-SXM4-80GB", (8, 0), **facts)


MAC = cpu(
    kind="mps", amp_dtype="float16", native_bfloat16=None, devices=[Device("mps", "arm", 11 * GIB)]
)
MI300 = gpu("AMD Instinct MI300X", (), cuda=None, native_bfloat16=True, amp_dtype="bfloat16")
HEALTHY = [
    (gpu("Tesla P100-PCIE-16GB", (6, 0)), "float16", "little speed"),
    (gpu("NVIDIA GeForce GTX 1080 Ti", (6, 1)), "float32", "no faster"),
    (gpu("Tesla V100-SXM2-16GB", (7, 0)), "float16", "bfloat16 is emulated"),
    (t4(), "float16", "with a loss scale"),
    (a100(), "bfloat16", "no loss scale"),
    (gpu("NVIDIA H100 80GB HBM3", (9, 0)), "bfloat16", "no loss scale"),
    (MI300, "bfloat16", "no loss scale"),
    (MAC, "float16", "memory"),
    (cpu(), "bfloat16", "no loss scale"),
    (cpu(native_bfloat16=False), "float32", "AVX512_BF16"),
    (cpu(native_bfloat16=None), "float32", "AVX512_BF16"),
]


@pytest.mark.parametrize(("machine", "dtype", "reason"), HEALTHY)
def test_each_machine_gets_the_dtype_that_is_good_for_it(machine, dtype, reason):
    advice = advise(machine)
    assert advice["amp_dtype"] == dtype and advice["loss_scale"] is (dtype == "float16")
    assert reason in advice["reason"] and ("amp()" in advice["code"][-1]) is (dtype != "float32")
    assert find_faults(machine) == []


@pytest.mark.parametrize("machine", [cpu(), cpu(native_bfloat16=False), cpu(fused=[]), cpu(cpus=1)])
def test_the_code_of_the_advice_runs(machine):
    space = {name: getattr(trainkit, name) for name in trainkit.__all__}
    space |= {"torch": torch, "model": make_model(torch.float32), "dataset": torch.ones(4, 2, 4)}
    space |= {"DataLoader": torch.utils.data.DataLoader}
    step = "def step(x):\n    return model(x).mean()"
    exec("\n".join([*advise(machine)["code"], step]), space)
    assert [space["step"](x).updated for x in space["dataset"]] == [False, False, False, True]
    assert bool(space["optimizer"].defaults["fused"]) is bool(machine.fused)
    assert space["loader"].num_workers == max(machine.cpus - 1, 1)


FAULTS = [
    (cpu(driver="550.54"), "error", "without CUDA", "install torch for CUDA"),
    (
        cpu(cuda="13.0", driver="470.1", cuda_warning="too old"),
        "error",
        "(470.1). too old",
        "driver",
    ),
    (cpu(cuda="13.0", driver="470.1"), "error", "torch for CUDA 13.0 cannot use", "nvidia-smi"),
    (cpu(cuda="13.0", cuda_warning="broken"), "error", "broken", "nvidia-smi"),
    (gpu("P100", (6, 0), "no kernel image"), "error", "(P100): no kernel image", "CUDA 12.6"),
    (t4(failure="CUDA error", count=2, ranks=2), "error", "fails on cuda:1", "nvidia-smi"),
    (cpu(cpus=2), "warning", "8 threads on 2 CPUs", "OMP_NUM_THREADS=2"),
    (t4(cpus=2), "warning", "8 threads on 2 CPUs", "OMP_NUM_THREADS=2"),
    (cpu(threads=1), "warning", "1 threads on 8 CPUs", "OMP_NUM_THREADS=8"),
    (t4(count=2), "hint", "one process trains on one device", "torchrun"),
    (a100(float32_matmul="highest"), "hint", "TF32 is off", 'set_float32_matmul_precision("high")'),
]


@pytest.mark.parametrize(("machine", "level", "found", "remedy"), FAULTS)
def test_what_is_wrong_is_found_and_nothing_else(machine, level, found, remedy):
    *_, finding = findings = find_faults(machine)
    assert len(findings) == sum(bool(device.failure) for device in machine.devices) or 1
    assert finding["level"] == level and found in finding["found"] and remedy in finding["remedy"]


@pytest.mark.parametrize(
    "machine",
    [
        t4(count=2, ranks=2),
        t4(float32_matmul="highest"),  # which has no TF32
        t4(threads=1),
        cpu(cuda="12.6"),  # a torch for CUDA without a GPU
        cpu(threads=4),  # one for every core of two threads
    ],
)
def test_what_is_as_it_should_be_is_not_found(machine):
    assert find_faults(machine) == []


def test_the_worst_comes_first_and_a_rule_about_the_machine_once():
    machine = a100(count=2, failure="broken", cpus=1, float32_matmul="highest")
    levels = [finding["level"] for finding in find_faults(machine)]
    assert levels == ["error", "error", "warning", "hint", "hint"]


@pytest.mark.parametrize("machine", [row[0] for row in HEALTHY + FAULTS])
def test_the_report_has_it_all_in_100_columns(machine):
    advice, findings = advise(machine), find_faults(machine)
    text = report(machine, advice, findings)
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    said = [text for finding in findings for text in finding.values()]
    for expected in (machine.torch, machine.devices[0].name, *advice["code"], *said):
        assert " ".join(expected.split()) in words
