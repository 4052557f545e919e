"""`UnifiedModelMixin`: what all unified models share, on top of their host (the language or multimodal model that the
image tokenizer is attached to): logits per vocabulary, image ids to pixels and back, and strict checkpoint loading.

In training, the loss covers all rows of the head. Without labels only the requested rows are computed, so the text
logits are the same as before the vocabulary was grown, bit for bit.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from unimm.errors import UserError
from unimm.mllm.generation import ImageGenerationMixin
from unimm.mllm.hosts.heads import embedding_name
from unimm.mllm.vocabulary import VisualVocabulary
from unimm.saving import WholeCheckpointMixin
from unimm.tokenizer import ImageTokenizer

Vocabulary = Literal["text", "image", "all", "answer"]


class UnifiedModelMixin(WholeCheckpointMixin, ImageGenerationMixin):
    """Mixin placed before a host's `...ForConditionalGeneration`; a subclass sets its config class and output class.

    Expects `self.model` (with `vision_tower`), a head, and `vocabulary.ImageVocabularyFields` in the config.
    """

    _output_class: type[ModelOutput]
    positions_are_1d = True
    """Whether positions are plain indices into a sequence, so that restarting at 0 begins another packed sequence."""
    logits_at_once = 1 << 27
    """Logits that a loss over targets computes at a time: half a gigabyte in float32, a few of which are alive."""

    @property
    def image_tokenizer(self) -> ImageTokenizer:
        """Return the vision tower, which is the image tokenizer."""
        return self.model.vision_tower

    @property
    def visual_vocabulary(self) -> VisualVocabulary:
        """Return the range of image ids in the vocabulary."""
        return VisualVocabulary(self.config.image_vocab_start, self.config.codebook_size)

    @property
    def num_image_tokens(self) -> int:
        """Return the number of image tokens of one image, M = h * w."""
        height, width = self.config.image_grid
        return height * width

    def token_positions(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the positions [B, L] of full sequences with attention mask [B, L]; [3, B, L] for hosts with M-RoPE."""
        return (mask.cumsum(-1) - 1).clamp_min(0)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        logits_at: Tensor | None = None,
        targets: Tensor | None = None,
        vocabulary: Vocabulary | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Run the host's forward and compute the logits of the requested vocabulary.

        Args:
            input_ids: token_ids [B, L]; generated images are image ids, input images are placeholders.
            pixel_values: [I, 3, H, W], one image per `image_seq_length` placeholders, in reading order.
            image_sizes: [I, 2], for hosts that tile, with the pixel_values of their own processor.
            labels: token_ids [B, L], -100 for tokens without loss; the loss is over the whole vocabulary.
            logits_at: [n], indices into the flattened batch [B * L]: return logits [n, ...] of these only, for a loss
                over few of many tokens. Calling the head outside of forward gives wrong gradients under FSDP2.
            targets: [n], token_ids: return their cross entropies [n] as `loss`, and no logits. Logits of 512 MB at most
                are there at a time; the backward computes them again.
            vocabulary: which logits: "text" [B, L, image_vocab_start], "image" [B, L, K], "all" [B, L, V]; "answer"
                [B, L, text_vocab_size], those of text generation. None: "all" with labels or in training, else
                "text".

        Returns:
            The host's output class, with `loss` if labels are given.
        """
        if vocabulary is None:
            vocabulary = "all" if labels is not None or self.training else "text"
        if labels is not None and vocabulary != "all":
            raise ValueError(f"labels need the logits of the whole vocabulary, vocabulary={vocabulary!r} was asked for")
        if image_sizes is not None:
            kwargs["image_sizes"] = image_sizes
        elif pixel_values is not None and self.tiles:
            pixel_values, mm_encoder_outputs = None, {"image": self.get_image_features(pixel_values)}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if logits_at is None:
            hidden = slice_logits_to_keep(hidden, logits_to_keep)
        else:
            hidden = hidden.flatten(0, 1).index_select(0, logits_at)  # [n, D]
        if targets is not None:
            rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
            return self._output_class(loss=self._cross_entropies(hidden, targets), logits=None, **rest)
        logits = self._logits(hidden, vocabulary)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.visual_vocabulary.end, **kwargs)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return self._output_class(loss=loss, logits=logits, **rest)

    def _cross_entropies(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Compute the cross entropies [n] of targets [n] after `hidden` [n, D], in pieces."""

        def piece(rows: Tensor, wanted: Tensor) -> Tensor:
            return F.cross_entropy(self._logits(rows, "all").float(), wanted, reduction="none")

        size = max(1, self.logits_at_once // self.visual_vocabulary.end)
        pairs = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(piece, *pair, use_reentrant=False) for pair in pairs])

    def _logits(self, hidden: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Compute the logits [B, L, rows] of `hidden` [B, L, D]."""
        text, base, end = self.config.text_vocab_size, self.visual_vocabulary.base, self.visual_vocabulary.end
        if vocabulary == "all":
            return self._head(hidden, 0, end)
        if vocabulary == "image":
            return self._head(hidden, base, end)
        if vocabulary == "text":
            # two products: only a matrix product of the host's own shape is bit-identical to the host's logits
            return torch.cat([self._head(hidden, 0, text), self._head(hidden, text, base)], dim=-1)
        if vocabulary == "answer":
            return self._head(hidden, 0, text)
        raise ValueError(f"vocabulary is {vocabulary!r}; known: text, image, all, answer")

    def _head(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Apply rows start..stop-1 of the head; a wrapped head (adapter, quantized, sharded, offloaded) computes all
        rows, as its weight cannot be sliced."""
        head = self.get_output_embeddings()
        if type(head) is not nn.Linear or hasattr(head, "_hf_hook"):
            return head(hidden)[..., start:stop]
        return F.linear(hidden, head.weight[start:stop], None if head.bias is None else head.bias[start:stop])

    def trainable_token_indices(self) -> dict[str, list[int]]:
        """Return the rows that image generation needs and the host lacked (image ids and the two markers), as the PEFT
        argument of this name; a tied head follows the embedding."""
        vocabulary = self.visual_vocabulary
        rows = [*range(vocabulary.base, vocabulary.end), self.config.boi_token_id, self.config.eoi_token_id]
        embedding = embedding_name(self.model.language_model).rpartition(".")[2]
        parts = (embedding,) if self.config.tie_word_embeddings else (embedding, "lm_head")
        return {part: list(rows) for part in parts}

    @torch.no_grad()
    def get_image_tokens(self, pixel_values: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] to token_ids [B, M]."""
        return self.visual_vocabulary.token_ids(self.image_tokenizer.encode(pixel_values.to(self.device)).ids)

    @torch.no_grad()
    def decode_image_tokens(self, token_ids: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Decode token_ids to pixels [B, 3, H, W].

        Args:
            token_ids: [B, M] or [M], or full sequences [B, L] with exactly M image ids each among other tokens.
            height: must be the checkpoint's own size, as must `width`.

        Raises:
            ValueError: if the size differs, or a row does not have exactly M image ids.
        """
        size = self.image_tokenizer.config.image_size
        if (height or size, width or size) != (size, size):
            raise ValueError(f"this model draws {size}x{size} pixels only, {height}x{width} was asked for")
        rows = token_ids.to(self.device)
        rows = rows[None] if rows.ndim == 1 else rows
        drawn = self.visual_vocabulary.contains(rows)
        counts = drawn.sum(1)
        if (wrong := counts[counts != self.num_image_tokens]).numel():
            raise ValueError(f"an image has {self.num_image_tokens} image ids, a row with {int(wrong[0])} was given")
        return self.image_tokenizer.decode(self.visual_vocabulary.ids(rows[drawn].view(len(rows), -1)))

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Make room for `len(text_tokenizer)` text tokens by using spare rows below the image ids; no row is moved or
        removed.

        Raises:
            ValueError: if there are more tokens than rows below the image ids.
        """
        tokens = new_num_tokens or 0
        if tokens > self.config.image_vocab_start:
            start = self.config.image_vocab_start
            raise ValueError(f"{tokens} text tokens do not fit below the image ids, which start at {start}")
        self.config.text_vocab_size = max(self.config.text_vocab_size, tokens)
        return self.get_input_embeddings()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a complete checkpoint.

        Raises:
            UserError: if weights are missing, unexpected or of another shape, or the codebook is not the one that the
                model was attached to.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        _check_codebook(model, args[0] if args else kwargs["pretrained_model_name_or_path"])
        return (model, info) if output_loading_info else model


def _check_codebook(model: Any, source: Any) -> None:
    expected = model.config.tokenizer_fingerprint
    offloaded = any(parameter.is_meta for parameter in model.image_tokenizer.parameters())
    if expected is None or offloaded:  # built from a config alone, or no weights here to hash
        return
    found = model.image_tokenizer.fingerprint
    if expected != found:
        raise UserError(
            f"The checkpoint {source} holds another codebook (fingerprint {found[:12]}) than the one that its language "
            f"model knows ({expected[:12]}): attach the language model to this image tokenizer and train it again."
        )
