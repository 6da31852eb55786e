"""Stopping at any moment and running the script again gives the same bits as not stopping."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import tempfile
import threading
import warnings
from collections import Counter, OrderedDict
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from trainkit import accumulate, amp, resumable, train_step
from trainkit.core.answer import Answer
from trainkit.saving.storage import _hash, _write_manifest

ALWAYS = timedelta(0)
SIZE, BATCH, N, EPOCHS = (
    20,
    3,
    3,
    2,
)  # seven batches in an epoch, the last of two rows, and three windows, the last of one batch


@pytest.fixture(autouse=True)
def usual_signals():
    """Those of a program in the foreground; one that a shell put into the background ignores SIGINT."""
    found = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    found = {number: signal.signal(number, handler) for number, handler in found.items()}
    yield
    for number, handler in found.items():
        signal.signal(number, handler)


class Killed(BaseException):
    """As kill -9, in that nothing is done about it."""


class Rows(Dataset):
    """Rows, each time with noise from all three sources of random numbers."""

    def __init__(self, noise=0.1):
        self.noise, generator = noise, torch.Generator().manual_seed(5)
        self.x, self.y = (
            torch.randn(SIZE, 4, generator=generator),
            torch.randn(SIZE, 3, generator=generator),
        )

    def __len__(self):
        return SIZE

    def __getitem__(self, i):
        return (
            i,
            self.x[i] + self.noise * (random.gauss(0, 1) + np.random.normal() + torch.randn(())),
            self.y[i],
        )


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
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader(
        *arguments, **options
    )


WORKERS = {"num_workers": 2, "worker_init_fn": seed_worker}
LOADERS = {
    "list": lambda: [
        (i, torch.randn(2, 4, generator=torch.Generator().manual_seed(i)), torch.ones(2, 3))
        for i in range(7)
    ],
    "shuffled": lambda: DataLoader(Rows(), BATCH, shuffle=True),
    "generator": lambda: DataLoader(
        Rows(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "tqdm": lambda: tqdm(
        DataLoader(Rows(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(3)),
        disable=True,
    ),
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

    @train_step(
        optimizer,
        accumulate(N),
        amp(dtype=torch.float16, init_scale=2.0**10),
        max_norm=0.5,
        after=schedule.step,
    )
    def step(i, x, y):
        return (model(x) - y).square().mean(), len(x)

    objects = {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "step": step,
        "losses": losses,
        "seen": seen,
    }
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
    states = [
        model.state_dict(),
        optimizer.state_dict(),
        schedule.state_dict(),
        step.state_dict(),
        losses,
        seen,
    ]
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
    for stop in (1, 2, 3, 5, 6, 7, 8, 11, 13) if kind == "shuffled" else (2, 6, 7, 9):
        path = tmp_path / str(stop)
        with pytest.raises(Killed):
            train(path, kind, stop)
        states, again, count = train(path, kind)
        assert same(states, expected), stop
        assert again == numbers, stop
        assert count == total - stop, stop


class GraphLoader(DataLoader):
    """A loader of one's own, as that of torch_geometric."""


@pytest.mark.parametrize("loader", [DataLoader, GraphLoader])
def test_workers_that_persist_find_their_place_also_after_the_first_epoch(
    loader, tmp_path, monkeypatch
):
    """They draw a random number when they start, which is in the first epoch of a process."""
    options = {"shuffle": True, "persistent_workers": True, **WORKERS}
    monkeypatch.setitem(LOADERS, "persistent", lambda: loader(Rows(noise=0), BATCH, **options))
    expected, numbers, total = train(tmp_path / "whole", "persistent")
    for stop in (2, 9):
        with pytest.raises(Killed):
            train(tmp_path / str(stop), "persistent", stop)
        states, again, count = train(tmp_path / str(stop), "persistent")
        assert same(states, expected) and (again, count) == (numbers, total - stop), stop
    train(tmp_path / "longer", "persistent", epochs=1)
    assert same(train(tmp_path / "longer", "persistent")[0], expected)


