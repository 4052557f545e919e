"""LLaVA-1.5's two stages: their settings against the paper, the model at full size, and both in small."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import LlamaConfig, Qwen3Config

import unimm
from tests.test_recipes import ROOT, run
from tests.training.language_model.tiny_host import tiny_image_tokenizer
from unimm import bfloat16
from unimm.cli import main
from unimm.config.loading import load_config
from unimm.errors import UserError
from unimm.mllm.hosts.llava import UnimmLlavaConfig, UnimmLlavaForConditionalGeneration
from unimm.mllm.vocabulary import visual_base
from unimm.tokenizer import VQRAEConfig
from unimm.tokenizer.published import PUBLISHED
from unimm.training.language_model import adapters
from unimm.training.language_model.adapters import lora_config
from unimm.training.tokenizer.parameters import train_projector_only

CONFIGS = sorted(ROOT.glob("configs/sft/*.yaml"))


def settings(path: Path) -> Any:
    return load_config(runpy.run_path(str(ROOT / "recipes" / "sft.py"))["SFTRecipe"], path)


@pytest.mark.parametrize(
    ("name", "rate", "batch", "rows", "template"),
    [
        ("pretrain_558k", 1e-3, 256, 558_128, "plain"),
        ("pretrain_595k", 1e-3, 256, 595_375, "plain"),
        ("mix665k", 2e-5, 128, 665_298, "vicuna_v1"),
        ("mix665k_lora", 2e-4, 128, 665_298, "vicuna_v1"),
        ("mix665k_qlora", 2e-4, 128, 665_298, "vicuna_v1"),
    ],
)
def test_the_settings_are_llavas(
    name: str, rate: float, batch: int, rows: int, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfloat16, "multiplies_bfloat16", lambda device: True)  # as on the GPUs that they are for
    recipe = settings(ROOT / f"configs/sft/llava15_{name}.yaml")
    train = recipe.train
    assert (train.learning_rate, train.weight_decay, train.warmup_steps, train.max_length) == (rate, 0.0, 0.03, 2048)
    assert train.global_batch_size == batch and batch % (8 * train.per_device_train_batch_size) == 0
    assert abs(train.max_steps - rows / batch) <= 1  # one pass
    assert str(train.lr_scheduler_type.value) == "cosine" and train.bf16 and train.gradient_checkpointing
    (flow,) = recipe.data.flows.values()
    stage1 = template == "plain"
    assert recipe.model.chat_template == template
    assert (recipe.model.trains, flow.drop_questions) == (("projector", True) if stage1 else ("all", False))
    assert (recipe.model.pad_to_square, flow.group_by_modality) == (not stage1, not stage1)
    if "lora" in name:
        assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (128, 256, 0.05)
        assert train.projector_learning_rate == 2e-5
        assert recipe.lora.quantize == ("nf4" if name.endswith("qlora") else None)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_model_is_built_at_full_size(path: Path) -> None:
    """On the meta device: Vicuna-7B as published, SigLIP2 at 256 pixels, and a projector of two linear layers."""
    recipe = settings(path)
    vicuna = LlamaConfig(
        vocab_size=32_000 + 16_384,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )
    tower = VQRAEConfig(encoder_config=PUBLISHED["siglip2-so400m-p16-256"].vision_config())
    rows = {"image_vocab_start": 32_000, "codebook_size": 16_384, "boi_token_id": 31_998, "eoi_token_id": 31_999}
    config = UnimmLlavaConfig(vision_config=tower, text_config=vicuna, image_seq_length=256, **rows)
    with torch.device("meta"):
        model = UnimmLlavaForConditionalGeneration(config)
    if recipe.model.trains == "projector":
        train_projector_only(model)
    model.image_tokenizer.requires_grad_(False)
    if recipe.lora is not None:
        with torch.device("meta"):
            get_peft_model(model, lora_config(model, recipe.lora))
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    projector = 1152 * 4096 + 4096 + 4096 * 4096 + 4096
    language_model = (
        6_738_415_616 + 2 * 16_384 * 4096
    )  # Llama-7B's published count, and the image rows of both matrices
    if recipe.lora is not None:
        rank_128 = 2 * 159_907_840  # QLoRA's authors print the number of rank 64
        assert learned == projector + rank_128 + 2 * (16_384 + 2) * 4096
        return
    assert learned == projector + (0 if recipe.model.trains == "projector" else language_model)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and twenty conversations, one of them far too long."""
    folder = tmp_path_factory.mktemp("llava15")
    tiny_image_tokenizer().save_pretrained(folder / "runs/debug/stage2")
    (folder / "llava").mkdir()
    Image.new("RGB", (30, 20), "red").save(folder / "llava/red.png")
    records: list[dict[str, Any]] = []
    for n in range(20):
        said = [{"from": "human", "value": "<image>\nWhat?" if n % 2 else "Hello?"}, {"from": "gpt", "value": "red"}]
        records.append({"conversations": said} | ({"image": "red.png"} if n % 2 else {}))
    records[4]["conversations"][0]["value"] = "long " * 200
    (folder / "llava/talk.json").write_text(json.dumps(records))
    return folder


