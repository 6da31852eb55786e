"""What of the arguments of a call is cut."""

import collections
import types

import pytest
import torch
from transformers import BatchEncoding

from trainkit.chunks.batches import Batch, mapped

Pair = collections.namedtuple("Pair", "a b")


def test_tensors_are_cut_at_any_depth_and_everything_else_is_whole():
    thing, encoding = object(), BatchEncoding({"ids": torch.arange(10).view(5, 2), "name": "text"})
    five = torch.arange(5)
    options = {"encoding": encoding, "pair": Pair(five, None), "scale": torch.tensor(3)}
    options |= {"fixed": types.MappingProxyType({"x": five}), "nested": [five, (five + 1, 7)]}
    batch = Batch((five, thing), options)
    assert (batch.rows, batch.size_of_row) == (5, 7)
    (tensor, same), found = batch.chunk(1, 3)
    assert tensor.tolist() == [1, 2] and tensor._base is not None  # a view
    assert same is thing and found["scale"] == 3
    assert type(found["encoding"]) is BatchEncoding and found["encoding"]["name"] == "text"
    assert found["encoding"].ids.tolist() == [[2, 3], [4, 5]] and len(encoding["ids"]) == 5
    assert type(found["pair"]) is Pair and found["pair"].a.tolist() == [1, 2]
    assert found["fixed"]["x"].tolist() == [1, 2]
    assert found["nested"][0].tolist() == [1, 2] and found["nested"][1][0].tolist() == [2, 3]
    assert found["nested"][1][1] == 7


def test_mapped_reaches_all_tensors_and_leaves_the_batch_as_it_is():
    batch = collections.OrderedDict(a=torch.ones(2), b=[Pair(torch.ones(1), "text")], c=None)
    found = mapped(batch, lambda tensor: tensor * 2)
    assert type(found) is collections.OrderedDict and found["c"] is None
    assert found["a"].sum() == 4 and found["b"][0].a.sum() == 2 and found["b"][0].b == "text"
    assert batch["a"].sum() == 2


@pytest.mark.parametrize("args", [(), (3, "text"), ([], None), (torch.ones(()),)])
def test_a_batch_without_rows_is_refused(args):
    with pytest.raises(ValueError, match=r"got none in .*`step\(inputs, targets\)`"):
        Batch(args, {})
