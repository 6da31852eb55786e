"""What torchrun starts in test_ranks.py: trains, saves after every window, continues from there.

torchrun ... torchrun_train.py FOLDER      rank 1 kills itself once, after its second update
"""

import os
import signal
import sys
from pathlib import Path

import torch
from on_ranks import N, batches_of, loss_function
from oracles import make_model
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainkit import accumulate, train_step


def main(folder):
    dist.init_process_group("gloo")
    rank, checkpoint = dist.get_rank(), folder / "checkpoint.pt"
    base = make_model()
    model = DistributedDataParallel(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = train_step(optimizer, accumulate(N), module=model)(loss_function(model, True))
    objects = {"model": base, "optimizer": optimizer, "step": step}
    if checkpoint.exists():
        for name, state in torch.load(checkpoint).items():
            objects[name].load_state_dict(state)
    for batch in step.over(batches_of(rank)[step.updates * N :]):
        if step(batch).complete:
            if rank == 0:
                states = {name: each.state_dict() for name, each in objects.items()}
                torch.save(states, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").rename(checkpoint)
            dist.barrier()
            if rank == 1 and step.updates == 2 and not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
    torch.save([p.detach() for p in base.parameters()], folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
