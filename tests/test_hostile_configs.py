"""Settings that no person means: one short sentence, within a moment, whatever the file makes of itself."""

import dataclasses
import runpy
import time
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from unimm.config.loading import load_config
from unimm.config.schema import Count, Range, Rate, Seed, hints_of
from unimm.config.yaml_text import MAX_DEPTH, dump_yaml, load_yaml
from unimm.errors import UserError
from unimm.training.loop.arguments import HostTrainingArguments, StreamTrainingArguments


@dataclass
class Part:
    size: Count = 1
    rate: Rate = 1.0
    shares: list[Annotated[float, Range(least=0, most=1)]] = field(default_factory=list)
    free: dict = field(default_factory=dict)
    name: str | None = None
    limit: Count | None = None


@dataclass
class Recipe:
    part: Part = field(default_factory=Part)
    seed: Seed = 0
    note: str = ""


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

HOSTILE: dict[str, tuple[str, str]] = {
    "a python object": ("note: !!python/object/apply:os.system [ls]", "not valid YAML"),
    "an unknown tag": ("note: !wrong x", "not valid YAML"),
    "a tag that lies": ("note: !!int x", "not valid YAML"),
    "a float that is none": ("note: !!float x", "not valid YAML"),
    "a boolean that is none": ("note: !!bool x", "not valid YAML"),
    "a date that is none": ("note: !!timestamp 2020-99-99", "not valid YAML"),
    "a date": ("note: !!timestamp 2020-01-01", "note .* is a date"),
    "bytes": ("note: !!binary aGVsbG8=", "note .* is a bytes"),
    "a set": ("note: !!set {a, b}", "note .* is a set"),
    "a long tag": (f"note: !{'x' * 50_000} y", "not valid YAML"),
    "a number of 5000 digits": (f"seed: {'1' * 5000}", "not valid YAML: a whole number of 5000 digits"),
    "a number of 70 bits": (f"seed: {2**70}", "not valid YAML: a whole number of 22 digits|more than 64 bits"),
    "a hexadecimal number of 70 bits": (f"seed: {2**70:#x}", "seed in .* is a whole number of more than 64 bits"),
    "1e400": ("part: {rate: 1e400}", r"part\.rate in .* is inf, and must be a finite number"),
    "infinity": ("part: {rate: .inf}", "is inf, and must be a finite number"),
    "not a number": ("part: {free: {deep: [1, {er: .nan}]}}", r"part\.free\.deep\[1\]\.er in .* is nan"),
    "NUL": ('note: "a\\0b"', "holds a character that no text has"),
    "NUL in a base": ('base: "a\\0b"', "holds a character that no text has"),
    "a bare NUL": ("note: a\0b", "not valid YAML"),
    "half a pair": ('note: "\\ud800"', "holds a character that no text has"),
    "half a pair in a key": ('"\\ud800": 1', "a key in .* holds a character"),
    "3000 levels": ("note: " + "[" * 3000 + "]" * 3000, f"nested more than {MAX_DEPTH} deep"),
    "3000 levels of lines": ("\n".join(" " * n + f"k{n}:" for n in range(400)), f"more than {MAX_DEPTH} deep"),
    "aliases that multiply": (LAUGHS + "note: *i", "holds more than 20000 values, with its aliases written out"),
    "an alias in itself": ("note: &a [*a]", r"alias \*a stands before the end"),
    "an alias of nothing": ("note: *a", "alias"),
    "a list as key": ("? [a, b]\n: c", "not valid YAML"),
    "a circle of merges": ("note: &a {<<: *a}", "alias"),
    "a long file": ("note: " + "x" * 200_000, "more than 100000"),
    "many keys": ("\n".join(f"k{n}: 1" for n in range(9000)), "Unknown key k0"),
    "a long key": (f"{'k' * 900}: 1", "Unknown key k+ in"),
    "a long wrong value": (f"seed: {'x' * 90_000}", "seed in .* expected int"),
    "a large wrong value": (f"seed: [{'1, ' * 9000}]", "seed in .* expected int"),
}


def refused(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    start = time.perf_counter()
    with pytest.raises(UserError) as error:
        load_config(Recipe, path, overrides)
    assert time.perf_counter() - start < 20
    assert len(str(error.value)) < 1000 + len(str(path)), "a message is a sentence"
    return str(error.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path: Path, name: str) -> None:
    import re

    text, message = HOSTILE[name]
    assert re.search(message, refused(tmp_path, text)), name


@pytest.mark.parametrize("name", ["a python object", "1e400", "a number of 5000 digits", "NUL", "3000 levels"])
def test_hostile_overrides(tmp_path: Path, name: str) -> None:
    text = HOSTILE[name][0].partition(": ")[2]
    assert "Override" in refused(tmp_path, "note: x", (f"note={text}",))


def test_an_override_of_3000_keys(tmp_path: Path) -> None:
    assert f"nested more than {MAX_DEPTH} deep" in refused(tmp_path, "note: x", (f"part.free.{'a.' * 3000}b=1",))


def test_bases_without_end(tmp_path: Path) -> None:
    for n in range(60):
        (tmp_path / f"{n}.yaml").write_text(f"base: {n + 1}.yaml")
    assert "base of more than 20 files" in refused(tmp_path, "base: 0.yaml")
    assert "more than 100000" in refused(tmp_path, "base: /dev/zero")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    assert "Cannot read the configuration" in refused(tmp_path, "base: loop.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("part: {size: 0}", r"part\.size in .* is 0, and must be at least 1\."),
        ("part: {size: -3}", r"is -3, and must be at least 1"),
        ("part: {limit: 0}", r"part\.limit in .* is 0, and must be at least 1"),
        ("part: {rate: 0}", r"part\.rate in .* is 0\.0, and must be above 0"),
        ("part: {rate: -1e-4}", r"is -0\.0001, and must be above 0"),
        ("part: {shares: [0.5, 1.5]}", r"part\.shares\[1\] in .* is 1\.5, and must be at least 0 and at most 1"),
        ("seed: -1", r"seed in .* is -1, and must be at least 0 and at most 4294967295"),
        ("seed: 4294967296", r"is 4294967296, and must be"),
    ],
)
def test_numbers_out_of_their_range(tmp_path: Path, text: str, message: str) -> None:
    import re

    assert re.search(message, refused(tmp_path, text))


