"""Train an image tokenizer, one stage at a time.

    accelerate launch --num_cpu_threads_per_process 2 recipes/tokenizer.py --config configs/shapes/stage1.yaml
    accelerate launch --num_cpu_threads_per_process 2 recipes/tokenizer.py --config configs/shapes/stage2.yaml

Stage 1 starts from a pretrained vision model (`model.encoder`), stage 2 from stage 1's output (`model.init_from`);
`model.kind` says which tokenizer is built around it: vqrae, vfmtok or ideal, of which the last two have one stage. A
run that is started again goes on from its last checkpoint.
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
from unimm.training.dry_run import dry_run_tokenizer, short_tokenizer
from unimm.training.loop.arguments import TokenizerTrainingConfig, accumulation_steps
from unimm.training.loop.run import open_run
from unimm.training.tokenizer.objective import ObjectiveConfig
from unimm.training.tokenizer.trainer import PANEL_IMAGES, TokenizerTrainer

BEGINNING = used_when(lambda c: c.encoder is not None, "model.encoder, with which a tokenizer begins")


@dataclass
class TokenizerModelConfig:
    """`encoder` is a vision model's folder or hub id, `init_from` a tokenizer's, or a unified model's ("default": the
    one that comes with the library); `kind` is the tokenizer's model type, `config` are fields of its configuration and
    `image_size` the images' side, where it is not the encoder's own."""

    kind: str = "vqrae"
    encoder: str | None = None
    init_from: str | None = None
    image_size: Count | None = field(default=None, metadata=BEGINNING)
    config: dict = field(default_factory=dict, metadata=BEGINNING)
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
    """Raise UserError if the settings name no tokenizer that could be built, or a folder that is not there."""
    if (model.encoder is None) == (model.init_from is None):
        raise UserError("Give either model.encoder (to start a tokenizer) or model.init_from (to go on with one).")
    if model.kind not in TOKENIZERS:
        raise UserError(f"There is no tokenizer {model.kind!r}; model.kind is one of {', '.join(TOKENIZERS)}.")
    for name in ("encoder", "init_from"):
        require_place(f"model.{name}", getattr(model, name))


def build(model: TokenizerModelConfig) -> ImageTokenizer:
    tokenizer, attention = TOKENIZERS[model.kind], model.attn_implementation
    if model.encoder is not None:
        return tokenizer.from_encoder(
            model.encoder, image_size=model.image_size, attn_implementation=attention, **model.config
        )
    assert model.init_from is not None
    return begun_tokenizer(model.init_from, model.kind, attention)


def begun_tokenizer(path: str, kind: str, attn_implementation: str | None) -> ImageTokenizer:
    """The image tokenizer of a folder or hub id, which may hold a unified model around it."""
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
    encoder = model_fingerprint(tokenizer.encoder)  # the teacher
    with open_run(recipe, samples_per_step=samples_per_step, encoder=encoder, rows=images.sizes):
        TokenizerTrainer(tokenizer, images, train, recipe.loss, held_out=held_out).train()


if __name__ == "__main__":
    sys.exit(run_main(main, name="tokenizer"))
