"""What breaks in loops and libraries, and has no other file here. All are in docs/hazards.md."""

import copy
import itertools
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from launch import run
from oracles import (
    BATCHES,
    OPTIMIZERS,
    distance,
    gradients_of,
    loss_of,
    make_batches,
    make_model,
    plain_loop,
    same_bits,
    state_of,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainkit import accumulate, amp, freeze, frozen, resumable, train_step

ROOT = Path(__file__).parents[1]
FLOAT32 = make_batches([4, 4, 2], torch.float32)


# Optimizer and scaler


@pytest.mark.parametrize("yields", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_sgd_with_momentum_and_a_parameter_that_joins_later(dtype, yields):
    """torch raises a TypeError from a buffer that is None."""
    results = []
    for fused in (True, False):
        model = make_model(dtype)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, fused=fused
        )

        def step(batch, model=model, optimizer=optimizer):
            yield loss_of(model, batch)
            optimizer.step()
            optimizer.zero_grad()

        step = train_step(optimizer)(
            step if yields else lambda batch, model=model: loss_of(model, batch)
        )
        batches = make_batches([4, 4, 4], dtype)
        with frozen(model, "[0]"):
            step(batches[0])
        for batch in batches[1:]:
            step(batch)
        results.append(list(model.parameters()))
    assert distance(*results) < 1e-6


def test_fused_sgd_with_dampening_and_a_parameter_that_joins_later_is_refused():
    model = make_model()
    optimizer = OPTIMIZERS["SGD dampening fused"](model.parameters())
    step = train_step(optimizer)(lambda batch: loss_of(model, batch))
    with frozen(model, "[0]"):
        step(BATCHES[0])
    before = state_of(model, optimizer)
    with pytest.raises(
        ValueError,
        match=r"2 of 4 parameters.*fused=False",
    ):
        step(BATCHES[1])
    assert same_bits(before, state_of(model, optimizer)) and model[0].weight.grad is None


def test_found_inf_is_one_where_two_reasons_to_skip_meet():
    """The kernels test ``found_inf == 1``: with 2, a sum, they step and spoil their counter."""
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = train_step(optimizer, accumulate(2), max_norm=1.0)(
        lambda batch, weight, by=1.0: (by * loss_of(model, batch), weight)
    )
    for _ in range(2):
        step(FLOAT32[0], torch.tensor(3))
    before = state_of(model, optimizer)
    step(FLOAT32[0], torch.tensor(0), math.nan)
    assert not step(FLOAT32[1], torch.tensor(0)).updated
    assert same_bits(before, state_of(model, optimizer))


def test_the_scale_is_one_and_the_same_all_through_a_window():
    """``scaler.update()`` within a window mixes scales: it would double with every micro-batch."""
    model, theirs = make_model(torch.float32), make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = train_step(
        optimizer, accumulate(3), amp(dtype=torch.float16, init_scale=1024.0, growth_interval=1)
    )(lambda batch: loss_of(model, batch))
    scales = []
    for batch in FLOAT32 * 2:
        step(batch)
        scales.append(step.state_dict()["loss_scale"])
    assert scales == [1024.0] * 2 + [2048.0] * 3 + [4096.0]
    plain_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), FLOAT32 * 2, 3)
    assert distance(list(model.parameters()), list(theirs.parameters())) < 2e-3


def test_an_optimizer_whose_step_needs_a_closure_is_refused():
    """LBFGS and its like evaluate the loss within ``step``, which a scaler cannot follow."""

    class LineSearch(torch.optim.SGD):
        def step(self, closure):
            closure()

    model = make_model()
    for optimizer in (torch.optim.LBFGS(model.parameters()), LineSearch(model.parameters())):
        step = amp(optimizer)(lambda batch: loss_of(model, batch))
        with pytest.raises(TypeError, match=f"{type(optimizer).__name__}.step .*`yield loss`"):
            step(make_batches([4])[0])


