"""The layers language: what is selected, and what is refused. The oracle is Python's own indexing, or a regular expression."""

import os
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit import freeze, frozen, frozen_parameters

os.environ["HF_HUB_OFFLINE"] = "1"


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
        self.grid = nn.ModuleList(
            [nn.ModuleList([nn.Linear(1, 1) for _ in range(3)]) for _ in range(2)]
        )
        self.head = nn.Sequential(
            nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 1)
        )
        self.towers = nn.ModuleDict({"left": nn.Linear(1, 1), "right": nn.Linear(1, 1)})
        self.prompts = nn.ParameterList([torch.zeros(2) for _ in range(3)])
        self.scale = nn.Parameter(torch.ones(2))


NAMES = [name for name, _ in Model().named_parameters()]


def selected(model, layers):
    with frozen(model, layers) as names:
        assert names == frozen_parameters(model)
        return names


def names_of(model, parameters):
    ids = {id(p) for p in parameters}
    return [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in ids]


def in_evaluation(model):
    return [name for name, module in model.named_modules() if not module.training]


def every(module, kind):
    return [p for m in module.modules() if isinstance(m, kind) for p in m.parameters()]


@pytest.mark.parametrize(
    ("layers", "meant"),
    [
        ("**", lambda m: m.parameters()),
        ("*", lambda m: m.parameters()),
        ("embeddings", lambda m: m.embeddings.parameters()),
        ("embeddings.weight", lambda m: [m.embeddings.weight]),
        ("scale", lambda m: [m.scale]),
        ("sc*e", lambda m: [m.scale]),
        ("encoder", lambda m: m.encoder.parameters()),
        ("encoder.**", lambda m: m.encoder.parameters()),
        ("encoder.layer", lambda m: m.encoder.layer.parameters()),
        ("encoder.layer.1", lambda m: m.encoder.layer[1].parameters()),
        ("encoder.layer[1]", lambda m: m.encoder.layer[1].parameters()),
        ("encoder.layer[-1]", lambda m: m.encoder.layer[-1].parameters()),
        ("encoder.layer[-4]", lambda m: m.encoder.layer[0].parameters()),
        ("encoder.layer[:2]", lambda m: m.encoder.layer[:2].parameters()),
        ("encoder.layer[-2:]", lambda m: m.encoder.layer[-2:].parameters()),
        ("encoder.layer[::2]", lambda m: m.encoder.layer[::2].parameters()),
        ("encoder.layer[2:0:-1]", lambda m: m.encoder.layer[1:3].parameters()),
        ("encoder.layer[:2].attention", lambda m: every(m.encoder.layer[:2], nn.Linear)),
        ("encoder.layer.*.attention", lambda m: every(m.encoder, nn.Linear)),
        ("encoder.layer.*.att*", lambda m: every(m.encoder, nn.Linear)),
        (
            "encoder.layer[1:].*.bias",
            lambda m: [p for x in m.encoder.layer[1:] for p in (x.attention.bias, x.norm.bias)],
        ),
        ("**.norm", lambda m: every(m, nn.LayerNorm)),
        (
            "**.layer[0].**.bias",
            lambda m: [m.encoder.layer[0].attention.bias, m.encoder.layer[0].norm.bias],
        ),
        ("**.embeddings", lambda m: m.embeddings.parameters()),
        ("**.bias", lambda m: [p for name, p in m.named_parameters() if name.endswith("bias")]),
        ("grid[1][-1]", lambda m: m.grid[1][-1].parameters()),
        ("grid[0][1:]", lambda m: m.grid[0][1:].parameters()),
        ("grid[:][0].bias", lambda m: [m.grid[0][0].bias, m.grid[1][0].bias]),
        ("head[0]", lambda m: m.head[0].parameters()),
        ("head[-2:]", lambda m: m.head[-2:].parameters()),
        ("towers.left", lambda m: m.towers.left.parameters()),
        ("towers.*.bias", lambda m: [m.towers.left.bias, m.towers.right.bias]),
        ("prompts.0", lambda m: [m.prompts[0]]),
        ([], lambda m: []),
        ((), lambda m: []),
        (
            ["embeddings", "encoder.layer[:1]"],
            lambda m: [*m.embeddings.parameters(), *m.encoder.layer[0].parameters()],
        ),
        (["embeddings", "embeddings"], lambda m: m.embeddings.parameters()),
        ({"scale"}, lambda m: [m.scale]),
        (
            lambda name, parameter: parameter.dim() == 1,
            lambda m: [p for p in m.parameters() if p.dim() == 1],
        ),
        (lambda name, parameter: "left" in name, lambda m: m.towers.left.parameters()),
    ],
)
def test_layers_in_words_mean_what_python_says(layers, meant):
    model = Model()
    assert selected(model, layers) == names_of(model, meant(model))


