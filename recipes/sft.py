"""Visual instruction tuning: attach an image tokenizer to a language model and train on conversations about images.

    accelerate launch --num_cpu_threads_per_process 2 recipes/sft.py --config configs/shapes/sft.yaml

The output folder loads with `unimm.load`. Rerunning the command resumes from the last checkpoint.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from unimm.checkpoint_files import examining, refuse_excess_of
from unimm.config.loading import parse_training_args
from unimm.config.schema import Count, used_when
from unimm.data.conversations import shapes_corpus
from unimm.data.mixture import MixtureConfig
from unimm.data.presence import require_sources
from unimm.errors import UserError, require_place, run_main
from unimm.mllm import UnimmProcessor, attach, load
from unimm.mllm.loading import DEFAULT
from unimm.mllm.templates import set_chat_template
from unimm.mllm.vocabulary import RowInit
from unimm.training.language_model.adapters import LoraSettings, add_lora
from unimm.training.language_model.recipe import train_on_flows
from unimm.training.language_model.small_model import CHAT_TOKENS, new_language_model
from unimm.training.language_model.text_tokenizer import train_text_tokenizer
from unimm.training.loop.arguments import HostTrainingArguments
from unimm.training.tokenizer.parameters import train_projector_only


@dataclass
class SFTModelConfig:
    """The model to train: either the unified model at `init_from`, or an image tokenizer and a language model to join.

    Args:
        image_tokenizer: a folder or hub id, or "default" for that of the model shipped with the library.
        llm: a folder or hub id, or the fields of a Qwen3Config for a randomly initialized model with its own text
            tokenizer of `text_vocab_size` entries.
        init_from: folder or hub id of a unified model.
        text_vocab_size: entries of a new model's text tokenizer.
        row_init: how the embedding rows of the image ids are initialized.
        chat_template: name of a published format, as in `unimm.attach`.
        pad_to_square: pad images to squares instead of stretching them.
        trains: "projector" freezes the language model too, as LLaVA's pretraining does.
        attn_implementation: as in transformers.
    """

    image_tokenizer: str | None = None
    llm: str | dict | None = None
    init_from: str | None = None
    text_vocab_size: Count = field(
        default=600,
        metadata=used_when(lambda c: isinstance(c.llm, dict), "model.llm as fields of a new model"),
    )
    row_init: RowInit = field(
        default="random", metadata=used_when(lambda c: c.init_from is None, "model.image_tokenizer and model.llm")
    )
    chat_template: str | None = None
    pad_to_square: bool = False
    trains: Literal["all", "projector"] = "all"
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        parts = self.image_tokenizer is not None and self.llm is not None
        if parts == (self.init_from is not None) or (self.init_from and (self.image_tokenizer or self.llm)):
            raise UserError("model needs either init_from, or image_tokenizer and llm; not both.")


@dataclass
class SFTRecipe:
    model: SFTModelConfig
    data: MixtureConfig
    train: HostTrainingArguments
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        if self.lora is not None and (self.model.init_from is None or self.model.trains == "projector"):
            raise UserError(
                "lora adapts a model that is on disk, and trains its projector too: give model.init_from, such as the "
                "output of the first stage, and leave model.trains out."
            )


def require_parts(model: SFTModelConfig) -> None:
    """Raise UserError if a part of the model does not exist, before anything is loaded."""
    for name in ("image_tokenizer", "llm", "init_from"):
        source = getattr(model, name)
        require_place(f"model.{name}", source if isinstance(source, str) else None)


def build_llm(model: SFTModelConfig, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the language model and its text tokenizer, or build both from scratch."""
    if isinstance(model.llm, str):
        with examining("The language model model.llm", model.llm):
            refuse_excess_of(AutoModelForCausalLM, AutoConfig.from_pretrained(model.llm))
            llm = AutoModelForCausalLM.from_pretrained(model.llm, dtype="float32")
            return llm, AutoTokenizer.from_pretrained(model.llm)
    tokenizer = train_text_tokenizer(shapes_corpus(1000, seed), model.text_vocab_size, CHAT_TOKENS)
    return new_language_model(model.llm or {}, tokenizer), tokenizer


def build_model(
    model: SFTModelConfig, data_seed: int, seed: int, loading: Mapping[str, Any] | None = None
) -> tuple[Any, UnimmProcessor]:
    """Build or load the unified model and its processor; `loading` are extra arguments of `load`."""
    if model.init_from is not None:
        how = {"dtype": torch.float32, "attn_implementation": model.attn_implementation, **(loading or {})}
        unified, processor = load(model.init_from, device="cpu", **how)
        if model.chat_template is not None:
            set_chat_template(unified, processor, model.chat_template)
    else:
        llm, texts = build_llm(model, data_seed)
        unified, processor = attach(
            llm,
            load()[0].image_tokenizer if model.image_tokenizer == DEFAULT else str(model.image_tokenizer),
            texts,
            row_init=model.row_init,
            attn_implementation=model.attn_implementation,
            chat_template=model.chat_template,
            seed=seed,
        )
    processor.image_processor.pad_to_square = model.pad_to_square
    if model.trains == "projector":
        train_projector_only(unified)
    return unified, processor


def main() -> None:
    recipe, dry_run = parse_training_args(SFTRecipe)
    require_parts(recipe.model)
    require_sources(recipe.data)
    set_seed(recipe.train.seed)
    loading = recipe.lora.loading() if recipe.lora else None
    model, processor = build_model(recipe.model, recipe.data.seed, recipe.train.seed, loading)
    adapter = add_lora(model, recipe.lora, base=str(recipe.model.init_from)) if recipe.lora else None
    train_on_flows(recipe, model, processor, adapter=adapter, dry_run=dry_run)


if __name__ == "__main__":
    sys.exit(run_main(main, name="sft"))
