"""The layers language. The reference is Python's indexing, or a regular expression over names."""

import copy
import pickle
import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from trainkit import freeze, frozen, frozen_parameters, recompute


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(5, 2)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList([Layer() for _ in range(4)])
        self.grid = nn.ModuleList(nn.ModuleList(nn.Linear(1, 1) for _ in "abc") for _ in "ab")
        self.head = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(), nn.Linear(2, 1))
        self.towers = nn.ModuleDict({"left": nn.Linear(1, 1), "right": nn.Linear(1, 1)})
        self.prompts = nn.ParameterList([torch.zeros(2) for _ in range(3)])
        self.scale = nn.Parameter(torch.ones(2))


NAMES = [name for name, _ in Model().named_parameters()]


def selected(model, layers):
    with frozen(model, layers) as names:
        assert names == frozen_parameters(model)
        return names


def names_of(model, parts):
    """Names of the parameters in parts of a model."""
    parts = [
        p for part in parts for p in (part.parameters() if isinstance(part, nn.Module) else [part])
    ]
    ids = set(map(id, parts))
    return [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in ids]


def in_evaluation(model):
    return [name for name, module in model.named_modules() if not module.training]


def every(module, kind):
    return [m for m in module.modules() if isinstance(m, kind)]


WORDS = {
    "**": lambda m: [m],
    "*": lambda m: [m],
    "embeddings": lambda m: [m.embeddings],
    "embeddings.weight": lambda m: [m.embeddings.weight],
    "sc*e": lambda m: [m.scale],
    "encoder.**": lambda m: [m.encoder],
    "encoder.layer.1": lambda m: [m.encoder.layer[1]],
    "encoder.layer[-4]": lambda m: [m.encoder.layer[0]],
    "encoder.layer[-1]": lambda m: [m.encoder.layer[-1]],
    "encoder.layer[:2].attention": lambda m: every(m.encoder.layer[:2], nn.Linear),
    "encoder.layer.*.att*": lambda m: every(m.encoder, nn.Linear),
    "encoder.layer[3:].*.bias": lambda m: [x.bias for x in m.encoder.layer[3].children()],
    "**.norm": lambda m: every(m, nn.LayerNorm),
    "**.layer[0].**.bias": lambda m: [x.bias for x in m.encoder.layer[0].children()],
    "**.bias": lambda m: [p for name, p in m.named_parameters() if name.endswith("bias")],
    "grid[1][-1]": lambda m: [m.grid[1][-1]],
    "grid[:][0].bias": lambda m: [m.grid[0][0].bias, m.grid[1][0].bias],
    "head[-2:]": lambda m: [m.head[-2:]],
    "towers.*.bias": lambda m: [m.towers.left.bias, m.towers.right.bias],
    "prompts.0": lambda m: [m.prompts[0]],
    "prompts[1:]": lambda m: [m.prompts[1], m.prompts[2]],
}


@pytest.mark.parametrize("pattern", WORDS)
def test_a_pattern_means_what_python_says(pattern):
    model = Model()
    assert selected(model, pattern) == names_of(model, WORDS[pattern](model))


@pytest.mark.parametrize(
    "part",
    [
        lambda m: m,
        lambda m: m.encoder.layer,
        lambda m: m.encoder.layer[:2],
        lambda m: m.head[1:3],
        lambda m: m.prompts[:2],
        lambda m: nn.ModuleList([m.embeddings, m.head[0]]),
        lambda m: m.scale,
    ],
)
def test_a_part_means_its_parameters_and_that_of_another_model_is_a_value_error(part):
    model = Model()
    assert selected(model, part(model)) == names_of(model, [part(model)])
    assert selected(model, [part(model)]) == names_of(model, [part(model)])
    with pytest.raises(ValueError, match=r"not in the module.*`model.head`"):
        frozen(model, ["embeddings", part(Model())])


def test_predicates_and_words_of_all_kinds_go_together_and_may_come_from_an_iterator():
    model = Model()
    assert selected(model, []) == selected(model, ()) == []
    assert selected(model, model.embeddings.parameters()) == ["embeddings.weight"]
    assert selected(model, lambda name, p: p.dim() == 1) == names_of(
        model, [p for p in model.parameters() if p.dim() == 1]
    )
    words = [model.scale, "embeddings", "embeddings", lambda name, p: name == "head.0.bias"]
    context = frozen(model, iter(words))
    for _ in range(2):
        with context as names:
            assert names == ["scale", "embeddings.weight", "head.0.bias"]