def test_a_generator_waits_for_its_loader_while_the_workers_of_another_start(tmp_path):
    def loops(path, stop=None):
        objects, seen = small(), []
        a = DataLoader(batches(2), num_workers=1, persistent_workers=True)
        b = DataLoader(batches(4), shuffle=True, generator=torch.Generator().manual_seed(1))
        with resumable(path, every=ALWAYS, seen=seen, **objects) as run:
            for _ in run.epochs(3):
                for loader in (a, b):
                    for x in objects["step"].over(loader):
                        if len(seen) == stop:
                            raise Killed
                        objects["step"](x)
                        seen.append(x.sum().item())
        return seen

    expected = loops(tmp_path / "whole")
    for stop in (6, 12):
        with pytest.raises(Killed):
            loops(tmp_path / str(stop), stop)
        assert loops(tmp_path / str(stop)) == expected, stop


def small(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.2), nn.Linear(32, 8)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    step = train_step(optimizer, accumulate(2))(lambda x: model(x).square().mean())
    return {"model": model, "optimizer": optimizer, "step": step}


def batches(count=8, seed=0):
    return list(torch.randn(count, 4, 8, generator=torch.Generator().manual_seed(seed)))


def run_small(path, epochs=1, loader=None, objects=None, **options):
    """Returns how many micro-batches it saw."""
    objects, count = objects or small(), 0
    with resumable(path, **options, **objects) as run:
        for _ in run.epochs(epochs):
            for x in objects["step"].over(batches() if loader is None else loader):
                objects["step"](x)
                count += 1
    return count


def names(path):
    return sorted(file.name for file in path.iterdir())


