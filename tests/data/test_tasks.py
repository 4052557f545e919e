"""Tasks: pure functions of their position, held-out ones apart from training, and files with a fault on a line."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unimm.data.shapes import render
from unimm.data.shapes.prompts import split_of
from unimm.data.tasks import TaskFlow, Tasks, TasksConfig
from unimm.errors import UserError

BOTH = {"drawing": TaskFlow("drawing", 0.75), "answering": TaskFlow("answering", 0.25)}


def facts(task: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tobytes() if isinstance(value, Image.Image) else value for name, value in task.items()}


def test_a_task_is_a_function_of_its_position_and_shares_hold() -> None:
    one, other = (Tasks(TasksConfig(BOTH, seed=5)) for _ in range(2))
    tasks = [one[n] for n in range(40)]
    assert [facts(other[n]) for n in reversed(range(40))][::-1] == [facts(task) for task in tasks]
    for start in range(0, 40, 8):
        assert sum(task["kind"] == "drawing" for task in tasks[start : start + 8]) == 6
    assert len({task["seed"] for task in tasks}) == 40
    assert facts(Tasks(TasksConfig(BOTH, seed=6))[0]) != facts(tasks[0])
    drawing = next(task for task in tasks if task["kind"] == "drawing")
    assert drawing["metadata"]["prompt"] == drawing["prompt"] and drawing["metadata"]["include"]


def test_held_out_prompts_never_occur_in_training() -> None:
    config = TasksConfig(BOTH, num_eval_samples=30)
    held_out = Tasks(config, split="test")
    assert len(held_out) == 60 and sum(held_out[n]["kind"] == "drawing" for n in range(60)) == 30
    assert {split_of(held_out[n]["prompt"]) for n in range(60) if held_out[n]["kind"] == "drawing"} == {"test"}
    train = Tasks(config)
    assert {split_of(train[n]["prompt"]) for n in range(60) if train[n]["kind"] == "drawing"} == {"train"}


def test_an_edit_carries_its_scenes() -> None:
    flow = TaskFlow("editing", kind_shares={"color": 0.5, "position": 0.5})
    stream = Tasks(TasksConfig({"editing": flow}))
    for task in (stream[n] for n in range(20)):
        edit = task["metadata"]["edit"]
        assert edit.kind in ("color", "position") and task["prompt"] == edit.instruction
        assert task["image"].tobytes() == render(edit.source).tobytes()


def test_prompts_come_in_the_shares_that_are_asked_for() -> None:
    flow = TaskFlow("drawing", kind_shares={"two_object": 3, "counting": 1})
    for split in ("train", "test"):
        stream = Tasks(TasksConfig({"drawing": flow}, num_eval_samples=200), split=split)  # type: ignore[arg-type]
        tags = Counter(stream[n]["metadata"]["tag"] for n in range(200))
        assert tags.keys() == {"two_object", "counting"} and 130 < tags["two_object"] < 170
    wrong = Tasks(TasksConfig({"drawing": TaskFlow("drawing", kind_shares={"three_object": 1})}))
    with pytest.raises(UserError, match="There is no prompt kind 'three_object'; the kinds are single_object"):
        wrong[0]


def test_a_flow_without_a_share_is_evaluated_only() -> None:
    flows = {"answering": TaskFlow("answering", 0.0), "drawing": TaskFlow("drawing", 1.0)}
    config = TasksConfig(flows, num_eval_samples=3)
    assert config.learned == ["drawing"]
    train, held_out = Tasks(config), Tasks(config, split="test")
    assert {train[n]["kind"] for n in range(20)} == {"drawing"}
    assert [held_out[n]["kind"] for n in range(4)] == ["answering", "drawing"] * 2
    assert facts(held_out[0]) == facts(Tasks(TasksConfig(BOTH, num_eval_samples=3), split="test")[0])


def test_repeated_tasks_serve_as_many_steps() -> None:
    once, twice = Tasks(TasksConfig(BOTH)), Tasks(TasksConfig(BOTH), repeats=2, samples_per_step=4)
    assert [twice[n]["index"] for n in range(12)] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    assert facts(twice[9]) == facts(once[5])


def test_tasks_from_files(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    prompts, questions, edits = (tmp_path / f"{name}.jsonl" for name in ("prompts", "questions", "edits"))
    rows = [{"prompt": f"a photo of {n} cats", "tag": "counting", "include": []} for n in range(5)]
    prompts.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    row = {"image": "red.png", "question": "Which color?", "answer": "red"}
    questions.write_text(json.dumps(row), encoding="utf-8")
    edits.write_text(json.dumps({"image": "red.png", "prompt": "make it blue", "note": 1}), encoding="utf-8")
    flows = {
        "drawing": TaskFlow("drawing", source=str(prompts), eval_source=str(prompts)),
        "editing": TaskFlow("editing", source=str(edits), eval_source=str(edits)),
        "answering": TaskFlow("answering", source=str(questions), eval_source=str(questions)),
    }
    stream = Tasks(TasksConfig(flows, num_eval_samples=2))
    assert stream.sizes == {"drawing": 5, "editing": 1, "answering": 1}
    drawings = [task for n in range(30) if (task := stream[n])["kind"] == "drawing"]
    for epoch in (drawings[:5], drawings[5:]):
        assert sorted(task["prompt"] for task in epoch) == [row["prompt"] for row in rows]
    assert drawings[0]["metadata"]["tag"] == "counting"
    answer, edit = (next(task for n in range(3) if (task := stream[n])["kind"] == k) for k in ("answering", "editing"))
    assert edit["prompt"] == "make it blue" and edit["metadata"]["note"] == 1
    assert edit["image"].getpixel((0, 0)) == (255, 0, 0)
    assert answer["image"].getpixel((0, 0)) == (255, 0, 0) and answer["answer"] == "red"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is no JSON object"),
        ('{"text": "a cat"}', "line 1 has no text 'prompt'"),
        ('{"prompt": "a"}\n[1]', "line 2 has no text 'prompt'"),
        ("\n", "holds no task"),
    ],
)
def test_a_damaged_file_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        Tasks(TasksConfig({"drawing": TaskFlow("drawing", source=str(path))}, num_eval_samples=0))


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(UserError, match="data.flows.drawing.eval_source is missing"):
        TasksConfig({"drawing": TaskFlow("drawing", source="prompts.jsonl")})
    with pytest.raises(UserError, match="shapes has a held-out part"):
        TaskFlow("drawing", eval_source="prompts.jsonl")
    with pytest.raises(UserError, match="at least one flow"):
        TasksConfig({})
