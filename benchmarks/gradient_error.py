"""How far a window's gradient is from the full batch's, where sentences have different lengths.

    python benchmarks/gradient_error.py

Ten micro-batches make windows of four; the last window has two. Each micro-batch has its own number
of tokens. The reference is the gradient of the mean over all tokens of the window in one batch.
Distances are relative L2 distances over all parameters, in float64.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from trainkit import accumulate

N = 4


def gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def main(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Embedding(50, 16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 50)
    ).double()
    lengths = [31, 208, 57, 22, 150, 40, 75, 190, 24, 120]
    batches = [(torch.randint(50, (length,)), torch.randint(50, (length,))) for length in lengths]

    exact = []
    for start in range(0, len(batches), N):
        model.zero_grad()
        tokens, targets = (
            torch.cat(parts) for parts in zip(*batches[start : start + N], strict=True)
        )
        cross_entropy(model(tokens), targets).backward()
        exact.append(gradient(model))

    usual = []
    model.zero_grad()
    for i, (tokens, targets) in enumerate(batches, 1):
        (cross_entropy(model(tokens), targets) / N).backward()
        if i % N == 0 or i == len(batches):
            usual.append(gradient(model))
            model.zero_grad()

    ours = []

    @accumulate(N, model)
    def step(tokens, targets):
        yield cross_entropy(model(tokens), targets), len(tokens)
        ours.append(gradient(model))

    for tokens, targets in step.over(batches):
        step(tokens, targets)

    print("| window | the usual loop | accumulate |")
    print("|---|---|---|")
    errors = []
    for i, (reference, theirs, mine) in enumerate(zip(exact, usual, ours, strict=True), 1):
        errors.append(
            [((found - reference).norm() / reference.norm()).item() for found in (theirs, mine)]
        )
        print(f"| {i} | {errors[-1][0]:.2f} | {errors[-1][1]:.0e} |")
    return errors


if __name__ == "__main__":
    main()
