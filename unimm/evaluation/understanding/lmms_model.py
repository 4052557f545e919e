"""unimm's models inside lmms-eval (extra `lmms`; https://github.com/EvolvingLMMs-Lab/lmms-eval).

    lmms-eval --model unimm --model_args pretrained=PATH --tasks mme --batch_size 8

Against the wrappers that lmms-eval ships: `until` is applied, unknown generation settings of a task are
left out and unknown `--model_args` refused; an answer depends neither on its batch nor on the number of ranks; and
the response cache, whose key knows the model by its `--model_args` only, is refused unless these name the weights.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NoReturn, Protocol

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from PIL import ImageFile
from tqdm import tqdm

from unimm.data.images import DECODER_ERRORS, read_image
from unimm.errors import UserError, one_line
from unimm.evaluation.runs.records import UNREADABLE
from unimm.mllm import load
from unimm.mllm.answering import Answer, Conversation, answer_all
from unimm.runs.provenance import model_fingerprint

MODEL_ID = "unimm"
DEFAULT_NEW_TOKENS = 64
DTYPES = ("float32", "bfloat16", "float16")
SAMPLING = ("temperature", "top_p", "top_k")
KNOWN_SETTINGS = ("max_new_tokens", "num_beams", "do_sample", *SAMPLING)
"""What tasks may set; they send keys of other models along, which are left out."""


def manifests() -> Any:
    """What the entry point `lmms_eval.models` registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL_ID, chat_class_path=f"{__name__}.{UnimmChat.__name__}", aliases=(f"{MODEL_ID}_chat",)
    )


class Memory(Protocol):
    """Answers of an earlier run, and the place where new ones go at once."""

    def begin(self, documents: Mapping[str, Any]) -> None:
        """Called on every process before the first answer: task -> split -> its documents."""

    def recall(self, task: str, doc_id: int) -> Answer | None: ...

    def keep(self, task: str, doc_id: int, document: Mapping[str, Any], prompt: str, answer: Answer) -> None: ...


class UnreadableImage(UserError):
    """An image of a document cannot be read."""


@dataclass(frozen=True)
class _Asked:
    """One request: where its answer goes, what it is about, and how it is to be answered."""

    place: int
    task: str
    split: str
    doc_id: int
    prompt: str
    messages: Any
    settings: tuple[tuple[str, Any], ...]
    until: tuple[str, ...]


