"""Damage to files as they come from disks, networks and strangers, every piece of it a function of a seed.

For the fuzzers: nothing here knows what the product should say, only how inputs are broken.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ODD_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, -8, 2**31, 2**40, 2**63, 10**30, 0.5, -0.5, 1e-300, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *("", "many", "null", "8", "../../etc/passwd", "org/kernel", "\x00", "\ud800", "x" * 5000),
    *([], [[]], [0], [-8, 8], [9, 9], [1e9, 1e9], ["a", "b"], [None, None], {}, {"a": 1}, {"model_type": "nothing"}),
]
TEMPLATES = [
    "",
    "{{",
    "{% for m in messages %}",
    "{{ messages[9] }}",
    "{{ raise_exception('no') }}",
    "{{ 'x' * 10000000000 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include '/etc/passwd' %}",
    "{{ messages|tojson(indent=99999999) }}",
    "\x00\ud800",
]


def broken_bytes(rng: random.Random, data: bytes) -> bytes:
    """Cut, flip, repeat, insert or exchange bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        if not data:
            return bytes(data)
        place = rng.randrange(len(data))
        length = min(rng.choice([1, 1, 2, 4, 16, 256]), len(data) - place)
        match rng.randrange(6):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place : place + length] = rng.randbytes(length)
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = data[place : place + length]
            case 4:
                data[place : place + length] = rng.choice([b"\x00", b"\xff", b"\x7f"]) * length
            case 5 if rng.random() < 0.3:
                del data[place:]
    return bytes(data)


def broken_tree(rng: random.Random, tree: Any) -> Any:
    """A JSON tree with one value exchanged, lost, doubled or nested."""
    places = list(_places(tree))
    if not places:
        return rng.choice(ODD_VALUES)
    holder, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1:
            holder[key] = [holder[key]]
        case 2:
            for _ in range(rng.choice([50, 5000])):
                holder[key] = [holder[key]]
        case 3 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * rng.choice([-1, 0, 2, 3, 1000, 0.5]) + rng.choice([0, 1, -1])
        case _:
            holder[key] = rng.choice(ODD_VALUES)
    return tree


def _places(tree: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key) of a tree, down to a depth that no sound one has."""
    if depth == 20 or not isinstance(tree, dict | list):
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree[:50]):
        yield tree, key
        yield from _places(value, depth + 1)


def to_json(tree: Any) -> str:
    """As text, however deep the tree is."""
    try:
        return json.dumps(tree)
    except RecursionError:
        return "[" * 100_000


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def break_json(rng: random.Random, folder: Path) -> str:
    """One value of one settings file."""
    names = sorted(path.name for path in folder.glob("*.json"))
    name = rng.choice([*names, "config.json", "config.json", "config.json"])
    path = folder / name
    tree = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(to_json(broken_tree(rng, tree)), encoding="utf-8", errors="surrogatepass")
    return f"a value of {name}"


def break_field(rng: random.Random, folder: Path) -> str:
    """One field of the configuration, wherever it stands, set to something odd."""
    path = folder / "config.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    holder, key = rng.choice([(holder, key) for holder, key in _places(tree) if isinstance(holder, dict)])
    holder[key] = rng.choice(ODD_VALUES)
    path.write_text(to_json(tree), encoding="utf-8", errors="surrogatepass")
    return f"{key} = {holder[key]!r:.40}"


def break_file(rng: random.Random, folder: Path) -> str:
    """The bytes of one file."""
    path = rng.choice(sorted(folder.iterdir()))
    path.write_bytes(broken_bytes(rng, path.read_bytes()))
    return f"bytes of {path.name}"


def lose_file(rng: random.Random, folder: Path) -> str:
    """One file is lost, empty or another's."""
    files = sorted(folder.iterdir())
    path = rng.choice(files)
    match rng.randrange(4):
        case 0:
            path.unlink()
        case 1:
            path.write_bytes(b"")
        case 2:
            path.write_bytes(rng.choice(files).read_bytes())
        case 3:
            path.write_text(rng.choice(["null", "[]", "{}", "0", '""', "[" * 100_000]))
    return f"{path.name} lost"


def break_weights(rng: random.Random, folder: Path) -> str:
    """One tensor is lost, misshapen, no number, of another type or renamed."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = rng.choice(sorted(weights))
    tensor = weights.pop(name)
    match rng.randrange(6):
        case 0:
            pass
        case 1:
            weights[name] = tensor.flatten()[: max(1, tensor.numel() // 2)].clone()
        case 2:
            weights[name] = torch.full_like(tensor, float("nan"))
        case 3:
            broken = tensor.clone()
            broken.view(-1)[rng.randrange(tensor.numel())] = float("inf")
            weights[name] = broken
        case 4:
            weights[name] = tensor.to(rng.choice([torch.int8, torch.float64, torch.bool]))
        case 5:
            weights["model.other"] = tensor
    save_file(weights, path, {"format": "pt"})
    return f"weight {name}"


def break_index(rng: random.Random, folder: Path) -> str:
    """An index instead of the one file, which may be wrong."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    sound = "model-00001-of-00001.safetensors"
    place = rng.choice(["../model.safetensors", "/etc/passwd", "absent.safetensors", "config.json", "", sound])
    index: Any = {"metadata": {"total_size": rng.choice([1, 2**60, "x"])}, "weight_map": dict.fromkeys(weights, place)}
    if rng.random() < 0.3:
        index = rng.choice([{}, {"weight_map": {}}, {"weight_map": []}, [], None, {"weight_map": {"a": 1}}])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"an index of {place}"


def break_bin(rng: random.Random, folder: Path) -> str:
    """A pickle instead of safetensors."""
    weights: Any = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    match rng.randrange(5):
        case 0:
            torch.save(weights, path)
        case 1:
            torch.save({"model": weights}, path)
        case 2:
            torch.save(list(weights.values()), path)
        case 3:
            path.write_bytes(b"\x80\x02cos\nsystem\nU\x04trueR.")  # runs a command where it is unpickled
        case 4:
            torch.save(weights, path)
            path.write_bytes(broken_bytes(rng, path.read_bytes()))
    return "a .bin"


def break_template(rng: random.Random, folder: Path) -> str:
    """Another chat template, or none."""
    template = rng.choice(TEMPLATES)
    path = folder / "chat_template.jinja"
    if rng.random() < 0.1:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(template.encode("utf-8", "surrogatepass"))
    return f"chat template {template[:40]!r}"


CHECKPOINT_DAMAGE: tuple[Callable[[random.Random, Path], str], ...] = (
    break_json,
    break_field,
    break_field,
    break_file,
    lose_file,
    break_weights,
    break_index,
    break_bin,
    break_template,
)


def damaged_checkpoint(rng: random.Random, sound: Path, target: Path) -> str:
    """Copy the checkpoint to `target` with one thing broken, and say which."""
    shutil.copytree(sound, target)
    return rng.choice(CHECKPOINT_DAMAGE)(rng, target)
