"""A checkpoint reloads whole and equal, or is refused in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from tests.mllm import tiny
from unimm.errors import UserError
from unimm.mllm import UnimmLlavaForConditionalGeneration, load
from unimm.mllm.loading import default_model_path, own_device

IDS = torch.tensor([[5, 6, 384, 400, 7]])

FRESH = """
import sys, torch
import unimm
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(sys.argv[1]).eval()
    processor = AutoProcessor.from_pretrained(sys.argv[1])
    inputs = torch.load(sys.argv[2], weights_only=True)
    with torch.no_grad():
        torch.save(model(**inputs, vocabulary="all").logits, sys.argv[2] + auto.__name__)
print(type(model).__name__, type(model.image_tokenizer).__name__, type(processor).__name__)
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model, processor = tiny.unified(tied=False)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_weights(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) drop tensors of a saved model."""
    weights = load_file(folder / "model.safetensors") | change
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_logits_are_equal_after_reload(tied: bool, auto: type, tmp_path: Path) -> None:
    model, processor = tiny.unified(tied=tied)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path).eval()
    assert type(again) is UnimmLlavaForConditionalGeneration
    inputs = processor.apply_chat_template(
        [tiny.user(tiny.image(), "what?")], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        assert torch.equal(again(IDS, vocabulary="all").logits, model(IDS, vocabulary="all").logits)
    drawn = torch.arange(384, 400)[None]
    assert torch.equal(again.decode_image_tokens(drawn), model.decode_image_tokens(drawn))
    model.config.name_or_path = again.config.name_or_path
    assert again.config.to_dict() == model.config.to_dict()
    assert again.generation_config.image_generation == model.generation_config.image_generation


@pytest.mark.slow
def test_a_fresh_process_needs_only_import_unimm(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = load(checkpoint)
    inputs = dict(
        processor.apply_chat_template(
            [tiny.user(tiny.image(), "what?")], tokenize=True, return_dict=True, return_tensors="pt"
        )
    )
    torch.save(inputs, tmp_path / "inputs")
    command = [sys.executable, "-c", FRESH, str(checkpoint), str(tmp_path / "inputs")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["UnimmLlavaForConditionalGeneration", "VQRAE", "UnimmProcessor"]
    with torch.no_grad():
        expected = model(**inputs, vocabulary="all").logits
    for auto in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        assert torch.equal(torch.load(tmp_path / f"inputs{auto}", weights_only=True), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codebook_is_float32_at_every_dtype(checkpoint: Path, dtype: torch.dtype) -> None:
    model, _ = load(checkpoint, device="cpu", dtype=dtype)
    quantizer, sampler = model.image_tokenizer.quantizer, model.image_tokenizer.sampler
    assert model.lm_head.weight.dtype == model.image_tokenizer.encoder.dtype == dtype
    assert {each.dtype for each in (*quantizer.state_dict().values(), *sampler.parameters())} == {torch.float32}


def test_load_gives_float32_in_evaluation_mode_on_the_cpu(checkpoint: Path) -> None:
    model, processor = load(str(checkpoint), device="cpu")
    assert model.dtype == torch.float32 and not model.training and model.device.type == "cpu"
    assert processor.vocabulary == model.visual_vocabulary


def test_missing_weights_are_refused_with_counts(checkpoint: Path) -> None:
    total = len(load_file(checkpoint / "model.safetensors"))
    name = "model.vision_tower.encoder.embeddings.patch_embedding.weight"
    edit_weights(checkpoint, {name: None})
    with pytest.raises(UserError, match=rf"loaded {total - 1} of {total} weights; missing 1 \({name}"):
        load(checkpoint)
    with pytest.raises(UserError, match="missing 1"):
        AutoModelForImageTextToText.from_pretrained(checkpoint)


def test_unexpected_and_misshapen_weights_are_refused(checkpoint: Path) -> None:
    total = len(load_file(checkpoint / "model.safetensors"))
    edit_weights(checkpoint, {"lm_head.weight": torch.zeros(400, 32), "model.other": torch.zeros(1)})
    with pytest.raises(
        UserError, match=rf"loaded {total - 1} of {total}.*\(400, 32\) instead of \(416, 32\).*unexpected 1"
    ):
        load(checkpoint)


@pytest.mark.parametrize("name", ["quantizer.codebook", "sampler.projection.weight"])
def test_another_codebook_is_refused(checkpoint: Path, name: str) -> None:
    key = f"model.vision_tower.{name}"
    weights = load_file(checkpoint / "model.safetensors")
    edit_weights(checkpoint, {key: weights[key] + 1e-3})
    with pytest.raises(UserError, match="another codebook"):
        load(checkpoint)


def test_damaged_files_are_one_sentence(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be read"):
        load(checkpoint)
    weights.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        load(checkpoint)


def test_what_is_no_unified_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model folder"):
        load(tmp_path / "nothing")
    with pytest.raises(UserError, match="no model folder"):
        load("./nothing/at/all")
    with pytest.raises(UserError, match="has no config.json"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter, not a whole model"):
        load(tmp_path)
    tiny.image_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a vqrae model, not a unified one"):
        load(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        load(tmp_path / "config.json")


def test_processor_and_model_must_belong_together(checkpoint: Path) -> None:
    path = checkpoint / "processor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"image_vocab_start": 448}))
    with pytest.raises(UserError, match="32 image ids start at 384, the processor's 32 at 448"):
        load(checkpoint)


def test_the_default_lies_beside_the_code() -> None:
    assert default_model_path().parts[-3:] == ("unimm", "assets", "default")


def test_loading_is_quiet_and_leaves_the_logger_alone(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(checkpoint)
    assert not caplog.records
    assert AutoProcessor.from_pretrained(checkpoint).image_vocab_start == 384


@pytest.mark.parametrize(
    ("asked", "gpus", "rank", "expected"),
    [
        (None, False, "1", "cpu"),
        (None, True, None, "cuda:0"),
        (None, True, "3", "cuda:3"),
        ("cuda", True, "3", "cuda:3"),
        ("cuda:1", True, "3", "cuda:1"),
        ("cpu", True, "3", "cpu"),
        ("cuda", False, None, "cuda"),
    ],
)
def test_every_process_takes_its_own_gpu(
    asked: str | None, gpus: bool, rank: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert str(own_device(asked)) == expected
