"""Tiny random networks of the real architectures, as a scorer's checkpoints on disk would give them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
    SwinConfig,
)

from unimm.evaluation.geneval.rules import COCO_CLASSES


def tiny_mask2former(seed: int = 0, num_labels: int = 80) -> Any:
    """Swin with one layer a stage, two decoder layers, ten queries."""
    torch.manual_seed(seed)
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=10,
        num_labels=num_labels,
        id2label=dict(enumerate(COCO_CLASSES)) if num_labels == 80 else None,
    )
    return Mask2FormerForUniversalSegmentation(config).eval()


def tiny_clip(seed: int = 0) -> tuple[Any, PreTrainedTokenizerFast]:
    """One layer each, images of 32 pixels, a word-level tokenizer."""
    torch.manual_seed(seed)
    words = {word for name in COCO_CLASSES for word in name.split()}
    words |= {"a", "photo", "of", "object", "colored", "-", "red", "orange", "yellow", "green", "blue"}
    words |= {"purple", "pink", "brown", "black", "white"}
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *sorted(words), "<start>", "<end>"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(name, vocabulary[name]) for name in ("<start>", "<end>")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", bos_token="<start>", eos_token="<end>"
    )
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    markers = {"bos_token_id": vocabulary["<start>"], "eos_token_id": vocabulary["<end>"], "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**layers, "vocab_size": len(vocabulary), "max_position_embeddings": 16, **markers},
        vision_config={**layers, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    return CLIPModel(config).eval(), tokenizer


def save_scorer(folder: Path, found: str = "bench") -> tuple[Path, Path]:
    """The folders of a detector, all of whose queries show a `found`, and of a CLIP."""
    detector, clip = folder / "detector", folder / "clip"
    finder = tiny_mask2former()
    with torch.no_grad():
        finder.class_predictor.weight.zero_()
        finder.class_predictor.bias.zero_()
        finder.class_predictor.bias[COCO_CLASSES.index(found)] = 9.0  # a probability of 0.990
    finder.save_pretrained(detector)
    model, tokenizer = tiny_clip()
    model.save_pretrained(clip)
    tokenizer.save_pretrained(clip)
    return detector, clip
