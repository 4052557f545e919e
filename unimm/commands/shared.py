"""What several commands do: load the model, check and write output files, show progress."""

import argparse
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from unimm.commands.terminal_images import TerminalImages
from unimm.data.image_files import save_images, save_numbered
from unimm.errors import UserError
from unimm.runs.provenance import check_output
from unimm.runs.report import Report
from unimm.sampling import SAMPLING_NAMES, sampling_options


def load_model(path: str | None, report: Report) -> tuple[Any, Any]:
    """Load the unified model and its processor; report the seconds as `load`."""
    quiet_libraries()
    from unimm.mllm import load

    with report.timed("load"):
        loaded = load(path)
    report.add(model=path or "default")
    return loaded


def quiet_libraries() -> None:
    """Silence the progress bars and warnings of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def new_folder(path: str) -> Path:
    """Return the path of an output folder. Raise UserError unless it is empty or new, and can be written."""
    output = Path(path)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is not an empty folder: choose another, nothing is overwritten.")
    check_output(output / "config.json", "model")
    return output


def saved(images: Sequence[Any], output: str | None, default: str) -> list[Path]:
    """Write the images to `output`, or to free names based on `default`; return their paths."""
    if output is not None:
        return save_images(images, output)
    return save_numbered(images, default, first=0 if len(images) == 1 else 1)


class Progress:
    """A progress bar on standard error that appears with the first step, once all arguments have been accepted."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Any = None
        self.images = TerminalImages(sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = tqdm(total=total, desc=self.name, unit="token", leave=False)
        self.bar.update(done - self.bar.n)

    def show(self, images: Sequence[Image.Image], done: int, total: int) -> None:
        """Draw images above the bar, over the last ones, if standard error is a terminal."""
        if self.images.active:
            if self.bar is not None:
                self.bar.clear()
            self.images.show(images)
            if self.bar is not None:
                self.bar.refresh()

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def save_drawn(
    draw: Callable[..., list[Image.Image]], arguments: argparse.Namespace, report: Report, default: str, doing: str
) -> None:
    """Call `draw` with the options of `add_drawing`, show its progress as `doing`, save the images and report them."""
    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    with Progress(doing) as progress, report.timed("per_image", share=arguments.num_images):
        shows = progress.images.active and not arguments.no_preview
        images = draw(
            num_images=arguments.num_images,
            seed=seed,
            on_token=progress,
            on_image=progress.show if shows else None,
            parallel_tokens=arguments.parallel_tokens,
            **sampling_options(arguments),
        )
    paths = saved(images, arguments.output, default)
    report.add(prompt=arguments.prompt, images=[str(path) for path in paths], seed=seed)
    report.add(**{name: getattr(arguments, name) for name in ("parallel_tokens", *SAMPLING_NAMES)})
    report.say("\n".join(str(path) for path in paths))
