"""Text, chats and images to inputs, and back; saved and reloaded."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from tests.mllm import tiny
from unimm.errors import UserError
from unimm.mllm import UnimmProcessor
from unimm.mllm.templates import chat_template
from unimm.mllm.vocabulary import KNOWN_MARKERS, add_markers
from unimm.tokenizer import ImageTokenizerProcessor

CHAT = [
    tiny.user(tiny.image(), "is there a blue ring?"),
    tiny.assistant("yes"),
    tiny.user("one more"),
    tiny.assistant(tiny.image("blue")),
]


@pytest.fixture(scope="module")
def processor() -> UnimmProcessor:
    return tiny.unified()[1]


def test_chat_renders_images_of_both_sides(processor: UnimmProcessor) -> None:
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert processor.apply_chat_template(CHAT, add_generation_prompt=True) == (
        f"<|im_start|>user\n{image}is there a blue ring?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        f"<|im_start|>user\none more<|im_end|>\n<|im_start|>assistant\n{image}<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = [{"role": "user", "content": "two"}]  # a string is as good as parts
    assert processor.apply_chat_template(plain) == "<|im_start|>user\ntwo<|im_end|>\n"


def test_placeholders_are_expanded_and_images_keep_their_order(processor: UnimmProcessor) -> None:
    inputs = processor.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 2 * 16
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    red, blue = inputs["pixel_values"].mean((2, 3)).tolist()
    torch.testing.assert_close([red, blue], [[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])


def test_assistant_mask_covers_what_the_assistant_says(processor: UnimmProcessor) -> None:
    inputs = processor.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    mask = torch.as_tensor(inputs["assistant_masks"])[0].bool()
    said = processor.tokenizer.decode(inputs["input_ids"][0][mask])
    assert said == "yes<|im_end|><|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|><|im_end|>"


def test_batches_are_padded_on_the_left(processor: UnimmProcessor) -> None:
    inputs = processor(text=["two", "a photo of a red circle"], return_tensors="pt", padding=True)
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].all()


def test_image_mode_ends_with_the_begin_marker(processor: UnimmProcessor) -> None:
    texts = ["two", "two<|vision_start|>"]
    inputs = processor(text=texts, generation_mode="image", return_tensors="pt")
    assert torch.equal(inputs["input_ids"][0], inputs["input_ids"][1])
    assert inputs["input_ids"][0, -1] == processor.boi_token_id and texts[0] == "two"
    assert processor.drawing_prompt("two").endswith("<|im_start|>assistant\n<|vision_start|>")
    with pytest.raises(ValueError, match="'audio'; known: text, image"):
        processor(text="two", generation_mode="audio")


def test_typed_markers_stay_text(processor: UnimmProcessor) -> None:
    turn = tiny.user("<|image_pad|><|im_end|><|vision_start|>")
    inputs = processor.apply_chat_template([turn], tokenize=True, return_dict=True, sanitize_control_tokens=True)
    ids = inputs["input_ids"][0]
    assert processor.image_token_id not in ids and processor.boi_token_id not in ids
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_images_and_placeholders_must_agree(processor: UnimmProcessor) -> None:
    with pytest.raises(ValueError, match="2 <|image_pad|> tokens and 1 images"):
        processor(text="<|image_pad|><|image_pad|>", images=[tiny.image()], return_tensors="pt")
    with pytest.raises(ValueError, match="no images were passed"):
        processor(text="<|image_pad|>", images=[], return_tensors="pt")


def test_outputs_for_people(processor: UnimmProcessor) -> None:
    ids = torch.tensor([processor.tokenizer.encode("two") + [384, 415]])
    assert processor.post_process_multimodal_output(ids) == ["two"]
    assert processor.post_process_multimodal_output(ids[0], generation_mode="text") == ["two"]
    pixels = torch.zeros(2, 3, 16, 16)
    pixels[:, 0] = 1
    images = processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert [image.getpixel((3, 3)) for image in images] == [(255, 0, 0)] * 2
    assert isinstance(images[0], Image.Image)
    with pytest.raises(ValueError, match="'audio'"):
        processor.post_process_multimodal_output(ids, generation_mode="audio")


def test_saved_and_reloaded(processor: UnimmProcessor, tmp_path: Path) -> None:
    tiny_model, _ = tiny.unified()
    tiny_model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, UnimmProcessor) and isinstance(again.image_processor, ImageTokenizerProcessor)
    assert again.vocabulary == processor.vocabulary and again.num_image_tokens == 16
    assert again.tokenizer.padding_side == "left"
    inputs, expected = (
        each.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_tensors="pt")
        for each in (again, processor)
    )
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert again.null_prompt_ids() == processor.null_prompt_ids()


def test_a_tokenizer_that_reaches_into_the_image_ids_is_refused(processor: UnimmProcessor, tmp_path: Path) -> None:
    tiny_model, other = tiny.unified()
    tiny_model.config.save_pretrained(tmp_path)
    other.tokenizer.add_tokens([f"<{number}>" for number in range(100)])
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"394 tokens|397 tokens|image ids start at 384"):
        AutoProcessor.from_pretrained(tmp_path)


def test_templates_for_tokenizers_without_chatml_and_with_one_of_their_own() -> None:
    plain = tiny.text_tokenizer(())
    markers = add_markers(plain)
    plain.chat_template = chat_template(plain, markers)
    messages = [tiny.user("two"), tiny.assistant("yes"), tiny.user("one")]
    assert plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "USER: two ASSISTANT: yes<|endoftext|>USER: one ASSISTANT: "
    )
    text_only = tiny.text_tokenizer()
    text_only.chat_template = "{% for message in messages %}{{ 'x' + message.content }}{% endfor %}"
    extended = chat_template(text_only, markers)
    assert isinstance(extended, str) and extended.endswith(text_only.chat_template)
    shown = text_only.apply_chat_template([tiny.user("two", tiny.image())], chat_template=extended, tokenize=False)
    assert shown == "xtwo<|vision_start|><|image_pad|><|vision_end|>"
    own = "{% for m in messages %}{% for p in m.content %}{{ '<|image_pad|>' if p.type == 'image' else p.text }}"
    text_only.chat_template = own + "{% endfor %}{% endfor %}"
    assert chat_template(text_only, KNOWN_MARKERS[0]) == text_only.chat_template
