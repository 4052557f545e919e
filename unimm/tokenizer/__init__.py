"""Image tokenizers (VQRAE, VFMTok, IDEAL, LlamaGen's VQ): image <-> features <-> ids <-> image.

The package depends on no language model and no trainer; importing it registers the Auto classes.
"""

from unimm.registration import import_below
from unimm.tokenizer.configuration import IDEALConfig, ImageTokenizerConfig, VFMTokConfig, VQRAEConfig
from unimm.tokenizer.ideal import IDEAL
from unimm.tokenizer.modeling import ImageTokenizer, ImageTokenizerOutput
from unimm.tokenizer.processing import ImageTokenizerProcessor
from unimm.tokenizer.registry import TOKENIZERS, register_tokenizer
from unimm.tokenizer.vfmtok import VFMTok
from unimm.tokenizer.vqrae import VQRAE

import_below(__name__)

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
