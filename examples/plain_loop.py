"""Gradient accumulation, mixed precision, clipping and a schedule by hand, and each of them right.

``wrapped_loop.py`` is the same loop with trainkit, and checks that the losses agree.
"""

import torch
from torch.nn.functional import mse_loss

N = 4  # micro-batches in a window
EPOCHS = 12


def ingredients():
    """Always the same small regression problem: model, optimizer, scheduler, micro-batches."""
    torch.manual_seed(0)
    x = torch.randn(300, 16)
    y = torch.sin(x.sum(1, keepdim=True)) + x[:, :1] ** 2
    # 38 micro-batches: nine full windows and a short one, of 8 and 4 rows.
    micro_batches = list(zip(x.split(8), y.split(8), strict=True))
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10 * EPOCHS)
    return model, optimizer, scheduler, micro_batches


def train_by_hand():
    """Trains by hand; returns the loss of every window."""
    model, optimizer, scheduler, micro_batches = ingredients()
    scaler = torch.amp.GradScaler("cpu")
    losses = []
    for _ in range(EPOCHS):
        for start in range(0, len(micro_batches), N):
            # The usual loop divides every loss by N and updates at each N-th step. So it drops the
            # short last window or divides it by too much. A row in a small micro-batch has more
            # weight than one in a big one. The scheduler steps where the scaler skipped the update.
            window = micro_batches[start : start + N]
            rows = sum(len(x) for x, _ in window)
            window_loss = 0.0
            for x, y in window:
                with torch.autocast("cpu", torch.float16):
                    loss = mse_loss(model(x), y) * (len(x) / rows)
                scaler.scale(loss).backward()
                window_loss += loss.item()
            scaler.unscale_(optimizer)  # before clipping, or the norm is that of scaled gradients
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if (
                scaler.get_scale() >= scale
            ):  # GradScaler tells of a skipped step only by a scale that fell
                scheduler.step()
            optimizer.zero_grad()
            losses.append(window_loss)
    return losses


if __name__ == "__main__":
    losses = train_by_hand()
    print(f"{len(losses)} updates: the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
