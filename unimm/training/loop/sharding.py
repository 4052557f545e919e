"""FSDP2 through accelerate: what is split over the processes, what stays whole, and whole weights at the end.

Every repeated block that learns is a unit of its own; what is left is the root's. The image tokenizer of a language
model, which is frozen, stays whole in every process: ids are looked up outside of a forward too (drawings), where the
parts of a sharded tensor would be met, and a process without images need not wait for one that has some. Tied
embeddings are both in the root, so they stay tied.
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
    """The whole weights of a `Trainer`'s model where they are not simply in it; call it in every process."""
    if trainer.is_fsdp_enabled:
        return whole_state_dict(trainer.model)
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return None


def check_strategy(fsdp: bool, deepspeed: bool, *, sharded_by_trainer: bool, whole_only: str | None = None) -> None:
    """Refuse what would silently be something else, or fail late.

    Args:
        fsdp, deepspeed: what accelerate has really set up.
        sharded_by_trainer: whether the trainer can train parts of a model at all.
        whole_only: a setting of this run that needs whole tensors.

    Raises:
        UserError: FSDP without a GPU, which accelerate makes DDP without a word; a tokenizer's run, or such a setting,
            under FSDP or DeepSpeed.
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
    """Raise UserError where DeepSpeed leaves no weights to average."""
    if zero_stage == 3:
        raise UserError(
            "train.ema_decay averages weights, and ZeRO-3 takes them apart: leave it out, or launch with "
            "configs/accelerate/deepspeed_zero2.yaml or fsdp2.yaml."
        )


def set_up_plugin(plugin: Any, model: Any) -> None:
    """Let accelerate's FSDP plugin shard the blocks of a unified model that learn, and leave its tokenizer whole."""
    plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in learning_blocks(model)})
    plugin.ignored_modules = [model.image_tokenizer]


def as_sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, which every process holds alike, split as `like` is."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def as_whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All weights, gathered on the CPU of the main process, for `save_pretrained(state_dict=)`; elsewhere nothing. Call
    it in every process."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    for tied in getattr(model, "all_tied_weights_keys", {}):  # gathered, they are two copies of one weight
        weights.pop(tied, None)
    return weights
