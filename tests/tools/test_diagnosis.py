"""The advice and the findings that are drawn from facts, which are made up here."""

import dataclasses
import json

import pytest
import torch
from oracles import make_model

import trainkit
from trainkit import diagnosis
from trainkit.tools.commands import main
from trainkit.tools.doctor.diagnosis import advise, find_faults, report
from trainkit.tools.doctor.machine import Device, Machine

GIB = 2**30
CPU = Machine(
    python="3.11.7",
    torch="2.13.0+cpu",
    cuda=None,
    rocm=None,
    architectures=(),
    kind="cpu",
    devices=(Device("Some CPU", 64 * GIB),),
    failure="",
    amp_dtype="bfloat16",
    native_bfloat16=True,
    fused=("Adam", "AdamW", "SGD", "Adagrad"),
    compile_failure="",
    float32_matmul="high",
    driver=None,
    cuda_warning="",
    visible=None,
    cpus=8,
    threads=8,
    omp_threads=None,
    shared_memory=8 * GIB,
    ranks=None,
    local_ranks=1,
    rank=0,
)
ARCHITECTURES = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "compute_90")


def gpu(name, capability, **facts):
    is_native = capability >= (8, 0)
    device = Device(name, 16 * GIB, 15 * GIB, capability)
    known = {
        "cuda": "12.6",
        "architectures": ARCHITECTURES,
        "kind": "cuda",
        "devices": (device,),
        "driver": "560.35.03",
    }
    known |= {"native_bfloat16": is_native, "amp_dtype": "bfloat16" if is_native else "float16"}
    return dataclasses.replace(CPU, **{**known, **facts})


T4, P100, A100 = (
    gpu("Tesla T4", (7, 5)),
    gpu("Tesla P100-PCIE-16GB", (6, 0)),
    gpu("NVIDIA A100-SXM4-80GB", (8, 0)),
)
V100, H100 = gpu("Tesla V100-SXM2-16GB", (7, 0)), gpu("NVIDIA H100 80GB HBM3", (9, 0))
GTX1080, GTX1660 = (
    gpu("NVIDIA GeForce GTX 1080 Ti", (6, 1)),
    gpu("NVIDIA GeForce GTX 1660 Ti", (7, 5)),
)
MAC = dataclasses.replace(
    CPU,
    kind="mps",
    amp_dtype="float16",
    native_bfloat16=None,
    devices=(Device("arm GPU", 11 * GIB),),
)
MI300 = dataclasses.replace(
    A100, cuda=None, rocm="6.2", driver=None, devices=(Device("AMD Instinct MI300X", 192 * GIB),)
)
OLD_CPU = dataclasses.replace(CPU, native_bfloat16=False)
EVERY = [CPU, OLD_CPU, T4, P100, V100, A100, H100, GTX1080, GTX1660, MAC, MI300]


@pytest.mark.parametrize(
    ("machine", "dtype", "loss_scale", "tensor_cores", "words"),
    [
        (P100, "float16", True, False, "little more speed"),
        (GTX1080, "float32", False, False, "no faster"),
        (V100, "float16", True, True, "bfloat16 is emulated"),
        (T4, "float16", True, True, "with a loss scale"),
        (GTX1660, "float16", True, False, "no tensor cores"),
        (A100, "bfloat16", False, True, "no loss scale"),
        (H100, "bfloat16", False, True, "no loss scale"),
        (MI300, "bfloat16", False, None, "memory"),
        (MAC, "float16", True, None, "needs a loss scale"),
        (CPU, "bfloat16", False, False, "natively"),
        (OLD_CPU, "float32", False, False, "AVX512_BF16"),
    ],
)
def test_each_machine_gets_the_dtype_that_is_good_for_it(
    machine, dtype, loss_scale, tensor_cores, words
):
    advice = advise(machine)
    assert (advice.amp_dtype, advice.loss_scale, advice.tensor_cores) == (
        dtype,
        loss_scale,
        tensor_cores,
    )
    assert words in advice.reason
    assert ("amp()" in advice.code[1]) == (dtype != "float32")
    assert find_faults(machine) == []


