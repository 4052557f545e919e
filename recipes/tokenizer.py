"""Train an image tokenizer, one stage at a time.

    accelerate launch --num_cpu_threads_per_process 2 recipes/tokenizer.py --config configs/shapes/stage1.yaml
    accelerate launch --num_cpu_threads_per_process 2 recipes/tokenizer.py --config configs/shapes/stage2.yaml

Stage 1 starts from a pretrained vision model (`model.encoder`), stage 2 from stage 1's output (`model.init_from`).
`model.kind` selects the tokenizer that is built around it: vqrae, vfmtok or ideal; the last two have one stage.
Rerunning the command resumes from the last checkpoint.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedConfig
from transformers.trainer_utils import set_seed

from unimm.config.loading import parse_training_args
from unimm.config.schema import Count, refuse_unused, used_when
from unimm.data.image_streams import ImageDataConfig, held_out_images, held_out_lines, image_stream
from unimm.errors import UserError, reading, require_place, run_main
from unimm.mllm import load
from unimm.mllm.loading import DEFAULT
from unimm.runs.processes import processes
from unimm.runs.provenance import model_fingerprint
from unimm.tokenizer import TOKENIZERS, ImageTokenizer
from unimm.tokenizer.vqrae import with_new_head
from unimm.training.dry_run import dry_run_tokenizer, short_tokenizer
from unimm.training.loop.arguments import TokenizerTrainingConfig, accumulation_steps
from unimm.training.loop.run import open_run
from unimm.training.tokenizer.objective import ObjectiveConfig
from unimm.training.tokenizer.trainer import PANEL_IMAGES, TokenizerTrainer

BEGINNING = used_when(lambda c: c.encoder is not None, "model.encoder, with which a tokenizer begins")


@dataclass
class TokenizerModelConfig:
    """The tokenizer to train: either a new one around `encoder`, or the one at `init_from`.

    Args:
        kind: the tokenizer's model type.
        encoder: folder or hub id of a vision model.
        init_from: folder or hub id of a tokenizer or a unified model ("default": the one shipped with the library).
        image_size: side of the images in pixels; None takes the encoder's own.
        config: fields of the tokenizer's configuration.
        new_head: with `init_from`, the fields of another pixel head (`pixel_head: conv`), trained from random weights.
        attn_implementation: as in transformers.
    """

    kind: str = "vqrae"
    encoder: str | None = None
    init_from: str | None = None
    image_size: Count | None = field(default=None, metadata=BEGINNING)
    config: dict = field(default_factory=dict, metadata=BEGINNING)
    new_head: dict = field(
        default_factory=dict,
        metadata=used_when(lambda c: c.init_from is not None and c.kind == "vqrae", "a VQRAE at model.init_from"),
    )
    attn_implementation: str | None = None


@dataclass
class TokenizerRecipe:
    train: TokenizerTrainingConfig
    model: TokenizerModelConfig = field(default_factory=TokenizerModelConfig)
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    loss: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        refuse_unused(self.data, ["caption_template"], "a recipe that reads captions", prefix="data.")
        if self.train.stage != 2:
            refuse_unused(self.loss, ["distillation_weight"], "train.stage 2", prefix="loss.")
        for level, kinds in (("deep", ("vfmtok", "ideal")), ("shallow", ("ideal",))):
            if self.model.kind not in kinds:
                weights = [f"{level}_cosine_weight", f"{level}_mse_weight"]
                refuse_unused(self.loss, weights, f"model.kind {' or '.join(kinds)}", prefix="loss.")


def require_model(model: TokenizerModelConfig) -> None:
    """Raise UserError if the settings do not define a tokenizer, or name a folder that does not exist."""
    if (model.encoder is None) == (model.init_from is None):
        raise UserError("Give either model.encoder (to start a tokenizer) or model.init_from (to go on with one).")
    if model.kind not in TOKENIZERS:
        raise UserError(f"There is no tokenizer {model.kind!r}; model.kind is one of {', '.join(TOKENIZERS)}.")
    for name in ("encoder", "init_from"):
        require_place(f"model.{name}", getattr(model, name))


def build(model: TokenizerModelConfig) -> ImageTokenizer:
    """Build a new tokenizer around `model.encoder`, or load the one at `model.init_from`."""
    tokenizer, attention = TOKENIZERS[model.kind], model.attn_implementation
    if model.encoder is not None:
        return tokenizer.from_encoder(
            model.encoder, image_size=model.image_size, attn_implementation=attention, **model.config
        )
    assert model.init_from is not None
    begun = begun_tokenizer(model.init_from, model.kind, attention)
    return with_new_head(begun, **model.new_head) if model.new_head else begun


def begun_tokenizer(path: str, kind: str, attn_implementation: str | None) -> ImageTokenizer:
    """Load the image tokenizer from a folder or hub id, which may hold a whole unified model."""
    if path != DEFAULT:
        with reading("The tokenizer model.init_from", path):
            found = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
        if found in TOKENIZERS:
            require_kind(path, found, kind)
            with reading("The tokenizer model.init_from", path):
                return TOKENIZERS[kind].from_pretrained(path, attn_implementation=attn_implementation)
    unified, _ = load(path, device="cpu", dtype=torch.float32, attn_implementation=attn_implementation)
    require_kind(path, unified.image_tokenizer.config.model_type, kind)
    return unified.image_tokenizer


def require_kind(path: str, found: str, kind: str) -> None:
    """Raise UserError if the tokenizer found at `path` is not of `kind`."""
    if found != kind:
        raise UserError(f"{path} is a {found} model and model.kind is {kind!r}.")


def main() -> None:
    recipe, dry_run = parse_training_args(TokenizerRecipe)
    train = recipe.train
    require_model(recipe.model)
    set_seed(train.seed)
    count = processes().num_processes
    if train.global_batch_size is not None:
        train.gradient_accumulation_steps = accumulation_steps(train.global_batch_size, train.batch_size, count)
    samples_per_step = train.batch_size * train.gradient_accumulation_steps * count
    log = Path(train.output_dir) / "data"
    images = image_stream(recipe.data, train.steps * samples_per_step, train.seed, log_folder=log)
    held_out = held_out_images(recipe.data, PANEL_IMAGES, train.seed)
    for line in held_out_lines(images, held_out):
        processes().print(line)
    tokenizer = build(recipe.model)
    if dry_run:
        trainer = TokenizerTrainer(tokenizer, images, short_tokenizer(train), recipe.loss)
        dry_run_tokenizer(trainer, train, Path(train.output_dir) / "dry_run.png")
        return
    encoder = model_fingerprint(tokenizer.encoder)  # before training: a resumed run must start from the same teacher
    with open_run(recipe, samples_per_step=samples_per_step, encoder=encoder, rows=images.sizes):
        TokenizerTrainer(tokenizer, images, train, recipe.loss, held_out=held_out).train()


if __name__ == "__main__":
    sys.exit(run_main(main, name="tokenizer"))
