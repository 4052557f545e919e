"""The table of image tokenizers.

A tokenizer is a module that ends with `register_tokenizer`; those of this package have a line in `unimm.registration`.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from unimm.tokenizer.modeling import ImageTokenizer
from unimm.tokenizer.processing import ImageTokenizerProcessor

TOKENIZERS: dict[str, type[ImageTokenizer]] = {}
"""The registered tokenizers by `model_type`, the valid values of a recipe's `model.kind`."""


def register_tokenizer(tokenizer: type[ImageTokenizer]) -> None:
    """Register a tokenizer with the Auto classes and the recipes under its configuration's `model_type`."""
    config = tokenizer.config_class
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, tokenizer, exist_ok=True)
    AutoImageProcessor.register(config, image_processor_classes={"pil": ImageTokenizerProcessor}, exist_ok=True)
    TOKENIZERS[config.model_type] = tokenizer
