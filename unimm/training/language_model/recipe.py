"""The half that every recipe for a language model shares: flows of samples into a `HostTrainer`."""

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
    """What the settings of such a recipe hold beside its model."""

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
    """Train `model`, or the `adapter` in it, on the recipe's flows; the run's settings, log, checkpoints and result are
    in its output folder. With `dry_run` only say what it would take, and show a batch."""
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
    """A trainer on the recipe's flows; `log_folder` among the parts is where rows that are skipped are named."""
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
    if all(flow.kind == "drawing" for flow in data.flows.values()):
        model.model.multi_modal_projector.requires_grad_(False)  # nothing looks at images, decay would move it
    return HostTrainer(
        model,
        args,
        processor=processor,
        data_collator=FlowCollator(processor, max_length=args.max_length, pack_length=args.pack_length),
        train_dataset=train_stream,
        eval_dataset=test_stream,
        flow_weights=data.weights,
        stream_seed=data.seed,
        unigram_entropies=unigram_entropies(train_stream, model),
        **parts,
    )


def unigram_entropies(stream: Mixture, model: Any) -> dict[str, float]:
    """{flow: entropy of its ids' frequencies in nats} of the flows that are ids already, said once; a loss above it
    has learnt nothing but how often each id occurs.

    Raises:
        UserError: the ids are of another tokenizer than the model's.
    """
    found = {}
    for name, flow in zip(stream.names, stream.sources, strict=True):
        if isinstance(flow, IdDrawings):
            ids = flow.ids
            ids.info.require(tokenizer_fingerprint=model.image_tokenizer.fingerprint)
            found[name] = ids.entropy
            processes().print(f"{name}: {entropy_line(len(ids), ids.entropy, ids.info.codebook_size)}")
    return found
