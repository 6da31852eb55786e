"""The laws over several ranks: as one process with everything that they have."""

import copy
import functools
import itertools
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from launch import SECONDS, run
from oracles import distance, loss_of, make_batches, make_model
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from trainkit import (
    accumulate,
    amp,
    freeze,
    frozen,
    microbatch,

    train_step,
    trainable_parameters,
)

ROOT = Path(__file__).parents[2]
N, SCENARIOS = 3, list(itertools.product(["ddp", "fsdp2"], [False, True], [None, 0.05]))


def batches_of(rank):
    """Ragged micro-batches for 20 windows, of other sizes on every rank; rank 1 has three fewer, and so one window less."""
    sizes = [[4, 4, 2, 5, 1, 3], [1, 2, 3, 4, 5, 6], [3, 3], [2, 5]][rank]
    return make_batches((sizes * 30)[: 57 if rank == 1 else 60], seed=rank)


def wrapped(model, how, ranks, mesh=None):
    if how == "ddp":
        return DistributedDataParallel(model, process_group=mesh and mesh.get_group())
    mesh = mesh or init_device_mesh("cpu", (ranks,))
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


def trained(rank, ranks, how, weighted, max_norm, mesh=None, windows=20):
    return train(rank, *made(ranks, how, mesh=mesh), weighted, max_norm, windows)


def train(rank, base, model, optimizer, weighted, max_norm, windows=20):
    function = functools.partial(weighted_loss if weighted else loss_of, model)
    step = train_step(optimizer, accumulate(N), module=model, max_norm=max_norm)(function)
    for batch in step.over(batches_of(rank)[: windows * N]):
        step(batch)
    return step.updates, whole(base)


def all_scenarios(rank, ranks):
    return {scenario: trained(rank, ranks, *scenario) for scenario in SCENARIOS}


def prepared_by_others(rank, ranks):
    """Modules in which DistributedDataParallel or FSDP2 is found inside of what another library has put around it."""
    from accelerate import Accelerator
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

    def shard(model, mesh):
        return fully_shard(model, mesh=mesh["data_parallel"])

    def fabric(strategy):
        found = Fabric(accelerator="cpu", devices=ranks, strategy=strategy)
        found.launch()
        return found.setup_module

    answers = []
    for prepare in (
        Accelerator(cpu=True).prepare,
        fabric(DDPStrategy()),
        fabric(ModelParallelStrategy(shard, data_parallel_size=ranks, tensor_parallel_size=1)),
    ):
        base = make_model()
        model = prepare(base)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        answers.append(train(rank, base, model, optimizer, True, 0.05))
    return answers


def test_modules_prepared_by_accelerate_and_fabric():
    pytest.importorskip("accelerate")
    pytest.importorskip("lightning_fabric")
    reference = expected(2, True, 0.05)
    for answer in run(prepared_by_others, 2):
        assert len(answer) == 3
        for updates, parameters in answer:
            assert updates == 20 and distance(parameters, reference) <= 1e-12


