"""Train a vision-language model to generate images too, on text-to-image samples and conversations in one run.

    accelerate launch --num_cpu_threads_per_process 2 recipes/t2i.py --config configs/shapes/t2i.yaml

Starts from the output of `sft.py`; the checkpoint understands and generates images. Rerunning the command resumes from
the last checkpoint.
"""

import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers.trainer_utils import set_seed

from unimm.config.loading import parse_training_args
from unimm.data.mixture import MixtureConfig
from unimm.data.presence import require_sources
from unimm.errors import UserError, require_place, run_main
from unimm.mllm import UnifiedModelMixin, UnimmProcessor, load
from unimm.mllm.swap_tokenizer import swap_image_tokenizer
from unimm.training.language_model.adapters import LoraSettings, add_lora
from unimm.training.language_model.callbacks import Panel
from unimm.training.language_model.recipe import train_on_flows
from unimm.training.loop.arguments import HostTrainingArguments, PanelConfig


@dataclass
class T2IModelConfig:
    """The unified model to train.

    Args:
        path: folder or hub id of the output of `sft.py` or `unimm.attach` ("default": the one shipped with the
            library).
        image_tokenizer: a fine-tuned version of its image tokenizer, to replace it with.
        attn_implementation: as in transformers.
    """

    path: str
    image_tokenizer: str | None = None
    attn_implementation: str | None = None


@dataclass
class T2IRecipe:
    model: T2IModelConfig
    data: MixtureConfig
    train: HostTrainingArguments
    panel: PanelConfig = field(default_factory=PanelConfig)
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        if self.lora is not None and self.model.image_tokenizer is not None:
            raise UserError(
                "lora adapts a model that is on disk, and model.image_tokenizer changes it first: train with it "
                "without lora, or leave it out."
            )


def panel_of(model: UnifiedModelMixin, processor: UnimmProcessor, panel: PanelConfig) -> Panel:
    """Return a callback that generates an image for each prompt with `generate`, as a user would, and logs them."""

    def draw(writer: SummaryWriter, step: int) -> None:
        prompts = [processor.drawing_prompt(prompt) for prompt in panel.prompts]
        inputs = processor(text=prompts, padding=True, return_tensors="pt").to(model.device)
        token_ids = model.generate(**inputs, generation_mode="image", seed=panel.seed, **vars(panel.sampling))
        images = processor.postprocess(model.decode_image_tokens(token_ids))
        writer.add_image("drawings", np.concatenate([np.asarray(i) for i in images], axis=1), step, dataformats="HWC")
        writer.add_text("drawings", " | ".join(panel.prompts), step)

    return draw


def main() -> None:
    recipe, dry_run = parse_training_args(T2IRecipe)
    require_place("The model model.path", recipe.model.path)
    require_place("The image tokenizer model.image_tokenizer", recipe.model.image_tokenizer)
    require_sources(recipe.data)
    set_seed(recipe.train.seed)
    how = {"dtype": torch.float32, "attn_implementation": recipe.model.attn_implementation}
    how |= recipe.lora.loading() if recipe.lora else {}
    model, processor = load(recipe.model.path, device="cpu", **how)
    if recipe.model.image_tokenizer is not None:
        swap_image_tokenizer(model, recipe.model.image_tokenizer)
    adapter = add_lora(model, recipe.lora, base=recipe.model.path) if recipe.lora else None
    model.config.null_prompt_prob = recipe.data.null_prompt_prob
    panel = panel_of(model, processor, recipe.panel) if recipe.panel.prompts else None
    train_on_flows(recipe, model, processor, panel, adapter, dry_run=dry_run)


if __name__ == "__main__":
    sys.exit(run_main(main, name="t2i"))
