"""The code atlas: what each id of an image tokenizer stands for, on one self-contained HTML page.

For each id: how often it is used, where in images, the mean of what it is decoded to, the real patches nearest to its
code, and its neighbors in the codebook by cosine. Statistics are streamed, so any number of images fits. The thumbnails
of all ids are tiles of three sheets, so a page of 4096 codes stays small. VFMTok's ids are no patches: it has no mean
patch, and whole images stand in for the nearest patches.
"""

import base64
import html
import io
import json
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from unimm.data.resizing import crop
from unimm.evaluation.runs.html import base_style
from unimm.evaluation.runs.image_sets import Bad, ImageSet
from unimm.runs.provenance import write_atomically
from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.codebook_usage import CodebookUsage

PAGE_NAME = "atlas.html"
NEAREST, NEIGHBORS = 4, 6
LARGEST_TILE = 16
IMAGE_TILE = 32
LARGEST_PNG = 2**20
"""Bytes; a larger sheet is a JPEG."""
PATCHES_NOTE = "Each tile is the mean of what an id is decoded to."
ANCHORS_NOTE = (
    "The ids of this tokenizer are no patches: each belongs to an anchor that samples learned places of the image. "
    "A tile is the image with an anchor nearest to the code; what one id alone is decoded to has no meaning."
)
RAMP = ((0.0, (20, 18, 40)), (0.35, (120, 28, 109)), (0.7, (237, 105, 37)), (1.0, (252, 255, 200)))
"""Colors of the heat maps, dark to light."""


@dataclass
class Atlas:
    """Statistics of the ids of a set of images.

    Args:
        grid: rows and columns of the ids of one image.
        tile: side in pixels of the patches.
        usage: how often each id occurs.
        places: [K, M], how often at each place.
        drawn: [K, tile, tile, 3], the sums of the decoded patches in [0, 1]; None if ids are no patches.
        distances, images: [K, NEAREST], squared distances of the nearest latents, and their images (-1: none).
        patches: [K, NEAREST, tile, tile, 3] uint8, the real patches of these; None if ids are no patches.
        thumbnails: the images of these by number, [IMAGE_TILE, IMAGE_TILE, 3] uint8 each, if ids are no patches.
        neighbors, cosines: [K, NEIGHBORS], the nearest other codes.
        count: images read.
    """

    grid: tuple[int, int]
    tile: int
    usage: CodebookUsage
    places: np.ndarray
    drawn: np.ndarray | None
    distances: np.ndarray
    images: np.ndarray
    patches: np.ndarray | None
    neighbors: np.ndarray
    cosines: np.ndarray
    thumbnails: dict[int, np.ndarray] = field(default_factory=dict)
    count: int = 0

    @classmethod
    def of(cls, tokenizer: ImageTokenizer) -> "Atlas":
        """Return the empty atlas of a tokenizer's codebook."""
        config, table = tokenizer.config, tokenizer.quantizer.effective_codebook.detach().cpu()
        size, tile = len(table), min(LARGEST_TILE, config.decoded_patch_size)
        return cls(
            config.grid,
            tile,
            CodebookUsage(size),
            np.zeros((size, config.num_image_tokens), np.int64),
            np.zeros((size, tile, tile, 3)) if tokenizer.ids_are_patches else None,
            np.full((size, NEAREST), np.inf),
            np.full((size, NEAREST), -1),
            np.full((size, NEAREST, tile, tile, 3), 255, np.uint8) if tokenizer.ids_are_patches else None,
            *code_neighbors(table),
        )

    def mean(self) -> np.ndarray:
        """Return the mean decoded patches, [K, tile, tile, 3] uint8, white for an unused id."""
        assert self.drawn is not None
        counts = self.usage.counts.numpy()[:, None, None, None]
        return (np.where(counts > 0, self.drawn / np.maximum(counts, 1), 1).clip(0, 1) * 255).round().astype(np.uint8)

    def add(self, ids: np.ndarray, distances: np.ndarray, real: np.ndarray, drawn: np.ndarray | None) -> None:
        """Add a batch.

        Args:
            ids, distances: [B, M].
            real: in [0, 1], patches [B, M, t, t, 3] or images [B, s, s, 3].
            drawn: decoded patches, as `real`; None if ids are no patches.
        """
        batch, length = ids.shape
        self.usage.update(torch.from_numpy(ids))
        np.add.at(self.places, (ids, np.arange(length)), 1)
        if self.drawn is not None and drawn is not None:
            np.add.at(self.drawn, ids.ravel(), drawn.reshape(batch * length, *drawn.shape[2:]))
        bytes_ = (real.clip(0, 1) * 255).round().astype(np.uint8)
        close = np.argwhere(distances < self.distances[ids, -1])
        for image, place in close[np.argsort(distances[tuple(close.T)], kind="stable")]:
            patch = bytes_[image, place] if self.patches is not None else None
            self._offer(ids[image, place], distances[image, place], self.count + image, patch)
        if self.patches is None:
            self.thumbnails |= {self.count + image: bytes_[image] for image in range(batch)}
            self.thumbnails = {int(n): self.thumbnails[n] for n in np.unique(self.images) if n >= 0}
        self.count += batch

    def _offer(self, code: int, distance: float, image: int, patch: np.ndarray | None) -> None:
        """Insert an image and its patch among the nearest of a code, one patch of each image."""
        if distance >= self.distances[code, -1] or image in self.images[code]:
            return
        place = int(np.searchsorted(self.distances[code], distance, side="right"))
        for kept, new in ((self.distances, distance), (self.images, image), (self.patches, patch)):
            if kept is not None:
                kept[code, place + 1 :] = kept[code, place:-1].copy()
                kept[code, place] = new


