"""What a step costs where the model costs nothing: 4 layers of 8 x 8, windows of 4, gradients clipped, one thread.

    python benchmarks/tiny_mlp.py [--device cuda] [--rounds 200]

All contenders take the same updates (the last column: after ten of them), in turn, in one process. Quoted are medians of
the ratio to the loop beside it in the same round, which a machine that is slow for a while does not move.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import time

import torch
from torch import nn
from torch.nn.functional import mse_loss

from trainkit import accumulate, train_step

N, MAX_NORM, CALLS = 4, 1.0, 40


def made(device, fused):
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.ReLU())][:-1]).to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused or None)


def by_hand(device, batches, fused):
    model, optimizer = made(device, fused)

    def epoch():
        for start in range(0, len(batches), N):
            window = batches[start : start + N]
            for x, y in window:
                (mse_loss(model(x), y) / len(window)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()

    return model, epoch


def usual(device, batches):
    model, optimizer = made(device, False)

    def epoch():
        for i, (x, y) in enumerate(batches, 1):
            (mse_loss(model(x), y) / N).backward()
            if i % N == 0 or i == len(batches):
                nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()

    return model, epoch


def returning(device, batches, fused):
    model, optimizer = made(device, fused)

    @train_step(optimizer, accumulate(N), max_norm=MAX_NORM)
    def step(x, y):
        return mse_loss(model(x), y)

    def epoch():
        for x, y in step.over(batches):
            step(x, y)

    return model, epoch


def yielding(device, batches, fused):
    model, optimizer = made(device, fused)

    @train_step(optimizer, accumulate(N), max_norm=MAX_NORM)
    def step(x, y):
        yield mse_loss(model(x), y)
        optimizer.step()
        optimizer.zero_grad()

    def epoch():
        for x, y in step.over(batches):
            step(x, y)

    return model, epoch


# The others, as their documentation has it, with the same optimizer. Each is left out where it is not installed.


def accelerate(device, batches):
    """https://huggingface.co/docs/accelerate/usage_guides/gradient_accumulation"""
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=N, cpu=device.type == "cpu")
    model, optimizer = accelerator.prepare(*made(device, True))

    def epoch():
        for x, y in batches:
            with accelerator.accumulate(model):
                accelerator.backward(mse_loss(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()

    return model, epoch


def fabric(device, batches):
    """https://lightning.ai/docs/fabric/stable/advanced/gradient_accumulation.html"""
    from lightning_fabric import Fabric

    runner = Fabric(accelerator=device.type, devices=1)
    model, optimizer = runner.setup(*made(device, True))

    def epoch():
        for i, (x, y) in enumerate(batches, 1):
            is_accumulating = i % N != 0
            with runner.no_backward_sync(model, enabled=is_accumulating):
                runner.backward(mse_loss(model(x), y) / N)
            if not is_accumulating:
                runner.clip_gradients(model, optimizer, max_norm=MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()

    return model, epoch


def ignite(device, batches):
    """https://docs.pytorch.org/ignite/concepts.html, with the accumulation of its create_supervised_trainer"""
    from ignite.engine import Engine

    model, optimizer = made(device, True)

    def process(engine, batch):
        x, y = batch
        if (engine.state.iteration - 1) % N == 0:
            optimizer.zero_grad()
        (mse_loss(model(x), y) / N).backward()
        if engine.state.iteration % N == 0:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()

    trainer = Engine(process)
    return model, lambda: trainer.run(batches, max_epochs=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    batches = [(torch.randn(16, 8, device=device), torch.randn(16, 8, device=device)) for _ in range(CALLS)]
    contenders = {
        "the usual loop, default AdamW": usual(device, batches),
        "a correct loop by hand, fused AdamW": by_hand(device, batches, True),
        "train_step, returning, fused AdamW": returning(device, batches, True),
        "train_step, yielding, fused AdamW": yielding(device, batches, True),
        "train_step, returning, default AdamW": returning(device, batches, False),
    }
    for name, make in {"Hugging Face Accelerate": accelerate, "Lightning Fabric": fabric, "PyTorch Ignite": ignite}.items():
        with contextlib.suppress(ImportError):
            contenders[f"{name}, fused AdamW"] = make(device, batches)
    times = {name: [] for name in contenders}
    for _, epoch in contenders.values():
        epoch()
    reference = [p.detach().clone() for p in contenders["the usual loop, default AdamW"][0].parameters()]
    differences = {
        name: max((p - q).abs().max().item() for p, q in zip(model.parameters(), reference, strict=True))
        for name, (model, _) in contenders.items()
    }
    for _ in range(arguments.rounds):
        for name, (_, epoch) in contenders.items():
            start = time.perf_counter()
            epoch()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{machine}, torch {torch.__version__}, {arguments.rounds} rounds of {CALLS} calls\n")
    print("| contender | us per call | / fused by hand | / usual | parameters off by |")
    print("|---|---|---|---|---|")
    usual_times, hand_times = times["the usual loop, default AdamW"], times["a correct loop by hand, fused AdamW"]
    for name in contenders:
        median = statistics.median(times[name]) / CALLS * 1e6
        ratios = [statistics.median(map(lambda a, b: a / b, times[name], base)) for base in (hand_times, usual_times)]
        print(f"| {name} | {median:.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {differences[name]:.0e} |")


if __name__ == "__main__":
    main()
