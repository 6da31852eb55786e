"""Windows that a loop ends itself: ``close``, ``accumulate(None)``, sums, and counted windows."""

import collections
import copy
import itertools
import math
import warnings

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    BATCHES,
    OPTIMIZERS,
    distance,
    loss_of,
    make_batches,
    make_model,
    same_bits,
    same_values,
    state_of,
    windows_of,
)
from torch import nn
from torch.nn.utils import clip_grad_norm_

from trainkit import History, accumulate, amp, frozen, microbatch, train_step

FEW = settings(max_examples=settings.default.max_examples // 3)

sizes = st.lists(st.integers(1, 4), min_size=1, max_size=8)
lengths = st.none() | st.integers(1, 4)
precisions = st.sampled_from(["float64", "float32", "bfloat16", "float16", "overflow"])
norms = st.sampled_from([None, 0.05, 1.0, math.inf])


class Chained:
    """Several optimizers as one, in a class that is no torch.optim.Optimizer."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for one in self.optimizers for group in one.param_groups]

    @property
    def state(self):
        return collections.ChainMap(*(one.state for one in self.optimizers))

    def step(self):
        for one in self.optimizers:
            one.step()

    def zero_grad(self):
        for one in self.optimizers:
            one.zero_grad()

    def state_dict(self):
        return [one.state_dict() for one in self.optimizers]


def make_optimizers(kind, parameters):
    """One or two, and what has the state of all."""
    parameters = list(parameters)
    if kind in OPTIMIZERS:
        one = OPTIMIZERS[kind](parameters)
        return [one], one
    two = [OPTIMIZERS["AdamW fused"](parameters[:2]), OPTIMIZERS["SGD momentum"](parameters[2:])]
    return ([Chained(*two)] if kind == "chained" else two), Chained(*two)


KINDS = [*sorted(OPTIMIZERS), "two", "chained"]
kinds = st.sampled_from(KINDS)


def amp_of(precision):
    if precision == "float64":
        return []
    scale = 2.0**40 if precision == "overflow" else 256.0
    name = "float16" if precision == "overflow" else precision
    return [amp(dtype=getattr(torch, name), init_scale=scale, growth_interval=2)]


class Run:
    """A model, its optimizers, its step of one of two faces, and what it recorded."""

    def __init__(self, kind, precision, n, face, max_norm, weighted, layers, rows, reduction):
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.model = make_model(self.dtype)
        self.optimizers, self.state = make_optimizers(kind, self.model.parameters())
        self.results, self.calls = [], []
        self.face, self.weighted = face, weighted
        parts = [accumulate(n, reduction=reduction), *amp_of(precision)]
        parts += [frozen(self.model, layers)] if layers else []
        parts += [microbatch(rows)] if rows and face == "call" else []
        self.options = {"max_norm": max_norm, "after": lambda: self.calls.append("after")}
        self.make = lambda: train_step(self.optimizers, *parts, **self.options)
        self.step = self.make()
        if face == "call":
            self.step = self.step(self.forward)
        self.history = History(self.step)

    def forward(self, batch):
        loss = loss_of(self.model, batch)
        return (loss, torch.tensor(len(batch[0]))) if self.weighted else loss

    def run(self, batch, last=False):
        if self.face == "call":
            self.results.append((self.step.last if last else self.step)(batch))
            return
        with self.step as result:
            output = self.forward(batch)
            self.step.backward(*output if self.weighted else (output,))
        self.results.append(result)

    def close(self):
        self.results.append(self.step.close())
        return self.results[-1]

    def resume(self):
        """Go on with another step, from a state in the middle of a window."""
        state = copy.deepcopy(self.step.state_dict())
        self.step = self.make()(self.forward) if self.face == "call" else self.make()
        self.step.load_state_dict(state)

    def all(self):
        return state_of(self.model, self.state)


@FEW
@given(
    *(sizes, kinds, precisions, lengths, st.sampled_from(["call", "block"]), norms),
    st.booleans(),
    st.sampled_from([None, "[0]"]),
    st.sampled_from([None, 1, 2]),
    st.data(),
)
def test_close_is_last_with_the_micro_batch_before(
    sizes, kind, precision, n, face, max_norm, weighted, layers, rows, data
):
    """To the same bits, in every face, also from a state that was loaded."""
    reduction = data.draw(st.sampled_from(["mean", "sum"])) if not weighted else "mean"
    ends = data.draw(st.sets(st.integers(0, len(sizes) - 1))) | {len(sizes) - 1}
    resumed = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    ours, theirs = (
        Run(kind, precision, n, f, max_norm, weighted, layers, rows, reduction)
        for f in (face, "call")
    )
    if face == "block" and rows:
        theirs = Run(kind, precision, n, "call", max_norm, weighted, layers, None, reduction)
    for i, batch in enumerate(make_batches(sizes, ours.dtype)):
        theirs.run(batch, last=i in ends)
        ours.run(batch)
        if i in resumed:
            ours.resume()
        expected = theirs.results[-1]
        found = ours.results[-1]
        if i in ends and not found.complete:
            found = ours.close()
        assert (found.complete, found.updated) == (expected.complete, expected.updated)
        assert same_values(found.window_loss, expected.window_loss)
        assert same_values(found.grad_norm, expected.grad_norm)
        assert all(p.grad is None for p in ours.model.parameters())
        if i in ends:
            again = ours.close()
            assert (again.complete, again.updated, again.loss) == (False, False, None)
            assert again.window_loss is None and again.grad_norm is None
    assert same_values(ours.all(), theirs.all())
    assert same_values(ours.step.state_dict(), theirs.step.state_dict())
    assert ours.calls == theirs.calls == ["after"] * ours.step.updates


def plain_windows(model, optimizer, windows, reduction="mean", max_norm=None):
    """Windows of (batch, weight) by hand."""
    for window in windows:
        total = 1 if reduction == "sum" else sum(weight for _, weight in window)
        optimizer.zero_grad()
        for batch, weight in window:
            (loss_of(model, batch) * (weight / total)).backward()
        if max_norm is not None:
            clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    optimizer.zero_grad()


def cut(items, ends):
    """The items in windows; every one in ``ends`` is the last of one, and so is the last of all."""
    starts = [0, *(i + 1 for i in sorted(ends) if i + 1 < len(items)), len(items)]
    return [items[a:b] for a, b in itertools.pairwise(starts)]


@FEW
@given(sizes, kinds, norms, st.booleans(), st.sets(st.integers(0, 7)), st.booleans())
def test_windows_that_only_close_ends_are_those_by_hand(
    sizes, kind, max_norm, weighted, ends, within_over
):
    batches = make_batches(sizes)
    model, expected = make_model(), make_model()
    optimizers, state = make_optimizers(kind, model.parameters())
    _, theirs = make_optimizers(kind, expected.parameters())
    weights = sizes if weighted else [1] * len(sizes)
    windows = cut(list(zip(batches, weights, strict=True)), ends)
    plain_windows(expected, theirs, windows, max_norm=max_norm)

    @train_step(optimizers, accumulate(4), accumulate(None), max_norm=max_norm)
    def step(batch):
        loss = loss_of(model, batch)
        return (loss, len(batch[0])) if weighted else loss

    assert not step.close().complete  # before the first call
    for i, batch in enumerate(step.over(batches) if within_over else batches):
        is_last = i == len(batches) - 1
        assert step(batch).complete == (within_over and is_last)
        if i in ends or is_last:
            assert step.close().complete == (not (within_over and is_last))
    assert step.updates == len(windows)
    assert distance(state_of(model, state), state_of(expected, theirs)) <= 1e-12


@FEW
@given(sizes, kinds, st.integers(1, 4), norms, st.sampled_from(["call", "block", "yield"]))
def test_a_sum_is_backward_after_backward(sizes, kind, n, max_norm, face):
    """To the same bits, short windows too, and without clipping."""
    batches = make_batches(sizes)
    model, expected = make_model(), make_model()
    optimizers, state = make_optimizers(kind, model.parameters())
    _, theirs = make_optimizers(kind, expected.parameters())
    windows = windows_of([(batch, 1) for batch in batches], n)
    plain_windows(expected, theirs, windows, "sum", max_norm)

    def yielding(batch):
        yield loss_of(model, batch)
        for one in optimizers:
            one.step()

    step = train_step(optimizers, accumulate(n, reduction="sum"), max_norm=max_norm)
    if face != "block":
        step = step(yielding if face == "yield" else lambda batch: loss_of(model, batch))
    seen = []
    for batch in step.over(batches):
        if face != "block":
            seen.append(step(batch))
            continue
        with step as result:
            step.backward(loss_of(model, batch))
        seen.append(result)
    ours, by_hand = state_of(model, state), state_of(expected, theirs)
    if max_norm is None:
        assert same_bits(ours, by_hand)
    assert distance(ours, by_hand) <= 1e-12
    for window in windows_of(seen, n):
        total = sum(result.loss for result in window)
        assert torch.allclose(window[-1].window_loss, total, rtol=1e-12)


@FEW
@given(sizes, st.integers(1, 3), st.sampled_from([None, 0.05]), st.sampled_from([2.0**8, 2.0**36]))
def test_a_sum_in_float16_is_a_scaler_by_hand(sizes, n, max_norm, init_scale):
    batches = make_batches(sizes, torch.float32)
    model, expected = make_model(torch.float32), make_model(torch.float32)
    optimizer, theirs = (OPTIMIZERS["AdamW"](m.parameters()) for m in (model, expected))
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)
    scales, norms = [], []
    for window in windows_of(batches, n):
        for batch in window:
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(expected, batch)
            scaler.scale(loss).backward()
        scaler.unscale_(theirs)
        norms.append(clip_grad_norm_(expected.parameters(), max_norm or math.inf))
        scaler.step(theirs)
        scaler.update()
        theirs.zero_grad()
        scales.append(scaler.get_scale())
    half = amp(dtype=torch.float16, init_scale=init_scale, growth_interval=2)
    step = train_step(optimizer, accumulate(n, reduction="sum"), half, max_norm=max_norm)
    step = step(lambda batch: loss_of(model, batch))
    history = History(step)
    results = [(step(batch), step.loss_scale) for batch in step.over(batches)]
    seen = [(result.grad_norm, scale) for result, scale in results if result.complete]
    assert [scale for _, scale in seen] == scales
    assert distance(state_of(model, optimizer)[:4], state_of(expected, theirs)[:4]) <= 1e-4
    for (norm, _), by_hand in zip(seen, norms, strict=True):
        assert torch.allclose(norm, by_hand, rtol=1e-2) or not by_hand.isfinite()
    assert len(history["loss"]) == len(scales)


def complete(step, batches):
    return [result for batch in step.over(batches) if (result := step(batch)).complete]


@FEW
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 3))
def test_a_sum_takes_each_batch_as_one_in_chunks(sizes, rows, n):
    batches = make_batches(sizes)
    states = []
    for parts in ([], [microbatch(rows)]):
        model = make_model()
        optimizer = OPTIMIZERS["SGD momentum"](model.parameters())
        step = train_step(optimizer, accumulate(n, reduction="sum"), *parts)
        complete(step(lambda batch, model=model: loss_of(model, batch)), batches)
        states.append(state_of(model, optimizer))
    assert distance(*states) <= 1e-12


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has none")
@FEW
@given(sizes, st.integers(1, 4) | st.none(), st.sampled_from([None, 0.05]))
def test_a_sum_in_float32_is_rounded_once(sizes, n, max_norm):
    batches = make_batches(sizes, torch.bfloat16)
    model, expected = make_model(torch.bfloat16), make_model(torch.bfloat16)
    optimizer, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, expected))
    for window in windows_of(batches, n or len(batches)):
        parameters = list(expected.parameters())
        found = [torch.autograd.grad(loss_of(expected, batch), parameters) for batch in window]
        sums = [sum(g.float() for g in gradients) for gradients in zip(*found, strict=True)]
        norm = torch.stack([total.norm() for total in sums]).norm().item()
        clip = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        for p, total in zip(parameters, sums, strict=True):
            p.grad = (total * clip).to(p.dtype)
        theirs.step()
    part = accumulate(n, reduction="sum", dtype=torch.float32)
    step = train_step(optimizer, part, max_norm=max_norm)(lambda batch: loss_of(model, batch))
    for i, batch in enumerate(batches):
        step(batch)
        if i == len(batches) - 1 or (n is None and i == len(batches) - 1):
            step.close()
    assert distance(state_of(model, optimizer), state_of(expected, theirs)) <= 1e-2
    if max_norm is None:
        assert same_bits(state_of(model, optimizer), state_of(expected, theirs))


@FEW
@given(sizes, st.integers(1, 4), st.booleans(), st.sampled_from(["float64", "float16"]))
def test_the_loss_of_a_window_in_history_is_window_loss(sizes, n, is_sum, precision):
    run = Run(
        *("AdamW fused", precision, n, "call", None, False, None, None),
        "sum" if is_sum else "mean",
    )
    for batch in make_batches(sizes, run.dtype):
        run.run(batch)
    run.close()
    losses = [result.window_loss.item() for result in run.results if result.complete]
    assert run.history["loss"] == pytest.approx(losses, rel=1e-6)


def test_a_sum_refuses_weights_and_leaves_the_window(model, optimizer):
    step = train_step(optimizer, accumulate(3, reduction="sum"))
    step = step(
        lambda batch, *weight: (loss_of(model, batch), *weight) if weight else loss_of(model, batch)
    )
    step(BATCHES[0])
    before = step.state_dict()
    for weight in (4, torch.tensor(4)):
        with pytest.raises(TypeError, match="return loss"):
            step(BATCHES[1], weight)
    assert same_values(step.state_dict(), before)
    with pytest.raises(ValueError, match="'total'"):
        accumulate(3, reduction="total")


# Where close cannot be called, or has nothing to do.


def test_close_of_a_step_that_yields_names_the_remedies_and_leaves_the_window(model, optimizer):
    @train_step(optimizer, accumulate(3))
    def step(batch):
        yield loss_of(model, batch)
        optimizer.step()

    assert not step.close().complete  # no window is open
    step(BATCHES[0])
    with pytest.raises(RuntimeError, match=r"step\.last\(.*return the loss"):
        step.close()
    assert step.last(BATCHES[1]).updated and not step.close().complete


class Yielding:
    """Not known as a generator function before it is called."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def __call__(self, batch):
        yield loss_of(self.model, batch)
        self.optimizer.step()


def test_close_of_an_object_that_yields_is_refused_after_a_load_too(model, optimizer):
    steps = [train_step(optimizer, accumulate(3))(Yielding(model, optimizer)) for _ in range(2)]
    steps[0](BATCHES[0])
    steps[1].load_state_dict(steps[0].state_dict())
    for step in steps:
        with pytest.raises(RuntimeError, match=r"step\.last\("):
            step.close()


def test_close_without_an_optimizer_is_refused_after_a_load_too(model):
    def forward(batch):
        yield loss_of(model, batch)

    steps = [accumulate(3, model)(lambda batch: forward(batch)) for _ in range(2)]
    steps[0](BATCHES[0])
    steps[1].load_state_dict(steps[0].state_dict())
    with pytest.raises(ValueError, match=r"`train_step\(optimizer\)`, or `yield loss`"):
        steps[1].close()
    assert steps[1].last(BATCHES[1]).complete and steps[1].updates == 1


def test_close_inside_a_micro_batch_is_refused(model, optimizer):
    step = train_step(optimizer, accumulate(3))
    step_b = step(lambda batch: (step_b.close(), loss_of(model, batch))[1])
    with pytest.raises(RuntimeError, match=r"call it after `step\(\)`"):
        step_b(BATCHES[0])
    with pytest.raises(RuntimeError, match=r"call it after `step\(\)`"), step:
        step.close()
    assert not step.close().complete and (step.updates, step_b.updates) == (0, 0)


def test_close_inside_after_is_refused(model, optimizer):
    step = train_step(optimizer, after=lambda: step.close())(lambda b: loss_of(model, b))
    with pytest.raises(RuntimeError, match=r"call it after `step\(\)`"):
        step(BATCHES[0])


@pytest.mark.parametrize("precision", ["float64", "float16", "bfloat16"])
def test_close_after_discard_and_of_nothing(precision):
    run = Run("AdamW", precision, 3, "call", None, False, None, None, "mean")
    before = run.all()
    assert repr(run.step.close()).startswith("StepResult(loss=None, complete=False")
    run.run(make_batches([2], run.dtype)[0])
    run.step.discard()
    assert not run.step.close().complete and run.step.updates == 0
    assert same_bits(run.all(), before) and run.calls == []


def test_an_overflow_skips_the_update_of_close():
    run = Run("AdamW fused", "overflow", None, "call", 1.0, False, None, None, "mean")
    before = run.all()
    run.run(make_batches([2], torch.float32)[0])
    result = run.close()
    assert (result.complete, result.updated, run.step.skipped) == (True, False, 1)
    assert same_bits(run.all()[:4], before[:4]) and run.calls == []
    assert run.step.loss_scale == 2.0**39 and run.history["skipped"] == [1]


def test_close_that_raises_counts_nothing_twice(model):
    class Once(torch.optim.SGD):
        raises = True

        def step(self, closure=None):
            if self.raises:
                raise LookupError
            return super().step()

    optimizer = Once(model.parameters(), lr=0.1)
    step = train_step(optimizer, accumulate(None))(lambda batch: loss_of(model, batch))
    step(BATCHES[0])
    with pytest.raises(LookupError):
        step.close()
    assert step.updates == 0 and all(p.grad is None for p in model.parameters())
    optimizer.raises = False
    assert not step.close().complete
    step(BATCHES[0])
    assert step.close().updated


def test_close_too_often_skipped_says_where(model, optimizer):
    nan = (torch.full((4, 4), math.nan).double(), torch.zeros(4, 3).double())
    part = train_step(optimizer, accumulate(None), max_norm=math.inf, max_skips=2)
    step = part(lambda batch: loss_of(model, batch))
    step(nan)
    step.close()
    step(nan)
    with pytest.raises(FloatingPointError):
        step.close()
    step(BATCHES[0])
    assert step.close().updated and (step.updates, step.skipped) == (1, 2)


def test_frozen_layers_get_no_update_from_close(model, optimizer):
    step = train_step(optimizer, accumulate(None))(lambda batch: loss_of(model, batch))
    step(BATCHES[0])
    before = state_of(model, optimizer)
    with frozen(model, "[0]"):
        step.close()
    after = state_of(model, optimizer)
    assert same_bits(after[:2], before[:2]) and not torch.equal(after[2], before[2])


# Windows counted by over.


@FEW
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from(["list", "no length", "again"]),
)
def test_windows_that_go_on_from_pass_to_pass(passes, n, updates, numpys, kind):
    batches = make_batches([1 + i % 3 for i in range(passes)])
    model, expected = make_model(), make_model()
    optimizer, theirs = (OPTIMIZERS["AdamW"](m.parameters()) for m in (model, expected))
    needed = [(b, 1) for b in itertools.islice(itertools.cycle(batches), n * updates)]
    plain_windows(expected, theirs, windows_of(needed, n))
    step = train_step(optimizer, accumulate(n))(lambda batch: loss_of(model, batch))

    class Loader:
        asked = 0

        def __iter__(self):
            for batch in batches:
                self.asked += 1
                yield batch

    loader = {"list": batches, "no length": Loader(), "again": Loader()}[kind]
    count = numpy.int64(updates) if numpys else updates
    seen = [step(batch).complete for batch in step.over(loader, updates=count)]
    assert seen == ([False] * (n - 1) + [True]) * updates
    assert same_bits(state_of(model, optimizer), state_of(expected, theirs))
    if kind != "list":
        assert loader.asked == n * updates  # nothing is read ahead
    # The next loop counts its own.
    assert len([step(batch) for batch in step.over(loader, updates=2)]) == 2 * n


