"""Label masks to the token: what the assistant says and nothing else, of a drawing the image tokens alone."""

from typing import Any

import pytest
import torch
from PIL import Image

from tests.training.language_model.tiny_host import tiny_host
from unimm.data.conversations import conversation
from unimm.data.text.collators import IGNORED, FlowCollator
from unimm.data.text_to_image import drawing
from unimm.errors import UserError
from unimm.mllm import UnimmProcessor

RED, BLUE = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
TALK = conversation(RED, [("What color is the circle?", "red"), ("Is there a ring?", "no")])
SHORT_TALK = conversation(BLUE, [("What do you see?", "a blue ring.")])


@pytest.fixture(scope="module")
def processor() -> UnimmProcessor:
    return tiny_host()[1]


def samples(kind: str, *conversations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"flow": kind, "kind": kind, "index": n, "messages": each} for n, each in enumerate(conversations)]


def labelled(batch: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    return batch["labels"][row][batch["labels"][row] != IGNORED]


def test_golden_labels_of_a_conversation(processor: UnimmProcessor) -> None:
    batch = FlowCollator(processor)(samples("conversation", TALK, SHORT_TALK))["conversation"]
    image = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"
    text = (
        f"<|im_start|>user\n{image}What color is the circle?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nIs there a ring?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    )
    assert processor.tokenizer.decode(batch["input_ids"][0]) == text
    assert processor.tokenizer.decode(labelled(batch, 0)) == "red<|im_end|>no<|im_end|>"
    assert processor.tokenizer.decode(labelled(batch, 1)) == "a blue ring.<|im_end|>"
    chosen = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][chosen], batch["input_ids"][chosen])
    assert not batch["drawn"].any()
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    assert "drawn_pixel_values" not in batch


def test_rows_are_padded_on_the_right(processor: UnimmProcessor) -> None:
    mask = FlowCollator(processor)(samples("conversation", TALK, SHORT_TALK))["conversation"]["attention_mask"]
    assert mask[0].all()
    assert not mask[1].all()
    assert (mask.diff(dim=1) <= 0).all()


def test_labels_of_a_drawing_are_the_image_tokens(processor: UnimmProcessor) -> None:
    rows = samples("drawing", drawing("a red circle", RED), drawing("", BLUE))
    batch = FlowCollator(processor)(rows)["drawing"]
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [16, 16]
    assert torch.equal(batch["labels"] != IGNORED, batch["drawn"])
    assert (batch["labels"][batch["drawn"]] == processor.image_token_id).all()
    assert batch["input_ids"][0, -1] == processor.image_token_id  # nothing behind the last label is computed
    assert batch["drawn_pixel_values"].shape == (2, 3, 64, 64)
    assert "pixel_values" not in batch
    prompt = batch["input_ids"][1][: batch["drawn"][1].nonzero()[0]]
    assert prompt.tolist() == processor.null_prompt_ids()


def test_flows_are_padded_apart_and_images_stay_with_their_rows(processor: UnimmProcessor) -> None:
    shown = samples("conversation", TALK, SHORT_TALK)
    asked = samples("drawing", drawing("a circle", BLUE), drawing("a ring", RED))
    batch = FlowCollator(processor)([asked[0], shown[0], asked[1], shown[1]])
    assert list(batch) == ["conversation", "drawing"]
    alone = FlowCollator(processor)(asked)["drawing"]
    assert all(torch.equal(batch["drawing"][name], alone[name]) for name in alone)
    red, blue = (batch["conversation"]["pixel_values"][n].mean((1, 2)).tolist() for n in (0, 1))
    assert red == pytest.approx([1, -1, -1])
    assert blue == pytest.approx([-1, -1, 1])
    assert batch["drawing"]["drawn_pixel_values"][0].mean((1, 2)).tolist() == pytest.approx(blue)


def test_a_sample_without_an_answer_is_an_error(processor: UnimmProcessor) -> None:
    with pytest.raises(UserError, match=r"Sample 1 .*'What do you see\?'.* 0 assistant turns"):
        FlowCollator(processor)(samples("conversation", TALK, SHORT_TALK[:1]))
    with pytest.raises(UserError, match="no drawn image"):
        FlowCollator(processor)(samples("drawing", TALK))


def test_a_template_without_generation_marks_learns_the_same_tokens() -> None:
    processor = tiny_host()[1]
    marked = FlowCollator(processor)(samples("conversation", TALK, SHORT_TALK))["conversation"]
    processor.chat_template = processor.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    found = FlowCollator(processor)(samples("conversation", TALK, SHORT_TALK))["conversation"]
    assert all(torch.equal(found[name], marked[name]) for name in marked)


def long_talks() -> list[dict[str, Any]]:
    """A short talk, one whose second image does not fit into 60 tokens, and one whose question alone is longer."""
    with_images = [*conversation(RED, [("What color is it?", "red")]), *conversation(BLUE, [("And now?", "blue")])]
    endless = conversation(RED, [("circle " * 80, "red")])
    return samples("conversation", SHORT_TALK, with_images, endless)


def test_conversations_are_cut_in_front_of_a_image_that_does_not_fit(processor: UnimmProcessor) -> None:
    talks = long_talks()
    whole = FlowCollator(processor)(talks)["conversation"]
    second = (whole["input_ids"][1] == processor.image_token_id).nonzero()[16].item()
    for capacity in (second + 1, second + 15):  # the image's tokens begin, but do not fit
        cut = FlowCollator(processor, max_length=capacity)(talks)["conversation"]
        assert cut["input_ids"].shape[0] == 2  # the endless question leaves nothing to learn
        length = int(cut["attention_mask"][1].sum())
        assert length <= second and (cut["input_ids"][1] == processor.image_token_id).sum() == 16
        assert torch.equal(cut["input_ids"][1, :length], whole["input_ids"][1, :length])
        assert torch.equal(cut["labels"][1, :length], whole["labels"][1, :length])
        assert processor.tokenizer.decode(labelled(cut, 0)).startswith("a blue ring.")
        assert torch.equal(cut["pixel_values"], whole["pixel_values"][:2])
    uncut = FlowCollator(processor, max_length=10_000)(talks)["conversation"]
    assert all(torch.equal(uncut[name], whole[name]) for name in whole)


def test_a_batch_of_which_nothing_is_left_is_an_error(processor: UnimmProcessor) -> None:
    with pytest.raises(UserError, match="No sample of a batch .* learns anything in its first 60 tokens"):
        FlowCollator(processor, max_length=60)(long_talks()[2:])
