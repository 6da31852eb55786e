"""A step around a compiled model adds no graph; each set of frozen layers adds one.

The backend is aot_eager: it needs no C++ compiler, and bakes into a graph which parameters are
trained. The oracles are uncompiled loops by hand.
"""

import contextlib

import pytest
import torch
from oracles import make_batches, plain_loop, same_bits, scaler_loop, state_of
from oracles import make_model as make_mlp
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import batch_norm, mse_loss

from trainkit import accumulate, amp, freeze, frozen, train_step, unfreeze


class Compiler:
    """torch.compile that counts graphs and their runs, and refuses graph breaks."""

    def __init__(self):
        self.graphs = self.runs = 0

    def backend(self, graph, inputs):
        self.graphs += 1
        run = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        def counted(*args):
            self.runs += 1
            return run(*args)

        return counted

    def __call__(self, thing, **options):
        return torch.compile(thing, backend=self.backend, **{"fullgraph": True, **options})


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    counters.clear()
    yield Compiler()
    assert not counters["graph_break"]
    torch._dynamo.reset()


def no_more_graphs(condition):
    return torch._dynamo.config.patch(error_on_recompile=condition)


class Model(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(4, 6, bias=False), norm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.stem(x)).tanh())


def make(dtype=torch.float64, norm=nn.BatchNorm1d):
    torch.manual_seed(1)
    model = Model(norm).to(dtype)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(state_of(*ours), state_of(*theirs), rtol=tolerance, atol=tolerance)
    return True


def loss_with(model):
    return lambda x, y: mse_loss(model(x), y)


def in_place(model, compiler):
    model.compile(backend=compiler.backend, fullgraph=True)
    return model


COMPILED = {
    "the model": lambda model, compiler: loss_with(compiler(model)),
    "the model in place": lambda model, compiler: loss_with(in_place(model, compiler)),
    "the step function": lambda model, compiler: compiler(loss_with(model)),
}


def returning(step, optimizer, loss):
    return step(loss)


def yielding(step, optimizer, loss):
    def function(x, y):
        yield loss(x, y)
        optimizer.step()
        optimizer.zero_grad()

    return step(function)


def by_hand(step, optimizer, loss):
    def call(x, y):
        with step:
            step.backward(loss(x, y))

    call.over = step.over
    return call


def in_two_losses(step, optimizer, loss):
    def function(x, y):
        step_now.backward(0.75 * loss(x, y))
        return 0.25 * loss(x, y)

    return (step_now := step(function))


FACES = [returning, yielding, by_hand, in_two_losses]


@pytest.mark.parametrize(
    ("face", "what"),
    [
        *((face, "the model") for face in FACES),
        (returning, "the model in place"),
        (in_two_losses, "the step function"),
    ],
)
def test_accumulation_takes_one_graph(compiler, face, what):
    """Ten full windows and a short one, clipped. Evaluations inside the windows share one more."""
    (model, optimizer), theirs, batches = (
        make(norm=nn.LayerNorm),
        make(norm=nn.LayerNorm),
        make_batches([4] * 31),
    )
    loss = COMPILED[what](model, compiler)
    step = face(train_step(optimizer, accumulate(3), max_norm=0.1), optimizer, loss)
    for i, batch in enumerate(step.over(batches)):
        with no_more_graphs(i > 1):
            step(*batch)
            if i % 3 == 1:
                model.eval()
                with torch.no_grad():
                    loss(*batch)
                model.train()
    plain_loop(*theirs, batches, 3, max_norm=0.1)
    assert close((model, optimizer), theirs)
    assert (compiler.graphs, compiler.runs) == (2, 10 + 31 * (1 + (face is in_two_losses)))


