"""`--dry-run` of the recipes: it counts what is there, shows what is learned, and leaves no checkpoint."""

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from tests.test_recipes import ROOT, run
from tests.tokenizer.conftest import tiny_vqrae
from tests.training.language_model.test_trainer import BOTH, TALK, build
from tests.training.language_model.tiny_host import save_tiny_host
from unimm.data.text.collators import IGNORED
from unimm.mllm import load
from unimm.training import dry_run
from unimm.training.dry_run import Measured, counting_activations, say_groups
from unimm.training.language_model.label_mask import in_terminal, pieces, rows_of, write_page
from unimm.training.language_model.trainer import HostTrainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def weights_in(said: str) -> list[int]:
    """Of the parameter groups, in the order in which they are said."""
    return [round(float(number) * 1e6) for number in re.findall(r"tensors, ([\d.]+) M weights", said)]


def test_the_host_recipe_says_what_it_would_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_host(tmp_path / "host")
    config = ROOT / "configs" / "debug" / "t2i.yaml"
    output = tmp_path / "run"
    assert run("t2i", "--config", str(config), f"model.path={folder}", f"train.output_dir={output}", "--dry-run") == 0
    said = capsys.readouterr().out
    model, _ = load(folder)
    learned = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.image_tokenizer.parameters())
    assert sum(weights_in(said)) == pytest.approx(learned, abs=2000)  # said to a thousand weights a group
    assert "Muon  lr 0.0015  weight decay 0.01" in said and "model.multi_modal_projector" in said
    assert re.search(r"frozen .*model\.vision_tower", said)
    assert re.search(r"time    [\d.e-]+ s a step, 4 steps", said) and re.search(
        r"activations of a micro-batch 0\.", said
    )
    assert "\x1b[30;42m‹16 image tokens›\x1b[0m" in said
    assert [path.name for path in output.iterdir()] == ["dry_run.html"]


@pytest.mark.slow
def test_a_dry_run_takes_seconds_whatever_the_step_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step of 4 micro-batches of 64, compiled: two samples to warm up and twice a micro-batch of 8, eager; of one
    that takes too long the first alone."""
    sizes: list[int] = []
    loss = HostTrainer.compute_loss

    def counted(self: HostTrainer, model: nn.Module, inputs: Any, *arguments: Any, **options: Any) -> Any:
        sizes.append(sum(len(batch["input_ids"]) for batch in inputs.values()))
        return loss(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(HostTrainer, "compute_loss", counted)
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: pytest.fail("a dry run compiles"))
    folder = save_tiny_host(tmp_path / "host")
    settings = [f"model.path={folder}", f"train.output_dir={tmp_path / 'run'}", "train.per_device_train_batch_size=64"]
    settings += ["train.gradient_accumulation_steps=4", "train.compile_blocks=true", "train.dataloader_num_workers=2"]
    command = ["--config", str(ROOT / "configs" / "debug" / "t2i.yaml"), *settings, "--dry-run"]
    assert run("t2i", *command) == 0
    said = capsys.readouterr().out
    assert sizes == [2, 8, 8]
    label = "reckoned from 0.125 of a micro-batch; 4 micro-batches a step; without compilation, which the run has"
    assert re.search(rf"time    [\d.e+-]+ s a step, 4 steps: .*without evaluations \({label}\)", said)
    sizes.clear()
    monkeypatch.setattr(dry_run, "BUDGET", 0.0)
    assert run("t2i", *command) == 0
    assert sizes == [2] and "(not warmed up, too long rather than too short; reckoned" in capsys.readouterr().out


def test_a_step_is_reckoned_from_its_passes_and_the_rest() -> None:
    """A first step that compiles or allocates counts for nothing."""
    measured = Measured(share=1 / 8, micro_batches=4, seconds=[60.0, 1.5, 2.5], passes=[59.0, 1.0, 2.0])
    assert measured.seconds_per_step == pytest.approx(1.5 * 8 * 4 + 0.5)
    assert Measured(seconds=[3.0], passes=[2.0]).seconds_per_step == 3.0
    assert Measured(seconds=[3.0, 1.0], passes=[2.0, 0.5]).said == ""


def test_the_tokenizer_recipe_shows_its_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_vqrae().save_pretrained(tmp_path / "begun")
    settings = [f"model.init_from={tmp_path / 'begun'}", f"train.output_dir={tmp_path / 'run'}", "data.image_size=32"]
    Image.effect_noise((40, 40), 50).convert("RGB").save(tmp_path / "noise.png")
    config = ROOT / "configs" / "debug" / "stage2.yaml"
    assert run("tokenizer", "--config", str(config), *settings, f"data.source={tmp_path}", "--dry-run") == 0
    said = capsys.readouterr().out
    tokenizer = tiny_vqrae()
    encoder = sum(p.numel() for p in tokenizer.encoder.parameters())
    assert sum(weights_in(said.partition("discriminator")[0])) == pytest.approx(
        sum(p.numel() for p in tokenizer.parameters()), abs=3000
    )
    assert re.search(rf"lr 0\.0005 .*encoder {encoder / 1e6 - 0.003:.2f}", said)
    assert "discriminator\n" in said and "models beside" in said
    with Image.open(tmp_path / "run" / "dry_run.png") as sheet:
        assert sheet.size == (4 * 32, 2 * 32)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["dry_run.png"]


def test_the_page_marks_what_is_learned_and_nothing_else(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", BOTH)
    tokenizer, processor = trainer.processing_class.tokenizer, trainer.processing_class
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    rows = rows_of(batch, processor, per_flow=4)
    write_page(rows, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    said = [html.unescape(text) for text in re.findall(r"<mark>(.*?)</mark>", page, re.DOTALL)][1:]
    labels = batch["conversation"]["labels"]
    expected = "".join(tokenizer.decode(row[row != IGNORED]) for row in labels[:4])
    assert "".join(text for text in said if "image tokens" not in text) == expected
    assert said.count("‹16 image tokens›") == min(4, len(batch["drawing"]["labels"]))


def test_a_sample_cannot_write_into_the_page_or_move_the_cursor() -> None:
    class Words:
        pad_token_id = 0

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join({1: "<script>", 2: "\x1b[2J"}[token] for token in ids)

    row = pieces(torch.tensor([1, 2, 9, 9, 0, 0]), torch.tensor([-100, 2, 9, -100, -100, -100]), Words(), 9)
    assert [(piece.learned, piece.tokens) for piece in row] == [(False, 1), (True, 1), (True, 1), (False, 1)]
    assert "\x1b[2J" not in in_terminal([("talk", row)])


def test_activations_are_those_that_the_backward_pass_needs() -> None:
    layers = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    measured = Measured()
    with counting_activations(measured, layers.parameters()):
        layers(torch.randn(7, 10)).sum()
    assert measured.activations == 4 * 7 * (10 + 20)  # what enters the two layers; relu keeps its output, the same


def test_a_group_is_named_by_the_parts_of_its_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = build(tmp_path, TALK).model
    model.lm_head.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    say_groups(model, [{"params": trained, "lr": 1e-3, "weight_decay": 0.0}])
    said = capsys.readouterr().out
    assert "1  AdamW  lr 0.001  weight decay 0 " in said and "model.language_model" in said
