"""``step.over(loader, updates=N)`` under resumable: the loader again and again, exactly resumed."""

import math
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saving_runs import ALWAYS, LOADERS, Killed, batches, same, small
from torch import nn
from torch.utils.data import DataLoader

from trainkit import accumulate, amp, resumable, train_step


def endless(loader):
    while True:
        yield from loader


def train(path, kind="shuffled", stop=None, every=ALWAYS, n=3, updates=(4, 3), scale=2.0**10):
    """Two loops in each of two epochs; without a path, loops by hand over an endless generator."""
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    loader, losses, seen = LOADERS[kind](), [], []
    precision = amp(dtype=torch.float16, init_scale=scale)
    step = train_step(optimizer, accumulate(n), precision, max_norm=0.5)(
        lambda i, x, y: ((model(x) - y).square().mean(), len(x))
    )
    objects = {"model": model, "optimizer": optimizer, "step": step, "losses": losses}
    if kind.startswith("stateful"):
        objects["loader"] = getattr(loader, "iterable", loader)
    objects["seen"] = seen
    with resumable(path, every=every, **objects) if path else nullcontext() as run:
        for _ in run.epochs(2) if path else range(2):
            for count in updates:
                closed = 0
                for i, x, y in step.over(loader, updates=count) if path else endless(loader):
                    if len(seen) == stop:
                        raise Killed
                    result = step(i, x, y)
                    losses.append(result.loss)
                    seen.append(i.tolist() if isinstance(i, torch.Tensor) else i)
                    closed += result.complete
                    if not path and closed == count:
                        break
                torch.randn(3)  # an evaluation
    drawn = [random.random(), np.random.rand(), torch.rand(())]
    return [*(thing.state_dict() for thing in (model, optimizer, step)), losses, seen, drawn]


@pytest.mark.parametrize("kind", LOADERS)
def test_killed_anywhere_and_run_again_ends_with_the_bits_of_a_loop_by_hand(kind, tmp_path):
    """A loop of 12 batches, and one of 9; the loader has 7."""
    # Persistent workers draw a random number when they start, which is once in a process.
    expected = train(tmp_path / "whole" if kind == "persistent" else None, kind)
    assert len(expected[4]) == 42
    assert same(train(tmp_path / "all", kind), expected)
    for stop in (5, 7, 8, 11, 12, 13, 19, 21, 30) if kind == "shuffled" else (8, 14, 25):
        with pytest.raises(Killed):
            train(tmp_path / str(stop), kind, stop)
        assert same(train(tmp_path / str(stop), kind), expected), stop


@settings(max_examples=10)
@given(
    stop=st.integers(1, 30),
    n=st.integers(1, 5),
    every=st.sampled_from([ALWAYS, 1, 2, 3]),
    updates=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    scale=st.sampled_from([2.0**10, 2.0**24]),
)
def test_whatever_was_saved_and_where_it_was_killed(
    stop, n, every, updates, scale, tmp_path_factory
):
    """With 2 ** 24 the first updates are skipped: their windows count."""
    path, options = tmp_path_factory.mktemp("run"), {"n": n, "updates": updates, "scale": scale}
    expected = train(None, **options)
    assert len(expected[4]) == 2 * n * sum(updates)
    for at in (stop, stop + 3, None):  # killed twice
        with pytest.raises(Killed) if at is not None and at < len(expected[4]) else nullcontext():
            found = train(path, stop=at, every=every, **options)
    assert same(found, expected)


def test_windows_that_are_closed_by_hand_count(tmp_path):
    """Of a step whose windows end where the loop says so; the last after ten batches."""

    def loops(path, stop):
        objects = small()
        step = train_step(objects["optimizer"], accumulate(99))(
            lambda x: objects["model"](x).square().mean()
        )
        objects["step"], count = step, 0
        with resumable(path, every=ALWAYS, **objects):
            for x in step.over(batches(3), updates=4):
                if count == stop:
                    raise Killed
                count += 1
                (step.last if torch.equal(x, batches()[0]) else step)(x)
        return objects["model"].state_dict(), step.updates

    expected = loops(tmp_path / "whole", None)
    assert expected[1] == 4
    for stop in (1, 4, 7, 9):
        with pytest.raises(Killed):
            loops(tmp_path / str(stop), stop)
        assert same(loops(tmp_path / str(stop), None), expected)


def test_more_updates_than_before_and_a_run_at_its_end(tmp_path):
    whole, parts = small(), small()

    def run(path, updates, objects):
        count = 0
        with resumable(path, every=3, **objects):
            for x in objects["step"].over(batches(3), updates=updates):
                objects["step"](x)
                count += 1
                if updates == 9 and count == 8:
                    raise Killed
        return count

    assert run(tmp_path / "whole", 8, whole) == 16
    assert run(tmp_path / "whole", 8, small()) == 0
    with pytest.raises(Killed):
        run(tmp_path / "parts", 9, small())
    assert run(tmp_path / "parts", 8, parts) == 16 - 6
    assert same(parts["model"].state_dict(), whole["model"].state_dict())


class Once:
    """A loader without a length, whose batches can be read once, from wherever a run begins."""

    def __init__(self, items):
        self.iterator = iter(items)

    def __iter__(self):
        return self.iterator


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: iter(batches(3)), "after 1 of 4"),
        (lambda: (x for x in batches(4)), "after 2 of 4"),
        (lambda: Once(batches(3)), "after 1 of 4"),
        (list, "after 0 of 4"),
        (lambda: DataLoader([]), "after 0 of 4"),
    ],
)
def test_a_loader_that_ends_before_its_updates_is_refused(make, words, tmp_path):
    """As without resumable; also where the run is resumed."""

    def ended(surrounding, stop=None):
        objects = small()
        with pytest.raises(ValueError, match=words) as raised, surrounding(objects):
            for i, x in enumerate(objects["step"].over(make(), updates=4)):
                if i == stop:
                    raise ValueError(words)
                objects["step"](x)
        return str(raised.value)

    plain = ended(lambda objects: nullcontext())
    assert "`step.over(list(loader), updates=N)`" in plain
    for stop in (None, 2):
        path = tmp_path / str(stop)
        ended(lambda objects, path=path: resumable(path, every=ALWAYS, **objects), stop)
        assert ended(lambda objects, path=path: resumable(path, **objects)) == plain


def test_a_shorter_loader_than_before_is_refused(tmp_path):
    class Hidden:
        def __init__(self, items):
            self.items = items

        def __iter__(self):
            return iter(self.items)

    def run(loader, stop=math.inf):
        objects = small()
        with resumable(tmp_path, every=ALWAYS, **objects):
            for i, x in enumerate(objects["step"].over(loader, updates=9)):
                if i == stop:
                    raise Killed
                objects["step"](x)

    with pytest.raises(Killed):
        run(Hidden(batches(5)), 9)
    with pytest.raises(ValueError, match=r"from after 4 .* has 2"):
        run(Hidden(batches(2)))


def test_a_bar_counts_all_batches_of_the_loop(tmp_path, capsys):
    def run(stop=None):
        objects = small()
        with resumable(tmp_path, every=ALWAYS, **objects):
            over = objects["step"].over(batches(3), updates=4, progress={"mininterval": 0})
            for i, x in enumerate(over):
                if i == stop:
                    raise Killed
                objects["step"](x)

    with pytest.raises(Killed):
        run(5)
    capsys.readouterr()
    run()
    shown = capsys.readouterr().err
    assert "8it" in shown and "6it" in shown and "\r4it" not in shown and "/3" not in shown
