"""Noise by counter, held to published vectors, closed forms and softmax; guidance scales token by token."""

import argparse
import math
from typing import Any

import numpy as np
import pytest
import torch

from unimm.config.schema import build, plain
from unimm.errors import UserError
from unimm.noise import Noise, _philox_numpy, _philox_torch, philox4x64, philox_keys
from unimm.sampling import (
    SAMPLING_NAMES,
    ImageSampling,
    SamplingOptions,
    add_sampling_arguments,
    sampling_options,
)
from unimm.training.loop.arguments import PanelConfig, PanelSampling

# counter, key, result: philox4x64-10 in the known-answer file of Random123
KNOWN = (
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ),
    (
        (2**64 - 1,) * 4,
        (2**64 - 1,) * 2,
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_answers(counter: tuple, key: tuple, result: tuple) -> None:
    words, keys = (torch.from_numpy(np.array(each, dtype=np.uint64).view(np.int64))[:, None] for each in (counter, key))
    found = philox4x64(words, keys)[:, 0].numpy().view(np.uint64)
    assert found.tolist() == list(result)


def test_every_device_has_the_same_bits() -> None:
    seeds = [0, 7, 2**63 - 1, 2**63, 2**64 + 5, 2**128 - 1]
    for first in (0, 1, 123_456_789):
        expected = _philox_numpy(seeds, first, 500)
        assert torch.equal(_philox_torch(philox_keys(seeds), first, 500), expected)
        assert torch.equal(_philox_numpy(seeds[2:3], first, 500)[0], expected[2]) and expected.shape == (6, 4000)


def test_noise_is_a_function_of_seed_position_and_code() -> None:
    whole = Noise([3, 4], 100).at(0, 40)
    assert torch.equal(Noise([4], 100).at(17, 23)[0], whole[1, 17:23])
    stepped = Noise([3, 4], 100)
    for position in (5, 6, 39, 0):
        assert torch.equal(stepped.step(position), whole[:, position])
    assert whole.unique().numel() > 0.999 * whole.numel()


def test_no_noise_is_computed_behind_the_last_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small codebook would have thousands of positions computed ahead."""
    computed: list[tuple[int, int]] = []
    original = Noise.at
    monkeypatch.setattr(Noise, "at", lambda self, *ends: (computed.append(ends), original(self, *ends))[1])
    noise, whole = Noise([3, 4], 100, length=64), Noise([3, 4], 100)
    for position in range(64):
        assert torch.equal(noise.step(position), whole.step(position))
    assert computed[0] == (0, 64) and computed[1][1] > 5000 and len(computed) == 2
    assert noise.next(62, 70).shape == (2, 8, 100), "what is asked for is there"


def test_noise_is_gumbel() -> None:
    """Uniform after the distribution function, by chi-square over 256 cells; mean and variance of a Gumbel."""
    noise = Noise(range(4), 4096).at(0, 64).double()
    uniform = (-(-noise).exp()).exp()
    counts = torch.histc(uniform, 256, 0, 1)
    expected = noise.numel() / 256
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi - 255) < 5 * math.sqrt(2 * 255)
    assert abs(float(noise.mean()) - 0.57721566) < 5 * math.pi / math.sqrt(6 * noise.numel())
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02


def test_the_tails_are_there() -> None:
    """The largest of n Gumbels lies near log n: 2^24 draws reach beyond what 24 bits below 1 resolve."""
    noise = Noise([1], 1 << 14).at(0, 1 << 10)
    assert torch.isfinite(noise).all()
    top = noise.flatten().topk(50).values
    assert math.log(noise.numel()) - 2 < float(top[0]) < math.log(noise.numel()) + 10 and len(top.unique()) == 50


def test_noise_is_independent_across_codes_positions_and_images() -> None:
    noise = Noise(range(8), 512).at(0, 64).double()
    noise = (noise - noise.mean()) / noise.std()
    for a, b in (
        (noise[..., 1:], noise[..., :-1]),
        (noise[..., 8:], noise[..., :-8]),
        (noise[:, 1:], noise[:, :-1]),
        (noise[1:], noise[:-1]),
        (noise[1:, 1:], noise[:-1, :-1]),
    ):
        assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel())


def test_argmax_of_scores_and_noise_is_a_sample_of_softmax() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    drawn = (scores + Noise(range(200), 5).at(0, 200)).argmax(-1)
    counts = torch.bincount(drawn.flatten(), minlength=5).double()
    expected = scores.double().softmax(-1) * drawn.numel()
    assert float(((counts - expected) ** 2 / expected).sum()) < 25  # chi-square with 4 degrees: p < 1e-4


def test_scales_by_interval_and_schedule() -> None:
    plain = ImageSampling(guidance_scale=[3.0, 1.0])
    assert plain.scales(2, 3).tolist() == [[3, 0]] * 3
    assert ImageSampling(guidance_scale=3.0, guidance_interval=(1, 2)).scales(1, 3).flatten().tolist() == [0, 3, 0]
    linear = ImageSampling(guidance_scale=[5.0, 0.0], guidance_schedule="linear")
    assert linear.scales(2, 4).tolist() == [[2, 0], [3, 0], [4, 0], [5, 0]]
    for wrong in ({"guidance_interval": (3, 1)}, {"guidance_schedule": "cosine"}, {"min_p": 1.0}):
        with pytest.raises(UserError):
            ImageSampling(**wrong)


def test_the_keyword_arguments_are_the_fields() -> None:
    assert set(SamplingOptions.__annotations__) == set(SAMPLING_NAMES)


def test_every_setting_has_a_flag_that_reads_its_value() -> None:
    values = {"do_sample": False, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "guidance_scale": 2.5}
    values |= {"guidance_interval": [1, 4], "guidance_schedule": "linear", "image_guidance_scale": 1.5}
    words = "--no-do-sample --temperature 0.5 --top-k 7 --top-p 0.9 --min-p 0.1 --guidance-scale 2.5"
    words += " --guidance-interval 1 4 --guidance-schedule linear --image-guidance-scale 1.5"
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    assert sampling_options(parser.parse_args(words.split())) == values and set(values) == set(SAMPLING_NAMES)
    assert sampling_options(parser.parse_args([])) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_q": 1}, "top_q is no sampling setting; there are do_sample, temperature"),
        ({"top_k": 1.5}, "top_k is 1.5; give a whole number"),
        ({"min_p": "low"}, "min_p is 'low'; give a number"),
        ({"guidance_scale": -1}, "guidance_scale is -1; give 0 or 1 for no guidance"),
    ],
)
def test_invalid_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampling_options(given)


def test_a_section_of_a_file_is_built_with_its_former_keys() -> None:
    tree = {"prompts": ["x"], "guidance_scale": 2, "temperature": 0.5, "sampling": {"top_k": 5}}
    panel = build(PanelConfig, tree, key="panel", source="a file")
    assert panel.sampling == PanelSampling(guidance_scale=2.0, temperature=0.5, top_k=5)
    assert build(PanelConfig, {"prompts": ["x"]}, key="panel", source="a file").sampling.guidance_scale == 3.0
    assert build(PanelConfig, plain(panel), key="panel", source="a file") == panel
    for wrong, said in (
        ({"guidance_scale": 2, "sampling": {"guidance_scale": 3}}, "Unknown key panel.guidance_scale"),
        ({"sampling": {"top_p": 0}}, "panel.sampling.top_p in a file is 0.0, and must be above 0 and at most 1"),
        ({"sampling": 3, "temperature": 1}, "Unknown key panel.temperature"),
    ):
        with pytest.raises(UserError, match=said):
            build(PanelConfig, {"prompts": ["x"], **wrong}, key="panel", source="a file")
