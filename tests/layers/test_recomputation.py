"""Recomputing changes memory and nothing else. The reference is the same code without it."""

import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import pickle
import random
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from trainkit import accumulate, amp, frozen, recompute, train_step


class Runs(list):
    """Modules in the order of their runs. Recomputing puts back plain lists, and not this one."""


class Block(nn.Module):
    """Has everything that a second run could get wrong, and counts its runs."""

    def __init__(self, runs=None):
        super().__init__()
        self.wide, self.norm = nn.Linear(4, 16), nn.BatchNorm1d(16)
        self.dropout, self.narrow = (
            nn.Dropout(0.3),
            nn.utils.parametrizations.spectral_norm(nn.Linear(16, 4)),
        )
        self.runs, self.calls = Runs() if runs is None else runs, 0

    def forward(self, x, scale=None):
        self.runs.append(self)
        self.calls += 1
        out = self.narrow(self.dropout(self.norm(self.wide(x)).tanh().exp())) * self.calls
        return x + (out if scale is None else out * scale)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.runs = Runs()
        self.stem = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Block(self.runs) for _ in range(3))
        self.pair = nn.ModuleDict(
            {"a": Block(self.runs), "b": nn.Sequential(Block(self.runs), nn.Tanh())}
        )
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.pair.b(self.pair.a(x, scale=x.sigmoid())))


def make():
    torch.manual_seed(0)
    model = Model()
    torch.manual_seed(1)
    return model


def xs(n=1):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(6, 4, generator=generator) for _ in range(n)]


def loss_of(model, x):
    return model(x).square().mean()


def state_of(model):
    """All that training leaves in a model, and the next random number."""
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()] + [m.training for m in model.modules()]
    calls = [getattr(m, "calls", None) for m in model.modules()]
    return gradients, [b.clone() for b in model.buffers()], flags, calls, torch.rand(1)


def same(ours, theirs):
    def equal(a, b):
        return (
            torch.equal(a, b)
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
            else a is b or a == b
        )

    pairs = list(zip(itemised(ours), itemised(theirs), strict=True))
    assert any(isinstance(a, torch.Tensor) for a, _ in pairs)
    return all(equal(a, b) for a, b in pairs)


def itemised(state):
    return [item for part in state for item in (part if isinstance(part, list) else [part])]


def changed(model):
    """Names of modules on which something of ours is left."""
    return [
        name for name, m in model.named_modules() if {"forward", "__reduce_ex__"} & vars(m).keys()
    ]


def check_same(train, layers="layers", make=make):
    """``train`` a model in a block, and another without."""
    plain = make()
    train(plain)
    expected = state_of(plain)
    model = make()
    with recompute(model, layers):
        train(model)
    assert same(state_of(model), expected)
    assert not changed(model)


# The law.

LAYERS = [
    "layers",
    "layers[:2]",
    "layers[-1]",
    "pair",
    "**.narrow",
    "**.norm",
    "stem",
    "**",
    ["pair.a", "layers.*.wide"],
    [],
]
FROZEN = st.sampled_from(
    [[], ["stem"], ["stem", "layers[0]"], ["layers[1].wide"], ["**.norm"], ["pair"], ["**.weight"]]
)


@settings(max_examples=settings.default.max_examples // 2)
@given(
    layers=st.sampled_from(LAYERS),
    inner_layers=st.sampled_from(LAYERS),
    frozen_around=FROZEN,
    frozen_forward=FROZEN,
    calls=st.integers(1, 3),
    autocast=st.booleans(),
    ends_early=st.booleans(),
    eval_before_backward=st.booleans(),
)
def test_gradients_buffers_and_random_numbers_are_those_without(
    layers,
    inner_layers,
    frozen_around,
    frozen_forward,
    calls,
    autocast,
    ends_early,
    eval_before_backward,
):
    def train(model, blocks):
        with frozen(model, frozen_around), contextlib.ExitStack() as stack:
            for block in blocks:
                stack.enter_context(block)
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=autocast),
                frozen(model, frozen_forward),
            ):
                loss = sum(loss_of(model, x) for x in xs(calls))
            if ends_early:
                stack.close()
            if eval_before_backward:
                model.eval()
            loss.backward()
        assert not changed(model)
        return state_of(model)

    model = make()
    ours = train(model, [recompute(model, layers), recompute(model, inner_layers)])
    assert same(ours, train(make(), []))


