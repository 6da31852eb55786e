"""microbatch: a batch in chunks is the batch, also where memory runs out in the middle of it."""

import functools
import gc
import io
import itertools
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import OPTIMIZERS, distance, loss_of, make_batches, make_model, plain_loop
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainkit import accumulate, amp, frozen, microbatch, train_step
from trainkit.chunks.microbatching import is_out_of_memory


def trained(batches, *parts, kind="AdamW", weighted=False, dtype=torch.float64, **options):
    """The parameters after training on these batches, the last of which closes a window, and the results."""
    model = make_model(dtype)

    @train_step(OPTIMIZERS[kind](model.parameters()), *parts, **options)
    def step(x, y):
        loss = F.mse_loss(model(x), y)
        return (loss, x.new_tensor(len(x), dtype=torch.int64)) if weighted else loss

    results = [step(*batch) for batch in step.over(batches)]
    return list(model.parameters()), results, step


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    chunk=st.integers(1, 10) | st.just("auto"),
    n=st.integers(1, 3),
    weighted=st.booleans(),
    kind=st.sampled_from(["AdamW", "SGD momentum"]),
    max_norm=st.none() | st.just(0.1),
)
def test_law_5_chunks_of_a_batch_are_the_batch(sizes, chunk, n, weighted, kind, max_norm):
    batches = make_batches(sizes)
    parts = (accumulate(n), microbatch(chunk))
    found, results, _ = trained(batches, *parts, kind=kind, weighted=weighted, max_norm=max_norm)
    expected, whole, _ = trained(
        batches, accumulate(n), kind=kind, weighted=weighted, max_norm=max_norm
    )
    assert distance(found, expected) <= 1e-12
    for result, other in zip(results, whole, strict=True):
        assert (result.complete, result.updated) == (other.complete, other.updated)
        assert torch.allclose(result.loss, other.loss, rtol=1e-12, atol=0)
        assert torch.allclose(result.window_loss, other.window_loss, rtol=1e-12, atol=0)
        assert result.grad_norm is None or torch.allclose(
            result.grad_norm, other.grad_norm, rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["AdamW fused", "SGD"])
def test_chunks_with_amp_and_a_fused_optimizer(kind, dtype):
    batches = make_batches([8, 8, 5, 8], torch.float32)
    parts = (accumulate(2), amp(dtype=dtype))
    found, results, _ = trained(
        batches, *parts, microbatch(3), kind=kind, dtype=torch.float32, max_norm=0.1
    )
    expected, _, _ = trained(batches, *parts, kind=kind, dtype=torch.float32, max_norm=0.1)
    assert results[-1].updated
    assert distance(found, expected) <= (1e-6 if dtype == torch.float32 else 1e-3)


def test_tokens_count_the_same_in_whatever_chunk_they_are():
    model, theirs = make_model(), make_model()
    batches = make_batches([6, 5, 4])
    masks = [
        torch.rand(len(x), 1, generator=torch.Generator().manual_seed(i)) < 0.6
        for i, (x, _) in enumerate(batches)
    ]

    def function(model, x, y, mask):
        return ((model(x) - y).pow(2).mean(1, keepdim=True) * mask).sum() / mask.sum().clamp(
            min=1
        ), mask.sum()

    losses = []
    for net, *parts in ((model, microbatch(2)), (theirs,)):
        step = train_step(torch.optim.SGD(net.parameters(), lr=0.1), accumulate(2), *parts)(
            functools.partial(function, net)
        )
        for batch, mask in step.over(list(zip(batches, masks, strict=True))):
            losses.append(step(*batch, mask=mask).loss)
    assert torch.allclose(torch.stack(losses[:3]), torch.stack(losses[3:]), rtol=1e-12, atol=0)
    assert distance(list(model.parameters()), list(theirs.parameters())) <= 1e-12