def two_trainings_at_once(rank, ranks):
    """Of two ranks each; the second is over long before the first."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("training", "rank"))["rank"]
    windows = 5 if rank >= 2 else 20
    return [trained(rank % 2, 2, how, True, 0.05, mesh, windows) for how in ("ddp", "fsdp2")]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_train_as_one_process_with_all_they_have(ranks):
    answers = run(all_scenarios, ranks)
    for scenario in SCENARIOS:
        reference = expected(ranks, *scenario[1:])
        for answer in answers:
            updates, parameters = answer[scenario]
            assert updates == 20
            assert distance(parameters, reference) <= 1e-12, scenario


def test_ranks_in_groups_train_apart():
    reference = expected(2, True, 0.05)
    for rank, answer in enumerate(run(two_trainings_at_once, 4)):
        for updates, parameters in answer:
            assert updates == (5 if rank >= 2 else 20)
            assert rank >= 2 or distance(parameters, reference) <= 1e-12


def made(ranks, how, dtype=torch.float64, fused=False, mesh=None):
    base = make_model(dtype)
    model = wrapped(base, how, ranks, mesh)
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
        step = train_step(optimizer, amp(dtype=torch.float16), module=model, max_skips=2)
        for error in (
            nullcontext(),
            pytest.raises(FloatingPointError, match="2 updates in a row were skipped"),
        ):
            with error, step:
                step.backward(loss_of(model, batch) * (math.nan if rank == 1 else 1.0))


def windows_closed_by_hand_may_have_another_length_on_every_rank(rank, ranks, how):
    for weighted in (False, True):
        base, model, optimizer = made(ranks, how)
        step = train_step(optimizer, accumulate(4), module=model)(
            functools.partial(weighted_loss if weighted else loss_of, model)
        )
        # Under FSDP2 every forward gathers parameters, so that there ranks take as many micro-batches each.
        counts = [2 - (how == "ddp" and other) for other in range(ranks)]
        parts = [
            make_batches([4 + other, 2], seed=other)[: counts[other]] for other in range(ranks)
        ]
        for batch in parts[rank][:-1]:
            step(batch)
        assert step.last(parts[rank][-1]).updated

        expected = make_model()
        theirs = torch.optim.AdamW(expected.parameters(), lr=0.01)
        window = [batch for part in parts for batch in part]
        weights = [len(x) if weighted else 1 for x, _ in window]
        sum(
            loss_of(expected, b) * w / sum(weights) for b, w in zip(window, weights, strict=True)
        ).backward()
        theirs.step()
        assert distance(whole(base), list(expected.parameters())) <= 1e-12


def a_window_that_is_dropped_leaves_nothing_behind(rank, ranks, how):
    base, model, optimizer = made(ranks, how)
    step = train_step(optimizer, accumulate(2), module=model)(
        lambda batch, factor=1: loss_of(model, batch) * factor
    )
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
        return [group.reduce_grads for group in groups] + [
            state._state_ctx.is_last_backward for state in states
        ]

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


SCATTER = (
    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
)


@contextmanager
def counted_collectives():
    """How often gradients and numbers are reduced, by the function that does it."""
    counted = {"all_reduce": 0, SCATTER: 0}

    def counting(name, function):
        def count(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for name in counted:
            patch.setattr(dist, name, counting(name, getattr(dist, name)))
        yield counted


def gradients_are_reduced_once_in_a_window(rank, ranks, how):
    for weighted in (False, True):
        _, model, optimizer = made(ranks, how)
        if how == "ddp":
            model.register_comm_hook(
                None, default_hooks.allreduce_hook
            )  # which does it in the same way, in Python
        begun = []  # when backward begins

        @train_step(optimizer, accumulate(3), module=model)
        def step(batch, model=model, weighted=weighted, begun=begun):
            loss = loss_of(model, batch)
            loss.register_hook(lambda gradient: begun.append(counted["all_reduce"]))
            return (loss, len(batch[0])) if weighted else loss

        with counted_collectives() as counted:
            for i, batch in enumerate(make_batches([3] * 9, seed=rank)):
                step(batch)
                windows = (i + 1) // 3
                numbers = (
                    windows + 1
                ) * weighted  # of the first window of all, its first weight too
                assert begun[i] == numbers + ((i // 3) if how == "ddp" else 0)
                assert counted["all_reduce"] == numbers + (windows if how == "ddp" else 0), (
                    i,
                    counted,
                )
                assert counted[SCATTER] == (2 * windows if how == "fsdp2" else 0), (i, counted)


def frozen_layers_stay_and_are_not_reduced(rank, ranks, how):
    base = make_model()
    if how == "ddp":
        freeze(base, "[0]")
    model = wrapped(base, how, ranks)
    part = [] if how == "ddp" else [frozen(model, "[0]")]
    before = whole(base)[:2]
    step = train_step(torch.optim.AdamW(model.parameters(), lr=0.01), *part, module=model)(
        functools.partial(loss_of, model)
    )
    with counted_collectives() as counted:
        for batch in make_batches([3] * 2, seed=rank):
            step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, whole(base)[:2], strict=True))
    assert counted[SCATTER] == (
        2 if how == "fsdp2" else 0
    )  # once for each update, and not for the layer below

    expected = make_model()
    freeze(expected, "[0]")
    theirs = torch.optim.AdamW(trainable_parameters(expected), lr=0.01)
    for batches in zip(*(make_batches([3] * 2, seed=other) for other in range(ranks)), strict=True):
        (sum(loss_of(expected, batch) for batch in batches) / ranks).backward()
        theirs.step()
        theirs.zero_grad()
    assert distance(whole(base), list(expected.parameters())) <= 1e-12


def an_open_window_is_left_alone_while_its_layers_are_frozen(rank, ranks, how):
    """FSDP2 reduces its sums in any backward through it, and they were lost with what another step's left in frozen layers."""
    base, model, optimizer = made(ranks, how)
    gain = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    step = train_step(optimizer, accumulate(3), module=model)(functools.partial(loss_of, model))
    through = train_step(torch.optim.SGD([gain], lr=0.1), frozen(base), module=model)(
        lambda x: model(x * gain).square().mean()
    )
    batches = make_batches([4] * 6, seed=rank)
    for batch in batches[:3]:
        step(batch)
        through(batch[0])
    before = whole(base)
    for batch, layers in zip(
        batches[3:], [[], [], "[0]"] if how == "fsdp2" else [[]] * 3, strict=True
    ):
        with frozen(base, layers):
            step(batch)
    step.state_dict()

    expected = make_model()
    theirs = torch.optim.AdamW(expected.parameters(), lr=0.01)
    everyone = [make_batches([4] * 6, seed=other) for other in range(ranks)]
    for start in (0, 3):
        (
            sum(loss_of(expected, b) for batches in everyone for b in batches[start : start + 3])
            / ranks
            / 3
        ).backward()
        if how == "fsdp2" and start:
            expected[0].zero_grad()
            assert distance(before[:2], list(expected[0].parameters())) <= 1e-12
        theirs.step()
        theirs.zero_grad()
    assert distance(whole(base), list(expected.parameters())) <= 1e-12


