"""Training objective of the image tokenizers: a weighted sum of pure loss functions.

VQRAE (arXiv 2511.23386), equations 2 to 6: reconstruction (pixel, perceptual, GAN), quantization (codebook, commitment)
and, in stage 2, self-distillation toward the frozen original encoder. VFMTok (arXiv 2507.08441) and IDEAL (arXiv
2606.11096) align the features predicted by their decoders with the encoder's, and IDEAL adds an entropy loss on the
codes. All means are over all elements and in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.config.schema import Natural, NonNegative, Rate, Share, used_when
from unimm.tokenizer import ImageTokenizerOutput
from unimm.training.loop.global_batch import all_rows, global_size, micro_batch_index, own_rows, rows_before
from unimm.training.tokenizer.perceptual import FeaturePerceptualLoss, PerceptualLoss, build_perceptual


def _used_by(name: str) -> dict[str, Any]:
    return used_when(lambda c: name in c.kind, f"{name} in loss.perceptual.kind")


_GAN = used_when(lambda c: c.start is not None, "loss.gan.start")
_AUGMENTED = used_when(lambda c: c.start is not None and c.augment_probability, "loss.gan.augment_probability")
_CONSISTENT = used_when(lambda c: c.start is not None and c.consistency_weight, "loss.gan.consistency_weight")


@dataclass
class PerceptualConfig:
    """Settings of the perceptual loss.

    Args:
        kind: weighted sum of networks: "lpips+0.1*convnext_s" is VQRAE's, "features" compares hidden states of the
            tokenizer's own encoder, "none" turns the loss off.
        vgg16, lpips_heads, convnext_s: paths of weight files, which are never downloaded.
        feature_layers: indices of the hidden states that "features" compares.
    """

    kind: str = "lpips+0.1*convnext_s"
    vgg16: str | None = field(default=None, metadata=_used_by("lpips"))
    lpips_heads: str | None = field(default=None, metadata=_used_by("lpips"))
    convnext_s: str | None = field(default=None, metadata=_used_by("convnext_s"))
    feature_layers: list[int] = field(default_factory=lambda: [-1], metadata=_used_by("features"))


@dataclass
class GANConfig:
    """Settings of the GAN loss and the discriminator.

    Args:
        start: step from which the discriminator trains and the GAN loss applies; None: no GAN (VQRAE's stage 1).
        weight: weight of the generator loss in the tokenizer's objective.
        discriminator_weight: weight of the discriminator's hinge and LeCAM losses, relative to the consistency loss.
        lecam_weight: weight of LeCAM's regularizer.
        lecam: compare mean logits ("mean", TiTok's) or every logit ("elementwise", IDEAL's).
        discriminator, weights: "patchgan", or "dino" with the path of its weight file.
        generator: the tokenizer's loss on the logits D: "hinge" (-D) or "softplus" (of -D, VFMTok's).
        augment_probability: probability of each family of augmentations of the discriminator's input (IDEAL).
        consistency_weight: weight of the loss that equates the logits of a strongly augmented view (IDEAL).
        cutout, strong_cutout: share of a side that is cut out of the normal and of the strong view.
        learning_rate: peak learning rate of the discriminator.
        warmup_steps: steps of linear warm-up, before a decay until the end of the run.
        schedule: count the schedule from `start` ("start"), or from the first step of the run ("run"), so that a late
            discriminator begins at its full learning rate.
    """

    start: Natural | None = None
    weight: NonNegative = field(default=0.1, metadata=_GAN)
    discriminator_weight: NonNegative = field(default=1.0, metadata=_GAN)
    lecam_weight: NonNegative = field(default=0.001, metadata=_GAN)
    lecam: Literal["mean", "elementwise"] = field(default="mean", metadata=_GAN)
    discriminator: Literal["patchgan", "dino"] = field(default="patchgan", metadata=_GAN)
    weights: str | None = field(default=None, metadata=_GAN)
    generator: Literal["hinge", "softplus"] = field(default="hinge", metadata=_GAN)
    augment_probability: Share = field(default=0.0, metadata=_GAN)
    consistency_weight: NonNegative = field(default=0.0, metadata=_GAN)
    cutout: Share = field(default=0.2, metadata=_AUGMENTED)
    strong_cutout: Share = field(default=0.5, metadata=_CONSISTENT)
    learning_rate: Rate = field(default=4e-5, metadata=_GAN)
    warmup_steps: Natural = field(default=2000, metadata=_GAN)
    schedule: Literal["start", "run"] = field(default="start", metadata=_GAN)


@dataclass
class ObjectiveConfig:
    """Weights of the loss terms; the defaults are VQRAE's table 7, and cosine only for the features that a decoder
    predicts ("deep", and IDEAL's "shallow").

    `entropy_temperature` belongs to `entropy_weight`, see `tokenizer.quantizers.code_entropy`.

    Two terms are ours and off by default: `l1_weight`, for flat-colored images, and `context_weight`, see
    `context_loss`.
    """

    pixel_weight: NonNegative = 1.0
    l1_weight: NonNegative = 0.0
    perceptual_weight: NonNegative = field(
        default=1.0, metadata=used_when(lambda c: c.perceptual.kind != "none", "networks in loss.perceptual.kind")
    )
    codebook_weight: NonNegative = 1.0
    commitment_weight: NonNegative = 0.25
    distillation_weight: NonNegative = 1.0
    context_weight: NonNegative = 0.0
    entropy_weight: NonNegative = 0.0
    entropy_temperature: Rate = field(
        default=0.01, metadata=used_when(lambda c: c.entropy_weight, "loss.entropy_weight")
    )
    deep_cosine_weight: NonNegative = 1.0
    deep_mse_weight: NonNegative = 0.0
    shallow_cosine_weight: NonNegative = 1.0
    shallow_mse_weight: NonNegative = 0.0
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    gan: GANConfig = field(default_factory=GANConfig)


@dataclass
class PatchMix:
    """A patch mix (CutMix on patches): images that take some patches from the previous image of the global batch.

    Attributes:
        kept: [B, M] bool, true for the row's own patches; the others come from the previous row (cyclic), at the same
            position.
        latents: [B, M, C] of the mixed images.
        codes: [B, M, C] of the unmixed images, for every micro-batch.
    """

    kept: Tensor
    latents: Tensor
    codes: Sequence[Tensor]


def cosine_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean of 1 - cos over all tokens of two feature maps [B, N, D]; in [0, 2], 0 if all directions
    agree."""
    return 1 - F.cosine_similarity(predicted.float(), target.float(), dim=-1, eps=1e-6).mean()


def mix_patches(window: Sequence[Tensor], patch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Replace half of the patches of each image, in expectation, by those of the previous image of the global batch.

    Args:
        window: pixel_values [B, 3, H, W] of every micro-batch.
        patch_size: pixels a side of what one image token covers.
        seed: of the choice of patches, the same in every process and micro-batch.

    Returns:
        This micro-batch's mixed images [B, 3, H, W], and `kept` [B, M] as in `PatchMix`.
    """
    pixel_values = window[micro_batch_index()]
    rows, columns = (side // patch_size for side in pixel_values.shape[-2:])
    generator = torch.Generator().manual_seed(seed)
    every = torch.rand(global_size(len(pixel_values)), 1, rows, columns, generator=generator)
    kept = own_rows(every).lt(0.5).to(pixel_values.device)
    mask = kept.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)
    return torch.where(mask, pixel_values, rows_before(window)), kept.flatten(1)


def context_loss(latents: Tensor, window: Sequence[Tensor], kept: Tensor) -> Tensor:
    """Return the mean squared distance of a patch mix's latents [B, M, C] from the codes [B, M, C] that its patches
    had in their own images, divided by the codes' variance; `window` holds the codes of every micro-batch.

    Ours. An encoder with global attention maps one flat patch to a hundred ids, depending on the rest of the image,
    which a language model cannot predict. This term makes an id depend on its own patch.
    """
    target = torch.where(kept[..., None], window[micro_batch_index()], rows_before(window))
    variance = torch.cat([all_rows(codes) for codes in window]).var(dim=(0, 1)).mean()
    return F.mse_loss(latents, target) / variance.clamp_min(1e-6)


class TokenizerObjective(nn.Module):
    """The weighted sum of all loss terms of a tokenizer, and the unweighted terms for the log."""

    def __init__(self, config: ObjectiveConfig, features: FeaturePerceptualLoss | None = None) -> None:
        super().__init__()
        self.config = config
        p = config.perceptual
        self.perceptual: PerceptualLoss = build_perceptual(
            p.kind, vgg16=p.vgg16, lpips_heads=p.lpips_heads, convnext_s=p.convnext_s, features=features
        )

    def terms(
        self,
        output: ImageTokenizerOutput,
        pixels: Tensor,
        teacher_features: Tensor | None,
        patch_mix: PatchMix | None = None,
    ) -> dict[str, Tensor]:
        """Compute the unweighted loss terms.

        Args:
            output: what `reconstruct` returned.
            pixels: target pixels [B, 3, H, W] in [0, 1].
            teacher_features: [B, N, D] in stage 2, else None.
            patch_mix: a patch mix of the same images if `context_weight` is set, else None.
        """
        predicted = output.pixels.float()
        terms = {
            "pixel": F.mse_loss(predicted, pixels),
            "codebook": output.codebook_loss,
            "commitment": output.commitment_loss,
        }
        if self.config.l1_weight:
            terms["l1"] = F.l1_loss(predicted, pixels)
        if self.perceptual.networks:
            terms["perceptual"] = self.perceptual(predicted, pixels)
        if teacher_features is not None:
            terms["distillation"] = F.mse_loss(output.features.float(), teacher_features.float())
        if output.entropy_loss is not None:
            terms["entropy"] = output.entropy_loss
        targets = output.targets or {}
        for name, features in (output.predictions or {}).items():
            target = targets[name].float()
            terms[f"{name}_cosine"] = cosine_loss(features, target)
            terms[f"{name}_mse"] = F.mse_loss(features.float(), target)
        if patch_mix is not None:
            terms["context"] = context_loss(patch_mix.latents, patch_mix.codes, patch_mix.kept)
        return terms

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of `terms`."""
        return torch.stack([getattr(self.config, f"{name}_weight") * term for name, term in terms.items()]).sum()
