"""`ClassDrawer`, a class-to-image generator: a class-conditional GPT and the image tokenizer that decodes its ids.

A trained folder holds both, the tokenizer in `image_tokenizer/`. A tokenizer with another fingerprint than the one the
GPT was trained with raises an error, because it would decode the ids to noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from PIL import Image
from transformers import AutoModel

from unimm.checkpoint_files import check_settings_files
from unimm.class_conditional.modeling import ClassConditionalGPT
from unimm.config.schema import Count, Range, Seed
from unimm.errors import UserError, reading
from unimm.sampling import SAMPLED, GuidanceScale, ImageSampling
from unimm.saving import save_whole
from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.loading import load_with_processor

TOKENIZER_FOLDER = "image_tokenizer"


@dataclass(frozen=True)
class ClassDrawer:
    """A generator: `model` samples ids, `tokenizer` decodes them, `image_processor` converts pixels to images."""

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
        """Generate one image per class; the arguments are those of `ClassConditionalGPT.generate`."""
        ids = self.model.generate(
            class_labels, sampling, seed=seed, first_image=first_image, guidance_interval=guidance_interval
        )
        return self.image_processor.postprocess(self.tokenizer.decode(ids.to(self.tokenizer.device)))

    def save(self, folder: Path) -> None:
        """Save tokenizer and model into `folder`; the model's config.json is written last."""
        save_whole(folder / TOKENIZER_FOLDER, self.tokenizer, self.image_processor)
        save_whole(folder, self.model)


def load_drawer(folder: str | Path, device: str | torch.device | None = None) -> ClassDrawer:
    """Load a generator that `recipes/c2i.py` saved, in evaluation mode on `device` (None: a GPU if available).

    Raises:
        UserError: the folder is empty, holds another kind of model, or the checkpoint is broken.
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


@dataclass(frozen=True)
class SheetSampling(ImageSampling):
    """`ImageSampling` with guidance."""

    guidance_scale: Annotated[GuidanceScale, Range(least=0)] = 2.0


@dataclass
class SheetConfig:
    """An image grid of the first `num_classes` classes, one column each: `rows` images without guidance above as many
    with guidance."""

    FORMER: ClassVar[dict[str, str]] = {
        name: f"sampling.{name}" for name in ("guidance_scale", "temperature", "top_k", "top_p")
    }

    num_classes: Count = 10
    rows: Count = 4
    sampling: SheetSampling = field(default_factory=SheetSampling)
    seed: Seed = 0


def draw_sheet(drawer: ClassDrawer, config: SheetConfig) -> Image.Image:
    """Generate the image grid as one image, with a white line between the halves."""
    columns = min(config.num_classes, drawer.model.config.num_classes)
    labels = list(range(columns)) * config.rows
    settings = (replace(config.sampling, guidance_scale=None), config.sampling)
    halves = [drawer.draw(labels, sampling, seed=config.seed) for sampling in settings]
    width, height = halves[0][0].size
    line = max(2, height // 16)
    sheet = Image.new("RGB", (columns * width, 2 * config.rows * height + line), "white")
    for half, images in enumerate(halves):
        for k, image in enumerate(images):
            top = half * (config.rows * height + line) + k // columns * height
            sheet.paste(image, (k % columns * width, top))
    return sheet
