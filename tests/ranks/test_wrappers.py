"""The wrappers of PyTorch on one rank, where no other process has to be started."""

import contextlib

import pytest
import torch
from by_hand import CHECKS
from oracles import BATCHES, OPTIMIZERS, distance, loss_of, make_batches, make_model, plain_loop
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from trainkit import accumulate, amp, freeze, frozen, train_step, unfreeze


@pytest.fixture(autouse=True)
def one_rank():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def make_step(model, optimizer, *parts, **options):
    wrapped = DistributedDataParallel(model, **options)
    return train_step(optimizer, *parts, module=wrapped)(lambda batch: loss_of(wrapped, batch))


def whole(model):
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def test_freezing_a_part_after_wrapping_is_refused_and_all_of_it_is_not(model, optimizer):
    """The wrapper waits for gradients that do not come: first in silence, then with an error."""
    step = make_step(model, optimizer, accumulate(2))
    step(BATCHES[0])
    refused = pytest.raises(ValueError, match=r"2 of 4.*'0.weight'.*were frozen.*`freeze\(model")
    with frozen(model, "[0]"), refused:
        step(BATCHES[1])
    with frozen(model), step:  # without a loss
        model(BATCHES[0][0])
    assert step(BATCHES[1]).updated
    expected = make_model()
    plain_loop(expected, torch.optim.AdamW(expected.parameters(), lr=0.01), BATCHES[:2], 2)
    assert distance(whole(model), whole(expected)) <= 1e-12


def test_a_frozen_part_of_a_step_is_left_where_the_wrapper_refuses_it(model, optimizer):
    step = make_step(model, optimizer, frozen(model, "[0]"))
    with pytest.raises(ValueError, match="were frozen after they were wrapped"):
        step(BATCHES[0])
    assert all(p.requires_grad for p in model.parameters())


def test_unfreezing_after_wrapping_is_refused(model, optimizer):
    """Its gradients would never be reduced, without a word."""
    freeze(model, "[0]")
    step = make_step(model, optimizer)
    assert step(BATCHES[0]).updated
    unfreeze(model)
    with pytest.raises(ValueError, match=r"2 of 4.*'0.weight'.*became trainable.*`unfreeze"):
        step(BATCHES[0])


def test_what_the_wrapper_can_do_without_is_not_refused(model, optimizer):
    step = make_step(model, optimizer, frozen(model, "[0]"), find_unused_parameters=True)
    assert step(BATCHES[0]).updated
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.bias"])
    step = make_step(model, optimizer)
    model[0].bias.requires_grad_(False)
    assert step(BATCHES[0]).updated


def test_the_sparse_gradients_of_an_embedding():
    """Their bucket does not tell its parameters: torch raises a RuntimeError."""
    results = []
    for sparse in (True, False):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(5, 4, sparse=sparse)
        model = torch.nn.Sequential(embedding, torch.nn.Linear(4, 1)).double()
        wrapped = DistributedDataParallel(model) if sparse else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = train_step(optimizer, accumulate(2), module=wrapped, max_norm=0.1)
        for rows in step.over([[0, 1, 1], [1, 4], [2]]):
            with step:
                step.backward(wrapped(torch.tensor(rows)).square().mean(), len(rows))
        results.append(list(model.parameters()))
    assert distance(*results) <= 1e-12


