"""Pretrain a small SigLIP on captioned images, as a stand-in for a downloaded vision foundation model.

    accelerate launch --num_cpu_threads_per_process 2 recipes/vfm.py --config configs/shapes/vfm.yaml

The output folder is an ordinary Hugging Face SigLIP checkpoint (model, tokenizer, image processor). Rerunning the
command resumes from the last checkpoint.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessorPil
from transformers.trainer_utils import set_seed

from unimm.config.loading import parse_training_args
from unimm.config.schema import Count
from unimm.data.image_streams import ImageDataConfig, held_out_images, held_out_lines, image_stream, to_array
from unimm.errors import run_main
from unimm.runs.processes import processes
from unimm.saving import whole_folder
from unimm.training.dry_run import dry_run_stream, short, show_images
from unimm.training.language_model.text_tokenizer import train_text_tokenizer
from unimm.training.loop.arguments import StreamTrainingArguments
from unimm.training.loop.run import open_run
from unimm.training.vision_pretraining import VisionPretraining, VisionPretrainingConfig, VisionPretrainingTrainer


@dataclass
class VFMModelConfig:
    """The SigLIP to train; `vision` and `text` are fields of SiglipVisionConfig and SiglipTextConfig."""

    vision: dict
    text: dict
    vocab_size: Count = 320
    attn_implementation: str = "eager"


@dataclass
class VFMConfig:
    model: VFMModelConfig
    train: StreamTrainingArguments
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    loss: VisionPretrainingConfig = field(default_factory=VisionPretrainingConfig)


def main() -> None:
    config, dry_run = parse_training_args(VFMConfig)
    train = config.train
    set_seed(train.seed)
    length = train.max_steps * train.samples_per_step
    log = Path(train.output_dir) / "data"
    stream = image_stream(config.data, length, train.seed, allow_withheld=False, log_folder=log)
    for line in held_out_lines(stream, held_out_images(config.data, 1, train.seed)):
        processes().print(line)
    tokenizer = train_text_tokenizer((stream[i]["text"] for i in range(min(2000, length))), config.model.vocab_size)
    size = {"height": config.data.image_size, "width": config.data.image_size}
    processor = SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    marks = {f"{mark}_token_id": tokenizer.pad_token_id for mark in ("pad", "bos", "eos")}
    text = {**config.model.text, "vocab_size": len(tokenizer), **marks}
    siglip_config = SiglipConfig(vision_config=config.model.vision, text_config=text)
    model = VisionPretraining(siglip_config, config.loss, config.model.attn_implementation)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": to_pixel_values([row["image"] for row in rows]),
            "input_ids": to_input_ids(tokenizer, rows, siglip_config),
        }

    parts = {"train_dataset": stream, "data_collator": collate, "stream_seed": train.seed}
    if dry_run:
        show = show_images(Path(train.output_dir) / "dry_run.png", lambda batch: batch["pixel_values"] / 2 + 0.5)
        dry_run_stream(VisionPretrainingTrainer(model, short(train), **parts), train, show)
        return
    with open_run(config, samples_per_step=train.samples_per_step, rows=stream.sizes):
        trainer = VisionPretrainingTrainer(model, train, **parts)
        trainer.train_or_load()
        if trainer.is_world_process_zero():
            with trainer.averaged(), whole_folder(Path(train.output_dir)) as staging:
                for part in (model.siglip, tokenizer, processor):
                    part.save_pretrained(staging)


def to_pixel_values(images: list) -> torch.Tensor:
    """Convert PIL RGB images of one size to [B, 3, H, W] in [-1, 1], normalized as by the image processor."""
    return torch.from_numpy(to_array(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_input_ids(tokenizer: PreTrainedTokenizerFast, rows: list[dict], config: SiglipConfig) -> torch.Tensor:
    """Tokenize captions to [B, L], padded to the model's full text length: SigLIP attends to the padding."""
    length = config.text_config.max_position_embeddings
    texts = [row["text"] for row in rows]
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


if __name__ == "__main__":
    sys.exit(run_main(main, name="vfm"))
