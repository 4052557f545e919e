"""Chat templates for text tokenizers that have none, whose own cannot hold a picture, or that are given another.

Special here: an image part renders the same three markers in a user's and in an assistant's turn, so a drawing is an
answer like any other; `{% generation %}` marks what the assistant says, its closing token included, for
assistant-only losses.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from unimm.errors import UserError
from unimm.mllm.chat_formats import EOS, jinja_of, named_format
from unimm.mllm.template_guard import render_guarded
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


def chat_template(tokenizer: PreTrainedTokenizerBase, markers: Markers, name: str | None = None) -> str:
    """The format of that name (`chat_formats.CHAT_FORMATS`). Without a name the tokenizer's own template if it renders
    images, else ChatML if the tokenizer knows it, else plain turns.

    Raises:
        UserError: an unknown name, or a format whose closing token the tokenizer does not have.
    """
    if name is None and tokenizer.chat_template is not None and _renders_images(tokenizer, markers):
        return str(tokenizer.chat_template)
    if name is not None:
        _check_closing(tokenizer, name)
        body = jinja_of(named_format(name))
    else:
        body = _CHATML if TURN_END in tokenizer.get_vocab() else _PLAIN
    return _CONTENT.replace("IMAGE", markers.begin + markers.image + markers.end) + body


def closing_token(tokenizer: PreTrainedTokenizerBase, name: str) -> str | None:
    """The token that ends an answer in the format of that name; None where it is no token of its own (plain)."""
    closing = named_format(name).closing.strip()
    return (tokenizer.eos_token if closing == EOS else closing) or None


def _check_closing(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """A model whose tokenizer lacks the token would learn to spell it, and never stop: the wrong template for it."""
    closing = closing_token(tokenizer, name)
    if closing is None and named_format(name).closing.strip() == EOS:
        raise UserError(f"The chat template {name!r} ends answers with an end token, and the text tokenizer has none.")
    if closing is not None and closing not in tokenizer.get_vocab():
        raise UserError(
            f"The chat template {name!r} ends answers with {closing!r}, which is no token of this text tokenizer: it "
            "is for another language model."
        )


def set_chat_template(model: Any, processor: Any, name: str) -> None:
    """Give a unified model another published format: its processor, its null prompt and what ends an answer.

    Raises:
        UserError: as in `chat_template`.
    """
    tokenizer = processor.tokenizer
    template = chat_template(tokenizer, Markers(processor.boi_token, processor.image_token, processor.eoi_token), name)
    tokenizer.chat_template = processor.chat_template = template
    model.config.null_prompt = processor.null_prompt_ids()
    model.generation_config.eos_token_id = end_of_turn_ids(tokenizer, name)


def _renders_images(tokenizer: PreTrainedTokenizerBase, markers: Markers) -> bool:
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    try:
        return markers.image in render_guarded(tokenizer.get_chat_template(), probe, **tokenizer.special_tokens_map)
    except UserError:  # templates for text only add a list to a string
        return False


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> list[int]:
    """Token ids that end an answer, in the chat template of that name if there is one."""
    ends = [tokenizer.eos_token_id]
    closing = TURN_END if name is None else closing_token(tokenizer, name)
    if closing in tokenizer.get_vocab():
        ends.insert(0, tokenizer.convert_tokens_to_ids(closing))
    return list(dict.fromkeys(end for end in ends if end is not None))