@pytest.mark.parametrize("machine", [CPU, OLD_CPU, dataclasses.replace(CPU, fused=())])
def test_the_code_of_the_advice_runs(machine):
    space = {
        "torch": torch,
        "model": make_model(torch.float32),
        **{name: getattr(trainkit, name) for name in trainkit.__all__},
    }
    step = "def step(x):\n    return model(x).mean()"
    exec("\n".join([*advise(machine).code, step]), space)
    assert [space["step"](torch.ones(2, 4)).updated for _ in range(4)] == [
        False,
        False,
        False,
        True,
    ]
    assert bool(space["optimizer"].defaults["fused"]) == bool(machine.fused)


FAULTS = [
    (
        dataclasses.replace(CPU, driver="550.54"),
        "error",
        "a torch without CUDA",
        "install torch for CUDA",
    ),
    (
        dataclasses.replace(CPU, cuda="13.0", driver="470.1", cuda_warning="driver is too old"),
        "error",
        "driver 470.1",
        "update",
    ),
    (
        dataclasses.replace(CPU, cuda="13.0", driver="470.1"),
        "error",
        "torch for CUDA 13.0 cannot use",
        "nvidia-smi",
    ),
    (
        dataclasses.replace(CPU, cuda="12.6", driver="550.54", visible=""),
        "warning",
        "CUDA_VISIBLE_DEVICES=''",
        "unset",
    ),
    (
        dataclasses.replace(P100, architectures=("sm_75", "sm_80")),
        "error",
        "is sm_60, which",
        "CUDA 12.6",
    ),
    (
        dataclasses.replace(P100, architectures=("sm_75",), failure="no kernel image"),
        "error",
        "is sm_60, which",
        "CUDA 12.6",
    ),
    (
        dataclasses.replace(H100, architectures=("sm_80",)),
        "error",
        "is sm_90, which",
        "install a torch that has sm_90",
    ),
    (
        dataclasses.replace(T4, failure="CUDA error: unspecified"),
        "error",
        "product of two small matrices",
        "restart",
    ),
    (
        dataclasses.replace(T4, failure="CUDA out of memory. Tried"),
        "error",
        "product of two small matrices",
        "free its memory",
    ),
    (
        dataclasses.replace(T4, devices=(Device("T4", 16 * GIB, 2 * GIB, (7, 5)),)),
        "warning",
        "14.0 GiB of 16.0",
        "nvidia-smi",
    ),
    (
        dataclasses.replace(T4, devices=T4.devices * 2),
        "hint",
        "2 devices, and one process",
        "--nproc-per-node 2",
    ),
    (
        dataclasses.replace(T4, ranks=2, local_ranks=2),
        "warning",
        "2 ranks, and 1 devices",
        "--nproc-per-node 1",
    ),
    (
        dataclasses.replace(A100, float32_matmul="highest"),
        "hint",
        "TF32 is off",
        'set_float32_matmul_precision("high")',
    ),
    (
        dataclasses.replace(T4, compile_failure="no Triton"),
        "warning",
        "torch.compile",
        "it needs Triton",
    ),
    (
        dataclasses.replace(P100, compile_failure="too old"),
        "warning",
        "torch.compile",
        "compute capability 7.0",
    ),
    (
        dataclasses.replace(CPU, compile_failure="no g++"),
        "warning",
        "torch.compile",
        "C++ compiler",
    ),
    (dataclasses.replace(CPU, cpus=2), "warning", "8 threads on 2 CPUs", "OMP_NUM_THREADS=2"),
    (
        dataclasses.replace(CPU, threads=1, omp_threads="1", local_ranks=2),
        "hint",
        "OMP_NUM_THREADS=1",
        "OMP_NUM_THREADS=4",
    ),
    (
        dataclasses.replace(CPU, shared_memory=64 * 2**20),
        "warning",
        "/dev/shm has 64 MiB",
        "--shm-size",
    ),
]


