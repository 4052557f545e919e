"""Class-conditional image generation with a LlamaGen-style GPT over the ids of an image tokenizer.

Importing it registers the Auto classes.
"""

from transformers import AutoConfig, AutoModel

from unimm.class_conditional.configuration import SIZES, ClassConditionalConfig
from unimm.class_conditional.modeling import ClassConditionalGPT, ClassConditionalOutput

AutoConfig.register("unimm_class_conditional", ClassConditionalConfig, exist_ok=True)
AutoModel.register(ClassConditionalConfig, ClassConditionalGPT, exist_ok=True)

__all__ = ["SIZES", "ClassConditionalConfig", "ClassConditionalGPT", "ClassConditionalOutput"]
