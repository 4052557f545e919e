"""Class -> image: a GPT together with the image tokenizer whose ids it draws.

A trained folder holds both, the GPT and in `image_tokenizer/` the tokenizer, and loading refuses a
tokenizer of another fingerprint: its decoder would paint noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from transformers import AutoModel

from unimm.checkpoint_files import check_settings_files
from unimm.class_conditional.modeling import ClassConditionalGPT
from unimm.config.schema import Count, Natural, NonNegative, Range, Seed
from unimm.errors import UserError, reading
from unimm.sampling import SAMPLED, ImageSampling
from unimm.saving import save_whole
from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.loading import load_with_processor

TOKENIZER_FOLDER = "image_tokenizer"


@dataclass(frozen=True)
class ClassDrawer:
    """`model` draws ids, `tokenizer` decodes them, `image_processor` makes images of the pixels."""

    model: ClassConditionalGPT
    tokenizer: ImageTokenizer
    image_processor: Any

    def __post_init__(self) -> None:
        theirs, ours = self.model.config.tokenizer_fingerprint, self.tokenizer.fingerprint
        if theirs != ours:
            raise UserError(
                f"The model draws ids of the tokenizer {str(theirs)[:12]} and this is the tokenizer {ours[:12]}: give "
                "the one it was trained with."
            )

    @torch.inference_mode()
    def draw(
        self,
        class_labels: Sequence[int],
        sampling: ImageSampling = SAMPLED,
        *,
        seed: int = 0,
        first_image: int = 0,
        guidance_interval: tuple[int, int] | None = None,
    ) -> list[Image.Image]:
        """One image per class; the arguments are `ClassConditionalGPT.generate`'s."""
        ids = self.model.generate(
            class_labels, sampling, seed=seed, first_image=first_image, guidance_interval=guidance_interval
        )
        return self.image_processor.postprocess(self.tokenizer.decode(ids.to(self.tokenizer.device)))

    def save(self, folder: Path) -> None:
        """Save both into `folder`; the GPT's config.json comes last."""
        save_whole(folder / TOKENIZER_FOLDER, self.tokenizer, self.image_processor)
        save_whole(folder, self.model)


def load_drawer(folder: str | Path, device: str | torch.device | None = None) -> ClassDrawer:
    """What `recipes/c2i.py` saved, ready to draw, on `device` (None: a GPU where there is one).

    Raises:
        UserError: nothing there, something else, or a broken checkpoint.
    """
    folder = Path(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with reading("The class-conditional model", folder):
        check_settings_files(folder)
        model = AutoModel.from_pretrained(folder)
    if not isinstance(model, ClassConditionalGPT):
        raise UserError(f"{folder} holds a {type(model).__name__}, not a class-conditional model.")
    tokenizer, image_processor = load_with_processor(folder / TOKENIZER_FOLDER)
    return ClassDrawer(model.eval().to(device), tokenizer.to(device), image_processor)


@dataclass
class SheetConfig:
    """A sheet of the first `num_classes` classes, one column each: `rows` images without guidance above the same
    number with it."""

    num_classes: Count = 10
    rows: Count = 4
    guidance_scale: NonNegative = 2.0
    temperature: NonNegative = 1.0
    top_k: Natural = 0
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    seed: Seed = 0


def draw_sheet(drawer: ClassDrawer, config: SheetConfig) -> Image.Image:
    """The sheet as one image, a white line between its halves."""
    columns = min(config.num_classes, drawer.model.config.num_classes)
    labels = list(range(columns)) * config.rows
    plain = ImageSampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    guided = replace(plain, guidance_scale=config.guidance_scale)
    halves = [drawer.draw(labels, sampling, seed=config.seed) for sampling in (plain, guided)]
    width, height = halves[0][0].size
    line = max(2, height // 16)
    sheet = Image.new("RGB", (columns * width, 2 * config.rows * height + line), "white")
    for half, images in enumerate(halves):
        for k, image in enumerate(images):
            top = half * (config.rows * height + line) + k // columns * height
            sheet.paste(image, (k % columns * width, top))
    return sheet
