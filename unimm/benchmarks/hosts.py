"""What `attach` promises, tried out on every pair of a host family and an encoder family.

Special here: hosts and encoders are tiny and random, but built from the real configuration classes, saved and read by
the real code, and the reload happens in a fresh process that has imported nothing but unimm.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.utils import is_torchvision_available

from unimm.errors import UserError
from unimm.mllm import attach
from unimm.mllm.answering import chat_inputs
from unimm.mllm.attach import TEXT_HOSTS
from unimm.mllm.doctor import examine
from unimm.mllm.export import detach
from unimm.tokenizer import VQRAE
from unimm.tokenizer.encoders import FAMILIES, encoder_family

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_PICTURE = {"image_size": 16, "patch_size": 4}
_MLP = {"intermediate_size": 64}
ROWS = 320
_ENCODER_FIELDS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {**_MLP, "vision_use_head": False},
    "internvl_vision": {**_MLP, "attention_bias": True},
    "clip_vision_model": _MLP,
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 4},
    "dinov3_vit": {**_MLP, "num_register_tokens": 4},
}
# host -> (its own encoder, the hidden state that it taps, special tokens, fields of its config)
_MULTIMODAL: dict[str, tuple[str, int, tuple[str, ...], dict[str, Any]]] = {
    "llava": ("clip_vision_model", -2, ("<image>",), {"vision_feature_select_strategy": "default"}),
    "llava_next": (
        "clip_vision_model",
        -2,
        ("<image>",),
        {"vision_feature_select_strategy": "default", "image_grid_pinpoints": [[16, 32], [32, 16]]},
    ),
    "llava_onevision": (
        "siglip_vision_model",
        -1,
        ("<image>", "<video>"),
        {"vision_feature_select_strategy": "full", "image_grid_pinpoints": [[16, 32], [32, 16]]},
    ),
    "internvl": ("internvl_vision", -1, ("<IMG_CONTEXT>", "<img>", "</img>"), {"image_seq_length": 4}),
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "patch_size": 4,
    "out_hidden_size": 32,
}
# host -> fields of its tower's config; these have towers of their own, which leave
_QWEN_VL: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {**_QWEN_TOWER, "fullatt_block_indexes": [1], "window_size": 16},
    "qwen3_vl": {**_QWEN_TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
}
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
HOST_FAMILIES = (*TEXT_HOSTS, *_MULTIMODAL, *_QWEN_VL)
ENCODER_FAMILIES = tuple(FAMILIES)
Row = dict[str, Any]

_RELOAD = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
import unimm
equal = {}
for folder in map(Path, sys.argv[1:]):
    saved = load_file(folder / "trial.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=saved["input_ids"], pixel_values=saved["pixel_values"]).logits
    equal[folder.name] = torch.equal(logits, saved["logits"])
print(json.dumps(equal))
"""


def text_tokenizer(special: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """One token a byte, and the special ones."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names[: 3 + len(special)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=names[0], pad_token=names[0])


def vision_config(family: str) -> PreTrainedConfig:
    """A tiny encoder of the family: 16 px, 4 x 4 patches, two layers of width 32."""
    return AutoConfig.for_model(family, **_SIZES, **_PICTURE, **_ENCODER_FIELDS[family])


def tiny_host(family: str, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random host of the family and its text tokenizer."""
    torch.manual_seed(seed)
    text = {
        **_SIZES,
        **_MLP,
        "vocab_size": ROWS,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # far from uniform, so that greedy choices are no ties
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family in TEXT_HOSTS:
        head = {"head_dim": 16} if family == "qwen3" else {}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **text, **head)).eval(), text_tokenizer(())
    if family in _QWEN_VL:
        return _tiny_qwen_vl(family, text)
    encoder, layer, special, fields = _MULTIMODAL[family]
    tokenizer = text_tokenizer(special)
    names = ("image_token_id",) if family == "internvl" else ("image_token_index", "video_token_index")
    tokens = {name: tokenizer.convert_tokens_to_ids(token) for name, token in zip(names, special, strict=False)}
    config = AutoConfig.for_model(
        family,
        vision_config=vision_config(encoder).to_dict(),
        text_config={"model_type": "qwen2", **text},
        vision_feature_layer=layer,
        tie_word_embeddings=False,
        **tokens,
        **fields,
    )
    return AutoModelForImageTextToText.from_config(config).eval(), tokenizer


