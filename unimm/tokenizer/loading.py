"""Image tokenizers from a folder or the hub."""

from pathlib import Path

from transformers import AutoModel

from unimm.checkpoint_files import check_settings_files
from unimm.errors import UserError, reading
from unimm.tokenizer.modeling import ImageTokenizer
from unimm.tokenizer.processing import ImageTokenizerProcessor, image_disagreements


def load_image_tokenizer(path: str | Path) -> ImageTokenizer:
    """The image tokenizer of a folder or hub id, in evaluation mode.

    Raises:
        UserError: nothing there, something else, or a checkpoint with holes.
    """
    with reading("The image tokenizer", path):
        check_settings_files(path)
        model = AutoModel.from_pretrained(path)
    if not isinstance(model, ImageTokenizer):
        raise UserError(f"{path} is a {model.config.model_type} model, not an image tokenizer.")
    return model.eval()


def load_with_processor(path: str | Path) -> tuple[ImageTokenizer, ImageTokenizerProcessor]:
    """The same, and the processor that was saved beside it, which must prepare what the tokenizer reads."""
    tokenizer = load_image_tokenizer(path)
    with reading("The image tokenizer", path):
        image_processor = ImageTokenizerProcessor.from_pretrained(path)
    for found in image_disagreements(image_processor, tokenizer.config):
        raise UserError(f"{path}: {found}.")
    return tokenizer, image_processor