@given(*[st.none() | st.integers(-6, 6)] * 2, st.none() | st.integers(-3, 3).filter(bool))
def test_slices_are_those_of_python(start, stop, step):
    text = ":".join("" if bound is None else str(bound) for bound in (start, stop, step))
    model = Model()
    meant = list(model.encoder.layer)[start:stop:step]
    if meant:
        assert selected(model, f"encoder.layer[{text}]") == names_of(model, meant)
    else:
        with pytest.raises(ValueError, match="matches nothing"):
            selected(model, f"encoder.layer[{text}]")


@given(st.data())
def test_stars_are_those_of_a_regular_expression(data):
    path = data.draw(st.sampled_from(NAMES)).split(".")
    stars = [
        data.draw(st.sampled_from([part, "*", part[:2] + "*", "*" + part[1:], "**"]))
        for part in path
    ]
    assume(stars[-1] != "**")
    regex = "".join(
        r"(?:[^.]+\.)*" if s == "**" else re.escape(s).replace(r"\*", "[^.]*") + r"\."
        for s in stars
    )
    expected = [name for name in NAMES if re.match(regex, name + ".")]
    assert selected(Model(), ".".join(stars)) == expected


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel, torch.compile])
def test_names_that_are_reported_are_patterns_also_through_a_wrapper(wrap):
    model = Model()
    wrapper = wrap(model)
    names = freeze(wrapper, "**.embeddings")
    assert freeze(wrapper, names) == names and len(names) == 1
    assert frozen_parameters(model) == ["embeddings.weight"]
    if wrap is not nn.Sequential:
        assert names == ["embeddings.weight"]
        assert freeze(wrapper, lambda name, parameter: name.startswith("scale")) == ["scale"]
        assert freeze(wrapper, wrapper) == NAMES


def test_a_child_called_module_is_a_name_like_any_other():
    model = nn.Module()
    model.module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert selected(model, "module[0]") == ["module.0.weight", "module.0.bias"]


def test_a_parametrised_weight_goes_by_its_name():
    model = nn.ModuleDict({"conv": nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 1))})
    originals = ["conv.parametrizations.weight.original0", "conv.parametrizations.weight.original1"]
    assert selected(model, "conv.weight") == selected(model, "**.weight") == originals
    assert selected(model, "conv") == selected(model, "conv.*") == ["conv.bias", *originals]


# Which buffers are selected.


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "layers", ["**", "[1]", "**.running_mean", "[1][0].*", lambda name, parameter: True]
)
def test_selecting_a_module_selects_its_buffers(affine, layers):
    norm = nn.BatchNorm1d(2, affine=affine)
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(norm), nn.Dropout(0.5))
    with frozen(model, layers):
        assert in_evaluation(model) == ["1.0"]


@pytest.mark.parametrize(
    ("layers", "evaluating"),
    [
        (["[1].weight", "[1].bias"], ["1"]),
        (lambda name, parameter: name.startswith("1."), ["1"]),
        ("[1].weight", []),
        ("**.bias", []),
        ("[0]", []),
    ],
)
def test_selecting_all_parameters_of_a_module_selects_its_buffers(layers, evaluating):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with frozen(model, layers):
        assert in_evaluation(model) == evaluating


@pytest.mark.parametrize("layers", ["**", "*", "attention", "**.bias"])
def test_a_mask_takes_no_dropout_away_even_when_it_is_called_bias(layers):
    """Attention that owns its causal mask, as in GPT-2, asks its own ``training`` for dropout."""
    model = nn.ModuleDict({"attention": nn.Module(), "head": nn.Linear(2, 2)})
    model.attention.weight = nn.Parameter(torch.ones(2))
    model.attention.register_buffer("bias", torch.ones(2, 2, dtype=torch.bool).tril())
    with frozen(model, layers):
        assert in_evaluation(model) == []


# What is refused.


@pytest.mark.parametrize("layers", [None, 3, True, b"scale", torch.ones(2), nn.LayerNorm, [["a"]]])
def test_another_type_is_a_type_error(layers):
    for several in (layers, ["embeddings", layers]):
        with pytest.raises(TypeError, match=r"a layer is a pattern.* got .*`model.head`"):
            frozen(Model(), several)


