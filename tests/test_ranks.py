"""The laws over several ranks: as one process with everything that they have."""

import functools
import itertools
import math

import pytest
import torch
from oracles import distance, loss_of, make_batches, make_model
from ranks import run
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trainkit import accumulate, amp, train_step

N, SCENARIOS = 3, list(itertools.product(["ddp", "fsdp2"], [False, True], [None, 0.05]))


def batches_of(rank):
    """Ragged micro-batches, of other sizes on every rank; rank 1 has three fewer, so that a window of it is empty."""
    sizes = [[4, 4, 2, 5, 1, 3, 4, 2, 6, 3, 2], [1, 2, 3, 4, 5, 6, 7, 1], [3] * 10, [2, 5] * 5][rank]
    return make_batches(sizes, seed=rank)


def wrapped(model, how, ranks):
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (ranks,))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model):
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def expected(ranks, weighted, max_norm):
    """One process, every window one mean over what all ranks have in it."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loaders = [batches_of(rank) for rank in range(ranks)]
    for start in range(0, max(map(len, loaders)), N):
        window = [batch for loader in loaders for batch in loader[start : start + N]]
        weights = [len(x) if weighted else 1 for x, _ in window]
        for batch, weight in zip(window, weights, strict=True):
            (loss_of(model, batch) * weight / sum(weights)).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters())


def weighted_loss(model, batch):
    return loss_of(model, batch), len(batch[0])


def trained(rank, ranks, how, weighted, max_norm):
    base = make_model()
    model = wrapped(base, how, ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    function = functools.partial(weighted_loss if weighted else loss_of, model)
    step = train_step(optimizer, accumulate(N), module=model, max_norm=max_norm)(function)
    for batch in step.over(batches_of(rank)):
        step(batch)
    return step.updates, whole(base)


def all_scenarios(rank, ranks):
    return {scenario: trained(rank, ranks, *scenario) for scenario in SCENARIOS}


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_train_as_one_process_with_all_they_have(ranks):
    answers = run(all_scenarios, ranks)
    for scenario in SCENARIOS:
        reference = expected(ranks, *scenario[1:])
        for answer in answers:
            updates, parameters = answer[scenario]
            assert updates == 4
            assert distance(parameters, reference) <= 1e-12, scenario


def made(ranks, how, dtype=torch.float64, fused=False):
    base = make_model(dtype)
    model = wrapped(base, how, ranks)
    return base, model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)


def same_everywhere(parameters):
    for parameter in parameters:
        everyone = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, parameter.contiguous())
        assert all(torch.equal(other, parameter) for other in everyone)


def an_overflow_on_one_rank_skips_the_update_on_all(rank, ranks, how):
    for fused in (False, True):
        base, model, optimizer = made(ranks, how, torch.float32, fused)

        @train_step(optimizer, accumulate(2), amp(dtype=torch.float16), module=model, max_norm=0.1)
        def step(batch, factor, model=model):
            return loss_of(model, batch) * factor

        skipped, scales = [], []
        for i, batch in enumerate(make_batches([3] * 8, torch.float32, seed=rank)):
            result = step(batch, math.inf if (rank, i) == (1, 2) else 1.0)
            if result.complete:
                skipped.append(not result.updated)
                scales.append(step.state_dict()["loss_scale"])
        assert skipped == [False, True, False, False], skipped
        assert scales == [65536.0, 32768.0, 32768.0, 32768.0]
        same_everywhere(whole(base))


def windows_closed_by_hand_may_have_another_length_on_every_rank(rank, ranks, how):
    for weighted in (False, True):
        base, model, optimizer = made(ranks, how)
        step = train_step(optimizer, accumulate(4), module=model)(
            functools.partial(weighted_loss if weighted else loss_of, model)
        )
        # Under FSDP2 every forward gathers parameters, so that there ranks take as many micro-batches each.
        counts = [2 - (how == "ddp" and other) for other in range(ranks)]
        parts = [make_batches([4 + other, 2], seed=other)[: counts[other]] for other in range(ranks)]
        for batch in parts[rank][:-1]:
            step(batch)
        assert step.last(parts[rank][-1]).updated

        expected = make_model()
        theirs = torch.optim.AdamW(expected.parameters(), lr=0.01)
        window = [batch for part in parts for batch in part]
        weights = [len(x) if weighted else 1 for x, _ in window]
        sum(loss_of(expected, b) * w / sum(weights) for b, w in zip(window, weights, strict=True)).backward()
        theirs.step()
        assert distance(whole(base), list(expected.parameters())) <= 1e-12


def a_window_that_is_dropped_leaves_nothing_behind(rank, ranks, how):
    base, model, optimizer = made(ranks, how)
    step = train_step(optimizer, accumulate(2), module=model)(lambda batch, factor=1: loss_of(model, batch) * factor)
    batches = make_batches([4, 4, 4], seed=rank)
    step(batches[0], 1e6)
    if how == "fsdp2":
        with pytest.raises(RuntimeError, match="under FSDP2, which keeps its gradients to itself"):
            step.state_dict()
    step.discard()
    assert not step.state_dict().get("window")
    for batch in batches[1:]:
        step(batch)
    expected, again, theirs = made(ranks, how)
    other = train_step(theirs, accumulate(2), module=again)(lambda batch: loss_of(again, batch))
    for batch in batches[1:]:
        other(batch)
    assert distance(whole(base), whole(expected)) == 0


def wrappers_are_left_as_they_were_found(rank, ranks, how):
    _, model, optimizer = made(ranks, how)

    def flags():
        if how == "ddp":
            return [model.require_backward_grad_sync]
        states = [part._get_fsdp_state() for part in (model, model[0])]
        groups = [group for state in states for group in state._fsdp_param_groups]
        return [group.reduce_grads for group in groups] + [state._state_ctx.is_last_backward for state in states]

    found = flags()
    assert all(found)
    inside = []

    @train_step(optimizer, accumulate(2), module=model)
    def step(batch, error=False):
        inside.append(any(flags()))
        if error:
            raise KeyError
        return loss_of(model, batch)

    batches = make_batches([4, 4], seed=rank)
    with pytest.raises(KeyError):
        step(batches[0], error=True)
    assert flags() == found
    for batch in batches:
        step(batch)
        assert flags() == found
    assert inside == [False, False, True]


def gradients_are_reduced_once_in_a_window(rank, ranks, how):
    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    counted = dict.fromkeys(["all_reduce", scatter, "buckets"], 0)

    def counting(name, function):
        @functools.wraps(function)
        def count(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", scatter):
            patch.setattr(dist, name, counting(name, getattr(dist, name)))
        for weighted in (False, True):
            counted.update(dict.fromkeys(counted, 0))
            _, model, optimizer = made(ranks, how)
            if how == "ddp":
                model.register_comm_hook(None, counting("buckets", default_hooks.allreduce_hook))
            function = functools.partial(weighted_loss if weighted else loss_of, model)
            step = train_step(optimizer, accumulate(3), module=model)(function)
            for i, batch in enumerate(make_batches([3] * 9, seed=rank)):
                step(batch)
                windows = (i + 1) // 3
                scalars = (windows + 1) * weighted  # of the first window of all, its first weight too
                # The hook that counts buckets reduces them in the same way.
                assert counted["all_reduce"] == scalars + counted["buckets"], (i, counted)
                assert counted["buckets"] == (windows if how == "ddp" else 0), (i, counted)
                assert counted[scatter] == (2 * windows if how == "fsdp2" else 0), (i, counted)


def without_a_wrapper_it_is_an_error(rank, ranks, how):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for module in (None, model):
        step = train_step(optimizer, module=module)(lambda batch: loss_of(model, batch))
        with pytest.raises(ValueError, match="2 ranks run, and would each train a model of their own"):
            step(make_batches([3])[0])


CHECKS = [
    an_overflow_on_one_rank_skips_the_update_on_all,
    windows_closed_by_hand_may_have_another_length_on_every_rank,
    a_window_that_is_dropped_leaves_nothing_behind,
    wrappers_are_left_as_they_were_found,
    gradients_are_reduced_once_in_a_window,
    without_a_wrapper_it_is_an_error,
]


def all_checks(rank, ranks):
    for check in CHECKS:
        for how in ("ddp", "fsdp2"):
            check(rank, ranks, how)


def test_what_ranks_do_together():
    """One start of two ranks for all of ``CHECKS``; the traceback names the one that fails."""
    run(all_checks, 2)
