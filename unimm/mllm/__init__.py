"""Unified multimodal LLMs: language models with image ids in their vocabulary that understand and generate images.

Importing this package registers the Auto classes.
"""

from unimm.mllm.attach import attach
from unimm.mllm.generation import ImageGenerationMixin
from unimm.mllm.hosts.llava import UnimmLlavaConfig, UnimmLlavaForConditionalGeneration
from unimm.mllm.loading import load
from unimm.mllm.processing import UnimmProcessor
from unimm.mllm.unified import UnifiedModelMixin
from unimm.mllm.vocabulary import VisualVocabulary
from unimm.sampling import ImageSampling

__all__ = [
    "ImageGenerationMixin",
    "ImageSampling",
    "UnifiedModelMixin",
    "UnimmLlavaConfig",
    "UnimmLlavaForConditionalGeneration",
    "UnimmProcessor",
    "VisualVocabulary",
    "attach",
    "load",
]