def test_the_update_code_of_a_generator_runs_once():
    model, theirs = make_model(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ran = []

    @microbatch(3)
    @accumulate(2, model)
    def step(batch):
        ran.append(len(batch[0]))
        yield loss_of(model, batch)
        ran.append("update")
        optimizer.step()
        optimizer.zero_grad()

    batches = make_batches([7, 4])
    for batch in batches:
        step(batch)
    assert ran == [3, 3, 1, 3, 1, "update"]
    plain_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), batches, 2)
    assert distance(list(model.parameters()), list(theirs.parameters())) <= 1e-12


def test_what_does_not_fit_is_refused():
    for size in (True, 2.0, None, torch.tensor(3)):
        with pytest.raises(
            TypeError, match=r"rows of a chunk, an int, or is 'auto'; got .*: `microbatch\(8\)`"
        ):
            microbatch(size)
    with pytest.raises(TypeError, match="got 'automatic'"):
        microbatch("automatic")
    with pytest.raises(ValueError, match="at least one row, got 0"):
        microbatch(0)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="microbatch was given twice, 2 and 'auto'"):
        train_step(optimizer, microbatch(2), microbatch("auto"))
    step = train_step(optimizer, microbatch(2))(lambda x, y: F.mse_loss(model(x), y))
    with pytest.raises(ValueError, match=r"these differ in it: \[\(3, 4\), \(2, 3\)\]"):
        step(torch.ones(3, 4), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"no tensor to cut in \['int', 'list'\]"):
        step(1, [2])
    with (
        pytest.raises(ValueError, match="cuts the arguments of a step function"),
        train_step(optimizer, microbatch(2)),
    ):
        pass
    assert step.updates == 0


def test_an_error_in_a_later_chunk_drops_the_window_and_in_the_first_only_the_batch():
    for at in (0, 1):
        model, theirs = make_model(), make_model()
        calls = []

        @train_step(torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2), microbatch(2))
        def step(batch, fails=False, model=model, calls=calls, at=at):
            calls.append(fails)
            if fails and calls.count(True) == at + 1:
                raise KeyError("of the user")
            return loss_of(model, batch)

        first, second, third, fourth = make_batches([4, 4, 4, 4])
        step(first)
        with pytest.raises(KeyError, match="of the user"):
            step(second, fails=True)
        assert step(third).complete is (at == 0)
        if at:
            assert step(fourth).complete
        plain_loop(
            theirs,
            torch.optim.SGD(theirs.parameters(), lr=0.1),
            [third, fourth] if at else [first, third],
            2,
        )
        assert distance(list(model.parameters()), list(theirs.parameters())) <= 1e-12


def test_a_window_is_saved_between_two_batches():
    results = []
    for interrupted in (False, True):
        model = make_model()

        def new(model=model):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            return train_step(optimizer, accumulate(3), microbatch(2))(
                functools.partial(loss_of, model)
            )

        step = new()
        for i, batch in enumerate(make_batches([5, 6, 7, 4, 3, 2])):
            step(batch)
            if interrupted and i == 0:
                state, step = step.state_dict(), new()
                step.load_state_dict(state)
        assert step.updates == 2
        results.append(list(model.parameters()))
    assert distance(*results) == 0


# Memory that runs out.


class Runs:
    """Runs out of memory at one place: forward or backward, at a layer, with more rows than fit."""

    def __init__(self, model, place, layer, fit, skip):
        self.fit, self.skip, self.alive = fit, skip, []
        module = model[layer]
        if place == "forward":
            module.register_forward_pre_hook(lambda module, inputs: self.out(len(inputs[0])))
        elif place == "activation":
            module.register_forward_hook(
                lambda module, inputs, output: (
                    output.register_hook(lambda g: self.out(len(g))) and None
                )
            )
        else:  # between the gradient of one parameter and the next
            module.register_forward_hook(
                lambda module, inputs, output: setattr(self, "rows", len(output))
            )
            getattr(module, place).register_hook(lambda gradient: self.out(self.rows))

    def out(self, rows):
        self.skip -= 1
        if rows > self.fit and self.skip < 0:
            raise torch.OutOfMemoryError("of a test")