@FEW
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
def test_an_iterator_that_ends_says_how_many_windows_were_closed(length, n, updates):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters())
    step = train_step(optimizer, accumulate(n))(lambda batch: loss_of(model, batch))
    batches = make_batches([2] * length)
    if n * updates <= length:
        assert len([step(b) for b in step.over(iter(batches), updates=updates)]) == n * updates
        return
    with pytest.raises(ValueError, match=f"after {length // n} of {updates} windows.*list"):
        for batch in step.over(iter(batches), updates=updates):
            step(batch)
    assert step.updates == length // n
    assert step.close().complete == bool(length % n)  # what is left is not lost


@pytest.mark.parametrize("loader", [[], (), iter(())])
def test_a_loader_that_gives_nothing(loader, model, optimizer):
    step = train_step(optimizer)(lambda batch: loss_of(model, batch))
    with pytest.raises(ValueError, match="after 0 of 3 windows"):
        next(step.over(loader, updates=3))
    assert list(step.over([])) == []


@pytest.mark.parametrize("updates", [0, -1, True, 1.0, "3", numpy.float64(2), torch.tensor(2)])
def test_other_numbers_of_windows_are_refused_at_once(updates, optimizer):
    kind = ValueError if type(updates) is int else TypeError
    with pytest.raises(kind, match=r"updates=1000"):
        train_step(optimizer).over(BATCHES, updates=updates)


