"""microbatch("auto"): a chunk that runs out of memory is tried again as two, and leaves nothing."""

import functools
import gc
import itertools
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from oracles import OPTIMIZERS, distance, loss_of, make_batches, make_model, plain_loop
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainkit import accumulate, amp, frozen, microbatch, train_step
from trainkit.chunks.microbatching import is_out_of_memory

pytestmark = pytest.mark.filterwarnings("ignore:memory ran out")


@pytest.fixture(autouse=True)
def quick_collect(monkeypatch):
    """``gc.collect`` takes long among everything that tests have made."""
    monkeypatch.setattr(gc, "collect", int)


class Memory:
    """Runs out at one place of a model, after ``skip`` visits, with more rows than fit."""

    def __init__(self, model, place, layer, fit, skip=0):
        self.fit, self.skip, self.rows, module = fit, skip, 0, model[layer]
        model.register_forward_pre_hook(lambda module, given: setattr(self, "rows", len(given[0])))
        if place == "forward":
            module.register_forward_pre_hook(self.visit)
        elif place == "activation":  # in backward
            module.register_forward_hook(self.watch)
        else:  # between the gradient of one parameter and the next
            getattr(module, place).register_hook(self.visit)

    def watch(self, module, given, output):
        if output.requires_grad:
            output.register_hook(self.visit)

    def visit(self, *_):
        self.skip -= 1
        if self.rows > self.fit and self.skip < 0:
            raise torch.OutOfMemoryError("of a test")


def returned(step, model, x, y):
    return F.mse_loss(model(x), y)


def weighted(step, model, x, y):
    tokens = 1 + 8 * (x[:, 0] > 0)  # in a row
    return ((model(x) - y).pow(2).mean(1) * tokens).sum() / tokens.sum(), tokens.sum()


def explicit(step, model, x, y):
    """Memory also runs out in, and after, a backward that the function calls."""
    step().backward(F.mse_loss(model(x), y))
    return 0.1 * model(x).pow(2).mean()


def reentrant(step, model, x, y):
    """A layer used twice gets its gradient in two parts, from two nested backwards."""
    hidden = 0 * model(x).sum() + model[:2](x)
    for _ in range(2):
        hidden = checkpoint(nn.Sequential(model[0], model[1]), hidden[:, :4], use_reentrant=True)
    return F.mse_loss(model[2](hidden), y)


PLACES = list(itertools.product(("forward", "activation", "weight", "bias"), (0, 2)))


@pytest.mark.parametrize(
    ("function", "kind", "parts"),
    [
        (returned, "SGD momentum fused", (accumulate(2),)),
        (weighted, "AdamW", (accumulate(2),)),
        (explicit, "AdamW", (accumulate(2),)),
        (reentrant, "SGD", ()),
    ],
)
@pytest.mark.parametrize(("place", "layer"), PLACES)
def test_memory_runs_out_anywhere_and_the_gradient_is_of_the_batch(
    place, layer, function, kind, parts
):
    def run(part, fails):
        model = make_model()
        memory = Memory(model, place, layer, *fails)
        optimizer = OPTIMIZERS[kind](model.parameters())
        step = train_step(optimizer, *parts, part, max_norm=0.5)
        step = step(functools.partial(function, lambda: step, model))
        results = [step(*batch) for batch in step.over(make_batches([8, 7, 8, 3, 8]))]
        losses = [x for result in results for x in (result.loss, result.window_loss)]
        return [*model.parameters(), *losses], step, memory

    expected, _, _ = run(accumulate(1), (9,))
    for fit, skip in ((1, 0), (3, 1), (5, 2), (3, 4), (5, 7)):
        found, step, memory = run(microbatch("auto"), (fit, skip))
        assert distance(found, expected) <= 1e-12, (fit, skip)
        if memory.skip < 0 and step.chunk_sizes:
            assert fit / 2 < step.chunk_sizes[7] <= fit
        assert step.chunk_sizes or skip > 0


def test_a_failed_chunk_leaves_no_bit_of_itself():
    """The same as if the sizes had been known. A sparse gradient, and float16 with a loss scale."""
    for dtype in (torch.float32, torch.float16):
        results = []
        for is_known in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Embedding(5, 4, sparse=dtype == torch.float32), nn.Linear(4, 3)
            )
            Memory(model, "weight", 1, 3)
            parts = accumulate(2), amp(dtype=dtype), microbatch("auto")
            step = train_step(torch.optim.SGD(model.parameters(), lr=0.1), *parts)
            step = step(lambda x, model=model: model(x).pow(2).mean())
            if is_known:
                step.chunk_sizes[6] = 2
            for batch in torch.randint(5, (4, 8, 6)):
                step(batch)
            assert step.updates == 2 and step.chunk_sizes == {6: 2}
            results.append(list(model.parameters()))
        assert all(map(torch.equal, *results))


