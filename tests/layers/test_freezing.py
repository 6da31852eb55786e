"""Frozen means frozen, and the end restores what was found.

The references are loops of plain PyTorch, and a table of which block holds what.
"""

import contextlib
import copy
import functools
import inspect
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import batch_norm, mse_loss
from torch.utils.checkpoint import checkpoint

from trainkit import (
    accumulate,
    freeze,
    frozen,
    frozen_parameters,
    recompute,
    train_step,
    trainable_parameters,
    unfreeze,
)


class Counting(nn.Module):
    """Owns a parameter and a buffer of floats, and moves the buffer whenever it is trained."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += len(x)
        return x * self.weight


def make_model():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), Counting(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(4, 4), nn.Linear(4, 1))


def batches(n):
    generator = torch.Generator().manual_seed(1)
    shapes = (8, 4), (8, 1)
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(n)]


def bits(*modules):
    return [
        {name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules
    ]


def same_bits(found, expected):
    assert [list(state) for state in found] == [list(state) for state in expected]
    return all(
        torch.equal(a[name], b[name]) for a, b in zip(found, expected, strict=True) for name in a
    )


def moved(module, before):
    return [name for name, t in module.state_dict().items() if not torch.equal(t, before[0][name])]


def found_in(model):
    """All that a frozen block touches; gradients as the objects that they are."""
    parameters = [(p.requires_grad, id(p.grad)) for p in model.parameters()]
    return parameters, [(m.training, m.__dict__.get("train")) for m in model.modules()]


def mixed_model():
    """Has both of everything: flags, gradients and modes."""
    model = make_model()
    model(batches(1)[0][0]).sum().backward()
    model[0].weight.requires_grad = False
    model[1].weight.grad = None
    model[5].bias.requires_grad = False
    model[1].eval()
    model[4].eval()
    return model


# Frozen means frozen.


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("SGD", {"momentum": 0.9}), ("AdamW", {"fused": True}), ("RMSprop", {"momentum": 0.9})],
)
def test_a_frozen_block_is_the_loop_that_leaves_the_layers_out(kind, options, set_to_none):
    """Momentum, weight decay and gradients are there when the block begins; ``train()`` inside."""

    def train(model, optimizer, after_train=lambda: None):
        torch.manual_seed(2)
        optimizer.step()
        for x, y in batches(3):
            model.train()
            after_train()
            optimizer.zero_grad(set_to_none=set_to_none)
            mse_loss(model(x), y).backward()
            optimizer.step()

    ours, by_hand = make_model(), make_model()
    make = functools.partial(getattr(torch.optim, kind), lr=0.1, weight_decay=0.1, **options)
    optimizers = [make(ours.parameters()), make(by_hand.parameters())]
    for model, optimizer in zip((ours, by_hand), optimizers, strict=True):
        train(model, optimizer)
    before = bits(ours)

    with frozen(ours, "[:3]"):
        train(ours, optimizers[0])
    for parameter in by_hand[:3].parameters():
        parameter.requires_grad, parameter.grad = False, None
    train(by_hand, optimizers[1], lambda: by_hand[:3].eval())

    assert same_bits(bits(ours), bits(by_hand))
    assert moved(ours, before) == ["4.weight", "4.bias", "5.weight", "5.bias"]


@pytest.mark.parametrize("home", [nn.utils, nn.utils.parametrizations])
@pytest.mark.parametrize("layers", ["[0]", "[0].*", lambda name, parameter: name.startswith("0.")])
def test_spectral_norm_stays(home, layers):
    model = nn.Sequential(home.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 1))
    before = bits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with frozen(model, layers):
        for x, y in batches(3):
            mse_loss(model.train()(x), y).backward()
            optimizer.step()
    assert moved(model, before) == ["1.weight", "1.bias"]


def test_a_frozen_batch_norm_normalises_with_its_running_statistics():
    """pytorch#86590, pytorch#66073."""
    norm, x = make_model()[1], torch.randn(8, 4)
    norm(x)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    with frozen(norm):
        expected = batch_norm(x, mean, variance, norm.weight, norm.bias, training=False)
        assert torch.equal(norm.train()(x), expected)
        with pytest.raises(ValueError, match="boolean"):
            norm.train("yes")
        assert torch.equal(norm(x), expected)
    assert not torch.equal(norm(x), expected)