@pytest.mark.parametrize(
    "weight_of", [len, lambda y: y.isfinite().all(1).sum()], ids=["int", "tensor"]
)
@pytest.mark.parametrize("what", ["the model", "the step function"])
def test_weights_of_ragged_batches_take_one_graph(compiler, weight_of, what):
    ours, theirs, sizes = make_mlp(), make_mlp(), [5, 2, 3, 6, 2, 7, 5, 3, 8, 2, 9]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    model = compiler(ours, dynamic=True) if what == "the model" else ours

    def loss(x, y):
        return mse_loss(model(x), y), weight_of(y)

    step = train_step(optimizers[0], accumulate(3))(
        compiler(loss, dynamic=True) if what == "the step function" else loss
    )
    for batch in step.over(make_batches(sizes)):
        step(*batch)
    plain_loop(theirs, optimizers[1], make_batches(sizes), 3, sizes)
    assert close((ours, optimizers[0]), (theirs, optimizers[1]))
    assert (compiler.graphs, compiler.runs) == (1, 11)


@pytest.mark.parametrize(
    ("face", "dtype"), [(returning, torch.bfloat16), *((face, torch.float16) for face in FACES)]
)
def test_mixed_precision_takes_one_graph(compiler, face, dtype):
    """The first updates in float16 overflow and are skipped."""
    batches, dtypes = make_batches([4] * 30, torch.float32), set()

    def run(compile_it):
        model, optimizer = make(torch.float32, nn.LayerNorm)
        called = compile_it(model)

        def loss(x, y):
            output = called(x)
            dtypes.add(output.dtype)
            return mse_loss(output, y)

        step = face(
            train_step(
                optimizer, accumulate(3), amp(dtype=dtype, init_scale=2.0**20), max_norm=0.5
            ),
            optimizer,
            loss,
        )
        for i, batch in enumerate(step.over(batches)):
            with no_more_graphs(i > 0):
                step(*batch)
        return model, optimizer

    ours, theirs = run(compiler), make(torch.float32, nn.LayerNorm)
    scales = scaler_loop(*theirs, batches, 3, dtype, 0.5, 2.0**20, 2000)
    assert dtype == torch.bfloat16 or scales[0] == 2.0**19
    assert same_bits(state_of(*ours), state_of(*run(lambda model: model))) and close(
        ours, theirs, 0.01
    )
    assert dtypes == {dtype} and compiler.graphs == 1


LAYERS = ["stem", "norm"]
NAMES = ["stem.weight", "norm.weight", "norm.bias"]


@contextlib.contextmanager
def for_good(model, layers):
    freeze(model, layers)
    yield
    unfreeze(model, layers)