@pytest.mark.parametrize(
    "meant",
    [
        lambda m: m,
        lambda m: m.embeddings,
        lambda m: m.encoder.layer,
        lambda m: m.encoder.layer[:2],
        lambda m: m.encoder.layer[-1],
        lambda m: m.head[1:3],
        lambda m: m.prompts,
        lambda m: m.prompts[:2],
        lambda m: m.towers,
        lambda m: nn.ModuleList([m.embeddings, m.head[0]]),
    ],
)
def test_a_submodule_or_a_slice_means_all_its_parameters(meant):
    model = Model()
    assert selected(model, meant(model)) == names_of(model, meant(model).parameters())
    assert selected(model, [meant(model)]) == names_of(model, meant(model).parameters())


def test_parameters_and_words_of_all_kinds_go_together():
    model = Model()
    assert selected(model, model.scale) == ["scale"]
    assert selected(model, model.embeddings.parameters()) == ["embeddings.weight"]
    several = iter(
        [
            model.scale,
            "embeddings",
            model.towers.left.bias,
            lambda name, parameter: name == "head.0.bias",
        ]
    )
    assert set(selected(model, several)) == {
        "scale",
        "embeddings.weight",
        "towers.left.bias",
        "head.0.bias",
    }


def test_layers_that_can_be_iterated_once_serve_again_and_again():
    context = frozen(Model(), iter(["scale"]))
    for _ in range(2):
        with context as names:
            assert names == ["scale"]


@settings(derandomize=True, deadline=None, max_examples=50)
@given(*[st.none() | st.integers(-6, 6)] * 2, st.none() | st.integers(-3, 3).filter(bool))
def test_slices_are_those_of_python(start, stop, step):
    text = ":".join("" if bound is None else str(bound) for bound in (start, stop, step))
    model = Model()
    meant = list(model.encoder.layer)[start:stop:step]
    if not meant:
        with pytest.raises(ValueError, match="matches nothing"):
            selected(model, f"encoder.layer[{text}]")
    else:
        assert selected(model, f"encoder.layer[{text}]") == names_of(
            model, [p for layer in meant for p in layer.parameters()]
        )


@settings(derandomize=True, deadline=None, max_examples=50)
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
    assert selected(Model(), ".".join(stars)) == [
        name for name in NAMES if re.match(regex, name + ".")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_parameter_is_a_pattern_for_it(name):
    assert selected(Model(), name) == [name]


def test_a_child_called_module_is_a_name_like_any_other():
    model = nn.Module()
    model.module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert selected(model, "module[0]") == ["module.0.weight", "module.0.bias"]
    model.head = nn.Linear(1, 1)
    assert selected(model, "**") == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers_are_looked_through(wrap):
    model = Model()
    freeze(wrap(model), ["encoder.layer[:2].attention", "scale"])
    assert frozen_parameters(model) == names_of(
        model, [*every(model.encoder.layer[:2], nn.Linear), model.scale]
    )


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_inside_of_a_wrapper_a_predicate_and_a_pattern_go_by_the_same_names(wrap):
    model = Model()
    freeze(wrap(model), lambda name, parameter: name.startswith("embeddings"))
    assert frozen_parameters(model) == ["embeddings.weight"]


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel, torch.compile])
def test_the_names_that_are_reported_are_patterns(wrap):
    model = wrap(Model())
    names = freeze(model, "**.embeddings")
    assert len(names) == 1
    assert freeze(model, names) == names


