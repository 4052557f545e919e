"""A data mixture: several flows (conversation, captioning, drawing, editing, interleaved) combined at fixed ratios into
one endless training stream.

Sample n, its flow included, is a pure function of n, so a run resumes at any position. The ratios hold in every batch,
not only on average, because the flows are interleaved by largest deficit instead of being sampled at random
(`unimm.data.shuffling`).
"""

from collections.abc import Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from torch.utils.data import Dataset

from unimm.config.schema import Count, Decay, Natural, NonNegative, Range, Rate, Seed, Share, used_when
from unimm.data.bad_rows import DEFAULT_MAX_BAD_SHARE, UsableRows
from unimm.data.conversations import DRAWN_KINDS, CaptionedImages, Message, ShapesConversations
from unimm.data.editing import Dropout, EditRows, ImageEdits, ShapesEdits
from unimm.data.grouping import GroupedOrder
from unimm.data.held_out import DEFAULT_SHARE, PartOfRows, check_share, refuse_overlaps
from unimm.data.interleaved import ShapesInterleaved
from unimm.data.shapes.prompts import Split
from unimm.data.shuffling import Interleaving, Order, order_of
from unimm.data.sources.ids import IdsFolder, holds_ids
from unimm.data.sources.llava import LLAVA_SUFFIXES, LlavaOptions, open_llava
from unimm.data.sources.registry import open_images
from unimm.data.sources.rows import ReadOptions
from unimm.data.sources.storage import data_path, filled
from unimm.data.sources.table_conversations import ConversationRows, TableConversations
from unimm.data.text_to_image import IdDrawings, ImageDrawings, ShapesDrawings
from unimm.errors import UserError

ENDLESS = 2**31 - 1
"""Length of a training stream; `train.max_steps` says when it stops."""


_TALK = used_when(lambda c: (c.kind, c.source) == ("conversation", "shapes"), "conversations of the shapes world")
_KINDS = used_when(
    lambda c: c.kind in ("conversation", "editing") and c.source == "shapes", "conversations and edits of shapes"
)
_DRAWN = used_when(lambda c: c.kind in DRAWN_KINDS, "kind: drawing or editing")
_WORDED = used_when(
    lambda c: c.kind in ("conversation", "drawing") and c.source == "shapes", "conversations and drawings of shapes"
)
_OUTSIDE = used_when(lambda c: c.source != "shapes", "a source from outside")


