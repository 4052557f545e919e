"""Teach a language model to talk about pictures: attach an image tokenizer to it and train on conversations.

    accelerate launch --num_cpu_threads_per_process 2 recipes/sft.py --config configs/shapes/sft.yaml

The output folder loads with `unimm.load`. A run that is started again goes on from its last checkpoint.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from unimm.config import parse_recipe_args, save_config
from unimm.data.collators import FlowCollator
from unimm.data.conversations import shapes_corpus
from unimm.data.mixture import MixtureConfig, training_streams
from unimm.errors import reading, run_main
from unimm.mllm import attach
from unimm.mllm.vocabulary import RowInit
from unimm.training.arguments import HostTrainingArguments
from unimm.training.host_trainer import HostTrainer
from unimm.training.language_model import CHAT_TOKENS, new_language_model
from unimm.training.text_tokenizer import train_text_tokenizer


@dataclass
class SFTModelConfig:
    """`llm`: a folder or hub id, or the fields of a Qwen3Config for one that starts from nothing, with a text tokenizer
    of `text_vocab_size` entries of its own. `row_init`: how the rows of the image ids begin. `chat_template`: a
    published format by its name, as in `unimm.attach`. `pad_to_square`: pictures are padded, not stretched."""

    image_tokenizer: str
    llm: str | dict
    text_vocab_size: int = 600
    row_init: RowInit = "random"
    chat_template: str | None = None
    pad_to_square: bool = False
    attn_implementation: str | None = None


@dataclass
class SFTRecipe:
    model: SFTModelConfig
    data: MixtureConfig
    train: HostTrainingArguments


def build_llm(model: SFTModelConfig, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if isinstance(model.llm, str):
        with reading("The language model model.llm", model.llm):
            llm = AutoModelForCausalLM.from_pretrained(model.llm, dtype="float32")
            return llm, AutoTokenizer.from_pretrained(model.llm)
    tokenizer = train_text_tokenizer(shapes_corpus(1000, seed), model.text_vocab_size, CHAT_TOKENS)
    return new_language_model(model.llm, tokenizer), tokenizer


def main() -> None:
    recipe = parse_recipe_args(SFTRecipe)
    set_seed(recipe.train.seed)
    llm, text_tokenizer = build_llm(recipe.model, recipe.data.seed)
    model, processor = attach(
        llm,
        recipe.model.image_tokenizer,
        text_tokenizer,
        row_init=recipe.model.row_init,
        chat_template=recipe.model.chat_template,
        attn_implementation=recipe.model.attn_implementation,
        seed=recipe.train.seed,
    )
    processor.image_processor.pad_to_square = recipe.model.pad_to_square
    save_config(recipe, recipe.train.output_dir)
    train_stream, test_stream = training_streams(
        recipe.data,
        samples_per_step=recipe.train.samples_per_step,
        reserved=processor.markers,
        log_folder=Path(recipe.train.output_dir) / "data",
    )
    HostTrainer(
        model,
        recipe.train,
        processor=processor,
        data_collator=FlowCollator(processor),
        train_dataset=train_stream,
        eval_dataset=test_stream,
        flow_weights=recipe.data.weights,
        stream_seed=recipe.data.seed,
    ).run()


if __name__ == "__main__":
    sys.exit(run_main(main, name="sft"))
