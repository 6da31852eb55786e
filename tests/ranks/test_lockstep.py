"""Loaders of several ranks in lockstep, with a thread for each rank."""

import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.ranks.lockstep import lockstep


class Sized(list):
    """A loader with a length, which may lie, and a count of what was read."""

    def __init__(self, batches, length):
        super().__init__(batches)
        self.length, self.read = length, 0

    def __len__(self):
        return self.length

    def __iter__(self):
        for batch in super().__iter__():
            self.read += 1
            yield batch


def on_threads(loaders, length, look=lambda rank: None):
    """Return the deliveries of each rank, or the exception."""
    told, barrier = [None] * len(loaders), threading.Barrier(len(loaders), timeout=20)

    def run(rank):
        def exchange(*numbers):
            told[rank] = numbers
            barrier.wait()
            everything = torch.tensor(told)
            barrier.wait()
            return everything

        found = []
        try:
            for delivery in lockstep(loaders[rank], lambda: length, exchange):
                look(rank)
                found.append(delivery)
        except Exception as error:
            return error
        return found

    with ThreadPoolExecutor(len(loaders)) as pool:
        return list(pool.map(run, range(len(loaders))))


class Restarting:
    """An iterator of two batches that begins again after its end."""

    number = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.number = (self.number + 1) % 3
        if not self.number:
            raise StopIteration
        return self.number


def test_a_loader_that_begins_again_after_its_end_is_read_once():
    found, _ = on_threads([Restarting(), Sized(range(7), 7)], length=2)
    assert [delivery.is_filler for delivery in found] == [False] * 2 + [True] * 5


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    kinds=st.tuples(*[st.sampled_from([None, 0, -1])] * 3),
    length=st.integers(1, 5) | st.just(math.inf),
)
def test_all_ranks_get_as_many_batches_as_the_rank_with_most(sizes, kinds, length):
    """``kinds``: no length, or a true one, or one that is less by one batch."""
    loaders = []
    for size, kind in zip(sizes, kinds, strict=False):
        told = None if kind is None else max(size + kind, 0)
        loaders.append(iter(range(size)) if told is None else Sized(range(size), told))
    most = max(sizes)
    for size, found in zip(sizes, on_threads(loaders, length), strict=True):
        assert [delivery.batch for delivery in found] == [min(i, size - 1) for i in range(most)]
        assert [delivery.is_last for delivery in found] == [False] * (most - 1) + [True]
        assert [delivery.is_filler for delivery in found] == [i >= size for i in range(most)]
        assert [delivery.number for delivery in found] == list(range(most))
        present = [sum(i < other for other in sizes) / len(sizes) for i in range(most)]
        assert [delivery.present for delivery in found] == present


def test_a_rank_without_a_batch_is_an_error_on_all_ranks():
    for error in on_threads([[], [1, 2]], 2):
        assert isinstance(error, ValueError) and "ranks [0]" in str(error)
    assert on_threads([[], []], 2) == [[], []]


def test_a_loader_with_a_length_is_read_ahead_only_at_its_end():
    loader, read = Sized(range(6), 6), []
    on_threads([loader], 3, lambda rank: read.append(loader.read))
    assert read == [1, 2, 3, 6, 6, 6]


def test_windows_without_a_length_are_not_read_ahead_to_their_end():
    loader, read = Sized(range(6), 6), []
    on_threads([loader], math.inf, lambda rank: read.append(loader.read))
    assert read == [1, 2, 3, 4, 5, 6]


@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=3), length=st.integers(1, 3))
def test_where_loaders_never_end_all_ranks_learn_that_one_did(sizes, length):
    """In the exchange after its last batch was missed, or in the first if it had none."""
    found = on_threads([Sized(range(size), sys.maxsize) for size in sizes], length)
    told = [size and size // length + 1 for size in sizes]
    ended = [rank for rank, exchange in enumerate(told) if exchange == min(told)]
    for error in found:
        assert isinstance(error, ValueError) and f"ranks {ended} " in str(error)


def test_a_loader_that_ends_a_window_before_its_length_is_an_error():
    (error,) = on_threads([Sized(range(3), 9)], 2)
    assert isinstance(error, RuntimeError) and "length 9 ended before batch 4" in str(error)


def test_a_repeated_batch_is_whole_although_the_loop_took_entries_out():
    first, second = {"x": 1}, [2]
    found = []
    deliveries = lockstep(
        [first, second], lambda: 1, lambda *mine: torch.tensor([mine, (1, len(found) < 3)])
    )
    for delivery in deliveries:
        found.append(delivery.batch.copy())
        delivery.batch.clear()
    assert found == [{"x": 1}, [2], [2], [2]]
