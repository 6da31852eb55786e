"""Frozen means frozen, and what was found is put back. The oracles are loops of plain PyTorch, and a table of who holds what."""

import contextlib
import copy
import functools
import inspect
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import batch_norm, mse_loss
from torch.utils.checkpoint import checkpoint

from trainkit import (
    accumulate,
    freeze,
    frozen,
    frozen_parameters,
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
    return nn.Sequential(
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        Counting(),
        nn.Dropout(0.5),
        nn.Linear(4, 4),
        nn.Linear(4, 1),
    )


def batches(n):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator))
        for _ in range(n)
    ]


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
    return [
        name
        for name, tensor in module.state_dict().items()
        if not torch.equal(tensor, before[0][name])
    ]


def found_in(model):
    """All that a frozen block touches; gradients as the objects that they are."""
    parameters = [(p.requires_grad, id(p.grad)) for p in model.parameters()]
    return parameters, [(m.training, m.__dict__.get("train")) for m in model.modules()]


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
    "adamw fused": lambda parameters: torch.optim.AdamW(
        parameters, lr=0.1, weight_decay=0.1, fused=True
    ),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(
        parameters, lr=0.1, momentum=0.9, weight_decay=0.1
    ),
}


# Frozen means frozen.


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_frozen_block_is_the_loop_that_leaves_the_layers_out(make_optimizer, set_to_none):
    """Momentum, weight decay and leftover gradients are all there when the block begins, and ``train()`` is called inside."""

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
    optimizers = [make_optimizer(ours.parameters()), make_optimizer(by_hand.parameters())]
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


@pytest.mark.parametrize(
    "spectral_norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm]
)
@pytest.mark.parametrize("layers", ["[0]", "[0].*", lambda name, parameter: name.startswith("0.")])
def test_spectral_norm_stays(spectral_norm, layers):
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 1))
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
    expected = batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False
    )
    with frozen(norm):
        assert torch.equal(norm.train()(x), expected)
    assert not torch.equal(norm(x), expected)


def test_dropout_stays_unless_eval_mode():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5))
    with frozen(model):
        assert (model.train()(torch.ones(64)) == 0).any()
        with frozen(model, eval_mode=True):
            assert not (model.train()(torch.ones(64)) == 0).any()
        with frozen(model, "[0]", eval_mode=True):
            assert (model.train()(torch.ones(64)) == 0).any()


@pytest.mark.parametrize(
    "wrap", [lambda model: model, nn.Sequential, nn.DataParallel, torch.compile]
)
def test_buffers_stay_also_where_train_is_asked_of_a_wrapper(wrap):
    model = Counting()
    wrapper = wrap(model)
    with frozen(wrapper):
        for asked in (wrapper, model):
            asked.train()
            model(torch.ones(3, 4))
    assert model.seen == 0
    model(torch.ones(3, 4))
    assert model.seen == 3


def test_a_graph_from_before_the_block_leaves_no_gradient_inside():
    model = make_model()
    loss = model(batches(1)[0][0]).sum()
    with frozen(model, "[0]"):
        loss.backward()
        assert model[0].weight.grad is None
    assert model[0].weight.grad is None
    assert model[4].weight.grad is not None


def test_gradients_flow_through_frozen_layers():
    model = make_model()
    with frozen(model, "[1:]"):
        model(batches(1)[0][0]).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "0.weight",
        "0.bias",
    ]


# What was found is put back.


def mixed_model():
    """Has of everything both: parameters trained and not, with and without gradients, modules in training and not."""
    model = make_model()
    model(batches(1)[0][0]).sum().backward()
    model[0].weight.requires_grad = False
    model[1].weight.grad = None
    model[5].bias.requires_grad = False
    model[1].eval()
    model[4].eval()
    return model


@pytest.mark.parametrize("layers", ["**", "[:3]", "**.bias", []])
@pytest.mark.parametrize("eval_mode", [False, True])
def test_everything_found_is_put_back(layers, eval_mode):
    model = mixed_model()
    found = found_in(model)
    context = frozen(model, layers, eval_mode=eval_mode)
    for _ in range(2):
        with context as names, context, frozen(model, "[1:]"):
            assert set(names) <= set(frozen_parameters(model))
        assert found_in(model) == found
    with pytest.raises(ZeroDivisionError), context:
        raise ZeroDivisionError
    assert found_in(model) == found


