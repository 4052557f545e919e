"""Load YAML files into typed dataclasses, and save them.

One dataclass per recipe holds its whole configuration, with nested dataclasses for its parts:

- every key and type is checked (`unimm.config.schema`); Hugging Face dataclasses (`TrainingArguments`) nest like any
  other and are not re-declared;
- `base: other.yaml` (relative to the file) is loaded first, the file overrides it, and `a.b=c` arguments override both;
  an empty mapping (`config: {}`) replaces the base's;
- YAML is parsed as version 1.2, within size limits (`unimm.config.yaml_text`);
- `save_config` writes the complete configuration, with package versions and the git commit next to it.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from unimm.config.schema import build, known_keys, plain
from unimm.config.yaml_text import MAX_BYTES, dump_yaml, load_yaml, require_plain
from unimm.errors import UserError, one_line, refuse, shown
from unimm.runs.provenance import git_commit, package_versions, write_atomically

T = TypeVar("T")

MAX_BASES = 20


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Load the YAML file at `path`, apply the overrides and build `cls` from the result.

    Args:
        cls: a dataclass; its fields may be nested dataclasses, Optional, list, tuple, dict, Literal, Enum or Path.
        path: a YAML file with one mapping; its key `base` names another file that is loaded first.
        overrides: strings `a.b=c`; `c` is parsed as YAML.

    Raises:
        UserError: an unreadable file, an unknown or missing key, a value of the wrong type, an invalid combination.
    """
    return build(cls, load_tree(path, overrides), key="", source=str(path))


def load_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Load the YAML file at `path` with its bases and apply the overrides, as `load_config` does; nothing is checked
    against a dataclass."""
    tree = _read_with_bases(Path(path), seen=())
    for override in overrides:
        _apply_override(tree, override)
    require_plain(tree, str(path))
    return tree


def parse_recipe_args(cls: type[T], argv: Sequence[str] | None = None) -> T:
    """Parse a recipe's command line, `--config FILE [key=value ...]`; print a `UserError` and exit with code 2."""
    return _parsed(_recipe_parser(cls), cls, argv)[0]


def parse_training_args(cls: type[T], argv: Sequence[str] | None = None) -> tuple[T, bool]:
    """Parse a training recipe's command line as in `parse_recipe_args`; also return whether `--dry-run` was given."""
    parser = _recipe_parser(cls)
    parser.add_argument("--dry-run", action="store_true", help="say what it would train and take, show a batch, end")
    config, arguments = _parsed(parser, cls, argv)
    return config, arguments.dry_run


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports errors like the rest of unimm: one line, printed last (`errors.refuse`)."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise SystemExit(refuse(self.prog, UserError(message)))


def _recipe_parser(cls: type) -> argparse.ArgumentParser:
    parser = _Parser(description=f"Settings: {', '.join(known_keys(cls))} (nested by dots).")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file with the settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file, e.g. train.seed=1")
    return parser


def _parsed(parser: argparse.ArgumentParser, cls: type[T], argv: Sequence[str] | None) -> tuple[T, argparse.Namespace]:
    arguments = parser.parse_intermixed_args(argv)  # overrides may come before, between and after options
    try:
        return load_config(cls, arguments.config, arguments.overrides), arguments
    except UserError as error:
        raise SystemExit(refuse(Path(sys.argv[0]).name, error)) from None


def save_config(
    config: Any, folder: str | Path, name: str = "config.yaml", *, facts: Mapping[str, Any] | None = None
) -> Path:
    """Save the complete `config` to `folder/name`, and versions, git commit, command and `facts` to `folder/run.json`.

    Both files are written atomically. In distributed runs, call it on the main process only. Returns the YAML path.
    """
    folder = Path(folder)
    path = folder / name
    write_atomically(path, dump_yaml(plain(config)))
    run = {"command": sys.argv, "commit": git_commit(), "versions": package_versions(), "facts": dict(facts or {})}
    write_atomically(folder / "run.json", json.dumps(run, indent=2) + "\n")
    return path


def read_saved(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration and the facts that `save_config` wrote to the folder, as plain values.

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


def _read_with_bases(path: Path, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    if len(seen) > MAX_BASES:
        raise UserError(f"{path} is the base of the base of more than {MAX_BASES} files.")
    try:
        if (resolved := path.resolve()) in seen:
            raise UserError(f"{path} is its own base: remove one `base:` of the circle.")
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")
    except (OSError, RuntimeError) as error:  # a loop of symbolic links raises RuntimeError
        reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        raise UserError(f"Cannot read the configuration {path}: {reason}.") from None
    except UnicodeDecodeError:
        raise UserError(f"Cannot read the configuration {path}: not UTF-8 text.") from None
    tree = load_yaml(text, str(path))
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold `key: value` lines, not a {type(tree).__name__}.")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"base in {path} must be the name of one YAML file, got {shown(base)}.")
    return _merged(_read_with_bases(path.parent / base, seen=(*seen, resolved)), tree)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict) and value:
            merged[key] = _merged(below, value)
        else:
            merged[key] = value  # an empty mapping replaces the base's instead of merging into it
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise UserError(f"Override {shown(override)} must read key=value, for example train.seed=1.")
    value = load_yaml(text, f"Override {shown(override)}: {shown(text)}")
    *parents, last = name.strip().split(".")
    for parent in parents:
        below = tree.get(parent)
        tree[parent] = dict(below) if isinstance(below, dict) else {}
        if below is not None and not isinstance(below, dict):
            raise UserError(
                f"Override {shown(override)}: {parent:.80} is the value {shown(below)} and has no keys below it."
            )
        tree = tree[parent]
    tree[last] = value