PLACES = [
    (place, layer) for layer in (0, 2) for place in ("forward", "activation", "weight", "bias")
]


@pytest.mark.filterwarnings("ignore:memory ran out")
@pytest.mark.parametrize("kind", ["AdamW", "SGD momentum fused"])
@pytest.mark.parametrize(("place", "layer"), PLACES)
def test_memory_runs_out_anywhere_and_the_gradient_is_that_of_the_batch(
    place, layer, kind, monkeypatch
):
    monkeypatch.setattr(gc, "collect", int)  # which takes long among all that tests have made
    weighted = kind == "AdamW"
    for fit, skip in itertools.product((1, 3, 5), (0, 1, 2, 4, 7)):
        batches = make_batches([8, 7, 8, 3, 8])
        expected, whole, _ = trained(
            batches, accumulate(2), kind=kind, weighted=weighted, max_norm=0.5
        )
        model = make_model()
        Runs(model, place, layer, fit, skip)

        @train_step(
            OPTIMIZERS[kind](model.parameters()), accumulate(2), microbatch("auto"), max_norm=0.5
        )
        def step(x, y, model=model, weighted=weighted):
            loss = F.mse_loss(model(x), y)
            return (loss, len(x)) if weighted else loss

        with (
            pytest.warns(UserWarning, match=r"memory ran out with [87] rows of 7")
            if skip < 3
            else nullcontext()
        ):
            results = [step(*batch) for batch in step.over(batches)]
        assert distance(list(model.parameters()), expected) <= 1e-12, (fit, skip)
        for result, other in zip(results, whole, strict=True):
            assert torch.allclose(result.loss, other.loss, rtol=1e-12, atol=0)
        assert skip >= 3 or fit / 2 < step.chunk_sizes[7] <= fit


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_memory_runs_out_around_frozen_layers_and_in_float16():
    results = []
    for fails in (False, True):
        model = make_model(torch.float32)
        if fails:
            Runs(model, "bias", 2, 3, 1)
        parts = (accumulate(2), amp(dtype=torch.float16), frozen(model, "[0]"), microbatch("auto"))
        step = train_step(torch.optim.AdamW(model.parameters(), lr=0.01), *parts)(
            functools.partial(loss_of, model)
        )
        for batch in make_batches([8, 8, 8, 8], torch.float32):
            step(batch)
        assert step.updates == 2
        assert all(p.requires_grad for p in model.parameters())
        results.append(list(model.parameters()))
    assert distance(*results) <= 1e-3


def weighted_by_mask(model, x, y, mask):
    return ((model(x) - y).pow(2).mean(1) * mask).sum() / mask.sum(), mask.sum()


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_the_first_window_keeps_its_reference_when_memory_runs_out():
    model, theirs = make_model(), make_model()
    Runs(model, "weight", 0, 4, 0)
    (batch,) = make_batches([8])
    for net, part in ((model, microbatch("auto")), (theirs, accumulate(1))):
        step = train_step(torch.optim.SGD(net.parameters(), lr=0.1), part)(
            functools.partial(weighted_by_mask, net)
        )
        step(*batch, torch.tensor([9, 9, 9, 9, 1, 1, 1, 1]))
    assert distance(list(model.parameters()), list(theirs.parameters())) <= 1e-12