@pytest.mark.parametrize("static_graph", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_gradients_that_lie_in_buckets_are_the_windows_own(model, optimizer, static_graph, by_hand):
    """With bucket views they move into buckets. With a static graph every backward of the first
    window is reduced, and a backward of somebody else writes to the buckets that hold its sums."""
    options = {"gradient_as_bucket_view": True, "static_graph": static_graph}
    wrapped = DistributedDataParallel(model, **options)
    step = train_step(optimizer, accumulate(3), module=wrapped)
    for batch in BATCHES * 3:
        with step:
            if by_hand:  # two losses, and a forward between the two that may rebuild the buckets
                step.backward(loss_of(wrapped, batch) / 4)
                step.backward(loss_of(wrapped, batch) * 3 / 4)
            else:
                step.backward(loss_of(wrapped, batch))
        (loss_of(wrapped, batch) * 1e3).backward()
    expected = make_model()
    plain_loop(expected, torch.optim.AdamW(expected.parameters(), lr=0.01), BATCHES * 3, 3)
    assert step.updates == 3 and distance(whole(model), whole(expected)) < 1e-12


def test_a_part_is_added_to_a_step_that_has_run(model, optimizer):
    step = make_step(model, optimizer, accumulate(2))
    for _ in range(2):
        step(BATCHES[0])
        assert step(BATCHES[1]).updated
        step = frozen(torch.nn.Linear(1, 1))(step)
    expected = make_model()
    plain_loop(expected, torch.optim.AdamW(expected.parameters(), lr=0.01), BATCHES[:2] * 2, 2)
    assert distance(whole(model), whole(expected)) <= 1e-12


@pytest.mark.parametrize("kind", ["AdamW", "AdamW fused"])
@pytest.mark.parametrize("weight", [None, torch.tensor(3)])
def test_gradients_of_fsdp2_are_unscaled_and_clipped(kind, weight):
    """Their norm is a sharded tensor, which no scaler takes. One layer may not be sharded."""
    states = []
    for is_sharded in (True, False):
        model = make_model(torch.float32)
        for layer in (model[0], model[2]) if is_sharded else ():
            if layer is model[0] or kind == "AdamW":
                fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))

        @train_step(
            [OPTIMIZERS[kind](layer.parameters()) for layer in (model[0], model[2])],
            accumulate(2),
            amp(dtype=torch.float16),
            max_norm=0.1,
            module=model,
        )
        def step(batch, model=model):
            return loss_of(model, batch) if weight is None else (loss_of(model, batch), weight)

        results = [step(batch) for batch in make_batches([4] * 4, torch.float32)]
        assert type(results[-1].grad_norm) is torch.Tensor and step.updates == 2
        states.append([results[-1].grad_norm, *whole(model)])
    assert distance(*states) <= 1e-6


@pytest.mark.parametrize("reduce_dtype", [None, torch.float32])
def test_sums_of_fsdp2_have_the_dtype_that_it_reduces_in(reduce_dtype):
    """And no other backward through the module changes them, also while a layer is frozen."""
    results, mesh = [], init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    x = torch.ones(1, 4)
    for is_disturbed in (False, True):
        model = make_model(torch.float32)
        for part in (model[0], model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        step = train_step(optimizer, accumulate(None, reduction="sum"), module=model)
        step = step(lambda factor, model=model: model(x).sum() * factor)
        for factor in [512.0] + [1.0] * 7:  # which bfloat16 adds up to 512
            step(factor)
            if is_disturbed:
                (model(x).sum() * 1e3).backward()
                with frozen(model, "[0]"):
                    (model(x).sum() * 1e3).backward()
        assert step.close().updated
        results.append(whole(model))
    assert distance(*results) == 0
    moved = whole(make_model(torch.float32))[-1] - results[0][-1]
    assert moved.round().tolist() == [512.0 if reduce_dtype is None else 519.0] * 3


@pytest.mark.parametrize("permanent", [False, True])
def test_fsdp2_parameters_are_frozen_also_after_an_evaluation(model, permanent):
    """An evaluation leaves gathered parameters in place. Freezing those would freeze nothing."""
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    step = train_step(torch.optim.AdamW(model.parameters(), lr=0.1))
    step = step(lambda batch: loss_of(model, batch))
    block = frozen(model, "[0]")
    step(BATCHES[0])
    with torch.no_grad():
        loss_of(model, BATCHES[0])
    if permanent:
        freeze(model, "[0]")
    with contextlib.nullcontext() if permanent else block:
        before = whole(model[0])
        step(BATCHES[0])
        model.reshard()
        assert distance(whole(model[0]), before) == 0
        with torch.no_grad():
            loss_of(model, BATCHES[0])
    model.reshard()
    assert all(p.requires_grad is not permanent for p in model[0].parameters())


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("check", CHECKS)
def test_windows_of_every_kind_on_one_rank(check, how):
    check(0, 1, how)