# Memory, and what it is paid with.


def kept(model, x):
    """The loss, and how many numbers its graph keeps for backward, parameters left out."""
    parameters, tensors = {p.data_ptr() for p in model.parameters()}, {}

    @torch.compiler.disable
    def pack(tensor):
        tensors[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).sum()
    return loss, sum(tensor.numel() for key, tensor in tensors.items() if key not in parameters)


def test_only_the_inputs_of_a_region_are_kept():
    model = nn.Sequential(
        *[nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 4)) for _ in range(5)]
    )
    x = torch.randn(128, 4)
    assert kept(model, x)[1] == 5 * x.numel() + 5 * 128 * 64
    with recompute(model, "*"):
        assert kept(model, x)[1] == 5 * x.numel()
    with recompute(model, "[:2]"):
        assert kept(model, x)[1] == 5 * x.numel() + 3 * 128 * 64


def test_regions_run_again_in_backward_and_once_without_gradients():
    model, (x,) = make(), xs()
    with recompute(model, ["layers[1:]", "pair.a"]):
        for without in (torch.no_grad, torch.inference_mode):
            with without():
                model(x)
            assert len(model.runs) == 5
            model.runs.clear()
        loss = loss_of(model, x)
        assert len(model.runs) == 5
    loss.backward()
    assert model.runs[5:] == [model.pair.a, model.layers[2], model.layers[1]]


@pytest.mark.parametrize("store", [lambda x: x, lambda x: (x, x), lambda x: {"x": [x]}])
def test_graphs_of_earlier_calls_are_not_kept(store):
    """A module stores a tensor with a graph. Each call must not keep the graph of the last."""

    class Stores(nn.Linear):
        stored = None

        def forward(self, x):
            y = super().forward(x).tanh()
            self.stored = store((y.exp() * y).sum())
            return y

    model, counts = nn.Sequential(Stores(4, 4), Stores(4, 4)), []
    for _ in range(4):
        with recompute(model, "*"):
            model(torch.randn(2, 4)).sum().backward()
        gc.collect()
        counts.append(sum(type(thing).__name__ == "_CheckpointFrame" for thing in gc.get_objects()))
    assert counts[0] == counts[-1]


# Which modules are regions.


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("layers", ["layers.0", "layers.1", "layers.2"]),
        ("layers[::2]", ["layers.0", "layers.2"]),
        ("pair", ["pair.a", "pair.b"]),
        ("layers.*", ["layers.0", "layers.1", "layers.2"]),
        ("pair.**", ["pair.a", "pair.b"]),
        ("**", [""]),
        ([], []),
        (["layers[0].wide", "layers[0]", "layers[1].wide"], ["layers.0", "layers.1.wide"]),
        (lambda model: model.pair.a, ["pair.a"]),
        (lambda model: model.layers[1:], ["layers.1", "layers.2"]),
        (lambda model: model.pair.b[:1], ["pair.b.0"]),
        (lambda model: [model.stem, "head"], ["stem", "head"]),
    ],
)
def test_the_outermost_modules_with_a_forward_are_regions(layers, names):
    model = make()
    signature = inspect.signature(model.pair.a.forward)
    layers = layers(model) if callable(layers) else layers
    for given_module in (model, torch.compile(model), nn.DataParallel(model)):
        with recompute(given_module, layers) as found:
            assert found == names == changed(model)
            assert signature == inspect.signature(model.pair.a.forward)
        assert not changed(model)


def test_a_layer_replaced_since_is_recomputed():
    model = make()
    block = recompute(model, "layers")
    model.layers[1] = nn.Linear(4, 4)
    with block:
        assert changed(model) == ["layers.0", "layers.1", "layers.2"]


def test_a_tied_layer_is_a_region_in_one_place_and_a_part_of_one_in_another():
    def tied():
        model = make()
        model.pair.b[0] = model.layers[0]
        return model

    check_same(lambda model: loss_of(model, xs()[0]).backward(), ["layers", "pair.b"], tied)


# What was found is put back.