def test_a_mode_asked_for_inside_is_honoured_afterwards():
    model = make_model()
    with frozen(model, eval_mode=True):
        assert model.eval() is model
        model[1].train()
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model] == [False, True, False, False, False, False]
    with frozen(model):
        model.train()
    assert all(m.training for m in model.modules())


def test_gradients_that_zero_grad_would_wipe_are_put_back_whole():
    model = make_model()
    model(batches(1)[0][0]).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    with frozen(model):
        model.zero_grad(set_to_none=False)
        model.zero_grad()
    assert all(
        torch.equal(p.grad, gradient)
        for p, gradient in zip(model.parameters(), gradients, strict=True)
    )


def test_a_train_of_the_users_own_is_put_back():
    """``model.train = lambda mode=True: model`` is how latent diffusion pins its first stage to evaluation."""
    model = make_model()
    for pinned, training in ((model[1], True), (model[2], False)):
        pinned.train(training).train = lambda mode=True, pinned=pinned: pinned
    found = found_in(model)
    with frozen(model):
        model.train()
        assert not model[1].training
    assert found_in(model) == found


def test_a_train_that_a_class_overrides_is_still_asked():
    class Pinned(Counting):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout()

        def train(self, mode=True):
            super().train(mode)
            self.dropout.eval()
            return self

    model = Pinned().train()
    with frozen(model):
        model.train()
        assert not model.training
        assert not model.dropout.training
    assert model.training
    assert not model.dropout.training


def test_a_compiled_submodule_gets_its_mode_back():
    model = nn.Sequential(torch.compile(make_model()))
    found = found_in(model)
    with frozen(model, eval_mode=True):
        assert not any(m.training for m in model[0].modules())
    assert found_in(model) == found


def test_a_predicate_may_look_at_what_freezing_changes():
    model = mixed_model()
    found = found_in(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    with frozen(model, lambda name, parameter: parameter.requires_grad) as names:
        assert names == trainable
        assert trainable_parameters(model) == []
    assert found_in(model) == found


def test_a_model_that_changes_its_dtype_inside_is_put_back():
    model = make_model()
    model(batches(1)[0][0]).sum().backward()
    with frozen(model):
        model.double()
    assert frozen_parameters(model) == []
    assert all(p.grad.dtype == torch.float64 for p in model.parameters())


def test_a_layer_replaced_between_two_blocks_is_frozen_and_one_replaced_inside_is_put_back():
    model = make_model()
    context, old = frozen(model, "[0]"), model[0]
    with context:
        model[0] = nn.Linear(4, 4)
        assert frozen_parameters(model) == []
        with context:
            assert frozen_parameters(model) == ["0.weight", "0.bias"]
        assert frozen_parameters(model) == []
        assert frozen_parameters(old) == ["weight", "bias"]
    assert frozen_parameters(old) == []
    with context:
        assert frozen_parameters(model) == ["0.weight", "0.bias"]


def test_blocks_may_end_in_any_order():
    model = mixed_model()
    found = found_in(model)

    def late():
        with frozen(model, "[:2]"):
            yield

    generator = late()
    next(generator)
    with contextlib.ExitStack() as outer:
        with contextlib.ExitStack() as inner:
            outer.enter_context(frozen(model, "[1:]"))
            inner.enter_context(frozen(model, "[0]", eval_mode=True))
        generator.close()
        assert frozen_parameters(model) == [
            "0.weight",
            *[name for name, _ in model.named_parameters() if name[0] != "0"],
        ]
    assert found_in(model) == found


# By hand, what each of these selects: the parameters, the modules, and the modules that own a buffer.
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


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(ACTIONS, max_size=14), st.lists(st.booleans(), min_size=11, max_size=11))
def test_any_sequence_of_entering_and_leaving_freezes_what_is_held_and_restores_the_rest(
    actions, found
):
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

    def leave(context, *_):
        context.__exit__(None, None, None)

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

    for action, *how in actions:
        if action == "leave":
            if entered:
                leave(*entered.pop(how[0] % len(entered)))
        elif action == "train":
            modules[how[0]].train(how[1])
            asked.update(
                (name, how[1])
                for name in modules
                if name == how[0] or not how[0] or name.startswith(how[0] + ".")
            )
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
    while entered:
        leave(*entered.pop(0))
        check()