def test_a_relative_path_is_that_of_where_the_block_was_made(tmp_path, monkeypatch):
    """And not of where a loop has gone by the time of a save, in which the next run would not look."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with resumable("checkpoints", **(objects := small())):
        monkeypatch.chdir("elsewhere")
        for x in objects["step"].over(batches()):
            objects["step"](x)
    assert names(tmp_path) == ["checkpoints", "elsewhere"] and not names(tmp_path / "elsewhere")


# When it saves.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["shuffled", "stream"])
def test_a_signal_is_obeyed_at_the_next_place_between_two_batches(number, kind, tmp_path):
    expected, numbers, total = train(None, kind)
    found = signal.getsignal(number)
    for at in (0, 4, 6, 9):
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stopped:
            train(tmp_path / str(at), kind, every=10**6, signals={at: number})
        if number == signal.SIGINT:
            assert str(stopped.value) == f"saved in {tmp_path / str(at)}: run it again to go on"
        else:
            assert stopped.value.code == 128 + 15
        assert signal.getsignal(number) is found
        states, again, count = train(tmp_path / str(at), kind, every=10**6)
        assert same(states, expected) and again == numbers and count == total - at - 1, at


def test_who_handles_a_signal_may_have_the_run_go_on(tmp_path):
    handled = []
    found = signal.signal(signal.SIGTERM, lambda number, frame: handled.append(number))
    try:
        expected, numbers, total = train(None)
        states, again, count = train(
            tmp_path, every=10**6, signals={3: signal.SIGTERM, 5: signal.SIGTERM}
        )
        assert handled == [signal.SIGTERM] * 2
        assert same(states, expected) and again == numbers and count == total
    finally:
        signal.signal(signal.SIGTERM, found)


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    found = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with resumable(tmp_path, **small()):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, found)


def test_a_second_signal_does_not_wait(tmp_path):
    objects, waited = small(), False
    with pytest.raises(KeyboardInterrupt), resumable(tmp_path, **objects) as run:
        for x in objects["step"].over(batches()):
            objects["step"](x)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # within a second: the same, sent twice
            waited = True
            run._signal_at -= 2
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second did not stop it")
    assert waited
    with resumable(tmp_path, **(objects := small())) as run:
        try:
            for x in objects["step"].over(batches()):
                objects["step"](x)
                signal.raise_signal(signal.SIGINT)
                run._signal_at -= 2
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass  # and where it came, a state is not whole
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not tmp_path.exists() or not names(tmp_path)


def test_a_signal_between_two_epochs_and_one_after_the_last(tmp_path):
    for at in (0, 1):
        objects = small()
        with pytest.raises(KeyboardInterrupt), resumable(tmp_path / str(at), **objects) as run:
            for epoch in run.epochs(2):
                for x in objects["step"].over(batches()):
                    objects["step"](x)
                if epoch == at:
                    signal.raise_signal(signal.SIGINT)
        assert run_small(tmp_path / str(at), epochs=2) == (8 if at == 0 else 0)


def test_an_interrupt_that_the_block_catches_leaves_the_place(tmp_path):
    objects, count = small(), 0
    with resumable(tmp_path, every=10**6, **objects) as run:
        try:
            for _ in run.epochs(2):
                for x in objects["step"].over(batches()):
                    objects["step"](x)
                    count += 1
                    if count == 3:
                        signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            run._every = 1
            for x in objects["step"].over(batches(4)):
                objects["step"](x)
    assert names(tmp_path) == ["00000001"]
    assert run_small(tmp_path, epochs=2) == 16 - 3


def test_in_another_thread_signals_are_left_alone(tmp_path):
    handlers = []

    def in_thread():
        with resumable(tmp_path, **small()):
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


def test_an_interval_in_updates_or_time_and_how_many_are_kept(tmp_path, monkeypatch):
    run_small(tmp_path / "updates", every=2, keep=10)  # four updates, and the end of the epoch
    assert names(tmp_path / "updates") == ["00000001", "00000002", "00000003"]
    run_small(tmp_path / "two", every=1)
    assert names(tmp_path / "two") == ["00000004", "00000005"]
    clock = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    run_small(tmp_path / "time", every=timedelta(seconds=4), keep=10)
    assert len(names(tmp_path / "time")) == 3


def test_what_an_update_still_owes_is_run_first(tmp_path):
    """On an accelerator a scheduler may step as late as just before the next update."""
    last_epochs = []
    for _ in range(2):
        objects = small()
        schedule = torch.optim.lr_scheduler.ExponentialLR(objects["optimizer"], 0.9)
        step = train_step(objects["optimizer"], after=schedule.step)(lambda x: x)
        with resumable(
            tmp_path,
            model=objects["model"],
            schedule=schedule,
            optimizer=objects["optimizer"],
            step=step,
        ) as run:
            last_epochs.append(schedule.last_epoch)
            if len(last_epochs) == 1:
                step._owed, run._is_changed = Answer(False), True
    assert last_epochs == [0, 1]


def test_after_an_exception_nothing_is_written(tmp_path):
    with pytest.raises(ZeroDivisionError), resumable(tmp_path / "run", **small()):
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()


def test_a_run_at_its_end_has_nothing_left_to_do_and_may_be_made_longer(tmp_path):
    whole, parts = small(), small()
    run_small(tmp_path / "whole", 3, objects=whole)
    assert run_small(tmp_path / "parts", 2) == 16
    before = names(tmp_path / "parts")
    assert run_small(tmp_path / "parts", 2) == 0
    assert names(tmp_path / "parts") == before
    with resumable(tmp_path / "parts", **small()) as run:
        assert run.resumed_from == tmp_path / "parts" / before[-1]
    with resumable(tmp_path / "new", **small()) as run:
        assert run.resumed_from is None
    assert run_small(tmp_path / "parts", 3, objects=parts) == 8
    assert same(parts["model"].state_dict(), whole["model"].state_dict())


# The place in the loops.


def test_loops_without_epochs_are_counted_from_the_first(tmp_path):
    def loops(path, stop=None):
        objects, seen = small(), []
        with resumable(path, every=ALWAYS, seen=seen, **objects):
            for i in range(3):
                for x in objects["step"].over(batches(3, seed=i)):
                    if len(seen) == stop:
                        raise Killed
                    objects["step"](x)
                    seen.append((i, x[0, 0].item()))
        return seen, objects["model"].state_dict()

    expected = loops(tmp_path / "whole")
    for stop in range(1, 9):
        with pytest.raises(Killed):
            loops(tmp_path / str(stop), stop)
        assert same(loops(tmp_path / str(stop)), expected), stop


def test_two_loops_in_an_epoch_one_left_early_and_one_within_another(tmp_path):
    """Two loaders with generators of their own, whose states wait until they are read."""

    def loops(path, stop=None):
        objects, seen = small(), []
        a, b = (
            DataLoader(batches(6), shuffle=True, generator=torch.Generator().manual_seed(i))
            for i in range(2)
        )
        step = objects["step"]
        with resumable(path, every=ALWAYS, seen=seen, **objects) as run:
            for epoch in run.epochs(3):
                for x in step.over(a):
                    if len(seen) == stop:
                        raise Killed
                    for inner in step.over([x[0], x[0] + 1]):
                        step(inner)
                    seen.append((epoch, "a", x.sum().item()))
                    if len(seen) % 10 == 4:
                        break
                for x in step.over(b):
                    if len(seen) == stop:
                        raise Killed
                    step(x[0])
                    seen.append((epoch, "b", x.sum().item()))
        return seen, objects["model"].state_dict()

    expected = loops(tmp_path / "whole")
    assert len(expected[0]) < 3 * 12
    for stop in (1, 3, 4, 5, 14, 15, 25):
        with pytest.raises(Killed):
            loops(tmp_path / str(stop), stop)
        assert same(loops(tmp_path / str(stop)), expected), stop


def test_a_loader_that_is_made_with_random_numbers_in_every_epoch(tmp_path):
    """By hand, of a part of the rows, and of two loaders whose workers are seeded before the loop begins."""

    def permuted():
        return [batches()[i] for i in torch.randperm(8).tolist()[:3]]

    def zipped():
        a, b = (DataLoader(batches(3), shuffle=True, num_workers=1) for _ in range(2))
        return zip(a, b, strict=True)

    def loops(path, stop=None):
        objects, seen = small(), []
        with resumable(path, every=ALWAYS, seen=seen, **objects) as run:
            for _ in run.epochs(2):
                for make in (permuted, zipped):
                    for xs in objects["step"].over(make()):
                        if len(seen) == stop:
                            raise Killed
                        objects["step"](xs[0])
                        seen.append(float(sum(x.sum() for x in xs)))
                    torch.randn(3)  # an evaluation
        return seen, objects["model"].state_dict(), torch.rand(())

    expected = loops(tmp_path / "whole")
    for stop in range(1, 12):
        with pytest.raises(Killed):
            loops(tmp_path / str(stop), stop)
        assert same(loops(tmp_path / str(stop)), expected), stop


def test_two_loops_side_by_side_are_refused(tmp_path):
    objects, other = small(), small()
    step, other_step = objects["step"], other["step"]
    with (
        pytest.raises(
            RuntimeError,
            match=r"two loops of `over` are under way at once.*`step\.over\(zip\(a, b\), other_step\)`",
        ),
        resumable(tmp_path, **objects, **{f"other_{name}": thing for name, thing in other.items()}),
    ):
        for x, _ in zip(step.over(batches()), other_step.over(batches()), strict=True):
            step(x)


def test_two_steps_and_a_step_by_hand(tmp_path):
    """A GAN's steps with windows of other lengths, of which one is a context; killed between two micro-batches of both."""

    def loops(path, stop=None):
        torch.manual_seed(0)
        D, G, count = nn.Linear(8, 1), nn.Linear(8, 8), 0
        optimizers = (
            torch.optim.Adam(D.parameters()),
            torch.optim.SGD(G.parameters(), lr=0.1, momentum=0.9),
        )
        step_d = train_step(optimizers[0], accumulate(2))(
            lambda x: D(x).mean() + D(G(x).detach()).square().mean()
        )
        step_g = train_step(optimizers[1], accumulate(3))
        objects = {
            "D": D,
            "G": G,
            "a": optimizers[0],
            "b": optimizers[1],
            "step_d": step_d,
            "step_g": step_g,
        }
        with resumable(path, every=ALWAYS, **objects) as run:
            for _ in run.epochs(2):
                for x in step_d.over(batches(7), step_g):
                    if count == stop:
                        raise Killed
                    step_d(x)
                    with step_g:
                        step_g.backward((G(x) - torch.randn(8)).square().mean())
                    count += 1
        return D.state_dict(), G.state_dict(), step_d.state_dict(), step_g.state_dict()

    expected = loops(tmp_path / "whole")
    for stop in (1, 2, 3, 6, 7, 11):
        with pytest.raises(Killed):
            loops(tmp_path / str(stop), stop)
        assert same(loops(tmp_path / str(stop)), expected), stop


