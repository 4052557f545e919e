"""YAML -> typed dataclasses, and back.

What a run does stands in one dataclass per recipe, with nested dataclasses for its parts. Special here:

- every key and type is checked (`unimm.typed`); Hugging Face's dataclasses (`TrainingArguments`, `SFTConfig`) nest like
  any other and are not re-declared;
- `base: other.yaml` (relative to the file) is read first and the file is laid over it, then the `a.b=c` overrides; an
  empty mapping (`config: {}`) drops what the base has there;
- YAML is read as version 1.2 means it: `1e-4` is a number, `no` and `off` are words;
- `save_config` writes the whole configuration back, with the versions and the git commit beside it.
"""

import argparse
import json
import re
import sys
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from unimm.errors import USER_ERROR_EXIT_CODE, UserError, one_line
from unimm.provenance import git_commit, package_versions, write_atomically
from unimm.typed import build, known_keys, plain

T = TypeVar("T")


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read the YAML file at `path`, lay the overrides over it and build `cls` from the result.

    Args:
        cls: a dataclass; its fields may be nested dataclasses, Optional, list, tuple, dict, Literal, Enum or Path.
        path: a YAML file holding one mapping; its key `base` names another file that is read first.
        overrides: `a.b=c` each, where `c` is YAML.

    Raises:
        UserError: an unreadable file, an unknown or missing key, a value of the wrong type, a refused combination.
    """
    tree = _read_with_bases(Path(path), seen=())
    for override in overrides:
        _apply_override(tree, override)
    return build(cls, tree, key="", source=str(path))


def parse_recipe_args(cls: type[T], argv: Sequence[str] | None = None) -> T:
    """The command line of every recipe: `--config FILE [key=value ...]`. A `UserError` is printed and exits with 2."""
    return _parsed(_recipe_parser(cls), cls, argv)[0]


def parse_training_args(cls: type[T], argv: Sequence[str] | None = None) -> tuple[T, bool]:
    """`parse_recipe_args` of a recipe that trains, and whether `--dry-run` was given."""
    parser = _recipe_parser(cls)
    parser.add_argument("--dry-run", action="store_true", help="say what it would train and take, show a batch, end")
    config, arguments = _parsed(parser, cls, argv)
    return config, arguments.dry_run


def _recipe_parser(cls: type) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=f"Settings: {', '.join(known_keys(cls))} (nested by dots).")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file with the settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file, e.g. train.seed=1")
    return parser


def _parsed(parser: argparse.ArgumentParser, cls: type[T], argv: Sequence[str] | None) -> tuple[T, argparse.Namespace]:
    arguments = parser.parse_intermixed_args(argv)
    try:
        return load_config(cls, arguments.config, arguments.overrides), arguments
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(USER_ERROR_EXIT_CODE) from None


def save_config(
    config: Any, folder: str | Path, name: str = "config.yaml", *, facts: Mapping[str, Any] | None = None
) -> Path:
    """Write `config` whole into `folder/name` and versions, git commit, command and `facts` into `folder/run.json`.

    Both files appear complete or not at all. Distributed runs call it on the main process only. Returns the YAML path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    write_atomically(path, yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))
    run = {"command": sys.argv, "commit": git_commit(), "versions": package_versions(), "facts": dict(facts or {})}
    write_atomically(folder / "run.json", json.dumps(run, indent=2) + "\n")
    return path


def read_saved(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the facts that `save_config` wrote into the folder, as plain values.

    Raises:
        UserError: a file is missing or damaged.
    """
    tree = _read_with_bases(folder / "config.yaml", seen=())
    try:
        facts: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("facts", {})
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}/run.json, which belongs to the settings beside it, cannot be read: {error}."
        ) from None
    return tree, facts


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers and booleans, refusing a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes by the same rules as `_Loader` reads."""


_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_FLOAT = re.compile(r"^(?:[-+]?(?:\.\d+|\d[\d_]*(?:\.\d*)?)(?:[eE][-+]?\d+)?|[-+]?\.(?i:inf)|\.(?i:nan))$")


def _use_yaml_12(cls: Any) -> None:
    replaced = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    kept = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in replaced]
        for first, resolvers in cls.yaml_implicit_resolvers.items()
    }
    cls.yaml_implicit_resolvers = kept
    cls.add_implicit_resolver(replaced[0], _BOOL, list("tTfF"))
    cls.add_implicit_resolver(replaced[1], _FLOAT, list("-+.0123456789"))


_use_yaml_12(_Loader)
_use_yaml_12(_Dumper)


def _read_with_bases(path: Path, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path} is its own base: remove one `base:` of the circle.")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"Cannot read the configuration {path}: {reason}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}.") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold `key: value` lines, not a {type(tree).__name__}.")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"base in {path} must be the name of one YAML file, got {base!r}.")
    return _merged(_read_with_bases(path.parent / base, seen=(*seen, path.resolve())), tree)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict) and value:
            merged[key] = _merged(below, value)
        else:
            merged[key] = value  # {} takes the place of what is below
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise UserError(f"Override {override!r} must read key=value, for example train.seed=1.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"Override {override!r}: {text!r} is not valid YAML.") from None
    *parents, last = name.strip().split(".")
    for parent in parents:
        below = tree.get(parent)
        tree[parent] = dict(below) if isinstance(below, dict) else {}
        if below is not None and not isinstance(below, dict):
            raise UserError(f"Override {override!r}: {parent} is the value {below!r} and has no keys below it.")
        tree = tree[parent]
    tree[last] = value