# As a decorator, and as a part.


def test_a_decorated_function_keeps_name_doc_and_signature():
    def function(x: int, *, y: str = "a") -> float:
        """Does something."""

    decorated = frozen(make_model())(function)
    assert (decorated.__name__, decorated.__doc__) == ("function", "Does something.")
    assert inspect.signature(decorated) == inspect.signature(function)


def test_a_decorated_function_runs_frozen_again_and_again_and_within_itself():
    model = mixed_model()
    found = found_in(model)

    @frozen(model)
    def function(depth):
        """Depth of the recursion that saw nothing trainable on its way back."""
        deeper = function(depth - 1) if depth else 0
        return deeper + (trainable_parameters(model) == [])

    assert [function(3), function(0)] == [4, 1]
    assert found_in(model) == found
    with pytest.raises(ZeroDivisionError):
        frozen(model)(lambda: 1 / 0)()
    assert found_in(model) == found


def test_methods_can_be_decorated():
    class Trainer:
        model = make_model()

        @frozen(model, "[0]")
        def names(self):
            return frozen_parameters(self.model)

    assert Trainer().names() == ["0.weight", "0.bias"]


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
    "function that returns a generator": lambda: generator_function(),
    "function that returns an async generator": lambda: async_generator_function(),
    "function that returns a coroutine": lambda: async_function(),
}


@pytest.mark.parametrize("function", RUN_LATER.values(), ids=RUN_LATER)
def test_functions_that_run_after_their_call_are_refused(function):
    """They would run outside of the block, and train what is to be frozen, silently."""
    with pytest.raises(
        TypeError, match=r"as a part, `train_step\(optimizer, frozen\(model, layers\)\)`"
    ):
        frozen(make_model())(function)()


@pytest.mark.parametrize(
    "thing", [None, 3, make_model(), accumulate(2), frozen(make_model())], ids=type
)
def test_what_is_no_function_is_not_decorated(thing):
    """Decorating a part would lose one of the two silently; parts go together in train_step."""
    with pytest.raises(TypeError, match="frozen decorates functions"):
        frozen(make_model())(thing)


def gan():
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(4, 4), make_model()
    optimizer = torch.optim.AdamW(
        [*generator.parameters(), *discriminator.parameters()], lr=0.1, fused=True
    )
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
        step(*batch)
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