@dataclass
class FlowConfig:
    """One flow of the mixture.

    Args:
        kind: "conversation" (the answers are learned), "captioning" (the captions are), "drawing" (the image tokens
            are), "editing" (the image tokens of the edited image are) or "interleaved" (text and images of an answer
            are).
        ratio: share of the samples, relative to the other flows.
        weight: factor of this flow's mean loss in the total loss.
        source: "shapes", or external data, for a
            conversation: a table with the columns image and messages (`sources.table_conversations`), or a .json or
            .jsonl file in LLaVA's format, whose images are in `image_folder`;
            captioning: images with captions, as `unimm.data.sources.registry` reads them;
            drawing: such images, or a folder of ids that `recipes/encode.py` wrote;
            editing: images with instructions as captions, and the edited images in `read.target_column`;
            interleaved: "shapes" only.
        read: how external images are read and filtered.
        question: the user's prompt for captioning.
        num_turns: minimum and maximum number of questions about one image ("shapes" conversations only).
        kind_shares: share of each kind of question or edit ("shapes" conversations and edits only; None: the data set's
            own shares).
        phrasing_share: share of the captions and questions in one of many other wordings ("shapes" only).
        shuffled_share: share of the edits that copy an image of shuffled patches ("shapes" only), which teaches copying
            (`unimm.data.shapes.shuffled`).
        unknown_share: share of the conversations that ask for a drawing of what the shapes world does not hold.
        null_prompt_prob: share of the drawings whose caption is replaced by the null prompt; of the edits, share that
            loses image and instruction.
        null_text_prob: share of the edits that loses the instruction and keeps the image.
        changed_weight: factor of the loss of the image tokens whose patch an edit changes; the others are copied.
        max_bad_share: share of the external rows that may be damaged before the run stops.
        eval_source: evaluation data of the same kind, read with the same options; None holds out a share of `source`
            (`MixtureConfig.eval_share`).
        image_folder, drop_questions: for LLaVA's format, see `unimm.data.sources.llava.LlavaOptions`.
        group_by_modality: every step takes only rows with an image or only rows without, of similar length (LLaVA's
            format, as the only flow).
    """

    kind: Literal["conversation", "captioning", "drawing", "editing", "interleaved"]
    ratio: Rate = 1.0
    weight: NonNegative = 1.0
    source: str = "shapes"
    eval_source: str | None = None
    num_turns: tuple[Count, Count] = field(default=(4, 7), metadata=_TALK)
    kind_shares: dict[str, NonNegative] | None = field(default=None, metadata=_KINDS)
    phrasing_share: Share = field(default=0.0, metadata=_WORDED)
    unknown_share: Share = field(default=0.0, metadata=_TALK)
    shuffled_share: Share = field(
        default=0.0,
        metadata=used_when(lambda c: (c.kind, c.source) == ("editing", "shapes"), "edits of the shapes world"),
    )
    null_prompt_prob: Decay = field(default=0.0, metadata=_DRAWN)
    null_text_prob: Decay = field(default=0.0, metadata=used_when(lambda c: c.kind == "editing", "kind: editing"))
    changed_weight: Rate = field(default=1.0, metadata=used_when(lambda c: c.kind == "editing", "kind: editing"))
    image_folder: str | None = None
    max_bad_share: Share = field(default=DEFAULT_MAX_BAD_SHARE, metadata=_OUTSIDE)
    drop_questions: bool = False
    group_by_modality: bool = False
    read: ReadOptions = field(default_factory=ReadOptions, metadata=_OUTSIDE)
    question: str = field(
        default="Describe the picture.", metadata=used_when(lambda c: c.kind == "captioning", "kind: captioning")
    )

    def __post_init__(self) -> None:
        llava = self.kind == "conversation" and Path(self.source).suffix in LLAVA_SUFFIXES
        if self.eval_source is not None and "shapes" in (self.source, self.eval_source):
            raise UserError("eval_source is for data from outside: shapes has a held-out part of its own.")
        if self.eval_source is not None and llava != (Path(self.eval_source).suffix in LLAVA_SUFFIXES):
            raise UserError(f"eval_source {self.eval_source} must be of the same form as source {self.source}.")
        if llava and self.image_folder is None:
            raise UserError(
                f"The source {self.source} is in LLaVA's format: give the folder of its images, image_folder."
            )
        if llava:
            self.read.refuse_others(self.source, "a file in LLaVA's format")
        if not llava and (self.image_folder is not None or self.drop_questions or self.group_by_modality):
            raise UserError(
                "image_folder, drop_questions and group_by_modality are for conversations in LLaVA's format, a .json "
                f"or .jsonl file, and the source is {self.source}."
            )
        if self.kind == "captioning" and self.source == "shapes":
            raise UserError(
                "captioning needs a source with captions: the shapes data set has conversations and drawings."
            )
        if self.kind == "interleaved" and self.source != "shapes":
            raise UserError(f"interleaved answers are made from shapes, and the source is {self.source}.")
        if self.null_text_prob + self.null_prompt_prob >= 1:
            raise UserError(
                f"null_text_prob {self.null_text_prob} and null_prompt_prob {self.null_prompt_prob} must stay below 1 "
                "together."
            )