@pytest.mark.parametrize("rows", [3, 3000])  # an entry of the manifest, and a file
def test_an_open_window_with_the_sparse_gradients_of_an_embedding(rows, tmp_path):
    def loops(path, stop=None):
        model = nn.Embedding.from_pretrained(torch.ones(5000, 4), freeze=False, sparse=True)
        optimizer, count = torch.optim.SparseAdam(model.parameters(), lr=0.1), 0
        step = train_step(optimizer, accumulate(3))(lambda ids: model(ids).square().mean())
        with resumable(path, every=ALWAYS, model=model, optimizer=optimizer, step=step):
            for ids in step.over([torch.arange(rows) + i for i in range(5)]):
                if count == stop:
                    raise Killed
                step(ids)
                count += 1
        return model.weight

    for stop in (1, 2, 4):  # after two the gradient has rows twice
        with pytest.raises(Killed):
            loops(tmp_path / str(stop), stop)
        assert torch.equal(loops(tmp_path / str(stop)), loops(tmp_path / f"{stop} whole")), stop


def test_generators_of_random_numbers_are_given_or_found_in_the_loader(tmp_path):
    class Sampler(torch.utils.data.Sampler):
        def __init__(self):
            self.numbers = random.Random(1)

        def __iter__(self):
            return iter(self.numbers.sample(range(8), 8))

        def __len__(self):
            return 8

    def loops(path, stop=None):
        objects, seen = small(), []
        given = {
            "a": torch.Generator().manual_seed(1),
            "b": random.Random(2),
            "c": np.random.default_rng(3),
        }
        given["d"] = np.random.RandomState(4)
        loader = DataLoader(batches(), sampler=Sampler())
        with resumable(path, every=ALWAYS, seen=seen, **given, **objects) as run:
            for _ in run.epochs(2):
                for x in objects["step"].over(loader):
                    if len(seen) == stop:
                        raise Killed
                    objects["step"](x)
                    drawn = (
                        given["b"].random(),
                        given["c"].normal(),
                        given["d"].rand(),
                        torch.rand((), generator=given["a"]),
                    )
                    seen.append((x.sum().item(), *map(float, drawn)))
        return seen

    expected = loops(tmp_path / "whole")
    for stop in (1, 5, 8, 13):
        with pytest.raises(Killed):
            loops(tmp_path / str(stop), stop)
        assert loops(tmp_path / str(stop)) == expected, stop


