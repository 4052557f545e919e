"""Every field of every recipe's settings is read by the recipe, or refused where nothing reads it."""

import ast
import dataclasses
import runpy
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import TrainingArguments

from tests.conftest import ROOT
from tests.test_recipes import RECIPES, run
from unimm.config import loading as configuration
from unimm.config.loading import load_config
from unimm.config.schema import known_keys
from unimm.errors import UserError
from unimm.training.loop.arguments import StreamTrainingArguments

SILENT = {"__post_init__", "__repr__", "__eq__", "_refuse_idle", "refuse_unused", "plain", "build"}
"""Functions of a dataclass or of its reading, whose look at a field is no use of it."""


@pytest.mark.parametrize(
    ("config", "override", "named"),
    [
        ("c2i", "train.max_length=5", "Unknown key train.max_length"),
        ("c2i", "train.pack_length=5", "Unknown key train.pack_length"),
        ("c2i", "train.projector_learning_rate=0.1", "Unknown key train.projector_learning_rate"),
        ("c2i", "train.new_rows_warmup_steps=5", "Unknown key train.new_rows_warmup_steps"),
        ("c2i", "train.use_muon=true", "Unknown key train.use_muon"),
        ("sft", "train.num_train_epochs=2", "Unknown key train.num_train_epochs"),
        ("t2i", "train.label_smoothing_factor=0.1", "Unknown key train.label_smoothing_factor"),
        ("vfm", "train.resume_from_checkpoint=x", "Unknown key train.resume_from_checkpoint"),
        ("stage1", "train.encoder_learning_rate=0.1", "encoder_learning_rate is 0.1, and nothing reads it without"),
        ("stage1", "loss.gan.weight=2", "loss.gan.weight is 2.0, and nothing reads it without loss.gan.start"),
        ("stage1", "loss.distillation_weight=2", "loss.distillation_weight is 2.0"),
        ("stage2", "loss.shallow_mse_weight=2", "loss.shallow_mse_weight is 2.0"),
        ("stage2", "loss.entropy_temperature=2", "without loss.entropy_weight"),
        ("stage2", "model.image_size=32", "model.image_size is 32"),
        ("stage2", "data.caption_template=a {}", "data.caption_template is 'a {}'"),
        ("sft", "data.flows.conversation.null_prompt_prob=0.5", "without kind: drawing"),
        ("sft", "data.flows.conversation.read.min_side=5", "without a source from outside"),
        ("sft", "data.flows.conversation.question=What?", "without kind: captioning"),
        (
            "grpo_qwen3_0.6b",
            "policy.kl_weight=0",
            "policy.kl_correction is False, and nothing reads it without policy.kl_weight",
        ),
        ("grpo", "data.flows.drawing.question_kinds=[color]", "without questions of the shapes data set"),
        ("grpo", "rewards.first.path=some", "rewards.first.path is 'some', and nothing reads it without a kind of"),
        ("encode", "data.label_column=x", "without class_label in data.columns"),
    ],
)
def test_a_field_that_nothing_reads_is_refused(config: str, override: str, named: str) -> None:
    recipe = recipe_class(RECIPES[config])
    with pytest.raises(UserError) as refused:
        load_config(recipe, ROOT / f"configs/debug/{config}.yaml", [override])
    assert named in str(refused.value)


def recipe_class(name: str) -> type:
    """The settings of a recipe: the dataclass that its `main` asks for."""
    found = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))
    (asked,) = [
        node.args[0].id
        for node in ast.walk(ast.parse((ROOT / "recipes" / f"{name}.py").read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("parse_")
        if isinstance(node.args[0], ast.Name)
    ]
    return found[asked]


class Reads:
    """Which fields of the settings are read while a recipe runs, by recipe and dotted name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.found = monkeypatch, defaultdict[str, set[str]](set)
        self.settings: dict[str, list[Any]] = defaultdict(list)
        self.recipe = ""

    def watch(self, instance: Any, prefix: str = "") -> Any:
        cls, names, reads, recipe = type(instance), set(known_keys(instance)), self.found, self.recipe
        original = cls.__getattribute__
        for field in dataclasses.fields(instance):
            value = getattr(instance, field.name)
            for part in value.values() if isinstance(value, dict) else [value]:
                if dataclasses.is_dataclass(part) and not type(part).__module__.startswith("transformers"):
                    self.watch(part, f"{prefix}{field.name}.")

        def get(this: Any, name: str) -> Any:
            if name in names and sys._getframe(1).f_code.co_name not in SILENT:
                reads[recipe].add(f"{prefix}{name}")
            return original(this, name)

        self.monkeypatch.setattr(cls, "__getattribute__", get)
        return instance


def unread(instance: Any, found: set[str], prefix: str = "") -> list[tuple[Any, dataclasses.Field, str]]:
    """The own fields of the settings that were not read, with the dataclass that they belong to."""
    stock = {field.name for field in dataclasses.fields(TrainingArguments)}
    missing = []
    for field in dataclasses.fields(instance):
        name, value = f"{prefix}{field.name}", getattr(instance, field.name)
        if field.name not in known_keys(instance) or (isinstance(instance, TrainingArguments) and field.name in stock):
            continue
        if name not in found:
            missing.append((instance, field, name))
            continue
        for part in value.values() if isinstance(value, dict) else [value]:
            if dataclasses.is_dataclass(part):
                missing += unread(part, found, f"{name}.")
    return missing


@pytest.mark.slow
def test_every_field_is_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reads, load = Reads(monkeypatch), configuration.load_config

    def watched(*arguments: Any) -> Any:
        settings = load(*arguments)
        reads.settings[reads.recipe].append(settings)
        return reads.watch(settings)

    monkeypatch.setattr(configuration, "load_config", watched)
    for step in ("vfm", "ideal", "stage1", "stage2", "stage3", "encode", "c2i", "sft", "t2i", "grpo"):
        reads.recipe = RECIPES[step]
        assert run(RECIPES[step], "--config", str(ROOT / f"configs/debug/{step}.yaml")) == 0
    wrong = []
    for recipe, runs in reads.settings.items():
        for settings in runs:
            for owner, field, name in unread(settings, reads.found[recipe]):
                condition = field.metadata.get("used_when")
                if condition is None or condition(owner):
                    wrong.append(f"{recipe}: {name}")
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_every_stock_field_is_read_by_trainer_or_refused() -> None:
    """By name, in the source of transformers' Trainer and ours: what is read nowhere may not be accepted."""
    library = Path(transformers.__file__).parent
    files = [*library.glob("trainer*.py"), *library.glob("integrations/*.py"), library / "training_args.py"]
    files += [*ROOT.glob("unimm/training/**/*.py"), *ROOT.glob("unimm/runs/processes.py")]
    read = {
        node.attr
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    through_models = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}  # older names, read by __post_init__
    assert set(known_keys(StreamTrainingArguments)) - read - through_models == set()
    stock = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert stock >= StreamTrainingArguments.UNUSED  # none of them was renamed
