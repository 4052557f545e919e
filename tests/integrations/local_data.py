"""A few rows of each benchmark in its real schema, as parquet files laid out as on the hub; images of the image
world."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image

from unimm.data.shapes import render, sample_scene

Row = dict[str, Any]
OPTIONS = ("circle", "square", "ring", "cross")
ROTATION = 1_000_000


def image(number: int) -> Image.Image:
    return render(sample_scene(np.random.default_rng([7, number])))


def mme() -> list[Row]:
    questions = ("Is there a red circle", "Is there a blue square")
    kinds = ("existence", "existence", "count", "commonsense_reasoning")
    return [
        {
            "question_id": f"{kind}/{number:04d}.png",
            "image": image(number),
            "question": f"{question} in image {number}? Please answer yes or no.",
            "answer": answer,
            "category": kind,
        }
        for number, kind in enumerate(kinds)
        for question, answer in zip(questions, ("Yes", "No"), strict=True)
    ]


def pope() -> list[Row]:
    return [
        {
            "id": str(number),
            "question_id": str(number + 1),
            "question": f"Is there a {OPTIONS[number % 4]} in image {number}?",
            "answer": "yes" if number % 2 else "no",
            "image_source": f"COCO_val2014_{number // 3:012d}",
            "image": image(number // 3),
            "category": category,
        }
        for number, category in enumerate(kind for kind in ("adversarial", "popular", "random") for _ in range(5))
    ]


def gqa() -> list[Row]:
    asked = [("What color is the circle?", "red"), ("Is there a ring?", "yes"), ("Is there a cross?", "no")]
    asked += [("How many objects are there?", "two"), ("What shape is it?", "b"), ("Is it there?", "No")]
    return [
        {
            "id": f"2017{number}",
            "imageId": f"n{number}",
            "question": question,
            "answer": answer,
            "fullAnswer": f"It is {answer}.",
            "image": image(number),
        }
        for number, (question, answer) in enumerate(asked)
    ]


def textvqa() -> list[Row]:
    annotated = [["red"] * 3 + ["blue"] * 7, ["yes"] * 10, ["no"] * 2 + ["two"] * 8, ["b"] + ["yes"] * 9]
    return [
        {
            "image_id": f"i{number}",
            "question_id": 34602 + number,
            "question": f"what does NASA write on sign {number}?",
            "image": image(number),
            "ocr_tokens": ["STOP", f"No{number}"],
            "answers": answers,
            "set_name": "val",
        }
        for number, answers in enumerate(annotated)
    ]


def mmbench() -> list[Row]:
    rows = []
    for number in range(3):
        for turn in range(2):
            options = OPTIONS[turn:] + OPTIONS[:turn]
            rows.append(
                {
                    "index": number + turn * ROTATION,
                    "question": f"Which shape is number {number}?",
                    "hint": "nan" if number else "Look at the middle.",
                    "answer": "ABCD"[options.index(OPTIONS[1])],
                    **dict(zip("ABCD", options, strict=True)),
                    "category": "object_localization" if number else "attribute_recognition",
                    "image": image(number),
                    "source": "shapes",
                    "L2-category": "finegrained_perception",
                    "comment": "nan",
                    "split": "dev",
                }
            )
    return rows


def seed() -> list[Row]:
    return [
        {
            "question_id": str(number),
            "question": f"What is shape {number}?",
            **{f"choice_{letter}": option for letter, option in zip("abcd", OPTIONS, strict=True)},
            "answer": "ABCD"[number % 4],
            "data_id": f"d{number}",
            "data_type": "video" if number == 4 else "image",
            "question_type_id": 1,
            "image": [image(number), image(number + 1)] if number == 4 else [image(number)],
        }
        for number in range(6)
    ]


def mmmu() -> list[Row]:
    choice, written = "multiple-choice", "open"
    asked = [
        ("Art_Theory_1", "Compare <image 1> with <image 2>: which is rounder?", str(list(OPTIONS)), "C", choice, 2),
        ("Art_Theory_2", "Which shape is in <image 1>?", "['first', 'second', 'the \"third\" one']", "C", choice, 1),
        ("Math_1", "Which of these is even, with no image to see?", "['two', 'three']", "A", choice, 0),
        ("Math_2", "How many objects does <image 1> show?", "[]", "2", written, 1),
        ("Math_3", "What color is the object in <image 1>?", "[]", "red", written, 1),
    ]
    return [
        {
            "id": f"validation_{name}",
            "question": question,
            "options": options,
            "explanation": "",
            **{f"image_{place}": image(place) if place <= images else None for place in range(1, 8)},
            "img_type": "['Diagrams']",
            "answer": answer,
            "topic_difficulty": "Easy",
            "question_type": kind,
            "subfield": name.partition("_")[0],
        }
        for name, question, options, answer, kind, images in asked
    ]


def ai2d() -> list[Row]:
    return [
        {
            "question": f"Which shape is labelled {number}?",
            "options": list(OPTIONS),
            "answer": str(number % 4),
            "image": image(number),
        }
        for number in range(6)
    ]


# folder on the hub, place of the parquet file below it, rows
TABLES = {
    "mme": ("MME", "data/test-00000-of-00001.parquet", mme),
    "pope": ("POPE", "data/test-00000-of-00001.parquet", pope),
    "gqa": ("GQA", "testdev_balanced_instructions/testdev-00000-of-00001.parquet", gqa),
    "textvqa": ("textvqa", "data/validation-00000-of-00001.parquet", textvqa),
    "mmbench": ("MMBench", "en/dev-00000-of-00001.parquet", mmbench),
    "seed": ("SEED-Bench", "data/test-00000-of-00001.parquet", seed),
    "mmmu": ("MMMU", "data/validation-00000-of-00001.parquet", mmmu),
    "ai2d": ("ai2d", "data/test-00000-of-00001.parquet", ai2d),
}


def write(folder: Path) -> None:
    """Write all tables below `folder`."""
    for name, place, rows in TABLES.values():
        table = Dataset.from_list(rows())
        for column, feature in table.features.items():
            if column.startswith("image_") and feature.dtype == "null":  # an image that no row has
                table = table.cast_column(column, ImageColumn())
        path = folder / name / place
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path)
