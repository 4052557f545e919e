"""Checkpoints from broken disks and from strangers: they work, or one sentence says what is wrong with them."""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests import mutations
from tests.mllm import tiny
from tests.tokenizer.conftest import tiny_vqrae
from unimm.chat import ChatSession
from unimm.errors import UserError
from unimm.mllm import attach, load
from unimm.mllm.doctor import examine
from unimm.tokenizer import VQRAE
from unimm.tokenizer.loading import load_image_tokenizer, load_with_processor

Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A unified model, saved with its processor."""
    folder = tmp_path_factory.mktemp("sound")
    for part in tiny.unified():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock language model, saved with its text tokenizer."""
    folder = tmp_path_factory.mktemp("host")
    tiny.language_model().save_pretrained(folder)
    tiny.text_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def setting(name: str, value: Any, file: str = "config.json") -> Damage:
    """Set a field, `a.b` for a nested one."""

    def damage(folder: Path) -> None:
        path = folder / file
        tree = json.loads(path.read_text())
        *parents, last = name.split(".")
        holder = tree
        for parent in parents:
            holder = holder[parent]
        holder[last] = value
        path.write_text(json.dumps(tree))

    return damage


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def pickled(make: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(make(weights), folder / "pytorch_model.bin")

    return damage


def code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    command = f"touch {folder}/ran"
    pickle = b"\x80\x02cposix\nsystem\nX" + len(command).to_bytes(4, "little") + command.encode() + b"\x85R."
    (folder / "pytorch_model.bin").write_bytes(pickle)


def index(weight_map: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return damage


def weight(value: float) -> Damage:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["model.language_model.model.norm.weight"][3] = value
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return damage


def no_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"] |= {"vocab": {}, "merges": []}
    for number, token in enumerate(tree["added_tokens"]):
        token["id"] = number
    path.write_text(json.dumps(tree))


DAMAGED: dict[str, tuple[Damage, str]] = {
    "a size in words": (setting("text_config.hidden_size", "many"), "text_config.hidden_size is 'many'"),
    "heads of width zero": (setting("text_config.head_dim", 0), "text_config.head_dim is 0"),
    "an epsilon that is no number": (setting("text_config.rms_norm_eps", float("nan")), "rms_norm_eps is nan"),
    "more layers than fit": (setting("text_config.num_hidden_layers", 2**40), "is 1099511627776"),
    "a tower of more layers": (setting("vision_config.encoder_config.num_hidden_layers", 2**40), "is 1099511627776"),
    "more weights than files": (setting("text_config.intermediate_size", 2**20), "describes a model of"),
    "a longer vocabulary": (setting("text_config.vocab_size", 2**24), "describes a model of"),
    "a negative grid": (setting("image_grid", [-8, 8]), r"image_grid is \[-8, 8\]"),
    "another grid": (setting("image_grid", [9, 9]), r"image_grid of config.json is \[9, 9\], and the image tokenizer"),
    "another grid in the processor": (
        setting("image_grid", [9, 9], "processor_config.json"),
        r"image_grid of the processor is \[9, 9\]",
    ),
    "a marker among the image ids": (setting("boi_token_id", 400), "boi_token_id is 400 in config.json"),
    "no marker": (setting("eoi_token_id", None), "eoi_token_id is None in config.json"),
    "an end that is an image id": (setting("eos_token_id", [390], "generation_config.json"), "eos_token_id holds 390"),
    "an endless temperature": (
        setting("image_generation.temperature", float("inf"), "generation_config.json"),
        "temperature is inf",
    ),
    "an unknown way to edit": (
        setting("image_editing", {"speed": 1}, "generation_config.json"),
        "image_editing .* mapping of",
    ),
    "an unknown way to draw": (setting("image_generation.speed", 1, "generation_config.json"), "must be a mapping of"),
    "deviations of zero": (
        setting("image_processor.image_std", [0, 1, 1], "processor_config.json"),
        "image_std is .0, 1, 1., expected a list of 3, each a number above 0",
    ),
    "a kernel from the hub": (setting("attn_implementation", "org/kernel"), "no kernel is fetched"),
    "a kernel inside": (setting("text_config._attn_implementation", "org/kernel"), "no kernel is fetched"),
    "deep nesting": (text("config.json", "[" * 100_000), "config.json is damaged: it is nested too deeply"),
    "no settings": (text("config.json", "null"), "config.json is damaged: it holds a NoneType"),
    "no tokenizer": (text("tokenizer.json", "null"), "tokenizer.json is damaged"),
    "an empty vocabulary": (no_vocabulary, "vocabulary of its text tokenizer is empty"),
    "a list in a .bin": (pickled(lambda weights: list(weights.values())), "is no plain state dict"),
    "a model in a .bin": (pickled(lambda weights: {"model": weights}), "is no plain state dict"),
    "code in a .bin": (code, "other pickles can run code and are not read"),
    "an index of nothing": (index({}), "names no weights"),
    "an index of a list": (index([1]), "has no weight_map"),
    "an index out of the folder": (index({"lm_head.weight": "../weights.safetensors"}), "weights must lie beside it"),
    "an index of an absolute path": (index({"lm_head.weight": "/etc/passwd"}), "weights must lie beside it"),
    "an index of a lost file": (index({"lm_head.weight": "lost.safetensors"}), "names lost.safetensors, which is not"),
    "an infinite weight": (weight(float("inf")), "1 of 32 numbers of .*norm.weight are infinite or NaN"),
    "a weight that is no number": (weight(float("nan")), "1 of 32 numbers of .*norm.weight are infinite or NaN"),
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), "it has no chat template"),
    "a broken template": (text("chat_template.jinja", "{% for m in messages %}"), "chat template cannot render"),
    "a template that says nothing": (text("chat_template.jinja", "x"), "leaves out what was said"),
    "a template without end": (
        text("chat_template.jinja", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        "takes more than 200000 steps",
    ),
    "a template that multiplies": (text("chat_template.jinja", "{{ 'x' * 10000000000 }}"), "makes more than 10000000"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_sentence_soon(name: str, checkpoint: Path) -> None:
    damage, message = DAMAGED[name]
    damage(checkpoint)
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as refused:
        load(checkpoint)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700
    assert time.monotonic() - start < 20
    assert not (checkpoint / "ran").exists()


def test_another_grid_is_found_by_the_doctor_too() -> None:
    model, processor = tiny.unified()
    model.config.image_grid = [9, 9]
    failed = [finding.point for finding in examine(model, processor) if not finding.ok]
    assert "agreement" in failed and "drawing" in failed


def test_plain_state_dicts_go_on_loading(checkpoint: Path, host: Path, tmp_path: Path) -> None:
    before = load(checkpoint)[0].state_dict()
    pickled(dict)(checkpoint)
    after = load(checkpoint)[0].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    old = Path(shutil.copytree(host, tmp_path / "old"))
    pickled(dict)(old)
    model, _ = attach(old, tiny.image_tokenizer())
    rows = tiny.language_model().get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[: len(rows)], rows)


HOSTS: dict[str, tuple[Damage, str]] = {
    "a size in words": (setting("hidden_size", "many"), "hidden_size is 'many'"),
    "heads of width zero": (setting("head_dim", 0), "head_dim is 0"),
    "an epsilon that is no number": (setting("rms_norm_eps", float("nan")), "rms_norm_eps is nan"),
    "more layers than fit": (setting("num_hidden_layers", 2**40), "num_hidden_layers is 1099511627776"),
    "more weights than files": (setting("intermediate_size", 2**20), "describes a model of"),
    "a list in a .bin": (pickled(lambda weights: list(weights.values())), "is no plain state dict"),
    "code in a .bin": (code, "other pickles can run code"),
    "an index of nothing": (index({}), "names no weights"),
    "an index out of the folder": (index({"lm_head.weight": "../weights.safetensors"}), "must lie beside it"),
    "no tokenizer": (text("tokenizer.json", "null"), "tokenizer"),
    "deep nesting": (text("config.json", "[" * 100_000), "nested too deeply"),
}


@pytest.mark.parametrize("name", HOSTS)
def test_damaged_hosts_are_one_sentence(name: str, host: Path, tmp_path: Path) -> None:
    damage, message = HOSTS[name]
    folder = Path(shutil.copytree(host, tmp_path / "host"))
    damage(folder)
    with pytest.raises(UserError, match=message):
        attach(folder, tiny.image_tokenizer())
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["org/repo", "nonsense"])
def test_no_kernel_is_fetched(name: str, checkpoint: Path, host: Path, tmp_path: Path) -> None:
    for door in (
        lambda: load(checkpoint, attn_implementation=name),
        lambda: attach(host, tiny.image_tokenizer(), attn_implementation=name),
        lambda: VQRAE.from_encoder(tmp_path, attn_implementation=name),
    ):
        with pytest.raises(UserError, match="no kernel is fetched from the hub"):
            door()


def test_a_damaged_image_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    tiny_vqrae().save_pretrained(tmp_path)
    for name, value in (
        ("codebook_size", 0),
        ("feature_layer", -8),
        ("codebook_dim", "x"),
        ("encoder_config.num_attention_heads", 0),
    ):
        content = (tmp_path / "config.json").read_text()
        setting(name, value)(tmp_path)
        with pytest.raises(UserError, match=name.split(".")[-1] if value else "codebook|num_attention_heads"):
            load_image_tokenizer(tmp_path)
        (tmp_path / "config.json").write_text(content)
    load_image_tokenizer(tmp_path)


def test_an_image_processor_of_another_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    model, processor = tiny.unified()
    model.image_tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    load_with_processor(tmp_path)
    for name, value, message in (
        ("size", {"height": 0, "width": 16}, "size of the image processor is .*, and the image tokenizer reads 16"),
        ("image_mean", [0.1, 0.5, 0.5], r"image_mean is \[0.1, 0.5, 0.5\] in the image processor"),
    ):
        content = (tmp_path / "preprocessor_config.json").read_text()
        setting(name, value, "preprocessor_config.json")(tmp_path)
        with pytest.raises(UserError, match=message):
            load_with_processor(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text(content)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1))
def test_whatever_is_damaged_works_or_is_one_sentence(seed: int, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / str(seed)
    try:
        mutations.damaged_checkpoint(random.Random(seed), sound, folder)
        session = ChatSession(*load(folder), max_new_tokens=4)
        session.ask("is there a ring?", tiny.image())
        session.draw("a red circle", seed=0)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