def _tiny_qwen_vl(family: str, text: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = text_tokenizer(_QWEN_TOKENS)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    tokens = {name: tokenizer.convert_tokens_to_ids(token) for name, token in zip(names, _QWEN_TOKENS, strict=True)}
    head = {"head_dim": 16} if family == "qwen3_vl" else {}
    config = AutoConfig.for_model(
        family,
        vision_config=_QWEN_VL[family],
        text_config={**text, **head, "rope_parameters": _ROPE},
        tie_word_embeddings=False,
        **tokens,
    )
    return AutoModelForImageTextToText.from_config(config).eval(), tokenizer


def tiny_tokenizer(host: PreTrainedModel, encoder: str) -> tuple[VQRAE, bool]:
    """An image tokenizer on an encoder of the family; on the host's own encoder where the families agree (True)."""
    layer, own = -1, False
    config = vision_config(encoder)
    if host.config.model_type in _MULTIMODAL:
        name, its_layer, *_ = _MULTIMODAL[host.config.model_type]
        own = name == encoder
        layer, config = (its_layer, host.model.vision_tower.config) if own else (layer, config)
    torch.manual_seed(1)
    mean, std = encoder_family(config).normalization
    fields = {"codebook_size": 32, "codebook_dim": 8, "feature_layer": layer, "image_mean": mean, "image_std": std}
    tokenizer = VQRAE(VQRAE.config_class(encoder_config=config.to_dict(), **fields)).eval()
    if own:
        tokenizer.encoder.load_state_dict(host.model.vision_tower.state_dict())
    return tokenizer, own


def try_pair(host_family: str, encoder: str, folder: Path) -> Row:
    """The promises of one pair, each True, False or a word why it was not tried; saves the model for `reload`."""
    host, texts = tiny_host(host_family)
    image_tokenizer, own = tiny_tokenizer(host, encoder)
    row: Row = {"host": host_family, "encoder": encoder, "own_encoder": own}
    model, processor = attach(host, image_tokenizer, texts)
    row["attach"] = True
    chat = _chat(_noise(), "is there a red circle?")
    inputs = chat_inputs(model, processor, [chat])
    row |= _learning(model, inputs)
    greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    written = model.generate(**inputs, **greedy)
    row["text"] = written.shape[1] == inputs["input_ids"].shape[1] + 6 and not _drawn(model, written).any()
    token_ids = model.generate(**inputs, generation_mode="image", seed=3, guidance_scale=2.0, num_return_sequences=2)
    pictures = processor.postprocess(model.decode_image_tokens(token_ids))
    row["image"] = bool(_drawn(model, token_ids).all()) and [each.size for each in pictures] == [(16, 16)] * 2
    answers = pipeline("image-text-to-text", model=model, processor=processor)(text=chat, max_new_tokens=4)
    row["pipeline"] = isinstance(answers[0]["generated_text"], list | str)
    row["any_to_any"] = _any_to_any(model, processor, chat) if is_torchvision_available() else "needs torchvision"
    row["batches"] = _batches(model, processor)
    row["host_kept"] = _host_kept(model, host, own)
    row["detach"] = _detached(model, host, own or host_family in TEXT_HOSTS)
    row["doctor"] = all(finding.ok for finding in examine(model, processor))
    _save(model, processor, inputs, folder)
    return row


def reload(folders: list[Path]) -> dict[str, bool]:
    """{folder name: whether its logits are the same}, from one fresh process."""
    command = [sys.executable, "-c", _RELOAD, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"The fresh process failed: {' '.join(done.stderr.split())[-400:]}")
    found: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return found


def try_pairs(hosts: tuple[str, ...], encoders: tuple[str, ...], folder: Path) -> Iterator[Row]:
    """A row for every pair; the last check of each, `reload`, is filled in at the end."""
    pairs = [(host, encoder) for host in hosts for encoder in encoders]
    rows = {}
    for host, encoder in tqdm(pairs, unit="pair", leave=False):
        name = f"{host}-{encoder}"
        rows[name] = try_pair(host, encoder, folder / name)
    equal = reload([folder / name for name in rows])
    for name, row in rows.items():
        yield row | {"reload": equal[name]}


def _noise() -> Image.Image:
    return Image.effect_noise((20, 12), 64).convert("RGB")


def _chat(*parts: str | Image.Image) -> list[dict[str, Any]]:
    """One user's turn of texts and pictures."""
    texts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": texts}]


@torch.no_grad()
def _batches(model: Any, processor: Any) -> bool:
    """Answers and drawings of one, two and no pictures are the same alone, together, and in another order."""
    chats = [_chat(_noise(), "one"), _chat("a longer question"), _chat(_noise(), "and", _noise(), "?")]
    ways: tuple[dict[str, Any], ...] = (
        {"max_new_tokens": 6, "do_sample": False, "eos_token_id": [], "pad_token_id": 0},
        {"generation_mode": "image", "guidance_scale": 2.0},
    )

    def made(rows: list[int], options: dict[str, Any]) -> list[list[int]]:
        inputs = chat_inputs(model, processor, [chats[n] for n in rows])
        drawing = "generation_mode" in options
        seeds = {"seed": rows} if drawing else {}
        out = model.generate(**inputs, **options, **seeds)
        return (out if drawing else out[:, inputs["input_ids"].shape[1] :]).tolist()

    return all(
        made([2, 0, 1], options) == [made([n], options)[0] for n in (2, 0, 1)]
        and made([0, 1, 2], options) == [made([n], options)[0] for n in (0, 1, 2)]
        for options in ways
    )


def _learning(model: Any, inputs: dict[str, torch.Tensor]) -> Row:
    """A loss over text and image ids, and who gets a gradient from it."""
    base = model.config.image_vocab_start
    labels = torch.cat([inputs["input_ids"], torch.tensor([[base, base + 31]])], 1)
    mask = torch.ones_like(labels)
    model.train()
    loss = model(input_ids=labels, attention_mask=mask, pixel_values=inputs["pixel_values"], labels=labels).loss
    loss.backward()
    model.eval()
    head = model.get_output_embeddings().weight.grad
    reached = {
        "tower": any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.image_tokenizer.encoder.parameters()),
        "projector": any(p.grad.abs().sum() > 0 for p in model.model.multi_modal_projector.parameters()),
        "rows": bool((head[[base, base + 31]].abs().sum(1) > 0).all()),
    }
    model.zero_grad()
    return {"loss": bool(torch.isfinite(loss)), "gradients": all(reached.values())}


