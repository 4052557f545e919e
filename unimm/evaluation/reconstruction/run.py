"""Reconstruction benchmark for image tokenizers, with two baselines: mean colors and k-means of raw patches.

Images are cropped by a named protocol (`unimm.evaluation.runs.image_sets`), and both sides of every metric are 8-bit
images. Each image has its own row; scores are means over the rows, with standard errors.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from unimm.data.image_streams import to_array
from unimm.errors import UserError, one_line
from unimm.evaluation.metrics.image_metrics import (
    capped_psnr,
    mean_color_per_patch,
    ssim,
    ssim_llamagen_compat,
    to_uint8,
)
from unimm.evaluation.runs.image_sets import Bad, ImageSet, image_set, source_sha256
from unimm.evaluation.runs.protocols import PROTOCOLS, Protocol
from unimm.networks.perceptual import LPIPS
from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.codebook_usage import CodebookUsage
from unimm.tokenizer.search import nearest_codes

Row = dict[str, Any]
KMEANS_IMAGES = 2000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReconstructionPlan:
    """The settings of a reconstruction benchmark.

    Args:
        source: as in the recipes' `data.source`, or an npz of images.
        num_images: size of a random subset, chosen by `seed`; None takes all images, in the order of their names.
        kmeans_source: images whose patches train the k-means baseline.
        protocol: a key of `unimm.evaluation.runs.image_sets.PROTOCOLS`.
        score_size: side length in pixels at which images are compared; None is the tokenizer's input size, which must
            equal its output size.
    """

    source: str
    num_images: int | None = 1000
    kmeans_source: str | None = None
    kmeans_codes: int = 1024
    batch_size: int = 50
    seed: int = 0
    protocol: str = "adm"
    score_size: int | None = None

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise UserError(f"No protocol {self.protocol!r}; there are {', '.join(PROTOCOLS)}.")
        for name in ("num_images", "batch_size", "score_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")

    @property
    def rules(self) -> Protocol:
        return PROTOCOLS[self.protocol]

    def images(self) -> ImageSet:
        """Open the evaluated images, in order. Raises UserError if they cannot be opened."""
        return image_set(self.source, self.num_images, self._drawn_by)

    def images_sha256(self) -> str:
        """Compute the sha256 of the evaluated names and files, so that changed data is detected on resume."""
        return source_sha256(self.source, self.num_images, self._drawn_by)

    def kmeans_images(self) -> ImageSet:
        """Open the images that train the k-means baseline."""
        assert self.kmeans_source is not None
        return image_set(self.kmeans_source, KMEANS_IMAGES, self.seed)

    def kmeans_sha256(self) -> str:
        assert self.kmeans_source is not None
        return source_sha256(self.kmeans_source, KMEANS_IMAGES, self.seed)

    @property
    def _drawn_by(self) -> int | None:
        return None if self.num_images is None else self.seed


@dataclass(frozen=True)
class Compared:
    """One batch: originals and reconstructions (`drawn`) as uint8 [B, H, W, 3], and the scores of each image."""

    names: list[str]
    originals: np.ndarray
    drawn: np.ndarray
    ids: Tensor  # [B, M]
    values: dict[str, Tensor]  # each [B]

    def rows(self) -> list[Row]:
        columns = {name: values.tolist() for name, values in self.values.items()}
        return [{"name": name, **{key: columns[key][i] for key in columns}} for i, name in enumerate(self.names)]


class Reconstructions(NamedTuple):
    """Results of a set: its `scores`, the standard `errors` of those that are means, one row per image, and the
    unreadable images by name, with the reason."""

    scores: dict[str, float]
    errors: dict[str, float]
    rows: list[Row]
    unreadable: dict[str, str]


def evaluate_images(
    tokenizer: ImageTokenizer,
    image_processor: Any,
    plan: ReconstructionPlan,
    reference: ImageTokenizer | None = None,
    on_batch: Callable[[Compared], None] | None = None,
    lpips: LPIPS | None = None,
) -> Reconstructions:
    """Encode images to ids, decode them, and score the reconstructions; unreadable images are left out and named.

    Scores are psnr (every psnr is capped at HIGHEST_PSNR), exact_copy (share of exact copies), psnr_mean_color, ssim,
    ssim_llamagen_compat, and over all ids codebook_use, entropy (bits), perplexity and dead_codes. Optional are
    psnr_kmeans (if the plan has a `kmeans_source`), feature_cosine (the mean cosine to the features of `reference`, a
    tokenizer with the original encoder) and lpips_vgg (with `lpips`). `on_batch` is called with every batch.

    Raises:
        UserError: the source cannot be read, or has too few images or no readable ones; or the tokenizer's output size
            differs from its input size and the plan has no `score_size`.
    """
    usage, rows, unreadable = CodebookUsage(tokenizer.config.codebook_size), list[Row](), dict[str, str]()

    def bad(name: str, error: UserError) -> None:
        unreadable[name] = one_line(error)

    for batch in compared_images(tokenizer, image_processor, plan, reference, lpips, bad=bad):
        for row, ids in zip(batch.rows(), batch.ids, strict=True):
            try:
                check_finite(row)
            except UserError as error:
                bad(row["name"], error)
                continue
            usage.update(ids)
            rows.append(row)
        if on_batch is not None:
            on_batch(batch)
    return summarized(rows, usage, unreadable)


def check_finite(row: Row) -> None:
    """Raise UserError if a score of an image is not finite: it would make the mean non-finite."""
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} is {value}")


def summarized(rows: list[Row], usage: CodebookUsage, unreadable: dict[str, str]) -> Reconstructions:
    """Return the scores of a whole set from the rows of its images and the codebook usage of all ids.

    Raises:
        UserError: no image could be read.
    """
    if not rows:
        name, reason = next(iter(unreadable.items()), ("", "the set is empty"))
        raise UserError(f"None of {len(unreadable)} images can be read; the first is {name}: {reason}")
    means = {name: [row[name] for row in rows] for name in rows[0] if name != "name"}
    scores = {name: float(np.mean(values)) for name, values in means.items()}
    errors = {name: float(np.std(values, ddof=1) / len(rows) ** 0.5) for name, values in means.items() if len(rows) > 1}
    use = {"codebook_use": usage.use, "entropy": usage.entropy, "perplexity": usage.perplexity}
    return Reconstructions(scores | use | {"dead_codes": usage.dead}, errors, rows, unreadable)


@torch.inference_mode()
def compared_images(
    tokenizer: ImageTokenizer,
    image_processor: Any,
    plan: ReconstructionPlan,
    reference: ImageTokenizer | None = None,
    lpips: LPIPS | None = None,
    wanted: Callable[[Sequence[str]], bool] = bool,
    bad: Bad | None = None,
) -> Iterator[Compared]:
    """Yield the plan's images with their reconstructions, batch by batch.

    Batches whose names are not `wanted` are skipped. `bad` is called for each image that cannot be read.
    """
    size, patch_size = tokenizer.config.image_size, tokenizer.config.patch_size
    raw_images = plan.images()
    patches = raw_patch_codebook(plan, size, patch_size) if plan.kmeans_source else None
    with tqdm(total=len(raw_images), desc="images") as bar:
        for batch in raw_images.batches(plan.batch_size, wanted, bad):
            bar.update(len(batch))
            images = [plan.rules.cut(image, size) for _, image in batch]
            pixel_values = image_processor(images=images, return_tensors="pt").pixel_values.to(tokenizer.device)
            encoded = tokenizer.encode(pixel_values)
            drawn = to_uint8(tokenizer.decode(encoded.ids)).permute(0, 2, 3, 1).cpu().numpy()
            originals, drawn = _scored(plan, size, [image for _, image in batch], drawn)
            pixels, copies = pixels_of(originals), pixels_of(drawn)
            values = {
                "psnr": capped_psnr(copies, pixels),
                "exact_copy": (copies == pixels).flatten(1).all(dim=1).double(),
                "ssim": ssim(copies, pixels),
                "ssim_llamagen_compat": ssim_llamagen_compat(copies, pixels),
            }
            if lpips is not None:
                values["lpips_vgg"] = lpips.distances(copies, pixels).double()
            # the baselines are scored at the tokenizer's input size, whatever the plan's `score_size`
            cut = pixels_of(to_array(images))
            values["psnr_mean_color"] = capped_psnr(mean_color_per_patch(cut, patch_size), cut)
            if patches is not None:
                values["psnr_kmeans"] = capped_psnr(paint(cut, patches, patch_size), cut)
            if reference is not None:
                theirs = reference.features(pixel_values)
                values["feature_cosine"] = F.cosine_similarity(encoded.features, theirs, dim=-1).mean(dim=1)
            yield Compared([name for name, _ in batch], originals, drawn, encoded.ids, values)


def _scored(
    plan: ReconstructionPlan, size: int, images: list[Image.Image], drawn: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return originals and reconstructions at the size that is scored; `size` is the tokenizer's input size."""
    if plan.score_size is None and drawn.shape[1:3] != (size, size):
        raise UserError(
            f"The tokenizer draws {drawn.shape[2]} pixels a side and reads {size}: say at which size they are compared "
            "(--score-size)."
        )
    scored = plan.score_size or size
    originals = to_array([plan.rules.cut(image, scored) for image in images])
    return originals, np.stack([plan.rules.resized(raw_image, scored) for raw_image in drawn])


