"""The table of what a model is made of."""

import pytest
import torch
from torch import nn

from trainkit import freeze, model_summary, unfreeze


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.attention = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(10, 4)
        self.layer = nn.ModuleList([Block() for _ in range(5)])
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.ones(7))
        self.head = nn.Linear(4, 10, bias=False)


def cells(summary):
    return {row.path: row for row in summary.rows}


def test_numbers_are_those_of_the_parameters_of_each_module():
    model = Model()
    found = cells(model_summary(model))
    names = ["**", "embeddings", "layer[0:5]", "layer[0:5].attention", "layer[0:5].norm", "head"]
    assert list(found) == names
    parts = [
        [model],
        [model.embeddings],
        model.layer,
        [b.attention for b in model.layer],
        [b.norm for b in model.layer],
    ]
    for name, modules in zip(names, [*parts, [model.head]], strict=True):
        assert found[name].parameters == sum(
            p.numel() for module in modules for p in module.parameters()
        )
    assert found["layer[0:5]"].module == "5 x Block" and found["head"].module == "Linear"


def test_what_is_frozen_ends_a_row_of_equal_layers():
    model = Model()
    freeze(model, ["layer[:2]", "layer[3].norm", "head"])
    states = {name: row.state for name, row in cells(model_summary(model)).items()}
    assert {name: state for name, state in states.items() if "." not in name} == {
        "**": "part",
        "embeddings": "trainable",
        "layer[0:2]": "frozen",
        "layer[2]": "trainable",
        "layer[3]": "part",
        "layer[4]": "trainable",
        "head": "frozen",
    }
    assert states["layer[3].attention"] == "trainable" and states["layer[3].norm"] == "frozen"


def test_totals_count_what_is_there():
    model = Model()
    freeze(model, "embeddings")
    count = sum(p.numel() for p in model.parameters())
    assert model_summary(model).totals == (
        f"{count} parameters: {count - 40} trainable, 40 frozen\n0.9 KiB, with 7 numbers in buffers"
    )
    assert model_summary(nn.Linear(1024, 1024, dtype=torch.float64)).totals.endswith(
        "8.0 MiB, with 0 numbers in buffers"
    )


def test_a_shared_parameter_counts_once_and_both_say_with_whom():
    model = Model()
    model.head.weight = model.embeddings.weight
    found = cells(model_summary(model))
    assert found["embeddings"].tied == "head.weight" and found["head"].tied == "embeddings.weight"
    assert found["head"].parameters == 40 and found["**"].parameters == sum(
        p.numel() for p in model.parameters()
    )
    assert not found["layer[0:5]"].tied
    assert "tied" in model_summary(model).table(100) and "tied" not in model_summary(Model()).table(
        100
    )
    shared = nn.Sequential(*[nn.Linear(2, 2)] * 3)
    (whole, row) = model_summary(shared).rows
    assert whole.parameters == row.parameters == 6 and row.module == "3 x Linear"


def test_of_a_shared_parameter_in_a_container_the_other_name_is_said():
    embedding, linear, norm = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.LayerNorm(5)
    linear.weight = embedding.weight
    model = nn.ModuleDict(
        {
            "stem": nn.Sequential(embedding, linear),
            "blocks": nn.ModuleList([norm, nn.Linear(5, 5), norm]),
        }
    )
    assert [(row.path, row.tied) for row in model_summary(model).rows if row.tied] == [
        ("stem[0]", "stem.1.weight"),
        ("stem[1]", "stem.0.weight"),
        ("blocks[0]", "blocks.2.weight"),
        ("blocks[2]", "blocks.0.weight"),
    ]
    same = nn.ModuleDict({"blocks": nn.ModuleList([norm, norm]), "head": norm})
    assert [(row.path, row.tied) for row in model_summary(same).rows] == [
        ("**", ""),
        ("blocks[0:2]", "head.weight"),
        ("head", "blocks.0.weight"),
    ]


