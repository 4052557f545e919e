"""Image tokenizers (VQRAE, VFMTok, IDEAL): image <-> features <-> ids <-> image.

The package depends on no language model and no trainer; importing it registers the Auto classes.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from unimm.tokenizer.configuration import IDEALConfig, ImageTokenizerConfig, VFMTokConfig, VQRAEConfig
from unimm.tokenizer.ideal import IDEAL
from unimm.tokenizer.modeling import ImageTokenizer, ImageTokenizerOutput
from unimm.tokenizer.processing import ImageTokenizerProcessor
from unimm.tokenizer.vfmtok import VFMTok
from unimm.tokenizer.vqrae import VQRAE

TOKENIZERS: dict[str, type[ImageTokenizer]] = {}
"""The registered tokenizers by `model_type`, the valid values of a recipe's `model.kind`."""


def register_tokenizer(tokenizer: type[ImageTokenizer]) -> None:
    """Register a tokenizer with the Auto classes and the recipes under its configuration's `model_type`."""
    config = tokenizer.config_class
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, tokenizer, exist_ok=True)
    AutoImageProcessor.register(config, image_processor_classes={"pil": ImageTokenizerProcessor}, exist_ok=True)
    TOKENIZERS[config.model_type] = tokenizer


for _tokenizer in (VQRAE, VFMTok, IDEAL):
    register_tokenizer(_tokenizer)

__all__ = [
    "IDEAL",
    "TOKENIZERS",
    "VQRAE",
    "IDEALConfig",
    "ImageTokenizer",
    "ImageTokenizerConfig",
    "ImageTokenizerOutput",
    "ImageTokenizerProcessor",
    "VFMTok",
    "VFMTokConfig",
    "VQRAEConfig",
    "register_tokenizer",
]
