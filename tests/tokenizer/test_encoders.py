"""Every encoder family against its bare model, checkpoints in their real layouts, and the published table."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    InternVLVisionConfig,
    InternVLVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.tokenizer.conftest import ENCODERS
from unimm.errors import UserError
from unimm.tokenizer import VQRAE
from unimm.tokenizer.published import PUBLISHED, encoder_table

FIELDS = {"codebook_size": 64, "codebook_dim": 48}
PREFIX = {"siglip": 0, "internvl": 1, "clip": 1, "dinov2": 1, "dinov2_with_registers": 5, "dinov3": 5}


def tiny_config(family):
    fields = dict(ENCODERS[family])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


@pytest.mark.parametrize("family", ENCODERS)
def test_from_encoder_gives_the_bare_models_features(family, tmp_path, pixel_values):
    torch.manual_seed(3)
    bare = AutoModel.from_config(tiny_config(family)).eval()
    bare.save_pretrained(tmp_path)
    tokenizer = VQRAE.from_encoder(tmp_path, **FIELDS).eval()
    with torch.no_grad():
        expected = bare(pixel_values, output_hidden_states=True).hidden_states
        output = tokenizer(pixel_values, output_hidden_states=True)
    assert len(output.hidden_states) == len(expected) == 3
    for ours, theirs in zip(output.hidden_states, expected, strict=True):
        assert torch.equal(ours, theirs[:, PREFIX[family] :])
    assert output.last_hidden_state.shape == (3, 16, 32) and output.last_hidden_state.is_contiguous()


@pytest.mark.parametrize("family", ENCODERS)
def test_another_image_size_interpolates_as_the_bare_model_does(family, tmp_path):
    torch.manual_seed(3)
    bare = AutoModel.from_config(tiny_config(family)).eval()
    for name, parameter in bare.named_parameters():
        if "position_embedding" in name:
            torch.nn.init.normal_(parameter)
    bare.save_pretrained(tmp_path)
    tokenizer = VQRAE.from_encoder(tmp_path, image_size=48, **FIELDS).eval()
    pixel_values = torch.randn(2, 3, 48, 48)
    asked = {"interpolate_pos_encoding": True} if family in ("siglip", "clip") else {}
    with torch.no_grad():
        expected = bare(pixel_values, output_hidden_states=True, **asked).hidden_states[-1][:, PREFIX[family] :]
        assert torch.equal(tokenizer(pixel_values).last_hidden_state, expected)
    assert (tokenizer.config.image_size, tokenizer.config.grid) == (48, (6, 6))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = VQRAE.from_pretrained(tmp_path / "tokenizer").eval()
    assert torch.equal(again.encode(pixel_values).ids, tokenizer.encode(pixel_values).ids)
    with pytest.raises(UserError, match="50 pixels is no multiple of the patch size 8"):
        VQRAE.from_encoder(tmp_path, image_size=50, **FIELDS)


def test_pixels_that_no_patch_covers_are_left_out(tmp_path):
    """SigLIP so400m has patches of 14 for images of 384, of which they cover 378."""
    torch.manual_seed(3)
    fields = {k: v for k, v in ENCODERS["siglip"].items() if k != "model_type"} | {"image_size": 37}
    bare = SiglipVisionModel(SiglipVisionConfig(**fields)).eval()
    bare.save_pretrained(tmp_path)
    tokenizer = VQRAE.from_encoder(tmp_path, **FIELDS).eval()
    assert (tokenizer.config.image_size, tokenizer.config.grid) == (32, (4, 4))
    pixel_values = torch.randn(2, 3, 37, 37)
    with torch.no_grad():
        expected = bare(pixel_values, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(tokenizer(pixel_values[..., :32, :32]).last_hidden_state, expected)


@pytest.mark.parametrize("family", ["clip", "dinov2", "dinov3"])
def test_the_normalization_is_the_checkpoints_own(family, tmp_path):
    AutoModel.from_config(tiny_config(family)).save_pretrained(tmp_path)
    silent = VQRAE.from_encoder(tmp_path, **FIELDS).config
    assert silent.image_mean[0] == pytest.approx(0.4815 if family == "clip" else 0.485, abs=1e-4)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    told = VQRAE.from_encoder(tmp_path, **FIELDS).config
    assert list(told.image_mean) == [0.1] * 3 and list(told.image_std) == [0.2] * 3
    given = VQRAE.from_encoder(tmp_path, image_mean=(0.3,) * 3, **FIELDS).config
    assert list(given.image_mean) == [0.3] * 3 and list(given.image_std) == [0.2] * 3


def test_a_whole_clip_gives_its_vision_half(tmp_path, pixel_values):
    vision = {k: v for k, v in ENCODERS["clip"].items() if k != "model_type"}
    text = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    ).to_dict()
    whole = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).eval()
    whole.save_pretrained(tmp_path)
    tokenizer = VQRAE.from_encoder(tmp_path, **FIELDS, feature_layer=-2).eval()
    with torch.no_grad():
        expected = whole.vision_model(pixel_values, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(tokenizer(pixel_values).last_hidden_state, expected[:, 1:])


# ---- InternVL's original layout: the names of the published files, written out by hand ----


def original_state(model):
    """The tensors of an InternVLVisionModel under the names and in the fusion of InternViT's remote code."""
    state, fused = {}, {}
    for name, tensor in model.state_dict().items():
        layer = re.match(r"encoder\.layer\.(\d+)\.(.*)", name)
        if not layer:
            names = {
                "embeddings.cls_token": "embeddings.class_embedding",
                "embeddings.position_embeddings": "embeddings.position_embedding",
                "embeddings.patch_embeddings.projection.weight": "embeddings.patch_embedding.weight",
                "embeddings.patch_embeddings.projection.bias": "embeddings.patch_embedding.bias",
            }
            state[names[name]] = tensor
            continue
        number, rest = layer.groups()
        parts = re.match(r"attention\.([qkv])_proj\.(\w+)", rest)
        if parts:
            fused.setdefault((number, parts[2]), {})[parts[1]] = tensor
            continue
        for theirs, ours in {
            "attn.proj": "attention.projection_layer",
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "ls1": "lambda_1",
            "ls2": "lambda_2",
        }.items():
            rest = rest.replace(ours, theirs)
        state[f"encoder.layers.{number}.{rest}"] = tensor
    for (number, kind), parts in fused.items():
        state[f"encoder.layers.{number}.attn.qkv.{kind}"] = torch.cat([parts[p] for p in "qkv"])
    return {name: tensor.clone() for name, tensor in state.items()}


