"""The doors that files come in by, for the fuzzer: a sound input each, how it is broken, and how it is used."""

import io
import json
import random
import runpy
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from tests import mutations
from tests.conftest import ROOT
from tests.data.conftest import png, rows_as_members, tar_bytes
from tests.fuzz_generation import Generations
from tests.mllm import tiny
from unimm.chat import ChatSession
from unimm.config.loading import load_config
from unimm.data.bad_rows import UsableRows
from unimm.data.images import load_image
from unimm.data.sources.llava import LlavaOptions, open_llava
from unimm.data.sources.registry import open_images
from unimm.mllm import attach, load
from unimm.tokenizer.loading import load_with_processor


class Surface(Protocol):
    """One kind of input."""

    def damage(self, rng: random.Random, folder: Path) -> str:
        """Write a broken input into the empty `folder`, and say what was broken."""

    def use(self, folder: Path) -> None:
        """Read it through the public door, and all that it leads to."""


class Images:
    """`load_image` of files in every common format, with EXIF."""

    def __init__(self, folder: Path) -> None:
        noise = Image.effect_noise((24, 16), 60)
        modes: dict[str, Iterable[str]] = {
            "png": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
            "jpeg": ("RGB", "L", "CMYK"),
            "webp": ("RGB", "RGBA"),
            "gif": ("P",),
            "bmp": ("RGB", "L"),
            "tiff": ("RGB", "I;16", "F", "CMYK"),
            "ppm": ("RGB",),
            "ico": ("RGBA",),
        }
        self.sound: list[tuple[str, bytes]] = []
        for kind, each in modes.items():
            for mode in each:
                file = io.BytesIO()
                image = noise.convert("I").convert("I;16") if mode == "I;16" else noise.convert("RGB").convert(mode)
                image.save(file, kind)
                self.sound.append((f"{mode} {kind}", file.getvalue()))

    def damage(self, rng: random.Random, folder: Path) -> str:
        name, data = rng.choice(self.sound)
        file = folder / f"image.{name.split()[-1]}"
        if rng.random() < 0.4:
            with Image.open(io.BytesIO(png(90))) as image:
                kind = rng.choice(["png", "jpeg", "webp"])
                written = io.BytesIO()
                image.save(written, kind, exif=_exif(rng))
            name, data = f"EXIF in {kind}", written.getvalue()
            data = mutations.broken_bytes(rng, data) if rng.random() < 0.3 else data
        else:
            data = mutations.broken_bytes(rng, data)
        file.write_bytes(data)
        return name

    def use(self, folder: Path) -> None:
        for file in folder.iterdir():
            image = load_image(file)
            assert image.mode == "RGB" and min(image.size) > 0


def _exif(rng: random.Random) -> bytes:
    """An EXIF block, its orientation of any type and value, sometimes cut off."""
    order = rng.choice(["<", ">"])
    kind = rng.randrange(14)
    value = rng.choice([struct.pack(f"{order}HH", rng.randrange(12), 0), rng.randbytes(4), b"six\x00", b"\xff" * 4])
    count = rng.choice([1, 1, 1, 0, 2, 4, 2**31, 2**32 - 1])
    entry = struct.pack(f"{order}HHI", rng.choice([0x0112, 0x0112, 0x8769, 0x927C]), kind, count) + value
    entries = entry * rng.choice([1, 1, 3])
    number = rng.choice([len(entries) // 12, 65535])
    block = (b"II*\x00" if order == "<" else b"MM\x00*") + struct.pack(f"{order}I", rng.choice([8, 8, 8, 2**31]))
    block += struct.pack(f"{order}H", number) + entries + struct.pack(f"{order}I", rng.choice([0, 8]))
    block = b"Exif\x00\x00" + block
    return block[: rng.randrange(len(block))] if rng.random() < 0.3 else block


class Yaml:
    """`load_config` of every kind of recipe, with overrides."""

    RECIPES = {
        "tokenizer": ("TokenizerRecipe", "tokenizer/*.yaml"),
        "sft": ("SFTRecipe", "sft/*.yaml"),
        "t2i": ("T2IRecipe", "t2i/*.yaml"),
        "vfm": ("VFMConfig", "*/vfm.yaml"),
        "encode": ("EncodeRecipe", "*/encode.yaml"),
        "c2i": ("C2IRecipe", "*/c2i.yaml"),
    }
    VALUES = (
        *("!!python/object/apply:os.system ['true']", "!!binary x", "!nothing 1", "1e400", "-1", "0", ".nan", "-.inf"),
        *("9" * 5000, "[" * 3000, "{a: " * 1000, "*nothing", "&a [*a]", "\x00", '"\\ud800"', "2026-01-01", "~", "[]"),
        *("{}", "yes", "'", '"', "|", "? a", "a: b: c", "- - -", "0x1F", "1_000", "1e-4", "true", "\t", "%YAML 9.9"),
        "&a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b,*b]",
    )

    def __init__(self, folder: Path) -> None:
        self.sound: list[tuple[str, type, Path]] = []
        for name, (recipe, pattern) in self.RECIPES.items():
            built = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))[recipe]
            self.sound += [(name, built, path) for path in sorted((ROOT / "configs").glob(pattern))]
        self.built: type = self.sound[0][1]

    def damage(self, rng: random.Random, folder: Path) -> str:
        name, self.built, path = rng.choice(self.sound)
        lines = path.read_text(encoding="utf-8").splitlines()
        for _ in range(rng.choice([1, 1, 2, 5])):
            place = rng.randrange(len(lines))
            key, colon, _ = lines[place].partition(":")
            match rng.randrange(6):
                case 0:
                    del lines[place]
                case 1:
                    lines.insert(place, lines[rng.randrange(len(lines))])
                case 2:
                    lines[place] = " " * rng.randrange(5) + lines[place]
                case 3:
                    lines[place] = f"{key}x{colon} 1"
                case _:
                    lines[place] = f"{key}: {rng.choice(self.VALUES)}"
            lines = lines or [""]
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        target = folder / "config.yaml"
        target.write_bytes(mutations.broken_bytes(rng, data) if rng.random() < 0.2 else data)
        return f"{name}: {path.name}"

    def use(self, folder: Path) -> None:
        load_config(self.built, folder / "config.yaml")