def test_an_unknown_key_shows_the_three_nearest(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lerning_rate: 1")
    with pytest.raises(UserError) as error:
        load_config(HostTrainingArguments, tmp_path / "run.yaml")
    near = str(error.value).rpartition("nearest: ")[2].rstrip(".").split(", ")
    assert near[0] == "learning_rate" and len(near) == 3


RECIPES = {
    "vfm": "VFMConfig",
    "tokenizer": "TokenizerRecipe",
    "encode": "EncodeRecipe",
    "c2i": "C2IRecipe",
    "sft": "SFTRecipe",
    "t2i": "T2IRecipe",
    "publish": "PublishRecipe",
}


def numbers(hint: Any, ranged: bool = False) -> list[bool]:
    """For each number within an annotation whether it has a range."""
    if typing.get_origin(hint) is Annotated:
        inner, *rest = typing.get_args(hint)
        return numbers(inner, ranged or any(isinstance(each, Range) for each in rest))
    if hint in (int, float):
        return [ranged]
    return [found for each in typing.get_args(hint) for found in numbers(each, ranged)]


def dataclasses_in(cls: Any) -> set[Any]:
    found = {cls}
    for hint in hints_of(cls).values():
        for each in [hint, *typing.get_args(hint)]:
            if dataclasses.is_dataclass(each) and isinstance(each, type) and each not in found:
                found |= dataclasses_in(each)
    return found


UNBOUNDED = {"feature_layers"}
"""Numbers of which every one means something: layers are counted from either end."""


def test_every_number_of_every_recipe_has_a_range() -> None:
    """Of our own fields all, of Hugging Face's those that decide a run."""
    missing = set()
    for recipe, name in RECIPES.items():
        for cls in dataclasses_in(runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"))[name]):
            foreign = {
                each.name
                for base in cls.__mro__
                if dataclasses.is_dataclass(base) and not base.__module__.startswith(("unimm", "<run_path>"))
                for each in dataclasses.fields(base)
            }
            for key, hint in hints_of(cls).items():
                if key not in foreign | UNBOUNDED and not all(numbers(hint)):
                    missing.add(f"{cls.__name__}.{key}")
    assert not missing
    deciding = ("batch_size", "learning_rate", "seed", "accumulation_steps", "max_steps", "save_steps", "eval_steps")
    fields = {f.name for f in dataclasses.fields(StreamTrainingArguments) if f.type in ("int", "float", int, float)}
    assert {name for name in fields if name.endswith(deciding)} <= {
        name for name, hint in hints_of(StreamTrainingArguments).items() if numbers(hint) and all(numbers(hint))
    }


@pytest.mark.parametrize(
    ("recipe", "config", "override"),
    [
        ("t2i", "t2i", "train.per_device_train_batch_size=0"),
        ("t2i", "t2i", "train.learning_rate=0"),
        ("sft", "sft", "train.seed=-1"),
        ("sft", "sft", "train.max_steps=-5"),
        ("sft", "sft", "data.flows.conversation.ratio=-1"),
        ("vfm", "vfm", "train.gradient_accumulation_steps=-2"),
        ("tokenizer", "stage1", "train.learning_rate=-1e-3"),
        ("tokenizer", "stage2", "loss.gan.learning_rate=0"),
        ("tokenizer", "stage1", "train.log_steps=0"),
        ("c2i", "c2i", "data.batch_size=0"),
        ("encode", "encode", "data.rows_per_shard=-1"),
    ],
)
def test_recipes_refuse_them(recipe: str, config: str, override: str) -> None:
    cls = runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"))[RECIPES[recipe]]
    with pytest.raises(UserError, match=f"{override.partition('=')[0]} in .*, and must be "):
        load_config(cls, ROOT / f"configs/debug/{config}.yaml", [override])


WORDS = st.sampled_from(
    ["part", "seed", "note", "size", "free", "base", "&a ", "*a", "<<: *a", "!!int ", "!x ", "!!set ", "? "]
)
PIECES = st.sampled_from(
    [": ", "\n", "\n  ", "- ", "[", "]", "{", "}", ", ", '"', "\\0", "\0", "1e999", ".nan", "0x", "|", ">", "%", "#"]
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WORDS | PIECES | st.text(max_size=4), max_size=14).map("".join))
def test_whatever_a_file_says_is_a_configuration_or_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        recipe = load_config(Recipe, path)
    except UserError as error:
        assert len(str(error)) < 1000 + len(str(path))
        return
    assert 0 <= recipe.seed < 2**32 and recipe.part.size >= 1


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
    | st.sampled_from(["no", "010", "1:30", "1e5", "0o7", "~", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(PLAIN)
def test_what_is_written_is_read_back(tree: Any) -> None:
    assert load_yaml(dump_yaml(tree), "it") == tree
