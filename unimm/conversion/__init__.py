"""Convert the published checkpoints of VFMTok, IDEAL and LlamaGen into folders of this library.

`LAYOUTS` names what can be converted; `layouts` holds one table of name rules for each, `building` reads the model's
sizes from the shapes, `convert` joins them. The tables state parameter names and shapes of the released code.
"""

from unimm.errors import UserError

LAYOUTS = {
    "vfmtok": "VFMTok's image tokenizer (https://github.com/CVMI-Lab/VFMTok), with its encoder from --encoder",
    "vfmtok-gpt": "VFMTok's class-conditional GPT",
    "ideal": "IDEAL's image tokenizer (https://github.com/Row11n/IDEAL), encoder included",
    "ideal-gpt": "IDEAL's class-conditional GPT",
    "llamagen-vq": "LlamaGen's image tokenizer VQ-16 or VQ-8 (https://github.com/FoundationVision/LlamaGen)",
    "llamagen-gpt": "LlamaGen's class-conditional GPT",
}
"""Name of a layout -> what it holds. Those that end in -gpt need the converted tokenizer."""
OPTIONS = {"vfmtok": ("encoder",), "ideal": (), "llamagen-vq": ("image_size",)}
"""Options of the tokenizers' layouts."""


def check_options(layout: str, **options: object) -> None:
    """Raise UserError if an option (None: not given) is missing, or is not one of the layout's."""
    has = OPTIONS.get(layout, ("tokenizer",))
    for name, value in options.items():
        if value is not None and name not in has:
            raise UserError(f"{layout} takes no --{name.replace('_', '-')}.")
    if "tokenizer" in has and options.get("tokenizer") is None:
        raise UserError(f"{layout} needs its image tokenizer: convert it first, and name its folder with --tokenizer.")