def test_blocks_of_the_same_layers_recompute_once_and_may_end_in_any_order():
    model, (x,) = make(), xs()
    first, second = recompute(model, "layers"), recompute(model, ["layers[1:]", "layers[0].wide"])
    first.__enter__(), second.__enter__()
    loss_of(model, x).backward()
    assert len(model.runs) == 5 + 3
    first.__exit__(None, None, None)
    assert changed(model) == ["layers.0.wide", "layers.1", "layers.2"]
    second.__exit__(None, None, None)
    assert not changed(model)


def test_a_forward_of_the_users_own_is_put_back():
    model, (x,) = make(), xs()
    theirs = model.layers[0].forward = lambda x: 2 * Block.forward(model.layers[0], x)
    with pytest.raises(ZeroDivisionError), recompute(model, "layers"):
        loss_of(model, x).backward()
        assert model.runs.count(model.layers[0]) == 2
        raise ZeroDivisionError
    assert changed(model) == ["layers.0"] and vars(model.layers[0])["forward"] is theirs


def test_a_forward_put_around_it_inside_stays_and_recomputes_no_more():
    model, (x,) = make(), xs()
    with recompute(model, "layers"):
        found = model.layers[0].forward
        model.layers[0].forward = lambda x: found(x)
        copied = copy.deepcopy(model.layers[1])
    assert changed(model) == ["layers.0"] and not changed(copied)
    loss_of(model, x).backward()
    assert len(model.runs) == 5
    with recompute(model, "layers"):
        loss_of(model, x).backward()
    assert len(model.runs) == 5 + 5 + 3


def test_a_wrapper_that_copies_attributes_stays_also_in_the_next_block():
    model, (x,), calls = make(), xs(), []

    def wrapped(forward):
        @functools.wraps(forward)
        def wrapper(x):
            calls.append(x)
            return forward(x)

        return wrapper

    for _ in range(2):
        with recompute(model, "layers"), recompute(model, "layers"):
            if not calls:
                model.layers[0].forward = wrapped(model.layers[0].forward)
            with recompute(model, "layers[0]"):
                loss_of(model, x).backward()
        assert changed(model) == ["layers.0"]
    assert len(calls) == 1 + 2  # in the second block the wrapper is recomputed too


def test_a_model_is_freed_without_the_garbage_collector():
    def left():
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        with recompute(model, "*"):
            loss_of(model, xs()[0]).backward()
        return weakref.ref(model[0])

    left()  # what torch imports at its first call holds frames
    gc.disable()
    try:
        assert left()() is None
    finally:
        gc.enable()


def test_a_forward_that_fails_leaves_nothing():
    model, (x,) = make(), xs()
    with recompute(model, "layers"):
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.ones(2, 3))
        with pytest.raises(TypeError):
            model.layers[0](x, nonsense=3)
        loss_of(model, x).backward()
    assert len(model.runs) == 5 + 3 and not changed(model)


def by_pickle(model):
    pickled = pickle.dumps(model)
    assert b"trainkit" not in pickled
    return pickle.loads(pickled)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, by_pickle])
def test_copies_made_inside_are_of_the_model_as_it_was_found(make_copy):
    model, (x,) = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 1)), xs()
    names = list(model.state_dict())
    with recompute(model, ["[0]", "[1]"]):
        loss = model(x).sum()
        copied, layer = make_copy(model), make_copy(model[0])
        assert list(model.state_dict()) == names == list(copied.state_dict())
        assert changed(model) == ["0", "1"] and not changed(copied) and not changed(layer)
    loss.backward()
    with torch.no_grad():
        model[0][0].weight.zero_()
    assert not torch.equal(copied(x), model(x)) and copied[0][0].weight.grad is None


# The second run is as the first.


@pytest.mark.parametrize("layers", ["*", "**.[0]"])
def test_weights_that_hooks_compute_are_those_of_each_call(layers):
    """The hooks put them on the module, where the next call puts others."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            *[nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Tanh()) for _ in "ab"]
        )

    check_same(lambda model: sum(loss_of(model, x) for x in xs(3)).backward(), layers, make)


def test_parameters_that_a_call_was_given_are_used_again():
    """As MAML does: the second call with what the first one's gradients make of the parameters."""

    def train(model):
        first, second = xs(2)
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(
            functional_call(model, parameters, first).sum(),
            [*parameters.values()],
            create_graph=True,
        )
        fast = {
            name: p - 0.1 * g for (name, p), g in zip(parameters.items(), gradients, strict=True)
        }
        functional_call(model, fast, second).square().sum().backward()

    check_same(train)


