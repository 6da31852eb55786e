"""Freezing, accumulation, mixed precision, clipping and a schedule by hand, and each of them right.

``wrapped_loop.py`` is the same loop with trainkit.
"""

import itertools

import torch
from torch.nn.utils import clip_grad_norm_


def train(model, loader, optimizer, schedule, *, epochs, n, dtype, max_norm=1.0):
    """Train, and yield the loss of every window of n micro-batches."""
    model.base_model.embeddings.requires_grad_(False)
    model.base_model.encoder.layer[:2].requires_grad_(False)
    device = model.device.type
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    for _ in range(epochs):
        batches = iter(loader)
        while micro_batches := list(itertools.islice(batches, n)):
            # Every row of the window has the same weight, however long the micro-batches are.
            rows = sum(len(batch["labels"]) for batch in micro_batches)
            window_loss = 0.0
            for batch in micro_batches:
                with torch.autocast(device, dtype):
                    loss = model(**batch.to(model.device)).loss
                loss = loss * (len(batch["labels"]) / rows)
                scaler.scale(loss).backward()
                window_loss += loss.detach()
            scaler.unscale_(optimizer)  # before clipping, or the norm is of scaled gradients
            clip_grad_norm_(model.parameters(), max_norm)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= scale:  # a lower scale is the only sign of a skipped update
                schedule.step()
            optimizer.zero_grad()
            yield window_loss
