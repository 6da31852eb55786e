"""What torchrun starts in test_ranks.py: trains on several ranks, saves after every window, and goes on from there.

torchrun ... torchrun_train.py FOLDER [--kill]      with --kill, rank 1 dies once, after its second update
"""

import os
import signal
import sys
from pathlib import Path

import torch
from oracles import loss_of, make_model
from test_ranks import N, batches_of
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainkit import accumulate, train_step


def main(folder, kill):
    dist.init_process_group("gloo")
    rank, checkpoint = dist.get_rank(), folder / "checkpoint.pt"
    base = make_model()
    model = DistributedDataParallel(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = train_step(optimizer, accumulate(N), module=model)(
        lambda batch: (loss_of(model, batch), len(batch[0]))
    )
    if checkpoint.exists():
        state = torch.load(checkpoint)
        base.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step.load_state_dict(state["step"])
    for batch in step.over(batches_of(rank)[step.updates * N :]):
        if step(batch).complete:
            if rank == 0:
                state = {
                    "model": base.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step.state_dict(),
                }
                torch.save(state, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").rename(checkpoint)
            dist.barrier()
            if (
                kill
                and rank == 1
                and step.updates == 2
                and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            ):
                os.kill(os.getpid(), signal.SIGKILL)
    torch.save([p.detach() for p in base.parameters()], folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--kill" in sys.argv)
