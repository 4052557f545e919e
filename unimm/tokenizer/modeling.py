"""`ImageTokenizer`: the flow that every tokenizer shares, image <-> features <-> ids <-> image.

The tokenizer is a vision tower. `forward` answers as every Hugging Face vision model does, so a
multimodal host takes it by configuration; the codebook and the decoder ride along in the same checkpoint. Shapes: B
batch, N patches, M image tokens, D encoder width, C codebook width, H and W pixels.
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
from unimm.tokenizer.encoders import encode_features, final_norm
from unimm.tokenizer.layers import OwnStart
from unimm.tokenizer.pretrained import find_encoder, load_encoder
from unimm.tokenizer.quantizers import Quantizer


@dataclass
class ImageTokenizerOutput(ModelOutput):
    """What the verbs return; each fills what it makes.

    features [B, N, D], latents [B, M, C], codes [B, M, C], ids [B, M] int64, pixels [B, 3, H, W] (from `reconstruct`
    not clamped, so that a loss sees the overshoot), and the scalar codebook and commitment losses. `predictions` are
    the features that a decoder predicts by name ("deep", "shallow"), each [B, N, D], and `targets` the encoder's own,
    under the same names, without gradient; both are empty where the decoder gives pixels only. `entropy_loss` is the
    trainer's to fill.
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
    """Base of the tokenizers. A subclass names its parts: `encoder`, `sampler`, `quantizer`, `decoder`, `pixel_head`.

    Where it is no straight line from the last features to the pixels, it says which levels are sampled (`sources`) and
    what the decoder gives (`draw`). `trains_encoder` is whether a training stage may move the encoder.
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
    # bfloat16 storage of these flips about one id in a hundred. The rule also holds when the tokenizer is a part of a
    # host.
    _keep_in_fp32_modules_strict = ["sampler", "quantizer"]

    trains_encoder = True

    encoder: PreTrainedModel
    sampler: nn.Module
    quantizer: Quantizer
    decoder: nn.Module
    pixel_head: nn.Module

    # ---- the verbs
    # --------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """A vision tower's answer: `last_hidden_state` is the features [B, N, D], contiguous; nothing is quantized.

        `hidden_states` holds every layer up to the feature tap without prefix tokens, so `hidden_states[-1]` is the
        features too.
        """
        states = self.hidden_states(pixel_values)
        output = BaseModelOutputWithPooling(last_hidden_state=states[-1])
        if output_hidden_states is not None and output_hidden_states is not False:
            output.hidden_states = states
        return output.to_tuple() if return_dict is False else output

    def encode(self, pixel_values: Tensor) -> ImageTokenizerOutput:
        """pixel_values [B, 3, H, W] -> features, latents, codes and ids."""
        self.grid_of(pixel_values)
        states = self.hidden_states(pixel_values)
        return self._quantized(states, self.sources(states))

    def decode(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """ids [B, M] in raster order -> pixels [B, 3, H, W] in [0, 1]. `grid` (rows, columns) for images of another
        size."""
        return self.pixels_from(self.lookup(ids), grid or self.config.grid).clamp(0, 1)

    def reconstruct(self, pixel_values: Tensor) -> ImageTokenizerOutput:
        """`encode`, then the pixels of its codes, not clamped, and the features that the decoder predicts beside them.
        In evaluation the pixels are those of `decode(ids)`, bit for bit."""
        grid, states = self.grid_of(pixel_values), self.hidden_states(pixel_values)
        sources = self.sources(states)
        output = self._quantized(states, sources)
        output.pixels, output.predictions = self.draw(output.codes, grid, predict=True)
        output.targets = self.targets(sources)
        return output

    def lookup(self, ids: Tensor) -> Tensor:
        """ids [B, M] -> codes [B, M, C]. Raises UserError for an id outside the codebook."""
        return self.quantizer.lookup(ids)

    # ---- their parts
    # ------------------------------------------------------------------------------------------------------------

    def hidden_states(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The encoder's hidden states up to the feature tap, each [B, N, D]."""
        self.patch_grid_of(pixel_values)
        states = encode_features(self.encoder, pixel_values.to(self.dtype))
        states = states[: range(len(states))[self.config.feature_layer] + 1]
        last = final_norm(self.encoder)(states[-1]) if self.config.apply_post_norm else states[-1]
        return (*states[:-1], last.contiguous())

    def features(self, pixel_values: Tensor) -> Tensor:
        return self.hidden_states(pixel_values)[-1]

    def sources(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the sampler reads of the hidden states: the features alone, or several levels, each [B, N, D]."""
        return states[-1:]

    def latents(self, *sources: Tensor) -> Tensor:
        """sources, each [B, N, D] -> latents [B, M, C], in float32 whatever the autocast."""
        with torch.autocast(sources[0].device.type, enabled=False):
            return self.sampler(*(source.float() for source in sources))

    def targets(self, sources: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The sources that the decoder predicts, by name."""
        return {}

    def draw(self, codes: Tensor, grid: tuple[int, int], *, predict: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """codes [B, M, C] -> pixels [B, 3, H, W], not clamped, and with `predict` the predicted features by name."""
        return self.denormalize(self.pixel_head(self.decoder(codes, grid), grid).float()), {}

    def pixels_from(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """codes [B, M, C] -> pixels [B, 3, H, W], not clamped."""
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
        """(rows, columns) of the image tokens that these images become. Raises UserError where they do not fit."""
        return self.patch_grid_of(pixel_values)

    def patch_grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """(rows, columns) of the patches. Raises UserError where the image is no multiple of the patch size."""
        height, width = pixel_values.shape[-2:]
        if height % self.config.patch_size or width % self.config.patch_size:
            raise UserError(
                f"An image of {height} x {width} pixels is no multiple of the patch size {self.config.patch_size}."
            )
        return height // self.config.patch_size, width // self.config.patch_size

    def normalize(self, pixels: Tensor) -> Tensor:
        """pixels in [0, 1] -> pixel_values as the encoder expects them."""
        return (pixels - self._channels(self.config.image_mean)) / self._channels(self.config.image_std)

    def denormalize(self, pixel_values: Tensor) -> Tensor:
        """pixel_values -> pixels in [0, 1]."""
        return pixel_values * self._channels(self.config.image_std) + self._channels(self.config.image_mean)

    def _channels(self, values: list[float] | tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=self.device, dtype=torch.float32).view(1, 3, 1, 1)

    @property
    def fingerprint(self) -> str:
        """sha256 over what decides the ids of given features: codebook, projections and geometry."""
        digest = hashlib.sha256()
        digest.update(repr(self.config.geometry).encode())
        for part in ("sampler", "quantizer"):
            for name, tensor in sorted(self.get_submodule(part).state_dict().items()):
                digest.update(f"{part}.{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    # ---- building
    # ---------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_encoder(
        cls,
        name_or_path: str | Path,
        *,
        image_size: int | None = None,
        attn_implementation: str | None = None,
        **config_fields: Any,
    ) -> Self:
        """A new tokenizer around a pretrained vision model.

        Args:
            name_or_path: a name that `unimm encoders` lists, a local Hugging Face folder, or a hub id. A composite
                checkpoint (SigLIP or CLIP with its text half, InternVL, also in its original layout) gives its vision
                half.
            image_size: pixels a side of the images; None takes the checkpoint's (what its patches cover). For
                another one the position table is interpolated, as the vision model does itself.
            attn_implementation: as in transformers.
            config_fields: fields of the tokenizer's configuration; normalization and feature layer are the
                checkpoint's own unless given.

        Raises:
            UserError: the encoder's weights are incomplete, its family is not supported, or the image's side is no
                multiple of the patch.
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
        """As in torch; an encoder that no stage may move stays in evaluation."""
        super().train(mode)
        self.encoder.train(mode and self.trains_encoder)
        return self

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OwnStart):
            module.start()
        elif type(module).__name__ == "InternVLVisionLayer":
            init.constant_(module.lambda_1, self.config.vision.layer_scale_init_value)
            init.constant_(module.lambda_2, self.config.vision.layer_scale_init_value)
