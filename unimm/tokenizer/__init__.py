"""image <-> features <-> ids <-> image. Knows no language model and no trainer; importing it registers the Auto
classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from unimm.tokenizer.configuration import ImageTokenizerConfig, VQRAEConfig
from unimm.tokenizer.modeling import ImageTokenizer, ImageTokenizerOutput
from unimm.tokenizer.processing import ImageTokenizerProcessor
from unimm.tokenizer.vqrae import VQRAE

AutoConfig.register("vqrae", VQRAEConfig, exist_ok=True)
AutoModel.register(VQRAEConfig, VQRAE, exist_ok=True)
AutoImageProcessor.register(VQRAEConfig, image_processor_classes={"pil": ImageTokenizerProcessor}, exist_ok=True)

__all__ = [
    "VQRAE",
    "ImageTokenizer",
    "ImageTokenizerConfig",
    "ImageTokenizerOutput",
    "ImageTokenizerProcessor",
    "VQRAEConfig",
]
