"""The image-world benchmark: its judgement on oracles, its numbers on a tiny random model, its driver."""

import importlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from eval.wobble import wobbling_image
from tests.mllm.tiny import image_tokenizer, unified
from unimm.data.shapes import TAGS, WITHHELD, Scene, SceneObject, render, sample_prompt
from unimm.data.shapes.prompts import scene_for, split_of
from unimm.errors import UserError, run_main
from unimm.evaluation.runs.html_report import write_report
from unimm.evaluation.runs.records import read_records, read_summary
from unimm.evaluation.shapes import run as shapes
from unimm.evaluation.shapes.arguments import ALL_PARTS, PARTS, ShapesPlan
from unimm.evaluation.shapes.run import (
    QUESTION_KINDS,
    evaluate_chat,
    evaluate_generation,
    evaluate_reconstruction,
    held_out_prompts,
    strict_scores,
)
from unimm.tokenizer import ImageTokenizerProcessor

PLAN = ShapesPlan(num_scenes=6, codebook_scenes=10, questions=3, prompts=2, images_per_prompt=2, batch_size=4)
TINY_RUN = [
    f"--{name}={value}" for name, value in {"num-scenes": 3, "codebook-scenes": 4, "questions": 2, "prompts": 1}.items()
]
main = importlib.import_module("eval.shapes").main


class Mirror:
    """A tokenizer whose decoder gives back the last images, after `damage`; the ids of each are 0, 1, 2, 3."""

    device = torch.device("cpu")
    config = SimpleNamespace(codebook_size=8, grid=(8, 8))

    def __init__(self, damage: Any = lambda pixels: pixels) -> None:
        self.damage = damage

    def encode(self, pixel_values: Tensor) -> SimpleNamespace:
        self.shown = pixel_values
        return SimpleNamespace(ids=torch.arange(4).repeat(len(pixel_values), 1))

    def denormalize(self, pixel_values: Tensor) -> Tensor:
        return pixel_values

    def decode(self, ids: Tensor) -> Tensor:
        return self.damage(self.shown[: len(ids)])


def as_pixels(images: list[Image.Image], return_tensors: str) -> BatchFeature:
    arrays = np.stack([np.asarray(image) for image in images])
    return BatchFeature({"pixel_values": torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255})


# ---- judgement on oracles ----------------------------------------------------------------------------------------


def test_reconstruction_of_a_faint_mirror_is_right() -> None:
    scores, rows = evaluate_reconstruction(Mirror(lambda pixels: pixels - 2 / 255), as_pixels, PLAN)
    assert len(rows) == PLAN.num_scenes
    assert scores["agreement"] == 1
    assert strict_scores("reconstruction", rows) == {"agreement": 1}
    assert scores["psnr"] == pytest.approx(20 * np.log10(255 / 2), abs=0.01)
    assert 0.99 < scores["ssim"] <= 1
    assert scores["psnr_mean_color"] < 30
    assert (scores["codebook_use"], scores["perplexity"]) == (0.5, pytest.approx(4))


def test_reconstruction_that_loses_the_objects_is_wrong() -> None:
    scores, rows = evaluate_reconstruction(
        Mirror(lambda pixels: pixels[..., :1, :1].expand_as(pixels)), as_pixels, PLAN
    )
    assert scores["agreement"] == 0
    assert strict_scores("reconstruction", rows) == {"agreement": 0}
    assert all(row["expected"] and not row["found"] for row in rows)


