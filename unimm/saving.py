"""Save models and processors atomically, and refuse to load incomplete checkpoints.

transformers only warns if weights are missing and initializes them randomly; here that is an error.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from unimm.checkpoint_files import bounded_by, refuse_excess, refuse_non_finite, stored_bytes
from unimm.errors import UserError, writing
from unimm.field_rules import check_attention
from unimm.runs.provenance import flush, make_folders


def save_whole(
    folder: Path, model: Any, processor: Any = None, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Save a model (or adapter) and its processor to `folder` atomically, see `whole_folder`.

    `weights` is a full state dict to save instead of the model's own, for a model that is sharded.
    """
    with whole_folder(folder) as staging:
        model.save_pretrained(staging, **({} if weights is None else {"state_dict": weights}))
        if processor is not None:
            processor.save_pretrained(staging)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty staging folder for the files of a checkpoint, and move them into `folder` on success.

    Files are flushed to disk first, and config.json (or adapter_config.json) is moved last, so a folder that has one is
    complete. `folder` is created if needed; a failure leaves nothing behind.

    Raises:
        UserError: the disk is full, or the folder is not writable.
    """
    staging, made = folder / ".saving", list[Path]()  # in `folder`: a rename is atomic only within one file system
    try:
        with writing("the model into", folder):
            made = make_folders(folder)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            yield staging
            for path in staging.rglob("*"):
                flush(path)
            for path in sorted(staging.iterdir(), key=lambda path: path.name in ("config.json", "adapter_config.json")):
                path.replace(folder / path.name)
            staging.rmdir()
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for each in made:
            with suppress(OSError):
                each.rmdir()
        raise


class WholeCheckpointMixin:
    """A mixin for `PreTrainedModel` (listed before it) whose `from_pretrained` loads complete checkpoints only."""

    def post_init(self) -> None:
        """Check the number of weights; `from_pretrained` calls this on the meta device, before memory is allocated."""
        super().post_init()  # type: ignore[misc]
        refuse_excess(self)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a complete checkpoint; transformers would initialize missing weights randomly.

        Raises:
            UserError: weights are missing, unexpected, of the wrong shape or not finite, the configuration describes
                far more of them than the files hold, or the attention implementation is not installed.
        """
        source = pretrained_model_name_or_path
        check_attention(kwargs.get("attn_implementation"))
        size = None if source is None else stored_bytes(source, kwargs.get("revision"))
        # Mismatched sizes are collected in `info` instead of raised, so that `refuse_holes` reports them with counts.
        with no_load_report(), bounded_by(size):
            model, info = super().from_pretrained(  # type: ignore[misc]
                source, *args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
        refuse_holes(model, info, source)
        refuse_non_finite(model, source)
        return (model, info) if output_loading_info else model


@contextmanager
def no_load_report() -> Iterator[None]:
    """Suppress transformers' table of missing and unexpected keys; `refuse_holes` raises an error for them instead."""
    logger = logging.getLogger("transformers.modeling_utils")
    disabled, logger.disabled = logger.disabled, True  # raising the level instead would switch on another report
    try:
        yield
    finally:
        logger.disabled = disabled


def refuse_holes(model: Any, info: dict[str, Any], source: Any, *, refuse_unexpected: bool = True) -> None:
    """Raise UserError with counts if `info` (of `output_loading_info`) lists weights that are missing, of the wrong
    shape or (with `refuse_unexpected`) unexpected."""
    missing, misshapen = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    unexpected = sorted(info["unexpected_keys"]) if refuse_unexpected else []
    if not (missing or unexpected or misshapen):
        return
    expected = (set(model.state_dict()) - set(model.all_tied_weights_keys)) | set(missing)  # tied ones are stored once
    lost = {*missing, *(name for name, *_ in misshapen)}
    parts = [f"loaded {len(expected - lost)} of {len(expected)} weights"]
    if missing:
        parts.append(f"missing {len(missing)} ({missing[0]}, ...)")
    if misshapen:
        name, given, wanted = misshapen[0]
        parts.append(f"misshapen {len(misshapen)} ({name} is {tuple(given)} instead of {tuple(wanted)}, ...)")
    if unexpected:
        parts.append(f"unexpected {len(unexpected)} ({unexpected[0]}, ...)")
    raise UserError(f"The checkpoint {source} is broken: {'; '.join(parts)}. Save it again or fetch it anew.")
