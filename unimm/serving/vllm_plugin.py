"""A plug-in for vLLM: `ImageIds` keeps text and image ids apart for a checkpoint of `unimm export --generation`.

vLLM runs such a checkpoint with its own class of the language model. What it lacks is unimm's rule that text is chosen
from the rows of text and an image from the image ids; this logits processor adds it, by the range in the checkpoint's
image_vocabulary.json. vLLM finds it by the entry point `vllm.logits_processors`, and it leaves other models alone. Only
vLLM and torch are imported, so `pip install --no-deps unimm` is enough beside vLLM.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

DRAW = "draw"
"""Key of a request's `extra_args` (over HTTP: `vllm_xargs`); a true value asks for image ids."""


class ImageIds(LogitsProcessor):
    """Restricts each request to the rows of text, or to the image ids if its `extra_args` have a true `draw`.

    A drawing request ends by its `max_tokens`, the number of ids of an image: no end token is among the image ids.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError for guidance: its two prompts would be two requests, run in different steps at times."""
        extra = sampling_params.extra_args or {}
        if extra.get(DRAW) and extra.get("guidance_scale") not in (None, 0, 1):
            raise ValueError(
                f"guidance_scale is {extra['guidance_scale']}, and vLLM draws without guidance: leave it out, or draw "
                "with `unimm serve`."
            )

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        file = Path(vllm_config.model_config.model) / "image_vocabulary.json"
        self.vocabulary: dict[str, Any] | None = (
            json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        )
        self.drawing: dict[int, bool] = {}

    def is_argmax_invariant(self) -> bool:
        """Return False: the most probable token may be of the other kind."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests to their rows of the batch."""
        process_dict_updates(self.drawing, batch_update, lambda params, *_: (params.extra_args or {}).get(DRAW) or None)

    def apply(self, logits: Tensor) -> Tensor:
        """Forbid tokens of the other kind in logits [requests, rows of the vocabulary], in place."""
        if self.vocabulary is None:
            return logits
        draws = torch.zeros(len(logits), 1, dtype=torch.bool)
        draws[list(self.drawing)] = True
        draws = draws.to(logits.device)
        logits[:, : self.vocabulary["image_vocab_start"]].masked_fill_(draws, -torch.inf)
        logits[:, self.vocabulary["text_vocab_size"] :].masked_fill_(~draws, -torch.inf)
        return logits
