"""Stopping at any moment and running the script again gives the same bits as not stopping."""

import io
import random
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from saving_runs import (
    ALWAYS,
    LOADERS,
    Killed,
    batches,
    run_small,
    same,
    same_when_killed,
    small,
    train,
)
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from trainkit import accumulate, resumable, train_step


@pytest.mark.parametrize("kind", LOADERS)
def test_a_run_that_was_killed_ends_with_the_same_bits(kind, tmp_path):
    # Persistent workers draw a random number when they start, which is once in a process.
    expected, total = train(tmp_path / "whole" if kind == "persistent" else None, kind)
    for stop in (1, 6, 7, 13) if kind == "shuffled" else (2, 7):
        with pytest.raises(Killed):
            train(tmp_path / str(stop), kind, stop)
        states, count = train(tmp_path / str(stop), kind)
        assert same(states, expected) and count == total - stop, stop


def looped(path, stop, *loops, epochs=3, more=None):
    """Loops over loaders in epochs; returns what the batches were, and the parameters."""
    objects, seen = small(), []
    with resumable(path, every=ALWAYS, seen=seen, **(more or {}), **objects) as run:
        for epoch in run.epochs(epochs):
            for loop in loops:
                loop(objects["step"], epoch, seen, stop)
            torch.randn(3)  # an evaluation
    return seen, objects["model"].state_dict(), torch.rand(())


def over(loader):
    def loop(step, epoch, seen, stop):
        for x in step.over(loader() if callable(loader) else loader):
            if len(seen) == stop:
                raise Killed
            step(x[0] if isinstance(x, (tuple, list)) else x)
            seen.append(float(sum(part.sum() for part in x)))

    return loop


def with_generator(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(batches(count), shuffle=True, generator=generator)


def permuted(generator):
    return DataLoader(batches(6), 3, shuffle=True, generator=generator)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def used_again(*seeds):
    """Loaders for each epoch, made once."""
    loaders = list(map(permuted, seeded(*seeds)))
    return lambda epoch: loaders[epoch % len(seeds)]


def made_anew(generator):
    """A loader that is made in each epoch."""
    return lambda epoch: permuted(generator(epoch) if callable(generator) else generator)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [used_again(0), used_again(0)],  # a training and an evaluation, with one seed
        lambda: [used_again(0, 0, 0), used_again(1, 2)],
        lambda: [made_anew(lambda epoch: seeded(epoch)[0])] * 2,
        lambda: [made_anew(lambda epoch: seeded(0)[0])],
        lambda: [made_anew(generator) for generator in seeded(0, 1)],
    ],
)
def test_generators_of_loaders_that_are_used_again_or_made_anew(make, tmp_path):
    def loops(path, stop):
        def loop(i, loader_of):
            def run(step, epoch, seen, stop):
                kept[i] = loader_of(epoch)
                over(kept[i])(step, epoch, seen, stop)

            return run

        kept = {}  # as long as a variable of the script keeps them
        return looped(path, stop, *(loop(i, loader_of) for i, loader_of in enumerate(make())))

    same_when_killed(loops, tmp_path, range(1, 12 if len(make()) == 2 else 6, 2))


@pytest.mark.skipif(
    torch.Generator.__weakrefoffset__ == 0, reason="generators of torch 2.6 have no weak references"
)
def test_generators_that_nothing_keeps_are_not_saved(tmp_path):
    def size(epochs):
        path = tmp_path / str(epochs)
        looped(
            path,
            None,
            lambda step, epoch, *rest: over(permuted(*seeded(epoch)))(step, epoch, *rest),
            epochs=epochs,
        )
        return max(file.stat().st_size for file in path.glob("*/rank0.pt"))

    assert size(9) < size(2) + 5000  # one more state of a generator has 5056 bytes


