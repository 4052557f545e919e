"""The ONNX files against torch: ids equal, everything else to 1e-4, at other batch sizes than that of the export."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from tests.tokenizer.conftest import PAIRS, tiny
from unimm.errors import UserError
from unimm.export.onnx_files import _Quantizer, save_onnx, write_onnx
from unimm.export.onnx_tokenizer import DESCRIPTION, OnnxImageTokenizer
from unimm.tokenizer import ImageTokenizer, ImageTokenizerProcessor

FILES = [f"{name}.onnx" for name in ("decoder", "encoder", "quantizer")] + [DESCRIPTION]
Exported = tuple[ImageTokenizer, ImageTokenizerProcessor, Path]


def noise(count: int) -> list[Image.Image]:
    """Images of different sizes, wide and tall."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (20 + 9 * k, 45, 3), dtype=np.uint8)) for k in range(count)]


def varied(kind: str, family: str = "siglip") -> ImageTokenizer:
    """A tiny tokenizer whose codes are latents of noise, so that images have many different ids."""
    tokenizer = tiny(kind, family)
    with torch.no_grad():
        latents = tokenizer.encode(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))).latents
        tokenizer.quantizer.adopt(tokenizer.quantizer.comparable(latents.flatten(0, 1)[:64]))
    return tokenizer


def agrees(tokenizer: ImageTokenizer, processor: ImageTokenizerProcessor, folder: Path, count: int) -> None:
    """Compare every output of `OnnxImageTokenizer` with torch's on `count` images."""
    exported, images = OnnxImageTokenizer(folder), noise(count)
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(exported.preprocess(images), pixel_values.numpy(), rtol=0, atol=1e-6)
    with torch.no_grad():
        encoded = tokenizer.encode(pixel_values)
        pixels = tokenizer.decode(encoded.ids)
    assert encoded.ids.unique().numel() > 4
    np.testing.assert_allclose(exported.features(pixel_values.numpy()), encoded.features.numpy(), rtol=0, atol=1e-4)
    assert np.array_equal(exported.encode(pixel_values.numpy()), encoded.ids.numpy())
    found = exported.decode(encoded.ids.numpy())
    np.testing.assert_allclose(found, pixels.numpy(), rtol=0, atol=1e-4)
    ours, theirs = exported.images(found), processor.postprocess(pixels)
    assert np.abs(np.array(ours, dtype=int) - np.array(theirs, dtype=int)).max() <= 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    tokenizer, folder = varied("vqrae"), tmp_path_factory.mktemp("onnx")
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    save_onnx(tokenizer, processor, folder)
    return tokenizer, processor, folder


@pytest.mark.parametrize("count", [1, 5])
def test_it_computes_what_torch_does(exported: Exported, count: int) -> None:
    agrees(*exported, count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "family"), {kind: (kind, family) for kind, family in PAIRS[1:]}.values()
)  # one of each kind
def test_so_do_all_tokenizers_and_encoders(kind: str, family: str, tmp_path: Path) -> None:
    tokenizer = varied(kind, family)
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    processor.pad_to_square = True
    save_onnx(tokenizer, processor, tmp_path)
    agrees(tokenizer, processor, tmp_path, 3)


