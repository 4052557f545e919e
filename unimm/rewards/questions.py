"""Rewards by answers to questions about the image: a VQA model's, or the model's own (self-reward).

The questions follow from GenEval's rules (`unimm.evaluation.geneval.questions`); the reward is the share of right
answers. Prompts without rules are asked about as a whole, if the VQA model has a probability of "yes" (VQAScore,
https://arxiv.org/abs/2404.01291).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from PIL import Image

from unimm.english import NUMBERS, plural, with_article
from unimm.errors import UserError
from unimm.evaluation.geneval.questions import Question, questions, score_answers
from unimm.evaluation.metrics.answers import same_answer
from unimm.evaluation.vqa import YesNo
from unimm.mllm.answering import answer_all
from unimm.rewards.base import Metadata, require_rules

MAX_ANSWER_TOKENS = 16
WHOLE = "Does this figure show {prompt!r}? Please answer yes or no."


class AnswersQuestions(Protocol):
    """The part of a VQA model that is needed; `unimm.evaluation.vqa.load_vqa_model` returns one."""

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]: ...

    def answer_yes_no(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[YesNo]: ...


class VQAReward:
    """The share of right answers of a VQA model to questions about the image; without rules in the metadata, its
    probability of "yes" to the whole prompt."""

    def __init__(self, model: AnswersQuestions) -> None:
        self.model = model

    def score(self, prompts: Sequence[str], metadata: Sequence[Metadata], images: Sequence[Image.Image]) -> list[float]:
        """Return a number in [0, 1] for each image. Raises UserError if a prompt has no rules and the model no
        probabilities."""
        if not all("include" in each for each in metadata):
            found = self.model.answer_yes_no(images, [WHOLE.format(prompt=prompt) for prompt in prompts])
            if any(each.probability is None for each in found):
                raise UserError(
                    "The prompts have no rules, and this VQA model no probability of yes: take a chat model."
                )
            return [float(each.probability or 0.0) for each in found]
        asked = [questions(each) for each in metadata]
        pairs = [(image, question.text) for image, each in zip(images, asked, strict=True) for question in each]
        answers = iter(self.model.answer([image for image, _ in pairs], [text for _, text in pairs]))
        return [score_answers(each, [next(answers) for _ in each]).score for each in asked]


class OwnAnswersReward:
    """The share of right answers of the starting model itself to questions about its drawing, which nobody outside
    has judged.

    Args:
        model: returns a context that holds the judging model, see `unimm.training.policy.reference`.
        processor: its processor.
        in_shapes: ask in the words of the shapes data set, which a model trained on it alone understands.
        batch_size: questions at once.
    """

    def __init__(
        self,
        model: Callable[[], AbstractContextManager[Any]],
        processor: Any,
        *,
        in_shapes: bool = False,
        batch_size: int = 64,
    ) -> None:
        self.model, self.processor, self.in_shapes, self.batch_size = model, processor, in_shapes, batch_size

    def score(self, prompts: Sequence[str], metadata: Sequence[Metadata], images: Sequence[Image.Image]) -> list[float]:
        """Return a number in [0, 1] for each image. Raises UserError for metadata without rules."""
        require_rules(metadata, "own_answers")
        asked = [list(shapes_questions(each)) if self.in_shapes else questions(each) for each in metadata]
        pairs = [(image, question.text) for image, each in zip(images, asked, strict=True) for question in each]
        answers = iter(self._answers(pairs))
        scores = []
        for each in asked:
            own = [next(answers) for _ in each]
            if self.in_shapes:
                right = [same_answer(answer, question.expected) for answer, question in zip(own, each, strict=True)]
                scores.append(sum(right) / len(right))
            else:
                scores.append(score_answers(each, own).score)
        return scores

    def _answers(self, pairs: Sequence[tuple[Image.Image, str]]) -> list[str]:
        found: list[str] = []
        with self.model() as model:
            for start in range(0, len(pairs), self.batch_size):
                talks = [
                    [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
                    for image, text in pairs[start : start + self.batch_size]
                ]
                found += [
                    each.text for each in answer_all(model, self.processor, talks, max_new_tokens=MAX_ANSWER_TOKENS)
                ]
        return found


def shapes_questions(metadata: Metadata) -> Iterator[Question]:
    """Yield questions about a prompt of the shapes data set, in its own words: for every rule the number of its shape,
    and its color or its place if the rule names one."""
    include = metadata["include"]
    for rule in include:
        name = rule["class"]
        yield Question("count", f"How many {plural(name)} are there?", NUMBERS[rule["count"]])
        if color := rule.get("color"):
            yield Question("color", f"What color is the {name}?", color)
            yield Question("existence", f"Is there {with_article(f'{color} {name}')}?", "yes")
        if position := rule.get("position"):
            relation, target = position
            words = f"Where is the {name} relative to the {include[target]['class']}?"
            yield Question("position", words, relation)
