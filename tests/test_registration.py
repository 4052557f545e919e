"""`import unimm` costs nothing, and the Auto classes of transformers read its checkpoints all the same."""

import json
import os
import resource
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT
from unimm.registration import MODULES

DEFAULT = str(ROOT / "unimm/assets/default")
READ = f"""
def read():
    processor = AutoProcessor.from_pretrained({DEFAULT!r})
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained({DEFAULT!r}))
    tower = AutoModel.from_config(model.config.vision_config)
    return [type(part).__name__ for part in (processor, model, tower)]
"""
AUTO = "from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor"

UNIMM_FIRST = f"""
import sys, json
import unimm
found = {{"light": sorted(sys.modules)}}
{AUTO}
AutoConfig.for_model("bert")
found["bert"] = sorted(sys.modules)
{READ}
def by_name():
    return type(AutoImageProcessor.from_pretrained({DEFAULT!r})).__name__

def pickled():
    copied = pickle.loads(pickle.dumps(CONFIG_MAPPING))
    return [copied["vqrae"].__name__, copied["unimm_llava"].__name__]

def owned():
    return {{name: CONFIG_MAPPING[name].__module__ for name in MODULES}}

def others():
    mine = {{name for name, value in CONFIG_MAPPING._extra_content.items() if value.__module__.startswith("unimm.")}}
    return sorted(mine - set(MODULES))

import os, pickle
import torch, transformers.modeling_utils  # what takes seconds comes once, not in each of the copies
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from unimm.registration import MODULES
for step in (read, by_name, pickled, owned, others):  # each in a copy that has seen no model of unimm
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, json.dumps(step()).encode())
        os._exit(0)
    os.close(writer)
    found[step.__name__] = json.loads(open(reader).read())
print(json.dumps(found))
"""

TRANSFORMERS_FIRST = f"""
import sys, json
from concurrent.futures import ThreadPoolExecutor
{AUTO}
import unimm
found = {{"before": [name for name in sys.modules if name.startswith("unimm.")]}}
{READ}
with ThreadPoolExecutor(8) as pool:
    results = [future.result() for future in [pool.submit(read) for _ in range(8)]]
found["read"] = results
print(json.dumps(found))
"""

REFUSED = [
    ["no-such-command"],
    ["generate"],
    ["generate", "x", "--num-images", "0"],
    ["generate", "x", "--output", "no/such/folder/x.gif.unknown"],
    ["chat", "hi", "--image", "nowhere.png"],
    ["chat", "--json", "-"],
    ["reconstruct", "nowhere.png"],
    ["attach", "host", "--image-tokenizer", "tokenizer", "--output", str(ROOT / "tests")],
    ["detach", "--output", str(ROOT / "tests")],
    ["merge", "adapter", "--output", str(ROOT / "tests")],
    ["export", "--generation", "--output", str(ROOT / "tests")],
    ["demo", "--output", str(ROOT / "LICENSE")],
    ["eval", "no-such-suite"],
]
ASKED = [["--help"], ["--version"], *([name, "--help"] for name in ("chat", "generate", "attach", "merge", "export"))]
COMMANDS = """
import json, sys
from unimm.cli import main
found = []
for words in json.loads(sys.argv[1]):
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    found.append([words, code, [name for name in ("torch", "transformers") if name in sys.modules]])
print(json.dumps(found))
"""


def fresh(code: str, *arguments: str) -> Any:
    """The JSON object on the last line of what a fresh interpreter prints."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def unimm_first() -> dict[str, Any]:
    return fresh(UNIMM_FIRST)


PARTS = ["UnimmProcessor", "UnimmLlavaForConditionalGeneration", "VQRAE"]


def test_import_brings_in_neither_torch_nor_transformers(unimm_first: dict[str, Any]) -> None:
    assert not {"torch", "transformers", "numpy", "PIL"} & set(unimm_first["light"])
    assert len([name for name in unimm_first["light"] if name.startswith("unimm")]) <= 3


def test_another_model_does_not_import_unimms(unimm_first: dict[str, Any]) -> None:
    assert "transformers" in unimm_first["bert"]
    assert not {"unimm.mllm", "unimm.tokenizer"} & set(unimm_first["bert"])


def test_auto_classes_read_a_checkpoint_after_import(unimm_first: dict[str, Any]) -> None:
    assert unimm_first["read"] == PARTS


def test_the_table_names_each_model_and_who_registers_it(unimm_first: dict[str, Any]) -> None:
    assert set(unimm_first["owned"]) == set(MODULES) and unimm_first["others"] == []
    for name, module in unimm_first["owned"].items():
        part = ".".join(MODULES[name].split(".")[:2])
        assert module == MODULES[name] or module.startswith(f"{part}.") and part != "unimm.mllm", name


def test_a_mapping_is_pickled_with_its_classes(unimm_first: dict[str, Any]) -> None:
    assert unimm_first["pickled"] == ["VQRAEConfig", "UnimmLlavaConfig"]


@pytest.mark.slow
def test_transformers_may_come_first_and_threads_read_at_once() -> None:
    found = fresh(TRANSFORMERS_FIRST)
    assert found["before"] == ["unimm.registration"]
    assert found["read"] == [PARTS] * 8


def test_a_processor_is_found_by_its_name_alone(unimm_first: dict[str, Any]) -> None:
    assert unimm_first["by_name"] == "ImageTokenizerProcessor"


def test_help_and_refusals_need_no_torch() -> None:
    for words, code, loaded in fresh(COMMANDS, json.dumps(ASKED + REFUSED)):
        assert code == (0 if words in ASKED else 2), words
        assert loaded == [], words


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["generate", "x", "--seed", "-1"]])
def test_help_and_wrong_use_take_under_a_second(words: list[str]) -> None:
    """By the processor's clock, so that other work beside it does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-m", "unimm.cli", *words], capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == (2 if "x" in words else 0) and len((run.stdout + run.stderr).splitlines()) >= 1
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
