"""Which parts of a tokenizer learn, and how fast."""

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from unimm.errors import UserError
from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.encoders import final_norm


def set_trainable(tokenizer: ImageTokenizer, stage: int) -> None:
    """Stage 1 freezes the encoder, stage 2 trains it, stage 3 trains the decoder alone; what no gradient can reach (an
    unused final norm) stays frozen.

    Raises:
        UserError: stage 2 of a tokenizer whose encoder is frozen by its making.
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
    """The repeated blocks that learn: the language model's, where the tower is frozen."""
    names = set(model._no_split_modules or ())
    return [
        block
        for block in model.modules()
        if type(block).__name__ in names and any(p.requires_grad for p in block.parameters())
    ]


def train_projector_only(model: PreTrainedModel) -> None:
    """Freeze a unified model but for its projector, as LLaVA's pretraining does."""
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
    """What learns of a unified model, in groups: with weight decay (the names in `decayed`) and without, the projector
    by itself where it has a rate of its own, and `tables` of rows by themselves, marked so."""
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
    """The part of a model that a weight belongs to: its first name, or its second below a `model`."""
    words = name.split(".")
    return ".".join(words[: 2 if words[0] in ("model", "siglip") else 1])


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels with weight decay, vectors (norms, biases) without."""
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
    """Encoder and the rest, each split into weights with decay, and vectors, positions and the quantizer without."""
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
