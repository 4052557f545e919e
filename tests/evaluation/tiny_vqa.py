"""VQA models of a few thousand random weights from real configurations, with real processors, saved as folders."""

from pathlib import Path

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    LlavaProcessor,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltImageProcessorPil,
    ViltProcessor,
)

from unimm.testing.hosts import tiny_host

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "there", "a", "red", "blue", "circle", "?", "yes", "no")
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ANSWERS = ("yes", "no", "2", "red", " a dog ")
CHAT_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bert_tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


def save_blip(folder: Path, says: str | None = None) -> Path:
    """Random answers, or one word to whatever is asked."""
    torch.manual_seed(0)
    end = 3 if says is None else WORDS.index(says)  # the word itself ends the answer
    special = {"bos_token_id": 2, "sep_token_id": end, "eos_token_id": 3, "pad_token_id": 0}
    text = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 32, "initializer_range": 0.3, **special}
    vision = {**SIZES, "image_size": 16, "patch_size": 8, "initializer_range": 0.3}
    config = BlipConfig(text_config=text | {"encoder_hidden_size": 16}, vision_config=vision)
    model = BlipForQuestionAnswering(config).eval()
    if says is not None:
        with torch.no_grad():
            model.text_decoder.cls.predictions.bias[end] = 1e4
    model.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    BlipProcessor(BlipImageProcessorPil(size=size), bert_tokenizer()).save_pretrained(folder)
    return folder


def save_vilt(folder: Path) -> Path:
    torch.manual_seed(0)
    labels = dict(enumerate(ANSWERS))
    config = ViltConfig(
        **SIZES,
        vocab_size=len(WORDS),
        max_position_embeddings=32,
        image_size=16,
        patch_size=8,
        initializer_range=0.3,
        id2label=labels,
        label2id={answer: index for index, answer in labels.items()},
    )
    ViltForQuestionAnswering(config).eval().save_pretrained(folder)
    processor = ViltImageProcessorPil(size={"shortest_edge": 16}, size_divisor=8)
    ViltProcessor(processor, bert_tokenizer()).save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> Path:
    host, tokenizer = tiny_host("llava")
    for word in ("yes", "No"):  # one spelling of each; every other one is letters
        tokenizer.add_tokens(word)
    host.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def save_qwen_vl(folder: Path) -> Path:
    """Needs torchvision: Qwen-VL's processor reads videos too."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil, Qwen2VLVideoProcessor

    host, tokenizer = tiny_host("qwen2_5_vl")
    tokenizer.add_tokens(["yes", "No"])
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    for name, token in names.items():
        setattr(tokenizer, name, token)
    template = CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    sizes = {"patch_size": 4, "size": {"shortest_edge": 256, "longest_edge": 4096}}
    images, videos = Qwen2VLImageProcessorPil(**sizes), Qwen2VLVideoProcessor(**sizes)
    Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=template).save_pretrained(folder)
    host.save_pretrained(folder)
    return folder
