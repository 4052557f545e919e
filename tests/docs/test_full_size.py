"""docs/full_size.md: its figures add up, its settings exist, its commands fit together and its LoRA run trains."""

import re
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import ROOT
from tests.docs.pages import code_blocks, read_page, recipe_class, run_recipe, shell_commands
from unimm.cli import build_parser, main
from unimm.config.loading import load_config
from unimm.tokenizer import VQRAE, VQRAEConfig
from unimm.tokenizer.published import PUBLISHED
from unimm.training.loop.checkpoint import bytes_of, model_bytes, optimizer_bytes

PAGE = "full_size.md"


def test_the_memory_table_adds_up() -> None:
    rows = re.findall(r"\| (\d+) \| (\d+) \| (\d+) \|$", read_page(PAGE), flags=re.MULTILINE)
    assert len(rows) == 5
    for bytes_a_weight, gpus, gigabytes in rows:
        assert int(bytes_a_weight) * 7 / int(gpus) == int(gigabytes)


def test_sixteen_bytes_a_weight() -> None:
    model = nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    (state,) = optimizer.state.values()
    kept = bytes_of(value for name, value in state.items() if name != "step")
    total = model_bytes(model) + bytes_of(p.grad for p in model.parameters()) + kept  # type: ignore[misc]
    assert total == 16 * model.weight.numel() and kept == optimizer_bytes(optimizer)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_zero3"])
def test_flags_of_several_machines_override_the_file(strategy: str) -> None:
    (line,) = (words for words in shell_commands(PAGE) if "--num_machines" in words and words[0] == "accelerate")
    words = [word.replace("fsdp2", strategy) for word in line[2:]]
    words[words.index("--config_file") + 1] = str(ROOT / words[words.index("--config_file") + 1])
    words[words.index("--machine_rank") + 1] = "1"
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    found = (arguments.num_machines, arguments.machine_rank, arguments.num_processes, arguments.main_process_ip)
    assert found == (2, 1, 16, "HOST")


@pytest.mark.parametrize(("recipe", "trackers"), [("tokenizer", ["tensorboard", "wandb"]), ("t2i", ["wandb"])])
def test_trackers_are_settings(recipe: str, trackers: list[str]) -> None:
    setting = f"train.report_to=[{','.join(trackers)}]"
    assert f"`{setting}`" in read_page(PAGE)
    path = ROOT / "configs" / "debug" / ("stage1.yaml" if recipe == "tokenizer" else f"{recipe}.yaml")
    assert load_config(recipe_class(recipe), path, [setting]).train.report_to == trackers


CHAIN = {
    "tokenizer": "tokenizer/vqrae_internvit_448_stage2.yaml",
    "encode": "encode/vqrae_internvit_448.yaml",
    "t2i": "t2i/qwen3_0.6b.yaml",
}


def test_the_full_size_chain_fits_together() -> None:
    read = {name: load_config(recipe_class(name), ROOT / "configs" / path) for name, path in CHAIN.items()}
    attach = next(words for words in shell_commands(PAGE) if words[:2] == ["unimm", "attach"])
    options = build_parser().parse_args(attach[1:])
    assert read["encode"].model.image_tokenizer == options.image_tokenizer == read["tokenizer"].train.output_dir
    assert read["t2i"].model.path == options.output
    assert read["t2i"].data.flows["drawing"].source == read["encode"].output_dir


def test_the_memory_of_a_tokenizer() -> None:
    """so400m at 256 pixels with EMA: 20 bytes for a weight that learns, 4 for one that is frozen."""
    (stage1, stage2) = re.findall(r"EMA included\): (\d+) GB in stage 1, (\d+) GB in stage 2", read_page(PAGE))[0]
    with torch.device("meta"):
        vision = PUBLISHED["siglip2-so400m-p16-256"].vision_config()
        tokenizer = VQRAE(VQRAEConfig(encoder_config=vision))
    encoder = sum(p.numel() for p in tokenizer.encoder.parameters())
    learning = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad) - encoder
    frozen = sum(p.numel() for p in tokenizer.parameters()) - encoder - learning
    assert 20 * learning + 4 * (frozen + encoder) == pytest.approx(int(stage1) * 1e9, abs=0.8e9)
    assert 20 * (learning + encoder) + 4 * (frozen + encoder) == pytest.approx(int(stage2) * 1e9, abs=0.8e9)


def test_the_weights_of_lora() -> None:
    (millions, gigabytes) = re.findall(r"is (\d+) M weights, ([\d.]+) GB", read_page(PAGE))[0]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # the 7 B
    layers = [layer for layer in model.model.layers.modules() if isinstance(layer, nn.Linear)]
    adapters = sum(128 * (layer.in_features + layer.out_features) for layer in layers)
    assert round(adapters / 1e6) == int(millions)
    assert round(16 * adapters / 1e9, 1) == float(gigabytes)


@pytest.mark.slow
def test_the_lora_run_trains_at_a_tiny_size(workplace: Path) -> None:
    (block,) = code_blocks(PAGE, "yaml")
    Path("lora.yaml").write_text(block, encoding="utf-8")
    options = ["model.encoder=encoder", "model.config={codebook_size: 32, codebook_dim: 16}", "data.image_size=32"]
    options += [
        "train.steps=1",
        "train.warmup_steps=0",
        "train.batch_size=4",
        "train.num_workers=0",
        "train.codebook_init_images=16",
    ]
    tokenizer = ["--config", "my/stage1.yaml", *options, "train.mixed_precision=no"]
    assert run_recipe(ROOT / "recipes" / "tokenizer.py", tokenizer) == 0
    assert main(["attach", "host", "--image-tokenizer", "my/stage1", "--output", "attached"]) == 0
    tiny = ["model.path=attached", "data.image_size=32", "data.num_eval_samples=4", "train.output_dir=out"]
    tiny += ["data.flows.drawing.source=my/images", "data.flows.talk.source=my/talk.jsonl"]
    tiny += ["data.flows.talk.image_folder=my/images", "lora.dtype=float32", "train.bf16=false", "train.max_steps=3"]
    tiny += ["train.new_rows_warmup_steps=1", "train.per_device_train_batch_size=4"]
    assert run_recipe(ROOT / "recipes" / "t2i.py", ["--config", "lora.yaml", *tiny]) == 0
    assert Path("out/adapter_model.safetensors").is_file()
    assert main(["merge", "out", "--output", "merged"]) == 0
