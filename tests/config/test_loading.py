"""Configuration files: every mistake is one sentence, and what is written reads back the same."""

import dataclasses
import enum
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from transformers import TrainingArguments

from unimm.config.loading import load_config, parse_recipe_args, save_config
from unimm.errors import UserError, run_main


class Mode(enum.Enum):
    FAST = "fast"
    EXACT = "exact"


@dataclass
class ModelPart:
    hidden_size: int
    ratio: float = 1.0
    kind: Literal["vqrae", "ideal"] = "vqrae"
    grid: tuple[int, int] = (8, 8)
    layers: list[int] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    init_from: str | None = None
    folder: Path | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size must be even, got {self.hidden_size}")


@dataclass
class Recipe:
    model: ModelPart
    train: TrainingArguments = field(default_factory=TrainingArguments)
    note: str = ""
    mode: Mode | str = "fast"


@dataclass
class Renamed:
    FORMER: ClassVar[dict[str, str]] = {"num_pictures": "num_images"}

    num_images: int = 1


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def read(folder: Path, text: str, *overrides: str) -> Recipe:
    return load_config(Recipe, write(folder, text), overrides)


def test_a_former_name_of_a_setting_is_read(tmp_path: Path) -> None:
    assert load_config(Renamed, write(tmp_path, "num_pictures: 3")).num_images == 3
    with pytest.raises(UserError, match="Unknown key num_pictures .*did you mean num_images"):
        load_config(Renamed, write(tmp_path, "num_images: 4"), ["num_pictures=5"])
    with pytest.raises(UserError, match="Unknown key num_images_"):
        load_config(Renamed, write(tmp_path, "num_images_: 3"))


def test_values_become_what_the_annotations_say(tmp_path: Path) -> None:
    text = """
    model: {hidden_size: 1e2, ratio: 3, grid: [4, 2], layers: [1, 2], weights: {mse: 1e-4}, folder: runs/x}
    train: {output_dir: runs/x, learning_rate: 1e-4, lr_scheduler_type: cosine, eval_strategy: no, use_cpu: true}
    note: off
    """
    recipe = read(tmp_path, text)
    assert recipe.model == ModelPart(
        hidden_size=100, ratio=3.0, grid=(4, 2), layers=[1, 2], weights={"mse": 1e-4}, folder=Path("runs/x")
    )
    assert isinstance(recipe.model.hidden_size, int) and isinstance(recipe.model.ratio, float)
    assert recipe.train.learning_rate == 1e-4
    assert recipe.train.lr_scheduler_type.value == "cosine"
    assert recipe.note == "off"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), ("-.5", -0.5), ("1_000.5", 1000.5), ("010", 10.0), ("0x10", 16.0), ("7", 7.0)],
)
def test_numbers_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    assert read(tmp_path, f"model: {{hidden_size: 2, ratio: {text}}}").model.ratio == value


def test_overrides_win_and_make_missing_parents(tmp_path: Path) -> None:
    recipe = read(
        tmp_path, "note: file", "model.hidden_size=4", "model.weights.lpips=1e-1", "note=a=b", "model.init_from=null"
    )
    assert (recipe.model.hidden_size, recipe.model.weights, recipe.note) == (4, {"lpips": 0.1}, "a=b")


def test_base_is_read_first_and_relative_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, "model: {hidden_size: 2, ratio: 5, weights: {a: 1, b: 2}}\nnote: ground", "ground.yaml")
    write(tmp_path, "base: ../ground.yaml\nmodel: {ratio: 6}", "deep/middle.yaml")
    path = write(tmp_path, "base: deep/middle.yaml\nmodel: {weights: {b: 3}}", "top.yaml")
    recipe = load_config(Recipe, path)
    assert (recipe.model.hidden_size, recipe.model.ratio, recipe.note) == (2, 6.0, "ground")
    assert recipe.model.weights == {"a": 1.0, "b": 3.0}


