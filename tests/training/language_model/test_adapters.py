"""LoRA and QLoRA: what learns, the one artefact, its merge, and what it is refused for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.language_model.test_trainer import BOTH, StopAt, history
from tests.training.language_model.tiny_host import tiny_host
from unimm.cli import main
from unimm.data.mixture import Mixture, MixtureConfig
from unimm.data.text.collators import FlowCollator
from unimm.errors import UserError
from unimm.mllm import load
from unimm.training.language_model import adapters
from unimm.training.language_model.adapters import (
    ADAPTER_WEIGHTS,
    KEPT_WHOLE,
    LoraSettings,
    add_lora,
    quantization,
    read_adapter,
)
from unimm.training.language_model.trainer import HostTrainer
from unimm.training.loop.arguments import HostTrainingArguments

SMALL = LoraSettings(r=2, alpha=4, dropout=0.0, dtype="float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    model, processor = tiny_host()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def trainer(base: Path, output: Path, **arguments: Any) -> HostTrainer:
    torch.manual_seed(0)
    model, processor = load(base, device="cpu", dtype=torch.float32)
    adapter = add_lora(model, SMALL, str(base))
    data = MixtureConfig(flows=BOTH, num_eval_samples=4)
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True}
    defaults |= {"save_steps": 2, "logging_steps": 2, "ema_decay": 0.5, "projector_learning_rate": 1e-3}
    return HostTrainer(
        model,
        HostTrainingArguments(str(output), **{**defaults, **arguments}),
        processor=processor,
        data_collator=FlowCollator(processor),
        train_dataset=Mixture(data),
        eval_dataset=Mixture(data, split="test"),
        flow_weights=data.weights,
        adapter=adapter,
    )


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HostTrainer]:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run = trainer(base, folder)
    run.run()
    return folder, run


def a_batch(model: Any) -> dict[str, torch.Tensor]:
    start = model.config.image_vocab_start
    input_ids = torch.tensor([[25, 26, model.config.boi_token_id, start, start + 3, model.config.eoi_token_id, 27]])
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([[29] + [model.config.image_token_id] * 16 + [28]])
    return {"input_ids": torch.cat([input_ids, seen], dim=1), "pixel_values": image}


def test_adapters_projector_and_new_rows_learn_and_nothing_else(trained: tuple[Path, HostTrainer], base: Path) -> None:
    folder, run = trained
    learned = {name for name, p in run.model.named_parameters() if p.requires_grad}
    kinds = ("lora_", "multi_modal_projector.modules_to_save", "trainable_tokens_delta")
    assert all(any(kind in name for kind in kinds) for name in learned)
    assert all(any(kind in name for name in learned) for kind in kinds)
    assert not any("vision_tower" in name for name in learned)
    assert sum("lora_A" in name for name in learned) == 2 * 7  # every linear layer of both blocks
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", ADAPTER_WEIGHTS, "unimm_base.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names and "config.json" not in names
    before, after = load(base)[0].state_dict(), run.model.state_dict()
    kept = {name for name in before if name in after}
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)


def test_the_projector_has_its_own_rate(trained: tuple[Path, HostTrainer]) -> None:
    groups = trained[1].optimizer.param_groups
    names = {id(p): name for name, p in trained[1].model.named_parameters()}
    rates = {group["initial_lr"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert set(rates) == {1e-2, 1e-3}
    projector = [
        name for group in groups if group["initial_lr"] == 1e-3 for name in map(names.get, map(id, group["params"]))
    ]
    assert len(projector) == 4 and all("multi_modal_projector" in name for name in projector)


@torch.no_grad()
def test_a_merged_model_answers_as_the_adapter_did(
    trained: tuple[Path, HostTrainer], tmp_path: Path, capsys: Any
) -> None:
    folder, run = trained
    with run.averaged():  # what the run saved
        run.model.eval()
        batch = a_batch(run.model)
        expected = run.model(**batch, vocabulary="all").logits
    assert main(["merge", str(folder), "--output", str(tmp_path / "whole"), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == run.model.config.model_type
    merged, processor = load(tmp_path / "whole")
    torch.testing.assert_close(merged(**batch, vocabulary="all").logits, expected, atol=1e-5, rtol=0)
    plain, _ = load(run.adapter.base)
    assert (plain(**batch, vocabulary="all").logits - expected).abs().max() > 1e-2
    assert processor.vocabulary == merged.visual_vocabulary
    drawn = merged.generate(batch["input_ids"][:, :3], generation_mode="image", seed=1)
    assert drawn.shape == (1, 16)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(
    trained: tuple[Path, HostTrainer], base: Path, tmp_path: Path
) -> None:
    stopped = trainer(base, tmp_path / "run")
    stopped.add_callback(StopAt(3))
    stopped.run()
    resumed = trainer(base, tmp_path / "run")
    resumed.run()
    whole, cut = (load_file(folder / ADAPTER_WEIGHTS) for folder in (trained[0], tmp_path / "run"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert history(trained[1]) == history(resumed)


def test_a_broken_or_foreign_artefact_is_refused_by_name(
    trained: tuple[Path, HostTrainer], base: Path, tmp_path: Path
) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(trained[0], broken, ignore=shutil.ignore_patterns("checkpoint-*", "tensorboard"))
    weights = load_file(broken / ADAPTER_WEIGHTS)
    lost = next(name for name in sorted(weights) if "lora_B" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, broken / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match=rf"missing 1 \({lost}\)"):
        read_adapter(load(base)[0], broken, str(base))
    with pytest.raises(UserError, match=r"an adapter, not a whole model: merge it first \(unimm merge"):
        load(trained[0])
    other, processor = load(base)
    other.model.language_model.norm.weight.data += 0.1
    with pytest.raises(UserError, match="was trained on .* is another model"):
        read_adapter(other, trained[0], "elsewhere")
    with pytest.raises(UserError, match="no adapter of a unified model"):
        adapters.about_base(base)
    assert main(["merge", str(broken), "--output", str(tmp_path / "whole")]) == 2
    assert not (tmp_path / "whole").exists()


def test_only_layers_of_the_language_model_can_be_adapted(base: Path) -> None:
    model = load(base)[0]
    with pytest.raises(UserError, match="'query', and the language model's linear layers are down_proj, gate_proj"):
        add_lora(model, LoraSettings(target_modules=["query"]), str(base))
    adapter = add_lora(model, LoraSettings(r=2, target_modules=["q_proj"], new_rows=False), str(base))
    assert {name.split(".")[-3] for name in adapter.state_dict() if "lora_A" in name} == {"q_proj"}
    assert not any("tokens" in name for name in adapter.state_dict())


def test_the_frozen_half_may_be_bfloat16(base: Path) -> None:
    model = load(base, dtype=torch.bfloat16)[0]
    add_lora(model, LoraSettings(r=2), str(base))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    batch = a_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


def test_qloras_settings_leave_the_tower_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    four, eight = quantization("nf4", torch.bfloat16), quantization("int8", torch.bfloat16)
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "nf4" and four.bnb_4bit_use_double_quant
    assert four.bnb_4bit_compute_dtype == torch.bfloat16 and eight.load_in_8bit
    for settings in (four, eight):
        assert settings.llm_int8_skip_modules == list(KEPT_WHOLE)
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nf4 needs the package bitsandbytes: install unimm\[train\]"):
        LoraSettings(quantize="nf4").loading()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_keeps_its_ids_and_learns(kind: Any, base: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    lora = LoraSettings(r=2, quantize=kind, dtype="float32")
    model = load(base, device="cpu", **lora.loading())[0]
    image = torch.randn(2, 3, 64, 64)
    plain = load(base)[0]
    assert torch.equal(model.get_image_tokens(image), plain.get_image_tokens(image))
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if name.endswith("q_proj")}
    assert {("Linear" if "vision_tower" in name else "quantized") for name in kinds} == {"Linear", "quantized"}
    assert all((kind == "Linear") == ("vision_tower" in name) for name, kind in kinds.items())
    adapter = add_lora(model, lora, str(base))
    assert adapter.fingerprint == adapters.base_fingerprint(plain)
    batch = a_batch(model)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
