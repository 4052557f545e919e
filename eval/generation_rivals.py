"""Ways to generate image tokens with the same weights: unimm's, stock transformers', and the simple loop."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.generation.streamers import BaseStreamer

from unimm.mllm import attach, decoding
from unimm.mllm.decoding import compiled
from unimm.mllm.export import causal_lm
from unimm.mllm.memory import cache_bytes_per_token
from unimm.testing.hosts import text_tokenizer, vision_config
from unimm.tokenizer import VQRAE

Way: TypeAlias = Callable[[BaseStreamer | None], Tensor]

PROMPT = "three red circles above a blue square"


def random_model(
    width: int, layers: int, codes: int, image_tokens: int, dtype: torch.dtype, head_dim: int = 64
) -> tuple[Any, Any]:
    """Build a random Qwen3 with a tiny image tokenizer of `codes` codes; half of its `width // 64` heads are key/value
    heads."""
    side = round(image_tokens**0.5)
    encoder = vision_config("siglip_vision_model").to_dict() | {"image_size": 4 * side}
    image_tokenizer = VQRAE(VQRAE.config_class(encoder_config=encoder, codebook_size=codes, codebook_dim=8)).eval()
    texts: PreTrainedTokenizerBase = text_tokenizer(())
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128, "head_dim": head_dim}
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        max_position_embeddings=2 * image_tokens + 256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        **heads,
    )
    return attach(Qwen3ForCausalLM(config).to(dtype).eval(), image_tokenizer, texts)


class _ImageIdsOnly(LogitsProcessor):
    def __init__(self, start: int) -> None:
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, : self.start] = -torch.inf
        return scores


@dataclass(frozen=True)
class Rivals:
    """Every way to generate `batch` images of one prompt with a model; each returns token_ids [batch, M].

    A way takes a streamer, or None, which gets the prompt, then the ids of each token.
    """

    model: Any
    alone: Any
    prompt: Tensor
    batch: int
    scale: float

    @classmethod
    def of(cls, model: Any, processor: Any, batch: int, scale: float) -> "Rivals":
        prompt = processor(text=processor.drawing_prompt(PROMPT), return_tensors="pt").input_ids.to(model.device)
        alone = causal_lm(model).to(model.device).eval()
        return cls(model, alone, prompt, batch, scale)

    @property
    def ways(self) -> dict[str, Way]:
        ways: dict[str, Way] = {
            "unimm": self.ours,
            "unimm, 8 tokens ahead": partial(self.ours, parallel_tokens=8),
            "unimm, auto ahead": partial(self.ours, parallel_tokens="auto"),
            "unimm, the model's own forward": self.ours_by_host,
            "transformers generate": self.stock,
            "transformers generate, static cache": partial(self.stock, cache_implementation="static"),
            "plain loop": self.loop,
        }
        if self.model.device.type == "cuda":
            ways["unimm, compiled"] = partial(self.ours, compile=True)
            ways["unimm, graph of the model's own forward"] = self.ours_compiled_by_host
        return ways

    def ours(self, streamer: BaseStreamer | None = None, **options: Any) -> Tensor:
        drawn: Tensor = self.model.generate(
            self.prompt,
            generation_mode="image",
            num_return_sequences=self.batch,
            do_sample=True,
            seed=0,
            guidance_scale=self.scale,
            streamer=streamer,
            **options,
        )
        return drawn

    def ours_by_host(self, streamer: BaseStreamer | None = None) -> Tensor:
        with patch.object(decoding, "is_plain", lambda model: False):
            return self.ours(streamer)

    def ours_compiled_by_host(self, streamer: BaseStreamer | None = None) -> Tensor:
        with patch.object(compiled, "unfused", {self.model}):
            return self.ours(streamer, compile=True)

    def stock(self, streamer: BaseStreamer | None = None, **options: Any) -> Tensor:
        length = self.model.num_image_tokens
        if self.scale > 1:
            negative = torch.tensor([self.model.config.null_prompt], device=self.prompt.device)
            options |= {"guidance_scale": self.scale, "negative_prompt_ids": negative.expand(self.batch, -1)}
        drawn: Tensor = self.alone.generate(
            self.prompt.expand(self.batch, -1),
            attention_mask=torch.ones_like(self.prompt).expand(self.batch, -1),
            do_sample=True,
            top_k=0,
            max_new_tokens=length,
            min_new_tokens=length,
            disable_compile=self.model.device.type == "cpu",
            pad_token_id=0,
            streamer=streamer,
            logits_processor=LogitsProcessorList([_ImageIdsOnly(self.model.config.image_vocab_start)]),
            **options,
        )
        return drawn[:, self.prompt.shape[1] :]

    @torch.no_grad()
    def loop(self, streamer: BaseStreamer | None = None) -> Tensor:
        """Generate as most image models do: conditional and unconditional rows in one forward, dynamic cache."""
        base, batch = self.model.config.image_vocab_start, self.batch
        ids = self.prompt.expand(batch, -1)
        if self.scale > 1:
            null = torch.tensor(self.model.config.null_prompt, device=ids.device)
            other = torch.full_like(self.prompt, int(null[-1]))
            other[0, -len(null) :] = null
            ids = torch.cat([ids, other.expand(batch, -1)])
        mask = torch.ones_like(ids)
        if self.scale > 1:
            mask[batch:, : ids.shape[1] - len(null)] = 0
        cache, drawn = DynamicCache(config=self.alone.config), []
        if streamer is not None:
            streamer.put(self.prompt)
        for _ in range(self.model.num_image_tokens):
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            output = self.alone(
                ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            )
            logits = output.logits[:, -1, base:].float()
            if self.scale > 1:
                given, other_logits = logits.chunk(2)
                logits = other_logits + self.scale * (given - other_logits)
            chosen = base + logits.softmax(-1).multinomial(1)
            drawn.append(chosen)
            if streamer is not None:
                streamer.put(chosen[:, 0])
            ids = chosen.repeat(2, 1) if self.scale > 1 else chosen
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return torch.cat(drawn, dim=1)


def weight_bytes(model: Any) -> float:
    """Return the bytes of weights that one step must read."""
    text = model.model.language_model
    size = model.get_output_embeddings().weight.element_size()
    layers = sum(p.numel() for name, p in text.named_parameters() if "embed_tokens" not in name)
    return float(size * (layers + model.config.codebook_size * model.config.get_text_config().hidden_size))


def cache_bytes_per_step(model: Any, batch: int, guided: bool, prompt_tokens: int) -> float:
    """Return the bytes of keys and values that one step must read, averaged over an image."""
    rows = batch * (2 if guided else 1)
    return cache_bytes_per_token(model) * rows * (prompt_tokens + model.num_image_tokens / 2)
