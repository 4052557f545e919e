"""FSDP2 through accelerate: which modules are sharded, which stay whole, and how to gather the weights.

Every repeated block with trainable weights is an FSDP unit; the rest belongs to the root unit. The frozen image
tokenizer of a unified model stays whole in every process: images to generate are tokenized outside of a forward, where
FSDP would not gather its shards, and a process without images need not wait for one with images. Tied embeddings are
both in the root unit, so they stay tied.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from unimm.errors import UserError
from unimm.training.tokenizer.parameters import learning_blocks


def weights_to_save(trainer: Any) -> dict[str, Tensor] | None:
    """Gather the weights of a `Trainer`'s model if they are sharded, else return None; call it on every process."""
    if trainer.is_fsdp_enabled:
        return whole_state_dict(trainer.model)
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return None


def check_strategy(fsdp: bool, deepspeed: bool, *, sharded_by_trainer: bool, whole_only: str | None = None) -> None:
    """Raise UserError for a parallelism that would silently be replaced by another one, or fail late.

    Args:
        fsdp, deepspeed: what accelerate has actually set up.
        sharded_by_trainer: whether the trainer supports sharded models at all.
        whole_only: name of a setting of this run that needs whole tensors.

    Raises:
        UserError: FSDP without a GPU, which accelerate silently replaces by DDP; a tokenizer's run, or a setting that
            needs whole tensors, under FSDP or DeepSpeed.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and not torch.accelerator.is_available():
        raise UserError(
            "FSDP was asked for on a machine without a GPU, where accelerate would train by DDP instead: launch with "
            "configs/accelerate/ddp.yaml."
        )
    if (fsdp or deepspeed or asked) and not sharded_by_trainer:
        raise UserError(
            "An image tokenizer has two optimizers and trains by DDP: launch recipes/tokenizer.py with "
            "configs/accelerate/ddp.yaml."
        )
    if (fsdp or deepspeed) and whole_only:
        raise UserError(
            f"{whole_only} needs whole tensors in every process: leave it out under FSDP and DeepSpeed, or launch with "
            "configs/accelerate/ddp.yaml."
        )


def refuse_average(zero_stage: int) -> None:
    """Raise UserError if DeepSpeed shards the weights (ZeRO-3), so that they cannot be averaged."""
    if zero_stage == 3:
        raise UserError(
            "train.ema_decay averages weights, and ZeRO-3 takes them apart: leave it out, or launch with "
            "configs/accelerate/deepspeed_zero2.yaml or fsdp2.yaml."
        )


def set_up_plugin(plugin: Any, model: Any) -> None:
    """Make accelerate's FSDP plugin shard the trainable blocks of a unified model, but not its image tokenizer."""
    plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in learning_blocks(model)})
    plugin.ignored_modules = [model.image_tokenizer]


def as_sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard `tensor`, of which every process holds the same copy, as `like` is sharded."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def as_local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor; any other tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_whole(tensor: Tensor) -> Tensor:
    """Gather a tensor if it is sharded; call it on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Gather all weights on the CPU of the main process, for `save_pretrained(state_dict=)`; the result is empty
    elsewhere. Call it on every process."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    for tied in getattr(model, "all_tied_weights_keys", {}):  # gathered, they are two copies of one weight
        weights.pop(tied, None)
    return weights
