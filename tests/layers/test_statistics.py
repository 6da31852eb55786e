"""Buffers of frozen layers: left alone or held, also against update_bn, and in copies and files."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import trainkit
from trainkit import accumulate, freeze, frozen, frozen_parameters, train_step, unfreeze


def make():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None), nn.Dropout(0.3))
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), inner, nn.Linear(4, 1))


def xs(n=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 4, generator=generator) * 3 + 2 for _ in range(n)]


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def modes(model):
    return [m.training for m in model.modules()]


# buffers=False.

PARTS = ["**", "[0]", "[1]", "[2]", "[1:3]", "**.weight", "[2][1]", ["**", "![1]"]]


@given(
    layers=st.sampled_from(PARTS),
    around=st.none() | st.sampled_from(PARTS),
    within=st.none() | st.sampled_from(PARTS),
    window=st.integers(1, 3),
    as_part=st.booleans(),
    twice=st.booleans(),
    train=st.booleans(),
)
def test_it_is_requires_grad_false_to_the_bit(
    layers, around, within, window, as_part, twice, train
):
    """Other blocks, around it or within it, hold buffers; they are the stricter ones."""

    def run(is_ours):
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        strict = [frozen(model, other) for other in (around, within) if other is not None]
        if is_ours:
            block = frozen(model, layers, buffers=False)
            blocks = [*strict[:1], block, *[block] * twice, *strict[1:]]
        else:
            names = frozen(model, layers).__enter__()  # the names alone
            model = make()
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
            blocks = [frozen(model, o) for o in (around, within) if o is not None]
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in names)
        step = train_step(optimizer, accumulate(window), *(blocks if as_part else []))

        def loss(x):
            if train:
                model.train()
            y = model(x).square().mean()
            return y if y.requires_grad else y + optimizer_free

        step = step(loss)
        if not as_part:
            for block in blocks:
                step = block(step)
        torch.manual_seed(2)
        optimizer_free = torch.zeros((), requires_grad=True)
        for x in step.over(xs()):
            step(x)
        return model

    ours, plain = run(True), run(False)
    assert same(ours, plain) and modes(ours) == modes(plain) == [True] * 8
    assert frozen_parameters(ours) == []


@pytest.mark.parametrize("eval_mode", [False, True])
def test_for_good_it_leaves_statistics_and_eval_mode_decides_about_the_rest(eval_mode):
    model = make()
    names = freeze(model, buffers=False, eval_mode=eval_mode)
    assert names == frozen_parameters(model) == [name for name, _ in model.named_parameters()]
    training = [name for name, m in model.train().named_modules() if m.training]
    assert training == (["1", "2.1"] if eval_mode else [name for name, _ in model.named_modules()])
    before = model[1].running_mean.clone()
    model(xs()[0])
    assert not torch.equal(model[1].running_mean, before)
    freeze(model, "[1]")
    freeze(model, "[1]", buffers=False)  # what was frozen with its buffers stays so
    assert not model.train()[1].training
    unfreeze(model)
    assert frozen_parameters(model) == [] and all(modes(model))


# update_bn and reset_running_stats.

NORMS = {
    "momentum": lambda: nn.BatchNorm1d(4),
    "cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "without affine": lambda: nn.BatchNorm1d(4, affine=False),
    "synchronised": lambda: nn.SyncBatchNorm(4),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "in a module": lambda: nn.Sequential(nn.Sequential(nn.BatchNorm1d(4))),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("how", ["freeze", "block", "both", "copied in a block"])
def test_frozen_statistics_stay_and_the_others_are_new(kind, how):
    images = [x.view(6, 4, 1).repeat(1, 1, 3) + torch.arange(3) for x in xs()]
    torch.manual_seed(0)
    base = nn.Sequential(NORMS[kind](), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))
    if kind == "synchronised":  # trains on accelerators alone
        base[0].running_mean.add_(2), base[0].running_var.mul_(3)
    else:
        base(images[0])
    plain = copy.deepcopy(base)
    features = [plain[0].eval()(x).detach() for x in images]
    update_bn(features, plain[1:])

    if how in ("freeze", "both"):
        freeze(base, "[0]")
    if how == "freeze":
        average = AveragedModel(base)
        update_bn(images, average)
    else:
        with frozen(base, "[0]"):
            average = AveragedModel(base if how != "block" else nn.Identity())
            average = average if how != "block" else nn.Sequential(base)
            update_bn(images, average)
            for module in average.modules():
                if not (module.training or isinstance(module, AveragedModel)):
                    getattr(module, "reset_running_stats", bool)()
    inner = average[0] if how == "block" else average.module
    assert same(inner[0], base[0]) and same(base[0], plain[0])
    torch.testing.assert_close(inner[2].running_mean, plain[2].running_mean)
    torch.testing.assert_close(inner[2].running_var, plain[2].running_var)


@pytest.mark.parametrize("is_block", [False, True])
def test_afterwards_all_is_as_ever(is_block):
    model, plain = make(), make()
    for m in (model, plain):
        m(xs()[0])
    own = model[2][1].reset_running_stats = lambda: "the user's own"
    if is_block:
        with pytest.raises(ZeroDivisionError), frozen(model):
            raise ZeroDivisionError
    else:
        freeze(model)
        unfreeze(model)
    assert model[2][1].reset_running_stats is own
    del model[2][1].reset_running_stats
    torch.manual_seed(3)
    update_bn(xs(), model)
    torch.manual_seed(3)
    update_bn(xs(), plain)
    assert same(model, plain)
    assert not any({"train", "reset_running_stats"} & vars(m).keys() for m in model.modules())
    with frozen(model, buffers=False):
        model[1].reset_running_stats()
    assert not model[1].running_mean.any()


# Copies and files.


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("in_block", [False, True])
def test_a_copy_holds_its_statistics_until_it_is_unfrozen(make_copy, in_block):
    model = make().eval()
    model[1].train()
    if in_block:
        with frozen(model):
            copied = make_copy(make_copy(model))
    else:
        freeze(model)
        copied = make_copy(make_copy(model))
        unfreeze(model)
    found = copy.deepcopy(copied.state_dict())
    update_bn(xs(), copied)
    copied[1].reset_running_stats()
    copied.train()(xs()[0])
    assert all(torch.equal(value, found[name]) for name, value in copied.state_dict().items())
    assert not copied[1].training
    model[1].reset_running_stats()
    unfreeze(copied)
    assert copied[1].training and "reset_running_stats" not in vars(copied[1])
    copied[1].reset_running_stats()
    assert not copied[1].running_mean.any()


LOAD = """
import sys, torch

class Missing:
    def find_spec(name, *others):
        if name.partition(".")[0] == "trainkit":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing)
model = torch.load(sys.argv[1], weights_only=False)
assert [name for name, m in model.named_modules() if not m.training] == ["1", "2.1"]
assert not any(p.requires_grad for p in model.parameters())
assert model(torch.ones(3, 4)).shape == (3, 1)
assert model.train() is model and model[1].training
model[1].reset_running_stats()
assert not model[1].running_mean.any()
torch.save(model, sys.argv[1])
"""


def test_a_whole_model_with_frozen_statistics_loads_without_trainkit(tmp_path):
    model, path = make(), tmp_path / "model.pt"
    model(xs()[0])
    freeze(model)
    torch.save(model, path)
    loaded = torch.load(path, weights_only=False)
    assert same(loaded, model) and not loaded.train()[1].training and loaded[3].training
    subprocess.run([sys.executable, "-c", LOAD, str(path)], check=True, cwd=tmp_path)
    again = torch.load(path, weights_only=False)
    assert again[1].training and freeze(again) == freeze(model)
    assert not again.train()[1].training
    unfreeze(again)
    assert again.train()[1].training and trainkit.frozen_parameters(again) == []
