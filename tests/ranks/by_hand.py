"""Checks of sums, windows without a length, ``close()`` and ``updates=N`` on 1, 2 and 4 ranks."""

import copy
import itertools
import math
import warnings
from itertools import chain

import pytest
import torch
from on_ranks import same_everywhere, whole, wrapped
from oracles import distance, loss_of, make_batches, make_model
from torch.distributed.fsdp import FullyShardedDataParallel

from trainkit import accumulate, amp, frozen, train_step


def oracle(windows, is_sum=False, weighted=False, max_norm=math.inf, model=None):
    """One process: a window is the sum of its losses, or their mean. Returns norms as well."""
    model, norms = make_model() if model is None else model, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for window in windows:
        weights = [len(batch[0]) if weighted else 1 for batch in window]
        for batch, weight in zip(window, weights, strict=True):
            loss = loss_of(model, batch)
            (loss if is_sum else loss * weight / sum(weights)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        optimizer.step()
        optimizer.zero_grad()
    return [*norms, *model.parameters()]


def batches_of(rank, n):
    """As many as given, of other sizes on every rank."""
    return make_batches([2 + (rank + i) % 3 for i in range(n)], seed=rank)


def windows_of(ranks, counts, split):
    """Windows of all ranks. ``split`` cuts the batches of one rank, whose number is in counts."""
    windows = [split(batches_of(rank, counts[rank])) for rank in range(ranks)]
    return [list(chain(*parts)) for parts in itertools.zip_longest(*windows, fillvalue=())]


def by(*sizes):
    """Cut into windows of these sizes, the last of which may be short."""
    ends = list(itertools.accumulate(sizes))
    return lambda batches: [batches[end - n : end] for n, end in zip(sizes, ends, strict=True)]


class Trained:
    """A model of this rank and its step, compared with one process."""

    def __init__(self, ranks, how, *parts, weighted=False, max_norm=None, **options):
        self.base, self.norms = make_model(), []
        self.model = wrapped(self.base, how, ranks)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.step = train_step(optimizer, *parts, module=self.model, max_norm=max_norm, **options)(
            lambda batch: (
                (loss_of(self.model, batch), len(batch[0]))
                if weighted
                else loss_of(self.model, batch)
            )
        )

    def see(self, result):
        if result.complete and result.grad_norm is not None:
            self.norms.append(result.grad_norm)

    def found(self):
        return [*self.norms, *whole(self.base)]


def a_window_is_the_sum_over_all_ranks(rank, ranks, how):
    """Also a short last one, on ranks that have fewer batches, and with clipping of the sum."""
    counts = [7, 4, 7, 5]
    for max_norm in (None, 0.5):
        part = accumulate(3, reduction="sum")
        mine = Trained(ranks, how, part, max_norm=max_norm)
        for batch in mine.step.over(batches_of(rank, counts[rank])):
            mine.see(mine.step(batch))
        windows = windows_of(ranks, counts, by(3, 3, 3))
        theirs = oracle(windows, is_sum=True, max_norm=max_norm or math.inf)
        assert distance(mine.found(), theirs[0 if max_norm else len(windows) :]) <= 1e-12
    with pytest.raises(TypeError, match=r"reduction='sum'.*`return loss`"):
        Trained(ranks, how, part, weighted=True).step(batches_of(rank, 1)[0])


def a_sum_has_its_loss_scale_taken_out(rank, ranks, how):
    """And it survives an overflow on the last rank, which all skip."""
    base = make_model(torch.float32)
    model = wrapped(base, how, ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    parts = accumulate(2, reduction="sum"), amp(dtype=torch.float16)
    step = train_step(optimizer, *parts, module=model, max_norm=0.5)(
        lambda batch, factor: loss_of(model, batch) * factor
    )
    batches, updated = make_batches([3] * 6, torch.float32, seed=rank), []
    for i, batch in enumerate(batches):
        factor = math.inf if (rank, i) == (ranks - 1, 2) else 1.0
        result = step(batch, factor)
        updated.append(result.updated)
    assert updated == [False, True, False, False, False, True]
    theirs = make_model(torch.float32)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    for i in (0, 4):
        for other in range(ranks):
            for batch in make_batches([3] * 6, torch.float32, seed=other)[i : i + 2]:
                with torch.autocast("cpu", torch.float16):
                    loss = loss_of(theirs, batch)
                loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert abs(result.grad_norm / norm - 1) < 1e-2
    assert distance(whole(base), list(theirs.parameters())) < 1e-3
    same_everywhere(whole(base))


def windows_without_a_length_end_with_the_loop_and_with_last(rank, ranks, how):
    """Nothing is read ahead to find out where they end."""
    counts = [5, 3, 4, 5]
    for weighted in (False, True):
        mine, read = Trained(ranks, how, accumulate(None), weighted=weighted), []

        class Loader(list):
            def __iter__(self, read=read):
                return (read.append(batch) or batch for batch in list.__iter__(self))

        for i, batch in enumerate(mine.step.over(Loader(batches_of(rank, counts[rank])))):
            assert len(read) <= i + 2
            (mine.step.last if i == 1 else mine.step)(batch)
        windows = windows_of(ranks, counts, by(2, 9))
        assert mine.step.updates == 2
        assert distance(mine.found(), oracle(windows, weighted=weighted)[2:]) <= 1e-12


def a_repeated_batch_counts_nothing_in_a_window_that_last_closes(rank, ranks, how):
    counts = [4, 1, 4, 4]
    for weighted in (False, True):
        mine = Trained(ranks, how, accumulate(4), weighted=weighted)
        for batch in mine.step.over(batches_of(rank, counts[rank])):
            mine.step.last(batch)
        windows = windows_of(ranks, counts, by(1, 1, 1, 1))
        assert distance(mine.found(), oracle(windows, weighted=weighted)[4:]) <= 1e-12


def an_open_window_is_closed_by_hand(rank, ranks, how):
    """The windows of ranks may have other lengths, and be empty, where forwards are not joint."""
    shapes = [[2, 3], [3, 0], [1, 2], [2, 1]] if how == "ddp" else [[2, 3]] * 4
    for is_sum, weighted, max_norm in (
        (False, False, None), (False, True, 0.1), (True, False, 0.1),
    ):  # fmt: skip
        part = accumulate(None, reduction="sum") if is_sum else accumulate(None)
        mine = Trained(ranks, how, part, weighted=weighted, max_norm=max_norm)
        assert not mine.step.close().complete
        for window in by(*shapes[rank])(batches_of(rank, sum(shapes[rank]))):
            for batch in window:
                assert not mine.step(batch).complete
            result = mine.step.close()
            assert result.complete and result.updated
            assert bool(result.window_loss.isnan()) is (not window and not is_sum)
            mine.see(result)
            assert not mine.step.close().complete
        parts = [by(*shape)(batches_of(r, sum(shape))) for r, shape in enumerate(shapes[:ranks])]
        windows = [list(chain(*window)) for window in zip(*parts, strict=True)]
        theirs = oracle(windows, is_sum, weighted, max_norm or math.inf)
        assert distance(mine.found(), theirs[0 if max_norm else 2 :]) <= 1e-12
        same_everywhere(whole(mine.base))
    assert mine.step.updates == 2 and "window" not in mine.step.state_dict()


def what_is_frozen_when_a_window_is_closed_stays(rank, ranks, how):
    if how == "ddp":
        return
    mine = Trained(ranks, how, accumulate(None))
    before = whole(mine.base)
    mine.step(batches_of(rank, 1)[0])
    with frozen(mine.base, "[0]"):
        mine.step.close()
    assert distance(before[:2], whole(mine.base)[:2]) == 0
    assert distance(before[2:], whole(mine.base)[2:]) > 0


def parameters_that_one_rank_has_used_get_a_gradient_on_all(rank, ranks, how):
    """Without ``find_unused_parameters`` a backward would wait for the others."""
    if how == "fsdp2":
        return
    base = torch.nn.ModuleList([make_model(), make_model(), make_model()])
    theirs = copy.deepcopy(base)
    model = wrapped(Picked(base), how, ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = train_step(optimizer, accumulate(None), module=model)(
        lambda batch: torch.nn.functional.mse_loss(model(batch[0], rank % 2), batch[1])
    )
    for batch in batches_of(rank, 2):
        step(batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "only .* received a gradient")
        assert step.close().updated
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    for other in range(ranks):
        for batch in batches_of(other, 2):
            (loss_of(theirs[other % 2], batch) / (2 * ranks)).backward()
    optimizer.step()
    assert distance(list(base.parameters()), list(theirs.parameters())) <= 1e-12
    same_everywhere(list(base.parameters()))


class Picked(torch.nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, x, i):
        return self.parts[i](x)


def what_cannot_be_reduced_is_refused_and_the_window_stays(rank, ranks, how):
    if ranks == 1 or how == "fsdp2":
        return
    embedding = torch.nn.Embedding(5, 4, sparse=True)
    plain = torch.nn.Sequential(embedding, torch.nn.Linear(4, 1)).double()
    rows = torch.tensor([0, rank])
    for base in (plain, copy.deepcopy(plain)):
        if base is plain:
            model = wrapped(base, how, ranks)
        else:
            base[0].sparse = False
            model = FullyShardedDataParallel(base, device_id=torch.device("cpu"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = train_step(optimizer, accumulate(None), module=model)(
            lambda rows, model=model: model(rows).square().mean()
        )
        step(rows)
        with pytest.raises(RuntimeError, match=r"`step.last\(batch\)`"):
            step.close()
        result = step.last(rows)
        assert result.updated and len(step.state_dict()) == 2


def a_window_that_closes_late_makes_no_update(rank, ranks, how):
    """It ran as an open one, so its gradients were not reduced."""
    if ranks == 1:
        return
    mine = Trained(ranks, how, accumulate(3))
    before, batches = whole(mine.base), iter(mine.step.over(batches_of(0, 2)))
    batch = next(batches)
    late = pytest.raises(RuntimeError, match=r"not reduced over ranks.*`next\(loader\)`")
    with late, mine.step:
        mine.step.backward(loss_of(mine.model, batch))
        batch = next(batches)
    assert "window" not in mine.step.state_dict()
    batches.close()
    assert distance(before, whole(mine.base)) == 0
    for batch in batches_of(rank, 3):
        result = mine.step(batch)
    assert result.updated
    same_everywhere(whole(mine.base))


def a_wrapper_that_the_last_micro_batch_did_not_call_makes_no_update(rank, ranks, how):
    if ranks == 1 or how == "fsdp2":
        return
    mine = Trained(ranks, how, accumulate(2))
    with mine.step:
        mine.step.backward(loss_of(mine.model, batches_of(rank, 1)[0]))
    with pytest.raises(RuntimeError, match="not reduced over ranks"), mine.step:
        mine.step.backward(loss_of(mine.base, batches_of(rank, 1)[0]))
    same_everywhere(whole(mine.base))


def a_loop_of_updates_passes_over_loaders_of_other_lengths(rank, ranks, how):
    """Each rank begins its passes on its own, and all close as many windows."""
    counts = [5, 2, 1, 4]
    mine = Trained(ranks, how, accumulate(2), weighted=True)
    for batch in mine.step.over(batches_of(rank, counts[rank]), updates=4):
        mine.step(batch)
    endless = [itertools.cycle(batches_of(other, counts[other])) for other in range(ranks)]
    windows = [[next(it) for it in endless for _ in range(2)] for _ in range(4)]
    assert mine.step.updates == 4
    assert distance(mine.found(), oracle(windows, weighted=True)[4:]) <= 1e-12

    mine = Trained(ranks, how, accumulate(None))
    for i, batch in enumerate(mine.step.over(iter(batches_of(rank, 9 + rank)), updates=3)):
        mine.step(batch)
        if i in (1, 2, 5):
            mine.step.close()
    windows = windows_of(ranks, [9, 10, 11, 12], by(2, 1, 3))
    assert mine.step.updates == 3
    assert distance(mine.found(), oracle(windows)[3:]) <= 1e-12


def a_rank_that_has_no_batch_left_is_an_error_on_all(rank, ranks, how):
    for n in (0, 3):
        mine = Trained(ranks, how, accumulate(2))
        batches = batches_of(rank, n) if rank == 0 else batches_of(rank, 9)
        with pytest.raises(ValueError, match=r"`step.over\(list\(loader\), updates=N\)`"):
            for batch in mine.step.over(iter(batches), updates=4):
                mine.step(batch)
        same_everywhere(whole(mine.base))


CHECKS = [
    a_window_is_the_sum_over_all_ranks,
    a_sum_has_its_loss_scale_taken_out,
    windows_without_a_length_end_with_the_loop_and_with_last,
    a_repeated_batch_counts_nothing_in_a_window_that_last_closes,
    an_open_window_is_closed_by_hand,
    what_is_frozen_when_a_window_is_closed_stays,
    parameters_that_one_rank_has_used_get_a_gradient_on_all,
    what_cannot_be_reduced_is_refused_and_the_window_stays,
    a_window_that_closes_late_makes_no_update,
    a_wrapper_that_the_last_micro_batch_did_not_call_makes_no_update,
    a_loop_of_updates_passes_over_loaders_of_other_lengths,
    a_rank_that_has_no_batch_left_is_an_error_on_all,
]
