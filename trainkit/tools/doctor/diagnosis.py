"""``python -m trainkit doctor``: what this machine can do, what to use on it, and what is wrong with it.

With ``--json`` it prints one object instead, of three keys: ``machine``, the facts, as the attributes of ``machine.Machine``;
``advice`` and ``findings``, as those of ``Advice`` and ``Finding`` here. Keys may be added, and keep their meaning.
The exit status is 1 where training on the accelerator cannot work, which is where a finding's level is "error"; else 0.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from trainkit.tools.doctor.machine import Machine, examine
from trainkit.tools.doctor.targets import WrongTarget
from trainkit.tools.doctor.trial import run_trial


@dataclasses.dataclass(frozen=True)
class Advice:
    """What to use: ``amp_dtype`` "bfloat16", "float16" or "float32", which is no ``amp()``; ``code`` to write it down."""

    amp_dtype: str
    loss_scale: bool
    tensor_cores: bool | None
    reason: str
    code: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to change: what was found, why it matters, what to do. ``level``: "error", "warning" or "hint"."""

    level: str
    found: str
    why: str
    remedy: str


def advise(machine: Machine) -> Advice:
    """What to use on this machine: on the first of its devices.

    Source: for the speed of float16, the table of arithmetic instructions in
    https://docs.nvidia.com/cuda/archive/12.6.0/cuda-c-programming-guide/#arithmetic-instructions
    """
    device, dtype, tensor_cores = machine.devices[0], machine.amp_dtype, None
    reason = f"{dtype} halves the memory of activations" + (
        ", and needs a loss scale" if dtype == "float16" else ""
    )
    if device.capability is not None:
        # The one Turing without tensor cores that is known by its name; but its float16 is fast.
        tensor_cores = device.capability >= (7, 0) and "GTX 16" not in device.name
        if tensor_cores:
            scale = (
                "no loss scale needed"
                if dtype == "bfloat16"
                else "with a loss scale; bfloat16 is emulated, and slow"
            )
            reason = f"{dtype} on tensor cores, {scale}"
        elif device.capability in ((5, 3), (6, 0), (6, 2)) or device.capability >= (7, 0):
            reason += "; no tensor cores: expect less memory, and little more speed"
        else:
            dtype, reason = (
                "float32",
                "float16 is no faster here than float32, and there are no tensor cores",
            )
    elif machine.kind == "cpu":
        tensor_cores = False
        if machine.native_bfloat16:
            reason = "this CPU multiplies bfloat16 natively; no loss scale needed"
        else:
            dtype, reason = (
                "float32",
                "this CPU has to emulate bfloat16 (no AVX512_BF16 or AMX), which is slower than float32",
            )
    fused = ", fused=True" if "AdamW" in machine.fused else ""
    amp = "" if dtype == "float32" else "amp(), "
    code = (
        f"optimizer = torch.optim.AdamW(trainable_parameters(model){fused})",
        f"@train_step(optimizer, accumulate(4), {amp}max_norm=1.0)",
    )
    return Advice(dtype, dtype == "float16", tensor_cores, reason, code)


def find_faults(machine: Machine) -> list[Finding]:
    """What is wrong with this machine, the worst first; only what is certain from the facts."""
    found = [
        Finding(*fault) for fault in (*_faults_of_accelerator(machine), *_faults_of_setup(machine))
    ]
    return sorted(found, key=lambda finding: ("error", "warning", "hint").index(finding.level))


