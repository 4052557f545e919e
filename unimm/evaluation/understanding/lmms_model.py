"""unimm models as an lmms-eval chat model (extra `lmms`; https://github.com/EvolvingLMMs-Lab/lmms-eval).

    lmms-eval --model unimm --model_args pretrained=PATH --tasks mme --batch_size 8

Differences from the wrappers that lmms-eval ships: `until` is applied; unknown generation settings of a task are
dropped and unknown `--model_args` are rejected; an answer depends neither on its batch nor on the number of ranks; the
response cache, whose key identifies the model by its `--model_args` only, is rejected unless these name the weights.
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
"""Generation settings that tasks may set; tasks also pass keys meant for other models, which are dropped."""


def manifests() -> Any:
    """Return the manifest that the entry point `lmms_eval.models` registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL_ID, chat_class_path=f"{__name__}.{UnimmChat.__name__}", aliases=(f"{MODEL_ID}_chat",)
    )


class Memory(Protocol):
    """A store of answers: it returns those of an earlier run, and saves new ones immediately."""

    def begin(self, documents: Mapping[str, Any]) -> None:
        """Prepare for `documents` (task -> split -> documents); called on every process before the first answer."""

    def recall(self, task: str, doc_id: int) -> Answer | None: ...

    def keep(self, task: str, doc_id: int, document: Mapping[str, Any], prompt: str, answer: Answer) -> None: ...


class UnreadableImage(UserError):
    """An image of a document cannot be read."""


@dataclass(frozen=True)
class _Asked:
    """One request: its place in the output, its document and prompt, and its generation settings."""

    place: int
    task: str
    split: str
    doc_id: int
    prompt: str
    messages: Any
    settings: tuple[tuple[str, Any], ...]
    until: tuple[str, ...]


class ChatModel(lmms):
    """A loaded unified model, wrapped as an lmms-eval chat model.

    Args:
        batch_size: conversations per forward pass of a rank.
        default_max_new_tokens: maximum answer length if a task does not set one (TextVQA, SEED).
        memory: queried before the model, and given every new answer; greedy answers only.
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
        """Return the device that lmms-eval uses for tensors exchanged between ranks."""
        device: torch.device = self.subject[0].device
        return device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Return one answer per request, in order; requests with equal settings share batches, whatever their task."""
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
                # the model is not prompted about an unreadable image: its answer is empty, and counts as unparsed
                whole = Answer("", 0, 0) if turns is None else next(answers)
                answer = replace(whole, text=cut_at_first(whole.text, until))
                # lmms-eval pads the ranks to equal length by repeating the last request: keep its answer only once
                if memory is not None and memory.recall(asked.task, asked.doc_id) is None:
                    memory.keep(asked.task, asked.doc_id, document, asked.prompt, answer)
                yield asked, answer

    def _conversation(self, asked: _Asked) -> tuple[Conversation | None, Mapping[str, Any]]:
        """Return the conversation and the document; None and a document without images if an image is unreadable."""
        documents = self.task_dict[asked.task][asked.split]
        try:
            with cut_off_images_refused():
                document = documents[asked.doc_id]
                return conversation(asked.messages(document), asked.task), document
        except DECODER_ERRORS as error:
            if isinstance(error, UserError) and not isinstance(error, UnreadableImage):
                raise  # the task shows another modality: a fault of the task, not of this document
            reason = one_line(error)
        logger.warning("unimm: document {} of {} is answered by nothing: {}", asked.doc_id, asked.task, reason)
        return None, {UNREADABLE: reason} | without_images(documents, asked.doc_id)


@contextlib.contextmanager
def cut_off_images_refused() -> Iterator[None]:
    """Disable Pillow's LOAD_TRUNCATED_IMAGES in this context; lmms-eval enables it globally.

    With it, the missing part of a truncated file would be read as black.
    """
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
    """The class behind `--model unimm`.

    Args (of `--model_args`, in addition to those of `ChatModel`):
        pretrained: folder or hub id of a unified model; defaults to the library's default model.
        dtype: float32, bfloat16 or float16; defaults to float32 on the CPU, else bfloat16.
        fingerprint: fingerprint of the weights, as logged when the model is loaded; required with `--use_cache`.

    Raises:
        UserError: unknown arguments, weights that do not match `fingerprint`, or a cache without a fingerprint.
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
    """Return the settings for `generate` from a task's `generation_kwargs`, and the strings at which answers are cut.

    Greedy if the task sets `do_sample: false` or a temperature of 0 or None, or sets neither; the sampling settings are
    then dropped.
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
    """Return the text before the first of the strings in `until`, stripped; empty strings are ignored."""
    for end in until:
        text = text.partition(end)[0] if end else text
    return text.strip()


def conversation(messages: Sequence[Mapping[str, Any]], task: str) -> Conversation:
    """Convert a task's messages to the chat format of transformers.

    Raises:
        UserError: the messages hold anything but text and images; UnreadableImage, if an image cannot be read.
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
    """Return a short fingerprint of the weights, prefixed by a letter.

    Without the letter, `--model_args` would parse digits alone, or 12e45, as a number.
    """
    return "w" + model_fingerprint(model)[:16]


def _check_fingerprint(found: str, given: str | None) -> None:
    """Raise UserError if the cache could return another checkpoint's answers."""
    if given is not None and given != found:
        raise UserError(f"These weights have the fingerprint {found}, --model_args names {given}: correct it.")
    cached = any(argument.partition("=")[0] == "--use_cache" for argument in sys.argv)
    if given is None and cached:
        raise UserError(
            "lmms-eval's cache does not know the weights and would serve stale answers after a checkpoint changed: add "
            f"fingerprint={found} to --model_args."
        )
    logger.info("unimm: the weights have the fingerprint {}", found)
