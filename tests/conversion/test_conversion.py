"""Published checkpoints: each layout's random checkpoint computes here what the published module computes, the real
sizes fit by name, shape and number of weights, and what does not fit is refused with counts."""

import argparse
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from tests.conversion import forwards, published
from tests.conversion.published import Plain, Shapes, State, random_state
from unimm.class_conditional import SIZES, ClassConditionalConfig, ClassConditionalGPT
from unimm.class_conditional.drawing import load_drawer
from unimm.cli import main
from unimm.conversion.building import build_ideal, build_vq, vfmtok_fields
from unimm.conversion.convert import convert
from unimm.conversion.layouts import GPT, IDEAL, VFMTOK, VQ
from unimm.conversion.rules import Shapes as ShapesOf
from unimm.conversion.rules import renamed
from unimm.errors import UserError
from unimm.tokenizer import VFMTok, VFMTokConfig
from unimm.tokenizer.loading import load_image_tokenizer
from unimm.tokenizer.published import PUBLISHED

CLOSE = {"rtol": 0, "atol": 1e-5}


def saved(state: State, path: Path, key: str = "model", **more: object) -> Path:
    torch.save({key: state, "args": argparse.Namespace(lr=1e-4), "steps": 3, **more}, path)
    return path


def pixels(side: int) -> torch.Tensor:
    """Two images in [-1, 1]: noise, and a dark ramp."""
    noise = torch.rand(3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.stack([noise, torch.linspace(-1, 0, side).expand(3, side, side)])


# ---- the same outputs ----

TINY_VQ = {"channels": 32, "multiples": (1, 2, 2), "z": 16, "codes": 50, "dim": 4}


@pytest.fixture(scope="module")
def vq_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vq")
    file = saved(random_state(published.llamagen_vq(**TINY_VQ)), folder / "vq.pt")
    assert main(["convert", "llamagen-vq", str(file), "--output", str(folder / "out"), "--image-size", "16"]) == 0
    return folder / "out"


def test_llamagen_vq(vq_folder):
    plain, model, images = (
        Plain(random_state(published.llamagen_vq(**TINY_VQ))),
        load_image_tokenizer(vq_folder),
        pixels(16),
    )
    ids, codes = forwards.llamagen_vq_encode(plain, images.double(), 3)
    with torch.no_grad():
        output = model.reconstruct(images)
    assert torch.equal(output.ids, ids) and not torch.equal(ids[0], ids[1])
    expected = forwards.llamagen_vq_decode(plain, codes, 4, 3)
    torch.testing.assert_close(2 * output.pixels.double() - 1, expected, **CLOSE)
    assert type(AutoModel.from_pretrained(vq_folder)) is type(model) and model.config.grid == (4, 4)
    wide = torch.randn(1, 3, 8, 16)  # no size is fixed
    assert model.decode(model.encode(wide).ids, (2, 4)).shape == (1, 3, 8, 16)


TINY_VFMTOK = {
    "hidden": 32,
    "width": 64,
    "anchors": 9,
    "patches": 36,
    "depth": 2,
    "inner": 48,
    "swiglu": 48,
    "codes": 50,
}
TINY_VFMTOK |= {"dim": 4, "channels": 32, "multiples": (1, 1, 2, 2)}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 24}
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**fields, patch_size=4, initializer_range=0.2))
    model.save_pretrained(tmp_path_factory.mktemp("dinov2"))
    return Path(model.config._name_or_path or tmp_path_factory.getbasetemp() / "dinov20")


def test_vfmtok(dinov2, tmp_path):
    state = random_state(published.vfmtok(**TINY_VFMTOK))
    convert(
        "vfmtok",
        saved(state, tmp_path / "x.pt", "ema", model={"wrong": torch.ones(1)}),
        tmp_path / "out",
        encoder=str(dinov2),
    )
    model, plain, images = load_image_tokenizer(tmp_path / "out"), Plain(state), pixels(24)
    bare = Dinov2WithRegistersModel.from_pretrained(dinov2).eval().double()
    with torch.no_grad():
        states = bare(images.double(), output_hidden_states=True).hidden_states
        levels = [states[k][:, 5:] for k in (2, 4, 6)] + [bare.layernorm(states[8])[:, 5:]]
        output = model.reconstruct(images)
    ids, codes = forwards.vfmtok_encode(plain, levels, 3, 2)
    assert torch.equal(output.ids, ids) and not torch.equal(ids[0], ids[1])
    drawn, features = forwards.vfmtok_decode(plain, codes, 3, 2, 4)
    torch.testing.assert_close(2 * output.pixels.double() - 1, drawn, **CLOSE)
    torch.testing.assert_close(output.predictions["deep"].double(), features, **CLOSE)


TINY_IDEAL = {"width": 128, "patch": 4, "patches": 16, "depth": 3, "mlp": 96, "layers": 2, "inner": 80, "codes": 50}
TINY_IDEAL |= {"dim": 6, "channels": 32, "multiples": (1, 1, 2)}