def test_two_loaders_that_are_made_anew_with_one_seed_are_warned_of(tmp_path):
    """Not the first loader of an epoch, whose position a checkpoint always has."""
    with pytest.warns(UserWarning, match="two generators .* one seed") as found:
        same_seed = [over(permuted(*seeded(0))) for _ in range(6)]

        def loop(i):
            return lambda step, epoch, *rest: same_seed[2 * epoch + i](step, epoch, *rest)

        looped(tmp_path, None, loop(0), loop(1))
    assert len(found) == 2


def test_two_loops_in_an_epoch_one_left_early_and_one_within_another(tmp_path):
    """Two loaders have generators, whose states wait until they are read, and one has workers."""

    def loops(path, stop):
        a = with_generator(0, 6)

        def left_early(step, epoch, seen, stop):
            for x in step.over(a):
                if len(seen) == stop:
                    raise Killed
                for inner in step.over([x[0], x[0] + 1]):
                    step(inner)
                seen.append(x.sum().item())
                if len(seen) % 10 == 4:
                    break

        workers = DataLoader(batches(2), num_workers=1, persistent_workers=True)
        return looped(path, stop, left_early, over(workers), over(with_generator(1, 4)), epochs=2)

    expected = same_when_killed(loops, tmp_path, (4, 11))
    assert len(expected[0]) == 4 + 2 + 4 + 4 + 2 + 4


def test_a_loader_that_is_made_with_random_numbers_in_every_epoch(tmp_path):
    """By hand, of a part of the rows; and of two loaders whose workers are seeded before."""

    def permuted():
        return [batches()[i] for i in torch.randperm(8).tolist()[:3]]

    def zipped():
        loaders = (DataLoader(batches(3), shuffle=True, num_workers=1) for _ in range(2))
        return zip(*loaders, strict=True)

    def loops(path, stop):
        return looped(path, stop, over(permuted), over(zipped), epochs=2)

    same_when_killed(loops, tmp_path, (2, 8))


def test_loops_without_epochs_are_counted_from_the_first(tmp_path):
    def loops(path, stop):
        objects, seen = small(), []
        with resumable(path, every=ALWAYS, seen=seen, **objects):
            for i in range(3):
                over(batches(3, seed=i))(objects["step"], 0, seen, stop)
        return seen, objects["model"].state_dict()

    same_when_killed(loops, tmp_path, (3, 5))


def test_loops_before_the_epochs_between_them_and_after(tmp_path):
    def loops(path, stop):
        objects, seen = small(), []
        loop = over(DataLoader(batches(3), shuffle=True))
        with resumable(path, every=ALWAYS, seen=seen, **objects) as run:
            torch.randn(3)  # an evaluation
            loop(objects["step"], 0, seen, stop)
            for epochs in (2, 3):
                for epoch in run.epochs(epochs):
                    loop(objects["step"], epoch, seen, stop)
                loop(objects["step"], epochs, seen, stop)
        return seen, objects["model"].state_dict(), torch.rand(())

    expected = same_when_killed(loops, tmp_path, (2, 3, 4, 7, 8, 10, 13, 17))
    assert len(expected[0]) == 6 * 3
    assert same(loops(tmp_path / "whole", 0)[:2], expected[:2])  # nothing is left


@pytest.mark.parametrize("kept", [lambda loop: loop, lambda loop: tqdm(loop, file=io.StringIO())])
def test_a_loop_that_is_left_while_a_variable_keeps_it(kept, tmp_path):
    def loops(path, stop):
        def left(step, epoch, seen, stop):
            variables.append(kept(step.over(batches(6))))
            for x in variables[-1]:
                if len(seen) == stop:
                    raise Killed
                step(x)
                seen.append(x.sum().item())
                if len(seen) % 3 == 0:
                    break

        variables = []
        return looped(path, stop, left)

    expected = same_when_killed(loops, tmp_path, (2, 4, 7))
    assert len(expected[0]) == 3 * 3