def test_memory_runs_out_around_frozen_layers_and_sums_in_float32():
    results = []
    wide = {"dtype": torch.float32} if hasattr(torch.Tensor, "grad_dtype") else {}
    for fit in (3, 9):
        model = make_model(torch.bfloat16)
        Memory(model, "bias", 2, fit, skip=1)
        parts = accumulate(2, **wide), frozen(model, "[0]"), microbatch("auto")
        step = train_step(torch.optim.SGD(model.parameters(), lr=0.1), *parts)
        step = step(functools.partial(loss_of, model))
        for batch in make_batches([8, 8, 8, 8], torch.bfloat16):
            step(batch)
        assert step.updates == 2 and all(p.requires_grad for p in model.parameters())
        assert all(p.grad is None for p in model.parameters())
        results.append(list(model.parameters()))
    assert distance(*results) <= 1e-2


@pytest.mark.parametrize("place", ["forward", "backward", "after"])
def test_a_row_that_does_not_fit_is_an_error_with_advice_and_the_window_stays(place):
    model, theirs, first = make_model(), make_model(), make_batches([4, 4])[0]
    memory = Memory(model, "forward" if place == "forward" else "weight", 0, 9)

    @train_step(torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2), microbatch("auto"))
    def step(batch):
        if place == "after":
            step.backward(0 * loss_of(model, batch))
        return loss_of(model, batch)

    step(first)
    memory.fit = 0
    with pytest.raises(torch.OutOfMemoryError, match=r"of a test\nA single row does not fit.*`"):
        step(first)
    memory.fit = 9
    assert step(first).updated
    plain_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), [first, first], 2)
    assert distance(list(model.parameters()), list(theirs.parameters())) <= 1e-12


@pytest.mark.parametrize("at", [1, 2])
def test_another_error_in_a_smaller_chunk_is_like_any_error_of_a_chunk(at):
    """In the first chunk only the batch is lost, in a later one the window."""
    model, theirs, broken = make_model(), make_model(), []
    memory = Memory(model, "weight", 0, 4)

    @train_step(torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2), microbatch("auto"))
    def step(batch):
        if broken and len(batch[0]) < 8 and broken.pop() == 1:
            raise KeyError("of the user")
        return loss_of(model, batch)

    batches = make_batches([4, 8, 8, 8])
    step(batches[0])
    broken += range(at, 0, -1)[::-1]
    with pytest.raises(KeyError, match="of the user"):
        step(batches[1])
    broken.clear()
    memory.fit = 8
    step.chunk_sizes.clear()
    used = [batches[0], batches[2]] if at == 1 else batches[2:]
    assert [step(batch).complete for batch in batches[2:]][at - 1]
    step.discard()
    plain_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), used, 2)
    assert distance(list(model.parameters()), list(theirs.parameters())) <= 1e-12


def test_a_function_that_catches_the_error_itself_drops_the_open_window():
    model, theirs = make_model(), make_model()
    memory = Memory(model, "weight", 0, 4)

    @train_step(torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2), microbatch("auto"))
    def step(batch):
        if len(batch[0]) > memory.fit:
            with pytest.raises(torch.OutOfMemoryError):
                step.backward(loss_of(model, batch))
            memory.fit = 8
        return loss_of(model, batch)

    batches = make_batches([4, 8, 4])
    assert [step(batch).complete for batch in batches] == [False, False, True]
    assert step.chunk_sizes == {}
    plain_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), batches[1:], 2)
    assert distance(list(model.parameters()), list(theirs.parameters())) <= 1e-12


def test_an_update_and_what_runs_after_it_are_not_tried_again():
    def fails(*_):
        raise torch.OutOfMemoryError("in an update")

    model, (batch,) = make_model(), make_batches([4])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    late = train_step(optimizer, microbatch("auto"), after=fails)(functools.partial(loss_of, model))
    optimizer.register_step_pre_hook(fails)
    step = train_step(optimizer, microbatch("auto"))(functools.partial(loss_of, model))
    for failing in (late, step):
        with pytest.raises(torch.OutOfMemoryError, match="in an update"):
            failing(batch)
        assert failing.chunk_sizes == {} and all(p.grad is None for p in model.parameters())


