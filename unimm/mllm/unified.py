"""What every unified host has in common: the head by vocabulary, image ids in and out, checkpoints that are whole or
refused.

Nothing is masked while training (`labels` see every row of the head); without labels only the rows
that are asked for are computed, so growing the vocabulary leaves the text logits as they were, to the last bit.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from unimm.errors import UserError
from unimm.mllm.generation import ImageGenerationMixin
from unimm.mllm.vocabulary import VisualVocabulary
from unimm.saving import WholeCheckpointMixin
from unimm.tokenizer import ImageTokenizer

Vocabulary = Literal["text", "image", "all", "answer"]


class UnifiedModelMixin(WholeCheckpointMixin, ImageGenerationMixin):
    """In front of a host's `...ForConditionalGeneration`. A subclass names its config class and its output class.

    Expects `self.model` (with `vision_tower`), a head, and `vocabulary.ImageVocabularyFields` in the config.
    """

    _output_class: type[ModelOutput]
    positions_are_1d = True
    """Whether a token's position is its place in its sequence, so that restarting it begins another sequence."""

    @property
    def image_tokenizer(self) -> ImageTokenizer:
        """The vision tower, which is the image tokenizer."""
        return self.model.vision_tower

    @property
    def visual_vocabulary(self) -> VisualVocabulary:
        return VisualVocabulary(self.config.image_vocab_start, self.config.codebook_size)

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of one image, M = h * w."""
        height, width = self.config.image_grid
        return height * width

    def token_positions(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Positions [B, L] of whole sequences with the attention mask [B, L]; hosts with M-RoPE give [3, B, L]."""
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
        vocabulary: Vocabulary | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """The host's forward.

        Args:
            input_ids: token_ids [B, L]; drawn images are image ids in it, seen ones are placeholders.
            pixel_values: [I, 3, H, W], one for every `image_seq_length` placeholders, in reading order.
            image_sizes: [I, 2], for hosts that tile, with the pixel_values of their own processor.
            labels: token_ids [B, L], -100 where there is no loss; the loss goes over the whole vocabulary.
            logits_at: [n], places in the flattened batch [B * L]: logits [n, ...] of these alone, for a loss over few
                of many tokens. A head that is called outside of the forward would get wrong gradients under FSDP2.
            vocabulary: which logits: "text" [B, L, image_vocab_start], "image" [B, L, K], "all" [B, L, V]; "answer"
                [B, L, text_vocab_size], what text generation chooses from. None: "all" with labels or in training, else
                "text".

        Returns:
            The host's output class, with `loss` where labels were given.
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
        logits = self._logits(hidden, vocabulary)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.visual_vocabulary.end, **kwargs)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return self._output_class(loss=loss, logits=logits, **rest)

    def _logits(self, hidden: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Logits [B, L, rows] of `hidden` [B, L, D]."""
        text, base, end = self.config.text_vocab_size, self.visual_vocabulary.base, self.visual_vocabulary.end
        if vocabulary == "all":
            return self._head(hidden, 0, end)
        if vocabulary == "image":
            return self._head(hidden, base, end)
        if vocabulary == "text":
            # two products: the host's own rows in a product of the host's own shape give the host's own bits
            return torch.cat([self._head(hidden, 0, text), self._head(hidden, text, base)], dim=-1)
        if vocabulary == "answer":
            return self._head(hidden, 0, text)
        raise ValueError(f"vocabulary is {vocabulary!r}; known: text, image, all, answer")

    def _head(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 of the head; a wrapped one (adapter, quantized, sharded, offloaded) computes all rows."""
        head = self.get_output_embeddings()
        if type(head) is not nn.Linear or hasattr(head, "_hf_hook"):
            return head(hidden)[..., start:stop]
        return F.linear(hidden, head.weight[start:stop], None if head.bias is None else head.bias[start:stop])

    def trainable_token_indices(self) -> dict[str, list[int]]:
        """The rows that drawing needs and the host did not have, image ids and the two markers, as PEFT's argument of
        this name; a tied head follows the embedding."""
        vocabulary = self.visual_vocabulary
        rows = [*range(vocabulary.base, vocabulary.end), self.config.boi_token_id, self.config.eoi_token_id]
        parts = ("embed_tokens",) if self.config.tie_word_embeddings else ("embed_tokens", "lm_head")
        return {part: list(rows) for part in parts}

    @torch.no_grad()
    def get_image_tokens(self, pixel_values: Tensor) -> Tensor:
        """The images [B, 3, H, W] as token_ids [B, M]."""
        return self.visual_vocabulary.token_ids(self.image_tokenizer.encode(pixel_values.to(self.device)).ids)

    @torch.no_grad()
    def decode_image_tokens(self, token_ids: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Draw token_ids as pixels [B, 3, H, W].

        Args:
            token_ids: [B, M] or [M], or whole sequences [B, L] that hold exactly M image ids each among other tokens.
            height: only the checkpoint's own size is possible; so is `width`.

        Raises:
            ValueError: another size, or a row without exactly M image ids.
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
        """Make room for `len(text_tokenizer)` text tokens: they take spare rows below the image ids; nothing moves
        or shrinks.

        Raises:
            ValueError: more tokens than rows below the image ids.
        """
        tokens = new_num_tokens or 0
        if tokens > self.config.image_vocab_start:
            start = self.config.image_vocab_start
            raise ValueError(f"{tokens} text tokens do not fit below the image ids, which start at {start}")
        self.config.text_vocab_size = max(self.config.text_vocab_size, tokens)
        return self.get_input_embeddings()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a checkpoint that is whole, or refuse it.

        Raises:
            UserError: weights are missing, unexpected or misshapen, or the codebook is not the one that the model
                was attached to.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        _check_codebook(model, args[0] if args else kwargs["pretrained_model_name_or_path"])
        return (model, info) if output_loading_info else model


def _check_codebook(model: Any, source: Any) -> None:
    expected = model.config.tokenizer_fingerprint
    offloaded = any(parameter.is_meta for parameter in model.image_tokenizer.parameters())
    if expected is None or offloaded:  # built from a config alone, or nothing here to hash
        return
    found = model.image_tokenizer.fingerprint
    if expected != found:
        raise UserError(
            f"The checkpoint {source} holds another codebook (fingerprint {found[:12]}) than the one that its language "
            f"model knows ({expected[:12]}): attach the language model to this image tokenizer and train it again."
        )
