"""What the discriminator is shown: each change in closed form, differentiable, and nothing where it is off."""

import torch

from unimm.training.tokenizer.augment import augment, change_colors, cut_out, translate


def test_middling_amounts_change_no_color_and_others_do_what_they_say():
    pixels = torch.rand(2, 3, 4, 5)
    half = torch.full((2, 3), 0.5)
    torch.testing.assert_close(change_colors(pixels, half), pixels)
    brighter = change_colors(pixels, torch.tensor([[1.0, 0.5, 0.5]] * 2))
    torch.testing.assert_close(brighter, pixels + 0.25)
    grey = change_colors(pixels, torch.tensor([[0.5, 0.0, 0.5]] * 2))
    torch.testing.assert_close(grey, pixels.mean(1, keepdim=True).expand_as(pixels))
    stark = change_colors(pixels, torch.tensor([[0.5, 0.5, 1.0], [0.5, 0.5, 0.5]]))
    torch.testing.assert_close(stark[0] - pixels[0].mean(), 1.5 * (pixels[0] - pixels[0].mean()))
    torch.testing.assert_close(stark[1], pixels[1])


def test_translation_moves_whole_pixels_and_brings_in_grey():
    pixels = torch.rand(2, 3, 16, 8)
    moved = translate(pixels, torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    assert torch.equal(moved[0, :, 2:], pixels[0, :, :-2]) and (moved[0, :, :2] == 0.5).all()
    assert torch.equal(moved[1, :, :, :-1], pixels[1, :, :, 1:]) and (moved[1, :, :, -1] == 0.5).all()


def test_a_field_is_cut_out_around_its_place():
    pixels = torch.rand(2, 3, 10, 20)
    cut = cut_out(pixels, torch.tensor([[0.5, 0.5], [0.0, 1.0]]), 0.4)
    expected = pixels.clone()
    expected[0, :, 3:7, 6:14] = 0.5
    expected[1, :, :2, 16:] = 0.5
    assert torch.equal(cut, expected)


def test_views_are_differentiable_seeded_and_off_by_default():
    pixels = torch.rand(3, 3, 16, 16, requires_grad=True)
    state = torch.get_rng_state()
    assert augment(pixels, probability=0.0, cutout=0.2) is pixels and torch.equal(torch.get_rng_state(), state)
    views = []
    for _ in range(2):
        torch.manual_seed(4)
        views.append(augment(pixels, probability=1.0, cutout=0.5))
    assert torch.equal(*views) and not torch.equal(views[0], pixels)
    views[0].sum().backward()
    assert pixels.grad.any()
    seen = [augment(pixels.detach(), probability=0.5, cutout=0.2) for _ in range(40)]
    assert 1 <= sum(torch.equal(view, pixels) for view in seen) <= 15  # one in eight
