"""Embeddings with max_norm change their weight in forward. The reference is torch's checkpoint."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainkit import recompute


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embedding = getattr(nn, kind)(9, 4, max_norm=0.5)
        self.second = nn.Embedding(9, 4, max_norm=0.5)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, ids):
        found = self.embedding(ids)  # a bag has added its rows up
        return self.inner(found.view(len(ids), -1, 4).sum(1) * self.second(ids[:, 0]))


def make(kind, tied):
    torch.manual_seed(0)
    block = Block(kind)
    model = nn.ModuleDict({"a": nn.Sequential(block), "head": nn.Embedding(9, 4, max_norm=0.5)})
    if tied:
        block.second.weight = model.head.weight = block.embedding.weight
    return model


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(9, (6, 5), generator=generator) for _ in range(3)]


def train(model, region, autocast, evaluates):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = [region(ids).float().sin().sum() for ids in batches()]
        if evaluates:
            with torch.no_grad():
                region(torch.arange(9).view(3, 3))
        sum(losses[1:]).backward()
        losses[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("layers", ["a", "a[0]", "**.embedding"])
def test_the_bits_are_those_of_checkpoint(kind, tied, autocast, evaluates, layers):
    plain = make(kind, tied)
    selected = {"a": plain.a, "a[0]": plain.a[0], "**.embedding": plain.a[0].embedding}[layers]
    forward = selected.forward
    selected.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False)
    expected = train(plain, plain.a, autocast, evaluates)
    model = make(kind, tied)
    with recompute(model, layers):
        found = train(model, model.a, autocast, evaluates)
    assert all(map(torch.equal, found, expected))


def update(model):
    weight = model.a[0].embedding.weight
    weight.grad = torch.full_like(weight, 0.01)
    torch.optim.SGD([weight], lr=0.1).step()


CHANGES = {
    "an update": update,
    "a decay": lambda model: model.a[0].embedding.weight.mul_(0.5),
    "a row": lambda model: model.a[0].embedding.weight[3].neg_(),
    "a linear layer": lambda model: model.a[0].inner[0].weight.add_(1e-6),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("alone", [False, True])
def test_what_really_changes_weights_is_refused(change, alone):
    model = make("Embedding", False)
    if alone and change == "a linear layer":
        pytest.skip("not in the region")
    with recompute(model, "**.embedding" if alone else "a"):
        first, second = (model.a(ids).sum() for ids in batches()[:2])
        second.backward()
        with torch.no_grad():
            CHANGES[change](model)
        with pytest.raises(RuntimeError, match=r"changed between .*: update after the last"):
            first.backward()


def test_integer_weights_that_changed_are_refused_too():
    block = make("Embedding", False).a[0]
    block.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with recompute(block, "**"):
        loss = block(batches()[0]).sum()
        block.codes.add_(1)
        with pytest.raises(RuntimeError, match="update after"):
            loss.backward()
