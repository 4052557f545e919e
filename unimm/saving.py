"""A model, and its processor where it has one, as one folder that is whole or not there; and checkpoints with holes
refused, which transformers would fill at random."""

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
    """Save model (or adapter) and processor into `folder`, see `whole_folder`. `weights` stand for the model's own,
    where those are sharded."""
    with whole_folder(folder) as staging:
        model.save_pretrained(staging, **({} if weights is None else {"state_dict": weights}))
        if processor is not None:
            processor.save_pretrained(staging)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder for the files of a checkpoint. At the end they go to the disk and move into `folder`, which
    is made if needed, config.json (or adapter_config.json) last: a folder that has one is complete. What fails leaves
    nothing behind.

    Raises:
        UserError: the disk is full, or the folder is closed to us.
    """
    staging, made = folder / ".saving", list[Path]()
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
    """In front of a `PreTrainedModel`: `from_pretrained` takes whole checkpoints only."""

    def post_init(self) -> None:
        """As in transformers; here the model is a description still, and no memory is taken for its weights."""
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
        """Load a checkpoint that is whole, or refuse it: transformers would fill the holes of a broken one at random.

        Raises:
            UserError: weights are missing, unexpected, misshapen or no numbers, the settings describe far more of them
                than the files hold, or an attention that is not here.
        """
        source = pretrained_model_name_or_path
        check_attention(kwargs.get("attn_implementation"))
        size = None if source is None else stored_bytes(source, kwargs.get("revision"))
        with no_load_report(), bounded_by(size):
            model, info = super().from_pretrained(  # type: ignore[misc]
                source, *args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
        refuse_holes(model, info, source)
        refuse_non_finite(model, source)
        return (model, info) if output_loading_info else model


@contextmanager
def no_load_report() -> Iterator[None]:
    """Without the library's table of keys: what it would say is an error here, said in one sentence."""
    logger = logging.getLogger("transformers.modeling_utils")
    disabled, logger.disabled = logger.disabled, True  # a raised level would switch on another report
    try:
        yield
    finally:
        logger.disabled = disabled


def refuse_holes(model: Any, info: dict[str, Any], source: Any, *, refuse_unexpected: bool = True) -> None:
    """Raise UserError with the counts where `info`, of `output_loading_info`, names weights that were missing or
    misshapen, or (with `refuse_unexpected`) belong nowhere."""
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
