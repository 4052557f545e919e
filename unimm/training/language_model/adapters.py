"""LoRA and QLoRA for unified models, through PEFT.

A saved adapter is a folder that PEFT can read: the LoRA weights of the language model, the whole projector and the
embedding rows of the image ids and markers, with the processor. LoRA layers are injected into the host (the multimodal
model that the image tokenizer is attached to) without wrapping it, so trainers, `generate` and the vision tower's fp32
codebook need no changes. A saved adapter records its base model and loads into no other.
LoRA: https://arxiv.org/abs/2106.09685, QLoRA: https://arxiv.org/abs/2305.14314.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unimm.bfloat16 import automatic_dtype, training_device
from unimm.config.schema import Count, Decay
from unimm.errors import UserError, reading

ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "unimm_base.json"
PROJECTOR = "multi_modal_projector"
KEPT_WHOLE = ("model.vision_tower", f"model.{PROJECTOR}", "lm_head")
"""Never quantized: the vision tower's projections decide the ids; the projector and the head's new rows are trained."""
_OF_THE_RUN = ("null_prompt", "null_prompt_prob")  # config fields that training may set


@dataclass
class LoraSettings:
    """Settings of LoRA; the defaults are LLaVA-1.5's (scripts/v1_5/finetune_lora.sh).

    Args:
        r, alpha, dropout: rank, numerator of the scale alpha / r, and dropout on an adapter's input.
        target_modules: last names of linear layers of the language model; None: all of them.
        new_rows: whether to train the embedding rows of the image ids and markers too (ours; LLaVA has none).
        quantize: "nf4" (4 bits, double quantization) or "int8" for the frozen language model.
        dtype: of the frozen weights; trained weights are float32. "auto": bfloat16 if the device has fast products.
    """

    r: Count = 128
    alpha: Count = 256
    dropout: Decay = 0.05
    target_modules: list[str] | None = None
    new_rows: bool = True
    quantize: Literal["nf4", "int8"] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        if self.dtype == "auto":
            fast = automatic_dtype(training_device()) == torch.bfloat16
            self.dtype = "bfloat16" if fast else "float32"

    def loading(self) -> dict[str, Any]:
        """Return the keyword arguments of `unimm.mllm.load` for the base. Raises UserError if bitsandbytes is needed
        and not installed."""
        arguments: dict[str, Any] = {"dtype": getattr(torch, self.dtype)}
        if self.quantize is not None:
            if importlib.util.find_spec("bitsandbytes") is None:
                raise UserError(
                    f"lora.quantize {self.quantize} needs the package bitsandbytes: install unimm[train], or leave "
                    "lora.quantize out."
                )
            arguments["quantization_config"] = quantization(self.quantize, arguments["dtype"])
        return arguments


def quantization(kind: Literal["nf4", "int8"], dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return QLoRA's quantization settings, as in LLaVA; `dtype` is that of the matrix products."""
    kept = list(KEPT_WHOLE)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


