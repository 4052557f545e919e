"""`UnimmProcessor`: convert text, chats and images to model inputs, and model outputs back to text and images.

`generation_mode="image"` makes every prompt end with the begin marker; batches are padded on the left for generation.
Images are processed by the image tokenizer's own processor (PIL, no torchvision).
"""

import re
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData

from unimm.errors import UserError
from unimm.mllm.prompts import (
    START,
    Encoded,
    adds_begin_token,
    control_pattern,
    encode,
    mark_conversation,
    mark_text,
    mark_values,
    padded,
)
from unimm.mllm.template_guard import render_guarded
from unimm.mllm.vocabulary import VisualVocabulary

GENERATION_MODES = ("text", "image", "interleaved")
TOKENIZING = threading.RLock()
"""Lock held while a text tokenizer encodes: fast tokenizers keep padding and truncation as state shared by threads."""
_DRAWN: ContextVar[tuple[bool, ...]] = ContextVar("drawn", default=())  # `drawn` of the current `__call__`


class UnimmProcessor(ProcessorMixin):
    """An image processor and a text tokenizer, saved and loaded together (`AutoProcessor`).

    Args:
        image_grid: [h, w] image tokens of a generated image.
        image_seq_length: tokens of an input image: fewer than h * w if the host (the language or multimodal model
            that the image tokenizer is attached to) merges patches, any number if the tokenizer's image tokens are not
            patches. None: h * w.
        image_vocab_start: first image id of the model. Every text token id must be below it.
        codebook_size: number of image ids.
        image_token: placeholder of one image token; `boi_token` and `eoi_token` enclose an image.
        mark_images: enclose input images in these two here, for a host whose chat template does not.
        begin_token: prepend the text tokenizer's BOS token to a text that does not start with it, if the tokenizer
            itself does so; False for a language model whose chat template omits it.

    Raises:
        UserError: if the tokenizer's ids overlap the image ids.
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
        chat_template: str | dict[str, str] | None = None,
        image_seq_length: int | None = None,
        mark_images: bool = False,
        begin_token: bool = True,
    ) -> None:
        if image_vocab_start and len(tokenizer) > image_vocab_start:
            raise UserError(
                f"The text tokenizer has {len(tokenizer)} tokens, the model's image ids start at {image_vocab_start}: "
                "this tokenizer belongs to another model, or too many tokens were added; attach the model again."
            )
        self.image_grid = list(image_grid)
        self.image_seq_length = image_seq_length or self.num_image_tokens
        self.mark_images = mark_images
        self.begin_token = begin_token
        self.image_vocab_start, self.codebook_size = image_vocab_start, codebook_size
        self.image_token, self.boi_token, self.eoi_token = image_token, boi_token, eoi_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.boi_token_id = tokenizer.convert_tokens_to_ids(boi_token)
        self.eoi_token_id = tokenizer.convert_tokens_to_ids(eoi_token)
        tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def num_image_tokens(self) -> int:
        """Return the number of image tokens of one generated image, M = h * w."""
        height, width = self.image_grid
        return height * width

    @property
    def vocabulary(self) -> VisualVocabulary:
        """Return the range of image ids in the vocabulary."""
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
        """Return model inputs: `input_ids` and `attention_mask` [B, L] for text, `pixel_values` [I, 3, H, W] for
        images.

        Args:
            images: PIL images, paths, arrays or tensors, one per placeholder, in the order of the text; may be nested.
            text: one prompt or a batch.
            generation_mode: "image" appends the begin marker to every prompt that does not end with it.
            drawn: for each image, whether its placeholders stand for image ids to learn (a generation target in
                training) rather than for an input image; none by default.
            kwargs: arguments of the tokenizer and the image processor (`return_tensors`, `padding`, ...).

        Raises:
            ValueError: if the mode is unknown, or the numbers of placeholders and images differ.
        """
        if generation_mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode is {generation_mode!r}; known: {', '.join(GENERATION_MODES)}")
        images = self.image_processor.fetch_images(images)  # always a list, also from an array or nested lists
        if generation_mode == "image" and text is not None:
            texts = [text] if isinstance(text, str) else text
            text = [each if each.endswith(self.boi_token) else each + self.boi_token for each in texts]
        token = _DRAWN.set(tuple(drawn or ()))
        try:
            with TOKENIZING:
                return self._inputs(images or None, [text] if isinstance(text, str) else text, **kwargs)
        finally:
            _DRAWN.reset(token)

    def _inputs(self, images: Any, texts: Sequence[str] | None, **kwargs: Any) -> BatchFeature:
        """Process the images, and encode the texts with their placeholders expanded."""
        if texts is None:
            return super().__call__(images=images, **kwargs)
        # placeholders in user text are marked with START and do not count as images
        outside = [re.sub(f"{START}{re.escape(self.image_token)}", START, text) for text in texts]
        self.validate_inputs(images=images, text=outside)
        inputs = {} if images is None else dict(super().__call__(images=images, **kwargs))
        count = 0 if images is None else len(make_flat_list_of_images(images))
        replacements = iter([self.replace_image_token(inputs, image_idx=number) for number in range(count)])
        options = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)["text_kwargs"]
        expanded, moved = zip(*(self._expanded(text, replacements) for text in texts), strict=True)
        return_replacements = options.pop("return_text_replacement_offsets", False)
        rows = self.encode(expanded, **options)
        if return_replacements:
            rows["text_replacement_offsets"] = list(moved)
        return BatchFeature({**rows, **inputs})

    def _expanded(self, text: str, replacements: Iterator[str]) -> tuple[str, list[dict[str, Any]]]:
        """Replace every placeholder that is not user text with the next replacement; return the text and the spans."""
        moved: list[dict[str, Any]] = []
        gained = 0
        opened = re.compile(f"(?<!{START}){re.escape(self.boi_token)}$")

        def expand(match: re.Match[str]) -> str:
            nonlocal gained
            replacement = next(replacements)
            if opened.search(text, 0, match.start()):  # the markers are written already
                replacement = replacement.removeprefix(self.boi_token).removesuffix(self.eoi_token)
            start = match.start() + gained
            moved.append({"type": "image", "span": match.span(), "new_span": (start, start + len(replacement))})
            gained += len(replacement) - len(match[0])
            return replacement

        return re.sub(self._placeholder, expand, text), moved

    @property
    def _placeholder(self) -> str:
        """Return a pattern that matches placeholders from the template, not those in user text."""
        return f"(?<!{START}){re.escape(self.image_token)}"

    def encode(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_offsets_mapping: bool = False,
        return_mm_token_type_ids: bool = False,
        **unknown: Any,
    ) -> BatchFeature:
        """Return `input_ids` and `attention_mask` of prompts, identical in training, chat and evaluation.

        Args:
            texts: rendered chats, with placeholders expanded.
            add_special_tokens: False also omits the BOS token.
            unknown: other arguments of the text tokenizer, rejected unless they are None, False or 0.

        Raises:
            UserError: if a text contains half a character (a lone surrogate).
            ValueError: if an argument is not supported, or truncation would cut through an image.
        """
        asked = sorted(name for name, value in unknown.items() if value not in (None, False, 0) and name != "verbose")
        if asked:
            raise ValueError(f"this processor does not know the text arguments {', '.join(asked)}")
        tokenizer, rows = self.tokenizer, []
        for text in texts:
            begin = add_special_tokens and self._begins(text)
            row = encode(tokenizer, text, begin=begin, offsets=return_offsets_mapping)
            rows.append(self._cut(row, max_length or tokenizer.model_max_length) if truncation else row)
        how = {"padding": padding, "max_length": max_length, "pad_to_multiple_of": pad_to_multiple_of}
        how |= {"padding_side": padding_side, "return_attention_mask": return_attention_mask}
        data = padded(tokenizer, rows, offsets=return_offsets_mapping, **how)
        if return_mm_token_type_ids:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        return BatchFeature(data, tensor_type=return_tensors)

    def _begins(self, text: str) -> bool:
        """Return whether to prepend the BOS token: only if the text does not start with it."""
        tokenizer = self.tokenizer
        return self.begin_token and adds_begin_token(tokenizer) and not text.startswith(tokenizer.bos_token)

    def _cut(self, row: Encoded, length: int) -> Encoded:
        part = slice(None, length) if self.tokenizer.truncation_side == "right" else slice(-length, None)
        if row.ids.count(self.image_token_id) != row.ids[part].count(self.image_token_id):
            raise ValueError(f"an image does not fit into max_length {length}: the text has {len(row.ids)} tokens")
        return Encoded(row.ids[part], row.offsets[part])

    def mark_control_tokens(self, conversation: Sequence[Any]) -> list[Any]:
        """Mark the control tokens in a conversation, so that `encode` treats them as plain characters."""
        return mark_conversation(conversation, control_pattern(self.tokenizer))

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[Any] | None = None,
        *,
        tokenize: bool = False,
        sanitize_control_tokens: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Render conversations as in transformers; with `tokenize`, return model inputs.

        Args:
            sanitize_control_tokens: with `tokenize`, encode control tokens in messages, tools and documents as plain
                characters. False encodes them as tokens.

        Raises:
            UserError: if a text contains half a character, there is no template, or it cannot render these messages.
        """
        if chat_template is None and not self.chat_template:
            raise UserError("This processor has no chat template: attach the model again, or set chat_template.")
        if chat_template is None and tools and "tool_use" in (self.chat_template or ()):
            chat_template = self.chat_template["tool_use"] if isinstance(self.chat_template, dict) else None
        if tokenize and sanitize_control_tokens:
            pattern = control_pattern(self.tokenizer)
            one = not conversation or not isinstance(conversation[0], list | tuple)
            marked = [mark_conversation(each, pattern) for each in ([conversation] if one else conversation)]
            conversation = marked[0] if one else marked
            tools, documents = mark_values(tools, pattern), mark_values(documents, pattern)
        template = chat_template or self.chat_template
        if isinstance(template, str):
            chats = conversation if conversation and isinstance(conversation[0], list | tuple) else [conversation]
            context = self.tokenizer.special_tokens_map | {"tools": tools, "documents": documents} | kwargs
            for each in chats:
                render_guarded(template, each, **{"add_generation_prompt": False, **context})
        return super().apply_chat_template(
            conversation, chat_template, tools=tools, documents=documents, tokenize=tokenize, **kwargs
        )

    def _multimodal_inputs_from_conversations(self, conversations: list[list[Any]], *args: Any, **kwargs: Any) -> Any:
        copies = [[dict(message) for message in each] for each in conversations]
        return super()._multimodal_inputs_from_conversations(copies, *args, **kwargs)  # edits messages in place

    def _process_images(self, images: ImageInput, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        return super()._process_images(make_flat_list_of_images(images), **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Return the placeholders of an image: M for a generated one, `image_seq_length` for an input image."""
        flags = _DRAWN.get()
        drawn = image_idx < len(flags) and flags[image_idx]
        tokens = self.image_token * (self.num_image_tokens if drawn else self.image_seq_length)
        return self.boi_token + tokens + self.eoi_token if self.mark_images else tokens

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    def count_tokens(self, conversation: Sequence[Any]) -> int:
        """Count the tokens of the prompt for the next answer of a conversation, including those of its images."""
        marked = self.mark_control_tokens(conversation)
        text = str(self.apply_chat_template(marked, add_generation_prompt=True))
        length = len(self.encode([text])["input_ids"][0])
        images = len(re.findall(self._placeholder, text))
        return length + images * (self.image_seq_length - 1 + 2 * self.mark_images)

    def drawing_prompt(self, prompt: str) -> str:
        """Return the prompt of an image: one user turn, the opening of the assistant's turn, the begin marker.

        Control tokens in the prompt are marked, so that this processor encodes them as plain characters.
        """
        marked = mark_text(prompt, control_pattern(self.tokenizer))
        messages = [{"role": "user", "content": [{"type": "text", "text": marked}]}]
        return str(self.apply_chat_template(messages, add_generation_prompt=True)) + self.boi_token

    def null_prompt_ids(self) -> list[int]:
        """Return the token ids of the image prompt with an empty user text, the null prompt of guidance."""
        with TOKENIZING:
            ids: list[int] = self.encode([self.drawing_prompt("")])["input_ids"][0]
        return ids

    def postprocess(self, pixels: Tensor) -> list[Image.Image]:
        """Convert pixels [B, 3, H, W] in [0, 1] to PIL images."""
        return self.image_processor.postprocess(pixels)

    def post_process_multimodal_output(
        self,
        generated_outputs: Tensor,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> list[str] | list[Image.Image] | list[list[dict[str, Any]]]:
        """Convert model outputs to strings, PIL images or message parts.

        Args:
            generated_outputs: text mode: token_ids [B, L] (image ids are skipped); image mode: pixels [B, 3, H, W]
                from `decode_image_tokens`; interleaved mode: token_ids [B, L], see `split_parts`.

        Raises:
            ValueError: if the mode is unknown.
        """
        if generation_mode == "image":
            return self.postprocess(generated_outputs)
        if generation_mode == "interleaved":
            return self.split_parts(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        if generation_mode not in (None, "text"):
            raise ValueError(f"generation_mode is {generation_mode!r}; known: {', '.join(GENERATION_MODES)}")
        rows = torch.as_tensor(generated_outputs)
        rows = rows[None] if rows.ndim == 1 else rows
        texts = [row[~self.vocabulary.contains(row)] for row in rows]  # the tokenizer has no strings for image ids
        return self.tokenizer.batch_decode(texts, skip_special_tokens=skip_special_tokens, **kwargs)

    def split_parts(
        self, token_ids: Tensor, *, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[list[dict[str, Any]]]:
        """Split interleaved answers, token_ids [B, L] or [L], into the parts of a message.

        Args:
            kwargs: arguments of the tokenizer's `decode`.

        Returns:
            For each row its parts in order: {"type": "text", "text": str} and {"type": "image", "ids": Tensor [M]} with
            ids in 0..K-1, as in training samples whose images are ids. Empty texts are left out.

        Raises:
            UserError: if an image does not have exactly M ids.
        """
        rows = torch.as_tensor(token_ids)
        return [self._parts(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in torch.atleast_2d(rows)]

    def _parts(self, row: Tensor, **decoding: Any) -> list[dict[str, Any]]:
        drawn = self.vocabulary.contains(row)
        changes = (drawn[1:] != drawn[:-1]).nonzero()[:, 0] + 1
        parts: list[dict[str, Any]] = []
        for run in row.tensor_split(changes.cpu()):
            if len(run) and self.vocabulary.contains(run[:1]).all():
                if len(run) != self.num_image_tokens:
                    raise UserError(f"An image has {self.num_image_tokens} ids, this answer has one with {len(run)}.")
                parts.append({"type": "image", "ids": self.vocabulary.ids(run)})
            elif text := self.tokenizer.decode(run, **decoding):
                parts.append({"type": "text", "text": text})
        return parts
