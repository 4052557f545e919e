"""What every tokenizer promises, whatever it is made of: VQRAE on each encoder family, VFMTok and IDEAL."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from unimm.errors import UserError
from unimm.tokenizer import VQRAE, ImageTokenizerProcessor
from unimm.tokenizer.vqrae import with_new_head


def test_decode_of_encode_is_reconstruct_bit_for_bit(tokenizer, pixel_values):
    with torch.no_grad():
        output = tokenizer.reconstruct(pixel_values)
        assert torch.equal(tokenizer.decode(tokenizer.encode(pixel_values).ids), output.pixels.clamp(0, 1))
        assert torch.equal(tokenizer.lookup(output.ids), output.codes)
    rows, columns = tokenizer.config.grid
    assert output.ids.shape == (3, rows * columns) and output.ids.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_reloaded_gives_the_same_ids(tokenizer, pixel_values, tmp_path, dtype):
    before = tokenizer.fingerprint
    tokenizer.to(dtype)
    assert tokenizer.fingerprint == before and tokenizer.quantizer.codebook.dtype == torch.float32
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path, dtype=dtype).eval()
    assert type(reloaded) is type(tokenizer)
    with torch.no_grad():
        assert torch.equal(reloaded.encode(pixel_values).ids, tokenizer.encode(pixel_values).ids)
    assert reloaded.fingerprint == tokenizer.fingerprint
    assert {p.dtype for p in reloaded.quantizer.state_dict().values()} == {torch.float32}
    assert {p.dtype for p in reloaded.sampler.parameters()} == {torch.float32}
    assert reloaded.decoder.projection.weight.dtype == dtype


@pytest.mark.parametrize("head", [None, "conv"])
def test_a_model_in_bfloat16_decodes_almost_the_same_pixels(tokenizer, head):
    """Group norms of convolutional heads compute in float32 with weights of any type."""
    if head and isinstance(tokenizer, VQRAE):
        fields = {"pixel_head": head, "head_channels": 32, "head_multipliers": [1, 1, 1, 1]}
        tokenizer = with_new_head(tokenizer, **fields).eval()
    ids = torch.randint(64, (2, tokenizer.config.num_image_tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tokenizer.decode(ids)
        for dtype in (torch.bfloat16, torch.float64):
            found = tokenizer.to(dtype).decode(ids)
            assert (found.double() - expected.double()).abs().mean() < 0.02
    assert expected.std() > 0.02


@pytest.mark.parametrize("head", [None, "conv"])
def test_pixels_do_not_depend_on_the_rest_of_the_batch(tokenizer, head):
    """Up to the last bits of the decoder's matrix products; convolutions of a CPU take one image at a time."""
    if head and isinstance(tokenizer, VQRAE):
        fields = {"pixel_head": head, "head_channels": 32, "head_multipliers": [1, 1, 1, 1]}
        tokenizer = with_new_head(tokenizer, **fields).eval()
    shapes, original = [], torch.nn.Conv2d.forward
    ids = torch.randint(64, (5, tokenizer.config.num_image_tokens), generator=torch.Generator().manual_seed(0))

    def noted(self, x):
        shapes.append(len(x))
        return original(self, x)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        whole = tokenizer.decode(ids)
        torch.testing.assert_close(
            torch.cat([tokenizer.decode(each) for each in ids.split(2)]), whole, atol=1e-5, rtol=0
        )
        patch.setattr(torch.nn.Conv2d, "forward", noted)
        tokenizer.decode(ids)
    assert set(shapes) <= {1}


def test_fingerprint_tells_codebooks_apart(tokenizer):
    before = tokenizer.fingerprint
    tokenizer.quantizer.codebook.data[0, 0] += 1
    assert tokenizer.fingerprint != before


def test_ids_outside_the_codebook_are_refused(tokenizer):
    ids = torch.zeros(1, tokenizer.config.num_image_tokens, dtype=torch.int64)
    ids[0, -1] = 64
    with pytest.raises(UserError, match="0 to 63; these run from 0 to 64"):
        tokenizer.decode(ids)


def test_processor_round_trip(tokenizer, tmp_path):
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    processor.save_pretrained(tmp_path)
    tokenizer.config.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, ImageTokenizerProcessor)
    pixels = torch.randint(0, 256, (2, 3, 32, 32)) / 255
    images = processor.postprocess(pixels)
    values = processor(images=images, return_tensors="pt").pixel_values
    torch.testing.assert_close(tokenizer.denormalize(values), pixels, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(7, 4), (4, 7), (6, 9), (5, 5)])
def test_padding_to_a_square_is_llavas(size):
    """Against PIL's own paste of the image onto a square of the mean color, LLaVA's `expand2square`."""
    width, height = size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    processor = ImageTokenizerProcessor(size={"height": 9, "width": 9}, image_mean=[0.481, 0.458, 0.408])
    side = max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    expected = processor([square], return_tensors="pt").pixel_values
    processor.pad_to_square = True
    assert torch.equal(processor([image], return_tensors="pt").pixel_values, expected)


def test_padding_to_a_square_is_saved(tmp_path):
    processor = ImageTokenizerProcessor(size={"height": 8, "width": 8})
    processor.pad_to_square = True
    processor.save_pretrained(tmp_path)
    assert ImageTokenizerProcessor.from_pretrained(tmp_path).pad_to_square
    assert ImageTokenizerProcessor(size={"height": 8, "width": 8}).pad_to_square is False
