"""Yes-or-no questions about the shapes data set as parquet files in the schemas of MME and POPE.

Every scene has one question with the answer yes and one with the answer no. A "no" question about a color and a shape
that both occur, but not together, is POPE's adversarial kind; all others are its random kind.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unimm.data.shapes import COLORS, SHAPES, Scene, Turn, render, sample_conversation
from unimm.errors import UserError

QUESTIONS_PER_SCENE = 2
TURNS = 8  # questions sampled per scene to find a yes and a no
Row = dict[str, Any]


def sample_pairs(count: int, seed: int) -> Iterator[tuple[Scene, Turn, Turn]]:
    """Yield `count` scenes, each with a question answered yes and one answered no.

    Training seeds its scenes with other pairs of numbers, so these scenes never occur in it.
    """
    rng, found = np.random.default_rng([seed, *b"yes or no"]), 0
    while found < count:
        scene, turns = sample_conversation(rng, num_turns=TURNS, kind_shares={"existence": 1.0})
        yes = [turn for turn in turns if turn.answer == "yes"]
        no = [turn for turn in turns if turn.answer == "no"]
        if found % 2:  # adversarial questions are rare: prefer them in every other scene
            no.sort(key=lambda turn: pope_kind(scene, turn.question))
        if yes and no:
            found += 1
            yield scene, yes[0], no[0]


def pope_kind(scene: Scene, question: str) -> str:
    """Return `adversarial` or `random` for a question whose answer is no."""
    words = question.rstrip("?").split()
    there = {part for obj in scene.objects for part in (obj.color, obj.shape)}
    named = [word for word in words if word in (*COLORS, *SHAPES)]
    return "adversarial" if len(named) == 2 and set(named) <= there else "random"


def rows(questions: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Return the same questions as rows in MME's and in POPE's schema.

    Raises:
        UserError: the number of questions is odd or below two.
    """
    if questions < QUESTIONS_PER_SCENE or questions % QUESTIONS_PER_SCENE:
        raise UserError(
            f"{questions} questions cannot be asked {QUESTIONS_PER_SCENE} about a scene: give an even number."
        )
    mme, pope = list[Row](), list[Row]()
    for number, (scene, yes, no) in enumerate(sample_pairs(questions // QUESTIONS_PER_SCENE, seed)):
        image, name, kind = render(scene), f"scene_{number:06d}", pope_kind(scene, no.question)
        for turn in (yes, no):
            asked = {"question": turn.question, "image": image}
            mme.append({"question_id": name, **asked, "answer": turn.answer.capitalize(), "category": "existence"})
            place = str(len(pope))
            pope.append(
                {
                    "id": place,
                    "question_id": place,
                    **asked,
                    "answer": turn.answer,
                    "image_source": name,
                    "category": kind,
                }
            )
    return mme, pope


def write_shapes_questions(folder: Path, questions: int, seed: int) -> None:
    """Write `shapes_MME` and `shapes_POPE` into `folder`, in the layout of hub data sets."""
    for name, table in zip(("shapes_MME", "shapes_POPE"), rows(questions, seed), strict=True):
        write_parquet(table, folder / name / "data" / "test-00000-of-00001.parquet")


def write_parquet(table: list[Row], path: Path) -> None:
    """Write rows as a parquet file; columns of PIL images, single or in lists, are stored with the Image feature."""
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(table).to_parquet(path)