@dataclass
class MixtureConfig:
    """Flows by name, and their evaluation data.

    Args:
        num_eval_samples: samples of the held-out stream that every evaluation scores; 0 evaluates nothing and holds
            out nothing.
        eval_share: share of the rows held out of training, for every external source without an `eval_source`.
    """

    flows: dict[str, FlowConfig]
    seed: Seed = 0
    image_size: Count = 64
    num_eval_samples: Natural = 128
    eval_share: Annotated[float, Range(least=0, most=0.5)] = DEFAULT_SHARE

    def __post_init__(self) -> None:
        if not self.flows or any(flow.ratio <= 0 for flow in self.flows.values()):
            raise UserError("data.flows needs at least one flow, and every ratio must be above 0.")
        if len(self.flows) > 1 and any(flow.group_by_modality for flow in self.flows.values()):
            raise UserError(f"group_by_modality is for a single flow, and there are {len(self.flows)}.")
        check_share(self.eval_share)

    def share(self, name: str) -> float:
        """Return the share of a flow's source that is held out of training."""
        flow = self.flows[name]
        own = flow.source == "shapes" or flow.eval_source is not None
        return 0.0 if own or self.num_eval_samples == 0 else self.eval_share

    def refuse_overlaps(self) -> None:
        """Raise UserError if a flow trains on rows that another flow is evaluated on."""
        outside = {name: flow for name, flow in self.flows.items() if flow.source != "shapes"}
        refuse_overlaps(
            [(flow.read.named(flow.source), self.share(name) > 0) for name, flow in outside.items()],
            [flow.read.named(flow.eval_source) for flow in outside.values() if flow.eval_source is not None],
        )

    @property
    def weights(self) -> dict[str, float]:
        """Return {flow: factor of its loss}."""
        return {name: flow.weight for name, flow in self.flows.items()}

    @property
    def changed_weights(self) -> dict[str, float]:
        """Return {flow: factor of the loss of changed patches} of the flows where it is not 1."""
        return {name: flow.changed_weight for name, flow in self.flows.items() if flow.changed_weight != 1}

    @property
    def null_prompt_prob(self) -> float:
        """Return the share of null prompts among drawings and edits, as the checkpoint records it."""
        drawings = [flow for flow in self.flows.values() if flow.kind in DRAWN_KINDS]
        total = sum(flow.ratio for flow in drawings)
        return sum(flow.ratio * flow.null_prompt_prob for flow in drawings) / total if drawings else 0.0


class Flow(Protocol):
    """A source of samples. A source with a length is repeated, epoch after epoch."""

    def messages(self, index: int) -> list[Message]: ...


class Mixture(Dataset):
    """A map-style dataset of the mixed stream; sample n is {"flow": name, "kind", "index": n, "messages"}."""

    def __init__(
        self,
        config: MixtureConfig,
        *,
        split: Split = "train",
        samples_per_step: int | None = None,
        log_folder: Path | None = None,
    ) -> None:
        """Open the sources of all flows.

        Args:
            split: "test" returns `num_eval_samples` samples of held-out rows, or of another seed, without null prompts.
            samples_per_step: samples of all processes together; needed by `group_by_modality`.
            log_folder: folder of the logs of skipped rows, see `unimm.data.sources.llava`.
        """
        config.refuse_overlaps()
        self.config = config
        self.split = split
        self.samples_per_step = samples_per_step
        self.names = sorted(config.flows)
        self.sources: list[Any] = [
            _source(config, name, split, salt, log_folder) for salt, name in enumerate(self.names)
        ]
        self.mixed = Interleaving([config.flows[name].ratio for name in self.names])
        self.orders = [self._order(k) for k in range(len(self.names))]

    def __len__(self) -> int:
        return ENDLESS if self.split == "train" else self.config.num_eval_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        k, rank = self.mixed.place(index)
        source, name, order = self.sources[k], self.names[k], self.orders[k]
        if order is not None:  # rows keep counting across epochs, so that each epoch drops other captions
            rank = rank // order.count * len(source) + order.row(rank)
        return {"flow": name, "kind": self.config.flows[name].kind, "index": index, "messages": source.messages(rank)}

    @property
    def sizes(self) -> dict[str, int]:
        """Return {flow: number of rows} of the finite flows: if one changes, item n changes."""
        return {
            name: len(source)
            for name, source in zip(self.names, self.sources, strict=True)
            if isinstance(source, Sized)
        }

    def _order(self, k: int) -> Order | None:
        """Return the order in which a flow visits its rows; None for an endless flow."""
        source: Any = self.sources[k]
        if not isinstance(self.sources[k], Sized):
            return None
        if self.split == "train" and self.config.flows[self.names[k]].group_by_modality:
            return GroupedOrder(source.modality_lengths, self._step_size(), self.config.seed, k)
        return order_of(source, self.config.seed, k)

    def _step_size(self) -> int:
        if self.samples_per_step is None:
            raise ValueError("group_by_modality needs to know how many samples a step takes: give samples_per_step")
        return self.samples_per_step


