"""The linear probe: its optimizer against the formula, and verdicts on vectors whose answer is known."""

import json
import runpy

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import ROOT
from tests.tokenizer.conftest import tiny_vqrae
from unimm.errors import UserError
from unimm.evaluation.probe.lars import LARS
from unimm.evaluation.probe.run import ProbePlan, mean_vectors, probe, probe_tokenizer, random_twin
from unimm.tokenizer import ImageTokenizerProcessor

PLAN = ProbePlan("shapes", "shapes", epochs=20, warmup_epochs=2, batch_size=64, base_rates=(0.1, 1.0, 10.0))


def test_lars_against_the_formula():
    rng = np.random.default_rng(0)
    start = [rng.normal(size=(3, 4)), rng.normal(size=3), np.zeros((2, 2))]
    gradients = [[rng.normal(size=array.shape) for array in start] for _ in range(4)]
    rate, momentum, decay, trust = 0.7, 0.9, 0.05, 0.01
    ours = [nn.Parameter(torch.from_numpy(array.copy())) for array in start]
    optimizer = LARS(ours, lr=rate, momentum=momentum, weight_decay=decay, trust=trust)
    theirs, moving = [array.copy() for array in start], [np.zeros_like(array) for array in start]
    for step in gradients:
        for parameter, gradient in zip(ours, step, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        for k, gradient in enumerate(step):
            update = gradient
            if theirs[k].ndim > 1:
                update = gradient + decay * theirs[k]
                size = np.sqrt((theirs[k] ** 2).sum())
                update = update * (trust * size / np.sqrt((update**2).sum()) if size > 0 else 1.0)
            moving[k] = momentum * moving[k] + update
            theirs[k] = theirs[k] - rate * moving[k]
        for parameter, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def vectors(count: int, *, apart: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes around four corners, `apart` standard deviations from the middle."""
    labels = torch.arange(count) % 4
    return torch.randn(count, 8) + apart * torch.eye(8)[labels], labels


def test_separable_vectors_are_separated_and_noise_stays_at_chance():
    train, labels = vectors(600, apart=8.0)
    test, test_labels = vectors(400, apart=8.0)
    found = probe(train, labels, test, test_labels, PLAN)
    assert found["linear"] > 0.98
    assert found["knn"] > 0.98
    assert found["sweep"].keys() == {"0.1", "1.0", "10.0"}
    assert found["sweep"][str(found["base_rate"])] == max(found["sweep"].values())
    train, labels = vectors(600, apart=0.0)
    test, test_labels = vectors(400, apart=0.0)
    found = probe(train, labels, test, test_labels, PLAN)
    assert found["linear"] == pytest.approx(0.25, abs=0.087)  # 4 standard deviations
    assert found["knn"] == pytest.approx(0.25, abs=0.087)


def test_vectors_that_cannot_be_probed():
    train, labels = vectors(40, apart=1.0)
    with pytest.raises(UserError, match="of 1 classes"):
        probe(train, torch.zeros_like(labels), train, torch.zeros_like(labels), PLAN)
    with pytest.raises(UserError, match="up to 4"):
        probe(train, labels, train[:1], torch.tensor([4]), PLAN)


def test_what_is_pooled_from_a_tokenizer():
    tokenizer = tiny_vqrae()
    pixel_values = torch.randn(3, 3, 32, 32)
    found = mean_vectors(tokenizer, pixel_values, ("features", "latents", "codes", "lookup"), None)
    torch.testing.assert_close(found["features"], tokenizer(pixel_values).last_hidden_state.mean(dim=1).detach())
    assert torch.equal(found["codes"], found["lookup"])
    assert found["latents"].shape == (3, 48)
    states = tokenizer(pixel_values, output_hidden_states=True).hidden_states
    level = mean_vectors(tokenizer, pixel_values, ("features",), 1)["features"]
    assert torch.equal(level, states[1].mean(dim=1).detach())
    with pytest.raises(UserError, match="0 .* to 2.*no level 3"):
        mean_vectors(tokenizer, pixel_values, ("features",), 3)


def test_the_random_twin():
    tokenizer = tiny_vqrae()
    before = torch.random.get_rng_state()
    one, same, other = (random_twin(tokenizer, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.fingerprint == same.fingerprint
    assert len({twin.fingerprint for twin in (tokenizer, one, other)}) == 3
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    with pytest.raises(UserError, match="no representation 'pixels'"):
        probe_tokenizer(one, processor, ProbePlan("shapes", "shapes", kinds=("pixels",)))


def test_the_command(tmp_path):
    tokenizer = tiny_vqrae()
    tokenizer.save_pretrained(tmp_path / "model")
    ImageTokenizerProcessor.for_tokenizer(tokenizer.config).save_pretrained(tmp_path / "model")
    main = runpy.run_path(str(ROOT / "eval" / "probe.py"))["main"]
    arguments = ["--model", str(tmp_path / "model"), "--source", "shapes", "--test-source", "shapes"]
    arguments += ["--num-train", "30", "--num-test", "12", "--epochs", "2", "--warmup-epochs", "1"]
    found = []
    for extra in ([], ["--random"]):
        main([*arguments, *extra, "--level", "1", "--json", str(tmp_path / "probe.json")])
        found.append(json.loads((tmp_path / "probe.json").read_text()))
    assert [each["random"] for each in found] == [False, True]
    assert found[0]["probe"].keys() == {"features", "latents", "codes", "lookup"}
    assert all(0 <= kind["linear"] <= 1 and 0 <= kind["knn"] <= 1 for kind in found[0]["probe"].values())
    assert found[0]["plan"]["level"] == 1
