"""`unimm doctor`: checks of a unified model, each run on the model instead of read from its config.

A wrong vision tower seldom raises an error: a CLS token that is not dropped shifts every patch by one, other
normalization constants cost quality silently, and a tower that was assigned instead of configured is random after a
reload. The first ten checks test the tower inside its host (the language or multimodal model that the image tokenizer
is attached to); the others compare the parts, inspect the weights, render the chat template, answer one question and
generate one image. Every check reports what was found and, if it fails, what to do.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from unimm.checkpoint_files import refuse_non_finite
from unimm.errors import UserError, one_line
from unimm.mllm.agreement import disagreements
from unimm.mllm.answering import answer_all, chat_inputs
from unimm.mllm.hosts.registry import family_of
from unimm.mllm.processing import UnimmProcessor
from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.quantizers import SimVQ

SIZES = ((64, 64), (37, 101), (640, 480))  # (width, height) of ordinary images
EXTREMES = ((1024, 16), (16, 1024))
NORM_BOUNDS = (0.02, 50.0)
"""Accepted range of the mean norm of the projected patches, relative to that of the text rows."""


@dataclass(frozen=True)
class Finding:
    """The result of one check: its name, whether it passed, what was found, and what to do if it failed."""

    number: int
    point: str
    ok: bool
    found: str
    fix: str = ""

    def line(self) -> str:
        """Return the finding as one line, with the fix if the check failed."""
        return f"{self.number:>2} {'ok  ' if self.ok else 'FAIL'} {self.point}: {self.found}" + (
            "" if self.ok else f". {self.fix}"
        )


class _TestedModel:
    """The model and processor under test, with helpers that several checks share."""

    def __init__(self, model: Any, processor: UnimmProcessor) -> None:
        self.model, self.processor = model, processor
        self.config, self.tower = model.config, model.model.vision_tower

    def pixel_values(self, *sizes: tuple[int, int]) -> Tensor:
        images = [Image.effect_noise(size, 64).convert("RGB") for size in sizes]
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"].to(self.model.device)

    def features(self, pixel_values: Tensor) -> Tensor:
        return self.tower(pixel_values.to(self.model.dtype)).last_hidden_state

    def projected(self, pixel_values: Tensor) -> list[Tensor]:
        """Return the projected features, one [n, D] per image."""
        return list(self.model.get_image_features(pixel_values.to(self.model.dtype), return_dict=True).pooler_output)


@torch.no_grad()
def examine(model: Any, processor: UnimmProcessor) -> Iterator[Finding]:
    """Run all checks and yield their findings. A check that raises fails, with the error as its finding."""
    tested = _TestedModel(model, processor)
    for number, (point, look, fix) in enumerate(_POINTS, 1):
        try:
            ok, found = look(tested)
        except Exception as error:  # a broken tower can raise anything
            ok, found = False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        yield Finding(number, point, ok, found, fix)


def _token_count(tested: _TestedModel) -> tuple[bool, str]:
    """Check that an image has as many placeholders as feature vectors, at ordinary and extreme sizes."""
    image_token = tested.processor.image_token
    counts = []
    for size in (*SIZES, *EXTREMES):
        pixel_values = tested.pixel_values(size)
        image = Image.new("RGB", size)
        text = tested.processor(text=[image_token], images=[image], return_tensors="pt")["input_ids"]
        placeholders = int((text == tested.config.image_token_id).sum())
        counts.append((placeholders, sum(len(rows) for rows in tested.projected(pixel_values))))
    differing = [pair for pair in counts if pair[0] != pair[1]]
    if differing:
        return False, f"{differing[0][0]} placeholders for {differing[0][1]} feature vectors"
    return True, f"{counts[0][0]} placeholders and feature vectors at {len(counts)} image sizes"


def _width(tested: _TestedModel) -> tuple[bool, str]:
    """Check that the width of the features is the projector's input width."""
    layers = getattr(tested.config, "vision_feature_layer", -1)
    merged = family_of(tested.config).merged_side(tested.config) ** 2
    given = tested.features(tested.pixel_values(SIZES[0])).shape[-1]
    given *= merged * (len(layers) if isinstance(layers, list) else 1)
    wanted = next(
        m.in_features for m in tested.model.model.multi_modal_projector.modules() if hasattr(m, "in_features")
    )
    return given == wanted, f"the tower gives {given} numbers a token, the projector reads {wanted}"