def training_streams(config: MixtureConfig, **surroundings: Any) -> tuple[Mixture, Mixture | None]:
    """Return the training stream and the held-out stream (None if no samples are evaluated); `surroundings` are
    `Mixture`'s other arguments."""
    train = Mixture(config, **surroundings)
    return train, Mixture(config, split="test", **surroundings) if config.num_eval_samples else None


def held_out_lines(train: Mixture, test: Mixture | None) -> list[str]:
    """Return one line for each external flow: how many rows are trained on and how many are held out."""
    lines = []
    for name, rows in train.sizes.items():
        flow = train.config.flows[name]
        held_out = 0 if test is None else test.sizes[name]
        where = f" in {flow.eval_source}" if held_out and flow.eval_source else ""
        lines.append(f"{name}: {rows} rows of {flow.source} to train on, {held_out} held out{where}")
    return lines


def _source(config: MixtureConfig, name: str, split: Split, salt: int, log_folder: Path | None) -> Flow:
    flow = config.flows[name]
    # One independent seed for each flow and split.
    seed = int(np.random.SeedSequence((config.seed, salt, split == "test")).generate_state(1)[0])
    null = flow.null_prompt_prob if split == "train" else 0.0
    if flow.source == "shapes":
        if flow.kind == "conversation":
            return ShapesConversations(
                seed,
                flow.num_turns,
                flow.kind_shares,
                phrasing_share=flow.phrasing_share,
                unknown_share=flow.unknown_share,
            )
        if flow.kind == "editing":
            return ShapesEdits(seed, _dropout(flow, seed, split), flow.kind_shares, flow.shuffled_share)
        if flow.kind == "interleaved":
            return ShapesInterleaved(seed, split=split)
        return ShapesDrawings(seed, split=split, null_prompt_prob=null, phrasing_share=flow.phrasing_share)
    own = split == "test" and flow.eval_source is not None
    place = str(flow.eval_source) if own else flow.source
    log = log_folder / f"{name}{'.eval' * own}.skipped.jsonl" if log_folder else None
    share = config.share(name)
    part: Split | None = None if flow.eval_source is not None else split
    if flow.image_folder is not None:
        options = LlavaOptions(
            data_path(flow.image_folder),
            max_bad_share=flow.max_bad_share,
            drop_questions=flow.drop_questions,
            log=log,
        )
        conversations = open_llava(data_path(place), options)
        return conversations if part is None else conversations.part(share, part)
    if flow.kind == "drawing" and holds_ids(place):
        ids = IdsFolder(filled(place))
        drawn = None if part is None else PartOfRows(ids, share, part, place)
        return IdDrawings(ids, seed=seed, null_prompt_prob=null, rows=drawn)
    opened, talk = open_images(place, flow.read, strict=not own), flow.kind == "conversation"
    if talk:
        opened = ConversationRows(opened, place)
    if flow.kind == "editing":
        opened = EditRows(opened, place, flow.read)
    if part is not None:
        opened = PartOfRows(opened, share, part, place)
    whose = f"{place} (held-out rows)" if part == "test" else place
    rows = UsableRows(opened, whose, captions=not talk, max_bad_share=flow.max_bad_share, log=log)
    rows.require_usable()
    if flow.kind == "captioning":
        return CaptionedImages(rows, flow.question)
    if talk:
        return TableConversations(rows)
    if flow.kind == "editing":
        return ImageEdits(rows, image_size=config.image_size, dropout=_dropout(flow, seed, split))
    return ImageDrawings(rows, seed=seed, image_size=config.image_size, null_prompt_prob=null)


def _dropout(flow: FlowConfig, seed: int, split: Split) -> Dropout:
    """Return the dropout of an editing flow; nothing is dropped in evaluation."""
    return Dropout(seed, flow.null_text_prob, flow.null_prompt_prob) if split == "train" else Dropout(seed)
