"""Load image tokenizers from a folder or the Hugging Face hub."""

from pathlib import Path

from transformers import AutoModel

from unimm.checkpoint_files import check_settings_files
from unimm.errors import UserError, reading
from unimm.tokenizer.modeling import ImageTokenizer
from unimm.tokenizer.processing import ImageTokenizerProcessor, image_disagreements


def load_image_tokenizer(path: str | Path) -> ImageTokenizer:
    """Load the image tokenizer of a folder or hub id, in evaluation mode.

    Raises:
        UserError: there is no checkpoint, it is another kind of model, or its weights are incomplete.
    """
    with reading("The image tokenizer", path):
        check_settings_files(path)
        model = AutoModel.from_pretrained(path)
    if not isinstance(model, ImageTokenizer):
        raise UserError(f"{path} is a {model.config.model_type} model, not an image tokenizer.")
    return model.eval()


def load_with_processor(path: str | Path) -> tuple[ImageTokenizer, ImageTokenizerProcessor]:
    """Load an image tokenizer and its saved processor. Raises UserError if they disagree (`image_disagreements`)."""
    tokenizer = load_image_tokenizer(path)
    with reading("The image tokenizer", path):
        image_processor = ImageTokenizerProcessor.from_pretrained(path)
    for found in image_disagreements(image_processor, tokenizer.config):
        raise UserError(f"{path}: {found}.")
    return tokenizer, image_processor