def test_gradients_of_gradients_and_two_backwards_of_one_graph():
    def train(model):
        x = xs()[0].requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(model, x), x, create_graph=True)
        loss = gradient.square().sum() + loss_of(model, x)
        loss.backward(retain_graph=True)
        loss.backward()

    check_same(train)


def test_arguments_by_name_and_outputs_of_any_kind():
    """Some of them are names of arguments of torch's ``checkpoint``."""

    @dataclasses.dataclass
    class Output:
        first: torch.Tensor
        others: tuple

    class Odd(nn.Linear):
        def forward(self, function, *, use_reentrant, debug=False, context_fn=None):
            y = super().forward(function["x"])
            return Output(y.tanh(), (y.exp(), {"sin": y.sin() * use_reentrant, "none": context_fn}))

    class Odder(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Odd(4, 4)

        def forward(self, x):
            output = self.odd({"x": x}, use_reentrant=x, debug=True)
            output = self.odd(
                function={"x": output.first}, use_reentrant=output.others[0], context_fn=3
            )
            assert isinstance(output, Output) and output.others[1]["none"] == 3
            return output.first * output.others[1]["sin"]

    def make():
        torch.manual_seed(0)
        return Odder()

    check_same(lambda model: loss_of(model, xs()[0]).backward(), "odd", make)


def test_an_input_changed_in_place_is_an_error_also_where_it_has_a_name():
    model, (x,) = make(), xs()
    with recompute(model, "pair.a"):
        h = model.stem(x)
        loss = model.pair.a(x, scale=h).sum()
        h.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_parameters_changed_between_forward_and_backward_are_an_error():
    """Plain torch raises too. Recomputing with other weights would give other gradients."""
    model, (x,) = make(), xs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recompute(model, "pair.a"):
        early = model.pair.a(x).sum()
        loss_of(model, x).backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"recomputed Block were changed .* update after"):
            early.backward()


def test_an_attribute_that_was_deleted_since_stays_deleted():
    model, (x,) = make(), xs()
    model.pair.a.note = "taken away"
    with recompute(model, "pair.a"):
        loss = loss_of(model, x)
        del model.pair.a.note
        loss.backward()
    assert model.pair.a.wide.weight.grad is not None and not hasattr(model.pair.a, "note")


# As a part, and as a decorator.


def as_generator(optimizer, loss):
    def step(x):
        yield loss(x)
        optimizer.step()
        optimizer.zero_grad()

    return step


class ByHand:
    def __init__(self, step, loss):
        self.step, self.loss, self.over = step, loss, step.over

    def __call__(self, x):
        with self.step:
            self.step.backward(self.loss(x))


