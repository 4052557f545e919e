"""Encode an image data set with an image tokenizer into a folder of ids (`unimm.data.sources.ids`).

Processes share only the output folder. Shard k is a fixed range of the source's rows and is written by process
k % world_size, under a temporary name that is then renamed. A restarted run therefore continues with the missing
shards, and the files are byte-identical for any number of processes. A process that finds all shards complete writes
the manifest. Captions, labels and keys are kept; unreadable rows are left out, counted in the manifest and listed in a
file beside their shard.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from unimm.config.schema import Count, Natural, Range, Seed, Share, used_when
from unimm.data.bad_rows import DEFAULT_MAX_BAD_SHARE, BadRow, Skipped, UsableRows, too_many
from unimm.data.image_streams import WORLD
from unimm.data.resizing import views_of
from unimm.data.shapes.datasets import ShapesImages
from unimm.data.shuffling import Rows
from unimm.data.sources.folders import FolderImages
from unimm.data.sources.ids import (
    COLUMNS,
    MANIFEST,
    IdsInfo,
    IdsManifest,
    info_of,
    read_ids,
    unigram_entropy,
    write_ids,
)
from unimm.data.sources.registry import open_images
from unimm.data.sources.rows import ReadOptions
from unimm.errors import UserError, reading
from unimm.runs.provenance import appearing, write_atomically
from unimm.tokenizer import ImageTokenizer, ImageTokenizerProcessor


@dataclass
class EncodeConfig:
    """The source images, the columns to keep, and the shard layout.

    Args:
        source, read: images as in `unimm.data.sources`, or "shapes" with a `count`; images are center-cropped.
        count: number of leading rows to encode; None encodes all.
        columns: columns kept besides ids and keys: text (a row without a caption counts as bad), class_label.
        label_column: the source column that class_label is read from. A folder with one subfolder for each class, as
            ImageNet's, has a column "label": the subfolder's number in alphabetical order.
        crop_scales, flip: encode several views of every image (`unimm.data.resizing.views_of`), each a row of its own;
            LlamaGen's ten-crop is [1.1] with flip. Without them, the center crop.
        rows_per_shard: source rows per shard; with `features` a shard has to fit in memory.
        batch_size, num_workers: per process.
        features: also save the tokenizer's features, as float16 in safetensors files beside the shards.
        max_bad_share: maximum share of bad rows.
        seed: of the shapes data set.
    """

    source: str
    read: ReadOptions = field(
        default_factory=ReadOptions, metadata=used_when(lambda c: c.source != WORLD, "data.source from outside")
    )
    count: Count | None = None
    columns: list[str] = field(default_factory=lambda: ["text"])
    label_column: str = field(
        default="label", metadata=used_when(lambda c: "class_label" in c.columns, "class_label in data.columns")
    )
    crop_scales: list[Annotated[float, Range(least=1)]] = field(default_factory=list)
    flip: bool = False
    rows_per_shard: Count = 4096
    batch_size: Count = 64
    num_workers: Natural = 0
    features: bool = False
    max_bad_share: Share = DEFAULT_MAX_BAD_SHARE
    seed: Seed = field(default=0, metadata=used_when(lambda c: c.source == WORLD, "data.source: shapes"))

    def __post_init__(self) -> None:
        known = [name for name in COLUMNS if name != "key"]
        if unknown := [name for name in self.columns if name not in known]:
            raise UserError(f"data.columns holds {unknown[0]!r}; known: {', '.join(known)}.")
        if min(self.rows_per_shard, self.batch_size, self.count or 1) < 1:
            raise UserError("data.rows_per_shard, data.batch_size and data.count must be at least 1.")

    @property
    def views(self) -> int:
        """Return the number of views, rows of ids, of one image."""
        return max(1, 5 * len(self.crop_scales)) * (2 if self.flip else 1)

    def rows(self) -> UsableRows:
        """Open the source. Raises UserError if it cannot be read or holds fewer than `count` rows."""
        if self.source != WORLD:
            rows: Rows = open_images(self.source, self.read)
        elif self.count is None:
            raise UserError("The shapes data set has no end: say how many images of it are wanted, data.count.")
        else:
            rows = ShapesImages(self.count, self.seed)
        if self.count is not None and len(rows) < self.count:
            raise UserError(f"{self.source} holds {len(rows)} rows and data.count asks for {self.count}.")
        if "class_label" in self.columns and isinstance(rows, FolderImages) and not rows.classes:
            raise UserError(f"{self.source} is no folder of classes: put every image into the subfolder of its class.")
        return UsableRows(rows, self.source, captions="text" in self.columns, max_bad_share=self.max_bad_share)

    def made_from(self, total: int) -> str:
        """Describe the encoded data; a run does not resume in a folder with another description."""
        parts = [f"{total} rows of {self.source}", f"{self.rows_per_shard} a shard", f"with {', '.join(self.columns)}"]
        parts += [f"five ADM crops at {', '.join(map(str, self.crop_scales))}"] if self.crop_scales else []
        parts += ["mirror images too"] if self.flip else []
        parts += [self.read.filters] if self.read.filters else []
        parts += [f"seed {self.seed}"] if self.source == WORLD else []
        return ", ".join(parts)


class Encoder:
    """An encoder of one process's shards: those k with k % `world_size` == `rank`, into `folder`.

    Raises:
        UserError: the source cannot be read, has too many bad rows, or the folder holds another run's shards.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        image_processor: ImageTokenizerProcessor,
        config: EncodeConfig,
        folder: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.tokenizer, self.image_processor, self.config, self.folder = (
            tokenizer.eval(),
            image_processor,
            config,
            folder,
        )
        self.rows = config.rows()
        self.total = len(self.rows) if config.count is None else config.count
        self.shards = range(-(-self.total // config.rows_per_shard))
        made_from = config.made_from(self.total)
        self.info = IdsInfo(tokenizer.fingerprint, tokenizer.config.codebook_size, tokenizer.config.grid, made_from)
        self.columns = ["key", *config.columns]
        self.rank, self.world_size = rank, world_size
        self.missing = [k for k in self.shards if k % world_size == rank and not self._is_done(k)]

    def run(self) -> int:
        """Encode the missing shards and return the number of images. The last process to finish writes the manifest."""
        done = 0
        parts: list[_Part] = []
        with self._bar() as bar:
            for part in self._encoded():
                if parts and parts[0].shard != part.shard:
                    self._write(parts)
                    parts = []
                parts.append(part)
                good = len(part.rows) // self.config.views
                done += good
                bar.update(good + len(part.skipped))
            if parts:
                self._write(parts)
        if all(self._path(k).is_file() for k in self.shards):
            self.finish()
        return done

    def finish(self) -> IdsManifest:
        """Write the manifest over all shards. Raises UserError if too many of all rows were bad."""
        shards, skipped = [], []
        for k in self.shards:
            bad = self._skipped(k)
            skipped += [each for each in bad if not each.filtered]
            rows = (len(self._span(k)) - len(bad)) * self.config.views
            shards.append({"name": self._path(k).name, "rows": rows, "skipped": dict(Counter(b.reason for b in bad))})
        if len(skipped) > self.config.max_bad_share * self.total:
            raise too_many(self.config.source, skipped, self.total, self.config.max_bad_share, self.folder)
        if not any(shard["rows"] for shard in shards):
            raise UserError(f"{self.config.source} has no row that can be used: all {self.total} were left out.")
        ids = (read_ids(self._path(k))[0] for k, shard in zip(self.shards, shards, strict=True) if shard["rows"])
        entropy = unigram_entropy(ids, self.info.codebook_size)
        manifest = IdsManifest(self.info, entropy, ["ids", *self.columns], shards)
        write_atomically(self.folder / MANIFEST, manifest.to_json())
        return manifest

    # ---- reading and encoding ----

    @torch.inference_mode()
    def _encoded(self) -> Iterator["_Part"]:
        """Yield the batches of the missing shards, in order."""
        config, size = self.config, max(1, self.config.batch_size // self.config.views)
        # No batch crosses a shard boundary, so a shard's bytes do not depend on which shards this process encodes.
        spans = [self._span(k) for k in self.missing]
        batches = [span[start : start + size] for span in spans for start in range(0, len(span), size)]
        images = _Images(self.rows, config, self.tokenizer.config.image_size)
        loader = DataLoader(
            images,
            batch_sampler=[list(batch) for batch in batches],
            num_workers=config.num_workers,
            collate_fn=self._collate,
        )
        for part, pixel_values in loader:
            if pixel_values is not None:
                output = self.tokenizer.encode(pixel_values.to(self.tokenizer.device))
                part.ids = output.ids.cpu().numpy()
                part.features = _half(output.features) if config.features else None
            yield part

    def _collate(self, rows: list[dict[str, Any] | Skipped]) -> tuple["_Part", Tensor | None]:
        """Collate the good rows; returns pixel_values [b, 3, H, W] of them, or None if all rows were skipped."""
        good = [row for row in rows if not isinstance(row, Skipped)]
        skipped = [row for row in rows if isinstance(row, Skipped)]
        first = skipped[0].row if isinstance(rows[0], Skipped) else good[0]["row"]
        kept = [{name: row[name] for name in self.columns} for row in good for _ in row["views"]]
        part = _Part(first // self.config.rows_per_shard, kept, skipped)
        if not good:
            return part, None
        views = [view for row in good for view in row["views"]]
        return part, self.image_processor(images=views, return_tensors="pt").pixel_values

    def _bar(self) -> tqdm:
        total = sum(len(self._span(k)) for k in self.missing)
        name = f"process {self.rank + 1} of {self.world_size}" if self.world_size > 1 else "encode"
        return tqdm(total=total, desc=name, unit="img", disable=self.rank > 0)

    # ---- files ----

    def _span(self, shard: int) -> range:
        """Return the range of source rows in a shard."""
        size = self.config.rows_per_shard
        return range(shard * size, min((shard + 1) * size, self.total))

    def _path(self, shard: int) -> Path:
        return self.folder / f"ids-{shard:05d}.parquet"

    def _is_done(self, shard: int) -> bool:
        """Check whether the shard is complete. Raises UserError if it was written by another run."""
        import pyarrow.parquet as pq

        path = self._path(shard)
        if not path.is_file():
            return False
        with reading("The shard", path):
            found = info_of(pq.read_metadata(path).metadata, path)
        found.require(tokenizer_fingerprint=self.info.tokenizer_fingerprint)
        if found != self.info:
            raise UserError(
                f"{path} holds ids of {found.made_from}, and the run asks for {self.info.made_from}: choose another "
                "output_dir."
            )
        return not self.config.features or self._features_path(shard).is_file()

    def _features_path(self, shard: int) -> Path:
        return self.folder / f"features-{shard:05d}.safetensors"

    def _skipped_path(self, shard: int) -> Path:
        return self.folder / f"ids-{shard:05d}.skipped.jsonl"

    def _skipped(self, shard: int) -> list[Skipped]:
        path = self._skipped_path(shard)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [Skipped(**json.loads(line)) for line in lines]

    def _write(self, parts: Sequence["_Part"]) -> None:
        """Write a shard, its ids last: `_is_done` takes a present ids file as a complete shard."""
        shard = parts[0].shard
        features = [part.features for part in parts if part.features is not None]
        if features:
            metadata = {"tokenizer": self.info.tokenizer_fingerprint}
            with appearing(self._features_path(shard), "features") as temporary:
                save_file({"features": torch.cat(features)}, temporary, metadata)
        self._skipped_path(shard).unlink(missing_ok=True)
        if skipped := [each.line for part in parts for each in part.skipped]:
            write_atomically(self._skipped_path(shard), "".join(skipped))
        rows = [row for part in parts for row in part.rows]
        ids = [part.ids for part in parts if part.ids is not None]
        columns = {name: [row[name] for row in rows] for name in self.columns}
        batches = [{"ids": np.concatenate(ids), **columns}] if ids else []
        write_ids(self._path(shard), self.info, batches, self.columns)


@dataclass
class _Part:
    """A batch of one shard: columns, ids [b, M] and features [b, N, D] of its good rows, and its skipped rows."""

    shard: int
    rows: list[dict[str, Any]]
    skipped: list[Skipped]
    ids: np.ndarray | None = None
    features: Tensor | None = None


class _Images(Dataset):
    """A dataset of the source's rows, as views and with their columns, or `Skipped` for a bad row."""

    def __init__(self, rows: UsableRows, config: EncodeConfig, image_size: int) -> None:
        self.rows, self.config, self.image_size = rows, config, image_size

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        row = self.rows.usable(index)
        if isinstance(row, Skipped):
            return row
        config = self.config
        views = views_of(row["image"], size=self.image_size, scales=config.crop_scales, flip=config.flip)
        kept = {"row": index, "views": views, "key": row["key"], "text": row["text"]}
        if "class_label" in config.columns:
            label = row.get(config.label_column)
            if not isinstance(label, int):
                why = BadRow("no label", f"{config.label_column} of {row['key']} is {label!r:.40}, no whole number")
                return self.rows.count.note(index, why)
            kept["class_label"] = label
        return kept


def _half(features: Tensor) -> Tensor:
    """Convert features to float16 on the CPU. Raises UserError if they overflow."""
    half = features.half().cpu()
    if not torch.isfinite(half).all():
        raise UserError(
            f"Features of up to {features.abs().max():.3g} do not fit into float16: set data.features: false."
        )
    return half
