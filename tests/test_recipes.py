"""The whole chain by its debug configurations: vision model, tokenizer stages, class-conditional drawing,
conversations, drawings, rewards, publishing."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import unimm
from unimm.config.loading import load_config
from unimm.errors import UserError
from unimm.tokenizer import TOKENIZERS, VQRAEConfig
from unimm.tokenizer.published import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]
CHAIN = ("vfm", "vfmtok", "ideal", "stage1", "stage2", "stage3", "encode", "c2i", "llamagen_l_256", "sft", "t2i")
CHAIN += ("t2i_ids", "grpo", "grpo_own_answers", "grpo_qwen3_0.6b")
STAGES = ("stage1", "stage2", "stage3", "vfmtok", "ideal")
RECIPES = {name: "tokenizer" if name in STAGES else name for name in (*CHAIN, "publish")}
RECIPES |= {"llava15_pretrain": "sft", "llava15_mix665k": "sft", "t2i_ids": "t2i"}
RECIPES |= {"llava15_mix665k_lora": "sft", "llava15_mix665k_qlora": "sft", "t2i_qwen3_0.6b": "t2i"}
RECIPES |= {"llamagen_l_256": "c2i", "grpo_own_answers": "grpo", "grpo_qwen3_0.6b": "grpo"}
RECIPES |= {"tokenizer": "tokenizer", "questions": "t2i", "positions": "t2i", "language": "t2i"}  # later legs
RECIPES |= {"copying": "t2i", "edits": "t2i", "more_edits": "t2i"}
RECIPES |= dict.fromkeys(("rewards", "rewards_edits", "rewards_again", "rewards_pairs"), "grpo")
RECIPES |= dict.fromkeys(("stage3_more", "stage3_conv", "stage3_groups"), "tokenizer")
RECIPES |= {"projector": "sft", "lora": "t2i"}  # SmolLM2
RECIPES |= {f"{data}vqrae{stage}": "tokenizer" for data in ("", "shapes_") for stage in ("", "_stage2")} | {
    "chat": "t2i"
}


def run(recipe: str, *arguments: str) -> int:
    argv, sys.argv = sys.argv, [f"{recipe}.py", *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
    finally:
        sys.argv = argv
    return int(ended.value.code or 0)


def trained_outlet(folder: str) -> torch.Tensor:
    """Return the last weights of a saved convolutional head, as a half-precision checkpoint keeps them."""
    return unimm.VQRAE.from_pretrained(folder).pixel_head.outlet.weight.half().float()


@pytest.mark.slow
def test_the_chain_in_small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in CHAIN:
        assert run(RECIPES[step], "--config", str(ROOT / "configs" / "debug" / f"{step}.yaml")) == 0
        result = "manifest.json" if step == "encode" else "model.safetensors"
        assert (tmp_path / "runs" / "debug" / step / result).is_file(), step
        assert (tmp_path / "runs" / "debug" / step / "run.json").is_file(), step
    model, processor = unimm.load("runs/debug/t2i")
    chat = unimm.ChatSession(model, processor)
    (image,) = chat.draw("a photo of a circle", seed=1)
    assert image.size == (64, 64)
    assert isinstance(chat.ask("What do you see?", images=[image]), str)
    published = [
        "model=runs/debug/t2i",
        "image_tokenizer=runs/debug/stage3",
        "output_dir=out",
        f"card={ROOT}/README.md",
    ]
    assert run("publish", "--config", str(ROOT / "configs/shapes/publish.yaml"), *published) == 0
    small, _ = unimm.load("out")
    polished = unimm.VQRAE.from_pretrained("runs/debug/stage3")
    weight = polished.pixel_head.projection.weight
    assert torch.equal(small.image_tokenizer.pixel_head.projection.weight, weight.half().float())
    conv = ["model.new_head={pixel_head: conv, head_multipliers: [1, 1, 1, 2, 2]}", "train.output_dir=runs/debug/conv"]
    assert run("tokenizer", "--config", str(ROOT / "configs/debug/stage3.yaml"), *conv) == 0
    published[1:3] = ["image_tokenizer=runs/debug/conv", "output_dir=out_conv"]
    assert run("publish", "--config", str(ROOT / "configs/shapes/publish.yaml"), *published) == 0
    crisp, _ = unimm.load("out_conv")
    assert crisp.config.vision_config.pixel_head == crisp.image_tokenizer.config.pixel_head == "conv"
    assert torch.equal(crisp.image_tokenizer.pixel_head.outlet.weight, trained_outlet("runs/debug/conv"))


CONFIGS = sorted(
    path for path in ROOT.glob("configs/**/*.yaml") if path.parent.name not in ("accelerate", "protocols", "findings")
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: "/".join(p.parts[-2:]))
def test_every_configuration_is_read_by_its_recipe(path):
    folders = {"compare/shapes": "tokenizer", "tokenizer": "tokenizer"}
    folders |= {"sft": "sft", "t2i": "t2i", "c2i": "c2i", "encode": "encode", "grpo": "grpo"}
    name = next((r for f, r in folders.items() if path.parent.as_posix().endswith(f"/{f}")), RECIPES.get(path.stem))
    classes = {
        "vfm": "VFMConfig",
        "tokenizer": "TokenizerRecipe",
        "encode": "EncodeRecipe",
        "c2i": "C2IRecipe",
        "sft": "SFTRecipe",
        "t2i": "T2IRecipe",
        "publish": "PublishRecipe",
        "grpo": "GRPORecipe",
    }
    recipe = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))
    load_config(recipe[classes[name]], path)


@pytest.mark.parametrize("name", ["vqrae_siglip2_256", "vqrae_siglip2_512", "vqrae_internvit_448"])
def test_the_papers_tokenizers_are_built_in_full_size(name):
    """VQRAE's table 7: tokens of an image, steps, rates and the step that the GAN starts at."""
    recipe = runpy.run_path(str(ROOT / "recipes" / "tokenizer.py"))["TokenizerRecipe"]
    first, second = (load_config(recipe, ROOT / f"configs/tokenizer/{name}_stage{n}.yaml") for n in (1, 2))
    published = PUBLISHED[first.model.encoder]
    with torch.device("meta"):
        tokenizer = unimm.VQRAE(unimm.VQRAEConfig(encoder_config=published.vision_config(), **first.model.config))
    internvit = "internvit" in name
    assert tokenizer.config.image_size == first.data.image_size == second.data.image_size
    assert tokenizer.config.num_image_tokens == (256 if name.endswith("256") else 1024)
    assert tokenizer.quantizer.codebook.shape == (16384, 1536)
    weights = sum(p.numel() for p in tokenizer.parameters()) / 1e6
    assert weights == pytest.approx(613 if internvit else 832, abs=2)
    assert (first.train.stage, first.train.steps) == (1, 45_000 if internvit else 100_000)
    assert (second.train.stage, second.train.steps) == (2, 60_000 if internvit else 70_000)
    assert first.loss.gan.start is None and second.loss.gan.start == (30_000 if internvit else 50_000)
    rates = ("learning_rate", "encoder_learning_rate", "end_learning_rate", "warmup_steps", "weight_decay")
    assert [getattr(first.train, rate) for rate in rates] == [4e-4, 1e-5, 1e-4, 2000, 1e-4]
    assert [getattr(second.train, rate) for rate in rates] == [1e-4, 1e-5, 1e-5, 2000, 1e-4]
    assert first.train.global_batch_size == second.train.global_batch_size == (768 if internvit else 1024)
    assert second.model.init_from == first.train.output_dir