@pytest.mark.slow
def test_both_stages_in_small(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small)
    weights = []
    for stage in ("pretrain", "mix665k"):
        assert run("sft", "--config", str(ROOT / f"configs/debug/llava15_{stage}.yaml")) == 0
        model, processor = unimm.load(f"runs/debug/llava15_{stage}")
        weights.append({name: tensor.clone() for name, tensor in model.model.named_parameters()})
        report = json.loads(next(Path(f"runs/debug/llava15_{stage}/data").glob("*.report.json")).read_text())
        assert (report["rows"], report["usable"], report["with images"]) == (20, 20, 10)
    assert processor.image_processor.pad_to_square
    assert processor.chat_template != unimm.load("runs/debug/llava15_pretrain")[1].chat_template
    assert model.config.null_prompt == processor.null_prompt_ids()
    moved = {name.split(".")[0] for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert moved == {"language_model", "multi_modal_projector"}


@pytest.mark.slow
def test_lora_in_small_and_drawing_with_the_papers_settings(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The artefact of three steps, merged, goes on to draw."""
    monkeypatch.chdir(small)
    if not Path("runs/debug/llava15_pretrain/config.json").is_file():
        assert run("sft", "--config", str(ROOT / "configs/debug/llava15_pretrain.yaml")) == 0
    assert run("sft", "--config", str(ROOT / "configs/debug/llava15_mix665k_lora.yaml")) == 0
    assert main(["merge", "runs/debug/llava15_mix665k_lora", "--output", "runs/debug/sft"]) == 0
    merged, processor = unimm.load("runs/debug/sft")
    assert processor.image_processor.pad_to_square
    begun = unimm.load("runs/debug/llava15_pretrain")[0].state_dict()
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, begun[name])}
    assert any("q_proj" in name for name in changed) and not any("vision_tower" in name for name in changed)
    assert run("t2i", "--config", str(ROOT / "configs/debug/t2i_qwen3_0.6b.yaml")) == 0
    assert unimm.load("runs/debug/t2i_qwen3_0.6b")[0].config.null_prompt_prob == 0.1
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    assert run("sft", "--config", str(ROOT / "configs/debug/llava15_mix665k_qlora.yaml")) == 2
    assert "needs the package bitsandbytes" in capsys.readouterr().err


def test_drawing_has_the_papers_settings_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """VQRAE's table 9, and Qwen3-0.6B as published (596 049 920 weights, its embedding tied) with 16384 ids more."""
    monkeypatch.setattr(bfloat16, "multiplies_bfloat16", lambda device: True)  # as on the GPUs that it is for
    recipe = load_config(
        runpy.run_path(str(ROOT / "recipes" / "t2i.py"))["T2IRecipe"], ROOT / "configs/t2i/qwen3_0.6b.yaml"
    )
    train = recipe.train
    assert (train.learning_rate, train.warmup_steps, train.weight_decay, train.max_grad_norm) == (1e-4, 4000, 0.0, 1.0)
    assert (train.adam_beta1, train.adam_beta2, train.adam_epsilon) == (0.9, 0.999, 1e-15)
    assert (train.global_batch_size, train.bf16) == (512, True)
    assert train.lr_scheduler_type.value == "constant_with_warmup"
    fields = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    fields |= {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
    tower = VQRAEConfig(encoder_config=PUBLISHED["internvit-300m-448"].vision_config())
    assert tower.num_image_tokens == 1024 and recipe.data.image_size == tower.image_size
    base = visual_base(151_936, 151_669)
    qwen = Qwen3Config(vocab_size=base + tower.codebook_size, **fields)
    config = UnimmLlavaConfig(vision_config=tower, text_config=qwen, image_seq_length=1024)
    with torch.device("meta"):
        model = UnimmLlavaForConditionalGeneration(config)
    found = sum(p.numel() for p in model.model.language_model.parameters())  # the head is the embedding
    assert found == 596_049_920 + (base - 151_936 + 16_384) * 1024


def test_a_model_comes_from_one_place() -> None:
    config = runpy.run_path(str(ROOT / "recipes" / "sft.py"))["SFTModelConfig"]
    for wrong in (
        {},
        {"llm": "a"},
        {"init_from": "a", "llm": "b", "image_tokenizer": "c"},
        {"init_from": "a", "llm": "b"},
    ):
        with pytest.raises(UserError, match="either init_from, or image_tokenizer and llm"):
            config(**wrong)
