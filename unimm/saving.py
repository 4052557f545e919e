"""A model, and its processor where it has one, as one folder that is whole or not there; and checkpoints with holes
refused, which transformers would fill at random."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from unimm.errors import UserError


def save_whole(
    folder: Path, model: Any, processor: Any = None, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Save model (or adapter) and processor into `folder`, which is made if needed, config.json (or
    adapter_config.json) last: a folder that has one is complete. `weights` stand for the model's own, where those are
    sharded."""
    staging = folder / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging, **({} if weights is None else {"state_dict": weights}))
    if processor is not None:
        processor.save_pretrained(staging)
    for path in sorted(staging.iterdir(), key=lambda path: path.name in ("config.json", "adapter_config.json")):
        path.replace(folder / path.name)
    staging.rmdir()


class WholeCheckpointMixin:
    """In front of a `PreTrainedModel`: `from_pretrained` takes whole checkpoints only."""

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
            UserError: weights are missing, unexpected or misshapen.
        """
        with no_load_report():
            model, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
        refuse_holes(model, info, pretrained_model_name_or_path)
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
