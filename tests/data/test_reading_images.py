"""One way in: whatever holds an image, it is upright RGB or one sentence; broken metadata never costs it."""

import base64
import io
import struct
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from unimm.data.images import decode_image, each_image, load_image, read_image, to_rgb
from unimm.errors import UserError

PHOTO = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
ORIENTATION = 0x0112
TURNED = {
    1: PHOTO,
    2: PHOTO[:, ::-1],
    3: PHOTO[::-1, ::-1],
    4: PHOTO[::-1],
    5: PHOTO.transpose(1, 0, 2),
    6: PHOTO[::-1].transpose(1, 0, 2),
    7: PHOTO[::-1, ::-1].transpose(1, 0, 2),
    8: PHOTO[:, ::-1].transpose(1, 0, 2),
}
"""EXIF orientation -> the upright image, by the standard's words: which side row 0 and column 0 are."""
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


def encoded(kind: str, exif: bytes | Image.Exif | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    with_exif = {} if exif is None else {"exif": exif}
    Image.fromarray(PHOTO).save(buffer, kind, **LOSSLESS.get(kind, {}), **with_exif, **options)
    return buffer.getvalue()


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def entry(tag: int, kind: int, count: int, value: bytes, *, entries: int = 1, start: int = 8) -> bytes:
    """An EXIF block of one entry."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHI", start, entries, tag, kind, count) + value


BROKEN = {
    "empty": b"",
    "the name alone": b"Exif\0\0",
    "no TIFF": b"Exif\0\0hello, I am text",
    "cut off in its header": b"Exif\0\0II*\0\x08",
    "cut off before its entries": b"Exif\0\0II*\0\x08\0\0\0\x05\0",
    "text where the orientation belongs": entry(ORIENTATION, 2, 4, b"six\0"),
    "a fraction where the orientation belongs": entry(ORIENTATION, 5, 1, b"\0\0\0\x7f"),
    "no such orientation": entry(ORIENTATION, 3, 1, b"\x63\0\0\0"),
    "2^32 orientations": entry(ORIENTATION, 3, 2**32 - 1, b"\x06\0\0\0"),
    "an unknown type": entry(ORIENTATION, 77, 1, b"\x06\0\0\0"),
    "text where another table begins": entry(0x8769, 2, 4, b"far\0"),
    "a start beyond its end": entry(ORIENTATION, 3, 1, b"\x06\0\0\0", start=2**31),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_broken_metadata_does_not_cost_the_image(kind: str, broken: bytes) -> None:
    expected = decode_image(encoded(kind), "without")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(encoded(kind, broken), "with").tobytes() == expected.tobytes()


def test_an_orientation_that_cannot_be_written_back_is_still_read() -> None:
    """Pillow's own way turns the image and writes its metadata anew, for which a text among numbers is too much."""
    tables = [(ORIENTATION, 3, 1, b"\x06\0\0\0"), (0x011A, 2, 4, b"six\0"), (0x0132, 4, 1, b"\0\0\0\0")]
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tables))
    for tag, type_, count, value in tables:
        block += struct.pack("<HHI", tag, type_, count) + value
    assert np.array_equal(np.asarray(decode_image(encoded("PNG", block + b"\0\0\0\0"), "a")), TURNED[6])


@pytest.mark.parametrize("value", TURNED)
@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_orientation_is_upright_once(kind: str, value: int) -> None:
    data = encoded(kind, orientation(value))
    upright = decode_image(data, "a")
    assert np.array_equal(np.asarray(upright), TURNED[value])
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(np.asarray(read_image(opened)), TURNED[value])
        assert np.array_equal(np.asarray(opened.convert("RGB")).shape[:2], PHOTO.shape[:2]) or kind == "TIFF"
    assert np.array_equal(np.asarray(read_image(upright)), TURNED[value])  # not turned again


@st.composite
def blocks(draw: st.DrawFn) -> bytes:
    """EXIF blocks that look right at first, and plain rubbish."""
    order = draw(st.sampled_from("<>"))
    tags = st.sampled_from([ORIENTATION, ORIENTATION, 0x8769, 0x8825, 0xA005, 0x011A, 0x0128, 0x927C])
    count = st.sampled_from([0, 1, 1, 2, 4, 100, 2**31, 2**32 - 1])
    value = st.one_of(
        st.binary(min_size=4, max_size=4), st.integers(0, 9).map(lambda n: struct.pack(order + "HH", n, 0))
    )
    entries = draw(st.lists(st.tuples(tags | st.integers(0, 65535), st.integers(0, 14), count, value), max_size=6))
    number = draw(st.sampled_from([len(entries), len(entries), 0, 3, 65535]))
    block = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(
        order + "IH", draw(st.sampled_from([8, 8, 8, 0, 99])), number
    )
    for tag, kind, times, bits in entries:
        block += struct.pack(order + "HHI", tag, kind, times) + bits
    whole = draw(st.sampled_from([b"Exif\0\0", b"Exif\0\0", b""])) + block + draw(st.binary(max_size=12))
    return draw(
        st.sampled_from([whole, whole, whole[: draw(st.integers(0, len(whole)))], draw(st.binary(max_size=40))])
    )


@settings(deadline=None, max_examples=150)
@given(blocks(), st.sampled_from(["PNG", "WEBP"]))
def test_any_metadata_leaves_one_of_eight_images(block: bytes, kind: str) -> None:
    found = np.asarray(decode_image(encoded(kind, block), "a"))
    assert any(np.array_equal(found, turned) for turned in TURNED.values())


