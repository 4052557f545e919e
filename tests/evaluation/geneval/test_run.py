"""GenEval from end to end: the same bytes after kills and in two processes, folders of others, the second scorer."""

import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from PIL import Image

from tests.conftest import ROOT
from tests.evaluation.ranks import FORK, on_two_ranks
from tests.evaluation.tiny_scorers import save_scorer
from unimm.data.shapes import Scene, SceneObject, render
from unimm.errors import UserError
from unimm.evaluation.geneval import command
from unimm.evaluation.geneval import detector as detector_module
from unimm.evaluation.geneval.command import main
from unimm.evaluation.geneval.files import read_folder
from unimm.evaluation.geneval.prompts import official_prompts, to_jsonl
from unimm.evaluation.geneval.rules import COLORS
from unimm.evaluation.geneval.run import DrawnPrompts, GenevalPlan, shapes_track
from unimm.evaluation.geneval.scorers import ShapesScorer
from unimm.evaluation.runs import drawn_images
from unimm.evaluation.runs.records import Record, read_records
from unimm.evaluation.runs.store import RunStore, sample_seed

PROMPTS = [
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"},
    {"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}], "prompt": "a photo of a red ring"},
    {
        "tag": "counting",
        "include": [{"class": "square", "count": 2}],
        "exclude": [{"class": "square", "count": 3}],
        "prompt": "a photo of two squares",
    },
]
COLORED = next(prompt for prompt in official_prompts() if prompt["tag"] == "colors")
NAMED = COLORED["include"][0]["class"]
PLAIN = next(prompt for prompt in official_prompts() if prompt["include"] == [{"class": NAMED, "count": 1}])


@pytest.fixture(autouse=True)
def one_process() -> None:
    PartialState._reset_state()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text(to_jsonl(PROMPTS))
    return path


def drawing(prompts: Path, folder: Path) -> list[str]:
    """The embedded default draws two images of three prompts, two at a time."""
    sizes = ["--num-images=2", "--batch-size=2", "--seed=5"]
    return ["--shapes", "--prompts", str(prompts), "--output", str(folder), *sizes]


def result(folder: Path) -> dict[str, bytes]:
    """Everything that has to be equal."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.name != "timings.jsonl"}


@pytest.fixture(scope="module")
def preserve_rng_state(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    PartialState._reset_state()
    main(drawing(prompts, folder))
    return folder


def run_and_wait(target: Callable[..., Any], *arguments: Any) -> int | None:
    process = FORK.Process(target=target, args=arguments)
    process.start()
    process.join(600)
    return process.exitcode


# ---- a run of the embedded default ---------------------------------------------------------------------------------


def test_a_run_leaves_images_records_and_the_official_lines(preserve_rng_state: Path) -> None:
    names = set(result(preserve_rng_state))
    assert {"manifest.json", "records.jsonl", "summary.json", "geneval_results.jsonl"} < names
    records = read_records(preserve_rng_state)
    assert [record.key for record in records] == [(f"{item:05d}", sample) for item in range(3) for sample in range(2)]
    for record in records:
        assert record.seed == sample_seed(5, "geneval", record.item, record.sample)
        assert record.inputs == PROMPTS[int(record.item)]
        image = Image.open(preserve_rng_state / str(record.output_path)).convert("RGB")
        (found,) = ShapesScorer().detections([image], [record.inputs])
        assert record.raw_scores["detections"] == found
        assert record.verdict == ShapesScorer().verdict(record.inputs, found).correct
    summary = json.loads((preserve_rng_state / "summary.json").read_text())
    right = {record.inputs["tag"]: [] for record in records}
    for record in records:
        right[record.inputs["tag"]].append(record.verdict)
    assert summary["scores"] == {tag: sum(verdicts) / 2 for tag, verdicts in right.items()}
    assert summary["missing_tags"] == ["two_object", "position", "color_attr"]
    lines = [json.loads(line) for line in (preserve_rng_state / "geneval_results.jsonl").read_text().splitlines()]
    assert [line["correct"] for line in lines] == [record.verdict for record in records]
    manifest = json.loads((preserve_rng_state / "manifest.json").read_text())
    assert manifest["settings"]["track"] == "geneval-shapes-own-prompts"
    assert set(manifest["weights"]) == {"model"}


def killed_at_the_third_record(arguments: list[str]) -> None:
    append, written = RunStore.append, []

    def dying(store: RunStore, record: Record, **seconds: float) -> None:
        append(store, record, **seconds)
        written.append(record)
        if len(written) == 3:  # the first of two images that were scored together
            os.kill(os.getpid(), signal.SIGKILL)

    RunStore.append = dying  # type: ignore[method-assign]
    main(arguments)


def kill_between_two_images(prompts: Path, folder: Path) -> None:
    save, saved = drawn_images.save_image_atomically, []

    def dying(image: Image.Image, path: Path) -> Path:
        if len(saved) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        saved.append(path)
        return save(image, path)

    drawn_images.save_image_atomically = dying
    main(drawing(prompts, folder))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(prompts: Path, preserve_rng_state: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run_and_wait(killed_at_the_third_record, drawing(prompts, folder)) == -signal.SIGKILL
    assert len(list((folder / "images").iterdir())) == 4
    assert run_and_wait(kill_between_two_images, prompts, folder) == -signal.SIGKILL
    assert len(list((folder / "images").glob("*.png"))) == 5
    assert not (folder / "summary.json").exists()
    main(drawing(prompts, folder))
    assert result(folder) == result(preserve_rng_state)


def drawing_a_share(prompts: Path, folder: Path) -> None:
    appended = []
    append = RunStore.append

    def counted(store: RunStore, record: Record, **seconds: float) -> None:
        appended.append(record.key)
        append(store, record, **seconds)

    RunStore.append = counted  # type: ignore[method-assign]
    main(drawing(prompts, folder))
    assert len(appended) in (2, 4)  # three blocks of two images


@pytest.mark.slow
def test_two_processes_draw_the_images_of_one(prompts: Path, preserve_rng_state: Path, tmp_path: Path) -> None:
    on_two_ranks(drawing_a_share, prompts, tmp_path / "run")
    assert result(tmp_path / "run") == result(preserve_rng_state)


def test_a_finished_run_draws_nothing_and_other_settings_are_another_run(
    prompts: Path, preserve_rng_state: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run draws again")

    monkeypatch.setattr(drawn_images, "draw_prompts", forbidden)
    before = result(preserve_rng_state)
    main([*drawing(prompts, preserve_rng_state), "--export", str(tmp_path / "official")])
    assert result(preserve_rng_state) == before
    exported = read_folder(tmp_path / "official")
    assert list(exported.prompts.values()) == PROMPTS
    assert len(exported.images) == 6
    with pytest.raises(UserError, match=r"differs in seed \(5, now 6\)"):
        main([*drawing(prompts, preserve_rng_state), "--seed=6"])
    with pytest.raises(UserError, match=r"settings.sampling.guidance_scale \(null, now 2.0\)"):
        main([*drawing(prompts, preserve_rng_state), "--guidance-scale=2"])


# ---- images of somebody else -------------------------------------------------------------------------------------


def image_of(*objects: SceneObject) -> Image.Image:
    return render(Scene(objects=objects, background="white"))


RING = SceneObject("ring", "red", 20, 20, 10)


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """One right and one wrong image of a red ring."""
    place = tmp_path / "given" / "00001"
    (place / "samples").mkdir(parents=True)
    (place / "metadata.jsonl").write_text(json.dumps(PROMPTS[1]))
    image_of(RING).save(place / "samples" / "0000.png")
    image_of(SceneObject("ring", "blue", 20, 20, 10)).save(place / "samples" / "0001.png")
    return place.parent


class ScriptedVQAModel:
    """Answers every question about colors with red, and every other with yes."""

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        assert len(images) == len(questions)
        return ["It is red." if "color" in question else "yes" for question in questions]

    def describe(self) -> dict[str, Any]:
        return {"name": "scripted", "sha256": "scripted's"}


def test_a_folder_is_judged_by_two_judges(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(command, "load_vqa_model", lambda path, device: ScriptedVQAModel())
    folder, report = tmp_path / "run", tmp_path / "report.json"
    arguments = [
        "--shapes",
        "--images",
        str(given),
        "--output",
        str(folder),
        "--json",
        str(report),
        "--vqa-model",
        "any",
    ]
    main(arguments)
    written = json.loads(report.read_text())
    assert (written["track"], written["scorer"]["name"], written["sanity_images"]) == (
        "geneval-own-prompts",
        "shapes",
        13,
    )
    assert written["scores"] == {"colors": 0.5}
    assert written["failed"] == {"color": 1}
    assert written["questions"]["scores"] == {"colors": 1.0}
    assert written["questions"]["mean_answers"] == {"colors": 1.0}
    assert written["scorers_agree"] == 0.5
    assert set(written["seconds"]) == {"load", "sanity_check", "score", "load_vqa", "questions"}
    (parted,) = [json.loads(line) for line in (folder / "disagreements.jsonl").read_text().splitlines()]
    assert (parted["item"], parted["sample"], parted["detector"], parted["questions"]) == ("00001", 1, False, True)
    assert parted["detector_reason"] == "expected red ring>=1, found 0 red; and 1 blue"
    (first, _) = read_records(folder / "questions")
    assert [row["read"] for row in first.raw_scores["answers"]] == ["yes", "red"]
    assert first.scorer == {"name": "scripted", "sha256": "scripted's"}
    main(["--from", str(folder), "--output", str(tmp_path / "again")])  # the same run, from its manifest alone
    for name in ("records.jsonl", "summary.json", "disagreements.jsonl", "questions/records.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    shown = capsys.readouterr().out
    assert "scored by shapes (13 known images scored correctly)" in shown
    assert "the two scorers agree on 50.0% of the images; 1 to look at in disagreements.jsonl" in shown


@pytest.fixture
def small_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A detector that finds up to ten of `NAMED` in any image, at 64 pixels instead of 800, and a CLIP."""
    monkeypatch.setattr(detector_module, "SHORT_SIDE", 64)
    monkeypatch.setattr(detector_module, "LONG_SIDE", 107)
    detector, clip = save_scorer(tmp_path, found=NAMED)
    return ["--detector", str(detector), "--clip", str(clip), "--device=cpu"]


def fill(folder: Path, prompts: Sequence[dict[str, Any]], count: int = 1) -> Path:
    """`count` green images of each prompt in the official layout."""
    for index, prompt in enumerate(prompts):
        place = folder / f"{index:05d}"
        (place / "samples").mkdir(parents=True)
        (place / "metadata.jsonl").write_text(json.dumps(prompt))
        for sample in range(count):
            Image.new("RGB", (40, 30), (0, 255 - sample, 0)).save(place / "samples" / f"{sample:05d}.png")
    return folder


def test_geneval_hf_scores_after_a_known_image_only(tmp_path: Path, small_detector: list[str]) -> None:
    given = fill(tmp_path / "given", [PLAIN, COLORED])
    known = fill(tmp_path / "known", [PLAIN | {"expected": True}])
    wrong = fill(tmp_path / "wrong", [PLAIN | {"expected": False}])
    arguments = ["--images", str(given), "--output", str(tmp_path / "run"), *small_detector]
    with pytest.raises(UserError, match="geneval-hf fails on an image that is known: of 00000/0 .*: right"):
        main([*arguments, "--sanity-images", str(wrong)])
    assert not (tmp_path / "run").exists()
    main([*arguments, "--sanity-images", str(known), "--counting-threshold=0.8"])
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["settings"]["track"] == "geneval"
    assert set(manifest["weights"]) == {"detector", "clip", "images"}
    first, second = read_records(tmp_path / "run")
    assert (first.verdict, first.scorer["name"]) == (True, "geneval-hf")
    assert first.scorer["thresholds"]["counting_threshold"] == 0.8
    assert first.raw_scores["counts"].keys() == {NAMED}
    assert {row["label"] for row in second.raw_scores["detections"]} == {NAMED}
    best = second.raw_scores["detections"][0]
    assert best["color"] in COLORS and 0.49 < best["score"] < 1
    assert second.verdict == (best["color"] == COLORED["include"][0]["color"])


def test_geneval_hf_goes_on_after_a_kill(tmp_path: Path, small_detector: list[str]) -> None:
    given, known = fill(tmp_path / "given", [PLAIN, COLORED], 3), fill(tmp_path / "known", [PLAIN | {"expected": True}])
    arguments = ["--images", str(given), "--sanity-images", str(known), "--batch-size=2", *small_detector]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    main([*arguments, "--output", str(whole)])
    assert run_and_wait(killed_at_the_third_record, [*arguments, "--output", str(broken)]) == -signal.SIGKILL
    assert len((broken / "parts" / "rank-0.jsonl").read_text().splitlines()) == 3
    main([*arguments, "--output", str(broken)])
    assert result(broken) == result(whole)


# ---- instead of scoring --------------------------------------------------------------------------------------------


def test_calibration_of_planted_verdicts(
    unimm_data: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from unimm.evaluation.geneval.human_agreement import human_verdicts, read_annotations
    from unimm.evaluation.runs.records import to_line

    annotations = unimm_data("evaldata/geneval/annotations_sdv2.csv.gz")
    people = human_verdicts(read_annotations(annotations), official_prompts())
    planted = [
        Record("geneval", f"{item:05d}", sample, verdict=verdict.rules ^ (index % 4 == 0))
        for index, ((item, sample), verdict) in enumerate(people.items())
    ]
    (tmp_path / "records.jsonl").write_text("".join(map(to_line, planted)))
    report = tmp_path / "report.json"
    main(["--calibrate", str(annotations), "--verdicts", str(tmp_path), "--json", str(report)])
    found = json.loads(report.read_text())["annotations_sdv2.csv.gz"]
    assert found["rules"]["all"]["agreement"] == 0.75
    assert found["rules"]["all"]["images"] == 400
    assert set(found["caption"]) == {*(prompt["tag"] for prompt in official_prompts()), "all"}
    assert "rules, as most raters have it (the paper's detector: 83%)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--calibrate needs --verdicts DIR"):
        main(["--calibrate", str(annotations)])


def test_the_driver_is_the_same_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["geneval.py", "--output", "run"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "eval" / "geneval.py"), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("geneval: error: --detector is not given")


def test_contamination_and_prompts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "captions.txt").write_text("a photo of a bench\na photo of a red fox and a blue gnome\na walk\n")
    report = tmp_path / "report.json"
    main(["--contamination", str(tmp_path / "captions.txt"), "--json", str(report)])
    found = json.loads(report.read_text())
    assert (found["captions"], found["exact"], found["template_any_class"]) == (3, 1, {"color_attr": 1})
    assert "captions.txt against geneval" in capsys.readouterr().out
    main(["--write-prompts", str(tmp_path / "prompts.jsonl")])
    assert (tmp_path / "prompts.jsonl").read_text() == to_jsonl(official_prompts())