def test_skipped_windows_count_and_discarded_ones_do_not():
    run = Run("AdamW", "overflow", 2, "call", None, False, None, None, "mean")
    batches = make_batches([2, 2, 2], torch.float32)
    for i, batch in enumerate(run.step.over(batches, updates=3)):
        run.run(batch)
        if i == 0:
            run.step.discard()
    assert len(run.results) == 7 and run.step.updates + run.step.skipped == 3
    assert run.step.skipped > 0


def test_windows_closed_by_hand_count_and_others_do_not(model, optimizer):
    step = train_step(optimizer, accumulate(None))(lambda batch: loss_of(model, batch))
    other = train_step(optimizer)(lambda batch: loss_of(model, batch))
    count = 0
    for batch in step.over(BATCHES, other, updates=2):
        other(batch)
        step(batch)
        count += 1
        if count % 2 == 0:
            step.close()
    assert (count, step.updates, other.updates) == (4, 2, 4)


def test_break_and_loops_within_loops(model, optimizer):
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    for i, batch in enumerate(step.over(BATCHES, updates=5)):
        step(batch)
        if i == 2:
            break
    with pytest.warns(UserWarning, match=r"step\.close\(\).*step\.discard\(\)"):
        assert [step(b).complete for b in step.over(BATCHES[:1], updates=1)] == [True]
    assert step.updates == 2 and not step(BATCHES[0]).complete
    step.discard()
    # The bar of a loop within another, over the same loader, closes its own.
    outer = 0
    for batch in step.over(BATCHES, updates=3):
        outer += 1
        step(batch)
        for inner in step.over(BATCHES[:1]):
            step(inner)
    assert (outer, step.updates) == (3, 5)


