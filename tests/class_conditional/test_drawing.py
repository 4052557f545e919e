"""Model and tokenizer together: one folder, one fingerprint, the same images."""

import numpy as np
import pytest

from tests.class_conditional.tiny import tiny_drawer
from tests.tokenizer.conftest import tiny_vqrae
from unimm.class_conditional.drawing import ClassDrawer, SheetConfig, SheetSampling, draw_sheet, load_drawer
from unimm.errors import UserError


def test_a_saved_drawer_draws_the_same_images(tmp_path):
    drawer = tiny_drawer()
    drawer.save(tmp_path)
    images = [np.asarray(image) for image in drawer.draw([0, 4], seed=3)]
    again = [np.asarray(image) for image in load_drawer(tmp_path, "cpu").draw([0, 4], seed=3)]
    assert images[0].shape == (32, 32, 3)
    assert np.array_equal(images, again)


def test_another_tokenizer_is_refused(tmp_path):
    drawer, other = tiny_drawer(), tiny_vqrae(codebook_dim=32)
    with pytest.raises(UserError, match=f"{drawer.tokenizer.fingerprint[:12]}.*{other.fingerprint[:12]}"):
        ClassDrawer(drawer.model, other, drawer.image_processor)
    drawer.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="VQRAE, not a class-conditional"):
        load_drawer(tmp_path)
    with pytest.raises(UserError, match="there is no"):
        load_drawer(tmp_path / "absent")


def test_the_sheet_has_a_half_without_guidance_and_one_with_it():
    drawer = tiny_drawer()
    config = SheetConfig(num_classes=3, rows=2, sampling=SheetSampling(guidance_scale=4.0), seed=1)
    sheet = np.asarray(draw_sheet(drawer, config))
    assert sheet.shape == (2 * 2 * 32 + 2, 3 * 32, 3)
    first = np.asarray(drawer.draw([0, 1, 2, 0, 1, 2], seed=1)[4])
    assert np.array_equal(sheet[32:64, 32:64], first)
    assert (sheet[64:66] == 255).all()
    assert not np.array_equal(sheet[:64], sheet[66:])
    assert draw_sheet(drawer, SheetConfig(rows=1)).width == 5 * 32