def _faults_of_accelerator(m: Machine) -> Iterator[tuple[str, str, str, str]]:
    install = "https://pytorch.org/get-started/locally"
    if m.driver and m.kind == "cpu":
        if m.cuda is None:
            found, remedy = (
                f"an NVIDIA GPU (driver {m.driver}), and a torch without CUDA",
                f"install torch for CUDA: {install}",
            )
            yield "error", found, "training runs on the CPU, and the GPU stands idle", remedy
        elif m.visible is not None and not m.cuda_warning:
            why = "torch sees no GPU, although there is one"
            yield (
                "warning",
                f"CUDA_VISIBLE_DEVICES={m.visible!r}",
                why,
                "`unset CUDA_VISIBLE_DEVICES`, unless it is meant",
            )
        else:
            found = f"an NVIDIA GPU (driver {m.driver}) that torch for CUDA {m.cuda} cannot use"
            why = m.cuda_warning or "torch.cuda.is_available() is False, without a reason"
            is_old = "too old" in m.cuda_warning
            remedy = (
                f"update the driver, or install a torch for an older CUDA: {install}"
                if is_old
                else "`nvidia-smi`; restart"
            )
            yield "error", found, why, remedy
    unsupported = [
        d
        for d in m.devices
        if d.capability and m.architectures and not _runs_on(d.capability, m.architectures)
    ]
    for device in unsupported:
        major, minor = device.capability or (0, 0)
        remedy = f"install a torch that has sm_{major}{minor}: {install}"
        if major < 8:
            # https://github.com/pytorch/pytorch/blob/main/RELEASE.md#pytorch-cuda-support-matrix
            remedy = f"install a torch for CUDA 12.6, which has sm_50 to sm_90; torch 2.14 is the last with one: {install}"
        why = f"it was built for {' '.join(m.architectures)}: no kernel runs"
        yield (
            "error",
            f"{device.name} is sm_{major}{minor}, which this torch was not built for",
            why,
            remedy,
        )
    if m.failure and not unsupported:
        remedy = (
            "free its memory: `nvidia-smi` shows whose it is"
            if "out of memory" in m.failure
            else "restart; reinstall torch"
        )
        yield "error", f"a product of two small matrices fails on {m.kind}", m.failure, remedy
    for index, device in enumerate(m.devices):
        if device.free is not None and device.total and device.free < device.total / 2:
            found = f"{_gib(device.total - device.free)} of {_gib(device.total)} on {m.kind}:{index} are taken"
            yield (
                "warning",
                found,
                "by other processes; what is left is all that training has",
                "`nvidia-smi` shows whose it is",
            )
    count = len(m.devices)
    if m.kind != "cpu" and m.local_ranks > count:
        remedy = f"`torchrun --nproc-per-node {count}`"
        yield (
            "warning",
            f"{m.local_ranks} ranks, and {count} devices",
            "NCCL takes one rank per device",
            remedy,
        )
    if count > 1 and m.ranks is None:
        remedy = f"`torchrun --nproc-per-node {count} train.py`, with the model in DistributedDataParallel or FSDP"
        yield "hint", f"{count} devices, and one process", "a process trains on one of them", remedy
    if m.float32_matmul == "highest" and any(
        device.capability and device.capability >= (8, 0) for device in m.devices
    ):
        why = "float32 products do not use the tensor cores: TF32 is several times as fast, with 10 bits of mantissa"
        yield (
            "hint",
            "TF32 is off, as torch has it",
            why,
            '`torch.set_float32_matmul_precision("high")`, where that is enough',
        )


