"""Several ranks train like one process with everything that they have.

Starting processes takes seconds: two starts, of two ranks and of four, run everything.
"""

import contextlib
import copy
import functools
import itertools
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from by_hand import CHECKS as BY_HAND
from launch import SECONDS, run
from on_ranks import (
    SCATTER,
    WINDOWS,
    N,
    batches_of,
    counted_collectives,
    expected,
    loss_function,
    made,
    reference,
    same_everywhere,
    whole,
    windows_over,
    wrapped,
)
from oracles import distance, loss_of, make_batches, make_model
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from trainkit import accumulate, amp, freeze, frozen, microbatch, resumable, train_step

ROOT = Path(__file__).parents[2]
SCENARIOS = list(itertools.product(["ddp", "fsdp2"], [False, True], [None, 0.05]))


def train(rank, base, model, optimizer, weighted, max_norm, windows=WINDOWS):
    step = train_step(optimizer, accumulate(N), module=model, max_norm=max_norm)
    step = step(loss_function(model, weighted))
    for batch in step.over(batches_of(rank)[: windows * N]):
        step(batch)
    return step.updates, whole(base)


def trained(rank, ranks):
    return {
        (how, weighted, max_norm): train(rank, *made(ranks, how), weighted, max_norm)
        for how, weighted, max_norm in SCENARIOS
    }


