"""Flows of samples mixed at fixed shares into one endless stream.

Special here: which flow gives sample n, and which of its samples that is, follows from n alone, so a run resumes at any
position; and the shares hold in every batch, not only on average, because the flows are interleaved by largest deficit
instead of being drawn.
"""

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch.utils.data import Dataset

from unimm.data.conversations import Message, ParquetConversations, ShapesConversations
from unimm.data.pictures import data_path
from unimm.data.shapes.prompts import Split
from unimm.data.text_to_image import PictureDrawings, ShapesDrawings
from unimm.errors import UserError

ENDLESS = 2**31 - 1
"""Length of a training stream; `train.max_steps` says when it stops."""
_CYCLE = 1000  # shares are kept to a thousandth


@dataclass
class FlowConfig:
    """One flow of the mixture.

    Args:
        kind: "conversation" (the answers are learned) or "drawing" (the image tokens are).
        ratio: share of the samples, relative to the other flows.
        weight: factor of this flow's mean loss in the sum.
        source: "shapes", or a parquet file: columns image and messages (conversation), image and text (drawing).
        num_turns: fewest and most questions about one picture ("shapes" conversations only).
        kind_shares: how often each kind of question is asked ("shapes" conversations only; None: the world's shares).
        null_prompt_prob: share of the drawings whose caption is replaced by the null prompt.
    """

    kind: Literal["conversation", "drawing"]
    ratio: float = 1.0
    weight: float = 1.0
    source: str = "shapes"
    num_turns: tuple[int, int] = (4, 7)
    kind_shares: dict[str, float] | None = None
    null_prompt_prob: float = 0.0


@dataclass
class MixtureConfig:
    """`flows` by name; `num_eval_samples` of the held-out stream (captions of the split "test") are scored at every
    evaluation."""

    flows: dict[str, FlowConfig]
    seed: int = 0
    image_size: int = 64
    num_eval_samples: int = 128

    def __post_init__(self) -> None:
        if not self.flows or any(flow.ratio <= 0 for flow in self.flows.values()):
            raise UserError("data.flows needs at least one flow, and every ratio must be above 0.")

    @property
    def weights(self) -> dict[str, float]:
        """{flow: factor of its loss}."""
        return {name: flow.weight for name, flow in self.flows.items()}

    @property
    def null_prompt_prob(self) -> float:
        """Share of the null prompt among the drawings, as the checkpoint records it."""
        drawings = [flow for flow in self.flows.values() if flow.kind == "drawing"]
        total = sum(flow.ratio for flow in drawings)
        return sum(flow.ratio * flow.null_prompt_prob for flow in drawings) / total if drawings else 0.0


class Flow(Protocol):
    """Where samples come from. A source with a length is passed through again and again."""

    def messages(self, index: int) -> list[Message]: ...


class Mixture(Dataset):
    """Sample n of the stream: {"flow": name, "kind", "index": n, "messages"}."""

    def __init__(self, config: MixtureConfig, *, split: Split = "train") -> None:
        """`split` "test" gives `num_eval_samples` samples of another seed, without null prompts."""
        self.config = config
        self.split = split
        self.names = sorted(config.flows)
        self.sources = [_source(config, config.flows[name], split, salt) for salt, name in enumerate(self.names)]
        self.order = interleave([config.flows[name].ratio for name in self.names])
        self.earlier = np.stack([np.cumsum(self.order == k) - (self.order == k) for k in range(len(self.names))])
        self._shuffled: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return ENDLESS if self.split == "train" else self.config.num_eval_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        cycle, position = divmod(index, _CYCLE)
        k = int(self.order[position])
        rank = cycle * int((self.order == k).sum()) + int(self.earlier[k, position])
        source, name = self.sources[k], self.names[k]
        messages = source.messages(self._row(k, rank, len(source)) if isinstance(source, Sized) else rank)
        return {"flow": name, "kind": self.config.flows[name].kind, "index": index, "messages": messages}

    def _row(self, k: int, rank: int, length: int) -> int:
        """Row number of the flow's `rank`-th sample, counted on from pass to pass, each pass in a new order."""
        epoch, position = divmod(rank, length)
        if (k, epoch) not in self._shuffled:
            self._shuffled = {key: order for key, order in self._shuffled.items() if key[0] != k}
            self._shuffled[k, epoch] = np.random.default_rng((self.config.seed, k, epoch)).permutation(length)
        return epoch * length + int(self._shuffled[k, epoch][position])


def interleave(ratios: list[float]) -> np.ndarray:
    """The flow of each of 1000 positions [1000]: at every position the flow that lags furthest behind its share."""
    shares = np.asarray(ratios, dtype=np.float64) / sum(ratios)
    given = np.zeros(len(shares))
    order = np.empty(_CYCLE, dtype=np.int64)
    for position in range(_CYCLE):
        order[position] = np.argmax(shares * (position + 1) - given)
        given[order[position]] += 1
    if not given.all():
        raise UserError(f"A flow has a share below 1/{_CYCLE} of the samples: the ratios are {ratios}.")
    return order


def _source(config: MixtureConfig, flow: FlowConfig, split: Split, salt: int) -> Flow:
    seed = int(np.random.SeedSequence((config.seed, salt, split == "test")).generate_state(1)[0])
    null = flow.null_prompt_prob if split == "train" else 0.0
    if flow.source == "shapes":
        if flow.kind == "conversation":
            return ShapesConversations(seed, flow.num_turns, flow.kind_shares)
        return ShapesDrawings(seed, split=split, null_prompt_prob=null)
    path = data_path(flow.source)
    if flow.kind == "conversation":
        return ParquetConversations(path)
    return PictureDrawings(path, seed=seed, image_size=config.image_size, null_prompt_prob=null)
