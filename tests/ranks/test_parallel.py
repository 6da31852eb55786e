import contextlib

import pytest
import torch
from oracles import BATCHES, OPTIMIZERS, distance, loss_of, make_batches, make_model, plain_loop
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trainkit import accumulate, amp, freeze, frozen, train_step, unfreeze


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def make_step(model, optimizer, *parts, **options):
    wrapped = DistributedDataParallel(model, **options)
    return train_step(optimizer, *parts, module=wrapped)(lambda batch: loss_of(wrapped, batch))


def test_freezing_a_part_after_wrapping_is_refused_and_all_of_it_is_not(one_rank, model, optimizer):
    """The wrapper waits for gradients that do not come: silently in the first iteration, with an error in the second."""
    step = make_step(model, optimizer, accumulate(2))
    step(BATCHES[0])
    before = [p.grad.clone() for p in model.parameters()]
    with (
        frozen(model, "[0]"),
        pytest.raises(
            ValueError,
            match=r"2 of 4 parameters were frozen after .* \(first '0.weight'\): freeze before it",
        ),
    ):
        step(BATCHES[1])
    assert all(
        torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True)
    )
    with frozen(model), step:
        model(BATCHES[0][0])
    assert step(BATCHES[1]).updated


def test_a_frozen_part_of_a_step_is_left_where_the_wrapper_refuses_it(one_rank, model, optimizer):
    step = make_step(model, optimizer, frozen(model, "[0]"))
    with pytest.raises(ValueError, match="frozen after DistributedDataParallel was made"):
        step(BATCHES[0])
    assert all(p.requires_grad for p in model.parameters())


def test_unfreezing_after_wrapping_is_refused(one_rank, model, optimizer):
    """Its gradients would never be synchronised, without a word."""
    freeze(model, "[0]")
    step = make_step(model, optimizer)
    assert step(BATCHES[0]).updated
    unfreeze(model)
    with pytest.raises(
        ValueError,
        match=r"2 of 4 parameters became trainable .* \(first '0.weight'\): unfreeze before it",
    ):
        step(BATCHES[0])


def test_what_the_wrapper_can_do_without_is_not_refused(one_rank, model, optimizer):
    step = make_step(model, optimizer, frozen(model, "[0]"), find_unused_parameters=True)
    assert step(BATCHES[0]).updated
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.bias"])
    step = make_step(model, optimizer)
    model[0].bias.requires_grad_(False)
    assert step(BATCHES[0]).updated


def test_the_sparse_gradients_of_an_embedding(one_rank):
    """Their bucket has nothing from which the parameters could be known: torch raises a RuntimeError."""
    results = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Embedding(5, 4, sparse=sparse), torch.nn.Linear(4, 1)
        ).double()
        wrapped = DistributedDataParallel(model) if sparse else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = train_step(optimizer, accumulate(2), module=wrapped, max_norm=0.1)
        for rows in step.over([[0, 1, 1], [1, 4], [2]]):
            with step:
                step.backward(wrapped(torch.tensor(rows)).square().mean(), len(rows))
        results.append(list(model.parameters()))
    assert distance(*results) <= 1e-12


@pytest.mark.parametrize("static_graph", [False, True])
def test_gradients_that_move_into_rebuilt_buckets_are_the_same(
    one_rank, model, optimizer, static_graph
):
    """With gradient_as_bucket_view=True they become other tensors in the second forward, or the third."""
    expected = make_model()
    theirs = torch.optim.AdamW(expected.parameters(), lr=0.01)
    step = make_step(
        model, optimizer, accumulate(3), gradient_as_bucket_view=True, static_graph=static_graph
    )
    for batch in BATCHES * 3:
        step(batch)
    plain_loop(expected, theirs, BATCHES * 3, 3)
    assert (
        step.updates == 3
        and distance(list(model.parameters()), list(expected.parameters())) < 1e-12
    )


@pytest.mark.parametrize("kind", ["AdamW", "AdamW fused"])
@pytest.mark.parametrize("weight", [None, torch.tensor(3)])
def test_gradients_of_fsdp2_are_unscaled_and_clipped(one_rank, kind, weight):
    """Their norm is a sharded tensor, which no scaler takes, until it is made whole."""
    states = []
    for wrap in (fully_shard, lambda model, mesh: model):
        model = make_model(torch.float32)
        wrap(model, mesh=init_device_mesh("cpu", (1,)))

        @train_step(
            OPTIMIZERS[kind](model.parameters()),
            accumulate(2),
            amp(dtype=torch.float16),
            max_norm=0.1,
            module=model,
        )
        def step(batch, model=model):
            return loss_of(model, batch) if weight is None else (loss_of(model, batch), weight)

        results = [step(batch) for batch in make_batches([4] * 4, torch.float32)]
        assert type(results[-1].grad_norm) is torch.Tensor and step.updates == 2
        states.append([getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()])
    assert distance(*states) <= 1e-6


@pytest.mark.parametrize("permanent", [False, True])
def test_fsdp2_parameters_are_frozen_also_after_an_evaluation(one_rank, model, permanent):
    """It leaves parameters that are gathered for it in place, and freezing those would freeze nothing."""
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    step = train_step(torch.optim.AdamW(model.parameters(), lr=0.1))(
        lambda batch: loss_of(model, batch)
    )
    block = frozen(model, "[0]")
    step(BATCHES[0])
    with torch.no_grad():
        loss_of(model, BATCHES[0])
    if permanent:
        freeze(model, "[0]")
    with contextlib.nullcontext() if permanent else block:
        before = [p.full_tensor().clone() for p in model[0].parameters()]
        step(BATCHES[0])
        model.reshard()
        assert all(
            torch.equal(p.full_tensor(), found)
            for p, found in zip(model[0].parameters(), before, strict=True)
        )
        with torch.no_grad():
            loss_of(model, BATCHES[0])
    model.reshard()
    assert all(p.requires_grad is not permanent for p in model[0].parameters())