def test_ideal(tmp_path):
    state = random_state(published.ideal(**TINY_IDEAL))
    file = saved({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "x.pt", "ema")
    convert("ideal", file, tmp_path / "out")
    plain = Plain({name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")})
    model, images = load_image_tokenizer(tmp_path / "out"), pixels(16)
    shallow, deep = forwards.timm_levels(plain, images.double(), 3, 2, 1)
    with torch.no_grad():
        output = model.reconstruct(images)  # mean and std 0.5: pixel_values are the images in [-1, 1]
    ids, codes = forwards.ideal_encode(plain, shallow, deep)
    assert torch.equal(output.ids, ids) and not torch.equal(ids[0], ids[1])
    drawn, *features = forwards.ideal_decode(plain, codes, 2, 3)
    torch.testing.assert_close(2 * output.pixels.double() - 1, drawn, **CLOSE)
    for name, expected in zip(("deep", "shallow"), features, strict=True):
        torch.testing.assert_close(output.predictions[name].double(), expected, **CLOSE)
    assert model.config.image_mean == [0.5] * 3 and model.config.shallow_level == 1


@pytest.mark.parametrize("layout", ["llamagen-gpt", "vfmtok-gpt", "ideal-gpt"])
def test_gpt(layout, vq_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", (2, 2, 32))
    state, other = (random_state(published.gpt(32, 2, 64, 50, 7), seed) for seed in (0, 1))
    kept = {"model": state, "ema": other} if layout == "llamagen-gpt" else {"model": other, "ema": state}
    torch.save(kept | {"args": argparse.Namespace()}, tmp_path / "gpt.pt")
    convert(layout, tmp_path / "gpt.pt", tmp_path / "out", tokenizer=str(vq_folder))
    drawer = load_drawer(tmp_path / "out", "cpu")
    labels, ids = torch.tensor([0, 7]), torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = drawer.model(labels, ids).logits
    expected = forwards.gpt_logits(Plain(state), labels, ids, 2, 2, 4)
    torch.testing.assert_close(logits.double(), expected, **CLOSE)
    assert drawer.draw([3], seed=1)[0].size == (16, 16)


def test_safetensors_are_read_too(vq_folder, tmp_path):
    save_file(random_state(published.llamagen_vq(**TINY_VQ)), tmp_path / "vq.safetensors")
    convert("llamagen-vq", tmp_path / "vq.safetensors", tmp_path / "out", image_size=16)
    assert load_image_tokenizer(tmp_path / "out").fingerprint == load_image_tokenizer(vq_folder).fingerprint


# ---- the published sizes ----


def weights(shapes: Shapes, *left_out: str) -> int:
    return sum(
        torch.Size(shape).numel() for name, shape in shapes.items() if not re.search("|".join(left_out) or "$^", name)
    )


def on_meta(shapes: Shapes) -> State:
    """Tensors without storage, except those whose values are looked at."""
    made = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return made | {n: torch.full(s, float(n.endswith("weight"))) for n, s in shapes.items() if "spatial_norm" in n}


def shapes_of(state: State) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("size", "millions"), [("B", 111), ("L", 343), ("XL", 775), ("XXL", 1400), ("2B", 2188), ("3B", 3100)]
)
def test_the_published_gpts(size, millions):
    """Weights in LlamaGen's and VFMTok's tables, rounded there to two or three digits; the 2.0B of VFMTok's 2B is not
    what its 48 layers of width 1920 hold."""
    config = ClassConditionalConfig.of_size(size)
    shapes = published.gpt(config.hidden_size, config.num_hidden_layers, config.intermediate_size)
    assert weights(shapes) / 1e6 == pytest.approx(millions, rel=0.035 if millions > 1000 else 0.005)
    with torch.device("meta"):
        ours = shapes_of(ClassConditionalGPT(config).state_dict())
    del ours["rotation.table"]  # computed
    assert shapes_of(renamed(on_meta(shapes), GPT, "x")) == ours


def test_the_published_vq_16():
    """72 million weights in LlamaGen's table of tokenizers."""
    shapes = published.llamagen_vq()
    assert weights(shapes, "codebook_used") / 1e6 == pytest.approx(72, abs=0.5)
    with torch.device("meta"):
        model = build_vq(ShapesOf(on_meta(shapes), "x"), 256)
    assert shapes_of(renamed(on_meta(shapes), VQ, "x")) == shapes_of(model.state_dict())
    assert (model.config.grid, model.config.patch_size, model.config.output_size) == ((16, 16), 16, 256)


def test_the_published_vfmtok():
    shapes = published.vfmtok()
    fields = vfmtok_fields(ShapesOf(on_meta(shapes), "x"), 24)
    config = VFMTokConfig(share_mask_token=False)  # the published settings are the defaults
    assert {name: getattr(config, name) for name in fields} == fields | {
        name: tuple(fields[name]) for name in ("levels", "head_multipliers")
    }
    with torch.device("meta"):
        ours = shapes_of(VFMTok(config).state_dict())
    theirs = shapes_of(renamed(on_meta(shapes), VFMTOK, "x"))
    assert theirs == {name: shape for name, shape in ours.items() if not name.startswith("encoder.")}


def test_the_published_ideal():
    state = {n.removeprefix("model."): t for n, t in on_meta(published.ideal()).items() if n.startswith("model.")}
    with torch.device("meta"):
        model = build_ideal(ShapesOf(state, "x"))
    assert shapes_of(renamed(state, IDEAL, "x")) == shapes_of(model.state_dict())
    known = PUBLISHED["siglip2-large-p16-384"].vision_config()
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    ):
        assert getattr(model.config.vision, name) == getattr(known, name)
    assert (model.config.shallow_level, model.config.deep_level, model.config.grid) == (8, 24, (24, 24))


# ---- refusals ----


def refused(layout: str, state: State, tmp_path: Path, message: str, **options: object) -> None:
    with pytest.raises(UserError, match=message):
        convert(layout, saved(state, tmp_path / "x.pt"), tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_missing_unexpected_and_misshapen_weights_are_counted(tmp_path):
    whole = random_state(published.llamagen_vq(**TINY_VQ))
    total = len(whole) - 1  # without the statistics of training
    fewer = {name: tensor for name, tensor in whole.items() if "mid.1" not in name}
    refused(
        "llamagen-vq", fewer, tmp_path, rf"loaded {total - 20} of {total} weights; missing 20 \(encoder\.middle\.1\."
    )
    more = whole | {"discriminator.a": torch.ones(1), "discriminator.b": torch.ones(1)}
    refused("llamagen-vq", more, tmp_path, r"2 unexpected tensors of \d+ \(discriminator\.a, discriminator\.b\)")
    wrong = whole | {"decoder.norm_out.bias": torch.ones(7)}
    refused("llamagen-vq", wrong, tmp_path, r"misshapen 1 \(pixel_head\.norm\.bias is \(7,\) instead of \(32,\)")
    refused("llamagen-vq", {"a": torch.ones(1)}, tmp_path, "unexpected tensors of 1")
    refused("ideal", random_state(published.llamagen_vq(**TINY_VQ)), tmp_path, "another layout")
    half = random_state(published.vfmtok(**TINY_VFMTOK))
    del half["decode_transformer.mask_embedding"]
    assert "decoder.mask_tokens" not in renamed(half, VFMTOK, "x")


def test_what_is_left_out_must_be_superfluous(tmp_path):
    state = random_state(published.ideal(**TINY_IDEAL))
    name = "model.encode_transformer.backbone.spatial_norm.weight"
    refused("ideal", state | {name: state[name] * 2}, tmp_path, "spatial_norm.weight is expected to be 1 everywhere")
    refused(
        "ideal", state | {"decoder.conv_in.bias": torch.ones(64)}, tmp_path, "differs from model.decoder.conv_in.bias"
    )


def test_files_that_are_not_read(tmp_path, vq_folder):
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(UserError, match="text.pt cannot be read"):
        convert("llamagen-vq", tmp_path / "text.pt", tmp_path / "out")
    torch.save({"model": {}}, tmp_path / "empty.pt")
    with pytest.raises(UserError, match="holds no tensors by name, neither at the top nor under model"):
        convert("llamagen-vq", tmp_path / "empty.pt", tmp_path / "out")
    torch.save({"model": {"a": torch.ones(1)}, "more": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(UserError, match=r"code\.pt cannot be read .*[Ww]eights.only"):
        convert("llamagen-vq", tmp_path / "code.pt", tmp_path / "out")
    gpt = saved(random_state(published.gpt(32, 2, 64, 50, 7)), tmp_path / "gpt.pt")
    with pytest.raises(UserError, match=r"has 2 layers of width 32; the published sizes are 12 x 768 \(B\)"):
        convert("llamagen-gpt", gpt, tmp_path / "out", tokenizer=str(vq_folder))
    gpt = saved(random_state(published.gpt(32, 2, 64, 60, 7)), tmp_path / "gpt.pt")
    with pytest.raises(UserError, match="draws 60 ids, and the image tokenizer has 50"):
        convert("llamagen-gpt", gpt, tmp_path / "out", tokenizer=str(vq_folder))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llamagen-gpt"], "llamagen-gpt needs its image tokenizer"),
        (["ideal", "--encoder", "x"], "ideal takes no --encoder"),
        (["vfmtok", "--image-size", "256"], "vfmtok takes no --image-size"),
        (["llamagen", "--output", "x"], "invalid choice"),
    ],
)
def test_options_are_checked_before_anything_is_read(arguments, message, tmp_path, capsys):
    (tmp_path / "x.pt").touch()
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
    assert main(["convert", arguments[0], str(tmp_path / "x.pt"), *arguments[1:], *output]) == 2
    assert message in capsys.readouterr().err