def test_a_parametrised_weight_goes_by_its_name():
    model = nn.ModuleDict({"conv": nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 1))})
    originals = ["conv.parametrizations.weight.original0", "conv.parametrizations.weight.original1"]
    assert selected(model, "conv.weight") == selected(model, "**.weight") == originals
    assert selected(model, "conv") == selected(model, "conv.*") == ["conv.bias", *originals]


def test_lazy_modules_can_be_selected_before_they_are_initialised():
    model = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d(), nn.Linear(2, 1))
    assert selected(model, "[:2]") == ["0.weight", "0.bias", "1.weight", "1.bias"]
    with frozen(model, "[:2]"):
        model(torch.ones(3, 5))
        assert frozen_parameters(model) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert frozen_parameters(model) == []


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "layers", ["**", "[1]", "[1][0]", "**.running_mean", "[1][0].*", lambda name, parameter: True]
)
def test_who_selects_a_module_selects_its_buffers(affine, layers):
    model = nn.Sequential(
        nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2, affine=affine)), nn.Dropout(0.5)
    )
    with frozen(model, layers):
        assert in_evaluation(model) == ["1.0"]


def test_who_selects_all_parameters_of_a_module_selects_its_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for layers in (
        ["[1].weight", "[1].bias"],
        model[1].parameters(),
        lambda name, parameter: name.startswith("1."),
    ):
        with frozen(model, layers):
            assert in_evaluation(model) == ["1"]
    for layers in ("[1].weight", "**.bias", "[0]", []):
        with frozen(model, layers):
            assert in_evaluation(model) == []


@pytest.mark.parametrize("layers", ["**", "*", "attention", "**.bias"])
def test_a_mask_takes_no_dropout_away_even_when_it_is_called_bias(layers):
    """Attention that owns its causal mask, as GPT-2's did, asks its own ``training`` whether to drop."""
    model = nn.ModuleDict({"attention": nn.Module(), "head": nn.Linear(2, 2)})
    model.attention.weight = nn.Parameter(torch.ones(2))
    model.attention.register_buffer("bias", torch.ones(2, 2, dtype=torch.bool).tril())
    with frozen(model, layers):
        assert in_evaluation(model) == []


@pytest.mark.parametrize(
    "layers", [None, 3, 1.5, True, object(), b"scale", torch.ones(2), nn.LayerNorm, nn.Identity]
)
@pytest.mark.parametrize("several", [False, True])
def test_what_is_no_layer_is_a_type_error(layers, several):
    with pytest.raises(TypeError, match=r"layers? .* got"):
        frozen(Model(), ["embeddings", layers] if several else layers)


def test_a_list_of_lists_is_a_type_error():
    with pytest.raises(TypeError, match=r"got \['embeddings'\]"):
        frozen(Model(), [["embeddings"]])


def test_what_is_no_module_is_a_type_error():
    for function in (frozen, freeze, frozen_parameters):
        with pytest.raises(
            TypeError,
            match=rf"{function.__name__} takes a torch.nn.Module, got an object of type str",
        ):
            function("embeddings")


UNREADABLE = [
    "",
    ".",
    "a..b",
    ".a",
    "a.",
    "a[",
    "a]",
    "a[]",
    "a[0",
    "a[x]",
    "a[0]b",
    "a[0:1:2:3]",
    "a[1.5]",
    "**[0]",
    "a**",
    "***",
]


@pytest.mark.parametrize("pattern", UNREADABLE)
def test_an_unreadable_pattern_is_a_value_error(pattern):
    with pytest.raises(ValueError, match=re.escape(f"{pattern!r} cannot be read")):
        frozen(Model(), pattern)