def fsdp1_is_refused_where_a_norm_is_asked(rank, ranks, how):
    """It leaves each rank a part of the gradients that knows nothing of the others; without a norm it is right."""
    base = make_model()
    model = FullyShardedDataParallel(base, device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batches = make_batches([3] * 4, seed=rank)
    refused = train_step(optimizer, module=model, max_norm=1.0)(functools.partial(loss_of, model))
    with pytest.raises(ValueError, match="wrap with FSDP2"):
        refused(batches[0])
    _, again, theirs = made(ranks, "ddp")
    for wrapper, other in ((model, optimizer), (again, theirs)):
        step = train_step(other, accumulate(2), module=wrapper)(functools.partial(loss_of, wrapper))
        for batch in batches:
            step(batch)
    with FullyShardedDataParallel.summon_full_params(model):
        assert distance([p.detach() for p in base.parameters()], whole(again)) <= 1e-12


def without_a_wrapper_it_is_an_error(rank, ranks, how):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for module in (None, model):
        step = train_step(optimizer, module=module)(lambda batch: loss_of(model, batch))
        with pytest.raises(
            ValueError, match="2 ranks run, and would each train a model of their own"
        ):
            step(make_batches([3])[0])


def a_further_loss_that_would_not_be_reduced_is_an_error(rank, ranks, how):
    base, model, optimizer = made(ranks, how)
    batch, other = make_batches([3, 4], seed=rank)
    step = train_step(optimizer, accumulate(2), module=model)
    for closes in (False, True):
        with (
            pytest.raises(RuntimeError, match="add the losses")
            if closes and how == "ddp"
            else nullcontext(),
            step,
        ):
            loss, further = loss_of(model, batch), loss_of(model, batch)
            step.backward(loss)
            step.backward(further)
    step = train_step(optimizer, module=model)
    with step:
        step.backward(loss_of(model, batch))
        step.backward(loss_of(model, other))
    same_everywhere(whole(base))


def after_an_exception_in_backward_training_goes_on(rank, ranks, how):
    base, model, optimizer = made(ranks, how)

    @train_step(optimizer, accumulate(2), module=model)
    def step(batch, error=False):
        loss = loss_of(model, batch)
        if error:
            loss.register_hook(lambda gradient: 1 / 0)
        return loss

    batches = make_batches([3] * 4, seed=rank)
    with pytest.raises(ZeroDivisionError):
        step(batches[0], error=True)
    for batch in batches:
        step(batch)
    expected, again, theirs = made(ranks, how)
    other = train_step(theirs, accumulate(2), module=again)(functools.partial(loss_of, again))
    for batch in batches:
        other(batch)
    assert step.updates == other.updates == 2 and distance(whole(base), whole(expected)) == 0


def a_state_of_an_open_window_knows_who_was_there(rank, ranks, how):
    if how == "fsdp2":  # which keeps its gradients to itself
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
    """Of the layer with one row, FSDP2 gives a rank nothing; and a nan on one rank is no larger than anything."""
    nan = torch.tensor([0.0, 0.0, 0.0, 0.0, math.nan])
    for bad in (False, True):
        base = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 1)).double()
        expected = copy.deepcopy(base)
        model = wrapped(base, how, ranks)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = make_batches([3] * ranks)
        step = train_step(optimizer, module=model, max_norm=0.01, norm_type=math.inf)
        with step as result:
            if bad:  # for the last row of the first layer alone, which is on the last rank
                base[0].register_forward_hook(
                    lambda *given: given[-1].register_hook(lambda gradient: gradient + nan) and None
                )
            step.backward(model(batches[rank][0]).pow(2).mean())
        if bad:
            assert not result.updated
            continue
        (sum(expected(x).pow(2).mean() for x, _ in batches) / ranks).backward()
        norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.01, math.inf)
        torch.optim.SGD(expected.parameters(), lr=0.1).step()
        assert result.updated and abs(result.grad_norm / norm - 1) < 1e-6
        assert distance(whole(base), list(expected.parameters())) <= 1e-12


