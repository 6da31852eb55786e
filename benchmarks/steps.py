"""What a step costs with forward and backward: of a tiny model, all overhead, and of a real one."""

from __future__ import annotations

import torch
from contenders import BY_HAND, CONTENDERS, TRAINKIT, USUAL, Task, Unsupported
from measure import in_turn, microseconds, ratio, table
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss


def tiny(device, n=4, precision=torch.float32):
    """Four layers of 8 x 8."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randn(2, 16, 8, generator=generator).to(device).unbind()
        for _ in range(max(2 * n, 40 // n * n))
    ]
    return Task(
        device,
        lambda: nn.Sequential(
            *[layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.ReLU())][:-1]
        ),
        lambda model, batch: mse_loss(model(batch[0]), batch[1]),
        batches,
        n,
        precision,
    )


def encoder(device, n=4, precision=torch.float32):
    """Six layers as wide as MiniLM-L6, a small vocabulary; micro-batches of 8 x 32 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    size = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
    config = BertConfig(
        **size, vocab_size=1000, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (n, 8, 32), generator=generator).to(device)
    labels = torch.randint(2, (n, 8), generator=generator).to(device)
    return Task(
        device,
        lambda: BertForSequenceClassification(config),
        lambda model, batch: cross_entropy(model(batch[0]).logits, batch[1]),
        list(zip(tokens, labels, strict=True)),
        n,
        precision,
    )


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def compete(task, rounds):
    """Seconds per micro-batch in each round, of each contender that is installed and has this."""
    models, epochs = {}, {}
    for name, make in CONTENDERS.items():
        try:
            models[name], epochs[name] = make(task)
        except (ImportError, Unsupported):
            continue
    start = flat(task.made(True)[0])
    for epoch in epochs.values():
        epoch()
    expected = flat(models[BY_HAND])
    for name, model in models.items():
        off = ((flat(model) - expected).norm() / (expected - start).norm()).item()
        assert off <= 1e-2, (
            f"{name} takes other updates: {off:.0e}"
        )  # after many, all differ as much as rounding grows
    times = in_turn(epochs, task.device, rounds)
    return {name: [t / len(task.batches) for t in taken] for name, taken in times.items()}


def steps_table(tasks, rounds):
    """Microseconds per micro-batch, and the ratios to both loops by hand, for several tasks."""
    times = {title: compete(task, rounds) for title, task in tasks.items()}
    rows = {}
    for name in CONTENDERS:
        rows[name] = [
            f"{microseconds(taken[name])}, {ratio(taken[name], taken[BY_HAND])}"
            if name in taken
            else "-"
            for taken in times.values()
        ]
    rows["train_step, returning, / the usual loop"] = [
        ratio(taken[TRAINKIT], taken[USUAL]) for taken in times.values()
    ]
    return table("", list(tasks), rows)
