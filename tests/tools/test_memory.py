"""The memory of a step on a CPU, against what it is known to take."""

import torch

from trainkit.tools.doctor.memory import peak_memory

MIB = 2**20
CPU = torch.device("cpu")


def block(mebibytes):
    return torch.empty(mebibytes * MIB, dtype=torch.uint8)


def test_the_peak_is_the_most_that_is_alive_at_once():
    def one_after_the_other():
        for _ in range(5):
            block(3)

    assert peak_memory(one_after_the_other, CPU) == 3 * MIB
    assert peak_memory(lambda: [block(3) for _ in range(5)], CPU) == 15 * MIB
    assert peak_memory(lambda: None, CPU) == 0


def test_tensors_from_before_views_and_changes_in_place_are_not_counted():
    before = block(7)
    assert peak_memory(lambda: before.add_(1).view(7, -1)[2:].reshape(-1), CPU) == 0
    assert peak_memory(lambda: before + 1, CPU) == 7 * MIB


def test_activations_are_counted_until_backward_frees_them():
    inputs = torch.ones(MIB // 4, requires_grad=True)  # 1 MiB

    def forward_and_backward():
        loss = inputs.exp().exp().exp().sum()  # each is saved for backward
        loss.backward()

    # Three outputs; in backward the last gradient, expanded, and its product live beside them.
    assert 3 * MIB <= peak_memory(forward_and_backward, CPU) <= 5 * MIB
    assert peak_memory(lambda: inputs.detach().exp().exp_().exp_(), CPU) == MIB
