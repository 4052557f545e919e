"""Tasks for learning from rewards: prompts to draw and images to edit, with the metadata that a reward needs, and
questions with answers.

Unlike the flows of a mixture, a task holds no image to learn: the model draws or answers itself and is rewarded. Task n
is a pure function of n, and the ratios hold in every batch (`unimm.data.shuffling`).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from unimm.config.schema import Count, Natural, NonNegative, Seed, used_when
from unimm.data.images import load_image
from unimm.data.mixture import ENDLESS
from unimm.data.shapes import render, sample_prompt, sample_questions
from unimm.data.shapes.conversations import normalized_shares
from unimm.data.shapes.edits import sample_edit
from unimm.data.shapes.prompts import TRAINING_SHARES, Split
from unimm.data.shuffling import EpochOrder, Interleaving
from unimm.errors import UserError, one_line

Task = dict[str, Any]
Kind = Literal["drawing", "editing", "answering"]
_NEEDED = {"drawing": ("prompt",), "editing": ("image", "prompt"), "answering": ("image", "question", "answer")}
_KINDS = used_when(lambda c: c.kind != "answering" and c.source == "shapes", "prompts or edits of the shapes data set")
_ANSWERING = used_when(lambda c: c.kind == "answering" and c.source == "shapes", "questions of the shapes data set")


@dataclass
class TaskFlow:
    """One kind of task.

    Args:
        kind: "drawing" (prompts), "editing" (images with instructions) or "answering" (images with questions).
        ratio: share of the tasks, relative to the other flows; 0: evaluated, but not learned from.
        weight: factor of this flow's loss in the total loss.
        source: "shapes", or a JSON Lines file: {"prompt": ...} with any other fields, which become the metadata (those
            of GenEval for its rewards), {"image": path beside the file, "prompt": ...} with any other fields, or
            {"image": ..., "question": ..., "answer": ...}.
        eval_source: a file of the same form, for evaluation; needed if `source` is one and tasks are held out.
        question_kinds: kinds of the questions about shapes.
        kind_shares: share of each kind of prompt or edit of shapes; None uses the data set's own shares.
    """

    kind: Kind
    ratio: NonNegative = 1.0
    weight: NonNegative = 1.0
    source: str = "shapes"
    eval_source: str | None = None
    question_kinds: list[str] = field(
        default_factory=lambda: ["existence", "color", "count", "position"], metadata=_ANSWERING
    )
    kind_shares: dict[str, NonNegative] | None = field(default=None, metadata=_KINDS)

    def __post_init__(self) -> None:
        if self.eval_source is not None and self.source == "shapes":
            raise UserError("eval_source is for tasks from a file: shapes has a held-out part of its own.")
        if not self.question_kinds:
            raise UserError("question_kinds needs at least one kind of question.")


@dataclass
class TasksConfig:
    """Tasks to learn from, by name.

    Args:
        num_eval_samples: held-out tasks of each flow that every evaluation scores; 0 evaluates nothing.
    """

    flows: dict[str, TaskFlow]
    seed: Seed = 0
    num_eval_samples: Natural = 64

    def __post_init__(self) -> None:
        if not self.learned:
            raise UserError("data.flows needs at least one flow with a ratio above 0.")
        for name, flow in self.flows.items():
            if self.num_eval_samples and flow.source != "shapes" and flow.eval_source is None:
                raise UserError(
                    f"data.num_eval_samples is {self.num_eval_samples}, and data.flows.{name}.eval_source is missing: "
                    "give a file of held-out tasks, or set the number to 0."
                )

    @property
    def learned(self) -> list[str]:
        """Return the flows that are learned from, sorted."""
        return sorted(name for name, flow in self.flows.items() if flow.ratio > 0)


class ShapesTasks:
    """An endless stream of prompts, edits or questions of the shapes data set; prompts of the split "test" never occur
    in "train"."""

    def __init__(self, flow: TaskFlow, seed: int, split: Split) -> None:
        self.flow, self.seed, self.split = flow, seed, split

    def task(self, index: int) -> Task:
        """Return task `index`: a prompt with GenEval's metadata, an image and an instruction with the `Edit` as
        metadata, or an image with a question and its answer."""
        rng = np.random.default_rng((self.seed, index))
        if self.flow.kind == "drawing":
            shares, kinds = self.flow.kind_shares, list(TRAINING_SHARES)
            tag = None if shares is None else str(rng.choice(kinds, p=normalized_shares(shares, kinds, "prompt")))
            prompt = sample_prompt(rng, tag, split=self.split)
            return {"prompt": prompt.prompt, "metadata": prompt.metadata()}
        if self.flow.kind == "editing":
            edit = sample_edit(rng, kind_shares=self.flow.kind_shares)
            return {"prompt": edit.instruction, "image": render(edit.source), "metadata": {"edit": edit}}
        kinds = self.flow.question_kinds
        scene, turn = sample_questions(rng, kinds[index % len(kinds)])
        return {"image": render(scene), "question": turn.question, "answer": turn.answer, "metadata": {}}


class FileTasks:
    """The tasks of a JSON Lines file, in a seeded order that changes with every epoch.

    Raises:
        UserError: the file cannot be read, or a line lacks a field.
    """

    def __init__(self, kind: Kind, source: str, seed: int) -> None:
        self.kind, self.path = kind, Path(source)
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Cannot read the tasks {source}: {one_line(error)}.") from None
        self.rows = [self._row(line, number) for number, line in enumerate(lines, 1) if line.strip()]
        if not self.rows:
            raise UserError(f"{source} holds no task: each line is a JSON object with {', '.join(_NEEDED[kind])}.")
        self.order = EpochOrder(len(self.rows), seed)

    def _row(self, line: str, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.path}, line {number} is no JSON object ({one_line(error)}).") from None
        missing = [
            name for name in _NEEDED[self.kind] if not isinstance(row, dict) or not isinstance(row.get(name), str)
        ]
        if missing:
            raise UserError(
                f"{self.path}, line {number} has no text {missing[0]!r}, which a task of {self.kind} needs."
            )
        return row

    def task(self, index: int) -> Task:
        """Return task `index`; the rows repeat, epoch after epoch."""
        row = self.rows[self.order.row(index)]
        if self.kind == "drawing":
            return {"prompt": row["prompt"], "metadata": row}
        image = load_image(self.path.parent / row["image"])
        if self.kind == "editing":
            return {"prompt": row["prompt"], "image": image, "metadata": row}
        return {"image": image, "question": row["question"], "answer": row["answer"], "metadata": row}


class Tasks(Dataset):
    """A map-style dataset of the mixed stream; a task is {"flow", "kind", "index", "seed", "metadata"} with "prompt",
    with "prompt" and "image", or with "image", "question" and "answer".

    Args:
        repeats: optimizer steps that use the same tasks, one after the other.
        samples_per_step: tasks of one optimizer step, over all processes; needed if they repeat.
    """

    def __init__(
        self, config: TasksConfig, *, split: Split = "train", repeats: Count = 1, samples_per_step: Count = 1
    ) -> None:
        self.config, self.split, self.repeats, self.samples_per_step = config, split, repeats, samples_per_step
        self.names = config.learned if split == "train" else sorted(config.flows)
        self.sources = [self._source(name) for name in self.names]
        self.mixed = Interleaving([config.flows[name].ratio for name in config.learned])

    def _source(self, name: str) -> ShapesTasks | FileTasks:
        flow, salt = self.config.flows[name], sorted(self.config.flows).index(name)
        seed = int(np.random.SeedSequence((self.config.seed, salt, self.split == "test", 19)).generate_state(1)[0])
        if flow.source == "shapes":
            return ShapesTasks(flow, seed, self.split)
        return FileTasks(flow.kind, str(flow.eval_source) if self.split == "test" else flow.source, seed)

    def __len__(self) -> int:
        return ENDLESS if self.split == "train" else self.config.num_eval_samples * len(self.names)

    def __getitem__(self, index: int) -> Task:
        if self.split == "test":  # as many of each flow, whatever the ratios
            rank, k = divmod(index, len(self.names))
        else:
            step, place = divmod(index, self.samples_per_step)
            index = step // self.repeats * self.samples_per_step + place
            k, rank = self.mixed.place(index)
        name = self.names[k]
        seed = int(np.random.SeedSequence((self.config.seed, index, self.split == "test", 91)).generate_state(1)[0])
        about = {"flow": name, "kind": self.config.flows[name].kind, "index": index, "seed": seed}
        return about | self.sources[k].task(rank)

    @property
    def sizes(self) -> dict[str, int]:
        """Return {flow: number of rows} of the flows from files: if one changes, task n changes."""
        pairs = zip(self.names, self.sources, strict=True)
        return {name: len(source.rows) for name, source in pairs if isinstance(source, FileTasks)}