@pytest.mark.parametrize(("machine", "level", "found", "remedy"), FAULTS)
def test_what_is_wrong_is_found_and_nothing_else(machine, level, found, remedy):
    (finding,) = find_faults(machine)
    assert (
        finding.level == level
        and found in finding.found
        and remedy in finding.remedy
        and finding.why
    )


@pytest.mark.parametrize(
    "machine",
    [
        dataclasses.replace(T4, devices=T4.devices * 2, ranks=2, local_ranks=2),
        dataclasses.replace(T4, float32_matmul="highest"),  # which has no TF32
        dataclasses.replace(T4, compile_failure=None),
        dataclasses.replace(CPU, cuda="12.6"),  # a torch for CUDA without a GPU
        dataclasses.replace(CPU, threads=4),  # of two threads on each core
        dataclasses.replace(CPU, threads=4, omp_threads="4"),
        dataclasses.replace(CPU, shared_memory=None),
    ],
)
def test_what_is_as_it_should_be_is_not_found(machine):
    assert find_faults(machine) == []


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 9), "sm_80 sm_90", True),
        ((8, 0), "sm_86", False),
        ((9, 0), "sm_80", False),
        ((9, 0), "sm_80 compute_80", True),
        ((7, 5), "sm_80 compute_80", False),
        ((9, 0), "sm_90a", True),
        ((10, 0), "sm_90a compute_90a", False),
        ((10, 3), "sm_100f", True),
        ((10, 3), "sm_100a", False),
        ((12, 0), "sm_120", True),
    ],
)
def test_code_runs_where_nvidia_says_so(capability, architectures, runs):
    """https://docs.nvidia.com/cuda/cuda-c-programming-guide/#application-compatibility"""
    machine = gpu("a GPU", capability, architectures=tuple(architectures.split()))
    assert (find_faults(machine) == []) is runs


def test_the_worst_comes_first():
    machine = dataclasses.replace(
        A100, devices=A100.devices * 2, failure="broken", shared_memory=0, float32_matmul="highest"
    )
    assert [finding.level for finding in find_faults(machine)] == [
        "error",
        "warning",
        "hint",
        "hint",
    ]


@pytest.mark.parametrize("machine", EVERY + [fault[0] for fault in FAULTS])
def test_the_report_has_it_all_in_100_columns(machine):
    advice, findings = advise(machine), find_faults(machine)
    text = report(machine, advice, findings)
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.replace("\n    # ", " ").split())
    for expected in (machine.torch, machine.devices[0].name, *advice.code, advice.reason):
        assert " ".join(expected.split()) in words
    for finding in findings:
        assert finding.found in words and finding.why in words and finding.remedy in words
    assert ("Nothing wrong" in text) == (not findings)


@pytest.mark.parametrize(
    ("machine", "status"),
    [(CPU, 0), (A100, 0), (FAULTS[0][0], 1), (FAULTS[4][0], 1), (FAULTS[-1][0], 0)],
)
def test_the_status_says_whether_training_can_work(monkeypatch, capsys, machine, status):
    monkeypatch.setattr(diagnosis, "examine", lambda try_compile: machine)
    assert main(["doctor"]) == status
    assert "\nUse\n" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == status
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert list(found) == ["machine", "advice", "findings"] and printed.err == ""
    assert found["machine"] == json.loads(json.dumps(dataclasses.asdict(machine)))
    assert found["advice"]["amp_dtype"] == advise(machine).amp_dtype
    assert [finding["level"] for finding in found["findings"]] == [
        finding.level for finding in find_faults(machine)
    ]


def test_compiling_can_be_left_out(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(diagnosis, "examine", lambda try_compile: asked.append(try_compile) or CPU)
    main(["doctor", "--no-compile"])
    assert capsys.readouterr().err == ""
    main(["doctor"])
    assert asked == [False, True] and "--no-compile" in capsys.readouterr().err


def test_every_fact_is_explained():
    assert all(field.name in Machine.__doc__ for field in dataclasses.fields(Machine))
