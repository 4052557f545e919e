"""`unimm eval`: suites by name; a run that is kept gives the figures of one that is not, and goes on after a kill."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.evaluation.ranks import on_two_ranks
from unimm.cli import main
from unimm.data.images import load_image
from unimm.evaluation.generation.feature_spaces import EncoderSpace
from unimm.evaluation.generation.run import collect
from unimm.evaluation.metrics.frechet import frechet_distance
from unimm.evaluation.runs import store as store_module
from unimm.evaluation.runs.image_sets import ImageSet
from unimm.evaluation.runs.records import read_manifest, read_records
from unimm.evaluation.shapes import command as shapes_command
from unimm.evaluation.shapes.arguments import ShapesPlan
from unimm.evaluation.suites import ALL, SUITES

SIZES = ["--num-scenes=3", "--codebook-scenes=5", "--questions=2", "--prompts=1", "--images-per-prompt=2"]


@pytest.fixture(autouse=True)
def one_process() -> None:
    PartialState._reset_state()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(5):
        Image.fromarray(rng.integers(0, 256, (33, 40, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def scored(path: Path, *sections: str) -> dict[str, dict[str, float]]:
    written = json.loads(path.read_text())
    return {section: written[section] for section in sections}


def run_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("records.jsonl", "summary.json")}


class Killed(Exception):
    pass


def kill_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the store takes so many records and no more."""
    append, taken = store_module.RunStore.append, []

    def limited(self: store_module.RunStore, record: store_module.Record) -> None:
        if len(taken) == count:
            raise Killed
        taken.append(record.key)
        append(self, record)

    monkeypatch.setattr(store_module.RunStore, "append", limited)