def test_a_part_of_the_loader_would_find_its_place_twice(tmp_path):
    loader = DataLoader(StatefulRows(), BATCH)
    objects = small()
    with (
        pytest.raises(ValueError, match="'data' is a part of the loader"),
        resumable(tmp_path, data=loader.dataset, **objects),
    ):
        next(objects["step"].over(loader))


def test_another_loader_than_the_checkpoint_was_written_with(tmp_path):
    for loader, words in (
        (batches(4), "over 8 batches, and the loader has 4 now"),
        (iter(batches(2)), "has 0 now"),
    ):
        objects = small()
        with pytest.raises(Killed), resumable(tmp_path, every=ALWAYS, **objects):
            for i, x in enumerate(objects["step"].over(batches())):
                if i == 5:
                    raise Killed
                objects["step"](x)
        with pytest.raises(ValueError, match=words):
            run_small(tmp_path, loader=loader)
        for file in tmp_path.iterdir():
            shutil.rmtree(file)
    objects = small()
    with pytest.raises(Killed), resumable(tmp_path, every=ALWAYS, **objects):
        for i, x in enumerate(objects["step"].over(iter(batches()))):
            if i == 5:
                raise Killed
            objects["step"](x)
    with pytest.raises(RuntimeError, match="after 5 batches of this pass, and the loader has 2"):
        run_small(tmp_path, loader=iter(batches(2)))


# What it refuses.


def test_what_does_not_fit_is_refused_with_the_corrected_call(tmp_path):
    objects = small()
    for arguments, options, error, words in [
        (
            ("x",),
            {"every": 60.0},
            TypeError,
            "got 60.0: `every=timedelta(minutes=10)` or `every=1000`",
        ),
        (("x",), {"every": True}, TypeError, "every is a time or a number of updates, got True"),
        (("x",), {"every": 0}, ValueError, "got 0: `every=1000`"),
        (
            ("x",),
            {"every": timedelta(seconds=-1)},
            ValueError,
            "a time >= 0 or a number of updates >= 1",
        ),
        (("x",), {"keep": 0}, ValueError, "keep=0 would leave no checkpoint: `keep=2`"),
        (("x",), {"keep": 1.0}, TypeError, "got 1.0: `keep=2`"),
        (
            ("x",),
            {"history": (1, 2)},
            TypeError,
            "history is (1, 2), and has no state_dict and load_state_dict",
        ),
        (("x",), {"model": nn.Linear}, TypeError, "model is <class"),
        (
            ("x",),
            {"step": []},
            ValueError,
            "got model, optimizer, step, and no step, which knows the places",
        ),
    ]:
        with pytest.raises(error) as raised:
            resumable(*arguments, **{**objects, **options})
        assert words in str(raised.value)
    with pytest.raises(TypeError, match=r"got 2\.0: `for epoch in run\.epochs\(3\):`"):
        resumable("x", **objects).epochs(2.0)
    with pytest.raises(
        RuntimeError, match=r"outside of its block, where nothing is saved: `with resumable"
    ):
        resumable("x", **objects).epochs(2)
    with (
        resumable(tmp_path / "a", **objects) as run,
        pytest.raises(RuntimeError, match="in the block of another"),
    ):
        resumable(tmp_path / "b", **objects).__enter__()
    with pytest.raises(RuntimeError, match="make a new `resumable`"), run:
        pass


