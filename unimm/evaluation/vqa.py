"""VQA models that score generated images by answering questions about them: BLIP-VQA, ViLT, any chat model, mPLUG.

An answer depends only on its image and question. Requests whose tensors have equal shapes share a forward, and nothing
is padded: BLIP's decoder attends to the padding of its question. ViLT shuffles its patches by the global random state,
which is fixed around its forward. Scores by different VQA models are not comparable: `describe` returns what to record
with every number.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BlipForQuestionAnswering,
    PreTrainedModel,
    ViltForQuestionAnswering,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from unimm.data.images import to_rgb
from unimm.errors import UserError, one_line, reading
from unimm.runs.provenance import model_fingerprint
from unimm.saving import no_load_report, refuse_holes

MAX_ANSWER_TOKENS = 16
MPLUG_ID = "damo/mplug_visual-question-answering_coco_large_en"
SHORT_ANSWER = " Answer with a single word or phrase."
YES_OR_NO = " Answer yes or no."
SPELLINGS = {"yes": ("yes", "Yes", " yes", " Yes"), "no": ("no", "No", " no", " No")}
T = TypeVar("T")


class YesNo(NamedTuple):
    """An answer to a yes-or-no question, as written, and P(yes) / (P(yes) + P(no)) if the model has one; `guessed`
    means that yes or no was forced although the model's most likely token was something else."""

    answer: str
    probability: float | None = None
    guessed: bool = False


class VQAModel:
    """Base class of the VQA models.

    Args:
        model: the network, in evaluation mode.
        processor: the processor saved with it.
        name: a hub id, or the last part of a folder's path.
        batch_size: requests per forward.
    """

    kind: str

    def __init__(self, model: PreTrainedModel, processor: Any, name: str, batch_size: int = 16) -> None:
        self.model, self.processor, self.name, self.batch_size = model, processor, name, batch_size
        self.fingerprint = model_fingerprint(model)

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        """Return the short answer to each question about the image at the same index, stripped.

        Raises:
            UserError: the numbers of questions and images differ.
        """
        return self._batched(images, questions, self._answer)

    def answer_yes_no(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[YesNo]:
        """Answer yes-or-no questions, with a soft score if the model has one."""
        return [YesNo(answer) for answer in self.answer(images, questions)]

    def describe(self) -> dict[str, Any]:
        """Return what determines the answers besides image and question, to be recorded with every result."""
        return {
            "name": self.name,
            "kind": self.kind,
            "version": f"transformers {importlib.metadata.version('transformers')}",
            "sha256": self.fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
        }

    def _inputs(self, image: Image.Image, question: str) -> dict[str, Tensor]:
        return dict(self.processor(images=image, text=question, return_tensors="pt"))

    def _answer(self, inputs: dict[str, Tensor]) -> list[str]:
        raise NotImplementedError

    @torch.inference_mode()
    def _batched(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        run: Callable[[dict[str, Tensor]], list[T]],
        suffix: str = "",
    ) -> list[T]:
        """Apply `run` to requests grouped by tensor shapes, `batch_size` at a time; results keep the input order."""
        if len(images) != len(questions):
            raise UserError(f"{len(images)} images and {len(questions)} questions: each question needs its image.")
        results: dict[int, T] = {}
        waiting: dict[tuple, list[tuple[int, dict[str, Tensor]]]] = {}

        def flush(group: list[tuple[int, dict[str, Tensor]]]) -> None:
            # Processors put the requests, or their patches, along the first dimension, so concatenating them is safe.
            joined = {name: torch.cat([inputs[name] for _, inputs in group]) for name in group[0][1]}
            answers = run({name: self._placed(tensor) for name, tensor in joined.items()})
            results.update(zip((index for index, _ in group), answers, strict=True))

        for index, (image, question) in enumerate(zip(images, questions, strict=True)):
            inputs = self._inputs(to_rgb(image), question + suffix)
            shapes = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(inputs.items()))
            group = waiting.setdefault(shapes, [])
            group.append((index, inputs))
            if len(group) == self.batch_size:
                flush(waiting.pop(shapes))
        for group in waiting.values():
            flush(group)
        return [results[index] for index in range(len(images))]

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.model.device, self.model.dtype if tensor.is_floating_point() else None)


class BlipVQA(VQAModel):
    """BLIP fine-tuned on VQAv2, which generates its answer, greedily."""

    kind = "blip"

    def _answer(self, inputs: dict[str, Tensor]) -> list[str]:
        token_ids = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=MAX_ANSWER_TOKENS)
        return [text.strip() for text in self.processor.batch_decode(token_ids, skip_special_tokens=True)]


class ViltVQA(VQAModel):
    """ViLT fine-tuned on VQAv2, a classifier over fixed answers (3129 in the published checkpoint)."""

    kind = "vilt"

    def _answer(self, inputs: dict[str, Tensor]) -> list[str]:
        # ViLT samples its patches from the global random state: fix it here and restore the caller's.
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            logits = self.model(**inputs).logits
        return [self.model.config.id2label[int(index)].strip() for index in logits.argmax(dim=-1)]