@settings(deadline=None, max_examples=100)
@given(blocks(), st.sampled_from(["JPEG", "MPO", "TIFF"]), st.data())
def test_damaged_files_are_images_or_one_sentence(block: bytes, kind: str, data: st.DataObject) -> None:
    content = bytearray(encoded(kind) if kind == "TIFF" else encoded(kind, block))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(content), "the file")
    except UserError as error:
        assert "the file" in str(error)
    else:
        assert image.mode == "RGB" and image.info == {}


def every_mode() -> dict[str, Image.Image]:
    photo = Image.fromarray(PHOTO)
    sixteen = Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000)
    palette = photo.convert("P")
    palette.info["transparency"] = 0
    modes = {
        mode: photo.convert(mode) for mode in ("1", "L", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
    }
    return modes | {
        "I;16": sixteen,
        "I": Image.fromarray(np.asarray(sixteen).astype(np.int32)),
        "F": Image.fromarray(np.asarray(sixteen).astype(np.float32) / 47_000),
        "P": palette,
    }


@pytest.mark.parametrize("mode", every_mode())
def test_every_mode_comes_in_as_from_a_file(mode: str, tmp_path: Path) -> None:
    image = every_mode()[mode]
    assert image.mode == mode
    before = image.tobytes()
    found = read_image(image)
    assert (found.mode, found.size, found.info) == ("RGB", (8, 6), {}) and image.tobytes() == before
    kind = {"F": "tiff", "I": "tiff", "CMYK": "tiff", "YCbCr": None, "HSV": None, "PA": None, "RGBX": None}
    if (suffix := kind.get(mode, "png")) is not None:
        image.save(tmp_path / f"a.{suffix}")
        assert found.tobytes() == load_image(tmp_path / f"a.{suffix}").tobytes()


def test_sixteen_bits_keep_their_range() -> None:
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    for source in (Image.fromarray(values), values, torch.from_numpy(values)):
        assert np.asarray(read_image(source))[0, :, 1].tolist() == [0, 1, 100, 255]


def test_values_that_are_not_finite_are_refused() -> None:
    values = np.array([[0.0, np.nan]], dtype=np.float32)
    for source in (values, Image.fromarray(values)):
        with pytest.raises(UserError, match="nan|not finite"):
            read_image(source)


def test_one_image_from_everything_that_holds_one(tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    text = base64.b64encode(encoded("PNG")).decode()
    chw = PHOTO.transpose(2, 0, 1)
    sources = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        text,
        f"data:image/png;base64,{text}",
        Image.fromarray(PHOTO),
        PHOTO,
        chw,
        PHOTO.astype(np.float32),
        PHOTO / 255,
        np.dstack([PHOTO, np.full((6, 8), 255, np.uint8)]),
        torch.from_numpy(PHOTO),
        torch.from_numpy(chw.copy()).float().requires_grad_(),
        torch.from_numpy(PHOTO.astype(np.int64)),
    ]
    for source in sources:
        assert np.array_equal(np.asarray(read_image(source)), PHOTO), type(source)
    nested = [sources[0], [sources[4], [PHOTO]], np.stack([PHOTO, PHOTO]), (torch.from_numpy(np.stack([chw])),)]
    assert [read_image(each).size for each in each_image(nested)] == [(8, 6)] * 6
    assert each_image(None) == [] == each_image([])


def test_a_url_is_read_as_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG", orientation(6)))
    (tmp_path / "page.png").write_text("<!DOCTYPE html><html></html>")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(np.asarray(read_image(f"{url}/a.png")), TURNED[6])
        for name, message in (("page.png", "it is a web page"), ("absent.png", "Cannot fetch the image .*404")):
            with pytest.raises(UserError, match=message):
                read_image(f"{url}/{name}")
        server.shutdown()
    for address in (f"{url}/a.png", "http://[", "http://\ud800"):
        with pytest.raises(UserError, match="Cannot fetch the image"):
            read_image(address)


def test_transparent_arrays_lie_on_white() -> None:
    clear = np.array([[[255, 0, 0, 0], [255, 0, 0, 51]]] * 2, dtype=np.uint8)
    for source in (clear, clear / 255, clear.transpose(2, 0, 1)):
        assert np.asarray(read_image(source)).tolist() == [[[255, 255, 255], [255, 204, 204]]] * 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((5, 6, 2)), r"float64 \[5, 6, 2\] has 1, 3 or 4 channels neither"),
        (np.zeros(5), r"\[H, W\].*float64 \[5\]"),
        (np.zeros((0, 4, 3)), "holds no pixels"),
        (np.full((2, 2), -1.0), r"\[0, 255\], and those of float64 \[2, 2\] in \[-1.0, -1.0\]"),
        (np.full((2, 2), 300), r"in \[300.0, 300.0\]"),
        (np.array([["a"]]), "holds numbers"),
        (Image.new("RGB", (0, 3)), "0 x 3 holds no pixels"),
        ("absent.png", "no such file"),
        ("A" * 5000 + ".png", "Cannot read the image"),
        ("nul\0.png", "no such file"),
        ("\ud800.png", "no such file"),
        (base64.b64encode(b"no image" * 20).decode(), "not an image in a known format"),
        (7, "not int"),
        (b"bytes", "not bytes"),
    ],
)
def test_what_is_no_image_is_one_sentence(source: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_image(source)


def test_a_torn_file_that_a_person_opened_is_one_sentence(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    (tmp_path / "torn.png").write_bytes(buffer.getvalue()[:2000])
    with Image.open(tmp_path / "torn.png") as torn, pytest.raises(UserError, match="cut off or damaged"):
        read_image(torn)


def test_a_turned_image_equals_pillows_own() -> None:
    for value in TURNED:
        data = encoded("PNG", orientation(value))
        with Image.open(io.BytesIO(data)) as opened:
            assert to_rgb(opened).tobytes() == ImageOps.exif_transpose(opened).tobytes()
