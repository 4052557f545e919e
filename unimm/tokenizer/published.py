"""The table of pretrained vision encoders that unimm knows by name.

The numbers are those of the published checkpoints, so every configuration can be built without a download. Loading
still reads the checkpoint's own configuration.
"""

from dataclasses import dataclass

from transformers import AutoConfig, PreTrainedConfig

from unimm.tokenizer.encoders import FAMILIES, Channels, prefix_tokens


@dataclass(frozen=True)
class PublishedEncoder:
    """A published checkpoint of a vision encoder.

    Args:
        hub_id: on the Hugging Face hub.
        model_type: the encoder family.
        image_size, patch_size: sides in pixels.
        width, depth, heads, mlp: of the transformer blocks.
        feature_layer: the hidden state that multimodal models use (-1 is the last block's output).
        config: the other fields of the family's configuration that differ from the defaults.
    """

    hub_id: str
    model_type: str
    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp: int
    feature_layer: int = -1
    config: tuple[tuple[str, object], ...] = ()

    @property
    def grid(self) -> int:
        """Return the number of patches a side."""
        return self.image_size // self.patch_size

    @property
    def normalization(self) -> tuple[Channels, Channels]:
        """Return (mean, std) per channel."""
        return FAMILIES[self.model_type].normalization

    @property
    def prefix_tokens(self) -> int:
        return prefix_tokens(self.vision_config())

    def vision_config(self) -> PreTrainedConfig:
        """Build the vision model's configuration, at the image size that its patches cover (378 of SigLIP's 384)."""
        fields = {
            "image_size": self.grid * self.patch_size,
            "patch_size": self.patch_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            **dict(self.config),
        }
        if "mlp_ratio" not in fields:
            fields["intermediate_size"] = self.mlp
        return AutoConfig.for_model(self.model_type, **fields)


_SIGLIP = {"base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096), "so400m": (1152, 27, 16, 4304)}


def _siglip(hub_id: str, image_size: int, patch_size: int = 16, size: str = "so400m") -> PublishedEncoder:
    return PublishedEncoder(hub_id, "siglip_vision_model", image_size, patch_size, *_SIGLIP[size])


_INTERNVIT = (("attention_bias", True), ("norm_type", "layer_norm"))

PUBLISHED: dict[str, PublishedEncoder] = {
    **{f"siglip2-so400m-p16-{s}": _siglip(f"google/siglip2-so400m-patch16-{s}", s) for s in (256, 384, 512)},
    **{
        f"siglip2-base-p16-{s}": _siglip(f"google/siglip2-base-patch16-{s}", s, size="base")
        for s in (224, 256, 384, 512)
    },
    "siglip2-large-p16-384": _siglip("google/siglip2-large-patch16-384", 384, size="large"),
    "siglip-so400m-p14-384": _siglip("google/siglip-so400m-patch14-384", 384, 14),
    "internvit-300m-448": PublishedEncoder(
        "OpenGVLab/InternViT-300M-448px-V2_5", "internvl_vision", 448, 14, 1024, 24, 16, 4096, config=_INTERNVIT
    ),
    "clip-l-p14-336": PublishedEncoder(
        "openai/clip-vit-large-patch14-336", "clip_vision_model", 336, 14, 1024, 24, 16, 4096, feature_layer=-2
    ),
    "dinov2-l-p14-518": PublishedEncoder(
        "facebook/dinov2-large", "dinov2", 518, 14, 1024, 24, 16, 4096, config=(("mlp_ratio", 4),)
    ),
    "dinov2-reg-l-p14-518": PublishedEncoder(
        "facebook/dinov2-with-registers-large",
        "dinov2_with_registers",
        518,
        14,
        1024,
        24,
        16,
        4096,
        config=(("mlp_ratio", 4), ("num_register_tokens", 4)),
    ),
    "dinov3-l-p16-224": PublishedEncoder(
        "facebook/dinov3-vitl16-pretrain-lvd1689m",
        "dinov3_vit",
        224,
        16,
        1024,
        24,
        16,
        4096,
        config=(("num_register_tokens", 4),),
    ),
}


def encoder_table() -> str:
    """Format all encoders as a table, one row each: input size, output tokens, architecture and hub id."""
    head = ("name", "pixels", "patch", "tokens", "width", "depth", "heads", "mlp", "prefix", "tap", "hub id")
    rows = [head] + [
        (
            name,
            *map(str, (e.image_size, e.patch_size, e.grid**2, e.width, e.depth, e.heads, e.mlp)),
            *map(str, (e.prefix_tokens, e.feature_layer)),
            e.hub_id,
        )
        for name, e in PUBLISHED.items()
    ]
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
