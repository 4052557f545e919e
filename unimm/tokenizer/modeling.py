"""`ImageTokenizer`, the base class of the image tokenizers: image <-> features <-> ids <-> image.

An image tokenizer is also a vision tower: `forward` has the signature and output of a Hugging Face vision model, so a
host (the multimodal model that the tokenizer is attached to) uses it by configuration alone. The codebook and the
decoder are stored in the same checkpoint.

Shapes: B batch, N patches, M image tokens, D encoder width, C codebook width, H and W pixels.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from unimm.errors import UserError
from unimm.field_rules import check_attention
from unimm.saving import WholeCheckpointMixin
from unimm.tokenizer.configuration import ImageTokenizerConfig
from unimm.tokenizer.encoders import encode_features, feature_states
from unimm.tokenizer.layers import OwnStart
from unimm.tokenizer.pretrained import find_encoder, load_encoder
from unimm.tokenizer.quantizers import Quantizer


@dataclass
class ImageTokenizerOutput(ModelOutput):
    """The output of `encode` and `reconstruct`; fields that a method does not compute are None.

    features [B, N, D], latents [B, M, C], codes [B, M, C], ids [B, M] int64, pixels [B, 3, H, W] (from `reconstruct`
    not clamped, so that a loss penalizes the overshoot), and the scalar codebook and commitment losses. `predictions`
    are the features that a decoder predicts by name ("deep", "shallow"), each [B, N, D], and `targets` the encoder's
    features under the same names, detached; both are empty if the decoder predicts pixels only. `entropy_loss` is
    filled by the trainer.
    """

    features: Tensor = None
    latents: Tensor = None
    codes: Tensor = None
    ids: Tensor = None
    pixels: Tensor = None
    codebook_loss: Tensor = None
    commitment_loss: Tensor = None
    predictions: dict[str, Tensor] | None = None
    targets: dict[str, Tensor] | None = None
    entropy_loss: Tensor = None


class ImageTokenizer(WholeCheckpointMixin, PreTrainedModel):
    """Base class of the image tokenizers.

    A subclass builds `encoder`, `sampler`, `quantizer`, `decoder` and `pixel_head`. If it samples other levels than the
    last features, it overrides `sources`; if its decoder returns more than pixels, `draw` and `targets`.
    `trains_encoder` is whether a training stage may update the encoder, `ids_are_patches` whether row r of the ids is
    row r of the image.
    """

    config_class = ImageTokenizerConfig
    base_model_prefix = "image_tokenizer"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = [
        "SiglipEncoderLayer",
        "InternVLVisionLayer",
        "CLIPEncoderLayer",
        "Dinov2Layer",
        "Dinov2WithRegistersLayer",
        "DINOv3ViTLayer",
        "AnchorLayer",
        "FusionSampler",
        "PreNormBlock",
        "ResidualConv",
        "SpatialAttention",
    ]
    # In bfloat16 about one id in a hundred changes. transformers applies the rule also if the tokenizer is a submodule
    # of a host.
    _keep_in_fp32_modules_strict = ["sampler", "quantizer"]

    trains_encoder = True
    ids_are_patches = True

    encoder: PreTrainedModel
    sampler: nn.Module
    quantizer: Quantizer
    decoder: nn.Module
    pixel_head: nn.Module

    # ---- forward, encode, decode ----

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Return the output of a vision tower: `last_hidden_state` is the features [B, N, D], contiguous, unquantized.

        `hidden_states` holds every layer up to `feature_layer` without prefix tokens, so `hidden_states[-1]` is the
        features too.
        """
        states = self.hidden_states(pixel_values)
        output = BaseModelOutputWithPooling(last_hidden_state=states[-1])
        if output_hidden_states is not None and output_hidden_states is not False:
            output.hidden_states = states
        return output.to_tuple() if return_dict is False else output

    def encode(self, pixel_values: Tensor) -> ImageTokenizerOutput:
        """Encode pixel_values [B, 3, H, W] into features, latents, codes and ids."""
        self.grid_of(pixel_values)
        states = self.hidden_states(pixel_values)
        return self._quantized(states, self.sources(states))

    def decode(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Decode ids [B, M] in raster order into pixels [B, 3, H, W] in [0, 1].

        `grid` (rows, columns) is needed for images of another size than the configuration's.
        """
        return self.pixels_from(self.lookup(ids), grid or self.config.grid).clamp(0, 1)

    def reconstruct(self, pixel_values: Tensor) -> ImageTokenizerOutput:
        """Encode and decode: `encode`'s output plus unclamped pixels and the features that the decoder predicts.

        In evaluation mode the pixels, once clamped, equal `decode(ids)` bit for bit.
        """
        grid, states = self.grid_of(pixel_values), self.hidden_states(pixel_values)
        sources = self.sources(states)
        output = self._quantized(states, sources)
        output.pixels, output.predictions = self.draw(output.codes, grid, predict=True)
        output.targets = self.targets(sources)
        return output

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the codes [B, M, C] of ids [B, M]. Raises UserError for an id outside the codebook."""
        return self.quantizer.lookup(ids)

    # ---- steps ----

    def hidden_states(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the encoder's hidden states up to `feature_layer`, each [B, N, D]."""
        self.patch_grid_of(pixel_values)
        c, states = self.config, encode_features(self.encoder, pixel_values.to(self.dtype))
        return feature_states(
            self.encoder, states, c.feature_layer, post_norm=c.apply_post_norm, layers=c.feature_layers
        )

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return the continuous features [B, N, D]."""
        return self.hidden_states(pixel_values)[-1]

    def sources(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Select the sampler's inputs from the hidden states: the features, or several levels, each [B, N, D]."""
        return states[-1:]

    def latents(self, *sources: Tensor) -> Tensor:
        """Compute latents [B, M, C] from sources, each [B, N, D], in float32 also under autocast."""
        with torch.autocast(sources[0].device.type, enabled=False):
            return self.sampler(*(source.float() for source in sources))

    def targets(self, sources: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return the sources that the decoder predicts, by name."""
        return {}

    def draw(self, codes: Tensor, grid: tuple[int, int], *, predict: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode codes [B, M, C] into unclamped pixels [B, 3, H, W] and, if `predict`, predicted features by name."""
        return self.denormalize(self.pixel_head(self.decoder(codes, grid), grid).float()), {}

    def pixels_from(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Decode codes [B, M, C] into unclamped pixels [B, 3, H, W]. Raises UserError if M does not match `grid`."""
        if codes.shape[1] != grid[0] * grid[1]:
            raise UserError(
                f"{codes.shape[1]} image tokens do not fill a grid of {grid[0]} x {grid[1]} = {grid[0] * grid[1]}."
            )
        return self.draw(codes, grid)[0]

    def _quantized(self, states: tuple[Tensor, ...], sources: tuple[Tensor, ...]) -> ImageTokenizerOutput:
        latents = self.latents(*sources)
        with torch.autocast(latents.device.type, enabled=False):
            quantized = self.quantizer(latents)
        return ImageTokenizerOutput(
            features=states[-1],
            latents=latents,
            codes=quantized.codes,
            ids=quantized.ids,
            codebook_loss=quantized.codebook_loss,
            commitment_loss=quantized.commitment_loss,
        )

    def grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """Return the image tokens' (rows, columns) for these images. Raises UserError if their size does not fit."""
        return self.patch_grid_of(pixel_values)

    def patch_grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """Return the patches' (rows, columns). Raises UserError if a side is no multiple of the patch size."""
        height, width = pixel_values.shape[-2:]
        if height % self.config.patch_size or width % self.config.patch_size:
            raise UserError(
                f"An image of {height} x {width} pixels is no multiple of the patch size {self.config.patch_size}."
            )
        return height // self.config.patch_size, width // self.config.patch_size

    def normalize(self, pixels: Tensor) -> Tensor:
        """Convert pixels in [0, 1] to the pixel_values that the encoder expects."""
        return (pixels - self._channels(self.config.image_mean)) / self._channels(self.config.image_std)

    def denormalize(self, pixel_values: Tensor) -> Tensor:
        """Convert pixel_values to pixels in [0, 1]."""
        return pixel_values * self._channels(self.config.image_std) + self._channels(self.config.image_mean)

    def _channels(self, values: list[float] | tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=self.device, dtype=torch.float32).view(1, 3, 1, 1)

    @property
    def fingerprint(self) -> str:
        """Return a sha256 over all that decides the ids of given features: sampler, quantizer and geometry."""
        digest = hashlib.sha256()
        digest.update(repr(self.config.geometry).encode())
        for part in ("sampler", "quantizer"):
            for name, tensor in sorted(self.get_submodule(part).state_dict().items()):
                digest.update(f"{part}.{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    # ---- building ----

    @classmethod
    def from_encoder(
        cls,
        name_or_path: str | Path,
        *,
        image_size: int | None = None,
        attn_implementation: str | None = None,
        **config_fields: Any,
    ) -> Self:
        """Build a new tokenizer around a pretrained vision model.

        Args:
            name_or_path: a name that `unimm encoders` lists, a local Hugging Face folder, or a hub id. A composite
                checkpoint (SigLIP or CLIP with text tower, InternVL, also in its original layout) contributes its
                vision tower.
            image_size: side of the images in pixels; None takes the checkpoint's (what its patches cover). For another
                size the position embeddings are interpolated with the vision model's own method.
            attn_implementation: as in transformers.
            config_fields: fields of the tokenizer's configuration; normalization and feature layer default to the
                checkpoint's.

        Raises:
            UserError: the encoder's weights are incomplete, its family is not supported, or `image_size` is no multiple
                of the patch size.
        """
        check_attention(attn_implementation)
        source = find_encoder(name_or_path)
        vision = source.config.to_dict() | {"image_size": image_size or source.covered_size}
        fields = {
            "image_mean": source.image_mean,
            "image_std": source.image_std,
            "feature_layer": source.feature_layer,
        } | config_fields
        config = cls.config_class(encoder_config=vision, **fields)
        model = cls._from_config(config, attn_implementation=attn_implementation)
        load_encoder(model.encoder, source, attn_implementation)
        return model

    def train(self, mode: bool = True) -> Self:
        """Set training mode as in torch; an encoder that is never trained stays in evaluation mode."""
        super().train(mode)
        self.encoder.train(mode and self.trains_encoder)
        return self

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OwnStart):
            module.start()
        # Layer scales of a mirrored decoder: its blocks are not inside InternVL's own model, which would set them.
        elif type(module).__name__ == "InternVLVisionLayer":
            init.constant_(module.lambda_1, self.config.vision.layer_scale_init_value)
            init.constant_(module.lambda_2, self.config.vision.layer_scale_init_value)
