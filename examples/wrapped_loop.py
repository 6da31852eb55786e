"""The loop of ``by_hand_loop.py`` with trainkit."""

from trainkit import accumulate, amp, freeze, train_step


def train(model, loader, optimizer, schedule, *, epochs, n, dtype, max_norm=1.0):
    """Train, and yield the loss of every window of n micro-batches."""
    freeze(model, ["**.embeddings", "**.layer[:2]"])

    @train_step(optimizer, accumulate(n), amp(dtype=dtype), max_norm=max_norm, after=schedule.step)
    def step(batch):
        return model(**batch.to(model.device)).loss, len(batch["labels"])

    for _ in range(epochs):
        for batch in step.over(loader):
            result = step(batch)
            if result.complete:
                yield result.window_loss