def test_memory_that_runs_out_in_a_backward_of_the_function_is_an_error():
    """Of several losses, what a parameter has of which cannot be told."""
    model, theirs = make_model(), make_model()
    fails = Runs(model, "weight", 0, 4, 0)

    @train_step(torch.optim.SGD(model.parameters(), lr=0.1), microbatch("auto"))
    def step(batch, catches=False):
        try:
            step.backward(loss_of(model, batch))
        except torch.OutOfMemoryError:
            if not catches:
                raise
            fails.fit = 8
        return 0.1 * loss_of(model, batch)

    (batch,) = make_batches([8])
    with pytest.raises(torch.OutOfMemoryError):
        step(batch)
    assert all(p.grad is None for p in model.parameters())
    assert step(batch, catches=True).updated
    (0.1 * loss_of(theirs, batch)).backward()  # of the first, all is dropped
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    assert distance(list(model.parameters()), list(theirs.parameters())) <= 1e-12


def test_memory_that_runs_out_within_reentrant_checkpointing_is_an_error():
    """The gradient of a layer that is used twice comes there in two parts."""
    model = make_model()
    layer = nn.Linear(6, 6).double()
    fails = [True]

    def inner(hidden):
        if (
            torch.is_grad_enabled() and fails and layer.weight.grad is not None
        ):  # the lower one, run again
            raise torch.OutOfMemoryError("of a test")
        return layer(hidden).tanh()

    @train_step(
        torch.optim.SGD([*model.parameters(), *layer.parameters()], lr=0.1), microbatch("auto")
    )
    def step(batch):
        hidden = model[0](batch[0])
        for _ in range(2):
            hidden = checkpoint(inner, hidden, use_reentrant=True)
        return F.mse_loss(model[2](hidden), batch[1])

    (batch,) = make_batches([8])
    with pytest.raises(torch.OutOfMemoryError):
        step(batch)
    fails.clear()
    assert step(batch).updated


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_an_error_after_memory_ran_out_drops_the_window():
    model, theirs = make_model(), make_model()
    fails = Runs(model, "weight", 0, 4, 0)
    broken = []

    @train_step(torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2), microbatch("auto"))
    def step(batch):
        if broken and len(batch[0]) < 8:
            raise KeyError("of the user")
        return loss_of(model, batch)

    batches = make_batches([4, 8, 8, 8])
    step(batches[0])
    broken.append(True)
    with pytest.raises(KeyError, match="of the user"):
        step(batches[1])
    broken.clear()
    fails.fit = 8
    step.chunk_sizes.clear()
    assert [step(batch).complete for batch in batches[2:]] == [False, True]
    plain_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), batches[2:], 2)
    assert distance(list(model.parameters()), list(theirs.parameters())) <= 1e-12


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_gradients_are_there_twice_at_most():
    model = make_model()
    Runs(model, "weight", 0, 1, 0)
    held = []

    @train_step(torch.optim.SGD(model.parameters(), lr=0.1), microbatch("auto"))
    def step(batch):
        held.append(sum(len(complete) for _, complete in step._complete))
        return loss_of(model, batch)

    step(make_batches([8])[0])
    assert max(held) == 3  # all but the one before whose gradient memory runs out


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_what_was_found_is_remembered_by_the_size_of_rows():
    model = nn.Linear(1, 1)
    seen = []

    @train_step(torch.optim.SGD(model.parameters(), lr=0.1), microbatch("auto"))
    def step(x):
        seen.append(tuple(x.shape))
        if x.numel() > 40:
            raise torch.OutOfMemoryError("of a test")
        return model(x.unsqueeze(-1)).mean()

    step(torch.ones(8, 10))
    assert step.chunk_sizes == {10: 4} and seen == [(8, 10), (4, 10), (4, 10)]
    seen.clear()
    step(torch.ones(8, 10))
    step(torch.ones(8, 5))  # shorter, and may fit
    assert seen == [(4, 10), (4, 10), (8, 5)]
    seen.clear()
    step(torch.ones(8, 20))  # longer: no larger than what fitted for shorter ones
    assert seen == [(4, 20), (2, 20), (2, 20), (2, 20), (2, 20)] and step.chunk_sizes == {
        10: 4,
        20: 2,
    }
    state = io.BytesIO()
    torch.save(step.state_dict(), state)
    state.seek(0)
    step.chunk_sizes.clear()
    seen.clear()
    step(torch.ones(3, 20))
    assert seen[0] == (3, 20)
    step.load_state_dict(torch.load(state))
    assert step.chunk_sizes == {10: 4, 20: 2}


