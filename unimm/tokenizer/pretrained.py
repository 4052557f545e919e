"""Load pretrained vision models (configuration, weights and normalization) from a folder or the Hugging Face hub.

Checkpoints in InternVL's original layout (remote code: fused qkv, other names) are converted tensor by tensor, so no
remote code runs. A checkpoint that does not fill the encoder raises an error; nothing is left randomly initialized.
"""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, InternVLVisionConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.hub import cached_file

from unimm.checkpoint_files import examining, refuse_excess
from unimm.errors import UserError, reading
from unimm.tokenizer.configuration import side
from unimm.tokenizer.encoders import FAMILIES, Channels, build_encoder, encoder_family
from unimm.tokenizer.published import PUBLISHED

ORIGINAL_INTERNVIT = "intern_vit_6b"  # `model_type` of InternViT with remote code, for every size
ORIGINAL_INTERNVL = "internvl_chat"


@dataclass(frozen=True)
class EncoderSource:
    """A pretrained encoder's path, configuration and preprocessing, before its weights are loaded.

    Args:
        path: a folder or hub id.
        config: the vision model's configuration, as a transformers class.
        original: whether the weights have InternVL's original layout.
        feature_layer: the hidden state that multimodal models use.
        image_mean, image_std: from the preprocessor's file, else the family's.
    """

    path: str
    config: PreTrainedConfig
    original: bool
    feature_layer: int
    image_mean: Channels
    image_std: Channels

    @property
    def covered_size(self) -> int:
        """Return the side in pixels that the patches cover: patches of 14 cover 378 of 384."""
        return side(self.config.image_size) // side(self.config.patch_size) * side(self.config.patch_size)


def find_encoder(name_or_path: str | Path) -> EncoderSource:
    """Find an encoder and read its configuration and preprocessing, without its weights.

    Args:
        name_or_path: a name in `PUBLISHED`, a folder, or a hub id.

    Raises:
        UserError: it cannot be read, or its family is not supported.
    """
    known = PUBLISHED.get(str(name_or_path))
    path = known.hub_id if known else str(name_or_path)
    with examining("The encoder", path):
        fields, _ = PreTrainedConfig.get_config_dict(path)
        original = fields.get("model_type") in (ORIGINAL_INTERNVIT, ORIGINAL_INTERNVL)
        config = _from_original(fields) if original else _vision_half(AutoConfig.from_pretrained(path))
        family = encoder_family(config)
        # Count the parameters on the meta device, so an absurd configuration fails before it allocates memory.
        with torch.device("meta"), no_init_weights():
            refuse_excess(build_encoder(copy.deepcopy(config)))
        mean, std = _normalization(path) or family.normalization
    return EncoderSource(path, config, original, known.feature_layer if known else -1, mean, std)


def load_encoder(encoder: PreTrainedModel, source: EncoderSource, attn_implementation: str | None = None) -> None:
    """Load the checkpoint's weights into `encoder`, built from `source.config` for images of any size.

    Raises:
        UserError: weights are missing or have another shape.
    """
    # Load at the checkpoint's own image size; `_fitted` then interpolates the position embeddings.
    config = copy.deepcopy(encoder.config)
    config.image_size = source.config.image_size
    with reading("The encoder", source.path):
        if source.original:
            state, loaded = dict(_converted(source.path)), build_encoder(config, attn_implementation)
            expected = loaded.state_dict()
            fits = {name for name, tensor in state.items() if name in expected and tensor.shape == expected[name].shape}
            lost = len(expected) - len(fits)
            loaded.load_state_dict({name: state[name] for name in fits}, strict=False)
        else:
            loaded, report = type(encoder).from_pretrained(
                source.path, config=config, attn_implementation=attn_implementation, output_loading_info=True
            )
            expected = loaded.state_dict()
            lost = len(report["missing_keys"]) + len(report["mismatched_keys"])
    if lost:
        total = len(expected)
        raise UserError(f"{source.path} does not hold this encoder: loaded {total - lost} of {total} tensors.")
    encoder.load_state_dict(_fitted(loaded, encoder))


@torch.no_grad()
def _fitted(loaded: PreTrainedModel, encoder: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state of `loaded`, position embeddings interpolated to the encoder's image size by its own method."""
    state, size = loaded.state_dict(), side(encoder.config.image_size)
    for name, wanted in encoder.state_dict().items():
        if "position_embedding" in name and state[name].shape != wanted.shape:
            tokens = torch.zeros(1, *wanted.shape[-2:])
            state[name] = loaded.embeddings.interpolate_pos_encoding(tokens, size, size).reshape(wanted.shape)
    return state


def _vision_half(config: PreTrainedConfig) -> PreTrainedConfig:
    return config if config.model_type in FAMILIES else getattr(config, "vision_config", config)


def _normalization(path: str) -> tuple[Channels, Channels] | None:
    """Read (mean, std) from preprocessor_config.json; None if there is no such file or it has none."""
    file = cached_file(
        path,
        "preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return None
    fields = json.loads(Path(file).read_text(encoding="utf-8"))
    mean, std = fields.get("image_mean"), fields.get("image_std")
    return (tuple(mean), tuple(std)) if mean and std else None


# ---- InternVL's original layout ----


def _from_original(fields: dict[str, Any]) -> InternVLVisionConfig:
    """Convert InternViT's original configuration to transformers' names."""
    given = fields["vision_config"] if fields["model_type"] == ORIGINAL_INTERNVL else fields
    return InternVLVisionConfig(
        hidden_size=given["hidden_size"],
        intermediate_size=given["intermediate_size"],
        num_hidden_layers=given["num_hidden_layers"],
        num_attention_heads=given["num_attention_heads"],
        image_size=given["image_size"],
        patch_size=given["patch_size"],
        attention_bias=given.get("qkv_bias", False),
        use_qk_norm=given.get("qk_normalization", False),
        norm_type=given.get("norm_type", "layer_norm"),
        hidden_act=given.get("hidden_act", "gelu"),
        layer_norm_eps=given.get("layer_norm_eps", 1e-6),
    )


_RENAMED = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
        (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
        (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
        (r"^encoder\.layers\.", "encoder.layer."),
        (r"\.attn\.proj\.", ".attention.projection_layer."),
        (r"\.attn\.", ".attention."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.ls1$", ".lambda_1"),
        (r"\.ls2$", ".lambda_2"),
    )
)
_VISION_PREFIX = "vision_model."


def _converted(path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield an original checkpoint's tensors under transformers' names, with the fused qkv split."""
    for name, tensor in _tensors(path):
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        if ".attention.qkv." in name:
            for part, third in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                yield name.replace("qkv", part), third.clone()
        else:
            yield name, tensor


def _tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the vision model's tensors in float32; the language model and its projector (mlp1) are left out."""
    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(path, allow_patterns=["*.safetensors"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} has no safetensors file; only those are read.")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            inside = any(name.startswith(_VISION_PREFIX) for name in names)
            for name in names:
                if not name.startswith(("language_model.", "mlp1.")):
                    tensor = tensors.get_tensor(name)
                    yield name.removeprefix(_VISION_PREFIX) if inside else name, tensor.to(torch.float32)
