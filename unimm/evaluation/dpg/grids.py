"""Images of DPG-Bench as its official layout has them: a grid of 2 x 2 for each prompt, ITEM.png."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from unimm.data.image_files import save_image_atomically
from unimm.data.images import load_image
from unimm.errors import UserError
from unimm.evaluation.dpg.prompts import Prompts
from unimm.evaluation.runs.bad_images import each_or_error
from unimm.evaluation.runs.store import Key

GRID_SIDE = 2


class GridImages:
    """Images from a folder in the official layout: ITEM.png, a grid of 2 x 2 images of `resolution` pixels each. A file
    that cannot be read leads to records with that reason.

    Raises:
        UserError: files are missing (without `allow_missing`), no file can be read, or a grid has another size.
    """

    def __init__(
        self, folder: str | Path, prompts: Prompts, resolution: int, num_images: int, *, allow_missing: bool = False
    ) -> None:
        if not 1 <= num_images <= GRID_SIDE**2:
            raise UserError(f"A grid holds up to {GRID_SIDE**2} images, not {num_images}.")
        self.folder, self.resolution = Path(folder), resolution
        present = [item for item in prompts.texts if self._path(item).is_file()]
        self.missing = sorted(set(prompts.texts) - set(present))
        if not present or (self.missing and not allow_missing):
            named = ", ".join(f"{item}.png" for item in self.missing[:5])
            raise UserError(
                f"{folder} lacks {len(self.missing)} of {len(prompts.texts)} grids ({named}, ...): draw them, or count "
                "them as missing with --allow-missing."
            )
        self.keys = [(item, sample) for item in present for sample in range(num_images)]
        read = each_or_error([self._path(item) for item in present], load_image)
        if all(isinstance(grid, UserError) for grid in read):
            raise UserError(f"None of {len(present)} grids in {folder} can be read; the first: {read[0]}")
        for item, grid in zip(present, read, strict=True):
            if not isinstance(grid, UserError):
                self._check_size(item, grid)  # fail before the first question is asked

    def load(self, block: Sequence[Key]) -> list[tuple[Path, Image.Image | UserError]]:
        items = list(dict.fromkeys(item for item, _ in block))
        grids = dict(zip(items, each_or_error([self._path(item) for item in items], load_image), strict=True))
        return [(self._path(item), self._cut(grids[item], sample)) for item, sample in block]

    def _cut(self, grid: Image.Image | UserError, sample: int) -> Image.Image | UserError:
        return grid if isinstance(grid, UserError) else grid.crop(self._box(sample))

    def seed(self, key: Key) -> int:
        return 0

    def content(self) -> Iterable[str]:
        """Yield each grid's item and sha256."""
        for item in dict.fromkeys(item for item, _ in self.keys):
            yield f"{item} {hashlib.sha256(self._path(item).read_bytes()).hexdigest()}"

    def _path(self, item: str) -> Path:
        return self.folder / f"{item}.png"

    def _box(self, sample: int) -> tuple[int, int, int, int]:
        left, top = sample % GRID_SIDE * self.resolution, sample // GRID_SIDE * self.resolution
        return left, top, left + self.resolution, top + self.resolution

    def _check_size(self, item: str, grid: Image.Image) -> None:
        side = GRID_SIDE * self.resolution
        if grid.size != (side, side):
            raise UserError(
                f"{self._path(item)} has {grid.width} x {grid.height} pixels; a grid of images of {self.resolution} "
                f"has {side} x {side}: give the side of one image as --resolution."
            )


def write_grids(folder: Path, paths: Mapping[Key, Path]) -> Path:
    """Write the images as official 2 x 2 grids, ITEM.png in `folder`; cells without a readable image are black."""
    by_item: dict[str, list[Path]] = {}
    for (item, _), path in sorted(paths.items()):
        by_item.setdefault(item, []).append(path)
    for item, files in by_item.items():
        images = each_or_error(files[: GRID_SIDE**2], load_image)
        sizes = [image.size for image in images if not isinstance(image, UserError)]
        if not sizes:
            continue
        width, height = sizes[0]
        grid = Image.new("RGB", (GRID_SIDE * width, GRID_SIDE * height))
        for sample, image in enumerate(images):
            if isinstance(image, UserError):
                continue
            grid.paste(image, (sample % GRID_SIDE * width, sample // GRID_SIDE * height))
        save_image_atomically(grid, folder / f"{item}.png")
    return folder