def chunks_of_batches_are_reduced_once_in_a_window(rank, ranks, how):
    """Also where memory runs out on one rank, and where another has more chunks."""
    sizes = [[7, 3, 8, 6], [2, 5, 4, 1]]
    for size in (2, "auto") if how == "ddp" else (2,):
        for weighted in (False, True):
            base, model, optimizer = made(ranks, how)
            if how == "ddp":
                model.register_comm_hook(None, default_hooks.allreduce_hook)
            rows = []
            base[2].bias.register_hook(
                lambda g, rows=rows, fit=3 if size == "auto" and rank == 0 else 8: run_out(
                    rows, fit
                )
            )

            @train_step(optimizer, accumulate(2), microbatch(size), module=model, max_norm=0.05)
            def step(batch, model=model, weighted=weighted, rows=rows):
                rows.append(len(batch[0]))
                loss = loss_of(model, batch)
                return (loss, len(batch[0])) if weighted else loss

            with counted_collectives() as counted, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "memory ran out")
                for batch in step.over(make_batches(sizes[rank], seed=rank)):
                    step(batch)
            assert step.updates == 2
            assert counted["all_reduce"] == weighted * 3 + (2 if how == "ddp" else 0), counted
            assert counted[SCATTER] == (4 if how == "fsdp2" else 0)
            if size == "auto":
                assert step.chunk_sizes == {7: 3}  # on the other rank, too

            expected = make_model()
            theirs = torch.optim.AdamW(expected.parameters(), lr=0.01)
            loaders = [make_batches(sizes[other], seed=other) for other in range(ranks)]
            for start in (0, 2):
                window = [batch for loader in loaders for batch in loader[start : start + 2]]
                weights = [len(x) if weighted else 1 for x, _ in window]
                sum(
                    loss_of(expected, b) * w / sum(weights)
                    for b, w in zip(window, weights, strict=True)
                ).backward()
                torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
                theirs.step()
                theirs.zero_grad()
            assert distance(whole(base), list(expected.parameters())) <= 1e-12
    if how == "fsdp2":
        _, model, optimizer = made(ranks, how)
        step = train_step(optimizer, microbatch("auto"), module=model)(
            functools.partial(loss_of, model)
        )
        with pytest.raises(ValueError, match="leaves the others waiting"):
            step(make_batches([4])[0])


def run_out(rows, fit):
    if rows[-1] > fit:
        raise torch.OutOfMemoryError("of a test")


class Killed(Exception):
    """Nothing is done about it, as about kill -9."""


def noisy_batches(rank):
    """Ragged, of other lengths on both ranks, and with noise that is drawn when they are read."""
    for i, (x, y) in enumerate(batches_of(rank)[: 8 - 2 * rank]):
        yield i, x + torch.randn(()) * 0.1, y


class Sized:
    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        return noisy_batches(self.rank)

    def __len__(self):
        return 8 - 2 * self.rank