def test_a_path_that_cannot_be_written_is_refused_before_the_loop(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"file/run \(Not a directory\): give a path that can be written"
    ):
        resumable(tmp_path / "file" / "run", **small()).__enter__()
    run_small(tmp_path / "run")

    def is_read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", is_read_only)
    with pytest.raises(ValueError, match=r"run \(Read-only file system\).* `shutil\.copytree"):
        run_small(tmp_path / "run")


def test_what_the_step_uses_and_was_not_given_is_warned_of(tmp_path):
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = train_step(optimizer, after=[schedule.step, lambda: None])(lambda x: model(x).mean())
    with pytest.warns(
        UserWarning,
        match="the step changes what is not among the objects.*: SGD, ExponentialLR, 2 parameters; give it",
    ):
        resumable(tmp_path, step=step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumable(tmp_path, step=step, model=model, optimizer=optimizer, schedule=schedule)


def test_a_checkpoint_of_something_else_changes_nothing(tmp_path):
    run_small(tmp_path)
    for change, words in [
        (
            lambda o: o.update(ema=[]),
            "is of model, optimizer, step, and the objects given are ema, model, optimizer, step",
        ),
        (
            lambda o: o.update(small(torch.float64)),
            "model.0.weight was float32[32, 8], and is float64[32, 8]",
        ),
        (
            lambda o: o["model"].append(nn.Linear(8, 8)),
            "model.3.weight was not there, and is float32[8, 8]",
        ),
        (
            lambda o: o["optimizer"].add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
            "optimizer.param_groups.1 was not there, and is of 1 parameters",
        ),
        (
            lambda o: o.update(optimizer=torch.optim.SGD(o["model"].parameters())),
            "optimizer.param_groups.0 was of 4 parameters, lr, weight_decay, and is of 4 parameters, lr, momentum, dampening",
        ),
    ]:
        objects = small()
        change(objects)
        before = [p.clone() for p in objects["model"].parameters()]
        with warnings.catch_warnings(), pytest.raises(ValueError) as raised:
            warnings.simplefilter("ignore")  # that a parameter is in no module
            with resumable(tmp_path, **objects):
                pass
        assert words in str(raised.value)
        assert all(map(torch.equal, before, objects["model"].parameters()))
        assert objects["step"].updates == 0


def test_nothing_is_written_where_a_parameter_is_not_finite(tmp_path):
    objects = small()
    model, step = objects["model"], objects["step"]
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    with resumable(tmp_path, every=1, **objects):
        for i, x in enumerate(step.over(batches(4))):
            step(x)
            if i == 2:
                assert names(tmp_path) == ["00000001"]
                with torch.no_grad():
                    model[0].bias[0] = torch.nan
                caught = pytest.warns(
                    UserWarning,
                    match=r"model\.0\.weight is not finite, and no checkpoint is written",
                )
                caught.__enter__()
    caught.__exit__(None, None, None)
    assert names(tmp_path) == ["00000001"]


# What it writes and reads.


class Kept:
    def __init__(self, value=None):
        self.value = value

    def state_dict(self):
        return self.value

    def load_state_dict(self, state):
        self.value = state


class Tagged(torch.Tensor):
    pass


def through(path, value):
    """The value as it comes back."""
    with resumable(path, kept=Kept(value), **small()) as run:
        run._is_changed = True
    kept = Kept()
    with resumable(path, kept=kept, **small()):
        return kept.value


simple = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
values = st.recursive(
    simple,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            st.text() | st.integers() | st.tuples(st.integers(), st.booleans()), inner, max_size=3
        )
    ),
)


@settings(max_examples=25)
@given(values)
def test_values_come_back_as_they_were(value):
    with tempfile.TemporaryDirectory() as path:
        again = through(path, value)
        assert repr(again) == repr(value)  # which tells nan, -0.0, True and 1 apart


