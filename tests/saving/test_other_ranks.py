"""A checkpoint of some ranks is resumed on another number, from the beginning of its loop."""

import torch
from launch import run
from oracles import distance, loss_of, make_batches, make_model
from saving_runs import ALWAYS, Killed
from torch import distributed as dist
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trainkit import accumulate, resumable, train_step

BATCHES = make_batches([3, 3] * 4)  # two windows of four, dealt out to the ranks


def dealt(rank, ranks, path, *parts):
    """Runs up to so many epochs, or is killed in the second window of one; in several parts."""
    for how, epochs, stop in parts:
        model = base = make_model()
        if how == "ddp":
            model = DistributedDataParallel(base)
        elif how == "fsdp2":
            fully_shard(base, mesh=DeviceMesh("cpu", list(range(ranks))))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        step = train_step(optimizer, accumulate(4 // ranks), module=model)(
            lambda batch, model=model: loss_of(model, batch)
        )
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        objects = {"model": model, "optimizer": optimizer, "schedule": schedule, "step": step}
        try:
            with resumable(path, every=ALWAYS, **objects) as resumed:
                for epoch in resumed.epochs(epochs):
                    for i, batch in enumerate(step.over(BATCHES[rank::ranks])):
                        if epoch == stop and i == 4 // ranks + (ranks == 1):  # in an open window
                            raise Killed
                        step(batch)
                    schedule.step()
        except Killed:
            pass
        if ranks > 1:
            dist.barrier()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in base.parameters()]


def uneven(rank, ranks, path):
    """A rank that has run out of batches, when the checkpoint is written, repeats its last one."""
    found = []
    for stop in (None, 6, 99):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model = DistributedDataParallel(model)
        step = train_step(optimizer, accumulate(2), module=model)(
            lambda batch, model=model: loss_of(model, batch)
        )
        objects = {"model": model, "optimizer": optimizer, "step": step}
        folder = path / ("whole" if stop is None else "killed")
        try:
            with resumable(folder, every=1, **objects):
                for i, batch in enumerate(step.over(BATCHES[: 8 if rank else 3])):
                    if i == stop:
                        raise Killed
                    step(batch)
        except Killed:
            pass
        dist.barrier()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, found[0], found[2])) and not torch.equal(found[0][0], found[1][0])


def on_two_ranks(rank, ranks, path):
    uneven(rank, ranks, path.with_name("uneven"))
    dealt(rank, ranks, path, ("ddp", 2, None), ("fsdp2", 4, 3))  # epoch 1 again, then five windows


def test_one_process_and_two_ranks_resume_each_other(tmp_path):
    dealt(0, 1, tmp_path / "run", (None, 2, 1))  # three windows, and a micro-batch of the fourth
    run(on_two_ranks, 2, tmp_path / "run")
    ours = dealt(0, 1, tmp_path / "run", (None, 4, None))  # epoch 3 again
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for windows in (2, 1 + 2, 2, 1 + 2):
        for start in [0, 4] if windows == 2 else [0, 0, 4]:
            sum(loss_of(model, batch) / 4 for batch in BATCHES[start : start + 4]).backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    assert distance(ours, list(model.parameters())) <= 1e-12


def until(path, rank, ranks, updates, stop=None):
    """Trains for so many updates over the batches of this rank, again and again."""
    torch.manual_seed(0)
    model = base = make_model()
    if ranks > 1:
        model = DistributedDataParallel(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = train_step(optimizer, accumulate(4 // ranks), module=model)(
        lambda batch: loss_of(model, batch)
    )
    # The ranks go over their loaders at other moments, in an order of their own.
    generator = torch.Generator().manual_seed(rank)
    mine = list(BATCHES[rank::ranks])[: 3 if rank else 4]
    loader = torch.utils.data.DataLoader(mine, None, shuffle=True, generator=generator)
    try:
        with resumable(path, every=1, model=model, optimizer=optimizer, step=step):
            for i, batch in enumerate(step.over(loader, updates=updates)):
                if i == stop:
                    raise Killed
                step(batch)
    except Killed:
        pass
    if ranks > 1:
        dist.barrier()
    return step.updates, [p.detach().clone() for p in base.parameters()]


def updates_on_two_ranks(rank, ranks, path):
    expected = until(path / "whole", rank, ranks, 6)
    assert expected[0] == 6
    for stop in (3, 7, 11):
        until(path / str(stop), rank, ranks, 6, stop)
        found = until(path / str(stop), rank, ranks, 6)
        assert found[0] == 6 and all(map(torch.equal, found[1], expected[1])), stop
    until(path / "one", rank, ranks, 6, 7)  # three updates


def test_updates_on_two_ranks_and_of_these_in_one_process(tmp_path):
    run(updates_on_two_ranks, 2, tmp_path)
    assert until(tmp_path / "one", 0, 1, 6)[0] == 6  # those from before the stop count
