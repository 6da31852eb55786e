"""Two methods without which FSDP2 does not run on a CPU in torch 2.6. Later versions have them."""

import torch

if not hasattr(torch.cpu.Stream, "record_event"):
    torch.cpu.Stream.record_event = lambda self: None
    torch.cpu.Stream.wait_event = lambda self, event: None
