"""What FSDP2 lacks on a CPU in torch 2.6, as later versions have it. There nothing is replaced."""

import torch

if torch.__version__ < (2, 7):
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    def copy_out(gathered, parameters, group, copy=groups.foreach_all_gather_copy_out):
        """The weights that are gathered again for backward are no change for autograd."""
        outputs = [output for p in parameters for output in p.all_gather_outputs]
        versions = [output._version for output in outputs]
        copy(gathered, parameters, group)
        for output, version in zip(outputs, versions, strict=True):
            torch._C._autograd._unsafe_set_version_counter(output, version)

    def divide_factors(group, replicas, dtype, find=collectives._get_gradient_divide_factors):
        """gloo cannot average, and torch asks it to in float32: divide as in float16."""
        return find(group, replicas, torch.float16)

    torch.cpu.Stream.record_event = lambda self: None
    torch.cpu.Stream.wait_event = lambda self, event: None
    groups.foreach_all_gather_copy_out = copy_out
    collectives._get_gradient_divide_factors = divide_factors