def test_dtypes_are_shown_where_they_differ():
    model = Model()
    assert "dtype" not in model_summary(model).table(100)
    model.head.bfloat16()
    found = cells(model_summary(model))
    assert (found["**"].dtype, found["head"].dtype, found["embeddings"].dtype) == (
        "mixed",
        "bfloat16",
        "float32",
    )
    assert "bfloat16" in model_summary(model).table(100)


@pytest.mark.parametrize(
    "depth, paths", [(0, ["**"]), (1, ["**", "embeddings", "layer[0:5]", "head"])]
)
def test_depth_ends_paths(depth, paths):
    assert list(cells(model_summary(Model(), depth))) == paths


def test_paths_mean_their_rows_also_in_lists_of_lists():
    model = Model()
    model.stages = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Block(2)])])
    model.stem = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    rows = cells(model_summary(model))
    inner = {"stages[0][0:2]", "stages[1][0]", "stem", "stem[0]", "stem[0][0]", "stem[0][2]"}
    assert inner <= rows.keys()
    for path, row in rows.items():
        unfreeze(model)
        names = freeze(model, path)
        assert sum(model.get_parameter(name).numel() for name in names) == row.parameters


def test_a_table_is_as_wide_as_it_is_told_where_that_is_enough(monkeypatch):
    model = nn.ModuleDict({"an_encoder_with_a_long_name": Model()})
    for width in (60, 80, 200):
        lines = model_summary(model).table(width).split("\n")[:-2]
        assert max(map(len, lines)) <= width
    assert "an_encoder_with_a_long_name.layer[0:5].attention" in model_summary(model).table(200)
    narrow = model_summary(model).table(60)
    assert "\n    layer[0:5] " in narrow and "\n      attention " in narrow
    monkeypatch.setenv("COLUMNS", "60")
    assert str(model_summary(model)) == repr(model_summary(model)) == narrow


def test_html_is_escaped():
    model = nn.ModuleDict({"<b>": nn.Linear(2, 2)})
    found = model_summary(model)._repr_html_()
    assert "&lt;b&gt;" in found and "<b>" not in found
    assert found.count("<tr") == 3 and found.count("<th ") == 4


class Flattened(torch.Tensor):
    """As quantised and sharded tensors are: made of others."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return self
        raise AssertionError(f"{func} reads a value")


def test_no_values_are_read():
    with torch.device("meta"):
        on_meta = Model()
    assert model_summary(on_meta).totals == model_summary(Model()).totals
    lazy = model_summary(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)))
    assert (
        lazy.rows[1].parameters == 0
        and "12 parameters: 12 trainable, 0 frozen; 2 have no shape" in lazy.totals
    )
    quantised = nn.Linear(1024, 1024, bias=False)
    codes = torch.zeros(1024, 1024, dtype=torch.int8)
    quantised.weight = nn.Parameter(Flattened(codes, torch.ones(1)), requires_grad=False)
    found = model_summary(quantised)
    assert found.rows[0].parameters == 2**20 and "1.0 MiB" in found.totals


def test_what_is_put_around_a_model_is_left_out():
    model = Model()
    assert (
        model_summary(torch.compile(model)).rows
        == model_summary(nn.DataParallel(model)).rows
        == model_summary(model).rows
    )


def test_another_type_or_depth_is_refused():
    for module in (None, nn.Linear, torch.ones(3)):
        with pytest.raises(TypeError, match=r"`model_summary\(model\)`"):
            model_summary(module)
    for depth, error in ((True, TypeError), ("2", TypeError), (1.0, TypeError), (-1, ValueError)):
        with pytest.raises(error, match=f"got {depth!r}.*depth=2"):
            model_summary(Model(), depth)


def test_a_torchscript_module_has_the_rows_of_the_plain_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    plain, scripted = (
        model_summary(nn.ModuleDict({"body": body})) for body in (model, torch.jit.script(model))
    )
    assert scripted.totals == plain.totals
    assert {row.path for row in scripted.rows} == {"**", "body", "body.0", "body.1"}
