"""Reconstruction of real pictures, beside what plain colours and plain k-means of patches would give.

Protocol: the short side resized to the tokenizer's size (bicubic), the centre cut out, ids decoded, both sides rounded
to 8 bits; PSNR and SSIM per picture with data range 1, then averaged.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from unimm.data.pictures import PictureConfig, Pictures, picture_stream, to_array
from unimm.errors import UserError
from unimm.evaluation.codebook import CodebookUsage
from unimm.evaluation.image_metrics import mean_color_per_patch, psnr, ssim, to_uint8
from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.quantizers import nearest_codes


@dataclass(frozen=True)
class ReconstructionPlan:
    """`source` as in the recipes' `data.source`; `kmeans_source` gives the patches that the k-means baseline learns
    from."""

    source: str
    num_images: int = 1000
    kmeans_source: str | None = None
    kmeans_codes: int = 1024
    batch_size: int = 50
    seed: int = 0


@torch.inference_mode()
def evaluate_pictures(
    tokenizer: ImageTokenizer, image_processor: Any, plan: ReconstructionPlan, reference: ImageTokenizer | None = None
) -> dict[str, float]:
    """psnr, ssim, psnr_mean_color, codebook_use, perplexity; psnr_kmeans where a source for it is given, and
    feature_cosine, the mean cosine to the features of `reference` (a tokenizer with the original encoder) where one is
    given.
    """
    size = tokenizer.config.image_size
    batches = pixel_batches(plan.source, size, plan.num_images, plan)
    usage, rows = CodebookUsage(tokenizer.config.codebook_size), dict[str, list[Tensor]]()
    patches = raw_patch_codebook(plan, size, tokenizer.config.patch_size) if plan.kmeans_source else None
    for images in tqdm(batches, desc="pictures", unit="batch"):
        pixel_values = image_processor(images=images, return_tensors="pt").pixel_values.to(tokenizer.device)
        pixels = tokenizer.denormalize(pixel_values)
        encoded = tokenizer.encode(pixel_values)
        usage.update(encoded.ids)
        decoded = tokenizer.decode(encoded.ids)
        if decoded.shape != pixels.shape:
            raise UserError(
                f"The tokenizer draws {decoded.shape[-1]} pixels a side and reads {pixels.shape[-1]}: "
                "they cannot be compared."
            )
        rounded = to_uint8(decoded) / 255
        found = {"psnr": psnr(rounded, pixels), "ssim": ssim(rounded, pixels)}
        found["psnr_mean_color"] = psnr(mean_color_per_patch(pixels, tokenizer.config.patch_size), pixels)
        if patches is not None:
            found["psnr_kmeans"] = psnr(paint(pixels, patches, tokenizer.config.patch_size), pixels)
        if reference is not None:
            theirs = reference.features(pixel_values)
            found["feature_cosine"] = F.cosine_similarity(encoded.features, theirs, dim=-1).mean(dim=1)
        for name, values in found.items():
            rows.setdefault(name, []).append(values.float())
    scores = {name: float(torch.cat(values).mean()) for name, values in rows.items()}
    return scores | {"codebook_use": usage.use, "perplexity": usage.perplexity}


def pixel_batches(source: str, size: int, count: int, plan: ReconstructionPlan) -> DataLoader:
    """Lists of PIL pictures, cut to `size`; every picture at most once. Raises UserError where the source holds
    fewer."""
    stream: Pictures = picture_stream(PictureConfig(source, size), count, plan.seed)
    held = len(getattr(stream, "pictures", stream))
    if held < count:
        raise UserError(f"{source} holds {held} pictures and {count} are asked for.")
    return DataLoader(
        Subset(stream, range(count)), batch_size=plan.batch_size, collate_fn=lambda rows: [r["image"] for r in rows]
    )


def raw_patch_codebook(
    plan: ReconstructionPlan, size: int, patch_size: int, num_images: int = 2000, iterations: int = 15
) -> Tensor:
    """`kmeans_codes` centres [K, 3*p*p] of the raw patches of `kmeans_source`."""
    assert plan.kmeans_source is not None
    batches = pixel_batches(plan.kmeans_source, size, num_images, plan)
    flat = torch.cat([to_patches(to_pixels(images), patch_size).flatten(0, 1) for images in batches])
    generator = torch.Generator().manual_seed(plan.seed)
    centres = flat[torch.randperm(len(flat), generator=generator)[: plan.kmeans_codes]].clone()
    for _ in range(iterations):
        ids = nearest_codes(flat, centres)
        counts = torch.bincount(ids, minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, ids, flat)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def paint(pixels: Tensor, codebook: Tensor, patch_size: int) -> Tensor:
    """Every patch replaced by its nearest row of `codebook`."""
    patches = to_patches(pixels, patch_size)
    painted = F.embedding(nearest_codes(patches, codebook), codebook)
    return F.fold(painted.transpose(1, 2), pixels.shape[-2:], patch_size, stride=patch_size)


def to_patches(pixels: Tensor, patch_size: int) -> Tensor:
    """[B, 3, H, W] -> [B, N, 3*p*p]."""
    return F.unfold(pixels, patch_size, stride=patch_size).transpose(1, 2)


def to_pixels(images: list) -> Tensor:
    """PIL RGB pictures of one size -> pixels [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(to_array(images)).permute(0, 3, 1, 2).float() / 255
