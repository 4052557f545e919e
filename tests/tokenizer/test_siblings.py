"""The parts of VFMTok and IDEAL against naive loops, float64 brute force and closed forms; their sizes against the
papers'; and what they refuse."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.tokenizer.conftest import tiny
from unimm.errors import UserError
from unimm.tokenizer import IDEAL, TOKENIZERS, VFMTok, VFMTokConfig
from unimm.tokenizer.layers import DeformableAttention, cell_centers, resized_table
from unimm.tokenizer.pixel_heads import ConvHead
from unimm.tokenizer.quantizers import NormalizedVQ, code_entropy
from unimm.tokenizer.samplers import plain_norm
from unimm.training.tokenizer.codebook_maintenance import fit_codes, restart_codes

# ---- deformable attention ----


def bilinear(maps: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """maps [rows, columns, C] at (x, y) in cells from the first one's centre; zero outside."""
    rows, columns, width = maps.shape
    left, top, out = math.floor(x), math.floor(y), torch.zeros(width, dtype=maps.dtype)
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        if 0 <= row < rows and 0 <= column < columns:
            out += (1 - abs(x - column)) * (1 - abs(y - row)) * maps[row, column]
    return out


def naive(layer: DeformableAttention, queries, references, values, grids):
    batch, length, width = queries.shape
    heads, levels, points = layer.heads, layer.levels, layer.points
    offsets = layer.offsets(queries).view(batch, length, heads, levels, points, 2)
    weights = layer.weights(queries).view(batch, length, heads, levels * points).softmax(-1)
    projected = layer.value(values)
    out = torch.zeros_like(queries)
    for b in range(batch):
        for q in range(length):
            for h in range(heads):
                own, start = slice(h * width // heads, (h + 1) * width // heads), 0
                for level, (rows, columns) in enumerate(grids):
                    maps = projected[b, start : start + rows * columns, own].view(rows, columns, -1)
                    start += rows * columns
                    for p in range(points):
                        dx, dy = offsets[b, q, h, level, p].tolist()
                        x, y = references[q, 0] * columns + dx - 0.5, references[q, 1] * rows + dy - 0.5
                        out[b, q, own] += weights[b, q, h, level * points + p] * bilinear(maps, float(x), float(y))
    return layer.output(out)


@torch.no_grad()
def test_deformable_attention_is_the_naive_loop():
    layer, grids = DeformableAttention(8, heads=2, levels=2, points=3).double(), [(3, 5), (2, 2)]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    queries, values = torch.randn(2, 4, 8).double(), torch.randn(2, 19, 8).double()
    references = cell_centers((2, 2)).double()
    found = layer(queries, references, values, grids)
    torch.testing.assert_close(found, naive(layer, queries, references, values, grids), rtol=0, atol=1e-9)


def test_its_points_start_around_the_anchor_and_count_alike():
    layer = DeformableAttention(16, heads=8, levels=4, points=4)
    layer.start()
    offsets = layer.offsets.bias.view(8, 4, 4, 2)
    assert torch.allclose(offsets[0, 2], torch.tensor([[1.0, 0.0], [2, 0], [3, 0], [4, 0]]), atol=1e-6)
    assert torch.allclose(offsets[3, 0, 1], torch.tensor([-2.0, 2.0]), atol=1e-6)
    assert not layer.offsets.weight.any() and not layer.weights.weight.any() and not layer.weights.bias.any()


def test_cell_centers_are_in_raster_order():
    assert cell_centers((2, 4))[5].tolist() == [0.375, 0.75]


def cubic(distance: float) -> float:
    """The weight of a cell in bicubic interpolation (Keys, a = -0.75)."""
    t, a = abs(distance), -0.75
    return (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4)


@pytest.mark.parametrize("nudge", [0.0, 0.1])
def test_a_table_is_resized_bicubically_and_the_nudge_moves_the_samples(nudge):
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    table = (rows + 10 * columns).view(1, 36, 1)
    assert resized_table(table, (6, 6), (6, 6), nudge=nudge) is table
    place = 2.5 * 6 / (5 + nudge) - 0.5  # of the middle of the new table, in cells of the old one
    taps = range(math.floor(place) - 1, math.floor(place) + 3)
    expected = 11 * sum(cubic(place - cell) * cell for cell in taps)
    assert float(resized_table(table, (6, 6), (5, 5), nudge=nudge)[0, 12]) == pytest.approx(expected, abs=1e-4)


# ---- causality ----


@torch.no_grad()
def test_an_anchor_sees_itself_and_those_before_it():
    model = tiny("vfmtok")
    levels = [torch.randn(1, 16, 32) for _ in range(2)]
    before = model.sampler(*levels)
    model.sampler.anchors[:, 4] += torch.randn(32)
    changed = (model.sampler(*levels) - before).abs().amax(-1)[0]
    assert changed[:4].max() < 1e-6 and changed[4:].min() > 1e-5


@torch.no_grad()
def test_the_decoder_is_causal_over_codes_cls_masks_and_registers():
    decoder = tiny("vfmtok").decoder
    codes = torch.randn(1, 9, 48)

    def changed(tensor: torch.Tensor, row: int) -> torch.Tensor:
        """How far each of the 16 feature tokens moves when a row of `tensor` does."""
        before, kept = decoder.features(codes), tensor[:, row].clone()
        tensor[:, row] += torch.randn_like(kept)
        moved = (decoder.features(codes) - before).abs().amax(-1)[0]
        tensor[:, row] = kept
        return moved

    assert changed(codes, 8).min() > 1e-5  # the last code reaches every token
    assert changed(decoder.cls, 0).min() > 1e-5
    masks = changed(decoder.positions, 5)
    assert masks[:5].max() < 1e-6 and masks[5:].min() > 1e-5
    assert changed(decoder.registers, 0).max() == 0  # they come last: nothing sees them


@pytest.mark.parametrize("share", [True, False])
def test_mask_tokens_are_shared_or_one_each(share):
    decoder = tiny("vfmtok", share_mask_token=share).decoder
    codes = torch.randn(1, 9, 48)
    decoder(codes).sum().backward()
    moved = decoder.mask_tokens.grad.abs().amax((1, 2)) > 0
    assert moved.tolist() == ([True] if share else [True, False])


# ---- quantizer ----


def test_normalized_search_and_losses_are_brute_force():
    quantizer = NormalizedVQ(40, 6)
    quantizer.start()
    quantizer.codebook.data.mul_(torch.rand(40, 1) + 0.5)  # lengths must not matter
    latents = 5 * torch.randn(2, 30, 6)
    table = F.normalize(quantizer.codebook.detach().double(), dim=1)
    unit = F.normalize(latents.double(), dim=-1)
    ids = (unit @ table.t()).argmax(-1)
    output = quantizer(latents)
    assert torch.equal(output.ids, ids)
    torch.testing.assert_close(output.codes.double(), table[ids], rtol=0, atol=1e-6)
    expected = (unit - table[ids]).square().mean()
    for loss in (output.codebook_loss, output.commitment_loss):
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(quantizer.lookup(ids), quantizer(latents).codes)


def test_the_straight_through_gradient_is_that_of_the_unit_latents():
    quantizer, latents = NormalizedVQ(40, 6), torch.randn(1, 5, 6, requires_grad=True)
    weights = torch.randn(1, 5, 6)
    (quantizer(latents).codes * weights).sum().backward()
    again = latents.detach().clone().requires_grad_()
    (F.normalize(again, dim=-1) * weights).sum().backward()
    torch.testing.assert_close(latents.grad, again.grad)
    assert quantizer.codebook.grad is None


def test_codes_fitted_and_moved_have_length_one():
    quantizer, latents = NormalizedVQ(8, 6), 3 * torch.randn(60, 6)
    fit_codes(quantizer, latents)
    assert len(quantizer(latents[None]).ids.unique()) == 8
    restart_codes(quantizer, torch.tensor([2, 5]), latents)
    nearest = (quantizer.effective_codebook[[2, 5]] @ F.normalize(latents, dim=1).t()).amax(1)
    torch.testing.assert_close(nearest, torch.ones(2))
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(8))