@pytest.mark.parametrize(
    ("step", "override"),
    [
        ("stage1", "model.encoder"),
        ("stage2", "model.init_from"),
        ("c2i", "model.image_tokenizer"),
        ("encode", "model.image_tokenizer"),
        ("vfmtok", "model.encoder"),
        ("sft", "model.image_tokenizer"),
        ("t2i", "model.path"),
        ("grpo", "model.path"),
    ],
)
def test_a_missing_folder_is_one_sentence(step, override, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    absent = tmp_path / "absent"
    assert run(RECIPES[step], "--config", str(ROOT / f"configs/debug/{step}.yaml"), f"{override}={absent}") == 2
    assert str(absent) in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vfmtok_dinov2_336", (303.56, 20.38, 0.20, 19.91, 32.80)),
        ("ideal_siglip2_384", (303.69, 8.47, 1.05, 53.16, 35.16)),
    ],
)
def test_full_size_tokenizers_are_built_as_published(name, millions):
    """The parts' sizes in millions; tests/tokenizer/test_siblings.py adds them up from the published widths."""
    recipe = runpy.run_path(str(ROOT / "recipes" / "tokenizer.py"))
    model = load_config(recipe["TokenizerRecipe"], ROOT / f"configs/tokenizer/{name}.yaml").model
    published = PUBLISHED[model.encoder]
    vision = published.vision_config().to_dict() | {"image_size": model.image_size or published.image_size}
    with torch.device("meta"):
        tokenizer = TOKENIZERS[model.kind](TOKENIZERS[model.kind].config_class(encoder_config=vision, **model.config))
    parts = ("encoder", "sampler", "quantizer", "decoder", "pixel_head")
    found = [sum(p.numel() for p in tokenizer.get_submodule(part).parameters()) / 1e6 for part in parts]
    assert found == pytest.approx(millions, abs=0.006)
    assert tokenizer.config.image_size == int(name[-3:])


