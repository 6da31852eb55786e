"""Runs that are stopped and started again, for the tests of resumable."""

import random
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
# Seven batches in an epoch, the last of two rows, and three windows, the last of one batch.
SIZE, BATCH, N = 20, 3, 3


class Killed(BaseException):
    """As kill -9: nothing handles it."""


class Rows(Dataset):
    """Rows, each time with noise from all three sources of random numbers."""

    def __init__(self, noise=0.1):
        self.noise, generator = noise, torch.Generator().manual_seed(5)
        self.x, self.y = (torch.randn(SIZE, n, generator=generator) for n in (4, 3))

    def __len__(self):
        return SIZE

    def __getitem__(self, i):
        noise = random.gauss(0, 1) + np.random.normal() + torch.randn(())
        return i, self.x[i] + self.noise * noise, self.y[i]


class Stream(IterableDataset):
    def __init__(self):
        self.rows = Rows()

    def __iter__(self):
        for i in torch.randperm(SIZE).tolist():
            yield self.rows[i]


def seed_worker(_):
    random.seed(torch.initial_seed())
    np.random.seed(torch.initial_seed() % 2**32)


def stateful(*arguments, **options):
    module = pytest.importorskip("torchdata.stateful_dataloader")
    return module.StatefulDataLoader(*arguments, **options)


def seeded():
    generator = torch.Generator().manual_seed(3)
    return DataLoader(Rows(), BATCH, shuffle=True, generator=generator)


def constant():
    generators = [torch.Generator().manual_seed(i) for i in range(7)]
    return [(i, torch.randn(2, 4, generator=g), torch.ones(2, 3)) for i, g in enumerate(generators)]


WORKERS = {"shuffle": True, "num_workers": 2, "worker_init_fn": seed_worker}
LOADERS = {
    "list": constant,
    "shuffled": lambda: DataLoader(Rows(), BATCH, shuffle=True),
    "tqdm": lambda: tqdm(seeded(), disable=True),
    "stream": lambda: DataLoader(Stream(), BATCH),
    "workers": lambda: DataLoader(Rows(), BATCH, **WORKERS),
    "persistent": lambda: DataLoader(Rows(noise=0), BATCH, persistent_workers=True, **WORKERS),
    "stateful": lambda: stateful(Rows(), BATCH, shuffle=True),
    "stateful stream": lambda: stateful(Stream(), BATCH),
    "stateful tqdm": lambda: tqdm(stateful(Rows(), BATCH, shuffle=True), disable=True),
    "stateful workers": lambda: stateful(Rows(noise=0), BATCH, **WORKERS),
}


def train(path, kind="shuffled", stop=None, epochs=2, every=ALWAYS, at_batch=lambda count: None):
    """A run with everything that has a state; returns what it ends with, and its batches.

    Without a path, it is the loop without resumable. ``stop``: the batch in which it is killed.
    """
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 5], 0.5)
    loader, losses, seen, count = LOADERS[kind](), [], [], 0
    precision = amp(dtype=torch.float16, init_scale=2.0**10)

    @train_step(optimizer, accumulate(N), precision, max_norm=0.5, after=schedule.step)
    def step(i, x, y):
        return (model(x) - y).square().mean(), len(x)

    objects = {"model": model, "optimizer": optimizer, "schedule": schedule, "step": step}
    objects |= {"losses": losses, "seen": seen}
    if kind.startswith("stateful"):
        objects["loader"] = getattr(loader, "iterable", loader)
    with resumable(path, every=every, **objects) if path else nullcontext() as run:
        for epoch in run.epochs(epochs) if path else range(epochs):
            for i, x, y in step.over(loader):
                if count == stop:
                    raise Killed
                losses.append(step(i, x, y).loss)
                seen.append((epoch, i.tolist() if isinstance(i, torch.Tensor) else i))
                at_batch(count)
                count += 1
            torch.randn(3)  # an evaluation
    things = (model, optimizer, schedule, step)
    drawn = [random.random(), np.random.rand(), torch.rand(())]
    return [*(thing.state_dict() for thing in things), losses, seen, drawn], count


def same(a, b):
    """Whether two states have the same types and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def same_when_killed(loops, path, stops):
    """``loops(path, stop)``, killed at each of the stops and run again, ends with the same bits."""
    expected = loops(path / "whole", None)
    for stop in stops:
        with pytest.raises(Killed):
            loops(path / str(stop), stop)
        assert same(loops(path / str(stop), None), expected), stop
    return expected


def small(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.2), nn.Linear(32, 8)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    step = train_step(optimizer, accumulate(2))(lambda x: model(x).square().mean())
    return {"model": model, "optimizer": optimizer, "step": step}


def batches(count=8, seed=0):
    return list(torch.randn(count, 4, 8, generator=torch.Generator().manual_seed(seed)))


def run_small(path, epochs=1, loader=None, objects=None, at_batch=lambda count: None, **options):
    """Returns the number of micro-batches that it saw."""
    objects, count = objects or small(), 0
    with resumable(path, **options, **objects) as run:
        for _ in run.epochs(epochs):
            for x in objects["step"].over(batches() if loader is None else loader):
                objects["step"](x)
                at_batch(count)
                count += 1
    return count


def names(path):
    return sorted(file.name for file in path.iterdir())