FORMS = {
    "a part": lambda opt, r, f: train_step(opt, accumulate(2), r)(f),
    "around a step": lambda opt, r, f: r(train_step(opt, accumulate(2))(f)),
    "under a step": lambda opt, r, f: train_step(opt, accumulate(2))(r(f)),
    "twice": lambda opt, r, f: train_step(opt, accumulate(2), r, r)(f),
    "a generator": lambda opt, r, f: train_step(opt, accumulate(2), r)(as_generator(opt, f)),
    "a context": lambda opt, r, f: ByHand(train_step(opt, accumulate(2), r), f),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_step_that_recomputes_is_the_step_that_does_not(form, dtype):
    """Autocast is off in backward, and on in the second run. The order of parts is no matter."""

    def train(is_recomputed):
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        parts = [frozen(model, "stem"), *([amp(dtype=dtype)] if dtype else [])]
        block = recompute(model, ["layers", "pair"] if is_recomputed else [])
        step = form(optimizer, block, lambda x: loss_of(model, x))
        for part in parts:
            step = ByHand(part(step.step), step.loss) if isinstance(step, ByHand) else part(step)
        for x in step.over(xs(5)):
            step(x)
            assert not changed(model)
        assert len(model.runs) == 5 * (10 if is_recomputed else 5)
        return [p.detach() for p in model.parameters()] + list(state_of(model))

    assert same(train(True), train(False))


# What is refused.


@pytest.mark.parametrize(
    ("layers", "kind", "message"),
    [
        ("**.bias", ValueError, r"'\*\*.bias' .*no module with a forward.*`recompute\(model, "),
        (["layers", "**.running_mean"], ValueError, "running_mean' .*no module with a forward"),
        (lambda name, parameter: True, ValueError, "no module with a forward"),
        ("layer", ValueError, "matches nothing in the Model; .*'layers'"),
        ([3], TypeError, "got 3"),
    ],
)
def test_layers_that_cannot_run_again_are_refused(layers, kind, message):
    model = make()
    with pytest.raises(kind, match=message):
        recompute(model, layers)
    assert not changed(model)


def test_a_layer_with_a_torchscript_module_is_refused():
    model = nn.Sequential(nn.Sequential(torch.jit.script(nn.BatchNorm1d(4)), nn.Linear(4, 4)))
    with pytest.raises(TypeError, match=r"'0' contains a TorchScript module.*`recompute\(model, "):
        recompute(model, "*")
    with recompute(model, ["**", "!*.[0]"]) as names:
        assert names == ["0.1"]


def test_only_modules_are_taken_and_layers_are_required():
    with pytest.raises(TypeError, match=r"got a list: `recompute\(model"):
        recompute([nn.Linear(1, 1)], "**")
    with pytest.raises(TypeError, match="layers"):
        recompute(make())


# Real models, compiled ones, and several ranks.


SIZES = {"vocab_size": 61, "num_layers": 2, "num_heads": 2}
TEXT = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32}
TEXT |= {"num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {**SIZES, "d_model": 16, "d_kv": 8, "d_ff": 32, "decoder_start_token_id": 0}
FAMILIES = {
    "BertForMaskedLM": ("Bert", TEXT, ["bert.encoder.layer"]),
    "LlamaForCausalLM": ("Llama", TEXT, ["model.layers"]),
    "T5ForConditionalGeneration": ("T5", T5, ["encoder.block", "decoder.block"]),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers(family, attention):
    transformers = pytest.importorskip("transformers", minversion="5.23")
    config, arguments, layers = FAMILIES[family]
    ids = torch.randint(3, 61, (2, 7))
    batch = {
        "input_ids": ids,
        "attention_mask": (torch.arange(7) < torch.tensor([[7], [4]])).long(),
        "labels": ids,
    }

    def make():
        torch.manual_seed(0)
        model = getattr(transformers, family)(getattr(transformers, config + "Config")(**arguments))
        model.set_attn_implementation(attention)
        return model.train()

    options = {} if config == "Bert" else {"use_cache": False}
    check_same(lambda model: model(**batch, **options).loss.backward(), layers, make)
    model = make()
    with recompute(model, layers):
        if options:
            with pytest.raises(ValueError, match=r"cache.*`model\(..., use_cache=False\)`"):
                model(**batch)
            with torch.no_grad():
                assert model(**batch).past_key_values is not None


class Chain(nn.Sequential):
    """torch.compile leaves out the frames of its own Sequential where that is compiled in place."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


def in_place(model, compile_it):
    model.compile(backend="aot_eager", fullgraph=True)
    return model


def one_layer(model, compile_it):
    model[1] = compile_it(model[1])
    return model


COMPILED = {
    "before": lambda model, compile_it: compile_it(model),
    "in place": in_place,
    "one layer": one_layer,
    "inside of a region": lambda model, compile_it: (
        model[1].add_module("0", compile_it(model[1][0])),
        model,
    )[1],
}


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_model_recomputes_too_and_takes_one_graph_more(how):
    if how in ("before", "in place") and torch.__version__ < (2, 7):
        pytest.skip("a BatchNorm in torch 2.6's own compiled checkpoint counts a batch twice")

    def compile_it(module):
        return torch.compile(module, backend="aot_eager", fullgraph=True)

    def make():
        torch.manual_seed(0)
        layer = [nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 4)]
        return Chain(*[nn.Sequential(*copy.deepcopy(layer)) for _ in range(3)])

    torch._dynamo.reset()
    x = torch.randn(128, 4)
    plain, model = make(), make()
    called = COMPILED[how](model, compile_it)
    for i in range(8):
        expected, _ = kept(plain, x)
        expected.backward()
        with (
            recompute(model, "*") if i % 2 else contextlib.nullcontext(),
            torch._dynamo.config.patch(error_on_recompile=i > 1),
        ):
            loss, numbers = kept(called, x)
        assert (numbers < 3 * x.numel() + 3 * 64 * 5) == bool(i % 2)
        loss.backward()
    for ours, theirs in zip(state_of(model)[:2], state_of(plain)[:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()


def on_ranks(rank, ranks):
    """Whether each way of wrapping a model gives the same bits with and without."""
    mesh, answers = init_device_mesh("cpu", (ranks,)), {}

    def train(how, block_inside, layers, frozen_layers, ends_early):
        model = make()
        if how == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            for block in model.layers:
                for part in [block.wide, block] if block_inside else [block]:
                    # Parameters that stay gathered after forward were sharded before it.
                    fully_shard(part, mesh=mesh, reshard_after_forward=not block_inside)
            wrapped = fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in xs(2 * ranks)[rank::ranks]:
            with contextlib.ExitStack() as stack, frozen(wrapped, frozen_layers):
                stack.enter_context(recompute(wrapped, layers))
                loss = loss_of(wrapped, x)
                if ends_early:
                    stack.close()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                wrapped(x)
        parameters = [
            getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()
        ]
        stays = torch.equal(parameters[0], make().stem.weight)
        assert stays == ("stem" in frozen_layers)
        return parameters, list(state_of(model)[1])

    for how in [
        ("ddp", False, []),
        ("fsdp2", False, []),
        ("fsdp2", False, ["stem", "layers[0]"]),
        ("fsdp2", True, []),
    ]:
        expected = train(*how[:2], [], how[2], False)
        for layers, ends_early in [("layers", False), ("**.wide", True), (["layers[1]"], False)]:
            ours = train(*how[:2], layers, how[2], ends_early)
            answers[str((how, layers))] = same(ours, expected)
    return answers


def test_wrapped_models_on_two_ranks():
    for answer in run(on_ranks, 2):
        assert len(answer) == 12 and all(answer.values()), answer


Pair = collections.namedtuple("Pair", "hidden cell")


class Carries(nn.LSTM):
    """Carries its state from call to call: ``keep`` makes it of the last output."""

    def __init__(self, keep):
        super().__init__(4, 4)
        self.keep, self.state = keep, keep((torch.zeros(6, 4).view(1, 6, 4),) * 2, None)

    def forward(self, x):
        if "calls" in self.state:
            self.state["calls"] += 1
        found = self.state["pair"] if isinstance(self.state, dict) else self.state
        found = found[0] if len(found) == 1 else found
        y, pair = super().forward(x[None], tuple(t.detach().clone() for t in found))
        self.state = self.keep(pair, self.state)
        return y[0] * (self.state.get("calls", 1) if isinstance(self.state, dict) else 1)


def changed_in_place(pair, state):
    state = {"calls": 0, "pair": [torch.zeros_like(t) for t in pair]} if state is None else state
    state["pair"][0] = pair[0]
    state["pair"][1].copy_(pair[1].detach())
    return state


STATES = {
    "tuple": lambda pair, _: pair,
    "list": lambda pair, _: [*pair],
    "named tuple": lambda pair, _: Pair(*pair),
    "nested": lambda pair, _: [pair],
    "dict": lambda pair, _: {"pair": pair},
    "in place": changed_in_place,
}


@pytest.mark.parametrize("keep", STATES.values(), ids=STATES)
def test_a_state_in_a_container_is_as_in_the_first_run(keep):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(Carries(keep), nn.Linear(4, 1))

    def train(model):
        sum(loss_of(model, x) for x in xs(2)).backward()
        loss = loss_of(model, xs()[0])
        loss.backward(retain_graph=True)
        loss.backward()
        outputs.append(model(xs()[0]))  # in which the state shows

    outputs = []
    check_same(train, "[0]", make)
    assert torch.equal(*outputs)


def test_a_list_that_two_layers_share_is_one_in_the_second_run_too():
    class Shares(nn.Linear):
        def forward(self, x):
            self.shared.append(x.detach().mean())
            return super().forward(x) * sum(self.shared)

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(Shares(4, 4), Shares(4, 4))
        model[0].shared = model[1].shared = []
        return nn.Sequential(model)

    check_same(lambda model: sum(loss_of(model, x) for x in xs(2)).backward(), "[0]", make)


class Counts(nn.Module):
    """Changes tensors in place in every forward, and uses what they count."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(4, 4), torch.zeros(3)
        self.register_buffer("visits", torch.zeros(3, dtype=torch.long))

    def forward(self, x):
        self.seen.add_(1)
        self.visits += 2
        return self.linear(x) * self.seen.sum() * self.visits.sum()


def test_tensors_that_forward_changes_in_place_change_once():
    def train(block):
        torch.manual_seed(0)
        model = nn.Sequential(Counts(), nn.Linear(4, 1))
        with block(model):
            for x in xs(2):
                model(x).square().mean().backward()
        return [*(p.grad for p in model.parameters()), model[0].seen, model[0].visits]

    found = train(lambda model: recompute(model, "[0]"))
    expected = train(lambda model: contextlib.nullcontext())
    assert all(map(torch.equal, found, expected))


DRAWS = {
    "Python": random.random,
    "NumPy": np.random.rand,
    "torch": lambda: torch.rand(()).item(),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_random_numbers_are_those_of_the_first_run(draw):
    """As LayerDrop draws them. The numbers after backward are those without it, too."""

    class Drops(nn.Linear):
        def forward(self, x):
            return (super().forward(x) * draw()).tanh()

    def make():
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        return nn.Sequential(Drops(4, 4), nn.Linear(4, 1))

    def train(model):
        sum(loss_of(model, x) for x in xs(2)).backward()
        after.append(draw())

    after = []
    check_same(train, "[0]", make)
    assert after[0] == after[1]


class Masks(nn.Module):
    """Has a large buffer, which ``change`` may change in the forward."""

    def __init__(self, change=lambda mask: None):
        super().__init__()
        self.linear, self.change = nn.Linear(4, 4), change
        self.register_buffer("mask", torch.ones(100, 100))
        self.register_buffer("small", torch.ones(4))

    def forward(self, x):
        self.change(self.mask)
        return self.linear(x).tanh() * self.mask.mean() * self.small


def alive(numel):
    return sum(type(thing) is torch.Tensor and thing.numel() == numel for thing in gc.get_objects())


def test_a_large_buffer_is_copied_for_backward_only_if_forward_changes_it():
    torch.manual_seed(0)
    model = nn.Sequential(*[Masks() for _ in range(4)], Masks(lambda mask: mask.mul_(0.9)))
    before = alive(10_000)
    with recompute(model, "*"):
        loss = model(xs()[0]).sum()
        assert alive(10_000) == before + 1
    loss.backward()


@pytest.mark.parametrize("change", [lambda mask: None, lambda mask: mask.mul_(0.9)])
def test_a_large_buffer_is_as_in_the_first_run(change):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(Masks(change), nn.Linear(4, 1))

    check_same(lambda model: sum(loss_of(model, x) for x in xs(2)).backward(), "[0]", make)


def test_a_buffer_changed_between_forward_and_backward_is_as_before_or_an_error():
    torch.manual_seed(0)
    model = nn.Sequential(Masks())
    with recompute(model, "[0]"):
        loss = model(xs()[0]).sum()
        gradient = torch.autograd.grad(loss, model[0].linear.weight, retain_graph=True)
        model[0].small.mul_(2)
        assert torch.equal(
            torch.autograd.grad(loss, model[0].linear.weight, retain_graph=True)[0], *gradient
        )
        model[0].mask.mul_(2)
        with pytest.raises(RuntimeError, match=r"large buffers of a recomputed Masks were changed"):
            loss.backward()


def test_a_layer_that_changes_its_own_weight_is_an_error_that_says_so():
    class Renormed(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.div_(self.weight.norm())
            return super().forward(x)

    model = nn.Sequential(Renormed(4, 1))
    with recompute(model, "[0]"):
        loss = model(xs()[0]).tanh().sum()
        with pytest.raises(RuntimeError, match="leave out a layer that changes its own weight"):
            loss.backward()
