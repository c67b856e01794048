"""A model whose weights lie in parts on the processes (FSDP2), and the whole of it.

The rest of the program knows of this only here. A tensor that lies in parts is torch's `DTensor`; where a model is
whole on every process, what these functions are given is what they return.
"""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, str_to_bool
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor


def check_strategy(accelerator: Accelerator) -> None:
    """See that accelerate is set up to split the model in a way that this program knows, or not at all.

    Raises:
        ValueError: it is not.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate is set up for {kind.value}, which is not supported; for a model that does not fit on one GPU "
            "set it up for FSDP, version 2"
        )
    parallelism: Any = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled):
        raise ValueError("accelerate is set up for tensor or context parallelism, which is not supported; use FSDP")
    if kind != DistributedType.FSDP:
        if str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
            raise ValueError("accelerate is set up for FSDP, which it has for GPUs only, started by its launcher")
        return
    plugin: Any = accelerator.state.fsdp_plugin
    refused = {
        f"fsdp_version is {plugin.fsdp_version}; it must be 2": plugin.fsdp_version != 2,
        "fsdp_offload_params is true; it must be false": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing is true; it must be false, --gradient_checkpointing does the same": (
            plugin.activation_checkpointing
        ),
        # Without a policy the model would be one unit, whole on every GPU; by size lists of layers would be units.
        "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP": (
            plugin.auto_wrap_policy is not transformer_auto_wrap_policy
        ),
    }
    for message, holds in refused.items():
        if holds:
            raise ValueError(f"accelerate is set up for FSDP: {message}")


def local_part(tensor: torch.Tensor) -> Any:
    """What of a tensor lies on this process; it shares the memory. Not to be kept: the parts of weights may move."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, put together if it lies in parts. To be called by all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def join(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor of which this process has `part`, as it has of `like`. To be called by all processes."""
    if not isinstance(like, DTensor):
        return part
    mesh, placements = like.device_mesh, like.placements
    return whole(DTensor.from_local(part, mesh, placements, shape=like.shape, stride=like.stride()))


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this process shall have of a whole tensor, as it has of `like`. To be called by all processes."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements).to_local()


def forget_whole(model: Any) -> None:
    """Have the model be its parts again, and be put together anew when it is next called.

    After a call that no backward pass follows some of its weights stay whole, in the precision of the call, and are
    what `parameters()` gives. To be called before those are read, and after the parts were written to.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