def raw_patch_codebook(plan: ReconstructionPlan, size: int, patch_size: int, iterations: int = 15) -> Tensor:
    """Compute `kmeans_codes` k-means centers [K, 3*p*p] of the raw patches of `kmeans_source`."""
    images = plan.kmeans_images()
    batches = images.batches(plan.batch_size, bad=lambda _, error: logger.warning("k-means goes without: %s", error))
    cut = (pixels_of(to_array([plan.rules.cut(image, size) for _, image in batch])) for batch in batches)
    flat = torch.cat([to_patches(pixels, patch_size).flatten(0, 1) for pixels in cut])
    generator = torch.Generator().manual_seed(plan.seed)
    centres = flat[torch.randperm(len(flat), generator=generator)[: plan.kmeans_codes]].clone()
    for _ in range(iterations):
        ids = nearest_codes(flat, centres)
        counts = torch.bincount(ids, minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, ids, flat)
        # a center without patches stays where it is
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def paint(pixels: Tensor, codebook: Tensor, patch_size: int) -> Tensor:
    """Replace every patch by its nearest row of `codebook`; pixels and result are [B, 3, H, W]."""
    patches = to_patches(pixels, patch_size)
    painted = F.embedding(nearest_codes(patches, codebook), codebook)
    return F.fold(painted.transpose(1, 2), pixels.shape[-2:], patch_size, stride=patch_size)


def to_patches(pixels: Tensor, patch_size: int) -> Tensor:
    """Split images into flat patches: [B, 3, H, W] -> [B, N, 3*p*p]."""
    return F.unfold(pixels, patch_size, stride=patch_size).transpose(1, 2)


def pixels_of(images: np.ndarray) -> Tensor:
    """Convert uint8 [B, H, W, 3] to pixels [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
