import pytest

from trainkit.loaders import mark_last


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
    assert [batch for batch, _ in seen] == list(range(has))
    if says is None or says <= has:
        assert [last for _, last in seen][-1:] == [True] * bool(has)
    if says in (None, has):
        assert [last for _, last in seen] == [False] * (has - 1) + [True] * bool(has)


def test_a_loader_with_a_length_is_not_run_ahead():
    loader = Loader(3, 3)
    assert [loader.asked for _ in mark_last(loader)] == [1, 2, 3]


def test_a_loader_without_one_runs_one_batch_ahead():
    loader = Loader(3, None)
    assert [loader.asked for _ in mark_last(loader)] == [2, 3, 3]
