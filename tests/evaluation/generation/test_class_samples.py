"""The ADM evaluator's file: readable by numpy, complete, the same whatever the batch."""

import json
import runpy

import numpy as np
import pytest

from tests.class_conditional.tiny import tiny_drawer
from tests.conftest import ROOT
from unimm.config.loading import load_config
from unimm.errors import UserError
from unimm.evaluation.generation.class_samples import SamplesPlan, SamplesProtocol, write_npz, write_samples
from unimm.sampling import ImageSampling


def test_numpy_reads_what_was_drawn(tmp_path):
    drawer, sampling = tiny_drawer(), ImageSampling(guidance_scale=2.0)
    path = tmp_path / "new" / "samples.npz"
    write_samples(drawer, path, SamplesPlan(num_images=7, batch_size=3, seed=5), sampling)
    with np.load(path) as file:
        assert file.files == ["arr_0"]
        found = file["arr_0"]
    assert (found.dtype, found.shape) == (np.dtype(np.uint8), (7, 32, 32, 3))
    expected = drawer.draw([0, 1, 2, 3, 4, 0, 1], sampling, seed=5)
    difference = found.astype(int) - np.stack([np.asarray(image) for image in expected])
    assert abs(difference).max() <= 1  # the last bit of a product depends on the batch
    assert list(path.parent.iterdir()) == [path]


def test_the_command(tmp_path):
    tiny_drawer().save(tmp_path / "model")
    main = runpy.run_path(str(ROOT / "eval" / "c2i_samples.py"))["main"]
    output, report = tmp_path / "samples.npz", tmp_path / "report.json"
    arguments = ["--model", str(tmp_path / "model"), "--output", str(output), "--json", str(report)]
    main(
        [
            *arguments,
            "--num-images",
            "3",
            "--image-size",
            "48",
            "--guidance-scale",
            "2",
            "--guidance-interval",
            "0",
            "9",
        ]
    )
    with np.load(output) as file:
        assert file["arr_0"].shape == (3, 48, 48, 3)
    written = json.loads(report.read_text())
    assert written["shape"] == [3, 48, 48, 3]
    assert written["sampling"]["guidance_interval"] == [0, 9]


def test_nothing_is_left_of_a_file_that_fails(tmp_path):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(UserError, match="2 images do not fill a file of 3"):
        write_npz(tmp_path / "x.npz", (3, 4, 4, 3), [images])
    with pytest.raises(UserError, match="do not fit"):
        write_npz(tmp_path / "x.npz", (2, 4, 4, 3), [images.astype(np.float32)])
    with pytest.raises(UserError, match="at least 1"):
        write_samples(tiny_drawer(), tmp_path / "x.npz", SamplesPlan(num_images=0), ImageSampling())
    assert list(tmp_path.iterdir()) == []


PROTOCOLS = {"llamagen_256": 2.0, "llamagen_384": 1.75, "vfmtok": 1.0, "ideal": 1.5}


def test_the_papers_protocols(tmp_path):
    """50 000 images of 256 pixels, all ids at temperature 1; the scales are those of the papers' tables and code."""
    folder = ROOT / "configs" / "c2i" / "protocols"
    found = {path.stem: load_config(SamplesProtocol, path) for path in folder.iterdir()}
    assert {name: each.sampling.guidance_scale for name, each in found.items()} == PROTOCOLS
    for each in found.values():
        assert (each.plan.num_images, each.plan.image_size) == (50_000, 256)
        assert (each.sampling.temperature, each.sampling.top_k, each.sampling.top_p) == (1.0, 0, 1.0)
    tiny_drawer().save(tmp_path / "model")
    main = runpy.run_path(str(ROOT / "eval" / "c2i_samples.py"))["main"]
    arguments = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "x.npz")]
    arguments += ["--json", str(tmp_path / "x.json"), "--config", str(folder / "vfmtok.yaml"), "--num-images", "2"]
    main(arguments)
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["shape"] == [2, 256, 256, 3] and report["sampling"]["guidance_scale"] == 1.0
    main([*arguments, "--guidance-scale", "1.5", "--image-size", "16"])
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["shape"] == [2, 16, 16, 3] and report["sampling"]["guidance_scale"] == 1.5