@pytest.mark.parametrize("optimizer_of", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_sparse_gradients_are_clipped_and_unscaled(optimizer_of, norm_type):
    """``clip_grad_norm_`` raises for them. The rows of a token that comes twice are one row."""
    ours, theirs = nn.Embedding(4, 3, sparse=True), nn.Embedding(4, 3)
    theirs.load_state_dict(ours.state_dict())
    parts = accumulate(2), amp(dtype=torch.float16)
    step = train_step(
        optimizer_of(ours.parameters(), lr=0.1), *parts, max_norm=0.5, norm_type=norm_type
    )
    step = step(lambda *tokens: ours(torch.tensor(tokens)).pow(2).sum())
    step(1, 2, 1, 1)
    result = step(1, 0)
    (theirs(torch.tensor([1, 2, 1, 1, 1, 0])).pow(2).sum() / 2).backward()
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5, norm_type)
    optimizer_of(theirs.parameters(), lr=0.1).step()
    assert result.updated
    torch.testing.assert_close(result.grad_norm, norm)
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_complex_gradients_are_clipped_and_unscaled(norm_type):
    """``GradScaler.unscale_`` does not know them: pytorch#58228."""
    ours, theirs = (nn.Parameter(torch.tensor([3.0 + 4.0j, 1.0j])) for _ in range(2))
    step = train_step(
        torch.optim.SGD([ours], lr=0.1), amp(dtype=torch.float16), max_norm=0.5, norm_type=norm_type
    )
    result = step(lambda: ours.abs().pow(2).sum())()
    theirs.abs().pow(2).sum().backward()
    norm = nn.utils.clip_grad_norm_([theirs], 0.5, norm_type)
    torch.optim.SGD([theirs], lr=0.1).step()
    assert result.updated
    torch.testing.assert_close(result.grad_norm, norm)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("fused", [False, True])
def test_several_dtypes_in_one_optimizer(fused):
    """One norm over all of them, in float32: bfloat16 alone would give three digits of it."""
    ours, theirs = (
        nn.ModuleList([nn.Linear(4, 64).bfloat16(), nn.Linear(64, 1)]) for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())

    def loss(model, batch):
        return model[1](model[0](batch[0].bfloat16()).float()).pow(2).mean()

    step = train_step(
        torch.optim.SGD(ours.parameters(), lr=0.1, fused=fused), accumulate(2), max_norm=0.1
    )
    step = step(lambda batch: loss(ours, batch))
    for batch in FLOAT32[:2]:
        result = step(batch)
        (loss(theirs, batch) / 2).backward()
    norm = torch.cat([p.grad.double().flatten() for p in theirs.parameters()]).norm()
    torch.testing.assert_close(result.grad_norm.double(), norm, rtol=1e-5, atol=0)
    for parameter in theirs.parameters():
        parameter.grad.mul_(0.1 / norm)
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-5, atol=1e-3 if a.dtype == torch.bfloat16 else 1e-6
        )


@pytest.mark.parametrize("fused", [False, True])
def test_finite_gradients_whose_norm_overflows_are_not_made_zeros(fused):
    """``clip_grad_norm_`` multiplies by 1 / inf, momentum goes on: pytorch#46849. Not here."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    step = train_step(optimizer, max_norm=1.0)(lambda: model(torch.full((1, 3), 1e20)).sum())
    before = state_of(model, torch.optim.SGD(model.parameters()))
    result = step()
    assert not result.updated and step.skipped == 1 and result.grad_norm == math.inf
    assert same_bits(before, state_of(model, torch.optim.SGD(model.parameters())))


@pytest.mark.parametrize("to_fused", [False, True])
def test_a_state_that_changes_whether_an_optimizer_is_fused(to_fused):
    """Its old flag stays, and torch's scaler believes it: an AssertionError, or no skip."""
    model, theirs = make_model(torch.float32), make_model(torch.float32)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01, fused=to_fused)
    plain_loop(theirs, other, FLOAT32[:1])
    model.load_state_dict(theirs.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=not to_fused)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    step = train_step(optimizer, max_norm=0.1)(lambda batch, by=1.0: by * loss_of(model, batch))
    before = state_of(model, optimizer)
    assert not step(FLOAT32[1], math.inf).updated
    assert same_bits(before, state_of(model, optimizer))
    step(FLOAT32[1])
    plain_loop(theirs, other, FLOAT32[1:2], max_norm=0.1)
    assert distance(state_of(model, optimizer), state_of(theirs, other)) < 1e-5