@pytest.mark.parametrize("world", ["shapes", "cifar10"])
@pytest.mark.parametrize("kind", ["vfmtok", "ideal"])
def test_small_tokenizers_fit_the_encoder_of_their_world(world, kind):
    recipes = [runpy.run_path(str(ROOT / "recipes" / name)) for name in ("vfm.py", "tokenizer.py")]
    vision = load_config(recipes[0]["VFMConfig"], ROOT / f"configs/{world}/vfm.yaml").model.vision
    recipe = load_config(recipes[1]["TokenizerRecipe"], ROOT / f"configs/{world}/{kind}.yaml")
    encoder = vision | {"model_type": "siglip_vision_model"}
    with torch.device("meta"):
        config = TOKENIZERS[recipe.model.kind].config_class(encoder_config=encoder, **recipe.model.config)
        tokenizer = TOKENIZERS[recipe.model.kind](config)
        pixels = tokenizer.draw(torch.empty(1, 64, config.codebook_dim), config.grid)[0]
    assert (recipe.model.kind, recipe.model.encoder) == (kind, f"runs/{world}/vfm")
    assert config.grid == (8, 8) and pixels.shape == (1, 3, recipe.data.image_size, recipe.data.image_size)


def test_a_wrong_kind_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stage2 = ("--config", str(ROOT / "configs/debug/stage2.yaml"))
    assert run("tokenizer", *stage2, "model.kind=vqgan") == 2
    assert "'vqgan'; model.kind is one of ideal, vfmtok, vqrae" in capsys.readouterr().err
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    VQRAEConfig(encoder_config={"model_type": "siglip_vision_model", **fields}).save_pretrained("other")
    assert run("tokenizer", *stage2, "model.kind=ideal", "model.init_from=other") == 2
    assert "other is a vqrae model and model.kind is 'ideal'" in capsys.readouterr().err


def test_a_misspelt_key_is_one_sentence(capsys):
    assert run("tokenizer", "--config", str(ROOT / "configs/shapes/stage1.yaml"), "train.stepz=3") == 2
    assert "stepz" in capsys.readouterr().err


@pytest.mark.parametrize("begin", ["default", "tokenizer", "unified"])
def test_a_tokenizer_run_begins_from_a_tokenizer_or_the_model_around_it(begin, tmp_path):
    recipe = runpy.run_path(str(ROOT / "recipes" / "tokenizer.py"))
    model, processor = unimm.load()
    if begin == "tokenizer":
        model.image_tokenizer.save_pretrained(tmp_path / begin)
    elif begin == "unified":
        model.save_pretrained(tmp_path / begin)
        processor.save_pretrained(tmp_path / begin)
    path = begin if begin == "default" else str(tmp_path / begin)
    begun = recipe["build"](recipe["TokenizerModelConfig"](init_from=path))
    assert all(map(torch.equal, begun.state_dict().values(), model.image_tokenizer.state_dict().values()))
    with pytest.raises(UserError, match=r"is a .*vqrae model and model.kind is 'ideal'"):
        recipe["build"](recipe["TokenizerModelConfig"](kind="ideal", init_from=path))


def test_the_class_conditional_settings_are_llamagens():
    recipe = runpy.run_path(str(ROOT / "recipes" / "c2i.py"))["C2IRecipe"]
    settings = load_config(recipe, ROOT / "configs/c2i/llamagen_l_256.yaml")
    train, data = settings.train, settings.data
    assert (settings.model.size, settings.model.num_classes) == ("L", 1000)
    assert (train.learning_rate, train.lr_scheduler_type, train.warmup_steps) == (1e-4, "constant", 0)
    assert (train.adam_beta1, train.adam_beta2, train.weight_decay, train.max_grad_norm) == (0.9, 0.95, 0.05, 1.0)
    assert (train.ema_decay, train.global_batch_size) == (0.9999, 256)
    assert train.max_steps == 300 * 1_281_167 // 256
    assert (data.crop_scales, data.flip) == ([1.1, 1.05], True)