def test_entropy_of_sure_and_unsure_latents():
    codes = torch.eye(4)
    assert float(code_entropy(codes, codes, 0.01)) == pytest.approx(-math.log(4), abs=1e-3)  # sure, and all in use
    assert float(code_entropy(codes[:1].repeat(5, 1), codes, 0.01)) == pytest.approx(0, abs=1e-3)  # sure of one
    middle = torch.full((3, 4), 0.5)
    assert float(code_entropy(middle, codes, 0.01)) == pytest.approx(0, abs=1e-3)  # ln 4 each, and ln 4 on average


def test_entropy_is_brute_force():
    latents, codes, temperature = torch.randn(7, 3), torch.randn(5, 3), 0.8
    rows = []
    for z in latents.double().tolist():
        scores = [math.exp(-sum((a - b) ** 2 for a, b in zip(z, q, strict=True)) / temperature) for q in codes.tolist()]
        rows.append([score / sum(scores) for score in scores])
    each = sum(-sum(p * math.log(p) for p in row) for row in rows) / len(rows)
    average = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    expected = each + sum(p * math.log(p + 1e-5) for p in average)
    assert float(code_entropy(latents, codes, temperature)) == pytest.approx(expected, rel=1e-5)


# ---- pixel head ----


@pytest.mark.parametrize(("multipliers", "side"), [((1, 2), 8), ((1, 1, 2), 16), ((2, 1, 1, 1), 32)])
def test_the_convolutional_head_doubles_the_sides_at_every_level_but_one(multipliers, side):
    head = ConvHead(24, 32, multipliers)
    assert head(torch.randn(2, 12, 24), (4, 3)).shape == (2, 3, side, side * 3 // 4)


def test_the_published_head_draws_336_pixels_from_21_tokens_a_side():
    with torch.device("meta"):
        head = ConvHead(512, 128, (1, 1, 2, 2, 4))
        assert head(torch.empty(1, 441, 512), (21, 21)).shape == (1, 3, 336, 336)


# ---- the whole ----


def test_grids_of_ids_patches_and_pixels():
    config = VFMTokConfig()
    assert (config.grid, config.patch_grid, config.pixel_grid) == ((16, 16), (24, 24), (21, 21))
    assert (config.num_image_tokens, config.num_patches, config.image_size, config.output_size) == (256, 576, 336, 336)


@torch.no_grad()
def test_levels_and_targets_are_the_bare_encoders(pixel_values):
    states = tiny("vqrae").encoder(pixel_values, output_hidden_states=True).hidden_states
    for model in (tiny("vfmtok"), tiny("ideal")):
        model.encoder.load_state_dict(tiny("vqrae").encoder.state_dict())
        deep = model.encoder.post_layernorm(states[2])
        output = model.reconstruct(pixel_values)
        assert torch.equal(output.targets["deep"], deep) and torch.equal(output.features, deep)
        assert output.predictions.keys() == output.targets.keys()
        assert output.predictions["deep"].shape == deep.shape == (3, 16, 32)
        assert torch.equal(model(pixel_values).last_hidden_state, deep)
    shallow = (states[1] - states[1].mean(-1, keepdim=True)) / states[1].std(-1, keepdim=True, correction=0)
    torch.testing.assert_close(output.targets["shallow"], shallow)


@torch.no_grad()
def test_ideal_paints_from_the_predicted_deep_features(pixel_values):
    model = tiny("ideal")
    before = model.reconstruct(pixel_values)
    model.decoder.shallow_head.weight.add_(1)
    assert torch.equal(model.reconstruct(pixel_values).pixels, before.pixels)
    model.decoder.deep_head.bias.add_(1)
    assert not torch.equal(model.reconstruct(pixel_values).pixels, before.pixels)


@torch.no_grad()
def test_ideal_reads_images_of_another_size():
    model, wide = tiny("ideal"), torch.randn(1, 3, 32, 48)
    output = model.reconstruct(wide)
    assert output.pixels.shape == wide.shape and output.ids.shape == (1, 24)
    assert torch.equal(model.decode(output.ids, grid=(4, 6)), output.pixels.clamp(0, 1))


def test_the_encoder_stays_in_evaluation(pixel_values):
    for kind in TOKENIZERS.keys() & {"vfmtok", "ideal"}:
        model = tiny(kind).train()
        assert not model.encoder.training and model.decoder.training and model.sampler.training


def test_the_fingerprint_knows_the_levels():
    assert len({tiny("vfmtok", levels=levels).fingerprint for levels in ([1], [2])}) == 2


def test_ideal_of_one_level_reads_and_predicts_that_level_alone():
    model = tiny("ideal", shallow_level=1, deep_level=1)
    states = model.hidden_states(torch.randn(2, 3, 32, 32))
    shallow, deep = model.sources(states)
    assert torch.equal(deep, states[1]) and torch.equal(shallow, plain_norm(states[1]))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tiny("ideal").parameters())


