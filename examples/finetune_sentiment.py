"""Fine-tunes a pretrained encoder on sentiment labels with trainkit, on one GPU, several, or none.

    python examples/finetune_sentiment.py             a minute on two CPU cores
    python examples/finetune_sentiment.py --model distilbert-base-uncased --data reviews.csv
    torchrun --nproc-per-node 2 examples/finetune_sentiment.py [--fsdp]
    python examples/finetune_sentiment.py --checkpoint checkpoints     resumes after a kill

``sentiment.py`` has the data and the model; ``compare.py`` compares the loop with other ones.
"""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

import torch
from sentiment import TokenBatches, accuracy, load, new_model, new_parser, new_task, settings
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from trainkit import accumulate, amp, freeze, resumable, train_step

# torchrun sets these; without it, there is one process.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def parallel(model, fsdp):
    """The model for all ranks: all of it or, with FSDP2, a shard of every layer. Freeze before."""
    if RANKS == 1:
        return model
    if not fsdp:
        return DistributedDataParallel(model)
    layers = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
    for part in (*layers, model):
        fully_shard(part)
    return model


def train(model, task, fit, options):
    """Train. Return the loss of every window; on several ranks, of what this rank has in it."""
    freeze(model, ["**.embeddings", "**.layer[:2]"])
    parallel_model = parallel(model, options.fsdp)
    # Ranks share a window: each takes every so many-th of its micro-batches.
    n = max(1, fit.window // RANKS)
    batches = TokenBatches(task.rows, fit.tokens, options.seed, RANK, RANKS)
    loader = load(batches, task.rows, task.tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    updates = math.ceil(batches.total / (n * RANKS)) * options.epochs
    schedule = get_linear_schedule_with_warmup(optimizer, updates // 10, updates)

    @train_step(
        optimizer,
        accumulate(n),
        amp(dtype=fit.dtype),
        module=parallel_model,
        max_norm=1.0,
        after=schedule.step,
    )
    def step(batch):
        return parallel_model(**batch.to(model.device)).loss, len(batch["labels"])

    losses, epochs = [], range(options.epochs)
    with contextlib.ExitStack() as stack:
        if options.checkpoint:
            objects = {
                "model": model,
                "optimizer": optimizer,
                "schedule": schedule,
                "step": step,
                "losses": losses,
            }
            run = stack.enter_context(resumable(options.checkpoint, **objects))
            epochs = run.epochs(options.epochs)
        for _ in epochs:
            for batch in step.over(tqdm(loader, disable=RANK > 0)):
                result = step(batch)
                if result.complete:
                    losses.append(result.window_loss)
    return losses


def main():
    parser = new_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help="under torchrun: FSDP2 in place of DistributedDataParallel",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="folder to save in every ten minutes and at the end, and to resume from",
    )
    options = parser.parse_args()
    task = new_task(options)
    if RANK == 0:
        print(
            f"training on {len(task.rows):,} sentences, evaluation on {len(task.held_out):,} "
            f"others, {task.labels} labels",
            flush=True,
        )
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
        device = torch.accelerator.current_accelerator()
    if RANKS > 1:
        dist.init_process_group()
    fit = settings(device)
    model = new_model(task, options, fit.attention).to(device)
    losses = train(model, task, fit, options)
    found = accuracy(model, task)  # on all ranks, because a forward of FSDP2 needs all of them
    if RANK == 0:
        print(f"{len(losses)} updates: accuracy {found:.3f}")
    if RANKS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
