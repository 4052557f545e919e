"""Imports point one way only. Read from the syntax trees, so imports inside functions count too."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

GROUND = {"errors", "launched", "config", "runs", "saving", "sampling", "noise", "networks", "english", "bfloat16"}
GROUND |= {"field_rules", "checkpoint_files", "registration"}
FOUNDATION = GROUND | {"tokenizer", "data"}
MODELS = FOUNDATION | {"class_conditional", "mllm"}
RULES = GROUND | {"data"}  # what scores without a model

# part of unimm -> the other parts that it may import; the longest matching row counts
ALLOWED: dict[str, set[str]] = {
    "launched": set(),
    "errors": {"launched"},
    "english": set(),
    "bfloat16": set(),
    "runs": {"errors"},
    "field_rules": {"errors"},
    "checkpoint_files": {"errors", "field_rules"},
    "saving": {"errors", "runs", "checkpoint_files", "field_rules"},
    "sampling": {"errors", "config"},
    "noise": {"errors"},
    "networks": {"errors", "runs"},
    "config": {"errors", "runs"},
    "data": GROUND,
    "tokenizer": GROUND | {"data"},  # its processor takes images in as all do, `unimm.data.images`
    "class_conditional": FOUNDATION,
    "encoding": FOUNDATION,
    "mllm": FOUNDATION | {"class_conditional"},
    "training": FOUNDATION | {"class_conditional"},  # a recipe hands it the processor and the panel callback
    "testing": MODELS,
    "chat": MODELS,
    "evaluation": MODELS | {"chat"},
    "conversion": FOUNDATION | {"class_conditional"},
    "export": FOUNDATION | {"mllm"},
    "evaluation.metrics": RULES,
    "atlas": FOUNDATION | {"evaluation"},
    "rewards": MODELS | {"evaluation"},  # a recipe hands them to the trainer as functions
    "demo": MODELS | {"chat", "evaluation"},
    "serving": MODELS | {"chat", "evaluation"},
    "commands": MODELS | {"atlas", "chat", "conversion", "demo", "evaluation", "export", "serving", "training"},
    "cli": {"commands", "errors", "runs"},
    "registration": set(),  # names modules; imports none
    "__init__": {"registration", "tokenizer", "class_conditional", "mllm", "chat"},
}
# a package from outside -> the places that may import it
GUARDED: dict[str, tuple[str, ...]] = {
    "bitsandbytes": ("unimm/training", "recipes"),
    "peft": ("unimm/training", "recipes"),
    "trl": ("unimm/training", "recipes"),
    "gradio": ("unimm/serving",),
    "fastapi": ("unimm/serving",),
    "uvicorn": ("unimm/serving",),
    "gguf": ("unimm/export",),
    "onnx": ("unimm/export",),
    "onnxruntime": ("unimm/export",),
    "onnxscript": ("unimm/export",),
    "ray": ("unimm/serving",),
    "vllm": ("unimm/serving",),
    "lmms_eval": ("unimm/evaluation/understanding", "eval"),
    "recipes": (),
    "eval": ("eval",),
}
SOURCES = sorted(path for folder in ("unimm", "recipes", "eval") for path in (ROOT / folder).rglob("*.py"))


def imports_of(source: str, package: str = "") -> list[tuple[str, bool]]:
    """(dotted name, whether it runs on import) of all that `source` imports; `package` resolves relative imports."""
    tree = ast.parse(source)
    inside = {
        node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        found += [(name, node not in inside) for name in names]
    return found


def broken_arrows(source: str, path: str) -> list[str]:
    """What `source`, standing at `path` relative to the repository, imports against the arrows."""
    parts = Path(path).with_suffix("").parts
    broken = []
    for name, on_import in imports_of(source, ".".join(parts[:-1])):
        top, *rest = name.split(".")
        if top == "unimm" and parts[0] == "unimm" and rest:
            part = parts[1]
            allowed = next(ALLOWED[key] for n in (3, 2) if (key := ".".join(parts[1:n])) in ALLOWED)
            if rest[0] != part and rest[0] in ALLOWED and rest[0] not in allowed:
                broken.append(f"{path} imports {name}")
        if top in GUARDED and not path.startswith(GUARDED[top]):
            broken.append(f"{path} imports {name}")
        if top == "torchvision" and on_import:
            broken.append(f"{path} imports torchvision when it is imported itself")
    return broken


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    assert broken_arrows(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) == []


def test_every_part_of_the_library_has_its_arrows() -> None:
    parts = {path.stem for path in (ROOT / "unimm").glob("*.py")}
    parts |= {path.parent.name for path in (ROOT / "unimm").glob("*/__init__.py")}
    assert parts - set(ALLOWED) == set()


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("unimm/tokenizer/layers.py", "from unimm.mllm import load"),
        ("unimm/tokenizer/layers.py", "from ..mllm import load"),
        ("unimm/data/images.py", "def f() -> None:\n    import unimm.tokenizer.vqrae"),
        ("unimm/mllm/hosts/registry.py", "from unimm import training"),
        ("unimm/evaluation/metrics/frechet.py", "from unimm.tokenizer import VQRAE"),
        ("unimm/chat/session.py", "import peft"),
        ("unimm/demo.py", "from recipes import sft"),
        ("unimm/data/images.py", "import torchvision.transforms"),
    ],
)
def test_a_wrong_arrow_is_found(path: str, source: str) -> None:
    assert len(broken_arrows(source, path)) == 1


def test_right_arrows_pass() -> None:
    assert (
        broken_arrows(
            "from unimm.tokenizer import VQRAE\nfrom .vocabulary import Markers", "unimm/mllm/hosts/registry.py"
        )
        == []
    )
    assert broken_arrows("import trl, unimm.mllm", "recipes/sft.py") == []