def _drawn(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    return model.visual_vocabulary.contains(token_ids)


def _any_to_any(model: Any, processor: Any, chat: list[dict[str, Any]]) -> bool:
    run = pipeline("any-to-any", model=model, processor=processor)
    written = run(text=chat, max_new_tokens=4)
    drawn = run(text=chat, generation_mode="image", max_new_tokens=16)
    return bool(written[0]["generated_text"]) and drawn[0]["generated_image"].size == (16, 16)


@torch.no_grad()
def _host_kept(model: Any, host: PreTrainedModel, own: bool) -> bool:
    """Text logits are the host's to the bit; with its own encoder the logits of pictures are, too."""
    text = torch.randint(10, 200, (3, 7))  # below 10 are the special tokens, placeholders of pictures among them
    same = torch.equal(model(input_ids=text).logits[..., :ROWS], host(input_ids=text).logits)
    if not own:
        return same
    return same and torch.equal(model(**_seen(host)).logits[..., :ROWS], host(**_seen(host)).logits)


@torch.no_grad()
def _seen(host: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A sentence with one picture in the form that the host itself reads: tiled where it tiles."""
    generator = torch.Generator().manual_seed(2)
    tiles = host.config.model_type in ("llava_next", "llava_onevision")
    shape = (1, 3, 3, 16, 16) if tiles else (1, 3, 16, 16)
    inputs = {"pixel_values": torch.randn(shape, generator=generator)}
    if tiles:
        inputs["image_sizes"] = torch.tensor([[16, 30]])
    count = len(host.get_image_features(**inputs, return_dict=True).pooler_output[0])
    placeholders = torch.full((1, count), host.config.image_token_id)
    text = torch.randint(10, 200, (1, 9), generator=generator)
    return {"input_ids": torch.cat([text[:, :3], placeholders, text[:, 3:]], 1), **inputs}


def _detached(model: Any, host: PreTrainedModel, returns: bool) -> bool:
    """The host comes back with an equal state, or is refused where its tower was replaced."""
    try:
        again = detach(model).state_dict()
    except UserError:
        return not returns
    expected = host.state_dict()
    return returns and again.keys() == expected.keys() and all(torch.equal(again[k], v) for k, v in expected.items())


@torch.no_grad()
def _save(model: Any, processor: Any, inputs: dict[str, torch.Tensor], folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    trial = {name: inputs[name].contiguous() for name in ("input_ids", "pixel_values")}
    logits = model(**trial).logits
    save_file({**trial, "logits": logits.contiguous()}, folder / "trial.safetensors")