def test_ragged_reconstructions_are_right_for_the_first_detector_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges that run in and out by 0.55 px: the objects are there, and not crisp."""
    rng, scenes = np.random.default_rng(0), list[Scene]()
    sample = shapes.sample_scene

    def remember(*args: Any) -> Scene:
        scenes.append(sample(*args))
        return scenes[-1]

    def ragged(pixels: Tensor) -> Tensor:
        images = [Image.fromarray(wobbling_image(scene, rng, 0.8)[0]) for scene in scenes[-len(pixels) :]]
        return as_pixels(images, "pt")["pixel_values"]

    monkeypatch.setattr(shapes, "sample_scene", remember)
    plan = ShapesPlan(num_scenes=40, codebook_scenes=1, batch_size=40)
    scores, rows = evaluate_reconstruction(Mirror(ragged), as_pixels, plan)
    strict = strict_scores("reconstruction", rows)
    assert scores["agreement"] >= 0.75
    assert strict["agreement"] <= 0.4
    assert all(bool(row["refusals"]) >= (not row["strict"] and row["correct"]) for row in rows)
    crisp = evaluate_reconstruction(Mirror(), as_pixels, plan)[1]
    assert strict_scores("reconstruction", crisp) == {"agreement": 1}


def test_a_drawing_that_shows_more_than_its_prompt_is_strictly_wrong() -> None:
    prompt = next(p for p in held_out_prompts(PLAN, "colors"))
    (rule,) = prompt.include
    asked = SceneObject(rule["class"], rule["color"], 16, 16, 10)
    other = SceneObject("square", "purple", 46, 46, 9)
    for objects, strict in (((asked,), True), ((asked, other), False)):
        row = shapes.score_drawing(prompt, render(Scene(objects, "white")))
        assert row["correct"]
        assert row["strict"] == strict == (not row["refusals"])


def test_mean_colour_reconstruction_scores_as_the_baseline() -> None:
    paint = shapes.mean_color_per_patch
    scores, _ = evaluate_reconstruction(Mirror(lambda pixels: paint(pixels, 8)), as_pixels, PLAN)
    assert scores["psnr"] == pytest.approx(scores["psnr_mean_color"], abs=1e-6)


def test_more_compared_scenes_than_counted_ones() -> None:
    _, rows = evaluate_reconstruction(Mirror(), as_pixels, ShapesPlan(num_scenes=7, codebook_scenes=1, batch_size=3))
    assert len(rows) == 7


@pytest.mark.parametrize(("draws_what_is_asked", "score"), [(True, 1.0), (False, 0.0)])
def test_generation_of_an_oracle(monkeypatch: pytest.MonkeyPatch, draws_what_is_asked: bool, score: float) -> None:
    asked = {p.prompt: p for tag in (*TAGS, None) for p in held_out_prompts(PLAN, tag)}
    rng = np.random.default_rng(0)

    def draw(
        model: Any, processor: Any, prompts: list[str], seeds: list[int], count: int, **sampling: Any
    ) -> list[Image.Image]:
        if not draws_what_is_asked:
            return [Image.new("RGB", (64, 64), "white")] * (len(prompts) * count)
        return [render(scene_for(rng, asked[prompt])) for prompt in prompts for _ in range(count)]

    monkeypatch.setattr(shapes, "draw_prompts", draw)
    scores, rows = evaluate_generation(None, None, PLAN)
    assert scores == strict_scores("generation", rows) == dict.fromkeys((*TAGS, "overall", "withheld"), score)
    assert len(rows) == 7 * PLAN.prompts * PLAN.images_per_prompt
    assert all(row["reasons"] for row in rows) != draws_what_is_asked


def test_images_are_judged_by_their_own_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first image of each prompt is right: half of the images, whatever the batches."""
    asked = {p.prompt: p for tag in (*TAGS, None) for p in held_out_prompts(PLAN, tag)}
    rng = np.random.default_rng(0)

    def draw(
        model: Any, processor: Any, prompts: list[str], seeds: list[int], count: int, **sampling: Any
    ) -> list[Image.Image]:
        white = Image.new("RGB", (64, 64), "white")
        return [image for prompt in prompts for image in (render(scene_for(rng, asked[prompt])), white)]

    monkeypatch.setattr(shapes, "draw_prompts", draw)
    for size in (1, 4, 7, 64):
        scores, _ = evaluate_generation(None, None, ShapesPlan(prompts=2, images_per_prompt=2, batch_size=size))
        assert set(scores.values()) == {0.5}


def test_chat_counts_right_answers_per_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[Any] = []
    sample = shapes.sample_questions

    def remember(rng: np.random.Generator, kind: str) -> Any:
        turns.append(sample(rng, kind)[1])
        return sample(rng, kind)[0], turns[-1]

    def answer(model: Any, processor: Any, questions: list[Any]) -> list[str]:
        now = [turns.pop(0) for _ in questions]
        return ["who knows" if turn.kind == "count" else f"{turn.answer.upper()}." for turn in now]

    monkeypatch.setattr(shapes, "sample_questions", remember)
    monkeypatch.setattr(shapes, "answer_questions", answer)
    scores, rows = evaluate_chat(None, None, PLAN)
    assert scores == {"existence": 1, "color": 1, "count": 0, "position": 1}
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(QUESTION_KINDS, PLAN.questions)


# ---- what is asked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", TAGS)
def test_prompts_are_held_out_and_distinct(tag: str) -> None:
    prompts = held_out_prompts(ShapesPlan(prompts=20), tag)
    assert len({prompt.prompt for prompt in prompts}) == 20
    assert all(split_of(prompt.prompt) == "test" and prompt.tag == tag for prompt in prompts)
    named = {(rule.get("color"), rule["class"]) for prompt in prompts for rule in prompt.include}
    assert not named & WITHHELD


def test_withheld_prompts_all_name_a_withheld_pair() -> None:
    for prompt in held_out_prompts(ShapesPlan(prompts=20), None):
        assert {(rule.get("color"), rule["class"]) for rule in prompt.include} & WITHHELD


def test_prompts_repeat_only_when_there_are_no_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = [sample_prompt(np.random.default_rng(seed), "colors", split="test") for seed in range(3)]
    monkeypatch.setattr(shapes, "sample_prompt", lambda rng, *args, **kwargs: pool[int(rng.integers(3))])
    prompts = [prompt.prompt for prompt in held_out_prompts(ShapesPlan(prompts=5), "colors")]
    assert len(prompts) == 5
    assert set(prompts) == {prompt.prompt for prompt in pool}


