"""What a step costs with forward and backward: of a tiny model, all overhead, and of real ones."""

from __future__ import annotations

import statistics
import sys

import torch
from contenders import BY_HAND, CONTENDERS, LIBRARIES, TRAINKIT, USUAL, Task
from measure import busy_seconds, host_seconds, in_turn, microseconds, ratio, table
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

ENCODER_BATCH = {"cpu": (8, 32), "cuda": (32, 128)}  # sentences, tokens


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
    """Six layers as wide as MiniLM-L6, a small vocabulary."""
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
    sentences, length = ENCODER_BATCH[device]
    tokens = torch.randint(config.vocab_size, (n, sentences, length), generator=generator)
    labels = torch.randint(2, (n, sentences), generator=generator)
    return Task(
        device,
        lambda: BertForSequenceClassification(config),
        lambda model, batch: cross_entropy(model(batch[0]).logits, batch[1]),
        list(zip(tokens.to(device), labels.to(device), strict=True)),
        n,
        precision,
    )


def gpt2(device, n=4, precision=torch.float32):
    """GPT-2 of 124 M parameters, micro-batches of 8 x 512 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (n, 8, 512), generator=generator).to(device)
    return Task(
        device,
        lambda: GPT2LMHeadModel(config),
        lambda model, batch: model(input_ids=batch, labels=batch).loss,
        list(tokens),
        n,
        precision,
    )


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def entered(task):
    """Return an epoch of each contender that is installed and gets through its first epoch."""
    models, epochs = {}, {}
    for name, make in CONTENDERS.items():
        try:
            model, epoch = make(task)
            epoch()
        except Exception as error:
            if name not in LIBRARIES:
                raise
            print(f"{name} refuses {task.precision}: {error!r:.200}", file=sys.stderr)
        else:
            models[name], epochs[name] = model, epoch
    start, expected = flat(task.made(True)[0]), flat(models[BY_HAND])
    for name, model in models.items():
        off = ((flat(model) - expected).norm() / (expected - start).norm()).item()
        assert off <= 1e-2, (
            f"{name} takes other updates: {off:.0e}"
        )  # after many, all differ as much as rounding grows
    return epochs


def compete(task, rounds):
    """Return the seconds per micro-batch in each round, of each contender that takes part."""
    times = in_turn(entered(task), task.device, rounds)
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


def gpu_table(task, rounds):
    """Time by the GPU's clock, by the host's, and how long the GPU has nothing to do."""
    epochs = entered(task)
    times, rows = in_turn(epochs, task.device, rounds), dict.fromkeys(CONTENDERS, ["-"] * 4)
    for name, epoch in epochs.items():
        host = [host_seconds(epoch) / len(task.batches) for _ in range(3)]
        idle = max(0.0, 1 - busy_seconds(epoch) / statistics.median(times[name]))
        per_batch = [t / len(task.batches) for t in times[name]]
        ratio_to_hand = ratio(times[name], times[BY_HAND])
        rows[name] = [microseconds(per_batch), ratio_to_hand, microseconds(host), f"{idle:.0%}"]
    ratio_to_usual = ratio(times[TRAINKIT], times[USUAL])
    rows["train_step, returning, / the usual loop"] = ["", ratio_to_usual, "", ""]
    return table("", ["GPU", "ratio to by hand", "host", "GPU idle"], rows)
