"""Yes-or-no questions about the shapes data set in the schemas of MME and POPE, as parquet files that their tools read.

Every scene is asked one question whose answer is yes and one whose answer is no. A "no" that joins a
color and a shape which are both there, but not together, is POPE's adversarial kind; all others are its random kind.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unimm.data.shapes import COLORS, SHAPES, Scene, Turn, render, sample_conversation
from unimm.errors import UserError

QUESTIONS_PER_SCENE = 2
TURNS = 8  # tried for each scene, to find a yes and a no among them
Row = dict[str, Any]


def sample_pairs(count: int, seed: int) -> Iterator[tuple[Scene, Turn, Turn]]:
    """`count` scenes with a question that is answered yes and one that is answered no.

    Training seeds its scenes by pairs of other numbers and never meets these.
    """
    rng, found = np.random.default_rng([seed, *b"yes or no"]), 0
    while found < count:
        scene, turns = sample_conversation(rng, num_turns=TURNS, kind_shares={"existence": 1.0})
        yes = [turn for turn in turns if turn.answer == "yes"]
        no = [turn for turn in turns if turn.answer == "no"]
        if found % 2:  # adversarial ones are rare: take them where there are some
            no.sort(key=lambda turn: pope_kind(scene, turn.question))
        if yes and no:
            found += 1
            yield scene, yes[0], no[0]


def pope_kind(scene: Scene, question: str) -> str:
    """`adversarial` or `random`, by the question whose answer is no."""
    words = question.rstrip("?").split()
    there = {part for obj in scene.objects for part in (obj.color, obj.shape)}
    named = [word for word in words if word in (*COLORS, *SHAPES)]
    return "adversarial" if len(named) == 2 and set(named) <= there else "random"


def rows(questions: int, seed: int) -> tuple[list[Row], list[Row]]:
    """The same questions in MME's schema and in POPE's.

    Raises:
        UserError: an odd number of questions.
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
    """Write `shapes_MME` and `shapes_POPE` into `folder`, laid out as data sets of the hub are."""
    for name, table in zip(("shapes_MME", "shapes_POPE"), rows(questions, seed), strict=True):
        write_parquet(table, folder / name / "data" / "test-00000-of-00001.parquet")


def write_parquet(table: list[Row], path: Path) -> None:
    """Rows as a parquet file; columns of PIL images, single or in lists, are marked as images for its readers."""
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(table).to_parquet(path)