def _prefix(tested: _TestedModel) -> tuple[bool, str]:
    """Check that the feature selection strategy drops a prefix token only if the tower has one."""
    tokens = tested.features(tested.pixel_values(SIZES[0])).shape[1]
    rows, columns = tested.tower.config.patch_grid
    strategy = getattr(tested.config, "vision_feature_select_strategy", "full")
    expected = "full" if tokens == rows * columns else "default"
    return strategy == expected, f"{tokens} tokens for {rows * columns} patches, strategy {strategy!r}"


def _tensor(tested: _TestedModel) -> tuple[bool, str]:
    """Check that the features are contiguous, with the dtype and device of the host."""
    features, host = tested.features(tested.pixel_values(SIZES[0])), tested.model
    right = features.is_contiguous() and (features.dtype, features.device) == (host.dtype, host.device)
    layout = "contiguous" if features.is_contiguous() else "strided"
    return right, f"{layout} {features.dtype} on {features.device}, the host is {host.dtype}"


def _normalization(tested: _TestedModel) -> tuple[bool, str]:
    """Check that processor and tower normalize with the same mean and std."""
    ours, theirs = tested.processor.image_processor, tested.tower.config
    pairs = [(list(getattr(ours, name)), list(getattr(theirs, name))) for name in ("image_mean", "image_std")]
    return all(
        a == b for a, b in pairs
    ), f"processor {pairs[0][0]} / {pairs[1][0]}, tower {pairs[0][1]} / {pairs[1][1]}"


def _resizing(tested: _TestedModel) -> tuple[bool, str]:
    """Check that images of all sizes are resized to the tower's image size."""
    shapes = {tuple(tested.pixel_values(size).shape[-2:]) for size in (*SIZES, *EXTREMES)}
    side = tested.tower.config.image_size
    return shapes == {(side, side)}, f"images become {sorted(shapes)}, the tower reads {side} x {side}"


def _gradients(tested: _TestedModel) -> tuple[bool, str]:
    """Check that SimVQ's codebook C is a buffer (unless trained on purpose) and the projector is trainable."""
    names = [name for name, _ in tested.tower.named_parameters()]
    simvq = isinstance(tested.tower.quantizer, SimVQ)  # other codebooks are learned
    frozen = not simvq or tested.tower.config.train_codebook or "quantizer.codebook" not in names
    stuck = [name for name, p in tested.model.model.multi_modal_projector.named_parameters() if not p.requires_grad]
    state = "C a buffer" if frozen else "C a parameter"
    return frozen and not stuck, f"{state}, {len(stuck)} frozen weights in the projector"


def _norms(tested: _TestedModel) -> tuple[bool, str]:
    """Check that projected patches and text rows have norms of the same scale."""
    projected = torch.cat(tested.projected(tested.pixel_values(*SIZES))).float().norm(dim=-1).mean()
    rows = tested.model.get_input_embeddings().weight[: tested.config.text_vocab_size].float().norm(dim=-1).mean()
    ratio = float(projected / rows.clamp_min(1e-12))
    return NORM_BOUNDS[0] < ratio < NORM_BOUNDS[1], f"projected patches are {ratio:.2f} times as long as text rows"


def _deepstack(tested: _TestedModel) -> tuple[bool, str]:
    """Check that the tower returns as many deepstack features as the host takes (Qwen3-VL)."""
    wanted = getattr(getattr(tested.config, "vision_config", None), "deepstack_visual_indexes", None)
    if not wanted:
        return True, "the host takes none"
    given = getattr(tested.tower(tested.pixel_values(SIZES[0])), "deepstack_features", None)
    return given is not None and len(given) == len(wanted), f"{len(given or [])} given, {len(wanted)} taken"


