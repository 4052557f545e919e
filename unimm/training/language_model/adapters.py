"""LoRA and QLoRA for unified models: what learns, and the one artefact that comes out of it.

An artefact is a folder that PEFT can read: the adapters of the language model, the whole projector and the rows of the
image ids and markers, with the processor beside them. The adapters are put into the host itself, which
stays what it is, so trainers, `generate` and the tower's fp32 codebook know nothing of them; and an artefact remembers
its base, so that it is never laid over another one.
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

from unimm.bfloat16 import automatic_dtype, training_device
from unimm.config.schema import Count, Decay
from unimm.errors import UserError, reading

ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "unimm_base.json"
PROJECTOR = "multi_modal_projector"
KEPT_WHOLE = ("model.vision_tower", f"model.{PROJECTOR}", "lm_head")
"""Never quantized: the tower's projections decide the ids, and the projector and the head's new rows learn."""
_OF_THE_RUN = ("null_prompt", "null_prompt_prob")  # config fields that training may set


@dataclass
class LoraSettings:
    """The defaults are LLaVA-1.5's (scripts/v1_5/finetune_lora.sh).

    Args:
        r, alpha, dropout: rank, scale alpha / r, and the dropout in front of an adapter.
        target_modules: last names of linear layers of the language model; None: all of them.
        new_rows: whether the rows of the image ids and markers learn too (ours; LLaVA has none).
        quantize: "nf4" (4 bits, quantized twice) or "int8" for the frozen language model.
        dtype: of the frozen weights; what learns is float32. "auto": bfloat16 where the device multiplies it fast.
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
        """How the base is loaded: keyword arguments of `unimm.mllm.load`. Raises UserError without bitsandbytes."""
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
    """QLoRA's settings, as LLaVA has them; `dtype` is that of the products."""
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
    """The adapters inside `host`, which they are put into; `base` is the folder or hub id that it was loaded from."""

    def __init__(self, host: PreTrainedModel, config: Any, base: str) -> None:
        from peft import get_peft_model  # the train extra

        self.host, self.base, self.fingerprint = host, base, base_fingerprint(host)
        self.peft = get_peft_model(host, config)
        for parameter in host.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        host._hf_peft_config_loaded = True  # Trainer takes a quantized model only so

    def state_dict(self) -> dict[str, Tensor]:
        """What learns, under the names of the artefact."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.peft, save_embedding_layers=False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the artefact, without the processor."""
        self.peft.peft_config["default"].base_model_name_or_path = self.base
        self.peft.save_pretrained(str(folder), save_embedding_layers=False)
        # PEFT saves what it finds in the host too; a model card would name the base as a hub id
        Path(folder, "README.md").unlink(missing_ok=True)
        fields = {name: getattr(self.host.config, name) for name in _OF_THE_RUN}
        about = {"base": self.base, "fingerprint": self.fingerprint, "config": fields}
        Path(folder, BASE_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Take up the weights of an artefact of the same base.

        Raises:
            UserError: it belongs to another base, or weights are missing, misshapen or left over.
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
        """The host with the adapters in its weights; the adapter is used up."""
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
    """Freeze a unified model, loaded from `base`, but for new adapters, the projector and, where asked, new rows."""
    return Adapter(model, lora_config(model, lora), base)


def lora_config(model: PreTrainedModel, lora: LoraSettings) -> Any:
    """PEFT's own settings of these adapters."""
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
    """Put a finished artefact into `model`, loaded from `base`. Raises UserError as `Adapter.load` does."""
    from peft import PeftConfig

    with reading("The adapter", folder):
        config = PeftConfig.from_pretrained(str(folder))
    adapter = Adapter(model, config, base)
    adapter.load(folder)
    return adapter


def about_base(folder: str | Path) -> dict[str, Any]:
    """What an artefact remembers of its base: "base", "fingerprint" and the "config" fields that training set."""
    path = Path(folder, BASE_FILE)
    if not (path.is_file() and Path(folder, ADAPTER_CONFIG).is_file()):
        raise UserError(f"{folder} is no adapter of a unified model: {ADAPTER_CONFIG} or {BASE_FILE} is missing.")
    with reading("The adapter", folder):
        return json.loads(path.read_text(encoding="utf-8"))


def base_fingerprint(model: PreTrainedModel) -> str:
    """sha256 of what adapters rest on and quantization leaves alone: codebook, vocabulary, and the language model's
    vectors (norms, biases) in bfloat16. Cheap, and two trained models do not share them."""
    config = model.config
    facts = [config.tokenizer_fingerprint, config.image_vocab_start, config.codebook_size, config.text_vocab_size]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, parameter in sorted(model.model.language_model.named_parameters()):
        digest.update(f"{name} {'' if parameter.ndim != 2 else 'matrix'}".encode())
        if parameter.ndim == 1:
            digest.update(parameter.detach().bfloat16().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def refuse_other_keys(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise UserError, naming the first weight, where `found` is not exactly what is `wanted`."""
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
    """A pattern for the linear layers of the language model with these last names: the tower has namesakes."""
    inside = model.model.language_model.named_modules()
    known = {name.rpartition(".")[2] for name, module in inside if isinstance(module, nn.Linear)}
    if wrong := sorted(set(names or ()) - known):
        raise UserError(
            f"lora.target_modules names {wrong[0]!r}, and the language model's linear layers are "
            f"{', '.join(sorted(known))}."
        )
    return rf".*language_model\..*\.({'|'.join(map(re.escape, sorted(names or known)))})"