def test_the_files_are_sound_and_described(exported: Exported) -> None:
    tokenizer, _, folder = exported
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    about = json.loads((folder / DESCRIPTION).read_text())
    assert about["fingerprint"] == tokenizer.fingerprint and about["grid"] == [4, 4]
    assert (about["image_size"], about["codebook_size"], about["image_mean"]) == (32, 64, [0.5, 0.5, 0.5])
    for graph in about["graphs"].values():
        model = onnx.load(folder / graph["file"])
        onnx.checker.check_model(model, full_check=True)
        assert [value.name for value in model.graph.input] == [graph["input"]]
        assert [value.name for value in model.graph.output] == graph["outputs"]
        for value in (*model.graph.input, *model.graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_param  # a name, no number


@pytest.mark.parametrize("kind", ["vqrae", "ideal"])
def test_the_quantizer_is_brute_force_in_float64_and_ties_go_to_the_lowest(kind: str) -> None:
    tokenizer = tiny(kind)
    with torch.no_grad():
        tokenizer.quantizer.codebook[7] = tokenizer.quantizer.codebook[50]  # a tie
        table = tokenizer.quantizer.effective_codebook
        middle = (table[:-1] + table[1:]) / 2 + 1e-7 * torch.randn(63, 48, generator=torch.Generator().manual_seed(2))
        latents = torch.cat([middle, table])[None]
        (ids,) = _Quantizer(tokenizer)(latents)
        z, q = (each.double().numpy() for each in (tokenizer.quantizer.comparable(latents)[0], table))
        expected = np.square(z[:, None] - q[None]).sum(-1).argmin(1)
        assert np.array_equal(ids[0].numpy(), expected) and torch.equal(ids, tokenizer.quantizer(latents).ids)
    assert 7 in ids and 50 not in ids


@pytest.mark.parametrize("size", [(90, 31), (31, 90), (32, 32), (4000, 1)])
def test_padding_to_a_square_is_the_processors(exported: Exported, size: tuple[int, int], tmp_path: Path) -> None:
    tokenizer, _, folder = exported
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    processor.pad_to_square = True
    alike = OnnxImageTokenizer(folder)
    alike.description = alike.description | {"pad_to_square": True}
    image = noise(1)[0].resize(size)
    wanted = processor([image], return_tensors="pt")["pixel_values"].numpy()
    np.testing.assert_allclose(alike.preprocess([image]), wanted, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_bfloat16_tokenizer_is_exported_in_float32(tmp_path: Path) -> None:
    tokenizer = varied("vqrae").to(torch.bfloat16)
    wanted = type(tokenizer)(tokenizer.config).eval()
    wanted.load_state_dict({name: tensor.float() for name, tensor in tokenizer.state_dict().items()})
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    write_onnx(tokenizer, processor, tmp_path)
    assert tokenizer.dtype == torch.bfloat16
    agrees(wanted, processor, tmp_path, 2)


@pytest.mark.slow
def test_another_answer_of_onnxruntime_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(onnxruntime.InferenceSession):
        def run(self, *arguments: object) -> list[np.ndarray]:
            return [value + 1e-2 for value in super().run(*arguments)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Off)
    tokenizer = tiny("vqrae")
    with pytest.raises(UserError, match=r"other features from encoder.onnx than torch: they differ by 0.01"):
        save_onnx(tokenizer, ImageTokenizerProcessor.for_tokenizer(tokenizer.config), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda it: it.decode(np.full((1, 16), 64)), "Image ids run from 0 to 63; these run from 64 to 64"),
        (lambda it: it.decode(np.full((1, 16), -1)), "these run from -1 to -1"),
        (lambda it: it.decode(np.zeros((1, 9))), r"4 x 4 = 16 ids, these are \[1, 9\]"),
        (lambda it: it.encode(np.zeros((1, 3, 16, 32), np.float32)), r"\[B, 3, 32, 32\] here, not \[1, 3, 16, 32\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    exported: Exported, wrong: Callable[[OnnxImageTokenizer], object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        wrong(OnnxImageTokenizer(exported[2]))


def test_a_folder_without_an_export_is_refused(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ONNX image tokenizer"):
        OnnxImageTokenizer(tmp_path)
    about = json.loads((exported[2] / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps(about))  # the graphs are lost
    with pytest.raises(UserError, match="ONNX image tokenizer"):
        OnnxImageTokenizer(tmp_path)


_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # what would import them fails
import numpy
from unimm.export.onnx_tokenizer import OnnxImageTokenizer
tokenizer = OnnxImageTokenizer(sys.argv[1])
print(tokenizer.encode(numpy.load(sys.argv[2])).tolist())
"""


def test_it_runs_where_torch_cannot_be_imported(exported: Exported, tmp_path: Path) -> None:
    tokenizer, processor, folder = exported
    pixel_values = processor(noise(2), return_tensors="pt")["pixel_values"]
    np.save(tmp_path / "values.npy", pixel_values.numpy())
    command = [sys.executable, "-c", _WITHOUT_TORCH, str(folder), str(tmp_path / "values.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert json.loads(done.stdout or "null") == tokenizer.encode(pixel_values).ids.tolist(), done.stderr[-600:]
