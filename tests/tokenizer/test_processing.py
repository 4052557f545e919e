"""The processor takes what stock processors take, with their values, and reads images as every other door does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from tests.mllm import tiny
from unimm.data.images import load_image
from unimm.errors import UserError
from unimm.mllm import UnimmProcessor
from unimm.tokenizer import ImageTokenizerProcessor

SETTINGS: dict[str, Any] = {
    "size": {"height": 16, "width": 16},
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
    "resample": 3,
    "do_convert_rgb": True,
}
PHOTO = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)  # [H, W, C]
GREY, CLEAR = PHOTO[..., :1], np.dstack([PHOTO, PHOTO[..., 0]])
AS_STOCK: dict[str, Any] = {
    "channels last": PHOTO,
    "channels first": PHOTO.transpose(2, 0, 1),
    "tensor": torch.from_numpy(PHOTO),
    "tensor, channels first": torch.from_numpy(PHOTO).permute(2, 0, 1),
    "floats in [0, 255]": PHOTO.astype(np.float32),
    "floats in [0, 1]": (PHOTO / 255).astype(np.float32),
    "doubles in [0, 1]": np.random.default_rng(1).random((20, 30, 3)),
    "tensor of floats": torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)),
    "whole numbers": PHOTO.astype(np.int64),
    "one channel": GREY,
    "one channel first": GREY.transpose(2, 0, 1),
    "transparent": CLEAR,
    "transparent floats": (CLEAR / 255).astype(np.float32),
    "ambiguous": PHOTO[:3, :4],
    "list": [PHOTO, PHOTO[::-1]],
    "tuple of tensors": (torch.from_numpy(PHOTO), torch.from_numpy(PHOTO.copy())),
    "list of lists": [[PHOTO], [PHOTO[::-1], PHOTO]],
    "batch": np.stack([PHOTO, PHOTO[::-1]]),
    "batch of tensors": torch.from_numpy(np.stack([PHOTO, PHOTO[::-1]])),
    "PIL and arrays": [Image.fromarray(PHOTO), PHOTO],
    "PIL": Image.fromarray(PHOTO),
}


@pytest.fixture(scope="module")
def unified() -> UnimmProcessor:
    processor = tiny.unified()[1]
    processor.image_processor = ImageTokenizerProcessor(**SETTINGS)
    return processor


@pytest.mark.filterwarnings("ignore:The image's values lie in")
@pytest.mark.parametrize("do_rescale", [True, False])
@pytest.mark.parametrize("do_resize", [True, False])
@pytest.mark.parametrize("kind", AS_STOCK)
def test_arrays_and_tensors_as_in_stock_processors(
    kind: str, do_resize: bool, do_rescale: bool, unified: UnimmProcessor
) -> None:
    options = {"return_tensors": "np", "do_rescale": do_rescale, "do_resize": do_resize}
    for stock in (SiglipImageProcessorPil(**SETTINGS), CLIPImageProcessorPil(**SETTINGS, do_center_crop=False)):
        expected = stock(images=AS_STOCK[kind], **options)["pixel_values"]
        for processor in (unified.image_processor, unified):
            found = processor(images=AS_STOCK[kind], **options)["pixel_values"]
            np.testing.assert_array_equal(found, expected)


def test_the_layout_may_be_said() -> None:
    ambiguous = PHOTO[:3, :4]
    stock, ours = SiglipImageProcessorPil(**SETTINGS), ImageTokenizerProcessor(**SETTINGS)
    for layout in ("channels_first", "channels_last"):
        options = {"images": ambiguous[..., :3], "input_data_format": layout, "return_tensors": "np"}
        if layout == "channels_first":
            options["images"] = ambiguous.transpose(2, 0, 1)
        np.testing.assert_array_equal(ours(**options)["pixel_values"], stock(**options)["pixel_values"])
    with pytest.raises(UserError, match=r"\[20, 30, 3\] has not 1, 3 or 4 channels as channels_first says"):
        ours(images=PHOTO, input_data_format="channels_first")


def test_values_that_are_divided_twice_are_told() -> None:
    ours = ImageTokenizerProcessor(**SETTINGS)
    with pytest.warns(UserWarning, match="do_rescale=False"):
        ours(images=PHOTO / 255)
    whole = ours(images=PHOTO, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(ours(images=PHOTO / 255, do_rescale=False, return_tensors="np")["pixel_values"], whole)


def test_kinds_that_stock_processors_refuse() -> None:
    """Gray without channels, 16 bits, masks, tensors with a gradient or in bfloat16: as the PIL image of them."""
    ours = ImageTokenizerProcessor(**SETTINGS)
    grey, mask = PHOTO[..., 0], PHOTO[..., 0] > 99
    expected = ours(images=Image.fromarray(grey), return_tensors="np")["pixel_values"]
    for source in (grey, torch.from_numpy(grey.copy()), grey.astype(np.uint16) * 257):
        np.testing.assert_array_equal(ours(images=source, return_tensors="np")["pixel_values"], expected)
    np.testing.assert_array_equal(
        ours(images=mask, return_tensors="np")["pixel_values"],
        ours(images=Image.fromarray(mask), return_tensors="np")["pixel_values"],
    )
    floats = torch.rand(3, 20, 30)
    for source in (floats.clone().requires_grad_(), floats.bfloat16()):
        rounded = source.detach().float().numpy()
        np.testing.assert_array_equal(
            ours(images=source, do_rescale=False, return_tensors="np")["pixel_values"],
            ours(images=rounded, do_rescale=False, return_tensors="np")["pixel_values"],
        )


@pytest.fixture
def awkward(tmp_path: Path) -> list[Path]:
    """A turned photo, 16-bit gray, a transparent one, and one in CMYK."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PHOTO).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(PHOTO[..., 0].astype(np.uint16) * 257).save(tmp_path / "grey.png")
    Image.fromarray(CLEAR).save(tmp_path / "clear.png")
    Image.fromarray(PHOTO).convert("CMYK").save(tmp_path / "cmyk.jpg")
    return sorted(tmp_path.iterdir())