def test_a_wrapper_that_passes_for_a_fused_optimizer_and_ignores_grad_scale():
    """As Fabric's: isinstance holds, the flag is there, and step() would use scaled gradients."""

    class Wrapper(torch.optim.AdamW):
        def __init__(self, optimizer):
            self.__dict__ = {**optimizer.__dict__, "optimizer": optimizer}

        def step(self, closure=None):
            self.optimizer.step()

    model, theirs = make_model(torch.float32), make_model(torch.float32)
    wrapper = Wrapper(torch.optim.AdamW(model.parameters(), lr=0.01, fused=True))
    assert wrapper._step_supports_amp_scaling
    step = train_step(wrapper, amp(dtype=torch.float32), max_norm=1e-3)(
        lambda batch: loss_of(model, batch)
    )
    step(FLOAT32[0])
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    plain_loop(theirs, other, FLOAT32[:1], max_norm=1e-3)
    assert distance(state_of(model, wrapper), state_of(theirs, other)) < 1e-5


def test_a_norm_or_a_callback_that_cannot_be_right_is_refused():
    """A norm of 0 misses a nan, one of 10 overflows; ``ReduceLROnPlateau.step`` needs a metric."""
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    for norm_type in (0, 10):
        with pytest.raises(ValueError, match=r"norm_type must be 1, 2 or math\.inf"):
            train_step(optimizer, norm_type=norm_type)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(TypeError, match="ReduceLROnPlateau"):
        train_step(optimizer, after=plateau.step)


