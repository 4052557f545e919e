"""LLaVA-NeXT and OneVision: tiled images give the host's own logits, and one view is enough to read and to draw."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from tests.mllm import tiny
from tests.mllm.test_export import same_state
from tests.mllm.test_multimodal_hosts import ROWS, SIZES, text_config, texts
from unimm.mllm import attach
from unimm.mllm.doctor import examine
from unimm.mllm.export import detach, stock_understanding
from unimm.tokenizer import VQRAE


def build(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, VQRAE]:
    torch.manual_seed(5)
    tokenizer = texts("<image>", "<video>")
    token = tokenizer.convert_tokens_to_ids("<image>")
    fields = {"text_config": text_config(), "image_token_index": token, "image_grid_pinpoints": [[16, 32], [32, 16]]}
    host: PreTrainedModel
    if name == "llava_next":
        vision = CLIPVisionConfig(image_size=16, patch_size=4, **SIZES)
        layer = -2
        host = LlavaNextForConditionalGeneration(
            LlavaNextConfig(
                vision_config=vision,
                vision_feature_layer=layer,
                vision_feature_select_strategy="default",
                **fields,
            )
        )
    else:
        vision = SiglipVisionConfig(image_size=16, patch_size=4, vision_use_head=False, **SIZES)
        layer = -1
        fields["video_token_index"] = tokenizer.convert_tokens_to_ids("<video>")
        host = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(vision_config=vision, **fields))
    tower = host.model.vision_tower
    image_tokenizer = VQRAE(
        VQRAE.config_class(encoder_config=tower.config.to_dict(), codebook_size=32, codebook_dim=8, feature_layer=layer)
    )
    image_tokenizer.encoder.load_state_dict(tower.state_dict())
    return host.eval(), tokenizer, image_tokenizer.eval()


@torch.no_grad()
def tiled(host: PreTrainedModel) -> dict[str, torch.Tensor]:
    """One image of 16 x 30 pixels as the host's processor makes it: an overview and two tiles."""
    torch.manual_seed(6)
    pixel_values, image_sizes = torch.randn(1, 3, 3, 16, 16), torch.tensor([[16, 30]])
    count = len(host.get_image_features(pixel_values, image_sizes=image_sizes, return_dict=True).pooler_output[0])
    placeholders = torch.full((1, count), host.config.image_token_id)
    input_ids = torch.cat([torch.randint(0, 250, (1, 3)), placeholders, torch.randint(0, 250, (1, 9))], 1)
    return {"input_ids": input_ids, "pixel_values": pixel_values, "image_sizes": image_sizes}


NAMES = ("llava_next", "llava_onevision")


@pytest.mark.parametrize("name", NAMES)
def test_tiled_images_give_the_hosts_logits_to_the_bit(name: str, tmp_path: Path) -> None:
    host, tokenizer, image_tokenizer = build(name)
    model, processor = attach(host, image_tokenizer, tokenizer)
    inputs = tiled(host)
    with torch.no_grad():
        expected = host(**inputs).logits
        assert torch.equal(model(**inputs).logits[..., :ROWS], expected)
        model.save_pretrained(tmp_path)
        again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        stock, _ = stock_understanding(model, processor)
        assert type(stock) is type(host) and torch.equal(stock(**inputs).logits, expected)
    assert same_state(detach(model), host)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **options), host.generate(**inputs, **options))


@pytest.mark.parametrize("name", NAMES)
def test_one_view_reads_draws_and_learns(name: str) -> None:
    host, tokenizer, image_tokenizer = build(name)
    model, processor = attach(host, image_tokenizer, tokenizer)
    inputs = processor.apply_chat_template(
        [tiny.user(tiny.image(), "is there a red circle?")],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16
    assert model.generate(**inputs, max_new_tokens=4, pad_token_id=0).shape[0] == 1
    drawn = model.generate(**inputs, generation_mode="image", seed=1, num_return_sequences=2)
    assert drawn.shape == (2, 16)
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert all(finding.ok for finding in examine(model.eval(), processor))