class Json:
    """Conversations as LLaVA writes them, a JSON file or JSON lines."""

    def __init__(self, folder: Path) -> None:
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
        self.sound = [{"id": str(n), "image": "a.png", "conversations": turns} for n in range(4)]
        self.sound.append({"id": "text", "conversations": turns[1:] * 2})

    def damage(self, rng: random.Random, folder: Path) -> str:
        (folder / "a.png").write_bytes(png(90))
        tree: Any = json.loads(json.dumps(self.sound))
        for _ in range(rng.choice([1, 1, 3])):
            tree = mutations.broken_tree(rng, tree)
        lines = rng.random() < 0.5 and isinstance(tree, list)
        text = "\n".join(map(mutations.to_json, tree)) if lines else mutations.to_json(tree)
        data = text.encode("utf-8", "surrogatepass")
        target = folder / ("a.jsonl" if lines else "a.json")
        target.write_bytes(mutations.broken_bytes(rng, data) if rng.random() < 0.3 else data)
        return target.name

    def use(self, folder: Path) -> None:
        (path,) = folder.glob("a.json*")
        rows = open_llava(path, LlavaOptions(folder, max_bad_share=1.0))
        for index in range(len(rows)):
            rows.messages(index)


class Tar:
    """Shards of images and captions."""

    def __init__(self, folder: Path) -> None:
        self.members = rows_as_members(range(6))

    def damage(self, rng: random.Random, folder: Path) -> str:
        members = dict(self.members)
        for _ in range(rng.choice([0, 1, 1, 3])):
            name = rng.choice(sorted(members))
            data = members.pop(name)
            match rng.randrange(5):
                case 0:
                    members[name] = mutations.broken_bytes(rng, data)
                case 1:
                    members[rng.choice(["../a.png", "a.b.c.png", "/x.png", ".png", "x", "é.png", "a/" * 60])] = data
                case 2:
                    members[name] = b""
                case 3:
                    members[name.replace(".json", ".txt")] = mutations.to_json(
                        rng.choice(mutations.ODD_VALUES)
                    ).encode()
                case 4:
                    members[f"{name.split('.')[0]}.json"] = mutations.to_json(rng.choice(mutations.ODD_VALUES)).encode()
        data = tar_bytes(members)
        (folder / "a.tar").write_bytes(mutations.broken_bytes(rng, data) if rng.random() < 0.4 else data)
        return f"{len(members)} members"

    def use(self, folder: Path) -> None:
        source = str(folder / "a.tar")
        rows = UsableRows(open_images(source), source, max_bad_share=1.0)
        for index in range(len(rows)):
            rows.usable(index)


class Checkpoints:
    """Unified models, hosts and image tokenizers: loaded, asked and drawn with."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        model, processor = tiny.unified()
        parts: dict[str, tuple[Any, ...]] = {
            "unified": (model, processor),
            "host": (tiny.language_model(), tiny.text_tokenizer()),
            "tokenizer": (model.image_tokenizer, processor.image_processor),
        }
        for name, saved in parts.items():
            for part in saved:
                part.save_pretrained(folder / name)
        self.folder, self.names = folder, ("unified", "unified", "unified", "host", "tokenizer")
        self.image_tokenizer = tiny.image_tokenizer()

    def damage(self, rng: random.Random, folder: Path) -> str:
        name = rng.choice(self.names)
        return f"{name}: {mutations.damaged_checkpoint(rng, self.folder / name, folder / name)}"

    def use(self, folder: Path) -> None:
        (path,) = folder.iterdir()
        if path.name == "host":
            attach(path, self.image_tokenizer)
        elif path.name == "tokenizer":
            tokenizer, image_processor = load_with_processor(path)
            pixel_values = image_processor([tiny.image()], return_tensors="pt")["pixel_values"]
            tokenizer.decode(tokenizer.encode(pixel_values).ids)
        else:
            session = ChatSession(*load(path), max_new_tokens=4)
            session.ask("is there a ring?", tiny.image())
            session.draw("a red circle", seed=0)


SURFACES: dict[str, tuple[Callable[[Path], Surface], int]] = {
    "images": (Images, 1500),
    "yaml": (Yaml, 800),
    "json": (Json, 500),
    "tar": (Tar, 400),
    "checkpoints": (Checkpoints, 400),
    "generations": (Generations, 1000),
}
"""Name -> surface, and how many inputs `make fuzz` tries."""


def cleared(folder: Path) -> Path:
    """The folder, made and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
