"""Stopping at any moment and running the script again gives the same bits as not stopping."""

import random
import signal
from contextlib import nullcontext
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from trainkit import accumulate, amp, resumable, train_step

ALWAYS = timedelta(0)
SIZE, BATCH, N, EPOCHS = 20, 3, 3, 2  # seven batches in an epoch, the last of two rows, and three windows, the last of one batch


class Killed(BaseException):
    """As kill -9, in that nothing is done about it."""


class Rows(Dataset):
    """Rows, each time with noise from all three sources of random numbers."""

    def __init__(self, noise=0.1):
        self.noise, generator = noise, torch.Generator().manual_seed(5)
        self.x, self.y = torch.randn(SIZE, 4, generator=generator), torch.randn(SIZE, 3, generator=generator)

    def __len__(self):
        return SIZE

    def __getitem__(self, i):
        return i, self.x[i] + self.noise * (random.gauss(0, 1) + np.random.normal() + torch.randn(())), self.y[i]


class Stream(IterableDataset):
    def __init__(self):
        self.rows = Rows()

    def __iter__(self):
        for i in torch.randperm(SIZE).tolist():
            yield self.rows[i]


class StatefulRows(Rows):
    """Only its presence counts: `over` has to find out that it is within the loader."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def seed_worker(_):
    random.seed(torch.initial_seed())
    np.random.seed(torch.initial_seed() % 2**32)


def stateful_loader(*arguments, **options):
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader(*arguments, **options)


WORKERS = {"num_workers": 2, "worker_init_fn": seed_worker}
LOADERS = {
    "list": lambda: [(i, torch.randn(2, 4, generator=torch.Generator().manual_seed(i)), torch.ones(2, 3)) for i in range(7)],
    "shuffled": lambda: DataLoader(Rows(), BATCH, shuffle=True),
    "generator": lambda: DataLoader(Rows(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "tqdm": lambda: tqdm(DataLoader(Rows(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(3)), disable=True),
    "stream": lambda: DataLoader(Stream(), BATCH),
    "workers": lambda: DataLoader(Rows(), BATCH, shuffle=True, **WORKERS),
    "stateful": lambda: stateful_loader(Rows(), BATCH, shuffle=True),
    "stateful stream": lambda: stateful_loader(Stream(), BATCH),
    "stateful tqdm": lambda: tqdm(stateful_loader(Rows(), BATCH, shuffle=True), disable=True),
    "stateful workers": lambda: stateful_loader(Rows(noise=0), BATCH, shuffle=True, **WORKERS),
}


def train(path, kind="shuffled", stop=None, every=ALWAYS, epochs=EPOCHS, signals=(), **options):
    """A training run with everything that has a state, and what is left of it. Without a path, the loop without resumable.

    ``stop``: the number of the batch, of those this process sees, in which it is killed. ``signals``: {number: signal}.
    """
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 5], 0.5)
    loader, losses, seen, count = LOADERS[kind](), [], [], 0

    @train_step(optimizer, accumulate(N), amp(dtype=torch.float16, init_scale=2.0**10), max_norm=0.5, after=schedule.step)
    def step(i, x, y):
        return (model(x) - y).square().mean(), len(x)

    objects = {"model": model, "optimizer": optimizer, "schedule": schedule, "step": step, "losses": losses, "seen": seen}
    if kind.startswith("stateful"):
        objects["loader"] = getattr(loader, "iterable", loader)
    with resumable(path, every=every, **options, **objects) if path else nullcontext() as run:
        for epoch in run.epochs(epochs) if path else range(epochs):
            for i, x, y in step.over(loader):
                if count == stop:
                    raise Killed
                losses.append(step(i, x, y).loss)
                seen.append((epoch, i.tolist() if isinstance(i, torch.Tensor) else i))
                if count in signals:
                    signal.raise_signal(signals[count])
                count += 1
            torch.randn(3)  # an evaluation
    states = [model.state_dict(), optimizer.state_dict(), schedule.state_dict(), step.state_dict(), losses, seen]
    return states, [random.random(), np.random.rand(), torch.rand(())], count


def same(a, b):
    """Whether two states have the same types and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("kind", LOADERS)
def test_a_run_that_was_killed_ends_with_the_same_bits(kind, tmp_path):
    expected, numbers, total = train(None, kind)
    assert total == 14
    for stop in range(1, 14) if "workers" not in kind else (5, 7, 13):
        path = tmp_path / str(stop)
        with pytest.raises(Killed):
            train(path, kind, stop)
        states, again, count = train(path, kind)
        assert same(states, expected), stop
        assert again == numbers, stop
        assert count == total - stop, stop
