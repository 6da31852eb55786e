"""Runs a function on several ranks, each a process of its own, over gloo; ends them all in time, whatever happens."""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import traceback
from pathlib import Path

import torch
from torch import distributed as dist

SECONDS = 150


def _child(function, rank, ranks, store, answers, arguments):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )  # asked for by Accelerate; a FileStore needs none
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks
        )
        answer = function(rank, ranks, *arguments)
        dist.barrier()
        dist.destroy_process_group()
        # As bytes: a tensor itself would stay in the memory of this process, which ends now.
        buffer = io.BytesIO()
        torch.save(answer, buffer)
        answers.send((True, buffer.getvalue()))
    except BaseException:
        answers.send((False, traceback.format_exc()))


def run(function, ranks, *arguments):
    """What ``function(rank, ranks, *arguments)`` returns on each rank."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            context.Process(
                target=_child,
                args=(
                    function,
                    rank,
                    ranks,
                    str(Path(folder) / "store"),
                    pipes[rank][1],
                    arguments,
                ),
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            answers = []
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