def test_loops_after_one_that_a_variable_keeps_are_warned_of(tmp_path):
    """They cannot be told from loops within it. A variable that was closed keeps nothing."""

    def loops(objects, is_closed):
        count, step = 0, objects["step"]
        with resumable(tmp_path / str(is_closed), **objects):
            kept = step.over(batches(6))
            for x in kept:
                step.last(x)
                count += 1
                break
            if is_closed:
                kept.close()
            for x in step.over(batches(3)):
                step(x)
                count += 1
        return count

    with pytest.warns(UserWarning, match=r"a variable keeps .* 1 loop\(s\) .*`batches\.close\(\)`"):
        assert loops(small(), False) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loops(small(), True) == 4
        assert loops(small(), False) == loops(small(), True) == 0


def endless(count=99):
    while True:
        yield from batches(count)


def passed_on(generator):
    yield from generator


@pytest.mark.parametrize(
    "loader",
    [
        lambda g: g,
        lambda g: islice(g, 2),
        lambda g: zip(range(2), enumerate(g), strict=False),
        lambda g: tqdm(g, disable=True),
        lambda g: passed_on(map(torch.abs, g)),
    ],
)
def test_a_generator_that_a_second_loop_continues_is_warned_of_once(loader, tmp_path):
    """A resumed run makes it anew, and its batches would be others."""
    objects, generator = small(), endless()
    with (
        pytest.warns(UserWarning, match=r"generator .*`step\.over\(loader, updates=N\)`") as found,
        resumable(tmp_path, **objects) as run,
    ):
        for epoch in run.epochs(3):
            for _ in objects["step"].over(range(2)):
                objects["step"](batches()[0])
            assert len(found) == max(0, min(epoch - 1, 1))
            for _ in objects["step"].over(loader(generator)):
                objects["step"].last(batches()[0])
                break


@pytest.mark.filterwarnings("error")
def test_loops_that_begin_anew_are_not_warned_of(tmp_path):
    workers = DataLoader(batches(4), num_workers=1, persistent_workers=True)

    class Own:
        """A loader that is its own iterator, and begins again."""

        def __iter__(self):
            self.left = batches(2)
            return self

        def __next__(self):
            if not self.left:
                raise StopIteration
            return self.left.pop()

    own, objects = Own(), small()
    with resumable(tmp_path, **objects) as run:
        for _ in run.epochs(3):
            for loader in (range(2), own, islice(endless(), 2), zip(workers, workers, strict=True)):
                for _ in objects["step"].over(loader):
                    objects["step"](batches()[0])


def test_two_loops_side_by_side_are_refused(tmp_path):
    objects, other = small(), {f"other_{name}": thing for name, thing in small().items()}
    step, other_step = objects["step"], other["other_step"]
    with (
        pytest.raises(RuntimeError, match=r"two loops of `over` .*`step\.over\(zip\(a, b\)"),
        resumable(tmp_path, **objects, **other),
    ):
        for x, _ in zip(step.over(batches()), other_step.over(batches()), strict=True):
            step(x)


def test_two_steps_and_a_step_by_hand(tmp_path):
    """A GAN's steps with windows of other lengths; killed between two micro-batches of both."""

    def loops(path, stop):
        torch.manual_seed(0)
        D, G, count = nn.Linear(8, 1), nn.Linear(8, 8), 0
        a = torch.optim.Adam(D.parameters())
        b = torch.optim.SGD(G.parameters(), lr=0.1, momentum=0.9)
        step_d = train_step(a, accumulate(2))(
            lambda x: D(x).mean() + D(G(x).detach()).square().mean()
        )
        step_g = train_step(b, accumulate(3))
        objects = {"D": D, "G": G, "a": a, "b": b, "step_d": step_d, "step_g": step_g}
        with resumable(path, every=ALWAYS, **objects) as run:
            for _ in run.epochs(2):
                for x in step_d.over(batches(7), step_g):
                    if count == stop:
                        raise Killed
                    step_d(x)
                    with step_g:
                        step_g.backward((G(x) - torch.randn(8)).square().mean())
                    count += 1
        return [thing.state_dict() for thing in objects.values()]

    same_when_killed(loops, tmp_path, (2, 11))


