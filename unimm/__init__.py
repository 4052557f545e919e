"""unimm: multimodal language models that understand and generate images through one image tokenizer.

`import unimm` registers unimm's models with the Auto classes of transformers, so that `AutoModel.from_pretrained` and
`AutoModelForImageTextToText.from_pretrained` load its checkpoints. The import itself is light: neither torch nor
transformers is imported, and the public names below resolve on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from unimm.registration import register as _register

if TYPE_CHECKING:
    from unimm.chat import ChatSession
    from unimm.mllm import attach, load
    from unimm.tokenizer import (
        IDEAL,
        VQRAE,
        IDEALConfig,
        ImageTokenizer,
        ImageTokenizerProcessor,
        VFMTok,
        VFMTokConfig,
        VQRAEConfig,
    )

__version__ = "0.1.0"

__all__ = [
    "ChatSession",
    "IDEAL",
    "IDEALConfig",
    "ImageTokenizer",
    "ImageTokenizerProcessor",
    "VFMTok",
    "VFMTokConfig",
    "VQRAE",
    "VQRAEConfig",
    "__version__",
    "attach",
    "load",
]

_HOME_OF = {
    "ChatSession": "unimm.chat",
    "IDEAL": "unimm.tokenizer",
    "IDEALConfig": "unimm.tokenizer",
    "ImageTokenizer": "unimm.tokenizer",
    "ImageTokenizerProcessor": "unimm.tokenizer",
    "VFMTok": "unimm.tokenizer",
    "VFMTokConfig": "unimm.tokenizer",
    "VQRAE": "unimm.tokenizer",
    "VQRAEConfig": "unimm.tokenizer",
    "attach": "unimm.mllm",
    "load": "unimm.mllm",
}


_PARTS = ("class_conditional", "mllm", "tokenizer")


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"unimm.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'unimm' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register()