def resumed(rank, ranks, how, path, loader, stop):
    """Two epochs of three windows each with everything that differs between ranks; killed in an update, or from where it was."""
    torch.manual_seed(7)
    base = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.3), torch.nn.Linear(6, 3)
    )
    torch.manual_seed(7 + rank)
    model = wrapped(base.double(), how, ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    losses = []

    @train_step(
        optimizer,
        accumulate(lambda updates: 2 + updates % 2),
        module=model,
        after=schedule.step,
        max_norm=1.0,
    )
    def step(i, x, y):
        return loss_of(model, (x.repeat(2, 1), y.repeat(2, 1))), len(x)

    objects = {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "step": step,
        "losses": losses,
    }
    with resumable(path / "run", every=1, **objects) if stop is not None else nullcontext() as run:
        for epoch in range(2) if run is None else run.epochs(2):
            for i, x, y in step.over(loader(rank)):
                if (epoch, i) == stop:
                    raise Killed
                losses.append((epoch, i, step(i, x, y).loss))
    state = {
        key: getattr(value, "full_tensor", lambda value=value: value)()
        for key, value in base.state_dict().items()
    }
    return [
        *state.values(),
        *(loss for *_, loss in losses),
        torch.tensor(step.updates),
        torch.rand(3),
    ]


def a_run_that_was_killed_ends_with_the_same_bits(rank, ranks, how):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(gathered(folder, ranks)[0])
        for loader in (noisy_batches, Sized):
            expected = resumed(rank, ranks, how, path, loader, None)
            for stop in ((0, 3), (1, 1), (1, 5)):
                with pytest.raises(Killed):
                    resumed(rank, ranks, how, path, loader, stop)
                assert any((path / "run").iterdir())
                again = resumed(rank, ranks, how, path, loader, ())
                assert len(again) == len(expected) and all(map(torch.equal, again, expected)), (
                    how,
                    loader,
                    stop,
                )
                dist.barrier()
                if rank == 0:
                    assert (
                        sorted(file.name for file in (path / "run").iterdir())[0] > "00000001"
                    )  # two are kept
                    shutil.rmtree(path / "run")
                dist.barrier()
        dist.barrier()


def gathered(value, ranks):
    values = [None] * ranks
    dist.all_gather_object(values, value)
    return values


def memory_may_run_out_after_buffers_were_broadcast(rank, ranks, how):
    """DistributedDataParallel does so before a forward, and a rank that tries again must not do so alone."""
    if how == "fsdp2":
        return
    base = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)
    ).double()
    model = wrapped(base, how, ranks)
    rows, fit = [], 3 if rank == 0 else 8
    base[0].register_forward_pre_hook(
        lambda _, given: (rows.append(len(given[0])), run_out(rows, fit))[1]
    )
    step = train_step(torch.optim.SGD(model.parameters(), lr=0.1), microbatch("auto"), module=model)
    step = step(functools.partial(loss_of, model))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "memory ran out")
        for batch in make_batches([8, 8], seed=rank):
            step(batch)
            step.chunk_sizes.clear()
    same_everywhere(whole(base))


