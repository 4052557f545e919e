"""Output folder of a training run: locked while the run lasts, and resumed only with the settings it began with.

    output_dir/config.yaml    the settings
    output_dir/run.json       versions, command, and facts that decide the result but are in no setting
    output_dir/.lock          held while the run lasts

All recipes open their folder with `open_run`. Settings that decide the result must not change between a checkpoint and
the run that resumes from it. Those that may are listed in `MAY_CHANGE`; any other difference is an error that names it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers.utils import logging

from unimm.bfloat16 import Precision
from unimm.config.loading import read_saved, save_config
from unimm.config.schema import plain
from unimm.errors import UserError
from unimm.runs.processes import lock_folder, processes, refuse_together
from unimm.training.loop.checkpoint import checkpoints

logger = logging.get_logger(__name__)

MAY_CHANGE = (
    # the run's location and its logging
    "train.output_dir", "train.run_name", "train.report_to", "train.project", "train.trackio_*", "train.hub_*",
    "train.push_to_hub*", "train.disable_tqdm", "train.log_*", "train.logging_*", "train.panel_steps", "train.eval_*",
    "train.per_device_eval_batch_size", "train.do_*", "panel.*", "sheet.*", "data.num_eval_samples", "*.max_bad_share",
    # when it is saved, how many checkpoints are kept
    "train.save_*", "train.keep_last",
    # speed: same results up to rounding
    "train.num_workers", "train.dataloader_*", "train.compile_blocks", "train.torch_compile*", "train.use_cpu",
    "train.tf32",
    "train.gradient_checkpointing*", "train.torch_empty_cache_steps", "train.ddp_*", "train.fsdp*", "train.deepspeed",
    "train.accelerator_config*", "train.parallelism_config*", "train.skip_memory_metrics",
    "train.include_num_input_tokens_seen", "*.attn_implementation",
    # their product is the samples of a step, which is compared as a fact
    "train.batch_size", "train.per_device_train_batch_size", "train.gradient_accumulation_steps",
    "train.global_batch_size",
)  # fmt: skip
"""Patterns of the settings that may change when a run is resumed."""

ROUNDING = ("threads", "processes")
"""Facts that may change too, with a warning: the last bits will differ."""


@contextmanager
def open_run(recipe: Any, *, samples_per_step: int, **facts: Any) -> Iterator[None]:
    """Lock `recipe.train.output_dir` for the run and save its settings there. Enter it on every process.

    Args:
        recipe: the settings.
        samples_per_step: samples of one optimizer step, over all processes and accumulation steps.
        facts: what else decides the result but is in no setting, such as fingerprints of the inputs.

    Raises:
        UserError: another process writes the folder, or its checkpoints belong to a run with other settings.
    """
    folder, locks = Path(recipe.train.output_dir), list[FileLock]()
    facts |= {
        "samples per step": samples_per_step,
        "processes": processes().num_processes,
        "threads": torch.get_num_threads(),
    }

    def prepare() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            locks.append(lock_folder(folder))
            if found := checkpoints(folder):
                refuse_changes(folder, found[-1], recipe, facts)
            save_config(recipe, folder, facts=facts)
        except OSError as error:
            raise UserError(f"Cannot write into {folder}: {error.strerror or error}.") from None

    try:
        refuse_together(prepare)
        say_precision(recipe.train.precision)
        yield
    finally:
        for lock in locks:
            lock.release()


def say_precision(precision: Precision) -> None:
    """Print once the precision of the run, and warn if the device is slow at it."""
    state = processes()
    state.print(precision.note())
    if state.is_main_process and (warning := precision.warning()):
        logger.warning(warning)


def refuse_changes(folder: Path, checkpoint: Path, recipe: Any, facts: Mapping[str, Any]) -> None:
    """Raise UserError that names every setting and fact changed since `checkpoint`, with both values."""
    tree, known = read_saved(folder)
    before, now = _settings(tree), _settings(plain(recipe))
    changed = {key: (before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys()) if _decides(key)}
    for key in before.keys() ^ now.keys():
        if key.startswith("train."):  # a field that only one of two transformers versions has
            changed.pop(key, None)
    changed |= {key: (known[key], plain(facts[key])) for key in sorted(known.keys() & facts.keys())}
    changed = {key: pair for key, pair in changed.items() if pair[0] != pair[1]}
    for key in ROUNDING:
        if key in changed:
            was, is_now = changed.pop(key)
            logger.warning(f"The run goes on with {is_now} {key} instead of {was}: not equal to the last bit.")
    if changed:
        named = "; ".join(f"{key} was {was} and is {is_now}" for key, (was, is_now) in changed.items())
        raise UserError(
            f"{checkpoint} was written under other settings: {named}. Go on with the old ones (config.yaml beside it), "
            "or choose another train.output_dir to start again."
        )


def _decides(key: str) -> bool:
    return not any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def _settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten settings to {dotted key: value}; a mapping below `train` stays one value, so that a field that another
    version of transformers lacks is missing as a whole."""
    rest = {name: item for name, item in tree.items() if name != "train"}
    return _leaves(rest) | {f"train.{name}": value for name, value in tree["train"].items()}


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix.rstrip("."): tree}
    return {key: value for name, item in tree.items() for key, value in _leaves(item, f"{prefix}{name}.").items()}