def test_the_processor_sees_what_the_command_line_and_the_recipes_see(
    awkward: list[Path], unified: UnimmProcessor
) -> None:
    stock = SiglipImageProcessorPil(**SETTINGS)
    for path in awkward:
        expected = stock(images=load_image(path), return_tensors="np")["pixel_values"]
        with Image.open(path) as opened:
            for source in (opened, path, str(path)):
                for processor in (unified.image_processor, unified):
                    found = processor(images=source, return_tensors="np")["pixel_values"]
                    np.testing.assert_array_equal(found, expected, err_msg=path.name)
            for part in ({"image": opened}, {"path": str(path)}, {"url": str(path)}, {"image": str(path)}):
                messages = [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "one"}]}]
                chat = unified.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="np")
                np.testing.assert_array_equal(chat["pixel_values"], expected, err_msg=path.name)


def test_sixteen_bits_are_not_white(awkward: list[Path]) -> None:
    ours = ImageTokenizerProcessor(**SETTINGS)
    grey = next(path for path in awkward if path.name == "grey.png")
    expected = ours(images=Image.fromarray(PHOTO[..., 0]).convert("RGB"), return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(ours(images=Image.open(grey), return_tensors="np")["pixel_values"], expected)


@pytest.mark.parametrize("count", [1, 2])
def test_placeholders_are_counted_over_every_kind(count: int, unified: UnimmProcessor) -> None:
    batch = np.stack([PHOTO] * count)
    for images in (batch, list(batch), [batch], torch.from_numpy(batch), [[each] for each in batch]):
        inputs = unified(images=images, text=unified.image_token * count, return_tensors="pt")
        assert inputs["pixel_values"].shape == (count, 3, 16, 16)
        assert int((inputs["input_ids"] == unified.image_token_id).sum()) == 16 * count


def test_a_square_of_floats_is_the_square_of_bytes() -> None:
    ours = ImageTokenizerProcessor(**SETTINGS)
    ours.pad_to_square = True
    for image in (PHOTO, np.random.default_rng(0).integers(0, 256, (3000, 3, 3), dtype=np.uint8)):
        np.testing.assert_allclose(
            ours(images=image / 255, do_rescale=False, return_tensors="np")["pixel_values"],
            ours(images=image, return_tensors="np")["pixel_values"],
            atol=1e-5,
        )
