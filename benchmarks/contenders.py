"""The same training, as different people would write it.

Each contender takes a task and returns a model, and a function that trains it on all batches once.
All of them clip and take the same updates. The last three follow the documentation of their
library. They raise ImportError where it is not installed. Where the library lacks something they
raise Unsupported, or the library itself raises in the first epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from trainkit import accumulate, amp, train_step

MAX_NORM = 1.0


class Unsupported(Exception):
    """The library does not do this."""


class Task(NamedTuple):
    """What is to be trained, and how."""

    device: str
    make_model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    batches: list[Any]
    n: int = 4
    precision: torch.dtype = torch.float32

    def made(self, fused):
        torch.manual_seed(0)
        model = self.make_model().to(self.device)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused or None)


def usual(task, fused=False):
    """The loop that people have: divided by n, whatever is in the window."""
    model, optimizer = task.made(fused)
    n, batches = task.n, task.batches
    if task.precision == torch.float32:

        def epoch():
            for i, batch in enumerate(batches, 1):
                (task.loss(model, batch) / n).backward()
                if i % n == 0 or i == len(batches):
                    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
                    optimizer.step()
                    optimizer.zero_grad()

        return model, epoch

    scaler = torch.amp.GradScaler(task.device, enabled=task.precision == torch.float16)

    def epoch_in_mixed_precision():
        for i, batch in enumerate(batches, 1):
            with torch.autocast(task.device, task.precision):
                loss = task.loss(model, batch) / n
            scaler.scale(loss).backward()
            if i % n == 0 or i == len(batches):
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

    return model, epoch_in_mixed_precision


def by_hand(task, fused=True):
    """A correct loop: divided by what is in the window."""
    model, optimizer = task.made(fused)
    windows = [
        task.batches[start : start + task.n] for start in range(0, len(task.batches), task.n)
    ]
    if task.precision == torch.float32:

        def epoch():
            for window in windows:
                for batch in window:
                    (task.loss(model, batch) / len(window)).backward()
                nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()

        return model, epoch

    scaler = torch.amp.GradScaler(task.device, enabled=task.precision == torch.float16)

    def epoch_in_mixed_precision():
        for window in windows:
            for batch in window:
                with torch.autocast(task.device, task.precision):
                    loss = task.loss(model, batch) / len(window)
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return model, epoch_in_mixed_precision


def _parts(task):
    return [accumulate(task.n)] + (
        [] if task.precision == torch.float32 else [amp(dtype=task.precision)]
    )


def returning(task, fused=True):
    model, optimizer = task.made(fused)

    @train_step(optimizer, *_parts(task), max_norm=MAX_NORM)
    def step(batch):
        return task.loss(model, batch)

    def epoch():
        for batch in step.over(task.batches):
            step(batch)

    return model, epoch


def yielding(task, fused=True):
    model, optimizer = task.made(fused)

    @train_step(optimizer, *_parts(task), max_norm=MAX_NORM)
    def step(batch):
        yield task.loss(model, batch)
        optimizer.step()
        optimizer.zero_grad()

    def epoch():
        for batch in step.over(task.batches):
            step(batch)

    return model, epoch


def accelerate(task):
    """https://huggingface.co/docs/accelerate/usage_guides/gradient_accumulation"""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(
        True
    )  # or the precision of the first in a process would be that of all
    names = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=task.n,
            mixed_precision=names[task.precision],
            cpu=task.device == "cpu",
        )
    except (ValueError, NotImplementedError) as error:
        raise Unsupported(str(error)) from error
    if task.precision == torch.float16 and not accelerator.native_amp:
        raise Unsupported("takes float32 instead")
    model, optimizer = accelerator.prepare(*task.made(True))

    def epoch():
        for batch in task.batches:
            with accelerator.accumulate(model):
                accelerator.backward(task.loss(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()

    return model, epoch


def fabric(task):
    """https://lightning.ai/docs/fabric/stable/advanced/gradient_accumulation.html"""
    from lightning_fabric import Fabric

    if task.precision == torch.float16 and task.device == "cpu":
        raise Unsupported("takes bfloat16 instead")
    names = {torch.float32: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}
    runner = Fabric(accelerator=task.device, devices=1, precision=names[task.precision])
    model, optimizer = runner.setup(*task.made(True))

    def epoch():
        for i, batch in enumerate(task.batches, 1):
            is_accumulating = i % task.n != 0
            with runner.no_backward_sync(model, enabled=is_accumulating):
                runner.backward(task.loss(model, batch) / task.n)
            if not is_accumulating:
                runner.clip_gradients(model, optimizer, max_norm=MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()

    return model, epoch


def ignite(task):
    """https://docs.pytorch.org/ignite/concepts.html

    It accumulates as create_supervised_trainer does.
    """
    from ignite.engine import Engine

    model, optimizer = task.made(True)
    scaler = torch.amp.GradScaler(task.device, enabled=task.precision == torch.float16)

    def process(engine, batch):
        if (engine.state.iteration - 1) % task.n == 0:
            optimizer.zero_grad()
        (task.loss(model, batch) / task.n).backward()
        if engine.state.iteration % task.n == 0:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()

    def process_in_mixed_precision(engine, batch):
        if (engine.state.iteration - 1) % task.n == 0:
            optimizer.zero_grad()
        with torch.autocast(task.device, task.precision):
            loss = task.loss(model, batch) / task.n
        scaler.scale(loss).backward()
        if engine.state.iteration % task.n == 0:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            scaler.step(optimizer)
            scaler.update()

    trainer = Engine(process if task.precision == torch.float32 else process_in_mixed_precision)
    return model, lambda: trainer.run(task.batches, max_epochs=1)


CONTENDERS = {
    "the usual loop, default AdamW": usual,
    "a correct loop by hand, fused AdamW": by_hand,
    "**train_step, returning, fused AdamW**": returning,
    "train_step, yielding, fused AdamW": yielding,
    "train_step, returning, default AdamW": lambda task: returning(task, fused=False),
    "Hugging Face Accelerate, fused AdamW": accelerate,
    "Lightning Fabric, fused AdamW": fabric,
    "PyTorch Ignite, fused AdamW": ignite,
}
USUAL, BY_HAND, TRAINKIT, *_ = CONTENDERS
LIBRARIES = {name for name, make in CONTENDERS.items() if make in (accelerate, fabric, ignite)}