def test_an_open_window_with_the_sparse_gradients_of_an_embedding(tmp_path):
    def loops(path, stop):
        model = nn.Embedding.from_pretrained(torch.ones(5000, 4), freeze=False, sparse=True)
        optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
        step = train_step(optimizer, accumulate(3))(lambda ids: model(ids).square().mean())
        with resumable(path, every=ALWAYS, model=model, optimizer=optimizer, step=step):
            for i, ids in enumerate(step.over([torch.arange(3000) + i for i in range(5)])):
                if i == stop:
                    raise Killed
                step(ids)
        return model.weight.detach()

    same_when_killed(loops, tmp_path, (1, 2, 4))  # after two the gradient has rows twice


def test_generators_of_random_numbers_are_given_or_found_in_the_loader(tmp_path):
    class Sampler(torch.utils.data.Sampler):
        def __init__(self):
            self.numbers = random.Random(1)

        def __iter__(self):
            return iter(self.numbers.sample(range(8), 8))

        def __len__(self):
            return 8

    def loops(path, stop):
        a, b = torch.Generator().manual_seed(1), random.Random(2)
        c, d = np.random.default_rng(3), np.random.RandomState(4)

        def draw(step, epoch, seen, stop):
            for x in step.over(loader):
                if len(seen) == stop:
                    raise Killed
                step(x)
                drawn = b.random(), c.normal(), d.rand(), torch.rand((), generator=a)
                seen.append((x.sum().item(), *map(float, drawn)))

        loader = DataLoader(batches(), sampler=Sampler())
        return looped(path, stop, draw, epochs=2, more={"a": a, "b": b, "c": c, "d": d})

    same_when_killed(loops, tmp_path, (8, 13))


def test_datasets_within_a_dataset_have_generators(tmp_path):
    class Noisy(torch.utils.data.Dataset):
        def __init__(self, seed):
            self.numbers = np.random.default_rng(seed)

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return torch.full((8,), self.numbers.normal())

    def loops(path, stop):
        both = torch.utils.data.ConcatDataset([Noisy(0), Noisy(1)])
        return looped(path, stop, over(DataLoader(both, 2, shuffle=True)), epochs=2)

    same_when_killed(loops, tmp_path, (2, 4))


def test_a_part_of_the_loader_would_be_positioned_twice(tmp_path):
    class Data(list):
        state_dict, load_state_dict = dict, print  # only their presence counts

    loader, objects = DataLoader(Data(batches())), small()
    with (
        pytest.raises(ValueError, match=r"data is a part of the loader.*`data=loader`"),
        resumable(tmp_path, data=loader.dataset, **objects),
    ):
        next(objects["step"].over(loader))


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (batches, lambda: batches(4), "over 8 batches .* over 4 batches"),
        (batches, lambda: iter(batches(2)), "over 8 batches .* over 0 batches"),
        (lambda: iter(batches()), lambda: iter(batches(2)), "after 5 .* has 2"),
    ],
)
def test_another_loader_than_the_checkpoint_was_written_with(before, now, words, tmp_path):
    def kill(count):
        if count == 5:
            raise Killed

    with pytest.raises(Killed):
        run_small(tmp_path, loader=before(), at_batch=kill, every=ALWAYS)
    with pytest.raises(ValueError, match=words):
        run_small(tmp_path, loader=now())


def test_a_bar_begins_where_the_run_was_resumed(tmp_path, capsys):
    def loops(stop):
        objects = small()
        with resumable(tmp_path, every=ALWAYS, **objects):
            for i, x in enumerate(objects["step"].over(batches(), progress={"mininterval": 0})):
                if i == stop:
                    raise Killed
                objects["step"](x)

    with pytest.raises(Killed):
        loops(3)
    capsys.readouterr()
    loops(None)
    shown = capsys.readouterr().err
    assert "4/8" in shown and "2/8" not in shown
