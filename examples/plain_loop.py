"""The usual training loop, without the corrections of ``by_hand_loop.py``.

It divides each loss by the number of micro-batches. That is wrong where the last window is short,
and where micro-batches have different numbers of rows.
"""

import torch


def train(model, loader, optimizer, *, epochs, n):
    """Train, and yield the loss of every window of n micro-batches."""
    model.train()
    losses = []
    for _ in range(epochs):
        for number, batch in enumerate(loader, 1):
            loss = model(**batch.to(model.device)).loss
            (loss / n).backward()
            losses.append(loss.detach())
            if number % n == 0 or number == len(loader):
                optimizer.step()
                optimizer.zero_grad()
                yield torch.stack(losses).mean()
                losses.clear()
