"""The panel of `recipes/t2i.py` is drawn by the `generate` that users call, guidance included."""

import io
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import unimm
from tests.conftest import ROOT
from tests.training.language_model.tiny_host import tiny_host
from unimm.training.loop.arguments import PanelConfig, PanelSampling


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_panel_shows_what_a_user_would_get(guidance_scale: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, processor = tiny_host()
    panel_of = runpy.run_path(str(ROOT / "recipes" / "t2i.py"))["panel_of"]
    panel = PanelConfig(["a photo of a circle"], PanelSampling(guidance_scale=guidance_scale, temperature=0.7), seed=4)
    with SummaryWriter(str(tmp_path)) as writer:
        panel_of(model.eval(), processor, panel)(writer, 7)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Images("drawings")
    drawn = Image.open(io.BytesIO(event.encoded_image_string))
    how = {"guidance_scale": guidance_scale, "temperature": 0.7, "seed": 4}
    (expected,) = unimm.ChatSession(model, processor).draw(panel.prompts[0], **how)
    assert event.step == 7 and np.array_equal(np.asarray(drawn), np.asarray(expected))
    others = {"guidance_scale": 100.0, "temperature": 0.7, "seed": 4}
    (other,) = unimm.ChatSession(model, processor).draw(panel.prompts[0], **others)
    assert not np.array_equal(np.asarray(drawn), np.asarray(other))