def test_an_optimizer_that_steps_within_backward_is_refused():
    """It would see gradients that are scaled, and a part of the window."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = model[0].weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"hooks.*`handle.remove\(\)`"):
        step(BATCHES[0])
    assert torch.equal(model[0].weight, before)
    handle.remove()
    assert step.last(BATCHES[0]).updated


# Accumulation


def test_a_micro_batch_whose_tokens_are_all_masked():
    """Cross-entropy of nothing is nan, also times 0; the sum over max(count, 1) is always right."""
    torch.manual_seed(0)
    model = nn.Linear(3, 5, dtype=torch.float64)
    rows = [(torch.randn(6, 3, dtype=torch.float64), torch.randint(5, (6,))) for _ in range(3)]
    rows[1][1][:] = -100
    rows[2][1][:4] = -100

    def step(x, y):
        count = (y != -100).sum()
        yield F.cross_entropy(model(x), y, reduction="sum") / count.clamp(min=1), count
        found.extend(gradients_of(model))

    found = []
    step = accumulate(3, model)(step)
    for batch in rows:
        result = step(*batch)
    x, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert result.complete and distance(found, gradients_of(model)) < 1e-12
    assert F.cross_entropy(model(rows[1][0]), rows[1][1]).isnan()


def test_continue_before_the_step():
    """A batch left out counts nothing. If it is the last one, a warning says the window is open."""
    model = make_model()
    step = train_step(torch.optim.SGD(model.parameters()), accumulate(2))(
        lambda batch: loss_of(model, batch)
    )
    for i, batch in enumerate(step.over(BATCHES * 2)):
        if i == 1:
            continue
        step(batch)
    assert step.updates == 3
    with pytest.warns(UserWarning, match=r"2 micro-batch.*`step.discard\(\)`"):
        step = train_step(torch.optim.SGD(model.parameters()), accumulate(3))(
            lambda batch: loss_of(model, batch)
        )
        for i, batch in enumerate(step.over(BATCHES)):
            if i < 2:
                step(batch)


def test_a_loader_whose_length_lies():
    """Too small a length ends a window early; too large a one leaves it open, with a warning."""

    class Loader(list):
        def __len__(self):
            return self.says

    for says, updates, warned in ((2, 2, 0), (3, 1, 0), (9, 0, 1)):
        loader = Loader(BATCHES)
        loader.says = says
        model = make_model()
        step = train_step(torch.optim.SGD(model.parameters()), accumulate(4))(
            lambda batch, m=model: loss_of(m, batch)
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in step.over(loader):
                step(batch)
        assert (step.updates, len(caught)) == (updates, warned)


def test_an_empty_loader_and_one_shorter_than_a_window():
    model, theirs = make_model(), make_model()
    step = train_step(torch.optim.SGD(model.parameters(), lr=0.1), accumulate(8))(
        lambda batch: loss_of(model, batch)
    )
    for loader in ([], iter([]), BATCHES[:2], iter(BATCHES[:2])):
        for batch in step.over(loader):
            step(batch)
    plain_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), BATCHES[:2] * 2, 2)
    assert step.updates == 2 and same_bits(list(model.parameters()), list(theirs.parameters()))


def test_over_nests():
    """The inner loop closes the windows of its step; then both loops go on where they were."""
    model, other = make_model(), make_model()
    step = train_step(torch.optim.SGD(model.parameters()), accumulate(9))(
        lambda batch: loss_of(model, batch)
    )
    inner = train_step(torch.optim.SGD(other.parameters()), accumulate(9))(
        lambda batch: loss_of(other, batch)
    )
    for batch in step.over(BATCHES):
        result = step(batch)
        for again in inner.over(BATCHES[:2]):
            inner(again)
    assert (result.complete, step.updates, inner.updates) == (True, 1, 3)
    for batch in step.over(BATCHES):  # the same step in both: the inner loop has its own end
        step(batch)
        for again in step.over(BATCHES[:1]):
            assert step(again).complete
    assert step.updates == 1 + 4


# Freezing


def test_reentrant_checkpointing_under_a_frozen_stem():
    """It gives no gradients (transformers#21381) and a warning. The other kind gives all."""
    gradients = []
    for reentrant in (True, False, None):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 4),
            nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
            nn.Linear(4, 1),
        )
        freeze(model, "[0]")
        step = train_step(
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        )

        @step
        def step(x, model=model, reentrant=reentrant):
            hidden = model[0](x)
            hidden = (
                model[1](hidden)
                if reentrant is None
                else checkpoint(model[1], hidden, use_reentrant=reentrant)
            )
            yield model[2](hidden).mean()
            gradients.append(gradients_of(model))

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(torch.ones(2, 4))
        said = [str(w.message) for w in caught if "use_reentrant=False" in str(w.message)]
        assert len(said) == bool(reentrant)
        if reentrant:
            assert said[0].startswith("only 2 of 6 trainable parameters received a gradient")
            model[2].requires_grad_(False)
            with (
                pytest.raises(ValueError, match=r"no graph.*frozen"),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                step(torch.ones(2, 4))
    assert same_bits(gradients[1], gradients[2])


# Several ranks


def resume_with_batch_norm(rank, ranks, path):
    """Each rank sees other batches, so its statistics are its own."""
    found = []
    for stop in (2, 3):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = train_step(optimizer, module=model)(lambda x, m=model: m(x).square().mean())
        with resumable(path, model=model, optimizer=optimizer, step=step) as resumed:
            found.append(model.module[1].running_mean.clone())  # as resumed
            for epoch in resumed.epochs(stop):
                step(torch.full((4, 3), rank + epoch + 1.0) + torch.rand(4, 3))
            found.append(model.module[1].running_mean.clone())  # as saved
    return found


def test_every_rank_resumes_with_its_own_batch_norm_statistics(tmp_path):
    (_, saved, resumed, _), (_, other_saved, other_resumed, _) = run(
        resume_with_batch_norm, 2, tmp_path
    )
    assert torch.equal(saved, resumed) and torch.equal(other_saved, other_resumed)
    assert not torch.equal(saved, other_saved)


# The document


def test_every_hazard_in_the_document_has_its_test():
    text = (ROOT / "docs" / "hazards.md").read_text()
    rows = re.findall(r"^\| (?!elsewhere).*\|$", text, re.MULTILINE)
    linked = [re.findall(r"\[test\]\(\.\./([\w/]+\.py)#(\w+)\)", row) for row in rows]
    assert len(rows) > 50 and all(linked)
    for file, test in itertools.chain(*linked):
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}: {test}"
    here = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.MULTILINE))
    named = {test for _, test in itertools.chain(*linked)}
    assert here - named == {"test_every_hazard_in_the_document_has_its_test"}
