"""Shared part of the recipes for a language model: data flows, `HostTrainer`, and the run."""

from pathlib import Path
from typing import Any, Protocol

from transformers import IntervalStrategy

from unimm.data.mixture import Mixture, MixtureConfig, held_out_lines, training_streams
from unimm.data.sources.ids import entropy_line
from unimm.data.text.collators import FlowCollator
from unimm.data.text_to_image import IdDrawings
from unimm.errors import UserError
from unimm.runs.processes import processes
from unimm.training.dry_run import dry_run_stream, short, show_label_mask
from unimm.training.language_model.adapters import Adapter
from unimm.training.language_model.callbacks import Panel
from unimm.training.language_model.trainer import HostTrainer
from unimm.training.loop.arguments import HostTrainingArguments
from unimm.training.loop.run import open_run


class HostRecipe(Protocol):
    """The settings that every such recipe has besides its model."""

    data: MixtureConfig
    train: HostTrainingArguments


def train_on_flows(
    recipe: HostRecipe,
    model: Any,
    processor: Any,
    panel: Panel | None = None,
    adapter: Adapter | None = None,
    *,
    dry_run: bool = False,
) -> None:
    """Train `model`, or the `adapter` in it, on the recipe's flows; settings, log, checkpoints and result are written
    to the output folder. With `dry_run`, only print the estimated cost and show a batch."""
    train, output = recipe.train, Path(recipe.train.output_dir)
    if dry_run:
        trainer = host_trainer(recipe, model, processor, args=short(train), adapter=adapter)
        dry_run_stream(trainer, train, show_label_mask(processor, output / "dry_run.html"))
        return
    parts = {"adapter": adapter, "panel": panel, "log_folder": output / "data"}
    trainer = host_trainer(recipe, model, processor, args=train, **parts)
    with open_run(recipe, samples_per_step=train.samples_per_step, rows=trainer.train_dataset.sizes):
        trainer.run()


def host_trainer(
    recipe: HostRecipe, model: Any, processor: Any, *, args: HostTrainingArguments, **parts: Any
) -> HostTrainer:
    """Build the trainer on the recipe's flows; `parts` are arguments of `HostTrainer`, and `log_folder`, the folder
    that lists skipped rows."""
    data = recipe.data
    train_stream, test_stream = training_streams(
        data, samples_per_step=args.samples_per_step, log_folder=parts.pop("log_folder", None)
    )
    for line in held_out_lines(train_stream, test_stream):
        processes().print(line)
    if test_stream is None and args.eval_strategy != IntervalStrategy.NO:
        raise UserError(
            f"train.eval_strategy is {args.eval_strategy.value!r} and data.num_eval_samples 0: raise the number, or "
            "set the strategy to no."
        )
    if data.changed_weights and not model.image_tokenizer.ids_are_patches:
        raise UserError(
            f"data.flows.{next(iter(data.changed_weights))}.changed_weight compares patches, and the image tokens of a "
            f"{type(model.image_tokenizer).__name__} are none: leave it out."
        )
    if all(flow.kind == "drawing" for flow in data.flows.values()):
        model.model.multi_modal_projector.requires_grad_(False)  # no image inputs: weight decay alone would move it
    return HostTrainer(
        model,
        args,
        processor=processor,
        data_collator=FlowCollator(
            processor,
            max_length=args.max_length,
            pack_length=args.pack_length,
            changed_weights=data.changed_weights,
        ),
        train_dataset=train_stream,
        eval_dataset=test_stream,
        flow_weights=data.weights,
        stream_seed=data.seed,
        unigram_entropies=unigram_entropies(train_stream, model),
        **parts,
    )


def unigram_entropies(stream: Mixture, model: Any) -> dict[str, float]:
    """Compute and print {flow: entropy of its ids' frequencies in nats} of the flows of pre-extracted ids.

    It is the loss of a model that has learned id frequencies only: a useful one must get below it.

    Raises:
        UserError: the ids were made by another tokenizer than the model's.
    """
    found = {}
    for name, flow in zip(stream.names, stream.sources, strict=True):
        if isinstance(flow, IdDrawings):
            ids = flow.ids
            ids.info.require(tokenizer_fingerprint=model.image_tokenizer.fingerprint)
            found[name] = ids.entropy
            processes().print(f"{name}: {entropy_line(len(ids), ids.entropy, ids.info.codebook_size)}")
    return found
