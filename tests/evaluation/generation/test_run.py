"""Sets of images compared: figures against the pure functions on bare forwards, ADM's files, and bad input."""

import importlib
import json

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from transformers import Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from tests.evaluation.ranks import on_two_ranks
from tests.mllm.tiny import image_tokenizer
from unimm.errors import UserError
from unimm.evaluation.generation import command
from unimm.evaluation.generation.feature_spaces import EncoderSpace, InceptionSpace, TokenizerSpace
from unimm.evaluation.generation.run import PairedSets, collect, compare, read_reference
from unimm.evaluation.metrics.distributions import inception_score, kernel_distance, manifolds
from unimm.evaluation.metrics.frechet import frechet_distance, moments_of
from unimm.evaluation.runs.html_report import write_report
from unimm.evaluation.runs.image_sets import image_set
from unimm.evaluation.runs.records import read_manifest
from unimm.evaluation.runs.store import processes
from unimm.networks.inception import InceptionFeatures

main = importlib.import_module("eval.generation").main
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


class TinyInception(torch.nn.Module):
    """Random projections in the place of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(6, 4)
        self.project = torch.nn.Linear(3, 6)

    def forward(self, images: torch.Tensor) -> InceptionFeatures:
        pool = self.project(images.float().mean(dim=(2, 3)) / 255)
        return InceptionFeatures(pool, pool[:, :3] ** 2, self.fc(pool * 9).softmax(dim=1))


@pytest.fixture(autouse=True)
def one_process():
    PartialState._reset_state()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Real images and bluer ones, 24 of each."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for name, shift in (("real", 0), ("drawn", 60)):
        (root / name).mkdir()
        for index in range(24):
            image = rng.integers(0, 190, (16, 16, 3)) + rng.integers(0, 60, 3) * [1, 1, 0] + [0, 0, shift]
            Image.fromarray(image.astype(np.uint8)).save(root / name / f"{index:02d}.png")
    return root


@pytest.fixture(scope="module")
def encoder(encoder_folder):
    return encoder_folder


def arrays(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def bare_features(encoder, folder):
    """CLS of Dinov2 behind its norm, by its own forward."""
    pixels = torch.from_numpy(arrays(folder)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        return Dinov2Model.from_pretrained(encoder).eval()((pixels - mean) / std).last_hidden_state[:, 0]


def test_figures_are_those_of_bare_forwards(folders, encoder, tmp_path, capsys):
    arguments = ["--samples", str(folders / "drawn"), "--reference", str(folders / "real"), "--encoder", str(encoder)]
    main([*arguments, "--batch-size", "5", "--json", str(tmp_path / "report.json"), "--device", "cpu"])
    report = json.loads((tmp_path / "report.json").read_text())
    found, name = report["generation"], report["space"]["name"]
    assert name == "dinov2_cls_16" and len(report["space"]["sha256"]) == 64
    real, drawn = (bare_features(encoder, folders / part) for part in ("real", "drawn"))
    distance = frechet_distance(moments_of(real.numpy()), moments_of(drawn.numpy()))
    assert found[f"fd_{name}"] == pytest.approx(distance, rel=1e-4) and distance > 0
    assert (found["count"], found["count_reference"], found["kid_subset_size"]) == (24, 24, 24)
    assert found["kid"] == pytest.approx(kernel_distance(real, drawn, size=24).mean, rel=1e-3)
    assert found["precision"] == manifolds(real, drawn).precision and "inception_score" not in found
    assert f"fd_{name}" in capsys.readouterr().out


def test_a_run_is_kept_goes_on_and_becomes_a_page(folders, encoder, tmp_path, monkeypatch):
    sets = [f"--samples={folders / 'drawn'}", f"--reference={folders / 'real'}"]
    main([*sets, "--encoder", str(encoder), "--output", str(tmp_path / "run"), "--json", str(tmp_path / "kept.json")])
    kept = json.loads((tmp_path / "kept.json").read_text())["generation"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["distances"] == kept and kept["fd_dinov2_cls_16"] > 0
    assert read_manifest(tmp_path / "run").weights == {"dinov2_cls_16": summary["space"]["sha256"]}
    main(["--from", str(tmp_path / "run"), "--output", str(tmp_path / "again")])
    for name in ("records.jsonl", "summary.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert write_report(tmp_path / "run", tmp_path / "page.html", tmp_path / "again") == []
    assert "fd dinov2 cls 16" in (tmp_path / "page.html").read_text()
    monkeypatch.setattr(command, "collect", lambda *_: pytest.fail("a finished run looks at the images again"))
    main([*sets, "--encoder", str(encoder), "--output", str(tmp_path / "run")])
    for changed in (folders / "drawn", folders / "real"):
        image = (changed / "05.png").read_bytes()
        Image.new("RGB", (16, 16)).save(changed / "05.png")
        with pytest.raises(UserError, match="differs in prompts_sha256"):
            main([*sets, "--encoder", str(encoder), "--output", str(tmp_path / "run")])
        (changed / "05.png").write_bytes(image)


def collected_by_two(folders, encoder, path):
    space = EncoderSpace(encoder, torch.device("cpu"))
    generated = collect(space, image_set(str(folders / "drawn")), batch_size=5)
    found = compare(generated, read_reference(str(folders / "real"), space, None), space=space)
    if processes().is_main_process:
        path.write_text(json.dumps(found))


def test_two_processes_collect_the_figures_of_one(folders, encoder, tmp_path):
    """The last bit of a feature depends on its batch, so the figures agree to rounding."""
    for name, run in (("one", collected_by_two), ("two", lambda *given: on_two_ranks(collected_by_two, *given))):
        run(folders, encoder, tmp_path / name)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4) and one["count"] == 24


def test_inceptions_figures_have_their_own_names(folders):
    torch.manual_seed(1)
    space = InceptionSpace(TinyInception().eval(), "0" * 64)
    generated = collect(space, image_set(str(folders / "drawn")), batch_size=7)
    found = compare(generated, read_reference(str(folders / "real"), space, None), space=space)
    real, drawn = (space.features(arrays(folders / part)) for part in ("real", "drawn"))
    for name, kind in (("fid", "pool"), ("sfid", "spatial")):
        expected = frechet_distance(moments_of(real[kind].numpy()), moments_of(drawn[kind].numpy()))
        assert found[name] == pytest.approx(expected, rel=1e-4)
    score = inception_score(drawn["probabilities"])
    assert (found["inception_score"], found["inception_score_std"]) == pytest.approx(tuple(score), rel=1e-5)


def test_a_set_beside_itself_and_its_statistics(folders, encoder, tmp_path):
    space = EncoderSpace(encoder, torch.device("cpu"))
    sets = PairedSets(space)
    sets.add(arrays(folders / "real"), arrays(folders / "real"))
    own = sets.figures()
    assert own["fd_dinov2_cls_16"] == pytest.approx(0, abs=1e-6) and own["precision"] == own["recall"] == 1
    arguments = ["--samples", str(folders / "real"), "--encoder", str(encoder)]
    statistics, written = tmp_path / "real.npz", tmp_path / "samples.npz"
    kept = ["--write-statistics", str(statistics), "--write-npz", str(written)]
    main([*arguments, "--reference", str(folders / "drawn"), *kept])
    assert np.array_equal(np.load(written)["arr_0"], arrays(folders / "real"))
    report = tmp_path / "report.json"
    main(["--samples", str(written), "--encoder", str(encoder), "--reference", str(statistics), "--json", str(report)])
    found = json.loads(report.read_text())["generation"]
    assert found["fd_dinov2_cls_16"] == pytest.approx(0, abs=1e-6)
    assert "precision" not in found  # statistics have no neighbours


def test_an_encoder_without_a_class_token_gives_the_mean_of_its_patches(tmp_path):
    torch.manual_seed(0)
    config = SiglipVisionConfig(**SIZES, intermediate_size=32, vision_use_head=False)
    model = SiglipVisionModel(config).eval()
    model.save_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    pixel_values = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1
    space = EncoderSpace(tmp_path, torch.device("cpu"))
    with torch.no_grad():
        expected = model(pixel_values).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(space.features(image)["pool"], expected, atol=1e-5, rtol=1e-4)
    assert space.name == "siglip_vision_model_mean_16"


def test_a_tokenizers_own_encoder_is_called_so():
    tokenizer = image_tokenizer()
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    space = TokenizerSpace(tokenizer, original=False)
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        expected = tokenizer.features(tokenizer.normalize(pixels)).mean(dim=1)
    torch.testing.assert_close(space.features(image)["pool"], expected)
    assert space.name == "own_encoder" and "biased" in space.describe()["note"]
    assert TokenizerSpace(tokenizer, original=True).name == "original_encoder"


def test_what_is_no_number_is_an_error(folders, encoder, tmp_path):
    space = EncoderSpace(encoder, torch.device("cpu"))
    with pytest.raises(UserError, match="either --inception FILE or --encoder PATH"):
        main(["--samples", str(folders / "real"), "--reference", str(folders / "drawn")])
    with pytest.raises(UserError, match="1 images are no distribution"):
        collect(space, image_set(str(folders / "real"), 1))
    few = collect(space, image_set(str(folders / "drawn"), 20))
    with pytest.raises(UserError, match="20 and 24 images"):
        compare(few, read_reference(str(folders / "real"), space, None), space=space)
    with pytest.raises(UserError, match="Subsets of 30 images .* need more than 20"):
        compare(few, read_reference(str(folders / "real"), space, 20), space=space, kernel_size=30)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name, side in (("a", 16), ("b", 12)):
        Image.new("RGB", (side, side)).save(mixed / f"{name}.png")
    with pytest.raises(UserError, match="b.png has 12 x 12 pixels and a.png 16 x 16"):
        collect(space, image_set(str(mixed)))
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="statistics of inception, and the images are compared by dinov2_cls_16"):
        read_reference(str(tmp_path / "adm.npz"), space, None)
    np.savez(tmp_path / "broken.npz", mu=np.zeros(4))
    with pytest.raises(UserError, match="holds mu and sigma that are no mean"):
        read_reference(str(tmp_path / "broken.npz"), space, None)
    np.savez(tmp_path / "other.npz", x=np.zeros(4))
    with pytest.raises(UserError, match="neither images"):
        read_reference(str(tmp_path / "other.npz"), space, None)
