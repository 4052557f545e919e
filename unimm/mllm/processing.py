"""UnimmProcessor: text, chats and images to model inputs, and what the model wrote back to text and images.

Special here: one processor for both directions. `generation_mode="image"` asks for a prompt that ends with the begin
marker; batches are padded on the left, as generation needs. Images go through the image tokenizer's own processor
(PIL, no torchvision).
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData

from unimm.errors import UserError
from unimm.mllm.vocabulary import VisualVocabulary

GENERATION_MODES = ("text", "image")


class UnimmProcessor(ProcessorMixin):
    """An image processor and a text tokenizer, saved and loaded together (`AutoProcessor`).

    Args:
        image_grid: [h, w] of image tokens in a drawn picture.
        image_seq_length: tokens of a seen picture, fewer where the host merges patches, and any number where the
            tokenizer's image tokens are no patches; None: h * w.
        image_vocab_start: first image id of the model. The tokenizer may have no token at or above it.
        codebook_size: number of image ids.
        image_token: placeholder of one image token; `boi_token` and `eoi_token` stand around them.
        mark_images: put these two around seen pictures here, for a host whose chat template does not.

    Raises:
        UserError: the tokenizer reaches into the image ids.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_grid: Sequence[int] = (16, 16),
        image_vocab_start: int = 0,
        codebook_size: int = 0,
        image_token: str = "<|image_pad|>",
        boi_token: str = "<|vision_start|>",
        eoi_token: str = "<|vision_end|>",
        chat_template: str | None = None,
        image_seq_length: int | None = None,
        mark_images: bool = False,
    ) -> None:
        if image_vocab_start and len(tokenizer) > image_vocab_start:
            raise UserError(
                f"The text tokenizer has {len(tokenizer)} tokens, the model's image ids start at {image_vocab_start}: "
                "this tokenizer belongs to another model, or too many tokens were added; attach the model again."
            )
        self.image_grid = list(image_grid)
        self.image_seq_length = image_seq_length or self.num_image_tokens
        self.mark_images = mark_images
        self.image_vocab_start, self.codebook_size = image_vocab_start, codebook_size
        self.image_token, self.boi_token, self.eoi_token = image_token, boi_token, eoi_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.boi_token_id = tokenizer.convert_tokens_to_ids(boi_token)
        self.eoi_token_id = tokenizer.convert_tokens_to_ids(eoi_token)
        tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of one drawn picture, M = h * w."""
        height, width = self.image_grid
        return height * width

    @property
    def markers(self) -> tuple[str, str, str]:
        """The strings that stand for pictures in a text: begin, one image token, end."""
        return self.boi_token, self.image_token, self.eoi_token

    @property
    def vocabulary(self) -> VisualVocabulary:
        return VisualVocabulary(self.image_vocab_start, self.codebook_size)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        *,
        generation_mode: str = "text",
        drawn: Sequence[bool] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs: `input_ids` and `attention_mask` [B, L] when there is text, `pixel_values` [I, 3, H, W] when
        there are images.

        Args:
            images: what the image processor reads (PIL images, paths, arrays, tensors), one per placeholder, in the
                order of the text; may be nested.
            text: one prompt or a batch.
            generation_mode: "image" appends the begin marker to every prompt that does not end with it.
            drawn: for each image, whether its placeholders stand for image ids to learn (a drawing, in training) and
                not for a picture to look at; none by default.
            kwargs: of the tokenizer and the image processor (`return_tensors`, `padding`, ...).

        Raises:
            ValueError: unknown mode, or placeholders and images differ in number.
        """
        if generation_mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode is {generation_mode!r}; known: {', '.join(GENERATION_MODES)}")
        images = self.image_processor.fetch_images(images)  # a list, be they given as an array or nested
        if generation_mode == "image" and text is not None:
            texts = [text] if isinstance(text, str) else text
            text = [each if each.endswith(self.boi_token) else each + self.boi_token for each in texts]
        self._drawn = tuple(drawn or ())
        try:
            return super().__call__(images=images or None, text=text, **kwargs)
        finally:
            del self._drawn  # what is left here would be saved with the processor

    def _process_images(self, images: ImageInput, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        return super()._process_images(make_flat_list_of_images(images), **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        flags = getattr(self, "_drawn", ())
        if image_idx < len(flags) and flags[image_idx]:
            return self.image_token * self.num_image_tokens
        tokens = self.image_token * self.image_seq_length
        return self.boi_token + tokens + self.eoi_token if self.mark_images else tokens

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    def drawing_prompt(self, prompt: str) -> str:
        """The text that asks for a picture: one user turn, the assistant's turn opened, the begin marker."""
        messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        return str(self.apply_chat_template(messages, add_generation_prompt=True)) + self.boi_token

    def null_prompt_ids(self) -> list[int]:
        """Token ids of the drawing prompt with an empty user text: the unconditional side of guidance."""
        return self.tokenizer(self.drawing_prompt("")).input_ids

    def postprocess(self, pixels: Tensor) -> list[Image.Image]:
        """Pixels [B, 3, H, W] in [0, 1] as PIL images."""
        return self.image_processor.postprocess(pixels)

    def post_process_multimodal_output(
        self,
        generated_outputs: Tensor,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> list[str] | list[Image.Image]:
        """What the model made, for people.

        Args:
            generated_outputs: text mode: token_ids [B, L] (image ids among them are left out); image mode: pixels
                [B, 3, H, W], as `decode_image_tokens` gives them.

        Raises:
            ValueError: unknown mode.
        """
        if generation_mode == "image":
            return self.postprocess(generated_outputs)
        if generation_mode not in (None, "text"):
            raise ValueError(f"generation_mode is {generation_mode!r}; known: {', '.join(GENERATION_MODES)}")
        rows = torch.as_tensor(generated_outputs)
        rows = rows[None] if rows.ndim == 1 else rows
        texts = [row[~self.vocabulary.contains(row)] for row in rows]  # the tokenizer has no strings for image ids
        return self.tokenizer.batch_decode(texts, skip_special_tokens=skip_special_tokens, **kwargs)
