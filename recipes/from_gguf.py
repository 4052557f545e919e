"""Convert the GGUF file of a language model to a folder that `from_pretrained` reads.

    python recipes/from_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf --output runs/smol/host

Needs the package `gguf`. The weights are those of the file, dequantized to float32. The folder is written only if it
loads again with the same logits, token ids, special tokens and chat template.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from unimm.errors import UserError, reading, run_main
from unimm.saving import save_whole, whole_folder

TEXTS = (
    "Two  spaces,\n\na line break, 12345 and é.",
    "def add(a, b):\n    return a + b",
    "<|im_start|>user\nHi<|im_end|>",
)


def read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read model and text tokenizer of a GGUF file, in float32."""
    with reading("The GGUF file", file):
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        quantized, info = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{file} lacks {len(missing)} weights of a {quantized.config.model_type} ({missing[0]}, ...).")
    config = copy.deepcopy(quantized.config)
    del config.quantization_config  # transformers saves no model that it believes to be quantized
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    return model.eval(), tokenizer


@torch.no_grad()
def require_equal(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError unless the folder holds the same model and tokenizer."""
    texts = AutoTokenizer.from_pretrained(folder)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]
    equal: dict[str, Any] = {
        "token ids": [texts(text)["input_ids"] for text in TEXTS] == [each[0].tolist() for each in ids],
        "special tokens": texts.special_tokens_map == tokenizer.special_tokens_map,
        "chat template": texts.chat_template == tokenizer.chat_template,
        "logits": all(torch.equal(saved(each).logits, model(each).logits) for each in ids),
    }
    if wrong := [name for name, same in equal.items() if not same]:
        raise UserError(f"The converted model has other {' and '.join(wrong)} than the GGUF file: nothing is written.")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the GGUF file")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    if not arguments.file.is_file():
        raise UserError(f"There is no file {arguments.file}.")
    model, tokenizer = read_gguf(arguments.file)
    with whole_folder(arguments.output) as staging:
        save_whole(staging, model, tokenizer)
        require_equal(staging, model, tokenizer)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{arguments.output}: a {model.config.model_type} of {millions:.1f} million weights, equal to the GGUF file")


if __name__ == "__main__":
    sys.exit(run_main(main, name="from_gguf"))
