"""Published chat formats as data, and the Jinja template that all of them are compiled to.

A format defines what opens and what closes an answer; the template marks everything in between and the closing with
`{% generation %}`. A prompt ends with the opening, so the marked span begins exactly there: the space after
"ASSISTANT:" belongs to the answer, because many tokenizers merge it into the answer's first token. The first BOS token
is added by the text tokenizer, not by the template.

Sources: LLaVA's `conversation.py` (plain, vicuna_v1), the models' own cards and chat templates (the others).
"""

from dataclasses import dataclass

from unimm.errors import UserError

BOS, EOS = "{bos}", "{eos}"
"""Placeholders in a format's strings for the text tokenizer's BOS and EOS tokens."""


@dataclass(frozen=True)
class ChatFormat:
    """The strings around the turns of a chat.

    Args:
        user: before and after a user's text.
        opening: before an answer; a generation prompt ends with it.
        closing: after an answer; part of the loss, as the model stops with it.
        lead: first characters of an answer, part of the loss.
        after: after the closing, not part of the loss.
        between: before every user turn except the first.
        system: before and after the system text.
        system_in_user: put the system text into the first user turn, before the user's text.
        default_system: system text of a conversation without one.
    """

    user: tuple[str, str]
    opening: str
    closing: str
    lead: str = ""
    after: str = ""
    between: str = ""
    system: tuple[str, str] = ("", "")
    system_in_user: bool = False
    default_system: str = ""


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def _chatml(default_system: str = "") -> ChatFormat:
    return ChatFormat(
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        opening="<|im_start|>assistant\n",
        closing="<|im_end|>",
        after="\n",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        default_system=default_system,
    )


CHAT_FORMATS: dict[str, ChatFormat] = {
    "plain": ChatFormat(user=("", ""), opening="", closing="\n"),
    "vicuna_v1": ChatFormat(
        user=("USER: ", " "),
        opening="ASSISTANT:",
        lead=" ",
        closing=EOS,
        system=("", " "),
        default_system=_VICUNA_SYSTEM,
    ),
    # https://github.com/lm-sys/FastChat/blob/main/docs/vicuna_weights_version.md, without the system text
    "vicuna_turns": ChatFormat(user=("USER: ", " "), opening="ASSISTANT: ", closing=EOS, system=("", " ")),
    "llama2": ChatFormat(
        user=("[INST] ", " [/INST]"),
        opening="",
        lead=" ",
        closing=" " + EOS,
        between=BOS,
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        system_in_user=True,
    ),
    "llama3": ChatFormat(
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        opening="<|start_header_id|>assistant<|end_header_id|>\n\n",
        closing="<|eot_id|>",
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    ),
    "qwen": _chatml("You are a helpful assistant."),
    "internlm": _chatml("You are an AI assistant whose name is InternLM (书生·浦语)."),
    "mistral": ChatFormat(
        user=("[INST] ", " [/INST]"),
        opening="",
        closing=EOS,
        after=" ",
        system=("", "\n\n"),
        system_in_user=True,
    ),
    "phi3": ChatFormat(
        user=("<|user|>\n", "<|end|>\n"),
        opening="<|assistant|>\n",
        closing="<|end|>",
        after="\n",
        system=("<|system|>\n", "<|end|>\n"),
    ),
    "gemma": ChatFormat(
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        opening="<start_of_turn>model\n",
        closing="<end_of_turn>",
        after="\n",
        system=("", "\n\n"),
        system_in_user=True,
    ),
    "chatml": _chatml(),
    "deepseek": ChatFormat(
        user=("User: ", "\n\n"),
        opening="Assistant:",
        lead=" ",
        closing=EOS,
        system=("", "\n\n"),
    ),
    "zephyr": ChatFormat(
        user=("<|user|>\n", EOS + "\n"),
        opening="<|assistant|>\n",
        closing=EOS,
        after="\n",
        system=("<|system|>\n", EOS + "\n"),
    ),
}

_TEMPLATE = """\
{%- if messages[0].role == 'system' -%}
{%- set system, turns = render(messages[0].content), messages[1:] -%}
{%- else -%}
{%- set system, turns = DEFAULT_SYSTEM, messages -%}
{%- endif -%}
{%- if system and not SYSTEM_IN_USER -%}{{ SYSTEM_0 ~ system ~ SYSTEM_1 }}{%- endif -%}
{%- for turn in turns -%}
{%- if turn.role == 'assistant' -%}
{{ OPENING }}{% generation %}{{ LEAD ~ render(turn.content) ~ CLOSING }}{% endgeneration %}{{ AFTER }}
{%- elif turn.role == 'user' -%}
{%- if not loop.first -%}{{ BETWEEN }}{%- endif -%}
{{ USER_0 }}
{%- if loop.first and system and SYSTEM_IN_USER -%}{{ SYSTEM_0 ~ system ~ SYSTEM_1 }}{%- endif -%}
{{ render(turn.content) ~ USER_1 }}
{%- else -%}
{{ raise_exception('the role of a turn is user or assistant, the first may be system; this one is ' ~ turn.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ OPENING }}{%- endif -%}
"""


def named_format(name: str) -> ChatFormat:
    """Return the format `name`; raise UserError listing the known ones if there is none."""
    if name not in CHAT_FORMATS:
        raise UserError(f"There is no chat template {name!r}; known are {', '.join(CHAT_FORMATS)}.")
    return CHAT_FORMATS[name]


def jinja_of(chat_format: ChatFormat) -> str:
    """Return the chat template of a format; it calls a macro `render(content)`, which must be defined before it."""
    values: dict[str, str | bool] = {
        "DEFAULT_SYSTEM": chat_format.default_system,
        "SYSTEM_IN_USER": chat_format.system_in_user,
        "SYSTEM_0": chat_format.system[0],
        "SYSTEM_1": chat_format.system[1],
        "USER_0": chat_format.user[0],
        "USER_1": chat_format.user[1],
        "OPENING": chat_format.opening,
        "CLOSING": chat_format.closing,
        "BETWEEN": chat_format.between,
        "AFTER": chat_format.after,
        "LEAD": chat_format.lead,
    }
    template = _TEMPLATE
    for name, value in values.items():
        template = template.replace(name, str(value).lower() if isinstance(value, bool) else _expression(value))
    return template


def _expression(text: str) -> str:
    """Return a Jinja expression of the text: literals, and variables for the tokenizer's BOS and EOS tokens."""
    for token, variable in ((BOS, "bos_token"), (EOS, "eos_token")):
        before, found, after = text.partition(token)
        if found:
            return f"{_literal(before)} ~ {variable} ~ {_literal(after)}"
    return _literal(text)


def _literal(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
