"""Reconstruction of real images: figures against scikit-image on what `compared_pictures` shows, and bad input."""

import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.mllm.tiny import image_tokenizer
from unimm.errors import UserError, run_main
from unimm.evaluation.reconstruction.run import Compared, ReconstructionPlan, evaluate_images
from unimm.networks.perceptual import LPIPS
from unimm.tokenizer import ImageTokenizerProcessor

main = importlib.import_module("eval.reconstruction").main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(7):
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        small.resize((40, 33)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return image_tokenizer()


def measured(tokenizer, **fields):
    seen: list[Compared] = []
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    found = evaluate_images(tokenizer, processor, ReconstructionPlan(**fields), on_batch=seen.append)
    return found, seen


def test_rows_are_scikit_images_figures_of_the_images_that_were_compared(folder, tokenizer):
    found, seen = measured(tokenizer, source=str(folder), num_images=None, batch_size=3)
    assert [row["name"] for row in found.rows] == [f"{i}.png" for i in range(7)]
    originals, drawn = (np.concatenate([getattr(batch, part) for batch in seen]) for part in ("originals", "drawn"))
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    for row, x, y in zip(found.rows, originals / 255, drawn / 255, strict=True):
        assert row["psnr"] == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1.0), abs=1e-4)
        assert row["ssim"] == pytest.approx(structural_similarity(x, y, channel_axis=-1, **wang), abs=1e-6)
        compat = structural_similarity(x, y, channel_axis=-1, data_range=2.0)
        assert row["ssim_llamagen_compat"] == pytest.approx(compat, abs=1e-6)
    values = [row["psnr"] for row in found.rows]
    assert found.scores["psnr"] == pytest.approx(np.mean(values))
    assert found.errors["psnr"] == pytest.approx(np.std(values, ddof=1) / 7**0.5)
    ids = torch.cat([batch.ids for batch in seen]).flatten()
    shares = np.bincount(ids, minlength=32) / len(ids)
    entropy = -sum(p * np.log2(p) for p in shares if p)
    assert found.scores["entropy"] == pytest.approx(entropy)
    assert found.scores["perplexity"] == pytest.approx(2**entropy)
    assert found.scores["dead_codes"] == (shares == 0).sum()


def test_lpips_is_the_networks_distance_of_each_pair(folder, tokenizer):
    torch.manual_seed(0)
    network = LPIPS(((4,), (4,)))
    processor, seen = ImageTokenizerProcessor.for_tokenizer(tokenizer.config), list[Compared]()
    plan = ReconstructionPlan(str(folder), num_images=None, batch_size=4)
    found = evaluate_images(tokenizer, processor, plan, on_batch=seen.append, lpips=network)
    pairs = [pair for batch in seen for pair in zip(batch.drawn, batch.originals, strict=True)]
    for row, pair in zip(found.rows, pairs, strict=True):
        drawn, original = (torch.from_numpy(image)[None].permute(0, 3, 1, 2) / 255 for image in pair)
        assert row["lpips_vgg"] == pytest.approx(float(network(drawn, original)), rel=1e-4, abs=1e-9)
    assert found.scores["lpips_vgg"] > 0


def test_the_size_that_is_scored_may_be_another(folder, tokenizer):
    found, seen = measured(tokenizer, source=str(folder), num_images=2, score_size=12)
    assert seen[0].drawn.shape == seen[0].originals.shape == (2, 12, 12, 3)
    expected = peak_signal_noise_ratio(seen[0].originals[0], seen[0].drawn[0], data_range=255)
    assert found.rows[0]["psnr"] == pytest.approx(expected, abs=1e-4)


def test_exact_copies_are_counted_and_bounded(folder, tokenizer, monkeypatch):
    shown = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda values: (shown.append(values), encode(values))[1])
    monkeypatch.setattr(tokenizer, "decode", lambda ids: tokenizer.denormalize(shown[-1]))
    found, _ = measured(tokenizer, source=str(folder), num_images=3)
    assert found.scores["psnr"] == 100 and found.scores["exact_copy"] == 1
    assert found.scores["ssim"] == pytest.approx(1)


def test_bad_plans(folder, tokenizer):
    with pytest.raises(UserError, match="No protocol 'center'; there are adm, torchvision, short_side"):
        ReconstructionPlan(str(folder), protocol="center")
    with pytest.raises(UserError, match="num_images is 0"):
        ReconstructionPlan(str(folder), num_images=0)
    with pytest.raises(UserError, match="7 images and 8 are asked for"):
        measured(tokenizer, source=str(folder), num_images=8)


def test_the_command(folder, tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "model")
    ImageTokenizerProcessor.for_tokenizer(tokenizer.config).save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--source", str(folder), "--num-images", "0"]
    main([*arguments, "--json", str(tmp_path / "report.json"), "--protocol", "torchvision"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["num_images"] == 7 and report["protocol"]["crop"] == "torchvision"
    assert report["protocol"]["resize_filter"] == "bilinear"
    assert report["space"]["name"] == "own_encoder"
    assert report["distances"]["count"] == 7 and report["distances"]["fd_own_encoder"] > 0
    assert 0 < report["reconstruction"]["ssim"] < report["reconstruction"]["ssim_llamagen_compat"] < 1
    (folder / "broken.png").write_bytes(b"no image")
    try:
        assert run_main(lambda: main(arguments)) == 0  # it is named, and the others are measured
    finally:
        (folder / "broken.png").unlink()
    assert "left out, broken.png: " in capsys.readouterr().out
