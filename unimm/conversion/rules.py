"""Name rules of a checkpoint layout: which tensor of ours each published tensor becomes.

A table of rules must cover every tensor of a checkpoint, so nothing is dropped unless a rule says so.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unimm.errors import UserError

Target = str | Callable[[re.Match[str]], str]
NAMED = 3
"""Names that an error lists."""


def _whole(tensor: Tensor) -> Sequence[Tensor]:
    return (tensor,)


@dataclass(frozen=True)
class Rule:
    """What becomes of the tensors whose whole name matches `pattern`.

    Args:
        pattern: a regular expression.
        targets: our names, one for each part of `split`, with the groups of the match as \\1 or \\g<name>; "NAME[i]" is
            row i of the tensor NAME. Without targets the tensor is not used.
        split: divides a tensor into parts.
        constant: the only value that an unused tensor may hold; None allows any.
    """

    pattern: str
    targets: tuple[Target, ...] = ()
    split: Callable[[Tensor], Sequence[Tensor]] = _whole
    constant: float | None = None

    def apply(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]] | None:
        """Return our names and tensors for one published tensor, None if the rule does not match.

        Raises UserError if an unused tensor is not the constant that makes it superfluous.
        """
        found = re.fullmatch(self.pattern, name)
        if found is None:
            return None
        if self.constant is not None and not bool((tensor == self.constant).all()):
            raise UserError(
                f"{name} is expected to be {self.constant:g} everywhere, because nothing trains it; it is not."
            )
        names = [found.expand(each) if isinstance(each, str) else each(found) for each in self.targets]
        return list(zip(names, self.split(tensor), strict=True)) if names else []


def layer(theirs: str, ours: Target, split: Callable[[Tensor], Sequence[Tensor]] = _whole, *more: str) -> Rule:
    """Return the rule for the weight and the bias of a layer; `more` names are those of its further parts."""

    def of(name: Target) -> Target:
        if isinstance(name, str):
            return rf"{name}.\g<kind>"
        return lambda found: f"{name(found)}.{found['kind']}"

    return Rule(rf"{theirs}\.(?P<kind>weight|bias)", tuple(map(of, (ours, *more))), split)


def thirds(tensor: Tensor) -> Sequence[Tensor]:
    """Split a fused query, key and value projection, [3 D, ...]."""
    return tensor.chunk(3)


def renamed(state: Mapping[str, Tensor], rules: Sequence[Rule], source: object) -> dict[str, Tensor]:
    """Return the tensors of `state` under our names, in float32.

    Raises:
        UserError: tensors that no rule covers (with their number and first names), or a row of a tensor is missing.
    """
    tensors: dict[str, Tensor] = {}
    rows: dict[str, dict[int, Tensor]] = {}
    unexpected = []
    for name, tensor in state.items():
        made = next((made for rule in rules if (made := rule.apply(name, tensor)) is not None), None)
        if made is None:
            unexpected.append(name)
            continue
        for ours, part in made:
            if row := re.fullmatch(r"(.+)\[(\d+)\]", ours):
                rows.setdefault(row[1], {})[int(row[2])] = part.float()
            else:
                tensors[ours] = part.float()
    if unexpected:
        raise UserError(
            f"{source} holds {len(unexpected)} unexpected tensors of {len(state)} ({_first(unexpected)}): it has "
            "another layout."
        )
    for ours, parts in rows.items():
        if sorted(parts) == list(range(len(parts))):  # an incomplete tensor is reported as a missing weight
            tensors[ours] = torch.cat([parts[row] for row in range(len(parts))])
    return tensors


def _first(names: Sequence[str]) -> str:
    return ", ".join([*sorted(names)[:NAMED], *(["..."] if len(names) > NAMED else [])])


@dataclass(frozen=True)
class Shapes:
    """The shapes of a checkpoint's tensors by name, from which a model's configuration is read."""

    state: Mapping[str, Tensor]
    source: object

    def of(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor. Raises UserError if it is missing."""
        if name not in self.state:
            raise UserError(
                f"{self.source} has no {name} among its {len(self.state)} tensors ({_first(list(self.state))}): it has "
                "another layout, or misses weights."
            )
        return tuple(self.state[name].shape)

    def count(self, pattern: str) -> int:
        """Return how many different first groups of `pattern` there are among the beginnings of the names."""
        return len({found[1] for name in self.state if (found := re.match(pattern, name))})

    def side(self, count: int, what: str) -> int:
        """Return the side of a square grid of `count` cells. Raises UserError if it is no square."""
        side = round(count**0.5)
        if side**2 != count:
            raise UserError(f"{self.source} has {count} {what}, which do not fill a square grid.")
        return side
