"""What of a call is its batch."""

import collections
import types

import torch
from transformers import BatchEncoding

from trainkit.chunks.batches import Batch, mapped, tensors

Pair = collections.namedtuple("Pair", "a b")


def test_what_is_cut_and_what_is_not():
    class Thing:
        pass

    thing = Thing()
    encoding = BatchEncoding({"input_ids": torch.arange(10).view(5, 2), "name": "text"})
    batch = Batch(
        (torch.arange(5), [torch.arange(5), (torch.arange(5) + 1, 7)], thing),
        {
            "encoding": encoding,
            "pair": Pair(torch.arange(5), None),
            "scale": torch.tensor(3),
            "fixed": types.MappingProxyType({"x": torch.arange(5)}),
        },
    )
    assert batch.rows == 5
    args, kwargs = batch.chunk(1, 3)
    assert args[0].tolist() == [1, 2] and args[0]._base is not None  # a view
    assert args[1][0].tolist() == [1, 2] and args[1][1][0].tolist() == [2, 3] and args[1][1][1] == 7
    assert args[2] is thing
    assert type(kwargs["encoding"]) is BatchEncoding and kwargs["encoding"]["name"] == "text"
    assert (
        kwargs["encoding"].input_ids.tolist() == [[2, 3], [4, 5]]
        and len(encoding["input_ids"]) == 5
    )
    assert type(kwargs["pair"]) is Pair and kwargs["pair"].a.tolist() == [1, 2]
    assert kwargs["scale"] == 3 and kwargs["fixed"]["x"].tolist() == [1, 2]


def test_all_tensors_of_a_batch_are_reached_and_it_stays_what_it_is():
    Pair = collections.namedtuple("Pair", "x y")
    batch = collections.OrderedDict(
        a=torch.ones(2), b=[Pair(torch.ones(1), "text"), (torch.ones(3), 7)], c=None
    )
    found = mapped(batch, lambda tensor: tensor * 2)
    assert (
        type(found) is collections.OrderedDict
        and type(found["b"][0]) is Pair
        and found["b"][0].y == "text"
        and found["c"] is None
    )
    assert [found["a"].sum(), found["b"][0].x.sum(), found["b"][1][0].sum()] == [4, 2, 6] and found[
        "b"
    ][1][1] == 7
    assert batch["a"].sum() == 2


def test_tensors_with_rows_are_found_wherever_they_are():
    four = torch.zeros(4, 2)
    for batch in (four, (four, 3), {"a": torch.ones(()), "b": [four]}):
        assert [found is four for found in tensors(batch)] == [True]
    assert not any(list(tensors(batch)) for batch in ("text", 3, [], None, torch.ones(())))