def checkpoints_wait_until_the_windows_of_all_steps_are_closed(rank, ranks, how):
    """Also of those of a loop within the loop, which is no place of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(gathered(folder, ranks)[0]) / "run"
        (_, a, optimizer_a), (_, b, optimizer_b) = made(ranks, how), made(ranks, how)
        step_a = train_step(optimizer_a, accumulate(2), module=a)(functools.partial(loss_of, a))
        step_b = train_step(optimizer_b, accumulate(3), module=b)(functools.partial(loss_of, b))
        objects = {
            "a": a,
            "b": b,
            "optimizer_a": optimizer_a,
            "optimizer_b": optimizer_b,
            "step_a": step_a,
            "step_b": step_b,
        }
        found = []
        with resumable(path, every=timedelta(0), keep=99, **objects):
            for batch in step_a.over(make_batches([3] * 12, seed=rank)):
                found.append(len(list(path.iterdir())) if path.exists() else 0)
                dist.barrier()
                step_a(batch)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that no batch of it reaches the step
                    assert len(list(step_a.over([batch, batch]))) == 2
                step_b(batch)
        assert found == [0] * 6 + [1] * 6, found
        dist.barrier()


CHECKS = [
    memory_may_run_out_after_buffers_were_broadcast,
    chunks_of_batches_are_reduced_once_in_a_window,
    the_largest_gradient_is_that_of_all_ranks,
    checkpoints_wait_until_the_windows_of_all_steps_are_closed,
    a_run_that_was_killed_ends_with_the_same_bits,
    a_further_loss_that_would_not_be_reduced_is_an_error,
    after_an_exception_in_backward_training_goes_on,
    a_state_of_an_open_window_knows_who_was_there,
    an_overflow_on_one_rank_skips_the_update_on_all,
    windows_closed_by_hand_may_have_another_length_on_every_rank,
    a_window_that_is_dropped_leaves_nothing_behind,
    wrappers_are_left_as_they_were_found,
    gradients_are_reduced_once_in_a_window,
    frozen_layers_stay_and_are_not_reduced,
    an_open_window_is_left_alone_while_its_layers_are_frozen,
    fsdp1_is_refused_where_a_norm_is_asked,
    without_a_wrapper_it_is_an_error,
]


def all_checks(rank, ranks):
    for check in CHECKS:
        for how in ("ddp", "fsdp2"):
            check(rank, ranks, how)


def test_what_ranks_do_together():
    """One start of two ranks for all of ``CHECKS``; the traceback names the one that fails."""
    run(all_checks, 2)


def dealt(rank, ranks, path, *parts):
    """Two epochs of six updates, each of four batches that are dealt out to the ranks; in each part killed at another update."""
    for how, found, stop in parts:
        base = make_model()
        model = wrapped(base, how, ranks) if how else base
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        n = 4 // ranks
        step = train_step(optimizer, accumulate(n), module=model, after=schedule.step)(
            functools.partial(weighted_loss, model)
        )
        objects = {"model": model, "optimizer": optimizer, "schedule": schedule, "step": step}
        killed = nullcontext() if stop is None else pytest.raises(Killed)
        with killed, resumable(path, every=timedelta(0), **objects) as run:
            assert step.updates == found
            for _ in run.epochs(2):
                for i, batch in enumerate(
                    step.over(make_batches([3, 1, 4, 2, 5, 3] * 4)[rank::ranks])
                ):
                    if (
                        step.updates == stop and i % n == n - 1
                    ):  # one process saves in an open window
                        raise Killed
                    step(batch)
    return whole(base)


def test_a_checkpoint_of_some_ranks_goes_on_with_others(tmp_path):
    """One process, two ranks, four, and one; under both wrappers, each killed in the middle of an epoch."""
    dealt(0, 1, tmp_path, (None, 0, 2))
    run(dealt, 2, tmp_path, ("ddp", 2, 4), ("fsdp2", 4, 5))
    run(dealt, 4, tmp_path, ("fsdp2", 5, 7), ("ddp", 7, 9))
    ours = dealt(0, 1, tmp_path, (None, 9, None))
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for start in [*range(0, 24, 4)] * 2:
        window = make_batches([3, 1, 4, 2, 5, 3] * 4)[start : start + 4]
        total = sum(len(x) for x, _ in window)
        sum(loss_of(model, batch) * len(batch[0]) / total for batch in window).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert distance(ours, list(model.parameters())) <= 1e-12


def torchrun(*options):
    """An agent of torchrun, started."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    # Or workers that were restarted read the addresses of those before them: pytorch#135712.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, options)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended_well(agents):
    """Waits for agents of torchrun; whatever happens, none of them is left."""
    try:
        for agent in agents:
            printed, _ = agent.communicate(timeout=SECONDS)
            assert agent.returncode == 0, printed
    finally:
        for agent in agents:
            agent.terminate()  # it ends its workers
            agent.wait()


def test_torchrun_restarts_a_worker_that_was_killed_and_training_goes_on(tmp_path):
    script = ROOT / "tests" / "torchrun_train.py"
    ended_well(
        [
            torchrun(
                "--standalone",
                "--nproc-per-node",
                2,
                "--max-restarts",
                1,
                script,
                tmp_path,
                "--kill",
            )
        ]
    )
    for rank in range(2):
        assert distance(torch.load(tmp_path / f"rank{rank}.pt"), expected(2, True, None)) <= 1e-12


def test_two_hosts(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = [
        "--nnodes",
        2,
        "--nproc-per-node",
        1,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
    ]
    script = ROOT / "tests" / "torchrun_train.py"
    ended_well(
        [torchrun(*meet, "--local-addr", f"127.0.0.{host}", script, tmp_path) for host in (1, 2)]
    )
    for rank in range(2):
        assert distance(torch.load(tmp_path / f"rank{rank}.pt"), expected(2, True, None)) <= 1e-12