def test_tensors_arrays_and_containers_come_back_as_they_were(tmp_path):
    big = torch.arange(10_000.0).view(10, 10, 10, 10)
    value = {
        "dtypes": [
            torch.tensor([1, 0, 1]).to(dtype)
            for dtype in (torch.bool, torch.bfloat16, torch.uint16, torch.complex64)
        ],
        "shapes": [torch.empty(0, 3), torch.tensor(1.5), torch.ones(2, 0), big],
        "a": {"b": big + 1},
        "a.b": big + 2,
        "last": big.contiguous(memory_format=torch.channels_last),
        "view": big[:, ::2].transpose(0, 1),
        "arrays": (
            np.arange(3, dtype=np.int16),
            np.float64(1.5),
            np.zeros((2, 0)),
            np.array(["ab"]),
            np.bool_(True),
        ),
        "containers": [
            OrderedDict(b=1, a=2),
            Counter("aab"),
            {1, 2},
            frozenset("x"),
            torch.Size([1, 2]),
        ],
    }
    again = through(tmp_path, value)
    assert list(again) == list(value)
    for name in ("dtypes", "shapes", "a", "a.b", "last", "view", "containers"):
        assert same(again[name], value[name]), name
    assert again["last"].is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(again["arrays"], value["arrays"], strict=True):
        assert (
            type(ours) is type(theirs)
            and ours.dtype == theirs.dtype
            and np.array_equal(ours, theirs)
        )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            {"a": [1, object()]},
            r"kept\.a\.1 is of type builtins\.object, and a checkpoint holds no objects but numbers",
        ),
        ({"f": len}, r"kept\.f is of type builtins\.builtin_function_or_method"),
        (
            {"s": torch.eye(2).as_subclass(Tagged)},
            r"kept\.s is of type Tagged and layout torch\.strided",
        ),
        ({"n": np.array([None])}, r"kept\.n is of type numpy\.ndarray"),
    ],
)
def test_what_it_cannot_hold_is_named_and_nothing_is_written(value, words, tmp_path):
    with pytest.raises(TypeError, match=words):  # before the loop, where it is there already
        resumable(tmp_path / "run", **small(), kept=value).__enter__()
    kept = {}
    with (
        pytest.raises(TypeError, match=words),
        resumable(tmp_path / "run", **small(), kept=kept) as run,
    ):
        run._is_changed = True
        kept.update(value)
    assert not (tmp_path / "run").exists()


def test_schedulers_optimizers_and_a_compiled_model_have_states_that_it_holds(tmp_path):
    model = nn.Linear(2, 2)
    lr = torch.optim.lr_scheduler
    for i, make in enumerate(
        (
            torch.optim.SGD,
            torch.optim.NAdam,
            torch.optim.Rprop,
            torch.optim.ASGD,
            torch.optim.Adafactor,
        )
    ):
        optimizer = make(model.parameters(), lr=0.1)
        schedules = {
            "a": lr.OneCycleLR(optimizer, 0.1, 10) if i == 0 else lr.LinearLR(optimizer),
            "b": lr.ReduceLROnPlateau(optimizer),
            "c": lr.CosineAnnealingWarmRestarts(optimizer, 5),
            "d": lr.SequentialLR(
                optimizer, [lr.ConstantLR(optimizer), lr.PolynomialLR(optimizer)], [2]
            ),
            "e": lr.LambdaLR(optimizer, lambda epoch: 1.0),
            "f": torch.optim.swa_utils.SWALR(optimizer, 0.1),
            "ema": torch.optim.swa_utils.AveragedModel(model),
            "scaler": torch.amp.GradScaler("cpu"),
        }
        states = []
        for _ in range(2):
            step = train_step(optimizer)(lambda x: model(x).square().mean())
            objects = {
                "step": step,
                "model": torch.compile(model),
                "optimizer": optimizer,
                **schedules,
            }
            with resumable(tmp_path / str(i), **objects) as run:
                for _ in run.epochs(1):
                    for x in step.over(torch.ones(3, 1, 2)):
                        step(x)
                        for name in "acdef":
                            schedules[name].step()
                        schedules["b"].step(1.0)
            states.append(
                [thing.state_dict() for name, thing in objects.items() if name != "model"]
            )
        assert same(*states)


# Damage.


def two_checkpoints(path):
    """Returns the parameters as of the newest and of the one before."""
    run_small(path, 1)
    before = small()
    with resumable(path, **before):
        pass
    newest = small()
    run_small(path, 2, objects=newest)
    assert names(path) == ["00000001", "00000002"]
    return newest, before