def original_config():
    return {
        "model_type": "intern_vit_6b",
        "architectures": ["InternVisionModel"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "drop_path_rate": 0.1,
    }


@pytest.mark.parametrize("inside_internvl", [False, True])
def test_internvit_in_its_original_layout(inside_internvl, tmp_path, pixel_values):
    torch.manual_seed(4)
    fields = {k: v for k, v in ENCODERS["internvl"].items() if k != "model_type"}
    model = InternVLVisionModel(InternVLVisionConfig(**fields)).eval()
    torch.nn.init.normal_(model.embeddings.cls_token)
    state, config = original_state(model), original_config()
    if inside_internvl:
        state = {f"vision_model.{name}": tensor for name, tensor in state.items()}
        state |= {"language_model.lm_head.weight": torch.zeros(3, 3), "mlp1.0.weight": torch.zeros(4)}
        config = {"model_type": "internvl_chat", "vision_config": config, "llm_config": {"model_type": "qwen2"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors")
    tokenizer = VQRAE.from_encoder(tmp_path, **FIELDS).eval()
    with torch.no_grad():
        expected = model(pixel_values, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(tokenizer(pixel_values).last_hidden_state, expected[:, 1:])
    assert tokenizer.config.image_mean[0] == pytest.approx(0.485)


def test_an_incomplete_original_checkpoint_is_refused_with_counts(tmp_path):
    fields = {k: v for k, v in ENCODERS["internvl"].items() if k != "model_type"}
    state = original_state(InternVLVisionModel(InternVLVisionConfig(**fields)))
    total = len(InternVLVisionModel(InternVLVisionConfig(**fields)).state_dict())
    del state["encoder.layers.1.attn.qkv.weight"]
    (tmp_path / "config.json").write_text(json.dumps(original_config()))
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"loaded {total - 3} of {total} tensors"):
        VQRAE.from_encoder(tmp_path, **FIELDS)


# ---- the table ----


@pytest.mark.parametrize(
    ("name", "tokens", "millions"),
    [
        ("siglip2-so400m-p16-256", 256, 413),
        ("siglip2-so400m-p16-512", 1024, 413),
        ("siglip2-base-p16-224", 196, 86),
        ("siglip2-large-p16-384", 576, 304),
        ("siglip-so400m-p14-384", 729, 413),
        ("internvit-300m-448", 1024, 304),
        ("clip-l-p14-336", 576, 304),
        ("dinov2-l-p14-518", 1369, 304),
        ("dinov2-reg-l-p14-518", 1369, 304),
        ("dinov3-l-p16-224", 196, 303),
    ],
)
def test_published_encoders_have_their_published_sizes(name, tokens, millions):
    published = PUBLISHED[name]
    assert published.grid**2 == tokens
    config = published.vision_config()
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_table_lists_every_encoder():
    lines = encoder_table().splitlines()
    assert len(lines) == len(PUBLISHED) + 1
    assert all(line.split()[0] == name for line, name in zip(lines[1:], PUBLISHED, strict=True))