def test_dropout_stays_unless_eval_mode():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5))
    with frozen(model):
        assert (model.train()(torch.ones(64)) == 0).any()
        with frozen(model, eval_mode=True):
            assert not (model.train()(torch.ones(64)) == 0).any()
        with frozen(model, "[0]", eval_mode=True):
            assert (model.train()(torch.ones(64)) == 0).any()


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel, torch.compile])
def test_buffers_stay_also_where_train_is_called_on_a_wrapper(wrap):
    model = Counting()
    wrapper = wrap(model)
    with frozen(wrapper):
        for asked in (wrapper, model):
            asked.train()
            model(torch.ones(3, 4))
    assert model.seen == 0
    model(torch.ones(3, 4))
    assert model.seen == 3


def test_gradients_flow_through_and_a_graph_from_before_leaves_none_inside():
    model = make_model()
    early = model(batches(1)[0][0]).sum()
    with frozen(model, "[1:]"):
        model(batches(1)[0][0]).sum().backward()
        early.backward()
        assert all(p.grad is None for p in model[1:].parameters())
    assert all((p.grad is None) == (i > 1) for i, p in enumerate(model.parameters()))


# What was found is restored.


@pytest.mark.parametrize("layers", ["**", "[:3]", "**.bias", []])
@pytest.mark.parametrize("eval_mode", [False, True])
def test_everything_found_is_put_back(layers, eval_mode):
    model = mixed_model()
    found = found_in(model)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    context = frozen(model, layers, eval_mode=eval_mode)
    for _ in range(2):
        with context as names, context, frozen(model, "[1:]"):
            assert set(names) <= set(frozen_parameters(model))
            if layers == "**":
                model.zero_grad(set_to_none=False)
                model.zero_grad()
        assert found_in(model) == found
    with pytest.raises(ZeroDivisionError), context:
        raise ZeroDivisionError
    assert found_in(model) == found
    now = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(torch.equal, now, gradients))


def test_a_mode_that_was_asked_for_inside_holds_afterwards():
    model = make_model()
    with frozen(model, eval_mode=True):
        assert model.eval() is model
        model[1].train()
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model] == [False, True, False, False, False, False]
    with frozen(model):
        model.train()
    assert all(m.training for m in model.modules())


def test_a_train_of_the_users_own_is_restored():
    """``model.train = lambda mode=True: model`` pins the first stage of latent diffusion."""
    model = make_model()
    for pinned, training in ((model[1], True), (model[2], False)):
        pinned.train(training).train = lambda mode=True, pinned=pinned: pinned
    found = found_in(model)
    with frozen(model):
        model.train()
        assert not model[1].training
    assert found_in(model) == found


def test_a_train_that_a_class_overrides_is_called_with_all_it_takes():
    class Pinned(Counting):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout()

        def train(self, mode=True, only_this=False):
            super().train(mode and not only_this)
            self.dropout.eval()
            return self

    model = Pinned().train()
    with frozen(model):
        model.train()
        assert not model.training and not model.dropout.training
    assert model.training and not model.dropout.training
    with frozen(model):
        model.train(True, only_this=True)
    assert not model.training


def test_a_compiled_submodule_gets_its_mode_back():
    model = nn.Sequential(torch.compile(make_model()))
    found = found_in(model)
    with frozen(model, eval_mode=True):
        assert not any(m.training for m in model[0].modules())
    assert found_in(model) == found


def test_a_predicate_may_look_at_what_freezing_changes():
    model = mixed_model()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    with frozen(model, lambda name, parameter: parameter.requires_grad) as names:
        assert names == trainable and trainable_parameters(model) == []
    assert frozen_parameters(model) == ["0.weight", "5.bias"]


