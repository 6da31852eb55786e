"""Layers that a pattern with "!" takes out. The reference is the difference of sets of names."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainkit import freeze, frozen, frozen_parameters, recompute, unfreeze


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(5, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()) for _ in range(3)
        )
        self.neck = nn.BatchNorm1d(2, affine=False)
        self.head = nn.Linear(2, 5)
        self.head.weight = self.embeddings.weight

    def forward(self, ids):
        x = self.embeddings(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.neck(x))


def held(model, layers):
    """Names of parameters without a gradient, and of modules in evaluation mode."""
    with frozen(model, layers) as names:
        assert names == frozen_parameters(model)
        return set(names), {name for name, m in model.named_modules() if not m.training}


PATTERNS = ["**", "embeddings", "blocks", "blocks[0]", "blocks[1:]", "**.bias", "neck", "head"]
PATTERNS += ["blocks.*.1", "blocks[-1][1].weight", "head.weight", "**.running_mean"]


@given(
    plus=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3),
    minus=st.lists(st.sampled_from(PATTERNS), max_size=3),
    data=st.data(),
)
def test_it_is_the_difference_of_sets_in_any_order(plus, minus, data):
    model = Model()
    names, modules = held(model, plus)
    names_out, modules_out = held(model, minus)
    layers = data.draw(st.permutations([*plus, *("!" + pattern for pattern in minus)]))
    assert held(model, layers)[0] == names - names_out
    if "**.running_mean" not in plus + minus:  # half of the buffers of a module
        assert held(model, layers)[1] == modules - modules_out
    freeze(model, layers)
    assert set(frozen_parameters(model)) == names - names_out
    freeze(model)
    unfreeze(model, layers)
    everything = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert set(frozen_parameters(model)) == everything - (names - names_out)


def test_all_but_the_head_with_predicates_and_modules_and_modes():
    model = Model()
    assert freeze(model, ["!neck", model.blocks, "!blocks[1:]", "neck"], eval_mode=True) == [
        "blocks.0.0.weight", "blocks.0.0.bias", "blocks.0.1.weight", "blocks.0.1.bias"
    ]  # fmt: skip
    evaluating = [name for name, m in model.train().named_modules() if not m.training]
    assert evaluating == ["blocks", "blocks.0", "blocks.0.0", "blocks.0.1", "blocks.0.2"]
    unfreeze(model, ["**", "!blocks[0][1]"])
    assert frozen_parameters(model) == ["blocks.0.1.weight", "blocks.0.1.bias"]
    assert [name for name, m in model.named_modules() if not m.training] == ["blocks.0.1"]
    unfreeze(model)
    assert freeze(model, ["!head.bias", lambda name, p: name.endswith("bias")])[-1] != "head.bias"


def test_a_tied_weight_is_taken_out_under_all_its_names():
    model = Model()
    names = freeze(model, ["**", "!head"])
    assert not {"embeddings.weight", "head.weight", "head.bias"} & set(names) and len(names) == 12


def test_layers_with_one_taken_out_are_recomputed_apart():
    model = Model()
    with recompute(model, ["**", "!head"]) as names:
        assert names == ["embeddings", "blocks.0", "blocks.1", "blocks.2", "neck"]
    with recompute(model, ["!blocks[1][2]", "blocks"]) as names:
        assert names == ["blocks.0", "blocks.1.0", "blocks.1.1", "blocks.2"]
    with pytest.raises(ValueError, match=r"'!\*\*.bias' .*no module with a forward"):
        recompute(model, ["**", "!**.bias"])


@pytest.mark.parametrize("function", [freeze, frozen, unfreeze, recompute])
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("!head", r"'!head' .*`\[\"\*\*\", \"!head\"\]`"),
        (["!neck", "!head"], r"'!neck' .*`\[\"\*\*\", \"!head\"\]`"),
        (["**", "!haed"], "'!haed' matches nothing in the Model; .*'!head'"),
        (["**", "!1"], r"'!1' matches nothing in the Model; .*'!\*\*.1'"),
        (["**", "!"], "cannot be read"),
        ("embeddings.weight[:3]", r"'embeddings.weight\[:3\]' .*rows.*`weight.register_hook\("),
    ],
)
def test_what_takes_nothing_out_is_refused_and_changes_nothing(function, layers, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        function(model, layers)
    assert frozen_parameters(model) == [] and all(m.training for m in model.modules())


def test_a_hook_holds_rows_as_the_message_says():
    embedding, rows = nn.Embedding(5, 2), torch.arange(3)
    before = embedding.weight.detach().clone()
    embedding.weight.register_hook(lambda grad: grad.index_fill(0, rows, 0))
    optimizer = torch.optim.Adam(embedding.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        embedding(torch.arange(5)).square().sum().backward()
        optimizer.step()
    assert (embedding.weight == before).all(1).tolist() == [True] * 3 + [False] * 2


@pytest.mark.parametrize("function", [freeze, unfreeze])
def test_a_star_that_leaves_most_out_is_told(function, recwarn):
    model = Model()
    function(model, ["**.bias", "blocks.*.0", "*.weight"])
    assert not recwarn.list  # "*.weight" has 2 of 8
    with pytest.warns(UserWarning, match=r"'\*.bias' selects 1 of 7 .*`'\*\*.bias'`") as said:
        function(model, "*.bias")
    assert said[0].filename == __file__
