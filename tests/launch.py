"""Runs a function on several ranks over gloo. Ends all processes in time, whatever happens."""

import io
import multiprocessing
import os
import tempfile
import traceback

import older_torch  # noqa: F401
import torch
from torch import distributed as dist

SECONDS = 150
# A rank is a fork of a process that has imported torch and has no threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "trainkit"])


def _child(function, rank, ranks, store, answers, arguments):
    # MASTER_ADDR and MASTER_PORT are required by Accelerate. A FileStore needs none.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        store = dist.FileStore(store, ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        answer = function(rank, ranks, *arguments)
        dist.barrier()
        dist.destroy_process_group()
        buffer = io.BytesIO()  # a tensor itself would stay in the memory of this process
        torch.save(answer, buffer)
        answers.send((True, buffer.getvalue()))
    except BaseException:
        answers.send((False, traceback.format_exc()))


def run(function, ranks, *arguments):
    """Return what ``function(rank, ranks, *arguments)`` returns on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        store, pipes = f"{folder}/store", [CONTEXT.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            CONTEXT.Process(target=_child, args=(function, rank, ranks, store, end, arguments))
            for rank, (_, end) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        answers = []
        try:
            for rank, (end, _) in enumerate(pipes):
                if not end.poll(SECONDS):
                    raise TimeoutError(f"rank {rank} of {ranks} did not answer within {SECONDS} s")
                finished, answer = end.recv()
                if not finished:
                    raise RuntimeError(f"rank {rank} of {ranks}:\n{answer}")
                answers.append(torch.load(io.BytesIO(answer)))
            return answers
        finally:
            for process in processes:
                process.join(10 if len(answers) == ranks else 0)
                process.kill()
                process.join()