FORMS = {
    "a part": lambda opt, D, f: train_step(opt, accumulate(2), frozen(D))(f),
    "a part, first": lambda opt, D, f: train_step(opt, frozen(D), accumulate(2))(f),
    "around a step": lambda opt, D, f: frozen(D)(train_step(opt, accumulate(2))(f)),
    "around a step without its function": lambda opt, D, f: frozen(D)(
        train_step(opt, accumulate(2))
    )(f),
    "under a step": lambda opt, D, f: train_step(opt, accumulate(2))(frozen(D)(f)),
    "between": lambda opt, D, f: train_step(opt)(frozen(D)(accumulate(2)(f))),
    "under a decorator": lambda opt, D, f: train_step(opt, accumulate(2))(
        functools.wraps(f)(frozen(D)(f))
    ),
    "twice": lambda opt, D, f: train_step(opt, accumulate(2), frozen(D), frozen(D))(f),
    "everywhere": lambda opt, D, f: frozen(D)(
        train_step(opt, accumulate(2), frozen(D))(frozen(D)(f))
    ),
    "two halves": lambda opt, D, f: train_step(
        opt, accumulate(2), frozen(D, "[:2]"), frozen(D, "[2:]")
    )(f),
    "two halves, swapped": lambda opt, D, f: train_step(
        opt, accumulate(2), frozen(D, "[2:]"), frozen(D, "[:2]")
    )(f),
    "a generator": lambda opt, D, f: train_step(opt, accumulate(2), frozen(D))(
        as_generator(opt, f)
    ),
    "around a generator": lambda opt, D, f: frozen(D)(
        train_step(opt, accumulate(2))(as_generator(opt, f))
    ),
    "a context": lambda opt, D, f: ByHand(train_step(opt, accumulate(2), frozen(D)), f),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_step_with_a_frozen_part_is_the_loop_by_hand_in_every_form(form):
    """Law 6 in its second half: frozen(m) twice is once, frozen(a) and frozen(b) commute."""
    found = train_gan(form)
    assert same_bits(found, train_gan_by_hand())
    assert same_bits(found[1:], bits(gan()[1]))


def test_a_step_puts_back_what_it_froze():
    model, other = mixed_model(), nn.Linear(4, 4)
    found = found_in(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    step = train_step(optimizer, accumulate(2), frozen(model))(lambda x, y: model(other(x)).mean())
    for batch in step.over(batches(3)):
        step(*batch)
        assert found_in(model) == found
    with pytest.raises(TypeError):
        step(None, None)
    assert found_in(model) == found


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

    assert unfreeze(model, "[0]") == ["0.weight", "0.bias"]
    assert frozen_parameters(model) == names[2:]
    assert not model[1].training
    assert unfreeze(model) == [name for name, _ in model.named_parameters()]
    assert frozen_parameters(model) == []
    assert all(m.training and "train" not in m.__dict__ for m in model.modules())


def test_a_tied_weight_is_reported_under_all_its_names():
    model = nn.ModuleDict(
        {
            "embeddings": nn.Embedding(4, 4),
            "body": nn.Linear(4, 4),
            "head": nn.Linear(4, 4, bias=False),
        }
    )
    model.head.weight = model.embeddings.weight
    names = ["embeddings.weight", "head.weight"]
    for layers in ("head", model.head.weight, lambda name, parameter: name == "head.weight"):
        with frozen(model, layers) as found:
            assert found == names == frozen_parameters(model)
    assert freeze(model, "embeddings") == names == frozen_parameters(model)
    assert trainable_parameters(model) == list(model.body.parameters())
    assert unfreeze(model, "head") == names
    assert trainable_parameters(model) == list(model.parameters())
    assert len(trainable_parameters(model)) == 3


def test_freeze_and_unfreeze_inside_a_block_hold_from_its_end_on():
    model = mixed_model()
    with frozen(model, "[:2]"):
        freeze(model, "[1]")
        unfreeze(model, "[0]")
        model.train()
        assert frozen_parameters(model)[:4] == ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert not model[1].training
    assert frozen_parameters(model) == ["1.weight", "1.bias", "5.bias"]
    assert model[1].bias.grad is None
    assert not model.train()[1].training


def test_integer_parameters_are_never_made_trainable():
    model = nn.Sequential(nn.Linear(2, 2), nn.Module())
    model[1].codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert freeze(model) == ["0.weight", "0.bias", "1.codes"] == frozen_parameters(model)
    with frozen(model) as names:
        assert names == ["0.weight", "0.bias", "1.codes"]
    assert unfreeze(model) == ["0.weight", "0.bias"]
    assert frozen_parameters(model) == ["1.codes"]


def test_lazy_modules_are_frozen_before_they_are_initialised():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 1))
    freeze(model, "[:2]")
    model(torch.randn(8, 3))
    before = bits(model)
    model.train()(torch.randn(8, 3)).sum().backward()
    assert moved(model, before) == []
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "2.weight",
        "2.bias",
    ]
    assert unfreeze(nn.LazyLinear(2)) == ["weight", "bias"]


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, by_pickle])
def test_a_copy_of_a_frozen_model_is_frozen_and_lives_its_own_life(make_copy):
    model = make_model()
    freeze(model, "[:3]")
    copied = make_copy(model)
    assert frozen_parameters(copied) == frozen_parameters(model)
    assert not copied.train()[1].training
    unfreeze(copied)
    assert frozen_parameters(copied) == []
    assert all(m.training and "train" not in m.__dict__ for m in copied.modules())
    assert len(frozen_parameters(model)) == 5
    assert not model.train()[1].training


@pytest.mark.parametrize("make_copy", [copy.deepcopy, by_pickle])
def test_a_copy_made_inside_a_block_can_be_unfrozen(make_copy):
    model = make_model()
    with frozen(model, eval_mode=True):
        copied = make_copy(model)
    unfreeze(copied)
    assert frozen_parameters(copied) == []
    assert all(m.training for m in copied.train().modules())