def test_sizes_are_remembered_by_the_numbers_in_a_row_and_said_once():
    model, seen = nn.Linear(1, 1), []

    @train_step(torch.optim.SGD(model.parameters(), lr=0.1), microbatch("auto"))
    def step(x):
        seen.append(tuple(x.shape))
        if x.numel() > 40:
            raise torch.OutOfMemoryError("of a test")
        return model(x.unsqueeze(-1)).mean()

    def run(*shape):
        seen.clear()
        step(torch.ones(shape))
        return seen.copy()

    with pytest.warns(UserWarning, match=r"ran out with 8 rows of 10 numbers.*with 4.*chunk_sizes"):
        assert run(8, 10) == [(8, 10), (4, 10), (4, 10)]
    assert step.chunk_sizes == {10: 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(8, 10) == [(4, 10), (4, 10)]
        assert run(8, 5) == [(8, 5)]  # shorter rows, which may fit
        assert run(8, 20) == [(4, 20)] + [(2, 20)] * 4  # longer rows: at most as many
    assert step.chunk_sizes == {10: 4, 20: 2}
    step.chunk_sizes.clear()
    assert run(2, 20) == [(2, 20)] and step.chunk_sizes == {}


@pytest.mark.parametrize("is_generator", [False, True])
def test_activations_are_gone_before_a_chunk_is_tried_again(is_generator):
    model, activations, alive = make_model(), [], []

    def forward(batch):
        alive.append([reference() is not None for reference in activations])
        hidden = model[0](batch[0])
        activations.append(weakref.ref(hidden))
        if len(batch[0]) > 2:
            try:
                raise torch.OutOfMemoryError("of a test")
            except torch.OutOfMemoryError as error:
                kept = error  # so that this frame and the error hold each other
                kept.__context__ = KeyError()
                kept.__context__.__context__ = kept
                raise RuntimeError("CUDA out of memory") from kept
        return F.mse_loss(model[1:](hidden), batch[1])

    def with_yield(batch):
        yield forward(batch)

    gc.disable()
    try:
        step = train_step(torch.optim.SGD(model.parameters(), lr=0.1), microbatch("auto"))
        step(with_yield if is_generator else forward)(make_batches([8])[0])
    finally:
        gc.enable()
    assert len(alive) == 6 and not any(map(any, alive))


def test_gradients_are_held_by_nothing_after_the_update():
    model, held = make_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hold = lambda *_: held.extend(weakref.ref(p.grad) for p in model.parameters())  # noqa: E731
    optimizer.register_step_pre_hook(hold)
    step = train_step(optimizer, accumulate(2), microbatch("auto"))
    step = step(functools.partial(loss_of, model))
    step.chunk_sizes[7] = 2
    results = [step(batch) for batch in make_batches([4, 4])]
    assert results[-1].updated and len(held) == 4
    assert not any(reference() is not None for reference in held)


def test_errors_of_all_allocators_are_known():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"))
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**50)
    assert is_out_of_memory(found.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(KeyError("out of memory"))


REAL = """
import resource, torch
from trainkit import microbatch, train_step
torch.set_num_threads(1)

def limit_memory(free):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + free, resource.RLIM_INFINITY))

linear, gelu = torch.nn.Linear, torch.nn.GELU()
model = torch.nn.Sequential(linear(64, 512), gelu, gelu, linear(512, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
step = train_step(optimizer, microbatch("auto"))(lambda x: model(x).pow(2).mean())
step(torch.ones(8, 64))
limit_memory(2**26)
assert step(torch.ones(2**15, 64)).updated  # 64 MiB for the output of each of three layers
((size, rows),) = step.chunk_sizes.items()
assert size == 64 and 2**8 <= rows <= 2**14, step.chunk_sizes

limit_memory(2**30)
weight = torch.nn.Parameter(torch.ones(2**23))  # 32 MiB
optimizer = torch.optim.SGD([weight], lr=0.1, foreach=False)
step = train_step(optimizer, microbatch("auto"))(lambda x: (weight * x.mean()).sum())
step.chunk_sizes[1] = 1
limit_memory(5 * 2**24)
assert step(torch.ones(4, 1)).updated  # with its gradient twice
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its size from Linux")
def test_memory_of_a_cpu_that_really_runs_out():
    """Also: at most the gradients are there twice."""
    command = [sys.executable, "-W", "ignore", "-c", REAL]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