class Adapter:
    """LoRA adapters, injected into `host`; `base` is the folder or hub id that the host was loaded from."""

    def __init__(self, host: PreTrainedModel, config: Any, base: str) -> None:
        from peft import get_peft_model  # the train extra

        self.host, self.base, self.fingerprint = host, base, base_fingerprint(host)
        self.peft = get_peft_model(host, config)
        for parameter in host.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # bfloat16 would round small updates away
        host._hf_peft_config_loaded = True  # else Trainer refuses a quantized model

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trained weights, under the names of the saved adapter."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.peft, save_embedding_layers=False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the adapter, without the processor."""
        self.peft.peft_config["default"].base_model_name_or_path = self.base
        self.peft.save_pretrained(str(folder), save_embedding_layers=False)
        # PEFT also writes a model card, which would name the base as a hub id
        Path(folder, "README.md").unlink(missing_ok=True)
        fields = {name: getattr(self.host.config, name) for name in _OF_THE_RUN}
        about = {"base": self.base, "fingerprint": self.fingerprint, "config": fields}
        Path(folder, BASE_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Load the weights of a saved adapter of the same base.

        Raises:
            UserError: it belongs to another base, or weights are missing, unexpected or of another shape.
        """
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        self._refuse_another_base(folder)
        with reading("The adapter", folder):
            found = load_file(Path(folder, ADAPTER_WEIGHTS))
        refuse_other_keys(self.state_dict(), found, folder)
        set_peft_model_state_dict(self.peft, found)
        for name, value in about_base(folder)["config"].items():
            setattr(self.host.config, name, value)

    def merged(self) -> PreTrainedModel:
        """Merge the adapters into the host's weights and return the host; the adapter must not be used afterwards."""
        host = self.peft.merge_and_unload()
        host._hf_peft_config_loaded = False
        return host

    def _refuse_another_base(self, folder: str | Path) -> None:
        about = about_base(folder)
        if about["fingerprint"] != self.fingerprint:
            raise UserError(
                f"The adapter {folder} was trained on {about['base']} (fingerprint {about['fingerprint'][:12]}), and "
                f"{self.base} is another model ({self.fingerprint[:12]}): lay it over its own base."
            )


def add_lora(model: PreTrainedModel, lora: LoraSettings, base: str) -> Adapter:
    """Add LoRA adapters to a unified model loaded from `base`, and freeze the rest except the projector and, with
    `lora.new_rows`, the new embedding rows."""
    return Adapter(model, lora_config(model, lora), base)


def lora_config(model: PreTrainedModel, lora: LoraSettings) -> Any:
    """Return PEFT's `LoraConfig` for these settings."""
    from peft import LoraConfig

    rows = model.trainable_token_indices() if lora.new_rows else None
    if rows is not None and len(rows) == 1:
        rows = next(iter(rows.values()))  # a tied head follows the embedding
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_inside_the_language_model(model, lora.target_modules),
        modules_to_save=[PROJECTOR],
        trainable_token_indices=rows,
    )


def read_adapter(model: PreTrainedModel, folder: str | Path, base: str) -> Adapter:
    """Load a saved adapter into `model`, which was loaded from `base`. Raises UserError as `Adapter.load` does."""
    from peft import PeftConfig

    with reading("The adapter", folder):
        config = PeftConfig.from_pretrained(str(folder))
    adapter = Adapter(model, config, base)
    adapter.load(folder)
    return adapter


def about_base(folder: str | Path) -> dict[str, Any]:
    """Read what a saved adapter records: "base", its "fingerprint", and the "config" fields that training set."""
    path = Path(folder, BASE_FILE)
    if not (path.is_file() and Path(folder, ADAPTER_CONFIG).is_file()):
        raise UserError(f"{folder} is no adapter of a unified model: {ADAPTER_CONFIG} or {BASE_FILE} is missing.")
    with reading("The adapter", folder):
        return json.loads(path.read_text(encoding="utf-8"))


def base_fingerprint(model: PreTrainedModel) -> str:
    """Compute a sha256 that identifies the base and does not depend on quantization: codebook, vocabulary, and the
    language model's vectors (norms, biases) in bfloat16. It is cheap, and no two trained models share it."""
    config = model.config
    facts = [config.tokenizer_fingerprint, config.image_vocab_start, config.codebook_size, config.text_vocab_size]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, parameter in sorted(model.model.language_model.named_parameters()):
        digest.update(f"{name} {'' if parameter.ndim != 2 else 'matrix'}".encode())
        if parameter.ndim == 1:
            digest.update(parameter.detach().bfloat16().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def refuse_other_keys(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise UserError, naming the first weight, if names or shapes of `found` are not exactly those of `wanted`."""
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    misshapen = [name for name in sorted(wanted.keys() & found.keys()) if wanted[name].shape != found[name].shape]
    parts = [
        f"{what} {len(names)} ({names[0]})"
        for what, names in (("missing", missing), ("unexpected", extra), ("misshapen", misshapen))
        if names
    ]
    if parts:
        raise UserError(
            f"The adapter {source} does not fit: of {len(wanted)} weights {', '.join(parts)}. Train it again or fetch "
            "it anew, and merge it with its own base."
        )


def _inside_the_language_model(model: PreTrainedModel, names: Sequence[str] | None) -> str:
    """Return a pattern of the language model's linear layers with these last names; the vision tower has layers of the
    same names, which it must not match."""
    inside = model.model.language_model.named_modules()
    known = {name.rpartition(".")[2] for name, module in inside if isinstance(module, nn.Linear | Conv1D)}
    if wrong := sorted(set(names or ()) - known):
        raise UserError(
            f"lora.target_modules names {wrong[0]!r}, and the language model's linear layers are "
            f"{', '.join(sorted(known))}."
        )
    return rf".*language_model\..*\.({'|'.join(map(re.escape, sorted(names or known)))})"
