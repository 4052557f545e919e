"""One black image, one of a single color, one that cannot be read: every harness goes on to its end, names what it left
out, and writes finite numbers only."""

import csv
import importlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from PIL import Image

from tests.evaluation.shapes.test_run import Mirror, as_pixels
from tests.evaluation.tiny_vqa import save_blip
from unimm.data.shapes import Scene
from unimm.errors import UserError, run_main
from unimm.evaluation.generation.run import PairedSets, collect
from unimm.evaluation.metrics.image_metrics import HIGHEST_PSNR
from unimm.evaluation.runs.bad_images import scored_or_error
from unimm.evaluation.runs.image_sets import image_set
from unimm.evaluation.runs.records import read_manifest, read_records, read_summary
from unimm.evaluation.shapes.arguments import ShapesPlan
from unimm.evaluation.shapes.run import evaluate_reconstruction, strict_scores
from unimm.runs.report import Report

BLACK, GREEN, BROKEN = "b_black.png", "c_green.png", "d_broken.png"


def finite(tree: Any) -> bool:
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    return math.isfinite(tree) if isinstance(tree, float) else values is None or all(map(finite, values))


def read_json(path: Path) -> Any:
    """Refuses Infinity and NaN, which are no JSON."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{path} holds {name}"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine images of noise, a black one, a green one, and a file that is cut off."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for name in ("a_0", *(f"e_{index}" for index in range(8))):
        Image.fromarray(rng.integers(0, 256, (40, 33, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    Image.new("RGB", (33, 40)).save(folder / BLACK)
    Image.new("RGB", (33, 40), (0, 200, 0)).save(folder / GREEN)
    (folder / BROKEN).write_bytes((folder / "a_0.png").read_bytes()[:300])
    return folder


@pytest.mark.parametrize("kept", [True, False])
def test_reconstruction(
    kept: bool, folder: Path, tokenizer_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimm.evaluation.reconstruction.run.KMEANS_IMAGES", 12)
    run, report = tmp_path / "run", tmp_path / "report.json"
    arguments = ["--source", str(folder), "--kmeans-source", str(folder), "--num-images=0"]
    arguments += ["--model", str(tokenizer_folder), "--json", str(report), *(["--output", str(run)] if kept else [])]
    main = importlib.import_module("eval.reconstruction").main
    assert run_main(lambda: main(arguments)) == 0, capsys.readouterr().err
    written = read_json(report)
    assert finite(written)
    assert written["num_images"] == 11
    assert list(written["unreadable"]) == [BROKEN]
    assert "cut off or damaged" in written["unreadable"][BROKEN]
    assert written["protocol"]["highest_psnr"] == HIGHEST_PSNR
    assert f"left out, {BROKEN}: " in capsys.readouterr().out
    if not kept:
        return
    records = {record.item: record for record in read_records(run)}
    assert len(records) == 12
    assert records[BLACK].raw_scores["psnr_mean_color"] == records[BLACK].raw_scores["psnr_kmeans"] == HIGHEST_PSNR
    assert records[GREEN].raw_scores["psnr_mean_color"] == HIGHEST_PSNR
    assert records[BROKEN].is_unreadable
    assert (records[BROKEN].raw_scores, records[BROKEN].verdict) == ({}, None)
    summary = read_summary(run)
    assert (summary["num_images"], summary["unreadable"]) == (11, [BROKEN])
    assert read_manifest(run).settings["protocol"]["highest_psnr"] == HIGHEST_PSNR
    before = (run / "records.jsonl").read_bytes()
    assert run_main(lambda: main(arguments)) == 0  # a run that goes on finds nothing to do
    assert (run / "records.jsonl").read_bytes() == before
    page = importlib.import_module("unimm.evaluation.report.command").main
    page([str(run), "--output", str(tmp_path / "page.html")])
    assert BROKEN in (tmp_path / "page.html").read_text()


def test_a_set_without_a_readable_image_is_one_sentence(folder: Path, tokenizer_folder: Path, capsys: Any) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"\x89PNG\r\n")
    arguments = ["--source", str(folder), "--num-images=0", "--model", str(tokenizer_folder)]
    main = importlib.import_module("eval.reconstruction").main
    assert run_main(lambda: main(arguments)) == 2
    assert "None of 12 images can be read; the first is a_0.png:" in capsys.readouterr().err


def test_sets_of_images(folder: Path, encoder_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """The broken image counts for the N of its set, so that the other set need not shrink."""
    main = importlib.import_module("eval.generation").main
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    shutil.copy(whole / "a_0.png", whole / BROKEN)
    report = tmp_path / "report.json"
    arguments = ["--samples", str(folder), "--reference", str(whole), "--encoder", str(encoder_folder)]
    arguments += [
        "--json",
        str(report),
        "--output",
        str(tmp_path / "run"),
        "--write-npz",
        str(tmp_path / "samples.npz"),
    ]
    assert run_main(lambda: main([*arguments, "--kernel-size=12"])) == 0, capsys.readouterr().err
    found = read_json(report)["generation"]
    assert finite(found)
    assert (found["count"], found["count_reference"], found["kid_subset_size"]) == (11, 12, 11)
    assert (found["unreadable"], found["unreadable_reference"]) == ([BROKEN], [])
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (11, 40, 33, 3)
    page = importlib.import_module("unimm.evaluation.report.command").main
    page([str(tmp_path / "run"), "--output", str(tmp_path / "page.html")])
    assert BROKEN in capsys.readouterr().out


def test_a_single_image_whose_features_are_not_finite_is_left_out(folder: Path) -> None:
    """As an overflow in half precision gives them; a network that gives nothing else is refused."""
    (folder / BROKEN).unlink()

    class Overflowing:
        name = "overflowing"

        def features(self, images: np.ndarray) -> dict[str, torch.Tensor]:
            pool = torch.from_numpy(images.reshape(len(images), -1)[:, :6].astype(np.float32))
            pool[(images == 0).all(axis=(1, 2, 3))] = math.inf
            return {"pool": pool}

        def describe(self) -> dict[str, Any]:
            return {}

    collected = collect(Overflowing(), image_set(str(folder)), batch_size=4)
    assert (collected.count, collected.unreadable) == (10, [BLACK])
    assert torch.isfinite(collected.all("pool")).all()
    pairs, black = PairedSets(Overflowing()), np.zeros((4, 8, 8, 3), np.uint8)
    for _ in range(3):
        noise = np.random.default_rng(0).integers(1, 256, (4, 8, 8, 3), dtype=np.uint8)
        pairs.add(noise, np.concatenate([black[:1], noise[1:]]))
    figures = pairs.figures()
    assert finite(figures)
    assert (figures["left_out"], figures["count"], figures["count_reference"]) == (3, 9, 9)
    with pytest.raises(UserError, match="features that are not finite"):
        PairedSets(Overflowing()).add(black, black)


def official_folder(folder: Path, target: Path) -> Path:
    """The images as samples of one prompt in GenEval's layout."""
    place = target / "00000"
    (place / "samples").mkdir(parents=True)
    rules = {"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}], "prompt": "a red ring"}
    (place / "metadata.jsonl").write_text(json.dumps(rules))
    for index, name in enumerate((BLACK, GREEN, BROKEN, "a_0.png")):
        shutil.copy(folder / name, place / "samples" / f"{index:05d}.png")
    return target


def test_geneval_by_both_judges(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scripted:
        def answer(self, images: Any, questions: Any) -> list[str]:
            if any(not np.asarray(image).any() for image in images):
                raise UserError("scores that are not finite")  # about the black image alone
            return ["yes" if "Is there" in question else "who knows" for question in questions]

        def describe(self) -> dict[str, Any]:
            return {"name": "scripted", "sha256": "0"}

    command = importlib.import_module("unimm.evaluation.geneval.command")
    monkeypatch.setattr(command, "load_vqa_model", lambda path, device: Scripted())
    given, run = official_folder(folder, tmp_path / "given"), tmp_path / "run"
    report = tmp_path / "report.json"
    command.main(["--shapes", "--images", str(given), "--vqa=any", "--output", str(run), "--json", str(report)])
    written = read_json(report)
    assert finite(written)
    assert (written["images"], written["scores"], written["plain"]) == (4, {"colors": 0.0}, {"colors": 0.0})
    assert written["unreadable"] == ["00000"]
    assert written["failed"] == {"too few": 3, "unreadable": 1}
    records = read_records(run)
    assert [record.is_unreadable for record in records] == [False, False, True, False]
    assert "cut off or damaged" in records[2].reason
    asked = read_records(run / "questions")
    assert [record.reason.partition(":")[0] for record in asked] == [
        "unreadable",
        "unparsed answer to 'What color is the ring?'",
        "unreadable",
        "unparsed answer to 'What color is the ring?'",
    ]
    assert written["questions"]["unparsed"] == 2
    assert len((run / "geneval_results.jsonl").read_text().splitlines()) == 4


def test_a_judge_that_fails_on_every_image_stops_the_run() -> None:
    def fails(items: Any) -> list[str]:
        raise UserError("no memory left")

    with pytest.raises(UserError, match="no memory left"):
        scored_or_error(["a", "b"], fails)
    found = scored_or_error(
        ["a", UserError("cut off"), "b"], lambda items: [f"{items}"] if items == ["a"] else fails(items)
    )
    assert [str(each) for each in found] == ["['a']", "cut off", "no memory left"]


def test_dpg_grids(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids, run, report = tmp_path / "grids", tmp_path / "run", tmp_path / "report.json"
    grids.mkdir()
    with (tmp_path / "dpg.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language"])
        for index, name in enumerate((BLACK, GREEN, "a_0.png", BROKEN)):
            rows.writerow([f"i{index}", "a ring", 1, 0, "entity - whole (ring)", "is there a ring?"])
            content = folder / name
            if name == BROKEN:
                (grids / f"i{index}.png").write_bytes(content.read_bytes())
            else:
                Image.open(content).resize((32, 32)).save(grids / f"i{index}.png")
    scorer = save_blip(tmp_path / "scorer", "yes")
    command = importlib.import_module("unimm.evaluation.dpg.command").main
    arguments = [
        "--dpg-csv",
        str(tmp_path / "dpg.csv"),
        "--vqa-model",
        str(scorer),
        "--no-sanity-check",
        "--num-images=2",
    ]
    command([*arguments, "--images", str(grids), "--resolution=16", "--output", str(run), "--json", str(report)])
    written = read_json(report)
    assert finite(written)
    assert written["unreadable"] == ["i3", "i3"]
    assert written["fixed"]["dpg"] == written["plain"]["dpg"] == 75
    assert written["fixed"]["unparsed"] == written["plain"]["unparsed"] == 2
    assert [record.is_unreadable for record in read_records(run)] == [False] * 6 + [True] * 2


def table(folder: Path, path: Path, **columns: list[Any]) -> Path:
    names = ["a_0.png", BLACK, GREEN, BROKEN, *(f"e_{index}.png" for index in range(8))]
    rows = {"image": [{"bytes": (folder / name).read_bytes(), "path": None} for name in names], **columns}
    kinds = {name: Value("int64" if name == "label" else "string") for name in columns}
    features = Features({"image": datasets.Image(decode=False), **kinds})
    Dataset.from_dict(rows, features=features).cast_column("image", datasets.Image()).to_parquet(path)
    return path


def test_nearest(folder: Path, model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    source = table(folder, tmp_path / "captioned.parquet", text=[f"thing {index}" for index in range(12)])
    command, report = importlib.import_module("eval.nearest").main, tmp_path / "report.json"
    arguments = ["--model", str(model_folder), "--source", str(source), "--output", str(tmp_path / "run")]
    command([*arguments, "--json", str(report), "--page", str(tmp_path / "page.html")])
    written = read_json(report)
    assert finite(written)
    assert written["unreadable"] == ["unreadable 3"]
    assert (written["drawing"]["images"], written["reconstruction"]["images"]) == (11, 11)
    assert "left out, because they cannot be read: unreadable 3" in capsys.readouterr().out
    command([*arguments, "--json", str(report)])  # goes on: nothing is left to do
    assert read_json(report)["unreadable"] == ["unreadable 3"]


def test_probe(folder: Path, tokenizer_folder: Path, tmp_path: Path, capsys: Any) -> None:
    source = table(folder, tmp_path / "labelled.parquet", label=[index % 2 for index in range(12)])
    command, report = importlib.import_module("eval.probe").main, tmp_path / "report.json"
    arguments = ["--model", str(tokenizer_folder), "--source", str(source), "--test-source", str(source)]
    command([*arguments, "--epochs=2", "--warmup-epochs=1", "--json", str(report)])
    written = read_json(report)
    assert finite(written)
    assert len(written["unreadable"]) == 2  # in training and in the test
    assert all("row 3" in reason for reason in written["unreadable"])
    assert written["hardware"]["cpu"] and written["versions"]["torch"] and written["dtype"] == "torch.float32"
    assert "left out: " in capsys.readouterr().out


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, math.nan], ids=["black", "gray", "white", "not a number"])
def test_shapes(value: float) -> None:
    """A decoder that paints one color, or nothing that is a number, is wrong about every scene, in finite figures."""
    plan = ShapesPlan(num_scenes=6, codebook_scenes=6, batch_size=4)
    scores, rows = evaluate_reconstruction(Mirror(lambda pixels: torch.full_like(pixels, value)), as_pixels, plan)
    assert finite(scores)
    assert all(finite(row) for row in rows)
    assert scores["agreement"] == strict_scores("reconstruction", rows)["agreement"] == 0


def test_shapes_of_scenes_in_one_color(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenes without objects: equal images, and equal to their mean color."""
    monkeypatch.setattr("unimm.evaluation.shapes.run.sample_scene", lambda rng: Scene((), "black"))
    scores, rows = evaluate_reconstruction(Mirror(), as_pixels, ShapesPlan(num_scenes=3, codebook_scenes=3))
    assert (scores["psnr"], scores["psnr_mean_color"]) == (HIGHEST_PSNR, HIGHEST_PSNR)
    assert all(finite(row) for row in rows)


def test_a_report_names_what_is_not_finite(tmp_path: Path) -> None:
    report = Report(str(tmp_path / "report.json"))
    report.add(loss={"first": math.inf, "curve": [1.0, math.nan]}, good=1.5)
    report.write()
    written = read_json(tmp_path / "report.json")
    assert written["loss"] == {"first": None, "curve": [1.0, None]}
    assert written["not_finite"] == ["loss.first", "loss.curve[1]"]
    assert written["good"] == 1.5
