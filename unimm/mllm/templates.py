"""The chat template of a unified model: the host's own, extended with images, or a published one by name.

The template of the host (the language or multimodal model that the image tokenizer is attached to) is kept verbatim;
a prefix converts the parts of a message to the string it expects, with three markers for an image part. Text-only
conversations keep the host's token ids. In the templates defined here an image renders the same in user and assistant
turns, and `{% generation %}` marks the assistant's text, including its closing token, for assistant-only losses.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from unimm.errors import UserError, one_line
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

# Replaces the parts of a message by a string of texts and image markers; the host's unchanged template follows.
# `trim_blocks`, which transformers sets, removes the newline after the last tag, so the host's first line is intact.
_FLATTEN = """\
{%- set unimm = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- if message.content is defined and message.content is not none and message.content is not string -%}
{%- set unimm.text = '' -%}
{%- for part in message.content -%}
{%- if part is string -%}{%- set unimm.text = unimm.text ~ part -%}
{%- elif part.type == 'text' -%}{%- set unimm.text = unimm.text ~ part.text -%}
{%- elif part.type == 'image' -%}{%- set unimm.text = unimm.text ~ 'IMAGE' -%}
{%- else -%}{{ raise_exception('a part of a message is text or image; this one is ' ~ part.type) }}
{%- endif -%}
{%- endfor -%}
{%- set unimm.messages = unimm.messages + [dict(message, content=unimm.text)] -%}
{%- else -%}
{%- set unimm.messages = unimm.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = unimm.messages %}
"""

# For a host's template that takes parts but skips images in assistant turns: converts those images to text.
_FLATTEN_DRAWINGS = """\
{%- set unimm = namespace(messages=[], parts=[]) -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' and message.content is defined and message.content is not string -%}
{%- set unimm.parts = [] -%}
{%- for part in message.content -%}
{%- set drawn = part is not string and part.type == 'image' -%}
{%- set unimm.parts = unimm.parts + [{'type': 'text', 'text': 'IMAGE'} if drawn else part] -%}
{%- endfor -%}
{%- set unimm.messages = unimm.messages + [dict(message, content=unimm.parts)] -%}
{%- else -%}
{%- set unimm.messages = unimm.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = unimm.messages %}
"""

Template = str | dict[str, str]
"""A chat template, or several by name; "default" is used unless another is requested."""


def chat_template(tokenizer: PreTrainedTokenizerBase, markers: Markers, name: str | None = None) -> Template:
    """Return the published template `name` (`chat_formats.CHAT_FORMATS`). Without a name, return the tokenizer's own
    template, extended with images if it cannot render them; if it has none, "chatml" if the tokenizer has its tokens,
    else "vicuna_turns".

    Raises:
        UserError: if the name is unknown, the tokenizer lacks the format's closing token, or the tokenizer's own
            template cannot render a conversation.
    """
    image = markers.begin + markers.image + markers.end
    if name is None and tokenizer.chat_template is not None:
        own = tokenizer.chat_template
        if isinstance(own, dict):
            return {each: _with_images(tokenizer, template, markers) for each, template in own.items()}
        return _with_images(tokenizer, own, markers)
    if name is None:
        name = "chatml" if TURN_END in tokenizer.get_vocab() else "vicuna_turns"
    else:
        _check_closing(tokenizer, name)
    return _CONTENT.replace("IMAGE", image) + jinja_of(named_format(name))


def _with_images(tokenizer: PreTrainedTokenizerBase, own: str, markers: Markers) -> str:
    """Return a tokenizer's own template, extended with a prefix if it does not render images in both roles."""
    image = markers.begin + markers.image + markers.end
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    drawn = {"role": "assistant", "content": [{"type": "image"}]}
    seen, why = _rendered(tokenizer, own, [question])
    if markers.image not in seen:
        extended = _FLATTEN.replace("IMAGE", image) + own
        seen, why = _rendered(tokenizer, extended, [question])
        if image in seen:
            return extended
        raise UserError(
            f"The text tokenizer's own chat template renders no question with an image ({why or 'it leaves it out'}): "
            "give chat_template the name of a published one."
        )
    both, _ = _rendered(tokenizer, own, [question, drawn])
    if both.count(markers.image) == 2:
        return own
    # a template that leaves the begin and end markers to the processor does so in both roles
    return _FLATTEN_DRAWINGS.replace("IMAGE", image if markers.begin in seen else markers.image) + own


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]]) -> tuple[str, str]:
    """Render the conversation; return the text and an empty string, or an empty text and the error."""
    try:
        return render_guarded(template, messages, add_generation_prompt=False, **tokenizer.special_tokens_map), ""
    except UserError as error:  # text-only templates fail by adding a list to a string
        return "", one_line(error).removesuffix(".")


def is_published(template: Template) -> bool:
    """Return whether a template was built here; such templates leave the first BOS token to the text tokenizer."""
    return isinstance(template, str) and template.startswith(_CONTENT.partition("\n")[0])


def closing_token(tokenizer: PreTrainedTokenizerBase, name: str) -> str | None:
    """Return the token that ends an answer in the format `name`; None if it is not a token (plain)."""
    closing = named_format(name).closing.strip()
    return (tokenizer.eos_token if closing == EOS else closing) or None


def _check_closing(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise UserError if the tokenizer lacks the closing token: the model would learn to spell it and never stop."""
    closing = closing_token(tokenizer, name)
    if closing is None and named_format(name).closing.strip() == EOS:
        raise UserError(f"The chat template {name!r} ends answers with an end token, and the text tokenizer has none.")
    if closing is not None and closing not in tokenizer.get_vocab():
        raise UserError(
            f"The chat template {name!r} ends answers with {closing!r}, which is no token of this text tokenizer: it "
            "is for another language model."
        )


def set_chat_template(model: Any, processor: Any, name: str) -> None:
    """Switch a unified model to another published format: the processor's template, null prompt and EOS tokens.

    Raises:
        UserError: see `chat_template`.
    """
    tokenizer = processor.tokenizer
    template = chat_template(tokenizer, Markers(processor.boi_token, processor.image_token, processor.eoi_token), name)
    tokenizer.chat_template = processor.chat_template = template
    processor.begin_token = True  # published formats leave the first BOS token to the text tokenizer
    model.config.null_prompt = processor.null_prompt_ids()
    model.generation_config.eos_token_id = end_of_turn_ids(tokenizer, name)


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> list[int]:
    """Return the token ids that end an answer, in the published chat template `name` if given."""
    ends = [tokenizer.eos_token_id]
    closing = TURN_END if name is None else closing_token(tokenizer, name)
    if closing in tokenizer.get_vocab():
        ends.insert(0, tokenizer.convert_tokens_to_ids(closing))
    return list(dict.fromkeys(end for end in ends if end is not None))