def test_tok_keeps_its_images_goes_on_and_repeats_itself(
    tokenizer_folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["eval", "tok", "--model", str(tokenizer_folder), "--source", str(images), "--num-images", "0"]
    assert main([*command, "--json", str(tmp_path / "plain.json")]) == 0
    assert main([*command, "--output", str(tmp_path / "run"), "--json", str(tmp_path / "kept.json")]) == 0
    plain, kept = (scored(tmp_path / name, "reconstruction") for name in ("plain.json", "kept.json"))
    assert plain == kept
    assert json.loads((tmp_path / "run/summary.json").read_text())["reconstruction"] == plain["reconstruction"]
    records = read_records(tmp_path / "run")
    assert [record.item for record in records] == [f"{index}.png" for index in range(5)]
    for record in records:
        assert record.output_path is not None
        sides = [Image.open(tmp_path / "run" / path) for path in (record.inputs["original_path"], record.output_path)]
        error = np.square(np.subtract(*(np.asarray(side) / 255 for side in sides))).mean()
        assert record.raw_scores["psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-4)
    with monkeypatch.context() as patch:
        kill_after(2, patch)
        with pytest.raises(Killed):
            main([*command, "--output", str(tmp_path / "again")])
    assert main(["eval", "tok", "--from", str(tmp_path / "run"), "--output", str(tmp_path / "again")]) == 0
    assert run_files(tmp_path / "again") == run_files(tmp_path / "run")


def test_tok_in_a_folder_of_another_run_is_one_line(
    tokenizer_folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "tok", "--model", str(tokenizer_folder), "--source", str(images), "--num-images", "0"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main([*command, "--output", str(tmp_path), "--protocol", "torchvision"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("unimm: error: ") and 'settings.protocol.crop ("adm", now "torchvision")' in error


def test_tok_compares_sets_in_the_summary_and_on_the_page_and_knows_its_weights_and_images(
    tokenizer_folder: Path, encoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run, page = tmp_path / "pictures", tmp_path / "run", tmp_path / "page.html"
    source.mkdir()
    for index in range(7):
        image = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(image).save(source / f"{index}.png")
    command = ["eval", "tok", "--model", str(tokenizer_folder), "--source", str(source), "--num-images", "0"]
    command += ["--output", str(run), "--fd-encoder"]
    assert main([*command, str(encoder_folder), "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["distances"] == report["distances"] and summary["distances"]["fd_dinov2_cls_16"] > 0
    manifest = read_manifest(run)
    assert manifest.weights["fd_encoder"] == summary["space"]["sha256"] == report["space"]["sha256"]
    assert manifest.settings["space"]["name"] == "dinov2_cls_16"
    space = EncoderSpace(encoder_folder, torch.device("cpu"))
    records = read_records(run)
    originals, drawn = (
        collect(space, ImageSet(lambda i, p=paths: load_image(run / p[i]), paths))
        for paths in ([r.inputs["original_path"] for r in records], [str(r.output_path) for r in records])
    )
    moments = (originals.statistics["pool"].moments, drawn.statistics["pool"].moments)
    assert summary["distances"]["fd_dinov2_cls_16"] == pytest.approx(frechet_distance(*moments), rel=1e-4)
    assert main(["eval", "report", str(run), "--output", str(page)]) == 0
    assert "fd dinov2 cls 16" in page.read_text() and "7 images against 7 real ones" in page.read_text()
    capsys.readouterr()
    weights = load_file(encoder_folder / "model.safetensors")
    other = tmp_path / "other"
    shutil.copytree(encoder_folder, other)
    weights["embeddings.cls_token"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert main([*command, str(other)]) == 2
    assert "differs in weights.fd_encoder" in capsys.readouterr().err
    Image.new("RGB", (16, 16), "red").save(source / "3.png")
    assert main([*command, str(encoder_folder)]) == 2
    assert "differs in prompts_sha256" in capsys.readouterr().err
    assert main([*command[:-3], "--num-images", "3", "--fd-encoder", str(encoder_folder)]) == 2
    assert "3 images are no distribution: dinov2_cls_16 compares sets of at least 6" in capsys.readouterr().err


def test_tok_by_two_processes_gives_the_files_of_one(
    tokenizer_folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "tok", "--model", str(tokenizer_folder), "--source", str(images), "--num-images", "0"]
    assert main([*command, "--output", str(tmp_path / "one")]) == 0
    on_two_ranks(main, [*command, "--output", str(tmp_path / "two")])
    assert run_files(tmp_path / "two") == run_files(tmp_path / "one")
    assert len(list((tmp_path / "two/images").iterdir())) == 10


def test_shapes_keeps_its_images_and_goes_on(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ("reconstruction", "chat", "generation")
    command = ["eval", "shapes", "--model", str(model_folder), *SIZES, "--batch-size=4"]
    assert main([*command, "--json", str(tmp_path / "plain.json")]) == 0
    with monkeypatch.context() as patch:
        kill_after(9, patch)
        with pytest.raises(Killed):
            main([*command, "--output", str(tmp_path / "run")])
    assert main([*command, "--output", str(tmp_path / "run"), "--json", str(tmp_path / "kept.json")]) == 0
    assert scored(tmp_path / "kept.json", *parts) == scored(tmp_path / "plain.json", *parts)
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0
    assert run_files(tmp_path / "whole") == run_files(tmp_path / "run")
    records = read_records(tmp_path / "run")
    plan = ShapesPlan(num_scenes=3, codebook_scenes=5, questions=2, prompts=1, images_per_prompt=2, batch_size=4)
    expected = [key for part in parts for key in shapes_command.part_keys(part, plan)[0]]
    assert sorted(expected) == [record.key for record in records]
    drawn = [record for record in records if record.item.startswith("generation/")]
    assert all(record.verdict or record.reason for record in drawn)
    assert all("detections" in record.raw_scores and record.inputs["prompt"] for record in drawn)
    assert {record.inputs["part"] for record in drawn} == {"generation", "withheld"}
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert main(["eval", "report", str(tmp_path / "run"), "--output", str(page), "--json", "-"]) == 0
    written = json.loads(capsys.readouterr().out)
    by_name = {(score["part"], score["name"]): score for score in written["scores"]}
    summary = scored(tmp_path / "kept.json", *parts)
    assert by_name["generation", "correct"]["value"] == pytest.approx(summary["generation"]["overall"])
    assert by_name["withheld", "correct"]["value"] == pytest.approx(summary["generation"]["withheld"])
    assert by_name["reconstruction", "psnr"]["value"] == pytest.approx(summary["reconstruction"]["psnr"])
    assert by_name["chat", "correct"]["value"] == pytest.approx(np.mean(list(summary["chat"].values())))
    assert page.read_text().count("<article") == 3 + 8 + 14
    assert read_manifest(tmp_path / "run").arguments["parts"] == ",".join(parts)


def test_every_suite_can_be_imported_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for suite in SUITES.values():
        assert callable(importlib.import_module(f"{suite.package}.arguments").parse)
        assert callable(importlib.import_module(f"{suite.package}.command").run)
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    assert ", ".join([*SUITES, ALL]) in " ".join(capsys.readouterr().out.split())
    assert main(["eval", "taste"]) == 2
    assert "invalid choice: 'taste'" in capsys.readouterr().err


HELP = """
import contextlib, io, sys
from unimm.cli import main
from unimm.evaluation.suites import ALL, SUITES
for suite in (*SUITES, ALL):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main(["eval", suite, "--help"])
    assert f"usage: unimm eval {suite} " in text.getvalue(), suite
print([name for name in ("accelerate", "torch", "transformers") if name in sys.modules])
"""


def test_the_help_of_every_suite_comes_without_torch() -> None:
    run = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_all_runs_every_suite_and_says_what_the_others_lack(
    tokenizer_folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer alone can be measured on images; it can neither draw nor answer."""
    arguments = ["--model", str(tokenizer_folder), "--output", str(tmp_path), "--source", str(images)]
    arguments += ["--data", str(tmp_path / "nowhere")]
    assert main(["eval", "all", *arguments]) == 2
    assert "holds 5 images and 1000 are asked for" in capsys.readouterr().err
    assert main(["eval", "all", *arguments, "--num-images", "0"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    lacking = ["cannot answer or draw", "--detector is not given", "Give either --dpg-csv FILE (dpg_bench.csv from"]
    lacking += ["Name two sets: --samples", "There is no folder"]
    places = [error.index(said) for said in lacking]
    assert error.startswith("unimm: error: 5 of 6 suites did not run: shapes: ") and places == sorted(places)
    assert (tmp_path / "tok/report.html").exists() and not (tmp_path / "shapes").exists()


def test_all_hands_each_suite_what_is_its_own(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def note(argv: list[str]) -> list[str]:
        ran.append(argv)
        return argv

    def leave_runs(argv: list[str]) -> None:
        if "--output" in argv and "und" in argv[argv.index("--output") + 1]:  # leaves a run for each of its tasks
            for task in ("gqa", "mme"):
                folder = Path(argv[argv.index("--output") + 1]) / task
                folder.mkdir(parents=True)
                (folder / "manifest.json").write_text("{}")

    for suite in SUITES.values():
        monkeypatch.setattr(importlib.import_module(f"{suite.package}.arguments"), "parse", note)
        monkeypatch.setattr(importlib.import_module(f"{suite.package}.command"), "run", leave_runs)
    given = ["--model=M", "--num-images=5", "--dpg-csv=D", "--vqa-model=J", "--samples=S", "--reference=R", "--data=L"]
    assert main(["eval", "all", "--output", str(tmp_path), "--source", str(images), *given]) == 0
    assert [argv[:-2] for argv in ran if argv[-2] == "--output" and argv[0].startswith("--")] == [
        ["--model=M", f"--source={images}", "--num-images=5"],
        ["--model=M"],
        ["--model=M"],
        ["--model=M", "--dpg-csv=D", "--vqa-model=J"],
        ["--samples=S", "--reference=R"],
        ["--model=M", "--data=L"],
    ]
    pages = [argv[-1] for argv in ran if not argv[0].startswith("--")]
    assert pages == [str(tmp_path / "und" / task / "report.html") for task in ("gqa", "mme")]