UNREADABLE = (
    ". a..b .a a. a[ a] a[] a[0 a[x] a[0]b a[0:1:2:3] a[1.5] **[0] a** *** a[-] a[:-] a[::0]"
)


@pytest.mark.parametrize("pattern", ["", *UNREADABLE.split()])
def test_an_unreadable_pattern_is_a_value_error(pattern):
    with pytest.raises(ValueError, match=re.escape(f"{pattern!r} cannot be read")):
        frozen(Model(), pattern)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("layer[:2]", "'**.layer[:2]'"),
        ("embedding", "'embeddings'"),
        ("encoder.layers[:2]", "'encoder.layer'"),
        ("encoder.layer[4]", "'encoder.layer'"),
        ("encoder.layer[-5]", "'encoder.layer'"),
        ("embeddings[0]", "'embeddings'"),
        ("Scale", "'scale'"),
        ("**.scales", "'**.scale'"),
        ("qqq", "'embeddings', 'encoder', 'grid'"),
    ],
)
def test_a_pattern_without_a_match_is_a_value_error_with_a_hint_and_freezes_nothing(pattern, hint):
    model = Model()
    message = re.escape(repr(pattern)) + " matches nothing in the Model; .*" + re.escape(hint)
    with pytest.raises(ValueError, match=message):
        freeze(model, ["**", pattern])
    assert frozen_parameters(model) == in_evaluation(model) == []


def test_a_predicate_that_is_never_true_is_a_value_error():
    with pytest.raises(ValueError, match=r"predicate .* no parameter"):
        frozen(Model(), lambda name, parameter: False)


# Real models.

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 16}


@pytest.fixture(scope="module", params=["Bert", "DebertaV2"])
def transformer(request):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {**SIZES, "num_attention_heads": 2, "pad_token_id": 0}
    if request.param == "DebertaV2":
        sizes |= {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]}
    config = getattr(transformers, request.param + "Config")(**sizes)
    return getattr(transformers, request.param + "ForSequenceClassification")(config).train()


def test_the_layers_of_transformers_are_found(transformer):
    names = [name for name, _ in transformer.named_parameters()]
    base = transformer.base_model_prefix
    for layers, regex in [
        (f"{base}.embeddings", rf"{base}\.embeddings\."),
        (f"{base}.encoder.layer[:2]", rf"{base}\.encoder\.layer\.[01]\."),
        (transformer.base_model.encoder.layer[:2], rf"{base}\.encoder\.layer\.[01]\."),
        ("**.layer[-1].attention", r".*\.layer\.2\.attention\."),
        ("**.LayerNorm", r".*\.LayerNorm\."),
    ]:
        expected = [name for name in names if re.match(regex, name)]
        assert expected and selected(transformer, layers) == expected
    assert frozen_parameters(transformer) == in_evaluation(transformer) == []


def test_frozen_layers_of_transformers_stay_and_keep_their_dropout(transformer):
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=0.1, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    layers = [transformer.base_model.embeddings, "**.layer[:2]", "**.LayerNorm"]
    with frozen(transformer, layers) as names:
        transformer.train()
        assert all(m.training for m in transformer.modules() if isinstance(m, nn.Dropout))
        transformer(torch.arange(1, 9).view(2, 4), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    moved = [name for name, p in transformer.named_parameters() if not torch.equal(p, before[name])]
    assert moved and not set(moved) & set(names)


def test_a_pattern_follows_a_name_to_another_module():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    block = frozen(model, "a")
    first, second = model["a"], model["b"]
    del model["a"], model["b"], model["c"]
    model.update({"b": first, "a": second, "c": nn.Linear(2, 2)})
    with block as names:
        assert names == ["a.weight", "a.bias"]
        assert first.weight.requires_grad and not second.weight.requires_grad


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("part", [frozen, recompute])
def test_a_part_and_its_model_are_copied_together(make_copy, part):
    model = Model()
    copied, block = make_copy((model, part(model, "encoder.layer[1:]")))
    with part(model, "encoder.layer[1:]") as expected, block as names:
        assert names == expected and len(names) > 2
        assert frozen_parameters(copied) == (names if part is frozen else [])
    assert frozen_parameters(copied) == frozen_parameters(model) == []