def test_plan_is_a_function_of_its_seed() -> None:
    texts = [[p.prompt for p in held_out_prompts(ShapesPlan(prompts=5, seed=seed), "position")] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(UserError, match="questions is 0; it must be at least 1"):
        ShapesPlan(questions=0)


# ---- a tiny random model -----------------------------------------------------------------------------------------


def test_drawings_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = unified()
    images: dict[int, list[bytes]] = {}
    scorer = shapes.score_drawing
    for size in (2, 6):
        seen = images.setdefault(size, [])

        def remember(prompt: Any, image: Image.Image, seen: list[bytes] = seen) -> dict[str, Any]:
            seen.append(image.tobytes())
            return scorer(prompt, image)

        monkeypatch.setattr(shapes, "score_drawing", remember)
        evaluate_generation(model, processor, ShapesPlan(prompts=1, images_per_prompt=2, batch_size=size))
    assert images[2] == images[6]
    assert len(set(images[2])) == len(images[2]) == 14


def test_driver_writes_the_named_keys(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result, rows = tmp_path / "shapes.json", tmp_path / "rows.jsonl"
    sizes = [*TINY_RUN, "--images-per-prompt=2", "--seed=3", "--guidance-scale=2", "--temperature=0.7"]
    assert (
        run_main(lambda: main(["--model", str(model_folder), "--json", str(result), "--rows", str(rows), *sizes])) == 0
    )
    written = json.loads(result.read_text())
    assert set(written) == {*PARTS, "strict", "seconds", "seed", "commit"}
    assert set(written["strict"]["generation"]) == set(written["generation"])
    assert set(written["strict"]) == {"reconstruction", "generation"}
    assert set(written["strict"]["reconstruction"]) == {"agreement"}
    measured = {"agreement", "psnr", "psnr_mean_color", "ssim", "codebook_use", "perplexity"}
    assert set(written["reconstruction"]) == measured
    assert set(written["chat"]) == {"existence", "color", "count", "position"}
    assert set(written["generation"]) == {*TAGS, "overall", "withheld"}
    assert set(written["seconds"]) == {"load", *PARTS}
    assert written["seed"] == 3
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert Counter(line["part"] for line in lines) == {"reconstruction": 3, "chat": 8, "generation": 14}
    shown = capsys.readouterr().out
    assert "agreement" in shown
    assert "  strict" in shown
    assert "withheld" in shown


def test_a_kept_run_has_both_detectors_in_its_summary_its_records_and_its_page(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--model", str(model_folder), *TINY_RUN, "--images-per-prompt=1"]
    report, run = tmp_path / "shapes.json", tmp_path / "run"
    main([*arguments, "--json", str(report)])
    main([*arguments, "--output", str(run)])
    summary, records = read_summary(run), read_records(run)
    assert summary["strict"] == json.loads(report.read_text())["strict"]
    scored = [record for record in records if record.verdict is not None and not record.item.startswith("chat")]
    assert len(scored) == 10
    assert all(isinstance(record.raw_scores["strict"], bool) for record in scored)
    scores = {(each.part, each.name): each.interval.value for each in write_report(run, tmp_path / "page.html")}
    assert scores["generation", "strict"] == summary["strict"]["generation"]["overall"]
    assert scores["reconstruction", "strict"] == summary["strict"]["reconstruction"]["agreement"]


def test_driver_measures_a_tokenizer_alone(tokenizer_folder: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--model", str(tokenizer_folder), *TINY_RUN, "--json", "-"]
    assert run_main(lambda: main([*arguments, "--parts", "reconstruction"])) == 0
    written = json.loads(capsys.readouterr().out)
    assert set(written) == {"reconstruction", "strict", "seconds", "seed", "commit"}
    assert run_main(lambda: main(arguments)) == 2
    assert "cannot answer or draw: add --parts reconstruction" in capsys.readouterr().err


def test_tokenizer_alone_scores_as_inside_the_model(model_folder: Path, tmp_path: Path) -> None:
    """The default model's tower and the tokenizer that it was attached to are the same."""
    scores = []
    tokenizer = image_tokenizer()
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    scores.append(evaluate_reconstruction(tokenizer, processor, PLAN)[0])
    result = tmp_path / "result.json"
    sizes = [f"--num-scenes={PLAN.num_scenes}", f"--codebook-scenes={PLAN.codebook_scenes}", "--batch-size=4"]
    main(["--model", str(model_folder), "--parts", "reconstruction", "--json", str(result), *sizes])
    scores.append(json.loads(result.read_text())["reconstruction"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "There is no model folder no/such/folder"),
        (
            ["--parts", "chat,draw"],
            f"--parts names draw; the parts are {', '.join(ALL_PARTS)}.",
        ),
        (["--num-scenes", "0"], "num_scenes is 0; it must be at least 1."),
        (["--rows", "no/such/folder/rows.jsonl"], "its folder does not exist"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert run_main(lambda: main(arguments)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_tokenizer_with_missing_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from safetensors.torch import load_file, save_file

    tokenizer = image_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    ImageTokenizerProcessor.for_tokenizer(tokenizer.config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop(next(name for name in state if name.startswith("decoder")))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert run_main(lambda: main(["--model", str(tmp_path), "--parts", "reconstruction"])) == 2
    assert "weights; missing 1 (decoder" in capsys.readouterr().err
