"""Logging of the tokenizers' training loop to tensorboard and wandb, from the main process only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from unimm.errors import UserError

TRACKERS = ("tensorboard", "wandb")

SHOWN = (
    "loss",
    "pixel",
    "perceptual",
    "distillation",
    "context",
    "deep_cosine",
    "shallow_cosine",
    "gan",
    "discriminator",
    "codebook",
    "codebook/use",
    "codebook/perplexity",
    "images_per_second",
)
"""The logged scalars that are printed too."""


def in_words(scalars: Mapping[str, float]) -> str:
    """Format the scalars in `SHOWN` as one line."""
    return ", ".join(f"{name} {scalars[name]:.4g}" for name in SHOWN if name in scalars)


class RunLog:
    """Loggers of the run in `folder`, from `step` on: tensorboard events that an interrupted run logged after it are
    dropped.

    Raises:
        UserError: an unknown tracker, or wandb is not installed.
    """

    def __init__(self, folder: Path, report_to: list[str], *, step: int, main: bool) -> None:
        if unknown := sorted(set(report_to) - set(TRACKERS)):
            raise UserError(f"train.report_to names {unknown[0]!r}; known are {', '.join(TRACKERS)}.")
        self._tensorboard: Any = None
        self._wandb: Any = None
        if main and "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter  # pulls in tensorboard, which inference does not need

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if main and "wandb" in report_to:
            try:
                import wandb  # an extra that nothing else here needs
            except ImportError:
                raise UserError("train.report_to asks for wandb: install it (pip install wandb).") from None
            name = "-".join(folder.resolve().parts[-2:])
            self._wandb = wandb.init(project="unimm", name=name, id=name, dir=str(folder), resume="allow")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars."""
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def image(self, name: str, pixels: Tensor, step: int) -> None:
        """Log an image of pixels [3, H, W] in [0, 1]."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, pixels, step)
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(pixels.permute(1, 2, 0).float().cpu().numpy())}, step=step)

    def close(self) -> None:
        """Close the loggers."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