def trained_in_groups(rank, ranks):
    """Two trainings of two ranks each. The second is over long before the first."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("training", "rank"))["rank"]
    windows = 2 if rank >= 2 else WINDOWS
    models = [made(2, how, mesh=mesh) for how in ("ddp", "fsdp2")]
    return [train(rank % 2, *model, True, 0.05, windows) for model in models]


def prepared_by_others(rank, ranks):
    """Modules in which other libraries have hidden DistributedDataParallel or FSDP2."""
    try:
        from accelerate import Accelerator
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
    except ImportError:
        return []

    def fabric(strategy):
        found = Fabric(accelerator="cpu", devices=ranks, strategy=strategy)
        found.launch()
        return found.setup_module

    def shard(model, mesh):
        return fully_shard(model, mesh=mesh["data_parallel"])

    sharded = ModelParallelStrategy(shard, data_parallel_size=ranks, tensor_parallel_size=1)
    answers = []
    for prepare in (Accelerator(cpu=True).prepare, fabric(DDPStrategy()), fabric(sharded)):
        base = make_model()
        model = prepare(base)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        answers.append(train(rank, base, model, optimizer, True, 0.05))
    return answers


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
        step = train_step(optimizer, amp(dtype=torch.float16), module=model, max_skips=2)
        for error in (nullcontext(), pytest.raises(FloatingPointError, match=r"^2 updates")):
            with error, step:
                step.backward(loss_of(model, batch) * (math.nan if rank == 1 else 1.0))


def windows_closed_by_last_may_have_another_length_on_every_rank(rank, ranks, how):
    for weighted in (False, True):
        base, model, optimizer = made(ranks, how)
        step = train_step(optimizer, accumulate(4), module=model)(loss_function(model, weighted))
        # Under FSDP2 every forward gathers parameters, so all ranks take as many micro-batches.
        parts = [
            make_batches([4, 2] if how == "fsdp2" else [[4, 2], [5]][r], seed=r) for r in (0, 1)
        ]
        for batch in parts[rank][:-1]:
            step(batch)
        assert step.last(parts[rank][-1]).updated
        theirs = reference([[batch for part in parts for batch in part]], weighted)
        assert distance(whole(base), theirs) <= 1e-12


def what_others_do_between_micro_batches_changes_nothing(rank, ranks, how):
    """A zero_grad, another backward, an evaluation, another step over the same parameters."""
    base, model, optimizer = made(ranks, how)
    step = train_step(optimizer, accumulate(N), module=model)(loss_function(model, True))
    other = train_step(optimizer, accumulate(99), module=model)(loss_function(model, False))
    for batch in step.over(batches_of(rank)):
        step(batch)
        optimizer.zero_grad(set_to_none=rank == 0)
        loss_of(model, batch).backward()
        other(batch)
        with torch.no_grad():
            model(batch[0])
    assert distance(whole(base), expected(ranks, True, None)) <= 1e-12
    other.discard()


def a_window_that_is_dropped_leaves_nothing_behind(rank, ranks, how):
    """Neither a discarded one, nor one whose backward failed."""

    def trained(undisturbed):
        base, model, optimizer = made(ranks, how)

        @train_step(optimizer, accumulate(2), module=model)
        def step(batch, factor=1, error=False):
            if error:  # in the middle of backward
                fail = base[1].register_forward_hook(
                    lambda module, inputs, output: output.register_hook(lambda _: 1 / 0) and None
                )
            loss = loss_of(model, batch) * factor
            if error:
                fail.remove()
            return loss

        batches = make_batches([4] * 4, seed=rank)
        if not undisturbed:
            step(batches[0], 1e6)
            if how == "fsdp2":
                with pytest.raises(RuntimeError, match=r"FSDP.*`step\.close\(\)`"):
                    step.state_dict()
            step.discard()
            assert "window" not in step.state_dict()
            with pytest.raises(ZeroDivisionError):
                step(batches[0], error=True)
        for batch in batches:
            step(batch)
        assert step.updates == 2
        return whole(base)

    assert distance(trained(False), trained(True)) == 0


def groups_of_state(state):
    has_several = hasattr(state, "_fsdp_param_groups")  # older versions of torch have one
    return state._fsdp_param_groups if has_several else [state._fsdp_param_group]


def wrappers_are_left_as_they_were_found(rank, ranks, how):
    _, model, optimizer = made(ranks, how)

    def flags():
        if how == "ddp":
            return [model.require_backward_grad_sync]
        states = [part._get_fsdp_state() for part in (model, model[0])]
        groups = [g for state in states for g in groups_of_state(state)]
        found = [group.reduce_grads for group in groups]
        return found + [state._state_ctx.is_last_backward for state in states]

    found, inside = flags(), []
    assert all(found)

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
    """And the weights once, before the backward that they are hidden behind."""
    for weighted in (False, True):
        _, model, optimizer = made(ranks, how)
        if how == "ddp":  # the same in Python, where it is counted
            model.register_comm_hook(None, default_hooks.allreduce_hook)
        begun = []  # the collectives when a backward begins

        @train_step(optimizer, accumulate(3), module=model)
        def step(batch, model=model, weighted=weighted, begun=begun):
            loss = loss_of(model, batch)
            loss.register_hook(lambda gradient: begun.append(counted["all_reduce"]))
            return (loss, len(batch[0])) if weighted else loss

        with counted_collectives() as counted:
            for i, batch in enumerate(make_batches([3] * 9, seed=rank)):
                step(batch)
                windows = (i + 1) // 3
                numbers = (windows + 1) * weighted  # and the first weight of all
                assert begun[i] == numbers + (i // 3) * (how == "ddp")
                assert counted["all_reduce"] == numbers + windows * (how == "ddp")
                assert counted[SCATTER] == 2 * windows * (how == "fsdp2")


def frozen_layers_stay_and_are_not_reduced(rank, ranks, how):
    base = make_model()
    if how == "ddp":
        freeze(base, "[0]")
    model = wrapped(base, how, ranks)
    parts = [] if how == "ddp" else [frozen(model, "[0]")]
    before = whole(base)[:2]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = train_step(optimizer, *parts, module=model)(loss_function(model, False))
    with counted_collectives() as counted:
        for batch in make_batches([3] * 2, seed=rank):
            step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, whole(base)[:2], strict=True))
    assert counted[SCATTER] == 2 * (how == "fsdp2")  # once in an update, not for the layer below
    theirs = make_model()
    freeze(theirs, "[0]")
    windows = windows_over([make_batches([3] * 2, seed=other) for other in range(ranks)], 1)
    assert distance(whole(base), reference(windows, model=theirs)) <= 1e-12


def an_open_window_keeps_the_sums_of_layers_while_they_are_frozen(rank, ranks, how):
    """FSDP2 would reduce its hidden sums in any backward through the module."""
    base, model, optimizer = made(ranks, how)
    gain = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    step = train_step(optimizer, accumulate(3), module=model)(loss_function(model, False))
    through = train_step(torch.optim.SGD([gain], lr=0.1), frozen(base), module=model)(
        lambda x: model(x * gain).square().mean()
    )
    for batch in make_batches([4] * 3, seed=rank):
        step(batch)
        through(batch[0])
    windows = windows_over([make_batches([4] * 3, seed=other) for other in range(ranks)])
    assert distance(whole(base), reference(windows)) <= 1e-12
    if how == "fsdp2":  # what is frozen when the window closes stays, and its sums are dropped
        before = whole(base)[:2]
        for batch, layers in zip(make_batches([4] * 3, seed=rank), [[], [], "[0]"], strict=True):
            with frozen(base, layers):
                step(batch)
        assert distance(before, whole(base)[:2]) == 0
        assert distance(whole(base)[2:], reference(windows)[2:]) > 1e-6
        step.state_dict()


def fsdp1_is_refused_where_a_norm_is_asked(rank, ranks, how):
    """It leaves each rank a part of the gradients. Without a norm it is right."""
    if how == "fsdp2":
        return
    base = make_model()
    model = FullyShardedDataParallel(base, device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batches = make_batches([3] * 4, seed=rank)
    with pytest.raises(ValueError, match="`fully_shard"):
        train_step(optimizer, module=model, max_norm=1.0)(loss_function(model, False))(batches[0])
    step = train_step(optimizer, accumulate(2), module=model)(loss_function(model, True))
    for batch in batches:
        step(batch)
    windows = windows_over([make_batches([3] * 4, seed=other) for other in range(ranks)], 2)
    with FullyShardedDataParallel.summon_full_params(model):
        assert distance([p.detach() for p in base.parameters()], reference(windows)) <= 1e-12


def without_a_wrapper_it_is_an_error(rank, ranks, how):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for module in (None, model):
        step = train_step(optimizer, module=module)(loss_function(model, False))
        with pytest.raises(ValueError, match=r"2 ranks.*`train_step.*module=ddp_model"):
            step(make_batches([3])[0])


def float32_sums_are_refused(rank, ranks, how):
    _, model, optimizer = made(ranks, how)
    part = accumulate(2, dtype=torch.float32)
    step = train_step(optimizer, part, module=model)(loss_function(model, False))
    with pytest.raises(ValueError, match=r"one process: .*`model.float"):
        step(make_batches([3])[0])


def a_further_loss_that_would_not_be_reduced_is_an_error(rank, ranks, how):
    base, model, optimizer = made(ranks, how)
    batch, other = make_batches([3, 4], seed=rank)
    step = train_step(optimizer, accumulate(2), module=model)
    for closes in (False, True):
        is_refused = closes and how == "ddp"
        error = pytest.raises(RuntimeError, match=r"`step.backward\(loss \+ further\)`")
        with error if is_refused else nullcontext(), step:
            loss, further = loss_of(model, batch), loss_of(model, batch)
            step.backward(loss)
            step.backward(further)
    step = train_step(optimizer, module=model)
    with step:  # a forward between the two
        step.backward(loss_of(model, batch))
        step.backward(loss_of(model, other))
    same_everywhere(whole(base))


def a_state_of_an_open_window_knows_who_was_there(rank, ranks, how):
    if how == "fsdp2":  # it keeps its gradients
        return
    for weighted, sizes in ((False, [6, 1]), (True, [4, 4])):
        states = []
        for interrupted in (False, True):
            base, model, optimizer = made(ranks, how)
            first = [0 if weighted and rank == 0 else 2]

            def function(batch, model=model, weighted=weighted, first=first):
                weight = first.pop() if first else 2
                return (loss_of(model, batch), weight) if weighted else loss_of(model, batch)

            step = train_step(optimizer, accumulate(4), module=model)(function)
            for i, batch in enumerate(step.over(make_batches([3] * sizes[rank], seed=rank))):
                step(batch)
                if interrupted and i == (0 if weighted else 2):
                    step.load_state_dict(step.state_dict())
            states.append(whole(base))
        assert distance(*states) <= 1e-15


def the_largest_gradient_is_that_of_all_ranks(rank, ranks, how):
    """FSDP2 gives a rank nothing of a layer with one row. Comparing loses a nan on one rank."""
    nan = torch.tensor([0.0, 0.0, 0.0, 0.0, math.nan])
    for norm_type, bad in ((1.0, False), (math.inf, False), (math.inf, True)):
        base = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 1)).double()
        theirs = copy.deepcopy(base)
        model = wrapped(base, how, ranks)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = make_batches([3] * ranks)
        step = train_step(optimizer, module=model, max_norm=0.01, norm_type=norm_type)
        with step as result:
            if bad:  # only in the last row of the first layer, which is on the last rank
                base[0].register_forward_hook(
                    lambda *given: given[-1].register_hook(lambda gradient: gradient + nan) and None
                )
            step.backward(model(batches[rank][0]).pow(2).mean())
        if bad:
            assert not result.updated
            continue
        (sum(theirs(x).pow(2).mean() for x, _ in batches) / ranks).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.01, norm_type)
        torch.optim.SGD(theirs.parameters(), lr=0.1).step()
        assert result.updated and abs(result.grad_norm / norm - 1) < 1e-6
        assert distance(whole(base), list(theirs.parameters())) <= 1e-12


def chunks_of_batches_are_reduced_once_in_a_window(rank, ranks, how):
    """Also if memory runs out on one rank, and if another has more chunks."""
    sizes = [[7, 3, 8, 6], [2, 5, 4, 1]]
    for size, weighted in itertools.product((2, "auto") if how == "ddp" else (2,), (False, True)):
        base, model, optimizer = made(ranks, how)
        if how == "ddp":
            model.register_comm_hook(None, default_hooks.allreduce_hook)
        rows, fit = [], 3 if size == "auto" and rank == 0 else 8
        base[2].bias.register_hook(functools.partial(run_out, rows, fit))

        @train_step(optimizer, accumulate(2), microbatch(size), module=model, max_norm=0.05)
        def step(batch, model=model, weighted=weighted, rows=rows):
            rows.append(len(batch[0]))
            return (loss_of(model, batch), len(batch[0])) if weighted else loss_of(model, batch)

        with counted_collectives() as counted, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "memory ran out")
            for batch in step.over(make_batches(sizes[rank], seed=rank)):
                step(batch)
        assert step.updates == 2
        numbers = 3 if weighted else 1  # of the first weight and of windows, of the last window
        assert counted["all_reduce"] == numbers + 2 * (how == "ddp"), counted
        assert counted[SCATTER] == 4 * (how == "fsdp2")
        if size == "auto":
            assert step.chunk_sizes == {7: 3}  # on the other rank, too
        windows = windows_over([make_batches(sizes[other], seed=other) for other in (0, 1)], 2)
        assert distance(whole(base), reference(windows, weighted, 0.05)) <= 1e-12
    if how == "fsdp2":
        _, model, optimizer = made(ranks, how)
        step = train_step(optimizer, microbatch("auto"), module=model)(loss_function(model, False))
        with pytest.raises(ValueError, match=r"`microbatch\(8\)`"):
            step(make_batches([4])[0])


def run_out(rows, fit, *_):
    if rows[-1] > fit:
        raise torch.OutOfMemoryError("of a test")


def memory_may_run_out_after_buffers_were_broadcast(rank, ranks, how):
    """DistributedDataParallel broadcasts before a forward. A rank must not do it again alone."""
    if how == "fsdp2":
        return
    layers = torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)
    base = torch.nn.Sequential(*layers).double()
    model, rows, fit = wrapped(base, how, ranks), [], 3 if rank == 0 else 8

    def note(module, given):
        rows.append(len(given[0]))
        run_out(rows, fit)

    base[0].register_forward_pre_hook(note)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = train_step(optimizer, microbatch("auto"), module=model)(loss_function(model, False))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "memory ran out")
        for batch in make_batches([8, 8], seed=rank):
            step(batch)
            step.chunk_sizes.clear()
    same_everywhere(whole(base))


@contextlib.contextmanager
def path_of_a_run(ranks):
    """Yield a path that all ranks see, and a function that counts the checkpoints there."""

    def count():
        found = len(list(path.iterdir())) if path.exists() else 0
        dist.barrier()
        return found

    with tempfile.TemporaryDirectory() as folder:
        folders = [None] * ranks
        dist.all_gather_object(folders, folder)
        path = Path(folders[0]) / "run"
        yield path, count
        dist.barrier()


def checkpoints_wait_until_the_windows_of_all_steps_are_closed(rank, ranks, how):
    """An open window of a nested loop delays a checkpoint, too."""
    with path_of_a_run(ranks) as (path, count):
        (_, a, optimizer_a), (_, b, optimizer_b) = made(ranks, how), made(ranks, how)
        step_a = train_step(optimizer_a, accumulate(2), module=a)(loss_function(a, False))
        step_b = train_step(optimizer_b, accumulate(3), module=b)(loss_function(b, False))
        objects = {"a": a, "b": b, "optimizer_a": optimizer_a, "optimizer_b": optimizer_b}
        steps, found = {"step_a": step_a, "step_b": step_b}, []
        with resumable(path, every=timedelta(0), keep=99, **objects, **steps):
            for batch in step_a.over(make_batches([3] * 12, seed=rank)):
                found.append(count())
                step_a(batch)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that no batch of it reaches the step
                    assert len(list(step_a.over([batch, batch]))) == 2
                step_b(batch)
        assert found == [0] * 6 + [1] * 6, found


def checkpoints_are_written_wherever_the_windows_end(rank, ranks, how):
    """Not only after every other batch, although the ranks read by twos."""
    with path_of_a_run(ranks) as (path, count):
        _, model, optimizer = made(ranks, how)
        step = train_step(optimizer, accumulate(2), module=model)(loss_function(model, False))
        objects = {"model": model, "optimizer": optimizer, "step": step}
        found, is_fsdp = [], how != "ddp"
        with (
            pytest.raises(RuntimeError, match=r"`step\.close\(\)`") if is_fsdp else nullcontext(),
            resumable(path, every=timedelta(0), keep=99, **objects),
        ):
            for i, batch in enumerate(step.over(make_batches([3] * 6, seed=rank))):
                found.append(count())
                if i > 0:  # as if all ranks had a batch that they leave out
                    step(batch)
            for last in (3, 4):  # a loop is left with an open window, and so is the next one
                for i, batch in enumerate(step.over(make_batches([3] * 6, seed=rank))):
                    found.append(count())
                    if i == last:
                        break
                    step(batch)
        after = [5, 6, 6, 7, 7] if is_fsdp else [6, 7, 7, 8, 8]  # FSDP2's wait for its sums
        assert found == [0, 1, 1, 2, 2, 3, 4, 4, 5, 5, *after], found


def ranks_with_models_of_their_own_share_no_checkpoint(rank, ranks, how):
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("training", "rank"))["rank"]
    _, model, optimizer = made(1, how, mesh=mesh)
    step = train_step(optimizer, module=model)(loss_function(model, False))
    with (
        pytest.raises(ValueError, match=r"of their own .*`DistributedDataParallel\(model\)`"),
        resumable("checkpoints", model=model, optimizer=optimizer, step=step),
    ):
        pass


CHECKS = [
    an_overflow_on_one_rank_skips_the_update_on_all,
    windows_closed_by_last_may_have_another_length_on_every_rank,
    what_others_do_between_micro_batches_changes_nothing,
    a_window_that_is_dropped_leaves_nothing_behind,
    wrappers_are_left_as_they_were_found,
    gradients_are_reduced_once_in_a_window,
    frozen_layers_stay_and_are_not_reduced,
    an_open_window_keeps_the_sums_of_layers_while_they_are_frozen,
    fsdp1_is_refused_where_a_norm_is_asked,
    without_a_wrapper_it_is_an_error,
    float32_sums_are_refused,
    a_further_loss_that_would_not_be_reduced_is_an_error,
    a_state_of_an_open_window_knows_who_was_there,
    the_largest_gradient_is_that_of_all_ranks,
    chunks_of_batches_are_reduced_once_in_a_window,
    memory_may_run_out_after_buffers_were_broadcast,
    checkpoints_wait_until_the_windows_of_all_steps_are_closed,
    checkpoints_are_written_wherever_the_windows_end,
    ranks_with_models_of_their_own_share_no_checkpoint,
]


def everything(rank, ranks):
    for check in BY_HAND if ranks == 4 else [*CHECKS, *BY_HAND]:  # a traceback names what fails
        for how in ("ddp", "fsdp2"):
            check(rank, ranks, how)
    further = {"groups": trained_in_groups} if ranks == 4 else {"prepared": prepared_by_others}
    return {name: answer(rank, ranks) for name, answer in {"trained": trained, **further}.items()}


def one_rank_of_fsdp2(rank, ranks, path):
    """Saves at the end of a window, also what a signal asks for within it."""
    _, model, optimizer = made(ranks, "fsdp2")
    step, updates = (
        train_step(optimizer, accumulate(3), module=model)(loss_function(model, False)),
        [],
    )
    with (
        pytest.raises(SystemExit),
        resumable(path, every=timedelta(0), model=model, optimizer=optimizer, step=step),
    ):
        for i, batch in enumerate(step.over(make_batches([3] * 9))):
            updates.append(len(list(path.iterdir())) if path.exists() else 0)
            if i == 4:
                signal.raise_signal(signal.SIGTERM)
            step(batch)
    return updates


@functools.cache
def answers(ranks):
    return run(everything, ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_train_like_one_process_with_all_they_have(ranks):
    for scenario in SCENARIOS:
        theirs = expected(ranks, *scenario[1:])
        for answer in answers(ranks):
            updates, parameters = answer["trained"][scenario]
            assert updates == WINDOWS
            assert distance(parameters, theirs) <= 1e-12, scenario


def test_one_rank_of_fsdp2_saves_between_windows(tmp_path):
    assert run(one_rank_of_fsdp2, 1, tmp_path / "run") == [[0, 0, 0, 1, 1, 1]]


def test_modules_prepared_by_accelerate_and_fabric():
    theirs = expected(2, True, 0.05)
    if not answers(2)[0]["prepared"]:
        pytest.skip("accelerate and lightning_fabric are not installed")
    for answer in answers(2):
        assert len(answer["prepared"]) == 3
        for updates, parameters in answer["prepared"]:
            assert updates == WINDOWS and distance(parameters, theirs) <= 1e-12


def test_ranks_in_groups_train_apart():
    theirs = expected(2, True, 0.05)
    for rank, answer in enumerate(answers(4)):
        for updates, parameters in answer["groups"]:
            assert updates == (2 if rank >= 2 else WINDOWS)
            assert rank >= 2 or distance(parameters, theirs) <= 1e-12


def on_two_hosts(folder, seconds):
    """Train under torchrun on two hosts, one of whose workers is killed once.

    The hosts restart one after the other, and a worker may lose its peer in between.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend"]
    options += ["c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr"]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # Without it, restarted workers may read the addresses of those before: pytorch#135712.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    script = str(Path(__file__).with_name("torchrun_train.py"))
    agents = []
    try:
        for host in ("127.0.0.1", "127.0.0.2"):
            command = [sys.executable, "-m", "torch.distributed.run", *options, host, script]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            pipes["start_new_session"] = True
            agents += [subprocess.Popen([*command, str(folder)], env=environment, **pipes)]
        for agent in agents:
            printed, _ = agent.communicate(timeout=seconds)
            assert agent.returncode == 0, printed
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)  # with its workers
            agent.wait()


def test_two_hosts_restart_when_a_worker_is_killed_and_training_continues(tmp_path):
    try:
        on_two_hosts(tmp_path, 60)
    except subprocess.TimeoutExpired:  # torchrun's hosts did not meet in time on a busy machine
        tmp_path = tmp_path / "again"
        tmp_path.mkdir()
        on_two_hosts(tmp_path, SECONDS)
    assert (tmp_path / "killed").exists()
    for rank in range(2):
        assert distance(torch.load(tmp_path / f"rank{rank}.pt"), expected(2, True, None)) <= 1e-12