class ChatVQA(VQAModel):
    """A multimodal chat model (Qwen-VL and others that AutoModelForImageTextToText loads).

    It is prompted for a word or a phrase and decoded greedily. A yes-or-no question is answered by the larger of P(yes)
    and P(no) at the first token, each summed over its spellings.
    """

    kind = "chat"

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        return self._batched(images, questions, self._answer, SHORT_ANSWER)

    def answer_yes_no(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[YesNo]:
        spellings = {word: self._single_tokens(word) for word in SPELLINGS}

        def run(inputs: dict[str, Tensor]) -> list[YesNo]:
            scores = self.model(**inputs).logits[:, -1].double().log_softmax(dim=-1)
            yes, no = (scores[:, spellings[word]].logsumexp(dim=-1) for word in ("yes", "no"))
            shares = torch.sigmoid(yes - no)
            if not torch.isfinite(shares).all():
                raise UserError(
                    f"{self.name} gives scores that are not finite in {self.model.dtype}: no yes and no no."
                )
            # If the most likely token is no spelling of yes or no, the answer was forced: mark it as guessed.
            likeliest = scores.argmax(dim=-1).tolist()
            written = {token for tokens in spellings.values() for token in tokens}
            return [
                YesNo("yes" if share >= 0.5 else "no", share, token not in written)
                for share, token in zip(shares.tolist(), likeliest, strict=True)
            ]

        return self._batched(images, questions, run, YES_OR_NO)

    def _inputs(self, image: Image.Image, question: str) -> dict[str, Tensor]:
        turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return dict(self.processor.apply_chat_template([turn], **options))

    def _answer(self, inputs: dict[str, Tensor]) -> list[str]:
        written = self.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS)
        new = written[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def _single_tokens(self, word: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        encoded = [tokenizer.encode(spelling, add_special_tokens=False) for spelling in SPELLINGS[word]]
        tokens = sorted({ids[0] for ids in encoded if len(ids) == 1})
        if not tokens:
            raise UserError(f"The text tokenizer of {self.name} has no single token for {word!r}: take another model.")
        return tokens


class MplugVQA(VQAModel):
    """mPLUG, the VQA model behind the published DPG-Bench figures, run by ModelScope's pipeline."""

    kind = "mplug"

    def __init__(self, model_id: str, device: str) -> None:
        # modelscope is optional and no dependency of this package.
        try:
            pipelines = importlib.import_module("modelscope.pipelines")
            tasks = importlib.import_module("modelscope.utils.constant").Tasks
        except ImportError as error:
            raise UserError(
                f"The VQA model mPLUG needs the package modelscope, which cannot be imported: {error}."
            ) from error
        self.name, self.device = model_id, device
        self.pipeline = pipelines.pipeline(
            tasks.visual_question_answering, model=model_id, device="gpu" if device == "cuda" else device
        )
        self.fingerprint = model_fingerprint(self.pipeline.model)

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        pairs = zip(images, questions, strict=True)
        return [self.pipeline({"image": image, "question": question})["text"].strip() for image, question in pairs]

    def describe(self) -> dict[str, Any]:
        version = f"modelscope {importlib.metadata.version('modelscope')}"
        described = {"name": self.name, "kind": self.kind, "version": version, "sha256": self.fingerprint}
        return described | {"dtype": "as published", "device": self.device}


# kind -> (class here, transformers class that loads the network)
KINDS: dict[str, tuple[type[VQAModel], Any]] = {
    "blip": (BlipVQA, BlipForQuestionAnswering),
    "vilt": (ViltVQA, ViltForQuestionAnswering),
    "chat": (ChatVQA, AutoModelForImageTextToText),
}


def load_vqa_model(
    path_or_id: str | Path,
    kind: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int = 16,
) -> VQAModel:
    """Load a VQA model from a folder or a hub id; "mplug" is DPG-Bench's official one.

    Args:
        kind: "blip", "vilt", "chat" or "mplug"; None reads it from the configuration.
        device: None takes the GPU if there is one.
        dtype: None is float32 on the CPU and bfloat16 elsewhere.

    Raises:
        UserError: nothing is found, the model is not a VQA model, or weights are missing from the checkpoint.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "mplug" in (kind, str(path_or_id)):
        return MplugVQA(MPLUG_ID if str(path_or_id) == "mplug" else str(path_or_id), place.type)
    if kind is not None and kind not in KINDS:
        raise UserError(f"No kind of VQA model {kind!r}; there are {', '.join([*KINDS, 'mplug'])}.")
    if (found := _kind_of(path_or_id)) != (kind or found):
        raise UserError(f"{path_or_id} is a VQA model of the kind {found}, not {kind}.")
    model_class, loader = KINDS[found]
    dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    with reading("The VQA model", path_or_id), no_load_report():
        processor = _processor(path_or_id)
        model, info = loader.from_pretrained(path_or_id, dtype=dtype, output_loading_info=True)
        refuse_holes(model, info, path_or_id, refuse_unexpected=False)
    name = Path(path_or_id).name if Path(path_or_id).is_dir() else str(path_or_id)
    return model_class(model.to(place).eval(), processor, name, batch_size)


def _processor(path_or_id: str | Path) -> Any:
    try:
        return AutoProcessor.from_pretrained(path_or_id)
    except ImportError as error:  # Qwen-VL's processor also loads a video processor, which needs torchvision
        raise UserError(f"The processor of {path_or_id} needs a package that is missing: {one_line(error)}") from error


def _kind_of(path_or_id: str | Path) -> str:
    with reading("The VQA model", path_or_id):
        config = AutoConfig.from_pretrained(path_or_id)
    if config.model_type in ("blip", "vilt"):
        return str(config.model_type)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return "chat"
    raise UserError(
        f"{path_or_id} is a {config.model_type} model, which answers no questions about images; VQA models here are "
        "BLIP-VQA, ViLT-VQA, multimodal chat models, or mplug."
    )