@contextlib.contextmanager
def frozen_by_hand(model, names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad, parameter.grad = name not in names, None
    model.norm.train("norm.bias" not in names)
    yield
    model.requires_grad_(True).train()


def within(block, step):
    def call(*batch):
        with block():
            step(*batch)

    return call


FORMS = {
    "a block": lambda model, step, loss: within(lambda: frozen(model, LAYERS), step(loss)),
    "for good": lambda model, step, loss: within(lambda: for_good(model, LAYERS), step(loss)),
    "a part": lambda model, step, loss: frozen(model, LAYERS)(step)(loss),
    "a function": lambda model, step, loss: step(frozen(model, LAYERS)(loss)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", ["the model", "the compiled model"])
def test_freezing_takes_one_graph_however_often(compiler, form, given):
    """Twenty times in and out; the model has a batch norm and was compiled before."""
    (model, optimizer), theirs = make(), make()
    called = compiler(model)
    step = train_step(optimizer, max_norm=0.1)
    steps = (
        step(loss_with(called)),
        FORMS[form](model if given == "the model" else called, step, loss_with(called)),
    )
    for i, batch in enumerate(make_batches([4] * 40)):
        is_frozen, before = (
            i % 2,
            {name: tensor.clone() for name, tensor in model.state_dict().items()},
        )
        with no_more_graphs(i > 1):
            steps[is_frozen](*batch)
        with frozen_by_hand(theirs[0], NAMES if is_frozen else []):
            plain_loop(*theirs, [batch], max_norm=0.1)
        moved = [
            name
            for name, tensor in model.state_dict().items()
            if not torch.equal(tensor, before[name])
        ]
        assert moved == (["head.weight", "head.bias"] if is_frozen else [*before])
    assert close((model, optimizer), theirs)
    assert (compiler.graphs, compiler.runs) == (2, 40)


@pytest.mark.parametrize("block", [frozen, for_good])
@pytest.mark.parametrize("layers", ["**", "**.running_mean"])
def test_a_batch_norm_compiled_before_normalises_with_its_running_statistics(
    compiler, block, layers
):
    """A hook would do nothing: it is added to a model that is compiled already."""
    norm, x = make()[0].norm, torch.randn(8, 6, dtype=torch.float64)
    called = compiler(nn.Sequential(norm))
    in_training, buffers = called(x), [buffer.clone() for buffer in norm.buffers()]
    with block(norm, layers):
        for _ in range(2):
            assert torch.equal(called(x), batch_norm(x, *buffers[:2], norm.weight, norm.bias))
            called.train()
        assert same_bits([*norm.buffers()], buffers)
    assert torch.equal(called(x), in_training)
    assert not torch.equal(norm.running_mean, buffers[0])
    assert (compiler.graphs, compiler.runs) == (2, 4)


def test_a_discriminator_takes_two_graphs(compiler):
    """It is frozen in the step of the generator, inside its own open window."""

    def run(compile_it):
        (D, optimizer_d), (G, optimizer_g) = make(), make(norm=nn.LayerNorm)
        called = compile_it(D)

        def generated(x):
            return nn.functional.pad(G(x), (0, 1))

        step_d = train_step(optimizer_d, accumulate(2))(
            lambda x, y: (called(generated(x).detach()) - called(x)).mean()
        )
        step_g = train_step(optimizer_g, accumulate(2), frozen(D))(
            lambda x, y: called(generated(x)).square().mean()
        )
        for i, batch in enumerate(step_d.over(make_batches([4] * 21), step_g)):
            with no_more_graphs(i > 0):
                step_d(*batch)
                step_g(*batch)
        return state_of(D, optimizer_d) + state_of(G, optimizer_g)

    assert same_bits(run(compiler), run(lambda model: model))
    assert compiler.graphs == 2


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="2.6 counts graphs of a frame otherwise")
def test_masks_beyond_the_limit_run_uncompiled_and_right(compiler):
    """Masks that came first keep their graphs. With fullgraph=True torch raises."""
    (model, optimizer), theirs, ran = make(), make(), []
    with torch._dynamo.config.patch(recompile_limit=3):
        step = train_step(optimizer, accumulate(2))(loss_with(compiler(model, fullgraph=False)))
        for names in (NAMES[:count] for count in [0, 1, 2, 3, 0, 1, 2, 3]):
            window, before = make_batches([4, 4], seed=len(ran)), compiler.runs
            with frozen(model, names), frozen_by_hand(theirs[0], names):
                for batch in window:
                    step(*batch)
                plain_loop(*theirs, window, 2)
            ran.append(compiler.runs - before)
        assert close((model, optimizer), theirs)
        assert ran == [2, 2, 2, 0] * 2
        torch._dynamo.reset()
        called = compiler(model)
        with pytest.raises(Exception, match="fullgraph"):
            for count in range(4):
                with frozen(model, NAMES[:count]):
                    called(batch[0])


def test_contexts_may_be_entered_inside_of_a_compiled_function(compiler):
    """They run between its graphs: a graph has no modes and no flags."""
    model, _ = make(torch.float32, nn.LayerNorm)
    x = torch.ones(2, 4)

    def evaluate(x):
        with amp(dtype=torch.bfloat16), frozen(model, "stem"):
            return model(x), model.stem.weight.requires_grad

    def decorated(x):
        return model(x), model.stem.weight.requires_grad

    for function in (evaluate, frozen(model, "stem")(decorated)):
        output, requires_grad = compiler(function, fullgraph=False)(x)
        assert not requires_grad and model.stem.weight.requires_grad
        assert torch.equal(output, function(x)[0])
        assert not torch.is_autocast_enabled("cpu")
    counters.clear()
