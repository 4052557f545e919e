"""Class-conditional image generation: train LlamaGen's GPT (arXiv 2406.06525) on the ids of any image tokenizer.

    accelerate launch --num_cpu_threads_per_process 2 recipes/c2i.py --config configs/cifar10/c2i.yaml

Extracts the ids of labeled images if they are not on disk yet, trains, and saves GPT and tokenizer in one folder, from
which `eval/c2i_samples.py` samples. Rerunning the command resumes from the last checkpoint.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.trainer_utils import set_seed

from unimm.class_conditional import ClassConditionalConfig, ClassConditionalGPT
from unimm.class_conditional.drawing import ClassDrawer, SheetConfig, draw_sheet
from unimm.class_conditional.extraction import ClassIdsConfig, prepare_ids
from unimm.class_conditional.ids import ClassIds, IdRows, IdStream
from unimm.config.loading import parse_training_args
from unimm.config.schema import Count
from unimm.data.image_files import save_image_atomically
from unimm.data.sources.ids import entropy_line
from unimm.errors import UserError, require_place, run_main
from unimm.runs.provenance import write_atomically
from unimm.tokenizer.loading import load_with_processor
from unimm.training.dry_run import SHEET_IMAGES, dry_run_stream, short, show_images
from unimm.training.language_model.class_conditional_trainer import ClassConditionalTrainer
from unimm.training.loop.arguments import C2ITrainingArguments
from unimm.training.loop.run import open_run


@dataclass
class C2IModelConfig:
    """The GPT to train; codebook size and grid come from the image tokenizer.

    Args:
        image_tokenizer: a folder or hub id.
        num_classes: classes of the data set.
        size: one of LlamaGen's (B, L, XL, XXL, 2B, 3B).
        config: fields of ClassConditionalConfig that override those of `size`.
        attn_implementation: as in transformers.
    """

    image_tokenizer: str
    num_classes: Count
    size: str = "B"
    config: dict = field(default_factory=dict)
    attn_implementation: str | None = None


@dataclass
class C2IRecipe:
    model: C2IModelConfig
    data: ClassIdsConfig
    train: C2ITrainingArguments
    sheet: SheetConfig = field(default_factory=SheetConfig)


def build(recipe: C2IRecipe, ids: ClassIds, *, compiled: bool = False) -> ClassConditionalGPT:
    """Build the GPT for these ids, randomly initialized; `compiled` compiles its blocks."""
    facts = {
        "codebook_size": ids.info.codebook_size,
        "grid": ids.info.grid,
        "num_classes": recipe.model.num_classes,
        "tokenizer_fingerprint": ids.info.tokenizer_fingerprint,
    }
    if decided := sorted(recipe.model.config.keys() & facts.keys()):
        raise UserError(f"model.config may not set {decided[0]!r}: the tokenizer and model.num_classes decide it.")
    config = ClassConditionalConfig.of_size(recipe.model.size, **recipe.model.config, **facts)
    model = ClassConditionalGPT._from_config(config, attn_implementation=recipe.model.attn_implementation)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=True)
    return model


def main() -> None:
    recipe, dry_run = parse_training_args(C2IRecipe)
    train = recipe.train
    require_place("The image tokenizer model.image_tokenizer", recipe.model.image_tokenizer)
    recipe.data.require_sources()
    tokenizer, image_processor = load_with_processor(recipe.model.image_tokenizer)
    tokenizer.requires_grad_(False)
    with train.main_process_first(local=False):
        tokenizer.to(train.device)
        ids = prepare_ids(recipe.data, "train", tokenizer, image_processor)
        held_out = prepare_ids(recipe.data, "eval", tokenizer, image_processor)
    for each in (ids, held_out):
        each.require_classes(recipe.model.num_classes)
    # Seeded only now: extraction may consume random numbers, and a run that finds its ids on disk must not differ.
    set_seed(train.seed)
    model = build(recipe, ids, compiled=recipe.train.compile_blocks and not dry_run)
    if dry_run:
        image_of = lambda batch: tokenizer.decode(batch["ids"][:SHEET_IMAGES])  # noqa: E731
        show = show_images(Path(train.output_dir) / "dry_run.png", image_of)
        dry_run_stream(trainer_of(recipe, short(train), model, ids, held_out), train, show)
        return
    facts = {"rows of ids": len(ids), "tokenizer": ids.info.tokenizer_fingerprint}
    with open_run(recipe, samples_per_step=train.samples_per_step, **facts):
        train_and_draw(recipe, model, ClassDrawer(model, tokenizer, image_processor), ids, held_out)


def trainer_of(
    recipe: C2IRecipe,
    args: C2ITrainingArguments,
    model: ClassConditionalGPT,
    ids: ClassIds,
    held_out: ClassIds,
) -> ClassConditionalTrainer:
    """Build the trainer of `model` on a seeded stream of `ids`."""
    stream = IdStream(ids, args.max_steps * args.samples_per_step, recipe.data.seed)
    return ClassConditionalTrainer(model, args, train_dataset=stream, eval_dataset=IdRows(held_out))


def train_and_draw(
    recipe: C2IRecipe, model: ClassConditionalGPT, drawer: ClassDrawer, ids: ClassIds, held_out: ClassIds
) -> None:
    """Train, then save the GPT with its tokenizer, a grid of samples and the held-out loss."""
    train, output = recipe.train, Path(recipe.train.output_dir)
    trainer = trainer_of(recipe, train, model, ids, held_out)
    entropy, uniform = ids.entropy, math.log(ids.info.codebook_size)
    print(f"{len(ids)} sequences to train on, {len(held_out)} held out: {held_out.info.made_from}")
    print(entropy_line(len(ids), entropy, ids.info.codebook_size))
    if not (trainer.done or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # both prepare a model only once
        print(f"held-out loss at the start {trainer.held_out_loss():.3f}, unigram entropy {entropy:.3f} nats an id")
    trainer.train_or_load()
    loss = trainer.held_out_loss()
    print(f"held-out loss at the end {loss:.3f}, unigram entropy {entropy:.3f} nats an id")
    if trainer.is_world_process_zero():
        with trainer.averaged(), torch.compiler.set_stance("force_eager"):
            model.eval()
            drawer.save(output)
            save_image_atomically(draw_sheet(drawer, recipe.sheet), output / "sheet.png")
        result = {"held_out_loss": loss, "unigram_entropy": entropy, "uniform": uniform, "steps": train.max_steps}
        write_atomically(output / "result.json", json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_main(main, name="c2i"))