@pytest.mark.parametrize("pattern", ["encoder.layer[-]", "encoder.layer[:-]", "encoder.layer[::0]"])
def test_an_index_that_is_none_is_a_value_error_with_the_pattern(pattern):
    with pytest.raises(ValueError, match=re.escape(repr(pattern))):
        frozen(Model(), pattern)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("layer[:2]", r"did you mean '\*\*\.layer\[:2\]'\?"),
        ("norm", r"did you mean '\*\*\.norm'\?"),
        ("embedding", "nearest names are 'embeddings'"),
        ("encoder.layers[:2]", "nearest names are .*'encoder.layer'"),
        ("encoder.layer[4]", "nearest names are .*'encoder.layer'"),
        ("encoder.layer[9:]", "nearest names are .*'encoder.layer'"),
        ("embeddings[0]", "nearest names are 'embeddings'"),
        ("scales", "nearest names are 'scale'"),
        ("Scale", "nearest names are 'scale'"),
        ("**.scales", "nearest names are '\\*\\*.scale'"),
        ("qqq", "nearest names are 'embeddings', 'encoder', 'grid'"),
    ],
)
def test_a_pattern_without_a_match_is_a_value_error_that_helps(pattern, hint):
    for layers in (pattern, ["embeddings", pattern]):
        with pytest.raises(
            ValueError, match=re.escape(repr(pattern)) + " matches nothing in the Model; .*" + hint
        ):
            frozen(Model(), layers)


def test_a_predicate_that_is_never_true_is_a_value_error():
    with pytest.raises(ValueError, match=r"predicate .* true for no parameter"):
        frozen(Model(), lambda name, parameter: False)


@pytest.mark.parametrize(
    "foreign",
    [
        lambda m: m,
        lambda m: m.encoder,
        lambda m: m.encoder.layer,
        lambda m: m.encoder.layer[:2],
        lambda m: m.encoder.layer[0],
        lambda m: m.embeddings,
        lambda m: m.head[3],
        lambda m: m.prompts[:2],
        lambda m: m.scale,
        lambda m: nn.Parameter(m.scale),
    ],
)
def test_a_layer_of_another_model_is_a_value_error(foreign):
    with pytest.raises(ValueError, match="is not in the Model"):
        frozen(Model(), foreign(Model()))
    with pytest.raises(ValueError, match="is not in the Model"):
        freeze(Model(), ["embeddings", foreign(Model())])


def test_a_refused_selection_freezes_nothing():
    model = Model()
    with pytest.raises(ValueError, match="'nothing'"):
        freeze(model, ["**", "nothing"])
    assert frozen_parameters(model) == []
    assert in_evaluation(model) == []


@pytest.fixture(scope="module", params=["Bert", "DebertaV2"])
def transformer(request):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    if request.param == "DebertaV2":
        sizes |= {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]}
    config = getattr(transformers, request.param + "Config")(**sizes, pad_token_id=0)
    return getattr(transformers, request.param + "ForSequenceClassification")(config).train()


def test_the_layers_of_transformers_are_found(transformer):
    names = [name for name, _ in transformer.named_parameters()]
    base = transformer.base_model_prefix
    for layers, regex in [
        (f"{base}.embeddings", rf"{base}\.embeddings\."),
        (f"{base}.encoder.layer[:2]", rf"{base}\.encoder\.layer\.[01]\."),
        ("**.layer[-1].attention", r".*\.layer\.2\.attention\."),
        ("**.LayerNorm", r".*\.LayerNorm\."),
        ("**.bias", r".*\.bias$"),
    ]:
        expected = [name for name in names if re.match(regex, name)]
        assert expected
        assert selected(transformer, layers) == expected
    assert selected(transformer, transformer.base_model.encoder.layer[:2]) == selected(
        transformer, f"{base}.encoder.layer[:2]"
    )
    assert frozen_parameters(transformer) == []
    assert in_evaluation(transformer) == []


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
    assert moved
    assert not set(moved) & set(names)


def test_the_tied_head_of_a_language_model_is_reported():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=0,
    )
    model = transformers.BertForMaskedLM(config)
    assert freeze(model, "**.word_embeddings") == [
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.weight",
    ]