def test_a_bar_over_counted_windows_has_no_total(model, optimizer):
    tqdm = pytest.importorskip("tqdm.auto").tqdm
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    totals = []

    class File:
        def write(self, text):
            totals.append("/3" in text)

        def flush(self):
            pass

    assert tqdm
    bar = {"file": File(), "mininterval": 0}
    assert len([step(b) for b in step.over(BATCHES, updates=4, progress=bar)]) == 8
    assert totals and not any(totals)


@pytest.mark.parametrize("makes", [lambda: BATCHES, lambda: torch.utils.data.DataLoader(BATCHES)])
def test_the_length_is_that_of_the_loader(makes, optimizer):
    step = train_step(optimizer)
    assert len(step.over(makes())) == 3
    for loader, options in ((iter(BATCHES), {}), (BATCHES, {"updates": 4})):
        with pytest.raises(TypeError, match=r"step\.over\(loader\)"):
            len(step.over(loader, **options))


# The open window that a loop finds.


def test_a_window_left_open_is_told_once(model, optimizer):
    step = train_step(optimizer, accumulate(4))(lambda batch: loss_of(model, batch))
    for batch, _ in zip(step.over(BATCHES * 2), range(5), strict=False):
        step(batch)
    with pytest.warns(UserWarning, match=r"1 micro-batch.*step\.close\(\).*step\.discard\(\)"):
        loop = step.over(BATCHES)
        step(next(loop))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(next(step.over(BATCHES)))  # once