class ChatModel(lmms):
    """A loaded unified model as lmms-eval's chat model.

    Args:
        batch_size: conversations in one forward of a rank.
        default_max_new_tokens: longest answer where a task does not say (TextVQA, SEED).
        memory: asked before the model is, told every new answer; greedy answers only.
    """

    is_simple = False

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        batch_size: int = 1,
        default_max_new_tokens: int = DEFAULT_NEW_TOKENS,
        memory: Memory | None = None,
    ) -> None:
        super().__init__()
        self.subject = (model, processor)  # in a tuple: `clean` deletes attributes that are modules
        self.batch_size = _count("batch_size", batch_size)
        self.default_max_new_tokens = _count("default_max_new_tokens", default_max_new_tokens)
        self.memory = memory
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.accelerator = Accelerator(cpu=model.device.type == "cpu")

    @property
    def device(self) -> torch.device:
        """Where lmms-eval puts what its ranks exchange."""
        device: torch.device = self.subject[0].device
        return device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """One answer for each request, in their order; those with equal settings share batches, whatever their task."""
        if self.memory is not None:
            self.memory.begin(self.task_dict)
        groups: dict[Any, list[_Asked]] = {}
        for place, request in enumerate(requests):
            asked = self._asked(place, request)
            groups.setdefault((asked.settings, asked.until), []).append(asked)
        results: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), desc="answers", disable=self.rank != 0) as bar:
            for (settings, until), group in groups.items():
                for asked, answer in self._answered(group, dict(settings), until):
                    counts = TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=answer.new_tokens)
                    results[asked.place] = GenerationResult(answer.text, counts)
                    bar.update()
        return [results[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        raise UserError("unimm answers by writing: take a task of the kind generate_until, not loglikelihood.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        raise UserError("unimm answers single questions: take a task of the kind generate_until, not multi_round.")

    def _asked(self, place: int, request: Instance) -> _Asked:
        prompt, messages, given, doc_id, task, split = request.args
        settings, until = generation_settings(given, self.default_max_new_tokens)
        return _Asked(place, task, split, doc_id, prompt, messages, tuple(sorted(settings.items())), until)

    def _answered(
        self, group: Sequence[_Asked], settings: dict[str, Any], until: tuple[str, ...]
    ) -> Iterator[tuple[_Asked, Answer]]:
        memory = None if settings["do_sample"] else self.memory
        known = [None if memory is None else memory.recall(asked.task, asked.doc_id) for asked in group]
        yield from ((asked, answer) for asked, answer in zip(group, known, strict=True) if answer is not None)
        waiting = iter([asked for asked, answer in zip(group, known, strict=True) if answer is None])
        while batch := list(islice(waiting, self.batch_size)):
            read = [self._conversation(asked) for asked in batch]
            good = [turns for turns, _ in read if turns is not None]
            answers = iter(answer_all(*self.subject, good, **settings) if good else [])
            for asked, (turns, document) in zip(batch, read, strict=True):
                # about an image that cannot be read nothing is asked: an empty answer, which counts as unparsed
                whole = Answer("", 0, 0) if turns is None else next(answers)
                answer = replace(whole, text=cut_at_first(whole.text, until))
                # the shorter rank asks its last question again until all ranks have asked as many
                if memory is not None and memory.recall(asked.task, asked.doc_id) is None:
                    memory.keep(asked.task, asked.doc_id, document, asked.prompt, answer)
                yield asked, answer

    def _conversation(self, asked: _Asked) -> tuple[Conversation | None, Mapping[str, Any]]:
        """Return what is asked, None if its image cannot be read, and the document, then without its images."""
        documents = self.task_dict[asked.task][asked.split]
        try:
            with cut_off_images_refused():
                document = documents[asked.doc_id]
                return conversation(asked.messages(document), asked.task), document
        except DECODER_ERRORS as error:
            if isinstance(error, UserError) and not isinstance(error, UnreadableImage):
                raise  # the task shows what nobody here can read
            reason = one_line(error)
        logger.warning("unimm: document {} of {} is answered by nothing: {}", asked.doc_id, asked.task, reason)
        return None, {UNREADABLE: reason} | without_images(documents, asked.doc_id)


@contextlib.contextmanager
def cut_off_images_refused() -> Iterator[None]:
    """Undo within what lmms-eval sets for all of Pillow: the missing part of a cut-off file would be read as black."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def without_images(documents: Any, doc_id: int) -> dict[str, Any]:
    """Return a document of a `datasets.Dataset` without the columns that hold images."""
    names = [name for name, feature in documents.features.items() if "Image(" in repr(feature)]
    document: dict[str, Any] = documents.remove_columns(names)[doc_id]
    return document


class UnimmChat(ChatModel):
    """What `--model unimm` is.

    Args (of `--model_args`, beside those of `ChatModel`):
        pretrained: a unified model's folder or hub id; the default of the library unless given.
        dtype: float32, bfloat16 or float16; unless given float32 on the CPU, else bfloat16.
        fingerprint: of the weights, as it is logged when the model is loaded; needed beside `--use_cache`.

    Raises:
        UserError: unknown arguments, other weights than `fingerprint` names, or a cache without it.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        default_max_new_tokens: int = DEFAULT_NEW_TOKENS,
        dtype: str | None = None,
        fingerprint: str | None = None,
        **unknown: Any,
    ) -> None:
        known = "pretrained, dtype, default_max_new_tokens, fingerprint, device, batch_size"
        if unknown:
            raise UserError(f"--model_args has no {', '.join(sorted(unknown))}; it has {known}.")
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"--model_args dtype={dtype} is none of {', '.join(DTYPES)}.")
        model, processor = load(pretrained, device, None if dtype is None else getattr(torch, dtype))
        super().__init__(model, processor, batch_size=batch_size, default_max_new_tokens=default_max_new_tokens)
        _check_fingerprint(short_fingerprint(model), fingerprint)


def generation_settings(
    given: Mapping[str, Any], default_max_new_tokens: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What of a task's `generation_kwargs` goes to `generate`, and where answers are cut.

    Greedy where the task says so by `do_sample: false` or a temperature of 0 or None, or says nothing; the settings of
    sampling are then left out.
    """
    until = given.get("until") or ()
    settings = {name: given[name] for name in KNOWN_SETTINGS if given.get(name) is not None}
    settings.setdefault("max_new_tokens", default_max_new_tokens)
    temperature = given.get("temperature", 1.0 if given.get("do_sample") else 0)
    settings["do_sample"] = bool(given.get("do_sample", temperature)) and bool(temperature)
    if not settings["do_sample"]:
        settings = {name: value for name, value in settings.items() if name not in SAMPLING}
    return settings, (until,) if isinstance(until, str) else tuple(until)


def cut_at_first(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings in `until`; empty ones do not count."""
    for end in until:
        text = text.partition(end)[0] if end else text
    return text.strip()


def conversation(messages: Sequence[Mapping[str, Any]], task: str) -> Conversation:
    """A task's messages in the chat format of transformers.

    Raises:
        UserError: something else than texts and images is shown; UnreadableImage, if an image cannot be read.
    """
    from lmms_eval.protocol import ChatMessages

    turns = ChatMessages(messages=messages).messages
    return [{"role": turn.role, "content": [_part(part, task) for part in turn.content]} for turn in turns]


def _part(part: Any, task: str) -> dict[str, Any]:
    if part.type == "text":
        return {"type": "text", "text": part.text}
    if part.type != "image":
        raise UserError(f"The task {task} shows {part.type}; unimm reads texts and images only.")
    try:
        image = read_image(part.url)
    except DECODER_ERRORS as error:
        raise UnreadableImage(one_line(error)) from error
    return {"type": "image", "image": image}


def _count(name: str, given: Any) -> int:
    if not str(given).isdecimal() or int(given) < 1:
        raise UserError(f"{name} is {given!r}; give a whole number from 1.")
    return int(given)


def short_fingerprint(model: torch.nn.Module) -> str:
    """Of the weights, in a form that `--model_args` leaves a string: digits alone, or 12e45, would become numbers."""
    return "w" + model_fingerprint(model)[:16]


def _check_fingerprint(found: str, given: str | None) -> None:
    """Refuse a cache that would serve another checkpoint's answers."""
    if given is not None and given != found:
        raise UserError(f"These weights have the fingerprint {found}, --model_args names {given}: correct it.")
    cached = any(argument.partition("=")[0] == "--use_cache" for argument in sys.argv)
    if given is None and cached:
        raise UserError(
            "lmms-eval's cache does not know the weights and would serve stale answers after a checkpoint changed: add "
            f"fingerprint={found} to --model_args."
        )
    logger.info("unimm: the weights have the fingerprint {}", found)
