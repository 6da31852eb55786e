"""What of the arguments of a call is cut."""

import collections
import types

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from transformers import BatchEncoding

from trainkit.chunks.batches import Batch, mapped

Record = collections.namedtuple("Record", "a b c d e")
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


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_without_tensors_are_cut_if_they_are_as_long_as_the_batch(kind):
    five, numbers, texts = torch.arange(5), kind(range(5)), kind("abcde")
    whole = {"short": kind([1, 2, 3]), "text": "abcde", "bytes": b"abcde", "range": range(5)}
    whole |= {"shape": torch.ones(1, 1, 1, 1, 1).shape, "record": Record(1, 2, 3, 4, 5)}
    cut = {"nested": kind([[1, 2]] * 2 + [[3]] * 3), "dicts": kind([{"id": i} for i in range(5)])}
    cut |= {"scalars": kind(five.unbind()), "array": np.arange(10).reshape(5, 2)}
    inner = {"deep": [[texts, numbers], {"pair": Pair(numbers, "abcde")}]}
    batch = Batch((five, numbers), {**whole, **cut, **inner, "few": np.arange(3)})
    (tensor, found_numbers), found = batch.chunk(1, 3)
    assert tensor.tolist() == [1, 2] and found_numbers == numbers[1:3]
    assert type(found_numbers) is kind and {name: found[name] for name in whole} == whole
    assert found["nested"] == cut["nested"][1:3] and found["dicts"] == cut["dicts"][1:3]
    assert [int(i) for i in found["scalars"]] == [1, 2]
    assert found["array"].tolist() == [[2, 3], [4, 5]] and found["few"].tolist() == [0, 1, 2]
    assert found["deep"] == [[texts[1:3], numbers[1:3]], {"pair": Pair(numbers[1:3], "abcde")}]


def test_the_positional_arguments_and_a_list_of_tensors_are_no_list_of_rows():
    two, args = torch.arange(2), ("first", "second")
    found = Batch(args, {"x": two, "both": [two, two + 1]}).chunk(0, 1)
    assert found == (args, {"x": two[:1], "both": [two[:1], two[:1] + 1]})


@pytest.mark.parametrize(
    ("dim", "shapes", "cut"),
    [
        (1, [(7, 5, 3), (7, 5), (5,), ()], [(7, 2, 3), (7, 2), (2,), ()]),
        (2, [(7, 3, 5), (1, 5), (5,)], [(7, 3, 2), (1, 2), (2,)]),
        (-1, [(7, 5), (5,), (2, 3, 5)], [(7, 2), (2,), (2, 3, 2)]),
        (-2, [(7, 5, 3), (5,)], [(7, 2, 3), (2,)]),
    ],
)
def test_another_dimension_counts_rows(dim, shapes, cut):
    tensors = [torch.randn(shape) for shape in shapes]
    batch = Batch((*tensors, list(range(5))), {}, dim)
    (*found, numbers), _ = batch.chunk(1, 3)
    assert batch.rows == 5 and [tuple(tensor.shape) for tensor in found] == cut
    assert numbers == [1, 2] and torch.equal(found[0], tensors[0].narrow(dim, 1, 2))


@pytest.mark.parametrize(
    ("args", "dim", "said"),
    [
        ((torch.ones(7, 5), torch.ones(4)), 1, r"differ in \[\(7, 5\), \(4,\)\].*partial"),
        ((torch.ones(7, 5), torch.ones(7, 4, 3)), 1, r"\[\(7, 5\), \(7, 4, 3\)\]"),
        ((torch.ones(5),), 1, r"got none in \[\(5,\)\]"),
        (([torch.ones(3, 4, 6), torch.ones(3, 5, 7)], torch.ones(2)), 0, "pad images"),
        ((pack_sequence([torch.ones(5, 2)]),), 0, "pack_padded_sequence"),
        ((torch.eye(4).to_sparse(), torch.ones(4)), 0, r"dense tensors: .*`x.to_sparse\(\)`"),
    ],
)
def test_a_batch_that_cannot_be_cut_says_what_helps(args, dim, said):
    with pytest.raises(ValueError, match=said):
        Batch(args, {}, dim)


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