@pytest.mark.parametrize("ends", ["close", "discard", "load"])
def test_no_warning_where_nothing_is_left_open(ends, model, optimizer):
    step = train_step(optimizer, accumulate(4))(lambda batch: loss_of(model, batch))
    step(BATCHES[0])
    if ends == "load":
        state = step.state_dict()
        step = train_step(optimizer, accumulate(4))(lambda batch: loss_of(model, batch))
        step.load_state_dict(state)
    else:
        getattr(step, ends)()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in step.over(BATCHES):
            step(batch)


# Lengths.


@pytest.mark.parametrize("make", [numpy.int64, numpy.int32, numpy.uint8])
def test_lengths_of_numpy_are_numbers(make, model, optimizer):
    for n in (make(2), lambda updates: make(2)):
        step = train_step(optimizer, accumulate(n))(lambda batch: loss_of(model, batch))
        assert [step(batch).complete for batch in step.over(BATCHES)] == [False, True, True]


def test_a_function_may_leave_a_window_to_close(model, optimizer):
    step = train_step(optimizer, accumulate(lambda updates: None if updates else numpy.int64(1)))
    step = step(lambda batch: loss_of(model, batch))
    assert [step(batch).complete for batch in BATCHES] == [True, False, False]
    assert step.close().updated


def test_many_micro_batches_in_float16_do_not_use_up_its_range():
    run = Run("AdamW fused", "float16", None, "call", None, False, None, None, "mean")
    batch = make_batches([4], torch.float32)[0]
    for _ in range(300):
        run.run(batch)
    result = run.close()
    expected = make_model(torch.float32)
    loss_of(expected, batch).backward()
    norm = torch.stack([p.grad.norm() for p in expected.parameters()]).norm()
    assert result.updated and torch.allclose(result.grad_norm, norm, rtol=1e-2)


# The loss scale.


def test_the_loss_scale_is_a_number_or_none(model, optimizer):
    assert train_step(optimizer).loss_scale is None
    assert train_step(optimizer, amp(dtype=torch.bfloat16)).loss_scale is None
    for scale in (256.0, 65536.0):
        half = make_model(torch.float32)
        adam = torch.optim.AdamW(half.parameters())
        step = train_step(adam, amp(dtype=torch.float16, init_scale=scale, growth_interval=1))
        assert step.loss_scale == scale  # before the first call
        with step:
            step.backward(loss_of(half, make_batches([2], torch.float32)[0]))
        assert step.loss_scale == 2 * scale == step.state_dict()["loss_scale"]
        with pytest.raises(AttributeError):
            step.loss_scale = 1.0


def test_a_module_of_a_block_keeps_what_it_has(model):
    """Layers that get no gradient in the window of close stay as they are."""
    both = nn.ModuleList([model, nn.Linear(2, 2).double()])
    optimizer = torch.optim.AdamW(both.parameters())
    step = train_step(optimizer, accumulate(None))(lambda batch: loss_of(model, batch))
    before = state_of(both[1], optimizer)
    step(BATCHES[0])
    assert step.close().updated and same_bits(state_of(both[1], optimizer), before)