def test_a_row_that_does_not_fit_is_the_error_with_advice_and_the_window_stays():
    model, theirs = make_model(), make_model()

    @train_step(torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2), microbatch("auto"))
    def step(batch, fits=True):
        if not fits:
            raise torch.OutOfMemoryError("tried to allocate 4 GiB")
        return loss_of(model, batch)

    first, second = make_batches([4, 4])
    step(first)
    with (
        pytest.warns(UserWarning),
        pytest.raises(torch.OutOfMemoryError, match=r"4 GiB\nA single row does not fit.*shorter"),
    ):
        step(second, fits=False)
    assert step(second).updated
    plain_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), [first, second], 2)
    assert distance(list(model.parameters()), list(theirs.parameters())) <= 1e-12


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_what_cannot_be_taken_back_is_an_error_and_the_window_is_dropped():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @train_step(optimizer, accumulate(2), microbatch("auto"))
    def further(batch):
        further.backward(loss_of(model, batch))
        if len(batch[0]) > 2:
            raise torch.OutOfMemoryError("after a backward that is over")
        return loss_of(model, batch)

    with pytest.raises(torch.OutOfMemoryError):
        further(make_batches([4])[0])
    assert all(p.grad is None for p in model.parameters())

    def fails():
        raise torch.OutOfMemoryError("in an update")

    optimizer.register_step_pre_hook(lambda *_: fails())
    step = train_step(optimizer, microbatch("auto"))(functools.partial(loss_of, model))
    with pytest.raises(torch.OutOfMemoryError, match="in an update"):
        step(make_batches([4])[0])
    assert step.chunk_sizes == {}


@pytest.mark.filterwarnings("ignore:memory ran out")
@pytest.mark.parametrize("generator", [False, True])
def test_activations_are_gone_before_a_chunk_is_tried_again(generator):
    model = make_model()
    activations, alive = [], []

    def forward(batch):
        alive.append([reference() is not None for reference in activations])
        hidden = model[0](batch[0])
        activations.append(weakref.ref(hidden))
        if len(batch[0]) > 2:
            try:
                raise torch.OutOfMemoryError("of a test")
            except torch.OutOfMemoryError as error:
                kept = error  # noqa: F841  # so that this frame and the error hold each other
                raise
        return F.mse_loss(model[1:](hidden), batch[1])

    def with_yield(batch):
        yield forward(batch)

    gc.disable()  # which would find what is only held by a cycle
    try:
        step = microbatch("auto")(train_step(torch.optim.SGD(model.parameters(), lr=0.1)))(
            with_yield if generator else forward
        )
        step(make_batches([8])[0])
    finally:
        gc.enable()
    assert len(alive) == 6 and not any(map(any, alive))


def test_gradients_are_held_by_nothing_after_the_update():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = train_step(optimizer, accumulate(2), microbatch("auto"))(
        functools.partial(loss_of, model)
    )
    step(make_batches([4])[0])
    held = [weakref.ref(p.grad) for p in model.parameters()]
    step(make_batches([4])[0])
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
model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.GELU(), torch.nn.GELU(), torch.nn.Linear(512, 1))
step = train_step(torch.optim.SGD(model.parameters(), lr=0.1), microbatch("auto"))(lambda x: model(x).pow(2).mean())
step(torch.ones(8, 64))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27,) * 2)
assert step(torch.ones(2**17, 64)).updated  # 256 MiB for each of the four layers' outputs
print(step.chunk_sizes)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its size from Linux")
def test_memory_of_a_cpu_that_really_runs_out():
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REAL], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    ((size, rows),) = eval(found.stdout).items()
    assert size == 64 and 2**10 <= rows <= 2**16