def test_frozen_models_can_be_traced():
    model = make_model()[:2]
    freeze(model)
    x = torch.randn(8, 4)
    assert torch.equal(torch.fx.symbolic_trace(model).train()(x), model.train()(x))


def test_only_modules_are_taken():
    for function in (frozen, freeze, unfreeze, frozen_parameters, trainable_parameters):
        with pytest.raises(
            TypeError,
            match=f"{function.__name__} takes a torch.nn.Module, got an object of type list",
        ):
            function([nn.Linear(1, 1)])


def test_an_inner_block_freezes_what_was_thawed_inside_the_outer_one():
    layer = nn.Linear(2, 2)
    with frozen(layer):
        layer.weight.requires_grad = True
        with frozen(layer, "weight"):
            assert not layer.weight.requires_grad
    assert layer.weight.requires_grad and layer.bias.requires_grad


def test_an_end_gives_back_all_that_still_fits():
    """Resized, quantised or exchanged inside: what was found does not fit it any more, and all the others get theirs."""
    changes = [
        lambda m: setattr(m[0].weight, "data", torch.zeros(9, 4)),
        lambda m: setattr(m[0].weight, "data", torch.zeros(4, 4, dtype=torch.int8)),
        lambda m: torch.utils.swap_tensors(
            m[0].weight, nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        ),
    ]
    for change in changes:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        model(torch.randn(3, 4)).sum().backward()
        gradients = [p.grad for p in model.parameters()]
        with frozen(model):
            change(model)
        assert all(p.requires_grad for p in model.parameters() if p.is_floating_point())
        assert all(
            p.grad is gradient
            for p, gradient in list(zip(model.parameters(), gradients, strict=True))[1:]
        )
        assert model[1].training and not any(
            hasattr(p, "_trainkit_hold") for p in model.parameters()
        )


@pytest.mark.parametrize("held_twice", [False, True])
def test_parameters_put_in_place_inside_have_the_flags_that_were_found(held_twice):
    """load_state_dict(assign=True) takes the flag of the frozen one."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[1].bias.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with frozen(model, "[0]") if held_twice else contextlib.nullcontext(), frozen(model):
        model.load_state_dict(state, assign=True)
    assert frozen_parameters(model) == ["1.bias"]


def test_train_of_ones_own_may_take_more():
    class Model(nn.BatchNorm1d):
        def train(self, mode=True, freeze_statistics=False):
            return super().train(mode and not freeze_statistics)

    model = Model(4)
    with frozen(model):
        model.train(True, freeze_statistics=True)
        assert not model.training
    assert not model.training
    with frozen(model):
        model.train()
    assert model.training


def test_parameters_saved_inside_can_be_loaded(tmp_path):
    model = nn.Linear(2, 1)
    with frozen(model):
        torch.save(model.state_dict(keep_vars=True), tmp_path / "state.pt")
    copy_of_it = nn.Linear(2, 1)
    copy_of_it.load_state_dict(torch.load(tmp_path / "state.pt"), assign=True)
    with frozen(copy_of_it):
        assert not copy_of_it.weight.requires_grad
    assert torch.equal(copy_of_it.weight, model.weight) and copy_of_it.weight.requires_grad


def test_a_buffer_that_appears_later_is_held():
    class Codebook(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", None)

        def forward(self, x):
            if self.training:
                self.codes = x.mean(0) if self.codes is None else 0.9 * self.codes + 0.1 * x.mean(0)
            return x - self.codes

    model = Codebook()
    block = frozen(model)
    model(torch.randn(3, 4))
    codes = model.codes
    with block:
        model(torch.randn(3, 4))
    assert model.codes is codes


def test_freezing_for_good_inside_a_block_holds_at_once():
    model = nn.Linear(2, 1)
    with frozen(model):
        model.requires_grad_(True)
        freeze(model)
        assert not model.weight.requires_grad
    assert not model.weight.requires_grad


def test_a_training_mode_that_does_not_exist_does_not_thaw_a_frozen_module():
    norm = nn.BatchNorm1d(3)
    with frozen(norm):
        with pytest.raises(ValueError, match="boolean"):
            norm.train("yes")
        assert not norm.training
        norm(torch.ones(2, 3))
    assert norm.training and norm.num_batches_tracked == 0
