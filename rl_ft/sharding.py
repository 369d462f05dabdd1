"""A model that does not fit one GPU: in shards on all learner ranks (FSDP2), and whole again.

Accelerate shards, saves and resumes it; here is what it is told, and the way back to ordinary
tensors. Importing this module imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

TRAINER_ARGS: dict[str, Any] = {
    "fsdp": True,
    # A checkpoint has whole tensors in plain files: each is sealed, any number of ranks resumes.
    "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"},
    # Else every rank would add up gradients of the whole model until the last micro-batch.
    "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
}
"""What `TrainingArguments` are told where the model is sharded."""


def shard_on_cpus(trainer: Trainer) -> None:
    """Where there are only CPUs Accelerate ignores that sharding was asked for: insist on it."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state, asked = trainer.accelerator.state, trainer.args.fsdp_plugin_args
    if asked and state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**asked)
        # In both, as Accelerate does: whenever it looks, the one takes over what the other says.
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, detached; if there are shards among them, put together on the first rank's CPU.

    All ranks must then call it alike, and the others get nothing.
    """
    import torch
    from torch.distributed.tensor import DTensor

    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return {name: tensor.detach() for name, tensor in tensors.items()}
    gathered = {}
    for name, tensor in tensors.items():
        full = tensor.detach()
        if isinstance(full, DTensor):
            full = full.full_tensor()
        if torch.distributed.get_rank() == 0:
            gathered[name] = full.cpu()
    return gathered