CHANGES = {
    "cast": lambda weight: setattr(weight, "data", weight.data.double()),
    "resized": lambda weight: setattr(weight, "data", torch.zeros(9, 4)),
    "quantised": lambda weight: setattr(weight, "data", torch.zeros(4, 4, dtype=torch.int8)),
    "exchanged": lambda weight: torch.utils.swap_tensors(
        weight, nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_end_gives_back_all_that_still_fits(change):
    model = make_model()
    model(batches(1)[0][0]).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    with frozen(model):
        CHANGES[change](model[0].weight)
    assert frozen_parameters(model) == (["0.weight"] if change == "quantised" else [])
    others = list(model.parameters())[1:]
    assert all(p.grad is g for p, g in zip(others, gradients[1:], strict=True))
    assert model[1].training
    assert (model[0].weight.grad is gradients[0]) == (change == "exchanged")


@pytest.mark.parametrize("held_twice", [False, True])
def test_parameters_put_in_place_inside_have_the_flags_that_were_found(held_twice):
    """load_state_dict(assign=True) copies the flag of the frozen one."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[1].bias.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with frozen(model, "[0]") if held_twice else contextlib.nullcontext(), frozen(model):
        model.load_state_dict(state, assign=True)
    assert frozen_parameters(model) == ["1.bias"]


def test_parameters_put_in_place_inside_stay_frozen_in_a_block_that_ends_later():
    model = nn.Linear(4, 4)
    first, last = frozen(model), frozen(model)
    first.__enter__()
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    last.__enter__()
    first.__exit__(None, None, None)
    assert trainable_parameters(model) == []
    last.__exit__(None, None, None)
    assert frozen_parameters(model) == []


def test_a_layer_replaced_between_two_blocks_is_frozen_and_one_replaced_inside_is_put_back():
    model = make_model()
    model.register_buffer("late", None)
    context, old = frozen(model), model[0]
    model.late = torch.zeros(1)
    with context:
        assert not model.training
        model[3].added = nn.Parameter(torch.zeros(1))
        with context as names:
            assert "3.added" in names
        model[0] = nn.Linear(4, 4)
        assert frozen_parameters(model)[0] != "0.weight"
        with context:
            assert frozen_parameters(model)[:2] == ["0.weight", "0.bias"]
        assert frozen_parameters(old) == ["weight", "bias"]
        model[0].weight.requires_grad = False
        model[1].weight.requires_grad = True
        with frozen(model, "[1].weight"):
            assert not model[1].weight.requires_grad
    assert frozen_parameters(old) == [] and frozen_parameters(model) == ["0.weight"]


# By hand, what each of these selects: parameters, modules, and modules that own a buffer.
SELECTIONS = {
    "**": (
        ["0.weight", "0.bias", "1.weight", "1.bias", "2.0.weight", "2.0.bias"],
        ["", "0", "1", "2", "2.0"],
        ["1", "2.0"],
    ),
    "[0]": (["0.weight", "0.bias"], ["0"], []),
    "[1]": (["1.weight", "1.bias"], ["1"], ["1"]),
    "[1:]": (["1.weight", "1.bias", "2.0.weight", "2.0.bias"], ["1", "2", "2.0"], ["1", "2.0"]),
    "[2].0.*": (["2.0.weight", "2.0.bias"], [], ["2.0"]),
    "**.bias": (["0.bias", "1.bias", "2.0.bias"], [], []),
}
ACTIONS = st.one_of(
    st.tuples(st.just("enter"), st.sampled_from([*SELECTIONS]), st.booleans()),
    st.tuples(st.just("leave"), st.integers(0, 9)),
    st.tuples(st.just("train"), st.sampled_from(["", "1", "2"]), st.booleans()),
    st.tuples(st.sampled_from(["freeze", "unfreeze"]), st.sampled_from([*SELECTIONS])),
)


@given(st.lists(ACTIONS, max_size=14), st.lists(st.booleans(), min_size=11, max_size=11))
def test_blocks_may_end_in_any_order(actions, found):
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Sequential(nn.BatchNorm1d(1)))
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    for parameter, requires_grad in zip(parameters.values(), found, strict=False):
        parameter.requires_grad, parameter.grad = requires_grad, torch.ones_like(parameter)
    for module, training in zip(modules.values(), found[6:], strict=True):
        module.training = training
    requires_grad = {name: p.requires_grad for name, p in parameters.items()}
    gradients = {name: p.grad for name, p in parameters.items()}
    asked = {name: m.training for name, m in modules.items()}
    for_good, entered = set(), []

    def check():
        held_parameters = {name for _, parameters, _ in entered for name in parameters}
        held_modules = for_good.union(*(modules for _, _, modules in entered))
        for name, parameter in parameters.items():
            held = name in held_parameters
            assert parameter.requires_grad == (requires_grad[name] and not held)
            assert parameter.grad is (None if held else gradients[name])
        for name, module in modules.items():
            assert module.training == (asked[name] and name not in held_modules)
            assert ("train" in module.__dict__) == (name in held_modules)

    for action, *how in [*actions, *[("leave", 0)] * len(actions)]:
        if action == "leave":
            if entered:
                entered.pop(how[0] % len(entered))[0].__exit__(None, None, None)
        elif action == "train":
            modules[how[0]].train(how[1])
            below = [n for n in modules if f"{n}.".startswith(f"{how[0]}.") or not how[0]]
            asked.update(dict.fromkeys(below, how[1]))
        else:
            selected, whole, owners = SELECTIONS[how[0]]
            if action == "enter":
                context = frozen(model, how[0], eval_mode=how[1])
                assert context.__enter__() == selected
                entered.append((context, selected, whole + owners if how[1] else owners))
            elif action == "freeze":
                assert freeze(model, how[0]) == selected
                requires_grad.update(dict.fromkeys(selected, False))
                gradients.update(dict.fromkeys(selected))
                for_good.update(owners)
            else:
                assert unfreeze(model, how[0]) == selected
                requires_grad.update(dict.fromkeys(selected, True))
                for_good.difference_update(owners)
        check()


# As a decorator, and as a part.


def test_a_decorated_function_keeps_its_signature_and_may_call_itself():
    model = mixed_model()
    found = found_in(model)

    class Trainer:
        @frozen(model)
        def count(self, depth: int, *, fails: bool = False) -> int:
            """Depth of the recursion that saw nothing trainable on its way back."""
            deeper = self.count(depth - 1, fails=fails) if depth else 1 / (not fails)
            return deeper + (trainable_parameters(model) == [])

    assert [Trainer().count(3), Trainer().count(0)] == [5, 2]
    assert Trainer.count.__name__ == "count" and Trainer.count.__doc__.startswith("Depth")
    assert list(inspect.signature(Trainer.count).parameters) == ["self", "depth", "fails"]
    with pytest.raises(ZeroDivisionError):
        Trainer().count(2, fails=True)
    assert found_in(model) == found


def generator_function():
    yield torch.ones(())


async def async_function():
    pass


async def async_generator_function():
    yield


class Generates:
    def __call__(self):
        yield torch.ones(())


RUN_LATER = {
    "generator function": generator_function,
    "async function": async_function,
    "async generator function": async_generator_function,
    "partial": functools.partial(generator_function),
    "object": Generates(),
    "function that returns a coroutine": lambda: async_function(),
}


@pytest.mark.parametrize("function", RUN_LATER.values(), ids=RUN_LATER)
@pytest.mark.parametrize("block", [frozen, recompute])
def test_functions_that_run_after_their_call_are_refused(function, block):
    """They would run outside of the block, and train what is frozen, silently."""
    with pytest.raises(TypeError, match=rf"`train_step\(optimizer, {block.__name__}\(model, "):
        block(make_model(), "**")(function)()


@pytest.mark.parametrize("thing", [None, 3, make_model(), frozen(make_model())], ids=type)
@pytest.mark.parametrize("block", [frozen, recompute])
def test_only_functions_are_decorated(thing, block):
    with pytest.raises(TypeError, match=rf"`with {block.__name__}\(model, layers\):`"):
        block(make_model(), "**")(thing)


def gan():
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(4, 4), make_model()
    parameters = [*generator.parameters(), *discriminator.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    for x, _ in batches(2):
        discriminator(generator(x)).mean().backward()
        optimizer.step()
    return generator, discriminator, optimizer


def train_gan(make_step):
    """Backward runs the discriminator again, to see that it is frozen there too."""
    generator, discriminator, optimizer = gan()

    def loss(x, y):
        discriminator.train()
        return -checkpoint(discriminator, generator(x), use_reentrant=False).mean()

    step = make_step(optimizer, discriminator, loss)
    torch.manual_seed(3)
    for batch in step.over(batches(5)):
        found = found_in(discriminator)
        step(*batch)
        assert found_in(discriminator) == found
    return bits(generator, discriminator)


def train_gan_by_hand():
    generator, discriminator, optimizer = gan()
    for parameter in discriminator.parameters():
        parameter.requires_grad, parameter.grad = False, None
    torch.manual_seed(3)
    xs = [x for x, _ in batches(5)]
    for window in (xs[:2], xs[2:4], xs[4:]):
        optimizer.zero_grad()
        for x in window:
            discriminator.train()
            discriminator[:3].eval()
            loss = -checkpoint(discriminator, generator(x), use_reentrant=False).mean()
            (loss / len(window)).backward()
        optimizer.step()
    return bits(generator, discriminator)


def as_generator(optimizer, loss):
    def step(x, y):
        yield loss(x, y)
        optimizer.step()
        optimizer.zero_grad()

    return step


class ByHand:
    """Calls a step that is a context."""

    def __init__(self, step, loss):
        self.step, self.loss, self.over = step, loss, step.over

    def __call__(self, x, y):
        with self.step:
            self.step.backward(self.loss(x, y))


def steps(opt, *parts):
    return train_step(opt, accumulate(2), *parts)


FORMS = {
    "a part": lambda opt, D, f: steps(opt, frozen(D))(f),
    "a part, first": lambda opt, D, f: train_step(opt, frozen(D), accumulate(2))(f),
    "around a step": lambda opt, D, f: frozen(D)(steps(opt)(f)),
    "around a step without its function": lambda opt, D, f: frozen(D)(steps(opt))(f),
    "under a step": lambda opt, D, f: steps(opt)(frozen(D)(f)),
    "between": lambda opt, D, f: train_step(opt)(frozen(D)(accumulate(2)(f))),
    "under a decorator": lambda opt, D, f: steps(opt)(functools.wraps(f)(frozen(D)(f))),
    "everywhere": lambda opt, D, f: frozen(D)(steps(opt, frozen(D))(frozen(D)(f))),
    "two halves": lambda opt, D, f: steps(opt, frozen(D, "[:2]"), frozen(D, "[2:]"))(f),
    "two halves, swapped": lambda opt, D, f: steps(opt, frozen(D, "[2:]"), frozen(D, "[:2]"))(f),
    "a generator": lambda opt, D, f: steps(opt, frozen(D))(as_generator(opt, f)),
    "around a generator": lambda opt, D, f: frozen(D)(steps(opt)(as_generator(opt, f))),
    "a context": lambda opt, D, f: ByHand(steps(opt, frozen(D)), f),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_step_with_a_frozen_part_is_the_loop_by_hand_in_every_form(form):
    """frozen(m) twice is once, and frozen(a) and frozen(b) commute."""
    found = train_gan(form)
    assert same_bits(found, train_gan_by_hand())
    assert same_bits(found[1:], bits(gan()[1]))


# For good.


def test_freeze_holds_until_unfreeze():
    model = make_model()
    model(batches(1)[0][0]).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight"]
    assert freeze(model, "[:3]") == names == frozen_parameters(model)
    assert trainable_parameters(model) == list(model[4:].parameters())
    before = bits(model[:3])
    for x, y in batches(3):
        mse_loss(model.train()(x), y).backward()
        optimizer.step()
    assert same_bits(bits(model[:3]), before)
    assert not torch.fx.symbolic_trace(model).train().get_submodule("1").training

    assert unfreeze(model, "[0]") == ["0.weight", "0.bias"]
    assert frozen_parameters(model) == names[2:] and not model[1].training
    assert unfreeze(model, "[1].*") == names[2:4] and model[1].training
    assert unfreeze(model) == [name for name, _ in model.named_parameters()]
    assert frozen_parameters(model) == []
    assert all(m.training and "train" not in m.__dict__ for m in model.modules())


def test_a_tied_weight_is_reported_under_all_its_names():
    head = nn.Linear(4, 4, bias=False)
    model = nn.ModuleDict({"embeddings": nn.Embedding(4, 4), "body": nn.Linear(4, 4), "head": head})
    head.weight = model.embeddings.weight
    names = ["embeddings.weight", "head.weight"]
    for layers in ("head", head.weight, lambda name, parameter: name == "head.weight"):
        with frozen(model, layers) as found:
            assert found == names == frozen_parameters(model)
    assert freeze(model, "embeddings") == names == frozen_parameters(model)
    assert trainable_parameters(model) == list(model.body.parameters())
    assert unfreeze(model, "head") == names
    assert trainable_parameters(model) == list(model.parameters())
    twice = nn.Sequential(*[nn.Linear(2, 2)] * 2)
    assert freeze(twice, "[1]") == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_integer_parameters_are_never_made_trainable():
    model = nn.Sequential(nn.Linear(2, 2), nn.Module())
    model[1].codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert freeze(model) == ["0.weight", "0.bias", "1.codes"] == frozen_parameters(model)
    with frozen(model) as names:
        assert names == ["0.weight", "0.bias", "1.codes"]
    assert unfreeze(model) == ["0.weight", "0.bias"]
    assert frozen_parameters(model) == ["1.codes"]


@pytest.mark.parametrize("for_good", [False, True])
def test_lazy_modules_are_frozen_before_they_are_initialised(for_good):
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 1))
    with (
        contextlib.nullcontext(freeze(model, "[:2]"))
        if for_good
        else frozen(model, "[:2]") as names
    ):
        assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]
        model(torch.randn(8, 3))
        before = bits(model)
        model.train()(torch.randn(8, 3)).sum().backward()
        assert moved(model, before) == [] and trainable_parameters(model) == [
            *model[2].parameters()
        ]
    unfreeze(model)
    assert frozen_parameters(model) == []


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_frozen_model_is_frozen_and_lives_its_own_life(make_copy):
    model = make_model()
    freeze(model, "[:3]")
    with frozen(model, eval_mode=True):
        copies = [make_copy(model)]
        assert frozen_parameters(copies[0]) == frozen_parameters(model)
    copies.append(make_copy(model))
    assert frozen_parameters(copies[1]) == frozen_parameters(model)
    for copied in copies:
        assert not copied.train()[1].training
        unfreeze(copied)
        assert frozen_parameters(copied) == []
        assert all(m.training and "train" not in m.__dict__ for m in copied.modules())
    assert len(frozen_parameters(model)) == 5 and not model.train()[1].training


def test_only_modules_are_taken():
    for function in (frozen, freeze, unfreeze, frozen_parameters, trainable_parameters):
        with pytest.raises(TypeError, match=rf"got a list: `{function.__name__}\(model"):
            function([nn.Linear(1, 1)])


class Attention(nn.Module):
    """Has dropout in its forward, and a buffer of a given dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.values = nn.Linear(4, 4)
        self.register_buffer("index", torch.zeros(4, dtype=dtype))

    def forward(self, x):
        return nn.functional.dropout(self.values(x), training=self.training)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.half, torch.cfloat])