MODEL = "model: {hidden_size: 2}\n"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "model: {hiden_size: 2}",
            (),
            r"key model\.hiden_size in .*did you mean model\.hidden_size\?\); nearest: hidden_size, \w+, \w+\.$",
        ),
        (MODEL + "data: 3", (), r"Unknown key data in .*; nearest: train, \w+, \w+\.$"),
        (
            MODEL + "train: {lerning_rate: 1}",
            (),
            r"Unknown key train\.lerning_rate .*train\.learning_rate\?\); nearest: learning_rate, \w+, \w+\.$",
        ),
        ("model: {hidden_size: two}", (), r"model\.hidden_size in .* is 'two', expected int"),
        ("model: {hidden_size: 2.5}", (), r"model\.hidden_size in .* is 2\.5, expected int"),
        ("model: {hidden_size: true}", (), r"model\.hidden_size in .* is True, expected int"),
        (MODEL + "train: {learning_rate: fast}", (), r"train\.learning_rate in .* is 'fast', expected float"),
        (MODEL, ("model.kind=vae",), r"model\.kind in .* is 'vae', expected one of 'vqrae', 'ideal'"),
        (MODEL, ("model.grid=[1,2,3]",), r"model\.grid in .* has 3 items, expected 2"),
        (MODEL, ("model.layers=[1,x]",), r"model\.layers\[1\] in .* is 'x', expected int"),
        (MODEL, ("model.weights.a=x",), r"model\.weights\.a in .* is 'x', expected float"),
        (MODEL, ("model.frozen=no",), r"model\.frozen in .* is 'no', expected bool"),
        (MODEL, ("model.init_from=3",), r"model\.init_from in .* is 3, expected str or null"),
        (MODEL, ("model=3",), r"model in .* is 3, expected keys of ModelPart \(folder, frozen"),
        (MODEL, ("note",), r"Override 'note' must read key=value"),
        (MODEL, ("note.deep=3", "note.deep.er=4"), r"note\.deep\.er=4.*deep is the value 3"),
        (MODEL, ("note=[",), r"'\[' is not valid YAML"),
        ("note: x", (), r"model is missing in"),
        ("model: {}", (), r"model\.hidden_size is missing in"),
        ("model: {hidden_size: 3}", (), r"model in .*: hidden_size must be even, got 3"),
        (MODEL + "train: {eval_strategy: sometimes}", (), r"train in .*sometimes"),
        (MODEL + "note: a\nnote: b", (), r"key 'note' is given twice"),
        ("- 1", (), r"must hold `key: value` lines, not a list"),
        ("a: [", (), r"is not valid YAML"),
        ("base: absent.yaml", (), r"absent\.yaml: No such file"),
        ("base: run.yaml", (), r"is its own base"),
        ("base: [1]", (), r"base in .* must be the name"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, text: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, text, *overrides)


def test_what_is_saved_reads_back_the_same(tmp_path: Path) -> None:
    text = """
    model: {hidden_size: 4, ratio: 1e-5, init_from: "no", layers: [3], folder: a b}
    train: {output_dir: out, learning_rate: 3e-5, hub_token: secret, use_cpu: true, lr_scheduler_kwargs: {min_lr: 1e-6}}
    note: "1e-4"
    """
    recipe = read(tmp_path, text)
    path = save_config(recipe, tmp_path / "out" / "deeper")
    again = load_config(Recipe, path)
    assert again.model == recipe.model and again.note == "1e-4"
    differing = [
        f.name
        for f in dataclasses.fields(recipe.train)
        if getattr(recipe.train, f.name) != getattr(again.train, f.name)
    ]
    assert differing == ["hub_token"]
    assert "secret" not in path.read_text()
    assert {entry.name for entry in path.parent.iterdir()} == {"config.yaml", "run.json"}
    run = json.loads((path.parent / "run.json").read_text())
    assert {"torch", "transformers", "python"} <= set(run["versions"]) and "commit" in run


def test_recipe_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, MODEL)
    assert parse_recipe_args(Recipe, ["--config", str(path), "note=hello"]).note == "hello"
    with pytest.raises(SystemExit) as stop:
        parse_recipe_args(Recipe, ["--config", str(path), "nota=hello"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and "did you mean note?" in error


def test_run_main_turns_user_errors_into_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("first\n  second")

    assert run_main(fail, name="sft") == 2
    assert capsys.readouterr().err == "sft: error: first second\n"
    assert run_main(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)