# ---- what is refused ----


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("vfmtok", {"levels": [6, 12, 18, 24]}, "24.* encoder with 2 layers.* in 1 to 2"),
        ("ideal", {"shallow_level": 8, "deep_level": 24}, "24.* encoder with 2 layers.* in 1 to 2"),
        ("ideal", {"shallow_level": 2, "deep_level": 1}, "must rise"),
        ("vfmtok", {"head_channels": 40}, "32 groups, and 40"),
        ("vfmtok", {"head_multipliers": [1] * 7}, "32 pixels does not fit .* of 64 pixels"),
        ("ideal", {"head_multipliers": [1, 1]}, "2 x 2 pixels a token and 8 x 8"),
        ("vfmtok", {"width": 30}, "width of 30 .* 4 heads"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(kind, fields, message):
    with pytest.raises(UserError, match=message):
        tiny(kind, **fields)


def test_images_that_do_not_fit_are_refused():
    vfmtok, ideal = tiny("vfmtok"), tiny("ideal")
    for verb in (vfmtok.encode, vfmtok.reconstruct):
        with pytest.raises(UserError, match="3 x 3 anchors .* 32 x 32 pixels, and these have 32 x 48"):
            verb(torch.randn(1, 3, 32, 48))
    with pytest.raises(UserError, match="3 x 3, and 1 x 9"):
        vfmtok.decode(torch.zeros(1, 9, dtype=torch.int64), grid=(1, 9))
    with pytest.raises(UserError, match="16 image tokens do not fill a grid of 3 x 3 = 9"):
        vfmtok.decode(torch.zeros(1, 16, dtype=torch.int64))
    for model in (vfmtok, ideal):
        with pytest.raises(UserError, match="32 x 44 pixels is no multiple of the patch size 8"):
            model(torch.randn(1, 3, 32, 44))


# ---- sizes: the reference's widths and depths, added up by hand ----


def linear(before: int, after: int, bias: bool = True) -> int:
    return before * after + bias * after


def conv(before: int, after: int, side: int = 3) -> int:
    return before * after * side**2 + after


def residual(before: int, after: int) -> int:
    shortcut = conv(before, after, 1) if before != after else 0
    return 2 * before + conv(before, after) + 2 * after + conv(after, after) + shortcut


def head(width: int) -> int:
    """128 channels times (1, 1, 2, 2, 4), two residual blocks a level, three between."""
    middle = 2 * residual(512, 512) + 2 * 512 + 4 * conv(512, 512, 1)
    sizes, before, levels = (512, 256, 256, 128, 128), 512, 0
    for number, after in enumerate(sizes):
        levels += conv(before, before) if number else 0
        levels += residual(before, after) + residual(after, after)
        before = after
    return conv(width, 512) + middle + levels + 2 * 128 + conv(128, 3)


def sizes(model: torch.nn.Module) -> dict[str, int]:
    names = ("sampler", "quantizer", "decoder", "pixel_head")
    return {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in names}


def test_vfmtok_has_the_size_that_its_paper_describes():
    with torch.device("meta"):
        model = VFMTok(VFMTokConfig())
    w, norm, attention = 512, 2 * 512, 4 * linear(512, 512)
    adapter = linear(1024, w, False) + linear(w, w, False) + 3 * norm
    reading = linear(w, 8 * 4 * 4 * 2) + linear(w, 8 * 4 * 4) + 2 * linear(w, w)
    layer = reading + attention + linear(w, 1024) + linear(1024, w) + 3 * norm
    block = attention + linear(w, 2 * 1368) + linear(1368, w) + 2 * norm
    tables = (256 + 1 + 577 + 1 + 4) * w  # codes, CLS, CLS + 24 x 24 positions, mask, registers
    assert sizes(model) == {
        "sampler": 4 * adapter + 2 * 256 * w + norm + 6 * layer + linear(w, 12),
        "quantizer": 16384 * 12,
        "decoder": linear(12, w) + tables + 2 * norm + 6 * block + linear(w, 1024),
        "pixel_head": head(w),
    }


def test_ideal_has_the_size_that_its_code_describes():
    with torch.device("meta"):
        model = IDEAL(IDEAL.config_class())
    w, norm, attention = 1024, 2 * 1024, 4 * linear(1024, 1024)
    mlp = linear(w, 2048) + linear(2048, w)
    assert sizes(model) == {
        "sampler": 3 * norm + attention + mlp + linear(w, 64),
        "quantizer": 16384 * 64,
        "decoder": linear(64, w) + (576 + 2 + 4) * w + norm + 6 * (attention + mlp + 2 * norm) + 2 * linear(w, w),
        "pixel_head": head(w),
    }
