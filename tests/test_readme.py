"""Every Python block of the README runs, in order, in one namespace with what its reader has."""

import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

BLOCKS = re.findall(
    r"```python\n(.*?)```",
    Path(__file__).parent.parent.joinpath("README.md").read_text(),
    re.DOTALL,
)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Linear(3, 4)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            nn.ModuleDict({"dense": nn.Linear(4, 4), "LayerNorm": nn.LayerNorm(4)})
            for _ in range(3)
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.embeddings(x)
        for layer in self.encoder.layer:
            x = layer.LayerNorm(layer.dense(x).tanh())
        return self.head(x)


@pytest.fixture
def as_torchrun_starts_it(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    yield
    torch.distributed.destroy_process_group()


def test_every_block_runs(as_torchrun_starts_it, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # one of them writes
    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    space = {
        "torch": torch,
        "model": model,
        "optimizer": optimizer,
        "scheduler": SimpleNamespace(step=lambda: None),
        "loss_fn": nn.functional.cross_entropy,
        "loader": [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))] * 6,
        "D": nn.Linear(2, 2),
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "optimizer_g": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    assert len(BLOCKS) >= 6
    for block in BLOCKS:
        before = [p.clone() for p in model.parameters()]
        exec(compile(block, "README.md", "exec"), space)
        if "in step.over(loader)" in block:
            assert space["step"].updates == 2 * (3 if "run.epochs(3)" in block else 1)
            assert any(
                not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
            )
    assert len(space["names"]) == 2 + 2 * 4 + 2 and not model.embeddings.weight.requires_grad
