"""The flows editing and interleaved: functions of (seed, n), their dropout, rows of others, and labels to the token."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.test_mixture import mixture, plain, text_of
from tests.training.language_model.tiny_host import tiny_host
from unimm.data.editing import Dropout, ShapesEdits, editing
from unimm.data.interleaved import LEAD, ShapesInterleaved
from unimm.data.mixture import FlowConfig
from unimm.data.presence import require_sources
from unimm.data.shapes import render
from unimm.data.shapes.edits import sample_edit
from unimm.data.shapes.things import REFUSAL
from unimm.data.text.collators import IGNORED, FlowCollator
from unimm.data.text_to_image import drawing
from unimm.errors import UserError
from unimm.mllm import UnimmProcessor


@pytest.fixture(scope="module")
def processor() -> UnimmProcessor:
    return tiny_host()[1]


def types(messages: list[dict[str, Any]]) -> list[list[str]]:
    return [[part["type"] for part in turn["content"]] for turn in messages]


# ---- streams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["editing", "interleaved"])
def test_a_sample_is_a_function_of_seed_and_position(kind: str) -> None:
    flow = FlowConfig(kind, **({"null_prompt_prob": 0.2, "null_text_prob": 0.2} if kind == "editing" else {}))
    stream, again = mixture(flow=flow), mixture(flow=flow)
    backwards = [plain(again[index]) for index in reversed(range(12))][::-1]
    assert [plain(stream[index]) for index in range(12)] == backwards
    assert len(set(backwards)) == 12
    assert plain(mixture(seed=1, flow=flow)[0]) != plain(stream[0]) != plain(mixture("test", flow=flow)[0])


def test_an_edit_shows_the_source_and_draws_the_target() -> None:
    for index in range(20):
        messages = ShapesEdits(0).messages(index)
        assert types(messages) == [["text", "image"], ["image"]]
        source, target = (turn["content"][-1]["image"] for turn in messages)
        assert source.size == target.size == (64, 64) and source.tobytes() != target.tobytes()


def test_shuffled_patches_are_copied() -> None:
    """Patches of scenes in random order, most of them of several colors; source and target are the same image."""
    flow, plain = ShapesEdits(0, shuffled_share=0.5), ShapesEdits(0)
    copied = 0
    for index in range(60):
        messages = flow.messages(index)
        source, target = (turn["content"][-1]["image"] for turn in messages)
        if source.tobytes() != target.tobytes() or messages == plain.messages(index):
            assert messages == plain.messages(index)
            continue
        copied += 1
        patches = np.asarray(source).reshape(8, 8, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(64, -1)
        assert (patches.std(1) > 3).mean() > 0.25
        assert text_of(messages)
    assert 18 <= copied <= 42  # 30 +- 3 standard deviations
    assert flow.messages(3) == ShapesEdits(0, shuffled_share=0.5).messages(3)


def test_guidance_drops_the_text_or_text_and_image() -> None:
    flow = ShapesEdits(0, Dropout(0, null_text_prob=0.2, null_prompt_prob=0.1))
    samples = [flow.messages(index) for index in range(400)]
    shapes = [types(messages)[0] for messages in samples]
    assert 20 < shapes.count(["text"]) < 60  # 40 +- 3 standard deviations
    without_text = [text_of(m) == "" and types(m)[0] == ["text", "image"] for m in samples]
    assert 56 < sum(without_text) < 104  # 80 +- 3
    assert all(text_of(m) == "" for m in samples if types(m)[0] == ["text"])
    held_out = mixture("test", edit=FlowConfig("editing", null_prompt_prob=0.5, null_text_prob=0.4))
    assert all(text_of(held_out[index]["messages"]) for index in range(8))
    with pytest.raises(UserError, match="below 1 together"):
        FlowConfig("editing", null_prompt_prob=0.5, null_text_prob=0.5)
    with pytest.raises(UserError, match=r"0\.7 and null_prompt_prob 0\.6"):
        Dropout(0, 0.7, 0.6)


def test_the_recorded_null_prompt_rate_counts_edits() -> None:
    flows = {"edit": FlowConfig("editing", 0.5, null_prompt_prob=0.1), "draw": FlowConfig("drawing", 0.5)}
    assert mixture(**flows).config.null_prompt_prob == pytest.approx(0.05)


def test_answers_are_drawn_and_described_as_asked() -> None:
    samples = [ShapesInterleaved(0).messages(index) for index in range(120)]
    kinds = {"/".join("+".join(turn) for turn in types(each)[1::2]) for each in samples}
    assert kinds == {"image+text", "text+image+text", "image/text", "text"}
    for messages in samples:
        request, answer = messages[0]["content"][0]["text"], messages[1]["content"]
        if len(answer) == 3:
            assert request.endswith("?") and answer[0]["text"] == LEAD
        elif types(messages)[1] == ["text"]:
            assert answer[0]["text"] == REFUSAL
    held_out = {text_of(ShapesInterleaved(0, split="test").messages(index)[:1]) for index in range(120)}
    assert not held_out & {text_of(each[:1]) for each in samples}


def test_interleaved_answers_come_from_shapes_only() -> None:
    with pytest.raises(UserError, match="interleaved answers are made from shapes, and the source is rows.parquet"):
        FlowConfig("interleaved", source="rows.parquet")


# ---- rows of others ----------------------------------------------------------------------------------------------


def png(color: str, size: tuple[int, int] = (96, 64)) -> dict[str, Any]:
    image = io.BytesIO()
    Image.new("RGB", size, color).save(image, "png")
    return {"bytes": image.getvalue(), "path": None}


def write_edits(path: Path, target: str = "target", **changes: Any) -> Path:
    import datasets

    rows = [{"image": png("red"), "text": f"make it {color}", target: png(color)} for color in ("blue", "green")] * 3
    rows[0] |= changes
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def test_edits_of_ones_own(tmp_path: Path) -> None:
    flow = FlowConfig("editing", source=str(write_edits(tmp_path / "edits.parquet")))
    stream = mixture(edit=flow)
    for index in range(6):
        messages = stream[index]["messages"]
        source, target = (turn["content"][-1]["image"] for turn in messages)
        assert source.size == target.size == (64, 64)
        color = text_of(messages).removeprefix("make it ")
        assert source.getpixel((0, 0)) == (255, 0, 0)
        assert target.getpixel((0, 0)) == {"blue": (0, 0, 255), "green": (0, 128, 0)}[color]
    require_sources(stream.config)


def test_edits_in_a_folder_of_images(tmp_path: Path) -> None:
    """As imagefolder's metadata.jsonl: file_name, text and the edited image's file."""
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (64, 64), color).save(tmp_path / name)
    line = {"file_name": "a.png", "text": "make it blue", "target": "b.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    stream = mixture(edit=FlowConfig("editing", source=str(tmp_path)))
    for index in range(3):
        source, target = (turn["content"][-1]["image"] for turn in stream[index]["messages"])
        assert (source.getpixel((0, 0)), target.getpixel((0, 0))) == ((255, 0, 0), (0, 0, 255))


def test_edits_without_targets_are_refused(tmp_path: Path) -> None:
    flow = FlowConfig("editing", source=str(write_edits(tmp_path / "edits.parquet", target="edited")))
    for check in (lambda: mixture(edit=flow), lambda: require_sources(mixture_config(flow))):
        with pytest.raises(UserError, match=r"no column 'target' of edited images; its columns are .*edited"):
            check()
    flow.read.target_column = "edited"
    assert len(mixture(edit=flow).sources[0]) == 6


def mixture_config(flow: FlowConfig) -> Any:
    from unimm.data.mixture import MixtureConfig

    return MixtureConfig(flows={"edit": flow}, num_eval_samples=0)


def test_a_target_of_another_size_is_a_bad_row(tmp_path: Path) -> None:
    path = write_edits(tmp_path / "edits.parquet", target="target", image=png("red", (64, 64)))
    flow = FlowConfig("editing", source=str(path), max_bad_share=0.5)
    texts = [text_of(mixture(edit=flow)[index]["messages"]) for index in range(6)]
    assert len(texts) == 6
    flow = FlowConfig("editing", source=str(path), max_bad_share=0.0)
    with pytest.raises(UserError, match=r"sizes differ.*\(96, 64\) pixels and its source \(64, 64\)"):
        [mixture(edit=flow)[index] for index in range(6)]


# ---- labels ------------------------------------------------------------------------------------------------------


def collated(processor: UnimmProcessor, kind: str, *conversations: Any) -> dict[str, Any]:
    samples = [{"flow": kind, "kind": kind, "index": n, "messages": each} for n, each in enumerate(conversations)]
    return FlowCollator(processor)(samples)[kind]


def test_labels_of_an_edit_are_the_image_tokens_of_its_target(processor: UnimmProcessor) -> None:
    flow = ShapesEdits(0, Dropout(0, null_text_prob=0.3, null_prompt_prob=0.3))
    chosen = {}
    for index in range(40):
        messages = flow.messages(index)
        chosen[len(types(messages)[0]), bool(text_of(messages))] = messages
    assert len(chosen) == 3
    batch = collated(processor, "editing", *chosen.values())
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [16, 16, 16]
    assert batch["drawn"].equal(batch["labels"] != IGNORED)
    assert batch["drawn_pixel_values"].shape[0] == 3 and batch["pixel_values"].shape[0] == 2
    for row, messages in enumerate(chosen.values()):
        target = processor.image_processor(messages[1]["content"][0]["image"], return_tensors="pt")["pixel_values"]
        assert batch["drawn_pixel_values"][row].equal(target[0])
        prompt = batch["input_ids"][row][: batch["drawn"][row].nonzero()[0]]
        asked = processor.apply_chat_template(
            messages[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert prompt.tolist() == [*asked["input_ids"][0].tolist(), processor.boi_token_id]
    without = [len(types(each)[0]) for each in chosen.values()].index(1)
    prompt = batch["input_ids"][without][: batch["drawn"][without].nonzero()[0]]
    assert prompt.tolist() == processor.null_prompt_ids()


def test_changed_patches_of_an_edit_have_their_weight(processor: UnimmProcessor) -> None:
    """The tokens of patches that differ, by brute force over pixels; those of an edit without a source count once."""
    edits = [sample_edit(np.random.default_rng(n), "position") for n in range(4)]
    rows = [editing(render(edit.source), edit.instruction, render(edit.target)) for edit in edits]
    rows.insert(2, drawing("", render(edits[0].target)))
    samples = [{"flow": "edit", "kind": "editing", "index": n, "messages": row} for n, row in enumerate(rows)]
    batch = FlowCollator(processor, changed_weights={"edit": 5.0})(samples)["edit"]
    weights, tokens, patch = batch["label_weights"].view(5, 16), processor.image_grid, 64 // processor.image_grid[0]
    assert weights[2].tolist() == [1.0] * 16
    for n, edit in zip((0, 1, 3, 4), edits, strict=True):
        before, after = (np.asarray(render(scene)).astype(int) for scene in (edit.source, edit.target))
        for token in range(16):
            row, column = (patch * place for place in divmod(token, tokens[1]))
            area = slice(row, row + patch), slice(column, column + patch)
            changed = np.abs(before[area] - after[area]).max()
            assert weights[n, token] == (5.0 if changed >= 32 else 1.0)  # 0.25 of a deviation of 127.5 gray levels
        assert 1 < weights[n].mean() < 5
    plain = FlowCollator(processor)(samples)["edit"]
    assert "label_weights" not in plain and plain["labels_at"].equal(batch["labels_at"])


@pytest.mark.parametrize("marked", [True, False])
def test_labels_of_an_interleaved_answer_are_text_markers_and_image_tokens(marked: bool) -> None:
    """Token for token what generation writes after the prompt: text, begin marker, image tokens, end marker, text."""
    processor = tiny_host()[1]
    found = {}
    for index in range(60):
        messages = ShapesInterleaved(0).messages(index)
        found[str(types(messages))] = messages
    chosen = list(found.values())
    assert len(chosen) == 4
    if not marked:
        template = processor.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        processor.chat_template = template
    batch = collated(processor, "interleaved", *chosen)
    decode, end = processor.tokenizer.decode, "<|im_end|>"
    image = processor.boi_token + processor.image_token * 16 + processor.eoi_token
    for row, messages in enumerate(chosen):
        answers = [turn for turn in messages if turn["role"] == "assistant"]
        written = ["".join(part.get("text", image) for part in turn["content"]) + end for turn in answers]
        labels = batch["labels"][row]
        assert decode(labels[labels != IGNORED]) == "".join(written)
        assert batch["drawn"][row].equal(labels == processor.image_token_id)
        asked = processor.apply_chat_template(
            messages[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )["input_ids"][0]
        first = int((labels != IGNORED).nonzero()[0])
        assert batch["input_ids"][row][:first].equal(asked)
        ids = batch["input_ids"][row][first:]
        assert decode(ids[: len(processor.encode([written[0]])["input_ids"][0])]) == written[0]
    assert len(batch["drawn_pixel_values"]) == 3 and "pixel_values" not in batch
