"""``step.over``: every batch comes once, and the last one is marked."""

import pytest
from oracles import BATCHES, loss_of

from trainkit import accumulate, train_step
from trainkit.core.loop import mark_last


class Loader:
    """Says it has ``says`` batches, and has ``has``; counts the batches that it was asked for."""

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
@pytest.mark.parametrize("says", [None, 0, 1, 2, 3, 4, 10**30])
def test_every_batch_comes_once_in_order_and_only_the_last_is_the_last(has, says):
    seen = list(mark_last(Loader(has, says)))
    assert [delivery.batch for delivery in seen] == list(range(has))
    assert [delivery.number for delivery in seen] == list(range(has))
    lasts = [delivery.is_last for delivery in seen]
    if says in (None, 0, has, 10**30):
        assert lasts == [False] * (has - 1) + [True] * bool(has)
    elif says < has:  # the batch at its length is taken for the last one, and so is the last one
        assert lasts == [i in (says, has) for i in range(1, has + 1)]
    else:
        assert lasts == [False] * has


@pytest.mark.parametrize(
    ("says", "asked"), [(3, [1, 2, 3]), (2, [1, 2, 3]), (None, [2, 3, 3]), (1, [1, 3, 3])]
)
def test_only_past_its_length_a_loader_is_read_ahead(says, asked):
    """By one batch: reading ahead changes the order of random numbers."""
    loader = Loader(3, says)
    assert [loader.asked for _ in mark_last(loader)] == asked


class Restarting(Loader):
    """An iterator that begins again after its end."""

    left = 3

    def __iter__(self):
        return self

    def __next__(self):
        self.left = 3 if self.left < 0 else self.left - 1
        if self.left < 0:
            raise StopIteration
        return 2 - self.left


@pytest.mark.parametrize("says", [None, 3, 5])
def test_a_loader_that_begins_again_after_its_end_is_read_once(says):
    for delivered in (mark_last(Restarting(3, says)), Restarting(3, says)):
        assert len([delivered for delivered, _ in zip(delivered, range(10), strict=False)]) == 3


class Sequence:
    """What Python can iterate over with ``__getitem__`` alone."""

    def __getitem__(self, index):
        return BATCHES[index]


class NoLength:
    def __iter__(self):
        return iter(BATCHES)

    def __len__(self):
        raise NotImplementedError


@pytest.mark.parametrize("loader", [Sequence(), NoLength(), iter(BATCHES), tuple(BATCHES)])
def test_whatever_a_loop_can_iterate_over_is_a_loader(model, optimizer, loader):
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    assert [step(batch).complete for batch in step.over(loader)] == [False, True, True]


def test_an_exception_of_the_loader_leaves_the_window_open(model, optimizer):
    def loader():
        yield from BATCHES[:2]  # the second is read, and not handed over
        raise LookupError

    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    with pytest.raises(LookupError):
        for batch in step.over(loader()):
            step(batch)
    assert step.updates == 0 and step(BATCHES[1]).complete


@pytest.mark.filterwarnings("error")
def test_a_loop_within_a_loop_of_the_same_step(model, optimizer):
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    closed = []
    for batch in step.over(BATCHES):
        closed += [step(inner).complete for inner in step.over(BATCHES)] + [step(batch).complete]
    assert closed == [False, True, True, False, True, False, True, False, True, False, True, True]
