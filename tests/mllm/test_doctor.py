"""A sound model meets every point; each broken one fails its own point and says what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.mllm import tiny
from tests.mllm.test_multimodal_hosts import HOSTS, build
from unimm.mllm import attach
from unimm.mllm.doctor import examine


def failing(model: Any, processor: Any) -> dict[str, str]:
    findings = list(examine(model, processor))
    assert [finding.number for finding in findings] == list(range(1, 16))
    return {finding.point: finding.line() for finding in findings if not finding.ok}


@pytest.mark.parametrize("name", ["text", *HOSTS])
def test_a_sound_model_meets_all(name: str) -> None:
    if name == "text":
        model, processor = tiny.unified()
    else:
        host, tokenizer, image_tokenizer, _ = build(name)
        model, processor = attach(host, image_tokenizer, tokenizer)
    assert failing(model, processor) == {}


class Wrapped(nn.Module):
    """A tower whose features go through `change`."""

    def __init__(self, tower: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.tower, self.change, self.config = tower, change, tower.config

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        output = self.tower(pixel_values, **{**kwargs, "output_hidden_states": True})
        output.last_hidden_state = self.change(output.last_hidden_state)
        output.hidden_states = (*output.hidden_states[:-1], output.last_hidden_state)
        return output


def with_cls(features: torch.Tensor) -> torch.Tensor:
    return torch.cat([features[:, :1], features], 1)


def strided(features: torch.Tensor) -> torch.Tensor:
    return features.mT.contiguous().mT


def wrap(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, Any], None]:
    def apply(model: Any, processor: Any) -> None:
        model.model.vision_tower = Wrapped(model.model.vision_tower, change)

    return apply


def set_strategy(model: Any, processor: Any) -> None:
    model.config.vision_feature_select_strategy = "default"


def set_length(model: Any, processor: Any) -> None:
    processor.image_seq_length = 15


def set_mean(model: Any, processor: Any) -> None:
    processor.image_processor.image_mean = [0.485, 0.456, 0.406]


def set_size(model: Any, processor: Any) -> None:
    processor.image_processor.size = {"height": 20, "width": 20}


def thaw_codebook(model: Any, processor: Any) -> None:
    quantizer = model.image_tokenizer.quantizer
    codebook = quantizer.codebook
    del quantizer.codebook
    quantizer.codebook = nn.Parameter(codebook)


def freeze_projector(model: Any, processor: Any) -> None:
    model.model.multi_modal_projector.requires_grad_(False)


def blow_up(model: Any, processor: Any) -> None:
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(1e5)


def other_projector(model: Any, processor: Any) -> None:
    model.model.multi_modal_projector.linear_1 = nn.Linear(48, 32)


def set_grid(model: Any, processor: Any) -> None:
    model.config.image_grid = [9, 9]


def lose_a_weight(model: Any, processor: Any) -> None:
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")


def template(text: str | None) -> Callable[[Any, Any], None]:
    def apply(model: Any, processor: Any) -> None:
        processor.chat_template = processor.tokenizer.chat_template = text

    return apply


BROKEN: dict[str, tuple[Callable[[Any, Any], None], str, str]] = {
    "a CLS token kept": (wrap(with_cls), "token count", "16 placeholders for 17 feature vectors"),
    "a patch dropped": (
        set_strategy,
        "prefix tokens",
        "'default'. Set vision_feature_select_strategy to 'full'",
    ),
    "too few placeholders": (set_length, "token count", "15 placeholders for 16 feature vectors"),
    "another width": (wrap(lambda f: f[..., :24].contiguous()), "width", "24 numbers a token, the projector reads 32"),
    "a projector of another width": (other_projector, "width", "32 numbers a token, the projector reads 48"),
    "strided features": (wrap(strided), "layout", "strided torch.float32"),
    "another dtype": (wrap(lambda f: f.bfloat16()), "layout", "torch.bfloat16"),
    "another mean": (set_mean, "normalization", "processor [0.485, 0.456, 0.406]"),
    "another image size": (set_size, "resizing", "[(20, 20)], the tower reads 16 x 16"),
    "a codebook that learns": (thaw_codebook, "gradients", "C a parameter"),
    "a frozen projector": (freeze_projector, "gradients", "frozen weights in the projector"),
    "features out of scale": (blow_up, "norms", "train it first"),
    "another grid": (set_grid, "agreement", "image_grid of config.json is [9, 9], and the image tokenizer draws 4 x 4"),
    "a grid that cannot be drawn": (set_grid, "drawing", "do not fill a grid of 4 x 4"),
    "a weight that is no number": (lose_a_weight, "weights", "1 of 2048 numbers of model.language_model.layers.0"),
    "an answer of no numbers": (lose_a_weight, "answer", "from logits that are no numbers"),
    "no chat template": (template(None), "chat template", "no chat template"),
    "a template that writes nothing": (template("x"), "chat template", "becomes 1 characters without them"),
    "a template without end": (
        template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        "answer",
        "The chat template takes more than",
    ),
    "an assigned tower": (wrap(lambda f: f), "reload", "Enter the tower by configuration"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_each_fault_fails_its_point_and_says_what_to_do(fault: str) -> None:
    model, processor = tiny.unified()
    break_it, point, message = BROKEN[fault]
    break_it(model, processor)
    lines = failing(model, processor)
    assert point in lines and message in lines[point]
