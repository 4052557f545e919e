"""Flows of samples mixed at fixed shares into one endless stream.

Special here: which flow gives sample n, and which of its samples that is, follows from n alone, so a run resumes at any
position; and the shares hold in every batch, not only on average, because the flows are interleaved by largest deficit
instead of being drawn.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from torch.utils.data import Dataset

from unimm.data.conversations import Message, ParquetConversations, ShapesConversations
from unimm.data.grouping import grouped_order
from unimm.data.llava import LLAVA_SUFFIXES, LlavaOptions, open_llava
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
        source: "shapes", or a parquet file: columns image and messages (conversation), image and text (drawing); or,
            for a conversation, a .json or .jsonl file in LLaVA's format, whose pictures are in `image_folder`.
        num_turns: fewest and most questions about one picture ("shapes" conversations only).
        kind_shares: how often each kind of question is asked ("shapes" conversations only; None: the world's shares).
        null_prompt_prob: share of the drawings whose caption is replaced by the null prompt.
        image_folder, max_bad_share, drop_questions: of LLaVA's format, see `unimm.data.llava.LlavaOptions`.
        group_by_modality: every step takes rows with a picture only, or without, of similar length (LLaVA's format, the
            only flow).
    """

    kind: Literal["conversation", "drawing"]
    ratio: float = 1.0
    weight: float = 1.0
    source: str = "shapes"
    num_turns: tuple[int, int] = (4, 7)
    kind_shares: dict[str, float] | None = None
    null_prompt_prob: float = 0.0
    image_folder: str | None = None
    max_bad_share: float = 0.01
    drop_questions: bool = False
    group_by_modality: bool = False

    def __post_init__(self) -> None:
        llava = self.kind == "conversation" and Path(self.source).suffix in LLAVA_SUFFIXES
        if llava and self.image_folder is None:
            raise UserError(
                f"The source {self.source} is in LLaVA's format: give the folder of its pictures, image_folder."
            )
        if not llava and (self.image_folder is not None or self.drop_questions or self.group_by_modality):
            raise UserError(
                "image_folder, drop_questions and group_by_modality are for conversations in LLaVA's format, a .json "
                f"or .jsonl file, and the source is {self.source}."
            )


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
        if len(self.flows) > 1 and any(flow.group_by_modality for flow in self.flows.values()):
            raise UserError(f"group_by_modality is for a single flow, and there are {len(self.flows)}.")

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

    def __init__(
        self,
        config: MixtureConfig,
        *,
        split: Split = "train",
        samples_per_step: int | None = None,
        reserved: Sequence[str] = (),
        log_folder: Path | None = None,
    ) -> None:
        """
        Args:
            split: "test" gives `num_eval_samples` samples of another seed, without null prompts.
            samples_per_step: of all processes together; needed by `group_by_modality`.
            reserved: strings that stand for pictures in the model's text: rows from outside that write one are skipped.
            log_folder: where the rows that had to be skipped are named, see `unimm.data.llava`.
        """
        self.config = config
        self.split = split
        self.samples_per_step = samples_per_step
        self.names = sorted(config.flows)
        around = _Surroundings(tuple(reserved), log_folder)
        self.sources = [_source(config, name, split, salt, around) for salt, name in enumerate(self.names)]
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
        grouped = self.split == "train" and self.config.flows[self.names[k]].group_by_modality
        step = self._step_size() if grouped else 1
        epoch, position = divmod(rank, length // step * step or length)
        if (k, epoch) not in self._shuffled:
            self._shuffled = {key: order for key, order in self._shuffled.items() if key[0] != k}
            rng = np.random.default_rng((self.config.seed, k, epoch))
            source: Any = self.sources[k]
            order = grouped_order(source.modality_lengths, step, rng) if grouped else rng.permutation(length)
            self._shuffled[k, epoch] = order
        return epoch * length + int(self._shuffled[k, epoch][position])

    def _step_size(self) -> int:
        if self.samples_per_step is None:
            raise ValueError("group_by_modality needs to know how many samples a step takes: give samples_per_step")
        return self.samples_per_step


def training_streams(config: MixtureConfig, **surroundings: Any) -> tuple[Mixture, Mixture]:
    """The stream to train on and the held-out one; `surroundings` are `Mixture`'s further arguments."""
    return Mixture(config, **surroundings), Mixture(config, split="test", **surroundings)


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


@dataclass(frozen=True)
class _Surroundings:
    """What a source from outside has to know of the run."""

    reserved: tuple[str, ...]
    log_folder: Path | None


def _source(config: MixtureConfig, name: str, split: Split, salt: int, around: _Surroundings) -> Flow:
    flow = config.flows[name]
    seed = int(np.random.SeedSequence((config.seed, salt, split == "test")).generate_state(1)[0])
    null = flow.null_prompt_prob if split == "train" else 0.0
    if flow.source == "shapes":
        if flow.kind == "conversation":
            return ShapesConversations(seed, flow.num_turns, flow.kind_shares)
        return ShapesDrawings(seed, split=split, null_prompt_prob=null)
    path = data_path(flow.source)
    if flow.image_folder is not None:
        options = LlavaOptions(
            data_path(flow.image_folder),
            max_bad_share=flow.max_bad_share,
            drop_questions=flow.drop_questions,
            reserved=around.reserved,
            log=around.log_folder / f"{name}.skipped.jsonl" if around.log_folder else None,
        )
        return open_llava(path, options)
    if flow.kind == "conversation":
        return ParquetConversations(path)
    return PictureDrawings(path, seed=seed, image_size=config.image_size, null_prompt_prob=null)