def test_only_buffers_of_floats_or_complex_numbers_hold_the_mode(dtype):
    """As levit and XLM do: their attention owns the indices of positions, and dropout stays on."""
    model = nn.Sequential(Attention(dtype), nn.Linear(4, 1))
    moves = dtype.is_floating_point or dtype.is_complex
    with frozen(model, "[0]"):
        assert model.train()[0].training is not moves
    freeze(model, "[0]")
    assert model.train()[0].training is not moves


class Scaled(nn.Module):
    """Owns statistics as a buffer, a frozen body with a BatchNorm, and a head that is trained."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.body = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)
        )
        self.head = nn.Linear(4, 1)


def all_but(names):
    def act(model):
        freeze(model, ["**", *("!" + name for name in names)])

    return act


def all_and_then(names, **options):
    def act(model):
        freeze(model, **options)
        unfreeze(model, names)

    return act


@pytest.mark.parametrize(
    ("act", "evaluating"),
    [
        (freeze, ["", "body.1", "body.2"]),
        (all_but(["head"]), ["body.1", "body.2"]),
        (all_and_then(["head"]), ["body.1", "body.2"]),
        (all_and_then(["head.bias"]), ["body.1", "body.2"]),
        (all_but(["body[0]"]), ["body.1", "body.2"]),
        (all_and_then(["body[0]"]), ["body.1", "body.2"]),
        (all_but(["**.bias"]), ["body.1", "body.2"]),
        (all_and_then(["**.bias"]), ["body.1", "body.2"]),
        (all_and_then(["head"], eval_mode=True), ["body", "body.0", "body.1", "body.2"]),
    ],
)
def test_a_module_with_layers_that_are_trained_is_in_the_mode_asked_for(act, evaluating):
    """Its functional dropout depends on it. Norms inside it keep their statistics."""
    model = Scaled()
    act(model)
    for mode in (True, False, True):
        model.train(mode)
        assert [n for n, m in model.named_modules() if m.training is not mode] == (
            evaluating if mode else []
        )
    unfreeze(model)
    assert all(m.training for m in model.modules())


def test_a_block_around_all_but_the_head_leaves_the_mode_of_the_whole():
    model = Scaled()
    with frozen(model, ["**", "!head"]):
        assert model.training and not model.body[1].training


def scripted():
    torch.manual_seed(0)
    return torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))


def loaded():
    """Its parameters are plain tensors."""
    file = io.BytesIO()
    torch.jit.save(scripted(), file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("make", [scripted, loaded])
def test_torchscript_modules_are_frozen_like_others(make):
    model, names = nn.Sequential(make(), nn.Linear(4, 1)), ["0.weight", "0.bias"]
    names += ["1.weight", "1.bias"]
    x, before = torch.randn(8, 4), bits(model[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with frozen(model, "[0]") as found:
        assert found == [f"0.{name}" for name in names] == frozen_parameters(model)
        model.train()(x).sum().backward()
        optimizer.step()
    assert same_bits(bits(model[0]), before)
    assert frozen_parameters(model) == [] and model[0].training
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert freeze(model[0]) == names == frozen_parameters(model[0])
    assert unfreeze(model[0]) == names and frozen_parameters(model[0]) == []