def _reload(tested: _TestedModel) -> tuple[bool, str]:
    """Check that the logits and the tower's class are the same after saving and loading."""
    model = tested.model
    image, count = tested.config.image_token_id, tested.config.image_seq_length
    text = [token_id for token_id in range(4) if token_id != image]
    input_ids = torch.tensor([[*[image] * count, *text]], device=model.device)
    inputs = {"input_ids": input_ids, "pixel_values": tested.pixel_values(SIZES[0]).to(model.dtype)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = AutoModelForImageTextToText.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
        tower = type(again.model.vision_tower)
        equal = torch.equal(again(**inputs).logits, model(**inputs).logits)
    kept = tower is type(tested.tower) and issubclass(tower, ImageTokenizer)
    return equal and kept, f"logits {'equal' if equal else 'differ'}, the tower is a {tower.__name__}"


def _agreement(tested: _TestedModel) -> tuple[bool, str]:
    """Check that the parts name the same sizes and ids, see `agreement.py`."""
    found = list(disagreements(tested.model, tested.processor))
    return not found, "; ".join(found) or "settings, tokenizer, processor and weights name the same sizes and ids"


def _weights(tested: _TestedModel) -> tuple[bool, str]:
    """Check that all weights are finite."""
    try:
        refuse_non_finite(tested.model, "in memory")
    except UserError as error:
        return False, one_line(error)
    return True, "every number is finite"


def _template(tested: _TestedModel) -> tuple[bool, str]:
    """Check that the chat template renders one image and one text."""
    text, image = "A word, please?", Image.new("RGB", SIZES[0])
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    chat = tested.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    whole = text in chat and chat.count(tested.processor.image_token) == 1
    return whole, f"one question with one image becomes {len(chat)} characters{'' if whole else ' without them'}"


def _answer(tested: _TestedModel) -> tuple[bool, str]:
    """Check that a question about an image is answered from finite logits."""
    image = Image.effect_noise(SIZES[0], 64).convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    conversation = [{"role": "user", "content": content}]
    (answer,) = answer_all(tested.model, tested.processor, [conversation], max_new_tokens=8)
    logits = tested.model(**chat_inputs(tested.model, tested.processor, [conversation])).logits
    finite = bool(torch.isfinite(logits).all())
    return finite, f"{answer.new_tokens} tokens{'' if finite else ', from logits that are no numbers'}"


def _drawing(tested: _TestedModel) -> tuple[bool, str]:
    """Check that an image can be generated and has finite pixels."""
    model, processor = tested.model, tested.processor
    prompt = [{"role": "user", "content": [{"type": "text", "text": "A red circle."}]}]
    ids = model.generate(**chat_inputs(model, processor, [prompt]), generation_mode="image", seed=0)
    pixels = model.decode_image_tokens(ids)
    finite = bool(torch.isfinite(pixels).all())
    rows, columns = pixels.shape[-2:]
    return finite, f"{ids.shape[1]} tokens become {columns} x {rows} pixels{'' if finite else ' that are no numbers'}"


_POINTS: tuple[tuple[str, Callable[[_TestedModel], tuple[bool, str]], str], ...] = (
    (
        "token count",
        _token_count,
        "Set image_seq_length in the model's and the processor's config to the vectors an image gives",
    ),
    ("width", _width, "Make a new projector of that width (attach does) and train it: the old one cannot be kept"),
    (
        "prefix tokens",
        _prefix,
        "Set vision_feature_select_strategy to 'full' for a tower without CLS, 'default' drops its first patch",
    ),
    ("layout", _tensor, "Return .contiguous() features of the host's dtype on its device"),
    ("normalization", _normalization, "Save the tokenizer's own processor beside the model: same mean and std"),
    ("resizing", _resizing, "Set size in preprocessor_config.json to the tower's image size"),
    ("gradients", _gradients, "Keep SimVQ's C a buffer, and let the projector learn"),
    ("norms", _norms, "The projector does not fit these features: train it first, the language model frozen"),
    ("deepstack", _deepstack, "Give one feature map for every layer that the host adds them to"),
    ("reload", _reload, "Enter the tower by configuration (unimm.attach): an assigned one is random after a reload"),
    ("agreement", _agreement, "Attach the model again, or set the field to what the image tokenizer has"),
    (
        "weights",
        _weights,
        "Save it again or fetch it anew; a run that diverged goes on from an older checkpoint",
    ),
    ("chat template", _template, "Give the processor a template that writes every part (attach: chat_template=)"),
    ("answer", _answer, "Look at the points above: they name what keeps the model from answering"),
    ("drawing", _drawing, "Look at the points above: they name what keeps the model from drawing"),
)
