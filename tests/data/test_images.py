"""Images of every kind that people have on disk, and files that are none."""

import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unimm.data import image_files
from unimm.data.image_files import save_image_atomically, save_images, save_numbered
from unimm.data.images import load_image
from unimm.errors import UserError


def pixels(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), values)


def test_cmyk_keeps_its_colour(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (255, 0, 0)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - (255, 0, 0)).max() <= 4


def test_palette_with_transparency_shows_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert pixels(tmp_path / "a.png").tolist() == [[[255, 255, 255], [200, 100, 50]]]
    image.save(tmp_path / "b.png")
    assert pixels(tmp_path / "b.png").tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_alpha_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 51, 255)):
        image.putpixel((x, 0), (255, 0, 0, alpha))
    image.save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[[255, 255, 255], [255, 204, 204], [255, 0, 0]]]
    Image.new("LA", (1, 1), (0, 51)).save(tmp_path / "b.png")
    assert pixels(tmp_path / "b.png").tolist() == [[[204, 204, 204]]]


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_are_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 255, 257 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    assert pixels(tmp_path / f"a{suffix}")[0, :, 0].tolist() == [0, 1, 100, 255]


def test_float_and_one_bit(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "a.tiff")
    assert pixels(tmp_path / "a.tiff")[0, :, 1].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "b.png")
    assert pixels(tmp_path / "b.png")[0, :, 2].tolist() == [255, 0]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), "red")
    image.paste("blue", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = load_image(tmp_path / "a.jpg")
    assert upright.size == (8, 16)
    top, bottom = upright.getpixel((4, 2)), upright.getpixel((4, 13))
    assert top[2] > 200 > top[0] and bottom[0] > 200 > bottom[2]


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50, **options)
        assert pixels(tmp_path / name)[0, 0].tolist() == [255, 0, 0], name


def png_header_only(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing, as a decompression bomb does before it is unpacked."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"", "the file is empty"),
        (b"hello, I am text", "not an image in a known format"),
        (encoded("PNG")[:2000], "cut off or damaged"),
        (encoded("JPEG")[:2000], "cut off or damaged"),
        (encoded("GIF")[:2000], "cut off or damaged"),
        (png_header_only(4, 4)[:40], "not an image in a known format"),
        (png_header_only(9000, 9000), "81000000 pixels, more than 64000000"),
        (png_header_only(100_000, 100_000), "far more than 64000000"),
    ],
)
def test_what_is_no_image_is_one_sentence(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_image(path)
    assert str(path) in str(caught.value)


def test_folders_and_forbidden_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is a folder"):
        load_image(tmp_path)


def test_real_photographs(unimm_data) -> None:  # type: ignore[no-untyped-def]
    for path in sorted(unimm_data("data/cc0").glob("*.png")):
        assert load_image(path).size == (576, 576)


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.png"
    image = Image.new("RGB", (3, 2), "navy")
    assert save_image_atomically(image, path) == path
    assert np.array_equal(pixels(path), np.asarray(image))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match="No space left"):
        save_image_atomically(Image.new("RGB", (3, 2)), path)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.png"]
    assert np.array_equal(pixels(path), np.asarray(image))


@pytest.mark.parametrize(
    ("name", "message"),
    [("a", "must end in"), ("a.txt", "such as .png"), ("folder.png", "a folder"), ("f/a.png", "is a file")],
)
def test_impossible_outputs_are_told_before_the_work(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match=message):
        image_files.check_image_output(tmp_path / name)


def test_many_images_are_numbered(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (1, 1), color) for color in ("red", "blue"))
    path = tmp_path / "x" / "a.b.png"
    assert save_images([red], path) == [path]
    paths = save_images([red, blue], path)
    assert [path.name for path in paths] == ["a.b-1.png", "a.b-2.png"]
    assert [pixels(path)[0, 0].tolist() for path in paths] == [[255, 0, 0], [0, 0, 255]]
    assert save_images([blue], path) == [path] and pixels(path)[0, 0].tolist() == [0, 0, 255]  # this name was given


def test_a_number_never_replaces_a_file(tmp_path: Path) -> None:
    image = Image.new("RGB", (1, 1), "red")
    mine = {"a-1.png": b"mine", "a-3.png": b"mine too"}
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a-4.png").mkdir()
    (tmp_path / "a-5.png").symlink_to("nowhere")
    assert [path.name for path in save_images([image] * 3, tmp_path / "a.png")] == ["a-2.png", "a-6.png", "a-7.png"]
    assert {name: (tmp_path / name).read_bytes() for name in mine} == mine
    assert [save_numbered([image], tmp_path / "b.png", first=0)[0].name for _ in range(3)] == [
        "b.png",
        "b-1.png",
        "b-2.png",
    ]


def test_numbers_are_taken_once_by_many_at_the_same_time(tmp_path: Path) -> None:
    def draw(level: int) -> list[Path]:
        return save_numbered([Image.new("L", (1, 1), level)] * 5, tmp_path / "a.png")

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(draw, range(8)))
    assert {path.name for each in paths for path in each} == {f"a-{number}.png" for number in range(1, 41)}
    for level, each in enumerate(paths):
        assert [pixels(path)[0, 0, 0] for path in each] == [level] * 5


def test_a_number_whose_image_is_not_written_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(image_files, "save_image_atomically", fail)
    with pytest.raises(UserError, match="full"):
        save_numbered([Image.new("L", (1, 1))], tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
