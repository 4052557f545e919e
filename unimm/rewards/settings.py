"""Settings of rewards, and their construction."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from unimm.config.schema import NonNegative, used_when
from unimm.errors import UserError, require_place
from unimm.evaluation.vqa import load_vqa_model
from unimm.rewards.base import Reward
from unimm.rewards.clip import CLIPReward
from unimm.rewards.detectors import GenEvalReward
from unimm.rewards.jpeg import JPEGReward
from unimm.rewards.questions import OwnAnswersReward, VQAReward
from unimm.rewards.shapes import ShapesReward, StrictShapesReward

RewardKind = Literal["shapes", "shapes_strict", "geneval", "clip", "hpsv2", "pickscore", "vqa", "jpeg", "own_answers"]
WITH_WEIGHTS = ("geneval", "clip", "hpsv2", "pickscore", "vqa")
OpenModel = Callable[[], AbstractContextManager[Any]]


@dataclass
class RewardConfig:
    """One reward of the sum.

    Args:
        kind: "shapes", "shapes_strict": GenEval's rules, or what an edit asks for, over the first or the strict
            detector of the shapes data set;
            "geneval": over Mask2Former; "clip", "hpsv2", "pickscore": similarity of image and prompt; "vqa": answers
            of a VQA model; "jpeg": compressibility; "own_answers": answers of the starting model itself.
        weight: factor in the sum.
        path: folder or hub id of the model.
        color_path: of the CLIP that names colors.
        in_shapes: ask in the words of the shapes data set.
    """

    kind: RewardKind
    weight: NonNegative = 1.0
    path: str | None = field(
        default=None, metadata=used_when(lambda c: c.kind in WITH_WEIGHTS, f"a kind of {', '.join(WITH_WEIGHTS)}")
    )
    color_path: str | None = field(default=None, metadata=used_when(lambda c: c.kind == "geneval", "kind: geneval"))
    in_shapes: bool = field(default=False, metadata=used_when(lambda c: c.kind == "own_answers", "kind: own_answers"))

    def __post_init__(self) -> None:
        if self.kind in WITH_WEIGHTS and self.path is None:
            raise UserError(f"The reward {self.kind} needs a model: give path.")
        if self.kind == "geneval" and self.color_path is None:
            raise UserError("The reward geneval needs a CLIP that names colors: give color_path.")

    def require(self, name: str) -> None:
        """Raise UserError if a model of this reward does not exist; `name` is the setting's, for the message."""
        require_place(f"The model {name}.path", self.path)
        require_place(f"The model {name}.color_path", self.color_path)


def build_reward(config: RewardConfig, processor: Any = None, own_model: OpenModel | None = None) -> Reward:
    """Build a reward; `processor` and `own_model` are those of "own_answers"."""
    if config.kind == "jpeg":
        return JPEGReward()
    if config.kind == "shapes_strict":
        return StrictShapesReward()
    if config.kind == "shapes":
        return ShapesReward()
    if config.kind == "geneval":
        return GenEvalReward.load(str(config.path), str(config.color_path))
    if config.kind == "vqa":
        return VQAReward(load_vqa_model(str(config.path)))
    if config.kind == "own_answers":
        if own_model is None:
            raise ValueError("own_answers needs the starting model: give own_model")
        return OwnAnswersReward(own_model, processor, in_shapes=config.in_shapes)
    return CLIPReward(str(config.path), scaled=config.kind == "pickscore")


def build_rewards(
    configs: Mapping[str, RewardConfig], processor: Any = None, own_model: OpenModel | None = None
) -> dict[str, Reward]:
    """Build the rewards of a run by name."""
    return {name: build_reward(config, processor, own_model) for name, config in configs.items()}
