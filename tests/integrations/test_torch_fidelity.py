"""FID, KID, inception score, precision and recall against torch-fidelity: pure functions on features, the network, and
both programs on the same images with the same weights."""

# ruff: noqa: E402
from tests.integrations.needs import require_torch_fidelity

require_torch_fidelity()

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_part

from tests.conftest import ROOT
from tests.evaluation.random_inception import random_inception
from unimm.evaluation.generation.command import main
from unimm.evaluation.metrics.distributions import inception_score, kernel_distance, manifolds
from unimm.evaluation.metrics.frechet import frechet_distance, moments_of
from unimm.networks.inception import load_inception

COUNT, SUBSET = 12, 9


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    with np.load(ROOT / "tests/fixtures/metric_features.npz") as file:
        return {name: torch.from_numpy(file[name]).double() for name in file.files}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(random_inception().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Drawn and real images: noise of few pixels, of two palettes."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    made = (root / "drawn", root / "real")
    for folder, shift in zip(made, ([0, 40, 60], [30, 0, 0]), strict=True):
        folder.mkdir()
        for index in range(COUNT):
            small = rng.integers(0, 190, (5, 6, 3)) + shift
            Image.fromarray(small.astype(np.uint8)).resize((48, 40)).save(folder / f"{index:02d}.png")
    return made


def test_frechet_distance(recorded: dict[str, torch.Tensor]) -> None:
    pair = [fid_features_to_statistics(recorded[name]) for name in ("real", "fake")]
    theirs = fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"]
    ours = frechet_distance(*(moments_of(recorded[name].numpy()) for name in ("real", "fake")))
    assert ours == pytest.approx(theirs, abs=1e-6) and theirs > 1


def test_kernel_distance(recorded: dict[str, torch.Tensor]) -> None:
    settings = {"kid_subsets": 20, "kid_subset_size": 50, "verbose": False, "rng_seed": 2020}
    theirs = kid_features_to_metric(recorded["real"], recorded["fake"], **settings)
    expected = [theirs[f"kernel_inception_distance_{part}"] for part in ("mean", "std")]
    assert kernel_distance(recorded["real"], recorded["fake"], subsets=20, size=50) == pytest.approx(expected, abs=1e-9)


def test_inception_score(recorded: dict[str, torch.Tensor]) -> None:
    theirs = isc_features_to_metric(recorded["probs"].log())
    expected = [theirs[f"inception_score_{part}"] for part in ("mean", "std")]
    assert inception_score(recorded["probs"]) == pytest.approx(expected, abs=1e-6)


def test_precision_and_recall(recorded: dict[str, torch.Tensor]) -> None:
    expected = calculate_precision_recall_part(recorded["fake"], recorded["real"])
    found = manifolds(recorded["real"], recorded["fake"])
    assert (found.precision, found.recall) == pytest.approx(expected) and 0 < found.precision < found.recall < 1


def test_the_network(weights: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 40, 52), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    layers = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path=str(weights))
    pool, logits = theirs(images)
    found = load_inception(weights)(images)
    torch.testing.assert_close(found.pool, pool, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.probabilities, logits.softmax(dim=1), atol=1e-6, rtol=1e-4)


def test_both_programs_on_the_same_images(weights: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """N is below the width of the features, so covariances are not of full rank. (Its precision and recall are of VGG's
    features: the same rule is held above.)"""
    drawn, real = (str(folder) for folder in folders)
    theirs = torch_fidelity.calculate_metrics(
        input1=drawn,
        input2=real,
        cuda=False,
        isc=True,
        fid=True,
        kid=True,
        save_cpu_ram=True,
        kid_subset_size=SUBSET,
        feature_extractor_weights_path=str(weights),
        cache=False,
        verbose=False,
        batch_size=6,
    )
    report = tmp_path / "report.json"
    sets = ["--samples", drawn, "--reference", real, "--kernel-size", str(SUBSET)]
    main([*sets, "--inception", str(weights), "--batch-size", "6", "--device", "cpu", "--json", str(report)])
    found = json.loads(report.read_text())["generation"]
    names = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "inception_score": "inception_score_mean",
        "inception_score_std": "inception_score_std",
    }
    assert {name: found[name] for name in names} == pytest.approx(
        {name: theirs[key] for name, key in names.items()}, rel=1e-3, abs=1e-6
    )
    assert found["fid"] > 0 and found["inception_score"] > 1
