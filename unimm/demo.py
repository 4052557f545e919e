"""The demo page: reconstructions, answers and generated images on unseen scenes, in one self-contained HTML file.

Three parts from one seed: originals and their reconstructions, questions and answers, prompts and images. The prompts
are from the test split of the shapes data set. Images are data URIs, so the page can be moved or mailed.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from unimm.chat import ChatSession
from unimm.data.shapes import TAGS, Prompt, Scene, Turn, render, sample_conversation, sample_prompt, sample_scene
from unimm.data.shapes.phrasings import HELD_OUT, REQUESTS, reworded
from unimm.data.shapes.prompts import split_of
from unimm.evaluation.metrics.answers import same_answer
from unimm.evaluation.runs.html import base_style, data_uri
from unimm.runs.provenance import write_atomically
from unimm.runs.report import timed

PAGE_NAME = "index.html"
LONGEST_ANSWER = 64  # tokens
QUESTION_KINDS = frozenset({"existence", "color", "count", "position"})
"""Question kinds with one right answer, which the page marks as right or wrong; a description has many."""


@dataclass(frozen=True)
class DemoPlan:
    """The inputs of the demo, all of them a function of the seed."""

    reconstructions: list[Scene]
    conversations: list[tuple[Scene, list[Turn]]]
    prompts: list[Prompt]
    seed: int

    @classmethod
    def sample(cls, seed: int, *, scenes: int = 8, talks: int = 4, turns: int = 3, per_tag: int = 2) -> "DemoPlan":
        """Sample the scenes, the conversations and the held-out prompts (`per_tag` for each tag), each in another kind
        of wording."""
        rng, words = np.random.default_rng(seed), np.random.default_rng((seed, 1))
        reconstructions = [sample_scene(rng) for _ in range(scenes)]
        conversations = [sample_conversation(rng, num_turns=turns) for _ in range(talks)]
        prompts = [sample_prompt(rng, tag, split="test") for tag in TAGS for _ in range(per_tag)]
        return cls(
            reconstructions=reconstructions,
            conversations=conversations,
            prompts=[_as_people_ask(words, prompt, number) for number, prompt in enumerate(prompts)],
            seed=seed,
        )


def _as_people_ask(rng: np.random.Generator, prompt: Prompt, number: int) -> Prompt:
    """Return the prompt in a wording of the kind `number`, or of the next one that has a held-out wording for it."""
    kinds = tuple(REQUESTS)
    first = number % len(kinds)
    for kind in (*kinds[first:], *kinds[:first]):
        asked = reworded(rng, prompt, kind)
        if asked is not None and (kind in HELD_OUT or split_of(asked.prompt) == "test"):
            return asked
    return prompt


@dataclass
class DemoResult:
    """The model's outputs for a `DemoPlan`."""

    pairs: list[tuple[Image.Image, Image.Image]] = field(default_factory=list)
    talks: list[tuple[Image.Image, list[tuple[Turn, str]]]] = field(default_factory=list)
    drawings: list[tuple[str, Image.Image]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def score(self) -> dict[str, int]:
        """Count the questions with one right answer, and how many of them were answered correctly (exact match)."""
        marked = [(turn, answer) for _, talk in self.talks for turn, answer in talk if turn.kind in QUESTION_KINDS]
        return {"asked": len(marked), "right": sum(same_answer(answer, turn.answer) for turn, answer in marked)}


def run_demo(model: Any, processor: Any, plan: DemoPlan) -> DemoResult:
    """Reconstruct, answer and generate with the model; show one progress bar on standard error."""
    result = DemoResult()
    steps = 1 + sum(len(turns) for _, turns in plan.conversations) + len(plan.prompts)
    with tqdm(total=steps, desc="demo", leave=False) as bar:
        with timed(result.seconds, "reconstruct"):
            originals = [render(scene) for scene in plan.reconstructions]
            result.pairs = list(zip(originals, reconstruct(model, processor, originals), strict=True))
            bar.update()
        with timed(result.seconds, "answer", share=steps - 1 - len(plan.prompts)):
            for scene, turns in plan.conversations:
                image = render(scene)
                result.talks.append((image, list(_talk(model, processor, image, turns, bar))))
        with timed(result.seconds, "per_image", share=len(plan.prompts)):
            for number, prompt in enumerate(plan.prompts):
                (raw_image,) = ChatSession(model, processor).draw(prompt.prompt, num_images=1, seed=plan.seed + number)
                result.drawings.append((prompt.prompt, raw_image))
                bar.update()
    return result


@torch.inference_mode()
def reconstruct(model: Any, processor: Any, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Encode the images to ids and decode them again, at the tokenizer's own size."""
    image_processor, tokenizer = processor.image_processor, model.image_tokenizer
    pixel_values = image_processor(list(images), return_tensors="pt")["pixel_values"].to(tokenizer.device)
    return image_processor.postprocess(tokenizer.decode(tokenizer.encode(pixel_values).ids))


def write_page(result: DemoResult, folder: str | Path, *, title: str, seed: int) -> Path:
    """Write the page into `folder` atomically and return its path."""
    folder = Path(folder)
    score = result.score()
    page = Template(resources.files("unimm").joinpath("demo.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        style=base_style(),
        seed=seed,
        pairs="\n".join(_pair(original, copy) for original, copy in result.pairs),
        talks="\n".join(_conversation(image, talk) for image, talk in result.talks),
        drawings="\n".join(_drawing(prompt, raw_image) for prompt, raw_image in result.drawings),
        score=f"{score['right']} of {score['asked']} right",
        seconds=", ".join(f"{name.replace('_', ' ')} {value:.2f} s" for name, value in result.seconds.items()),
    )
    path = folder / PAGE_NAME
    write_atomically(path, page)
    return path


# ---- the parts -------------------------------------------------------------------------------------------------------


def _talk(
    model: Any, processor: Any, image: Image.Image, turns: Sequence[Turn], bar: Any
) -> Iterator[tuple[Turn, str]]:
    """Yield the turns of one conversation with their answers; the image is passed with the first question only."""
    session = ChatSession(model, processor, max_new_tokens=LONGEST_ANSWER)
    for number, turn in enumerate(turns):
        yield turn, session.ask(turn.question, images=[image] if number == 0 else None)
        bar.update()


def _image(image: Image.Image, alt: str) -> str:
    return f'<img src="{data_uri(image)}" alt="{html.escape(alt, quote=True)}">'


def _pair(original: Image.Image, copy: Image.Image) -> str:
    return f'<figure class="pair">{_image(original, "original")}{_image(copy, "reconstruction")}</figure>'


def _conversation(image: Image.Image, talk: Sequence[tuple[Turn, str]]) -> str:
    lines = []
    for turn, answer in talk:
        mark = ""
        if turn.kind in QUESTION_KINDS:
            right = same_answer(answer, turn.answer)
            note = "right" if right else f"it is: {turn.answer}"
            mark = f' <span class="{"right" if right else "wrong"}">{html.escape(note)}</span>'
        lines.append(f"<dt>{html.escape(turn.question)}</dt><dd>{html.escape(answer) or '(no answer)'}{mark}</dd>")
    return f'<article class="talk">{_image(image, "the image asked about")}<dl>{"".join(lines)}</dl></article>'


def _drawing(prompt: str, image: Image.Image) -> str:
    return f'<figure class="drawing">{_image(image, prompt)}<figcaption>{html.escape(prompt)}</figcaption></figure>'
