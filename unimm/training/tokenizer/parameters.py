"""Trainable parts and optimizer parameter groups of image tokenizers and unified models."""

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from unimm.errors import UserError
from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.encoders import final_norm


def set_trainable(tokenizer: ImageTokenizer, stage: int) -> None:
    """Freeze the encoder in stage 1, train it too in stage 2, train the decoder alone in stage 3; a final norm that is
    not used, so receives no gradient, stays frozen.

    Raises:
        UserError: stage 2 of a tokenizer whose encoder is frozen by design.
    """
    if stage == 2 and not tokenizer.trains_encoder:
        raise UserError(
            f"{type(tokenizer).__name__} keeps its encoder as it is: train.stage 2 would move it, take 1 or 3."
        )
    tokenizer.requires_grad_(stage != 3)
    if stage == 3:
        tokenizer.decoder.requires_grad_(True)
        tokenizer.pixel_head.requires_grad_(True)
    tokenizer.encoder.requires_grad_(stage == 2)
    final_norm(tokenizer.encoder).requires_grad_(stage == 2 and tokenizer.config.apply_post_norm)


def learning_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated transformer blocks with trainable weights; only the language model's if the vision tower is
    frozen."""
    names = set(model._no_split_modules or ())
    return [
        block
        for block in model.modules()
        if type(block).__name__ in names and any(p.requires_grad for p in block.parameters())
    ]


def train_projector_only(model: PreTrainedModel) -> None:
    """Freeze everything but the projector of a unified model, as LLaVA's pretraining does."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)


def host_parameter_groups(
    model: PreTrainedModel,
    decayed: Collection[str],
    *,
    weight_decay: float,
    projector_learning_rate: float | None = None,
    tables: Iterable[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Return the trainable parameters of a unified model in groups: with weight decay (names in `decayed`) and without,
    the projector separately if it has its own learning rate, and the embedding `tables` separately, marked "tables"."""
    rows = {id(table) for table in tables}
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            projector = projector_learning_rate is not None and "multi_modal_projector" in name
            groups.setdefault((projector, id(parameter) in rows, name not in decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if plain else weight_decay,
            **({"lr": projector_learning_rate} if projector else {}),
            **({"tables": True} if table else {}),
        }
        for (projector, table, plain), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def part_of(name: str) -> str:
    """Return the part of a model that a weight belongs to: its first name, or the first two below `model` or
    `siglip`."""
    words = name.split(".")
    return ".".join(words[: 2 if words[0] in ("model", "siglip") else 1])


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Group matrices and kernels with weight decay, and vectors (norms, biases) without."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.ndim < 2, []).append(parameter)
    return [
        {"params": members, "weight_decay": 0.0 if plain else weight_decay}
        for plain, members in sorted(groups.items(), key=lambda item: item[0])
    ]


def parameter_groups(
    tokenizer: ImageTokenizer, learning_rate: float, encoder_learning_rate: float
) -> list[dict[str, Any]]:
    """Group the parameters into encoder and rest, each split into weights with weight decay, and vectors, positions
    and the quantizer without."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in tokenizer.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or "position" in name or name.startswith("quantizer.")
            groups.setdefault((name.startswith("encoder."), plain), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": encoder_learning_rate if encoder else learning_rate,
            **({"weight_decay": 0.0} if plain else {}),
        }
        for (encoder, plain), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
