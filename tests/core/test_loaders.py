import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.core.loaders import in_step, mark_last


class Loader:
    """Says it has `says` batches, and has `has`; counts those that were asked for."""

    def __init__(self, has, says):
        self.has, self.says, self.asked = has, says, 0

    def __iter__(self):
        for i in range(self.has):
            self.asked += 1
            yield i

    def __len__(self):
        if self.says is None:
            raise TypeError("no length")
        return self.says


@pytest.mark.parametrize("has", range(4))
@pytest.mark.parametrize("says", [None, 0, 1, 2, 3, 4])
def test_every_batch_comes_once_in_order_and_only_the_last_is_the_last(has, says):
    seen = list(mark_last(Loader(has, says)))
    assert [delivery.batch for delivery in seen] == list(range(has))
    if says is None or says <= has:
        assert [delivery.is_last for delivery in seen][-1:] == [True] * bool(has)
    if says in (None, has):
        assert [delivery.is_last for delivery in seen] == [False] * (has - 1) + [True] * bool(has)


def test_a_loader_with_a_length_is_not_run_ahead():
    loader = Loader(3, 3)
    assert [loader.asked for _ in mark_last(loader)] == [1, 2, 3]


def test_a_loader_without_one_runs_one_batch_ahead():
    loader = Loader(3, None)
    assert [loader.asked for _ in mark_last(loader)] == [2, 3, 3]


def on_ranks(loaders, n):
    """What ``in_step`` delivers on each of several ranks, which are threads here; and how often they told each other."""
    barrier, said, told = (
        threading.Barrier(len(loaders), timeout=10),
        [None] * len(loaders),
        [0] * len(loaders),
    )

    def deliver(rank):
        def tell_all(*numbers):
            told[rank] += 1
            said[rank] = numbers
            barrier.wait()
            everyone = torch.tensor(said)
            barrier.wait()
            return everyone

        return list(in_step(loaders[rank], lambda: n, tell_all))

    with ThreadPoolExecutor(len(loaders)) as threads:
        return list(threads.map(deliver, range(len(loaders)))), told[0]


@given(
    st.lists(st.tuples(st.integers(1, 7), st.booleans()), min_size=1, max_size=4), st.integers(1, 4)
)
def test_ranks_run_in_step_and_every_batch_counts_once(loaders, n):
    lengths = [has for has, _ in loaders]
    delivered, told = on_ranks([Loader(has, has if sized else None) for has, sized in loaders], n)
    assert told == -(-max(lengths) // n)
    for has, deliveries in zip(lengths, delivered, strict=True):
        assert [d.batch for d in deliveries if not d.is_filler] == list(range(has))
        assert [d.batch for d in deliveries if d.is_filler] == [has - 1] * (max(lengths) - has)
        assert [d.is_last for d in deliveries] == [False] * (max(lengths) - 1) + [True]
    for deliveries in itertools.zip_longest(*delivered):
        present = sum(not d.is_filler for d in deliveries) / len(loaders)
        assert all(d.present == pytest.approx(present) for d in deliveries)


def test_ranks_without_any_batch_are_an_error_on_all_of_them():
    with pytest.raises(ValueError, match=r"the loaders of ranks \[1\] have no batch"):
        on_ranks([Loader(3, 3), Loader(0, 0)], 2)
    assert on_ranks([Loader(0, None), Loader(0, 0)], 2)[0] == [[], []]


def test_a_loader_that_is_longer_or_shorter_than_its_length():
    for has, says in ((5, 2), (5, 4), (1, 2), (3, 4)):
        ((deliveries,), _) = on_ranks([Loader(has, says)], 2)
        assert [d.batch for d in deliveries] == list(range(has)) and [
            d.is_last for d in deliveries
        ][-1]
    with pytest.raises(RuntimeError, match="a loader of length 5 ended before batch 2"):
        on_ranks([Loader(1, 5)], 2)


def test_a_rank_that_has_run_out_gets_its_last_batch_whole_again():
    (_, deliveries), _ = on_ranks([[1, 2, 3], [{"x": 1}]], 2)
    assert [d.batch.pop("x") for d in deliveries] == [1, 1, 1]


def test_in_step_a_loader_is_run_ahead_only_where_reading_must_tell():
    for says, asked in ((5, [1, 2, 3, 4, 5]), (4, [1, 2, 5, 5, 5]), (None, [3, 3, 5, 5, 5])):
        loader = Loader(5, says)
        assert [
            loader.asked
            for _ in in_step(loader, lambda: 2, lambda *numbers: torch.tensor([numbers]))
        ] == asked
