"""VQRAE against the bare Hugging Face encoder, brute force and the paper's gradient map."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipModel

from tests.tokenizer.conftest import tiny, tiny_vqrae
from unimm.errors import UserError
from unimm.tokenizer import VQRAE, VQRAEConfig
from unimm.tokenizer.quantizers import SimVQ
from unimm.tokenizer.search import nearest_codes
from unimm.tokenizer.vqrae import with_new_head
from unimm.training.tokenizer.codebook_maintenance import fit_codes, redundant_codes, restart_codes
from unimm.training.tokenizer.teacher import Teacher


def test_the_defaults_are_the_papers():
    config = VQRAEConfig()
    assert (config.codebook_size, config.codebook_dim, config.feature_layer) == (16384, 1536, -1)
    assert not (config.train_codebook or config.codebook_bias or config.pre_quant_norm or config.apply_post_norm)


def test_feature_layer_and_post_norm(pixel_values):
    with torch.no_grad():
        middle = tiny_vqrae(feature_layer=-2)
        assert torch.equal(
            middle.features(pixel_values), tiny_vqrae()(pixel_values, output_hidden_states=True).hidden_states[-2]
        )
        normed = tiny_vqrae(apply_post_norm=True)
        expected = normed.encoder.post_layernorm(tiny_vqrae().features(pixel_values))
        assert torch.equal(normed.features(pixel_values), expected)


def test_the_features_may_be_the_sum_of_the_last_layers(pixel_values):
    with torch.no_grad():
        states = tiny_vqrae()(pixel_values, output_hidden_states=True).hidden_states
        for layers in (1, 2, 3):
            summed = tiny_vqrae(feature_layers=layers)
            assert torch.allclose(summed.features(pixel_values), torch.stack(states[-layers:]).sum(0), atol=1e-5)
            assert torch.equal(Teacher(summed)(pixel_values), summed.features(pixel_values))
        normed = tiny_vqrae(feature_layers=2, apply_post_norm=True)
        expected = normed.encoder.post_layernorm(states[-1]) + states[-2]
        assert torch.allclose(normed.features(pixel_values), expected, atol=1e-5)
    assert len({tiny_vqrae(feature_layers=layers).fingerprint for layers in (1, 2, 3)}) == 3
    with pytest.raises(UserError, match="feature_layers is 3: up to layer 1 there are 2"):
        tiny_vqrae(feature_layer=1, feature_layers=3)
    for kind in ("vfmtok", "ideal"):
        with pytest.raises(UserError, match="feature_layers is 2, and this tokenizer reads single levels"):
            tiny(kind, feature_layers=2)


def test_output_patch_changes_the_size_only(pixel_values):
    plain, larger = tiny_vqrae(), tiny_vqrae(output_patch_size=12)
    for part in ("encoder", "sampler", "quantizer"):
        larger.get_submodule(part).load_state_dict(plain.get_submodule(part).state_dict())
    with torch.no_grad():
        assert larger.reconstruct(pixel_values).pixels.shape == (3, 3, 48, 48)
        assert torch.equal(larger.encode(pixel_values).ids, plain.encode(pixel_values).ids)


def test_a_new_head_changes_the_pixels_only(vqrae, pixel_values, tmp_path):
    with torch.no_grad():
        new = with_new_head(vqrae, pixel_head="conv").eval()
        assert new.config.pixel_head == "conv" and vqrae.config.pixel_head == "patch"
        before, after = vqrae.reconstruct(pixel_values), new.reconstruct(pixel_values)
        assert torch.equal(after.ids, before.ids) and torch.equal(after.features, before.features)
        assert new.fingerprint == vqrae.fingerprint and after.pixels.shape == before.pixels.shape
        assert torch.equal(new.decode(after.ids), after.pixels.clamp(0, 1))
        assert not torch.equal(after.pixels, before.pixels)
        new.save_pretrained(tmp_path)
        again = VQRAE.from_pretrained(tmp_path).eval()
        assert torch.equal(again.decode(after.ids), new.decode(after.ids))
    with pytest.raises(UserError, match="settings head_channels, head_groups, head_multipliers, pixel_head, not"):
        with_new_head(vqrae, codebook_size=3)
    with pytest.raises(UserError, match="draws 4 x 4 pixels a token and 8 x 8 are asked for"):
        with_new_head(vqrae, pixel_head="conv", head_multipliers=[1, 1, 2])
    with pytest.raises(UserError, match="come in 12 groups, and 32 is no multiple"):
        with_new_head(vqrae, pixel_head="conv", head_groups=12)


def test_the_groups_of_a_conv_head_are_those_of_all_its_norms(vqrae):
    new = with_new_head(vqrae, pixel_head="conv", head_groups=8)
    norms = [each for each in new.pixel_head.modules() if isinstance(each, nn.GroupNorm)]
    assert len(norms) > 8 and {each.num_groups for each in norms} == {8}


def test_a_pixel_of_a_conv_head_depends_on_the_patches_around_it(vqrae):
    """One linear layer paints each patch of the grid alone; a convolution reaches across the edge."""
    hidden = torch.randn(1, 16, vqrae.config.hidden_size)
    other = hidden.clone()
    other[:, 0] += 1
    conv = with_new_head(vqrae, pixel_head="conv")
    with torch.no_grad():
        for tokenizer, reaches in ((vqrae, False), (conv, True)):
            moved = (tokenizer.pixel_head(hidden, (4, 4)) - tokenizer.pixel_head(other, (4, 4))).abs().amax(1)[0] > 1e-6
            assert moved[:8, :8].any() and bool(moved[:8, 8:16].any()) == reaches


def test_images_of_another_size(vqrae):
    wide = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        output = vqrae.reconstruct(wide)
        assert output.pixels.shape == wide.shape
        assert torch.equal(vqrae.decode(output.ids, grid=(4, 6)), output.pixels.clamp(0, 1))
    with pytest.raises(UserError, match="32 x 44.*patch size 8"):
        vqrae(torch.randn(1, 3, 32, 44))
    with pytest.raises(UserError, match="24 image tokens do not fill a grid of 4 x 4 = 16"):
        vqrae.decode(output.ids)


def test_from_encoder_takes_the_vision_half(tmp_path, pixel_values):
    vision = tiny_vqrae().config.encoder_config.to_dict()
    text = {
        "vocab_size": 20,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    siglip = SiglipModel(SiglipConfig(vision_config=vision | {"vision_use_head": True}, text_config=text)).eval()
    siglip.save_pretrained(tmp_path)
    vqrae = VQRAE.from_encoder(tmp_path, codebook_size=32, codebook_dim=16).eval()
    with torch.no_grad():
        expected = siglip.vision_model(pixel_values, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(vqrae.features(pixel_values), expected)


def test_from_encoder_refuses_an_incomplete_checkpoint(tmp_path):
    encoder = tiny_vqrae().encoder
    state = {k: v for k, v in encoder.state_dict().items() if "layers.1.mlp" not in k}
    encoder.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"loaded \d+ of \d+ tensors"):
        VQRAE.from_encoder(tmp_path, codebook_size=32, codebook_dim=16)


def test_an_unsupported_encoder_names_the_supported_ones():
    with pytest.raises(UserError, match="clip_vision_model, dinov2, .*siglip_vision_model"):
        VQRAE(VQRAEConfig(encoder_config={"model_type": "vit", "image_size": 32, "patch_size": 8}))


def test_the_search_ignores_autocast():
    codebook = torch.randn(8, 16)
    codebook = torch.cat([codebook, codebook])
    with torch.autocast("cpu", torch.bfloat16):
        ids = nearest_codes(codebook + 1e-3, codebook)
    assert torch.equal(ids, torch.arange(8).repeat(2))


def test_simvq_terms_by_hand(vqrae, pixel_values):
    """Equation by equation: Q = C W, the nearest row, MSE(Q_i, sg z) and MSE(sg Q_i, z)."""
    output = vqrae.encode(pixel_values)
    table = vqrae.quantizer.codebook.double() @ vqrae.quantizer.projection.weight.double().t()
    ids = torch.cdist(output.latents.double().flatten(0, 1), table).argmin(1).view(3, 16)
    expected = F.mse_loss(table[ids], output.latents.double())
    assert torch.equal(output.ids, ids)
    torch.testing.assert_close(output.codebook_loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.commitment_loss.double(), expected, rtol=1e-5, atol=0)


def test_codebook_fit_puts_every_code_to_use():
    vqrae = tiny_vqrae(codebook_size=16)
    latents = torch.randn(400, 48)
    fit_codes(vqrae.quantizer, latents)
    assert len(nearest_codes(latents, vqrae.quantizer.effective_codebook).unique()) == 16
    with pytest.raises(UserError, match="8 latents.*16 codes"):
        fit_codes(vqrae.quantizer, latents[:8])


def test_revived_codes_are_latents_that_were_served_badly():
    quantizer = tiny_vqrae(codebook_size=16).quantizer
    before, latents = quantizer.effective_codebook.detach().clone(), 3 + torch.randn(40, 48)
    restart_codes(quantizer, torch.tensor([3, 7]), latents)
    after = quantizer.effective_codebook.detach()
    moved = torch.cdist(after[[3, 7]].double(), latents.double()).min(dim=1).values
    assert moved.max() < 1e-3
    others = [i for i in range(16) if i not in (3, 7)]
    assert torch.equal(after[others], before[others])


def test_redundant_codes_are_those_that_a_frequent_neighbour_serves():
    quantizer = SimVQ(4, 2)
    quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [0.01, 0.0], [5.0, 0.0], [9.0, 0.0]]))
    quantizer.projection.weight.data.copy_(torch.eye(2))
    latents = torch.tensor([[0.0, 1.0], [5.0, 1.0], [9.0, 1.0], [0.01, 0.0]])  # the worse half: an error of 1
    counts = torch.tensor([3, 7, 2, 0])
    assert redundant_codes(quantizer, latents, counts).tolist() == [0]
    far = torch.tensor([[0.0, 4.5], [5.0, 4.5]])  # an error of 20: what is 16 apart is one thing as well
    assert redundant_codes(quantizer, far, counts).tolist() == [0, 3]