def code_neighbors(table: Tensor, chunk: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest other codes by cosine and the cosines, each [K, NEIGHBORS] (fewer if K is small)."""
    unit, size = F.normalize(table.float(), dim=1), len(table)
    ids, cosines = [], []
    for start in range(0, size, chunk):
        rows = unit[start : start + chunk] @ unit.t()
        rows[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = -torch.inf
        best = rows.topk(min(NEIGHBORS, size - 1))
        ids.append(best.indices)
        cosines.append(best.values)
    return torch.cat(ids).numpy(), torch.cat(cosines).numpy()


@torch.inference_mode()
def collect(
    tokenizer: ImageTokenizer, image_processor: Any, images: ImageSet, *, batch_size: int = 32, bad: Bad | None = None
) -> Atlas:
    """Encode and decode the images, center-cropped, into an atlas.

    Raises UserError if an image cannot be read and there is no `bad` to name it to.
    """
    atlas, size = Atlas.of(tokenizer), tokenizer.config.image_size
    table = tokenizer.quantizer.effective_codebook
    for batch in tqdm(images.batches(batch_size, bad=bad), total=-(-len(images) // batch_size), desc="atlas"):
        crops = [crop(image, size) for _, image in batch]
        values = image_processor(images=crops, return_tensors="pt").pixel_values.to(tokenizer.device)
        output = tokenizer.reconstruct(values)
        latents = tokenizer.quantizer.comparable(output.latents)
        distances = (latents - F.embedding(output.ids, table)).square().sum(-1)
        real = tokenizer.denormalize(values.float())
        arrays = output.ids.cpu().numpy(), distances.double().cpu().numpy()
        if tokenizer.ids_are_patches:
            atlas.add(*arrays, patches_of(real, atlas), patches_of(output.pixels.float().clamp(0, 1), atlas))
        else:
            small = F.interpolate(real, size=(IMAGE_TILE, IMAGE_TILE), mode="area")
            atlas.add(*arrays, small.permute(0, 2, 3, 1).cpu().numpy(), None)
    return atlas


def patches_of(pixels: Tensor, atlas: Atlas) -> np.ndarray:
    """Cut pixels [B, 3, H, W] along the grid of ids into patches [B, M, tile, tile, 3]."""
    (rows, columns), tile = atlas.grid, atlas.tile
    small = F.interpolate(pixels, size=(rows * tile, columns * tile), mode="area")
    cells = small.unflatten(3, (columns, tile)).unflatten(2, (rows, tile))  # [B, 3, rows, tile, columns, tile]
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(1, 2).cpu().numpy()


# ---- the page ----


def write_page(path: Path, atlas: Atlas, *, title: str, source: str) -> None:
    """Write the atlas as one HTML file without requests to anything else."""
    usage, size = atlas.usage, len(atlas.usage.counts)
    patches = atlas.patches is not None
    if atlas.patches is not None:
        tiles, near = (
            atlas.patches.reshape(-1, *atlas.patches.shape[2:]),
            np.arange(size * NEAREST).reshape(size, NEAREST),
        )
        sheets = {"mean": sheet(atlas.mean())}
    else:  # an image is among the nearest of many ids, and stands in the sheet once
        numbers = np.array(sorted(atlas.thumbnails))
        tiles, near = np.stack([atlas.thumbnails[n] for n in numbers]), np.searchsorted(numbers, atlas.images)
        sheets = {}
    sheets |= {"near": sheet(tiles), "heat": sheet(heat(atlas))}
    data = {
        "counts": usage.counts.tolist(),
        "neighbors": atlas.neighbors.tolist(),
        "cosines": [[round(float(cosine), 3) for cosine in row] for row in atlas.cosines],
        "spread": [round(each, 3) for each in spread(atlas.places)],
        "light": atlas.mean().mean((1, 2, 3)).round(1).tolist() if patches else None,
        "near": [row[found].tolist() for row, found in zip(near, atlas.images >= 0, strict=True)],
        "sheets": {name: {"columns": columns, "rows": rows} for name, (_, columns, rows) in sheets.items()},
        "grid": list(atlas.grid),
        "patches": patches,
    }
    tokens = int(usage.counts.sum())
    facts = (
        f"{size:,} codes, {size - usage.dead:,} of them used ({usage.use:.1%}), perplexity {usage.perplexity:,.0f}; "
        f"{tokens:,} ids of {atlas.count:,} images ({source}), {atlas.grid[0]} x {atlas.grid[1]} each."
    )
    few = " Fewer than five ids a code: even a uniform code would leave some unused." if tokens < 5 * size else ""
    note = PATCHES_NOTE if patches else ANCHORS_NOTE
    template = resources.files("unimm").joinpath("atlas.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        title=html.escape(f"Codes of {title}"),
        style=base_style(),
        facts=html.escape(facts + few),
        note=note,
        near_words="Nearest real patches" if patches else "Images nearest to the code",
        sheets="\n".join(f"  .{name} {{ background-image: url({uri}); }}" for name, (uri, _, _) in sheets.items()),
        data=json.dumps(data, separators=(",", ":")),
    )
    write_atomically(path, page)


def sheet(tiles: np.ndarray) -> tuple[str, int, int]:
    """Lay out tiles [n, h, w, 3] uint8 row by row in about a square; return a data URI, columns and rows."""
    count, height, width, _ = tiles.shape
    columns = math.ceil((count * height / width) ** 0.5)
    rows = math.ceil(count / columns)
    whole = np.full((rows * columns, height, width, 3), 255, np.uint8)
    whole[:count] = tiles
    array = whole.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    image = Image.fromarray(np.ascontiguousarray(array.reshape(rows * height, columns * width, 3)))
    kind, data = "png", io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    if data.tell() > LARGEST_PNG:
        kind, data = "jpeg", io.BytesIO()
        image.save(data, format="JPEG", quality=85, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}", columns, rows


def heat(atlas: Atlas) -> np.ndarray:
    """Return each id's map of places, [K, rows, columns, 3] uint8, relative to its own most frequent place."""
    shares = atlas.places / np.maximum(atlas.places.max(1, keepdims=True), 1)
    steps, colors = [step for step, _ in RAMP], np.array([color for _, color in RAMP])
    channels = [np.interp(shares, steps, colors[:, channel]) for channel in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8).reshape(len(shares), *atlas.grid, 3)


def spread(places: np.ndarray) -> np.ndarray:
    """Return how evenly each id is spread over the places, 0 to 1: its entropy over the largest possible one."""
    shares = places / np.maximum(places.sum(1, keepdims=True), 1)
    entropies = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(1)
    return entropies / max(math.log(places.shape[1]), 1e-12)