def _faults_of_setup(m: Machine) -> Iterator[tuple[str, str, str, str]]:
    if m.compile_failure:
        remedy = "train without it; on a CPU it needs a C++ compiler, `apt install g++`"
        if m.kind != "cpu":
            is_old = any(device.capability and device.capability < (7, 0) for device in m.devices)
            remedy = (
                "train without it: Triton needs compute capability 7.0"
                if is_old
                else "train without it; it needs Triton"
            )
        yield "warning", "torch.compile does not work", m.compile_failure, remedy
    share = max(m.cpus // m.local_ranks, 1)
    if m.threads > m.cpus:
        why = "more threads than CPUs wait for each other"
        yield (
            "warning",
            f"{m.threads} threads on {m.cpus} CPUs",
            why,
            f"`export OMP_NUM_THREADS={share}`",
        )
    elif m.kind == "cpu" and m.omp_threads and m.threads * 2 < share:
        why = f"{share} CPUs are there for each rank; torchrun sets 1 where nothing is set"
        yield "hint", f"OMP_NUM_THREADS={m.omp_threads}", why, f"`export OMP_NUM_THREADS={share}`"
    if m.shared_memory is not None and m.shared_memory < 2**30:
        why = "workers of a DataLoader hand over their batches in it, and die with a bus error where it is full"
        remedy = "`docker run --shm-size=8g` or `--ipc=host`; or `DataLoader(..., num_workers=0)`"
        yield "warning", f"/dev/shm has {_gib(m.shared_memory)}", why, remedy


def _runs_on(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether there is code for a device: binary of its major version and no later minor one, or PTX of any earlier version."""
    device = 10 * capability[0] + capability[1]
    for kind, digits, suffix in re.findall(r"(sm|compute)_(\d+)([af]?)", " ".join(architectures)):
        built = int(digits)
        is_exact = device == built if suffix == "a" else device // 10 == built // 10
        if device >= built and (is_exact or (kind == "compute" and not suffix)):
            return True
    return False


def report(machine: Machine, advice: Advice, findings: list[Finding]) -> str:
    """The diagnosis as text, at most 100 characters wide."""
    built = (
        f"CUDA {machine.cuda}"
        if machine.cuda
        else f"ROCm {machine.rocm}"
        if machine.rocm
        else machine.kind.upper()
    )
    rows = [("torch", f"{machine.torch}, for {built}; Python {machine.python}")]
    if machine.driver:
        rows.append(("NVIDIA driver", machine.driver))
    for index, device in enumerate(machine.devices):
        memory = (
            _gib(device.total) + (f", {_gib(device.free)} free" if device.free is not None else "")
            if device.total
            else ""
        )
        capability = (
            "compute capability {}.{}".format(*device.capability) if device.capability else ""
        )
        name = "cpu" if machine.kind == "cpu" else f"{machine.kind}:{index}"
        rows.append((name, "; ".join(filter(None, (device.name, memory, capability)))))
    compiles = {None: "not tried", "": "works"}.get(machine.compile_failure, "does not work")
    emulated = (
        "emulated"
        if machine.native_bfloat16 is False
        else "native"
        if machine.native_bfloat16
        else "not known"
    )
    rows += [
        ("CPUs", f"{machine.cpus}, threads {machine.threads}"),
        (
            "ranks",
            f"this is {machine.rank} of {machine.ranks}"
            if machine.ranks
            else "one process, without torchrun",
        ),
        ("bfloat16", emulated),
        ("tensor cores", {True: "yes", False: "no", None: "not known"}[advice.tensor_cores]),
        (
            "TF32",
            "off" if machine.float32_matmul == "highest" else "allowed, where the device has it",
        ),
        ("fused", ", ".join(machine.fused) or "no optimizer"),
        ("torch.compile", compiles),
    ]
    lines = [_wrapped(f"{name:<16}", text) for name, text in rows]
    lines += ["", "Use", *(f"    {line}" for line in advice.code)]
    picks = (
        f"amp() picks {advice.amp_dtype}" if advice.amp_dtype != "float32" else "leave amp() out"
    )
    lines.append(_wrapped("    # ", f"{picks}: {advice.reason}"))
    for finding in findings:
        lines += ["", _wrapped(f"{finding.level:<9}", finding.found)]
        lines += [_wrapped("  why    ", finding.why), _wrapped("  do     ", finding.remedy)]
    return "\n".join(lines if findings else [*lines, "", "Nothing wrong was found."])


def _wrapped(start: str, text: str) -> str:
    after = "    # " if start.strip() == "#" else " " * len(start)
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, 100, initial_indent=start, subsequent_indent=after, **options)  # type: ignore[arg-type]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def add_doctor(commands: Any) -> None:
    """Adds ``doctor`` to the commands of ``python -m trainkit``."""
    about = "says what this machine can do and what to use; with MODULE:FUNCTION, what each part does for your own model"
    parser = commands.add_parser("doctor", help=about, description=about)
    returns = "a function that returns (model, batch) or (model, batch, loss_fn), where loss_fn(model, batch) is a loss"
    parser.add_argument("target", metavar="MODULE:FUNCTION", nargs="?", help=returns)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="do not try torch.compile, which takes the longest",
    )
    trial = parser.add_argument_group("with MODULE:FUNCTION")
    trial.add_argument("--steps", type=int, default=5, help="how many to take the median of (5)")
    trial.add_argument("--device", help="where to run; else on the accelerator, or the CPU")
    layers = "what to freeze and recompute, also several times; else the longest ModuleList, its lower half and all of it"
    trial.add_argument("--layers", metavar="PATTERN", action="append", help=layers)
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    if options.target is not None:
        try:
            with contextlib.redirect_stdout(
                sys.stderr if options.json else sys.stdout
            ):  # of what the user's own code prints
                found = run_trial(
                    options.target, options.steps, options.device, options.layers, options.json
                )
        except WrongTarget as error:
            print(f"python -m trainkit doctor: {error}", file=sys.stderr)
            return 2
        print(found)
        return 0
    if not (options.json or options.no_compile):
        print(
            "This tries torch.compile, which may take a minute; --no-compile leaves it out.",
            file=sys.stderr,
        )
    machine = examine(try_compile=not options.no_compile)
    advice, findings = advise(machine), find_faults(machine)
    if options.json:
        known = {"machine": dataclasses.asdict(machine), "advice": dataclasses.asdict(advice)}
        print(
            json.dumps(
                {**known, "findings": [dataclasses.asdict(finding) for finding in findings]},
                indent=2,
            )
        )
    else:
        print(report(machine, advice, findings))
    return int(any(finding.level == "error" for finding in findings))
