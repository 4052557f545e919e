"""Chat templates for text tokenizers that have none, or whose own cannot hold a picture.

Special here: an image part renders the same three markers in a user's and in an assistant's turn, so a drawing is an
answer like any other; `{% generation %}` marks what the assistant says, its closing token included, for
assistant-only losses.
"""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from unimm.mllm.vocabulary import Markers

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

_CONTENT = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}{{ 'IMAGE' }}{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ render(message.content) + '<|im_end|>' }}{% endgeneration %}
{%- else -%}
{{ render(message.content) + '<|im_end|>' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# Vicuna's turns, for tokenizers without ChatML's tokens: https://github.com/lm-sys/FastChat/blob/main/docs/vicuna_weights_version.md
_PLAIN = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ 'ASSISTANT: ' }}{% generation %}{{ render(message.content) + eos_token }}{% endgeneration %}
{%- elif message.role == 'user' -%}
{{ 'USER: ' + render(message.content) + ' ' }}
{%- else -%}
{{ render(message.content) + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT: ' }}{%- endif -%}
"""


def chat_template(tokenizer: PreTrainedTokenizerBase, markers: Markers) -> str:
    """The tokenizer's own template if it renders images, else ChatML if the tokenizer knows it, else plain turns."""
    if tokenizer.chat_template is not None and _renders_images(tokenizer, markers):
        return str(tokenizer.chat_template)
    body = _CHATML if TURN_END in tokenizer.get_vocab() else _PLAIN
    return _CONTENT.replace("IMAGE", markers.begin + markers.image + markers.end) + body


def _renders_images(tokenizer: PreTrainedTokenizerBase, markers: Markers) -> bool:
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    try:
        return markers.image in tokenizer.apply_chat_template(probe, tokenize=False)
    except (TemplateError, TypeError):  # templates for text only add a list to a string
        return False


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an answer."""
    ends = [tokenizer.eos_token_id]
    if TURN_END in tokenizer.get_vocab():
        ends.insert(0, tokenizer.convert_tokens_to_ids(TURN_END))
    return list(dict.fromkeys(end for end in ends if end is not None))
