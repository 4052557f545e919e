"""The interface of a reward."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from unimm.errors import UserError

Metadata = Mapping[str, Any]


class Reward(Protocol):
    """A reward of drawn images; larger is better."""

    def score(self, prompts: Sequence[str], metadata: Sequence[Metadata], images: Sequence[Image.Image]) -> list[float]:
        """Return one number for each image; its prompt and the prompt's metadata are at the same index."""
        ...


def require_rules(metadata: Sequence[Metadata], name: str) -> None:
    """Raise UserError unless every prompt carries GenEval's rules, which the reward `name` reads."""
    for each in metadata:
        if "include" not in each or "tag" not in each:
            raise UserError(
                f"The reward {name} reads GenEval's rules, and a prompt has no tag and include: take prompts with "
                "them, or another reward."
            )
