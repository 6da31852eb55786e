"""Freezing the lower layers of a transformer, and unfreezing them one by one while it trains.

The model is a small DeBERTa-v3 made from a config; nothing is downloaded. With a pretrained one
only ``from_pretrained`` differs: the names are the same. Gradual unfreezing, and lower rates for
lower layers, are from Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text
Classification", https://arxiv.org/abs/1801.06146
"""

import torch
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from trainkit import (
    accumulate,
    amp,
    freeze,
    frozen_parameters,
    train_step,
    trainable_parameters,
    unfreeze,
)

torch.manual_seed(0)
# These switches make v3 of DeBERTa-v2, as in microsoft/deberta-v3-small, which is wider.
config = DebertaV2Config(
    vocab_size=1000,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=128,
    relative_attention=True,
    position_buckets=32,
    max_relative_positions=-1,
    max_position_embeddings=64,
    position_biased_input=False,
    pos_att_type="p2c|c2p",
    share_att_key=True,
    norm_rel_ebd="layer_norm",
    type_vocab_size=0,
    num_labels=2,
)
model = DebertaV2ForSequenceClassification(config)
model.train()  # a pretrained one comes in evaluation mode

# Sequences of random tokens. Their label is the half of the vocabulary that most of them are from.
labels = torch.randint(2, (512,))
from_upper_half = torch.rand(512, 24) < 0.2 + 0.6 * labels[:, None]
tokens = torch.randint(500, (512, 24)) + 500 * from_upper_half
micro_batches = [
    {"input_ids": x, "labels": y} for x, y in zip(tokens.split(8), labels.split(8), strict=True)
]

# The embeddings of relative positions, and their LayerNorm, enter every layer. If trained,
# backward would run through the frozen layers, too; this way it stops above them.
freeze(
    model,
    [
        "**.embeddings",
        "**.rel_embeddings",
        "deberta.encoder.LayerNorm",
        "deberta.encoder.layer[:2]",
    ],
)
print("frozen:", *frozen_parameters(model), sep="\n  ")
embeddings = model.deberta.embeddings.word_embeddings.weight.detach().clone()

RATE = 1e-3
optimizer = torch.optim.AdamW(trainable_parameters(model), lr=RATE, fused=True)


@train_step(optimizer, accumulate(2), amp(), max_norm=1.0)
def step(batch):
    return model(**batch).loss


# From the top downwards, one more layer in each epoch.
for epoch, layer in enumerate([None, "deberta.encoder.layer[1]", "deberta.encoder.layer[0]"]):
    if layer is not None:
        parameters = [model.get_parameter(name) for name in unfreeze(model, layer)]
        optimizer.add_param_group({"params": parameters, "lr": RATE / 2.6**epoch})
    losses = [step(batch).loss for batch in step.over(micro_batches)]
    trainable = sum(p.numel() for p in trainable_parameters(model))
    print(
        f"epoch {epoch}: {trainable:,} parameters trained, "
        f"mean loss {torch.stack(losses).mean():.4f}"
    )

assert torch.equal(model.deberta.embeddings.word_embeddings.weight, embeddings)
print("The embeddings have not moved by a bit.")
