"""Models sharded over processes (FSDP2): local shards, full tensors, and the configurations that are supported.

Only this module knows about sharding. A sharded tensor is a `torch.distributed.tensor.DTensor`; for a model that is not
sharded these functions return their argument.
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
    """Check that accelerate is configured for data parallelism or for a supported kind of FSDP.

    Raises:
        ValueError: it is configured for something else.
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
            raise ValueError("accelerate is set up for FSDP, which works only on GPUs and under `accelerate launch`")
        return
    plugin: Any = accelerator.state.fsdp_plugin
    refused = {
        f"fsdp_version is {plugin.fsdp_version}; it must be 2": plugin.fsdp_version != 2,
        "fsdp_offload_params is true; it must be false": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing is true; it must be false, --gradient_checkpointing does the same": (
            plugin.activation_checkpointing
        ),
        # Without a policy the model would be one FSDP unit, gathered in full on every GPU; a policy by size could make
        # a unit of a ModuleList, which is never called.
        "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP": (
            plugin.auto_wrap_policy is not transformer_auto_wrap_policy
        ),
    }
    for message, holds in refused.items():
        if holds:
            raise ValueError(f"accelerate is set up for FSDP: {message}")


def local_part(tensor: torch.Tensor) -> Any:
    """This process's shard of a tensor; shares its memory. Do not keep it: FSDP may move the shards of weights."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def weights_of(optimizer: Any) -> list[torch.nn.Parameter]:
    """The weights that an optimiser updates, or their shards, in the model's order.

    `model.parameters()` visits all modules, which takes longer than clipping the gradients of a small model.
    """
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, gathered if it is sharded. Must be called by all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def join(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The full tensor whose local shard is `part`, sharded like `like`. Must be called by all processes."""
    if not isinstance(like, DTensor):
        return part
    mesh, placements = like.device_mesh, like.placements
    return whole(DTensor.from_local(part, mesh, placements, shape=like.shape, stride=like.stride()))


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's shard of a full tensor, sharded like `like`. Must be called by all processes."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements).to_local()


def reshard(model: Any) -> None:
    """Reshard an FSDP model, so that its weights are gathered anew at the next call.

    After a forward pass without a backward pass some weights stay gathered, in the precision of the forward pass, and
    `parameters()` returns those. Call this before reading the weights, and after writing to their shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
