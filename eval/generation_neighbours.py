"""The loops of transformers' own image models, Janus and Emu3, on random weights of like size.

Janus batches both branches of guidance in one forward, on a static cache that is attended to as a whole, and feeds
embeddings; it has no loop without guidance. Emu3 is `generate` with transformers' guidance, a second forward, and a
function that lists the allowed ids of every step (here without the ids that end a row of its images).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3TextConfig,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
)
from transformers.generation.streamers import BaseStreamer

from eval.generation_rivals import Way

_BOS, _PAD, _BOI = 1, 0, 2
_TEXT = 2048  # rows of the vocabulary of text


NEIGHBOURS = ("transformers Janus", "transformers Emu3")


@dataclass(frozen=True)
class Neighbours:
    """Janus and Emu3 with the sizes of `model`'s language model, codebook and images."""

    janus: JanusForConditionalGeneration
    emu3: Emu3ForConditionalGeneration
    prompt: Tensor
    tokens: int

    @classmethod
    def like(cls, model: Any, prompt_tokens: int) -> "Neighbours":
        """Build both; their prompt has `prompt_tokens` random tokens, the last of them the begin marker."""
        ours = model.config.get_text_config()
        sizes = {
            name: getattr(ours, name)
            for name in (
                *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
                *("num_key_value_heads", "max_position_embeddings"),
            )
        }
        codes, tokens = model.config.codebook_size, model.num_image_tokens
        prompt = torch.randint(3, _TEXT, (1, prompt_tokens), device=model.device)
        prompt[0, 0], prompt[0, -1] = _BOS, _BOI
        head_dim = getattr(ours, "head_dim", None) or ours.hidden_size // ours.num_attention_heads
        janus, emu3 = _janus(sizes, head_dim, codes, tokens), _emu3(sizes, codes)
        for each in (janus, emu3):
            each.to(model.device, model.dtype).eval()
        return cls(janus, emu3, prompt, tokens)

    def ways(self, batch: int, scale: float) -> dict[str, Way]:
        """Return the loops, as `Rivals.ways`."""

        def janus(streamer: BaseStreamer | None) -> Tensor:
            return self.draw_janus(batch, scale, streamer)

        def emu3(streamer: BaseStreamer | None) -> Tensor:
            return self.draw_emu3(batch, scale, streamer)

        return dict(zip(NEIGHBOURS, (janus, emu3), strict=True)) if scale > 1 else {NEIGHBOURS[1]: emu3}

    def draw_janus(self, batch: int, scale: float, streamer: BaseStreamer | None) -> Tensor:
        """Generate ids [batch, M] by Janus' own `generate`."""
        hooks = []
        if streamer is not None:  # Janus takes none
            streamer.put(self.prompt)
            head = self.janus.model.generation_head
            hooks.append(head.register_forward_hook(lambda module, args, output: streamer.put(output[:batch, 0])))
        config = GenerationConfig(
            do_sample=True,
            guidance_scale=scale,
            num_return_sequences=batch,
            max_length=self.prompt.shape[1] + self.tokens,
            bos_token_id=_BOS,
            pad_token_id=_PAD,
            generation_kwargs={"boi_token_id": _BOI},
        )
        try:
            drawn: Tensor = self.janus.generate(
                self.prompt,
                attention_mask=torch.ones_like(self.prompt),
                generation_mode="image",
                generation_config=config,
            )
        finally:
            for hook in hooks:
                hook.remove()
        return drawn

    def draw_emu3(self, batch: int, scale: float, streamer: BaseStreamer | None) -> Tensor:
        """Generate ids [batch, M] by `generate` as Emu3's documentation calls it."""
        image_ids = self.emu3.vocabulary_mapping.image_tokens
        options: dict[str, Any] = {}
        if scale > 1:
            negative = self.prompt[:, [0, -1]].expand(batch, -1)
            options = {"guidance_scale": scale, "negative_prompt_ids": negative}
        rows = self.prompt.expand(batch, -1)
        drawn: Tensor = self.emu3.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=True,
            top_k=0,
            max_new_tokens=self.tokens,
            min_new_tokens=self.tokens,
            pad_token_id=_PAD,
            prefix_allowed_tokens_fn=lambda number, row: image_ids,
            streamer=streamer,
            **options,
        )
        return drawn[:, rows.shape[1] :] - _TEXT

    def weights(self, way: str) -> float:
        """Return the bytes of weights that a forward of a loop reads."""
        if way == NEIGHBOURS[0]:
            model = self.janus.model
            parts = [*model.language_model.layers, model.language_model.norm]
            parts += [model.generation_head, model.generation_aligner]
        else:
            parts = [*self.emu3.model.text_model.layers, self.emu3.model.text_model.norm, self.emu3.lm_head]
        return float(sum(p.numel() * p.element_size() for part in parts for p in part.parameters()))


def _janus(sizes: dict[str, int], head_dim: int, codes: int, tokens: int) -> JanusForConditionalGeneration:
    width, side = sizes["hidden_size"], round(tokens**0.5)
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": width}
    vision |= {"image_size": 4 * side, "patch_size": 4, "num_image_tokens": tokens}
    codebook: dict[str, Any] = {"num_embeddings": codes, "projection_dim": width, "image_token_embed_dim": width}
    codebook |= {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32}
    text = LlamaConfig(vocab_size=_TEXT, head_dim=head_dim, bos_token_id=_BOS, pad_token_id=_PAD, **sizes)
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=codebook, image_token_id=3)
    return JanusForConditionalGeneration(config)


def _emu3(sizes: dict[str, int], codes: int) -> Emu3ForConditionalGeneration:
    names = {f"<|visual token {code:06d}|>": _TEXT + code for code in range(codes)}
    text = Emu3TextConfig(
        vocab_size=_TEXT + codes,
        attention_dropout=0.0,
        bos_token_id=_BOS,
        pad_token_id=_PAD,
        eos_token_id=None,
        **sizes,
    )
    codebook: dict[str, Any] = {"codebook_size": codes, "base_channels": 32, "channel_multiplier": [1]}
    codebook |= {"num_res_blocks": 1, "attn_resolutions": [], "hidden_size": 32, "temporal_downsample_factor": 1}
    vocabulary = {**names, "<image>": 3, "<|extra_200|>": 4}
    return Emu3ForConditionalGeneration(Emu3Config(text_config=text, vq_config=codebook, vocabulary_map=vocabulary))
