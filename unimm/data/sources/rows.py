"""Read options of external data, and the decoding and checks that turn a raw row into {"image", "text", "key", ...}."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from PIL import Image

from unimm.config.schema import Natural, Range
from unimm.data.bad_rows import BadRow, Filtered, refuse_half_characters
from unimm.data.images import decode_image, load_image
from unimm.errors import UserError


@dataclass
class ReadOptions:
    """How a source of images is read and filtered.

    Args:
        split, subset: split and subset of a Hub data set.
        streaming: read the parquet or tar files in place, shard by shard, instead of copying tables to the cache first.
        image_column, text_column: columns of tables; `text_column` is also the caption's field in .json and
            metadata.jsonl files next to images.
        target_column: column of the edited images (editing only); `image_column` holds the images before it and
            `text_column` the instructions.
        max_aspect_ratio: leave out images whose longer side / shorter side is larger.
        min_side: leave out images whose shorter side has fewer pixels.
    """

    split: str = "train"
    subset: str | None = None
    streaming: bool = False
    image_column: str = "image"
    text_column: str = "text"
    target_column: str = "target"
    max_aspect_ratio: Annotated[float, Range(least=1)] | None = None
    min_side: Natural = 0

    def __post_init__(self) -> None:
        if self.max_aspect_ratio is not None and self.max_aspect_ratio < 1:
            raise UserError(
                f"max_aspect_ratio is longer side / shorter side, at least 1, and is {self.max_aspect_ratio}."
            )

    def refuse_others(self, source: str, what: str, names: Sequence[str] = ()) -> None:
        """Raise UserError if an option is set that `source`, which is `what` ("a folder of images"), does not have;
        `names` are those that it has."""
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name not in names and value != option.default:
                have = f"it has read.{', read.'.join(names)}" if names else "it has no read options"
                raise UserError(
                    f"read.{option.name} is {value!r} and does not apply to {source}, {what}: remove it ({have})."
                )

    def check(self, size: tuple[int, int]) -> None:
        """Raise `Filtered` if an image of (width, height) is filtered out."""
        short, long = sorted(size)
        if short < self.min_side:
            raise Filtered("too small", f"{size[0]} x {size[1]} pixels, min_side {self.min_side}")
        if self.max_aspect_ratio is not None and long > self.max_aspect_ratio * short:
            raise Filtered("too long", f"{size[0]} x {size[1]} pixels, max_aspect_ratio {self.max_aspect_ratio}")

    def named(self, source: str) -> str:
        """Return the source name, with the subset and split of a Hub data set appended."""
        return f"{source}#{self.subset or ''}#{self.split}" if source.startswith("hub:") else source

    @property
    def filters(self) -> str:
        """Describe the active filters; empty if there are none."""
        parts = [f"min_side {self.min_side}"] if self.min_side else []
        parts += [f"max_aspect_ratio {self.max_aspect_ratio}"] if self.max_aspect_ratio is not None else []
        return ", ".join(parts)

    def image(self, value: Any, name: str) -> Image.Image:
        """Load an image from a file's bytes, a path, or a table's {"bytes", "path"}. Raises `BadRow`."""
        if isinstance(value, Mapping):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        try:
            if isinstance(value, bytes):
                return decode_image(value, name, self.check)
            if isinstance(value, str | Path):
                return load_image(value, self.check)
        except BadRow:
            raise
        except UserError as error:
            raise BadRow("damaged image", str(error)) from None
        raise BadRow("no image", f"{name} holds {type(value).__name__} where its image should be")

    def caption(self, value: Any, name: str) -> str:
        """Return the caption of a row: the first of several, empty if there is none. Raises `BadRow`."""
        if isinstance(value, list) and value:
            value = value[0]
        if value is None or value == []:
            return ""
        if not isinstance(value, str):
            raise BadRow("wrong caption", f"the caption of {name} is {value!r:.80}, no text")
        refuse_half_characters(value, f"the caption of {name}")
        return value