def test_a_damaged_checkpoint_is_never_loaded(tmp_path):
    """A bit of each of its files, at both ends and in between; each cut, emptied, and gone."""
    newest, before = two_checkpoints(tmp_path)
    folder, draw = tmp_path / "00000002", random.Random(0)

    def loads(expected):
        objects = small()
        with resumable(tmp_path, **objects):
            assert same(objects["model"].state_dict(), expected["model"].state_dict())
            assert same(objects["optimizer"].state_dict(), expected["optimizer"].state_dict())

    assert len(list(folder.iterdir())) == 3
    for file in list(folder.iterdir()):
        whole = file.read_bytes()
        places = [0, 1, 64, 65, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(3))]
        flipped = [
            bytes([*whole[:i], whole[i] ^ (1 << draw.randrange(8)), *whole[i + 1 :]])
            for i in places
        ]
        for content in (*flipped, whole[: len(whole) // 2], whole + b"\0", b"", None):
            file.unlink() if content is None else file.write_bytes(content)
            with pytest.warns(
                UserWarning,
                match=r"00000002 is damaged \(.*\); going on from .*00000001, the one before",
            ):
                loads(before)
        file.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loads(newest)


def test_after_damage_the_one_before_is_kept_until_there_are_newer_ones(tmp_path):
    two_checkpoints(tmp_path)
    (tmp_path / "00000002" / "__0_0.distcp").write_bytes(b"")
    with pytest.warns(UserWarning, match="going on from"):
        run_small(tmp_path, 2)
    assert names(tmp_path) == ["00000001", "00000003"]
    for name in names(tmp_path):
        (tmp_path / name / "manifest.json").unlink()
    with pytest.raises(
        RuntimeError,
        match=r"00000003 is damaged .*00000001 is damaged .*and there is no other: to begin anew",
    ):
        run_small(tmp_path)


@pytest.mark.parametrize("after", range(9))
def test_killed_in_the_middle_of_a_save(after, tmp_path, monkeypatch):
    """At each of the calls that change something on the disk."""
    run_small(tmp_path)
    calls = []

    def counted(function):
        def call(*arguments, **options):
            calls.append(function)
            if len(calls) > after:
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "rename"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr(Path, "mkdir", counted(Path.mkdir))
        with pytest.raises(Killed):
            run_small(tmp_path, 2, keep=1)
    objects = small()
    assert run_small(tmp_path, 2, objects=objects) in (0, 8)
    assert not any(name.startswith(".") for name in names(tmp_path))
    whole = small()
    run_small(tmp_path / "whole", 2, objects=whole)
    assert same(objects["model"].state_dict(), whole["model"].state_dict())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("function", ["FileSystemReader.read_data", "FileSystemWriter.write_data"])
def test_ctrl_c_and_a_full_disk_come_out_of_pytorch_as_they_are(
    function, error, tmp_path, monkeypatch
):
    """Within its own exception they would be no KeyboardInterrupt, and not even an Exception."""
    run_small(tmp_path)

    def fail(*arguments):
        raise error("it")

    monkeypatch.setattr(f"torch.distributed.checkpoint.{function}", fail)
    with pytest.raises(error, match="it"):
        run_small(tmp_path, 2)


class Malicious:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_not_run(tmp_path):
    run_small(tmp_path)
    folder, thing = tmp_path / "00000001", Malicious()
    thing.path = str(tmp_path / "ran")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for content in (
        thing,
        replace(metadata, planner_data=thing),
        replace(metadata, state_dict_metadata={"a": BytesStorageMetadata()}),
    ):
        (folder / ".metadata").write_bytes(pickle.dumps(content))
        manifest = json.loads((folder / "manifest.json").read_bytes().partition(b"\n")[2])
        manifest["files"][".metadata"] = _hash(folder / ".metadata")
        _write_manifest(folder / "manifest.json", manifest)
        with pytest.raises(
            ValueError, match=r"\.metadata asks for .*, which no checkpoint needs: it is not loaded"
        ):
            run_small(tmp_path)
        assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_a_later_version(tmp_path):
    run_small(tmp_path)
    file = tmp_path / "00000001" / "manifest.json"
    _write_manifest(file, {**json.loads(file.read_bytes().partition(b"\n")[2]), "format": 2})
    with pytest.raises(
        ValueError, match="is of format 2, which this version of trainkit does not know"
    ):
        run_small(tmp_path)
