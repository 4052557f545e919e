"""Sanity checks for VQA models: a model that fails on images of known content is not used as a scorer.

A VQA model on the wrong device, or with the wrong weights or preprocessing, still returns scores, and nothing else
would show that they are wrong.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from unimm.data.images import load_image
from unimm.english import with_article
from unimm.errors import UserError
from unimm.evaluation.metrics.answers import same_answer
from unimm.evaluation.vqa import VQAModel

ABSENT = "zebra"
"""An object that none of the photographs shows."""
SANITY_IMAGES, FORMER_NAME = "sanity_images.jsonl", "canaries.jsonl"


class KnownAnswer(NamedTuple):
    """A question about an image, and the only right answer."""

    name: str
    image: Image.Image
    question: str
    expected: str


def photographs() -> dict[str, Image.Image]:
    """Return scikit-image's photographs of a cat, a person and a cup, by what they show.

    Raises:
        UserError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError:
        raise UserError(
            "The known images come with scikit-image, which is not installed: install unimm[eval], or give images "
            "of your own with --sanity-images FOLDER."
        ) from None
    shown = {"cat": data.chelsea, "person": data.astronaut, "cup": data.coffee}
    return {name: Image.fromarray(pixels()) for name, pixels in shown.items()}


def known_answers(folder: str | Path | None = None) -> list[KnownAnswer]:
    """Return questions about the photographs: whether they show their subject, and whether they show a zebra.

    Args:
        folder: use the user's own questions instead: images, and sanity_images.jsonl with a line {"image": a file of
            the folder, "question": ..., "answer": ...} for each question.

    Raises:
        UserError: the folder cannot be read as such, or there is neither a folder nor scikit-image.
    """
    if folder is not None:
        return _own(Path(folder))
    return [
        KnownAnswer(f"the photograph of a {name}", image, f"Is there {with_article(asked)}?", answer)
        for name, image in photographs().items()
        for asked, answer in ((name, "yes"), (ABSENT, "no"))
    ]


def check_vqa_model(vqa_model: VQAModel, known: Sequence[KnownAnswer]) -> int:
    """Check a VQA model on questions with known answers; return the number of questions.

    Raises:
        UserError: there are no questions, a score is not finite, or an answer is wrong.
    """
    if not known:
        raise UserError(f"{vqa_model.name} has no known image to be asked about first: give --sanity-images FOLDER.")
    said = vqa_model.answer_yes_no([each.image for each in known], [each.question for each in known])
    for each, given in zip(known, said, strict=True):
        if given.probability is not None and not math.isfinite(given.probability):
            raise UserError(f"{vqa_model.name} gives scores that are not finite for {each.name}: it scores nothing.")
        if not same_answer(given.answer, each.expected):
            raise UserError(
                f"{vqa_model.name} fails on an image that is known: of {each.name} it answers {each.question!r} with "
                f"{given.answer!r}, expected {each.expected!r}. Nothing is scored with it; check its weights and "
                "--device, or go on with --no-sanity-check, which the result will say."
            )
    return len(known)


def _own(folder: Path) -> list[KnownAnswer]:
    path = folder / SANITY_IMAGES
    if not path.exists() and (folder / FORMER_NAME).exists():
        path = folder / FORMER_NAME
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        asked = [(str(row["image"]), str(row["question"]), str(row["answer"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as lines of image, question and answer: {error!r}.") from error
    return [KnownAnswer(name, load_image(folder / name), question, answer) for name, question, answer in asked]