# ---- what is asked -------------------------------------------------------------------------------------------------


def test_a_limit_is_per_tag_and_keeps_the_numbers() -> None:
    track = shapes_track(seed=1, prompts_per_tag=3)
    assert len(track.prompts) == 18
    chosen = GenevalPlan(limit=2, num_images=1).choose(track)
    assert list(chosen) == [f"{index:05d}" for index in range(18) if index % 3 < 2]
    images = DrawnPrompts(None, None, {"00007": {"prompt": "a bench"}}, GenevalPlan(num_images=2), None)
    assert images.keys == [("00007", 0), ("00007", 1)]
    assert shapes_track(seed=1, prompts_per_tag=3) == track != shapes_track(seed=2, prompts_per_tag=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output DIR is not given"),
        (["--output=run"], "--detector is not given, and nothing is fetched unasked"),
        (["--output=run", "--shapes", "--threshold=0.5"], "--shapes has no thresholds: leave out threshold"),
        (["--output=run", "--shapes", "--num-images=0"], "num_images is 0; it must be at least 1"),
        (["--output=run", "--shapes", "--images=none"], "There is no folder none"),
        (["--output=run", "--images=none", "--limit=3"], "that are there already: leave out --limit"),
        (["--output=run", "--shapes", "--prompts=none"], "Cannot read the prompts none"),
        (["--output=run", "--max-objects=0"], "max_objects is at least 1"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        main(arguments)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_prompts_about_what_the_scorer_cannot_find(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(to_jsonl(official_prompts()[:1]))
    with pytest.raises(UserError, match="asks for 'bench', which shapes cannot find: it knows 6 classes"):
        main(["--shapes", "--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "run")])
