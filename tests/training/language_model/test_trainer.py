"""The trainer of unified models: its loss against the model's own, its memory of where it was, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from tests.data.conftest import write_folder, write_parquet
from tests.training.language_model.tiny_host import tiny_host
from unimm.data.conversations import message
from unimm.data.mixture import FlowConfig, Mixture, MixtureConfig
from unimm.data.text.collators import IGNORED, FlowCollator
from unimm.errors import UserError
from unimm.mllm import load, unified
from unimm.training.language_model.trainer import HostTrainer
from unimm.training.loop.arguments import HostTrainingArguments
from unimm.training.tokenizer.parameters import train_projector_only

TALK = {"conversation": FlowConfig("conversation", num_turns=(1, 2))}
BOTH = {
    "drawing": FlowConfig("drawing", 0.75, weight=0.5, null_prompt_prob=0.1),
    "conversation": FlowConfig("conversation", 0.25, num_turns=(1, 2)),
}


EDIT = {"edit": FlowConfig("editing", null_prompt_prob=0.2, changed_weight=3.0)}


def build(
    folder: Path, flows: dict[str, FlowConfig], dataset: Any = None, seed: int = 0, **arguments: Any
) -> HostTrainer:
    torch.manual_seed(0)
    model, processor = tiny_host()
    data = MixtureConfig(flows=flows, seed=seed, num_eval_samples=4)
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
    }
    return HostTrainer(
        model,
        HostTrainingArguments(str(folder), **{**defaults, "save_steps": 2, "logging_steps": 2, **arguments}),
        processor=processor,
        data_collator=FlowCollator(processor, changed_weights=data.changed_weights),
        train_dataset=dataset or Mixture(data),
        eval_dataset=Mixture(data, split="test"),
        flow_weights=data.weights,
        stream_seed=seed,
    )


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


class Repeated(torch.utils.data.Dataset):
    """The same batch of samples again and again."""

    def __init__(self, flows: dict[str, FlowConfig], size: int) -> None:
        self.samples = [Mixture(MixtureConfig(flows=flows))[index] for index in range(size)]

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index % len(self.samples)]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load(folder)[0].state_dict().items()}


def history(trainer: HostTrainer) -> list[dict[str, float]]:
    timings = ("runtime", "per_second", "peak_memory_gib")
    return [
        {k: v for k, v in entry.items() if not k.endswith(timings) and k != "train_loss"}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("flows", [TALK, pytest.param(BOTH, marks=pytest.mark.slow)], ids=["sft", "t2i"])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, flows: dict[str, FlowConfig]) -> None:
    straight = build(tmp_path / "straight", flows, ema_decay=0.9, eval_strategy="steps", eval_steps=2)
    straight.run()
    stopped = build(tmp_path / "resumed", flows, ema_decay=0.9, eval_strategy="steps", eval_steps=2)
    stopped.add_callback(StopAt(3))
    stopped.run()
    torch.manual_seed(99)
    resumed = build(tmp_path / "resumed", flows, ema_decay=0.9, eval_strategy="steps", eval_steps=2)
    resumed.run()
    assert resumed.state.global_step == 4
    for a, b in zip(straight.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    saved, again = weights_of(tmp_path / "straight"), weights_of(tmp_path / "resumed")
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert history(straight) == history(resumed)


@pytest.mark.slow
def test_a_run_on_held_out_files_ends_with_the_same_bits(tmp_path: Path) -> None:
    """A table and a folder of which a row each is held out, evaluated in the middle and taken up behind it."""
    table, folder = write_parquet(tmp_path / "a.parquet", range(8)), write_folder(tmp_path / "folder", range(100, 105))
    flows = {
        "drawing": FlowConfig("drawing", 0.75, source=str(table)),
        "conversation": FlowConfig("captioning", 0.25, source=str(folder)),
    }
    test_an_interrupted_run_ends_with_the_same_bits(tmp_path, flows)
    trainer = build(tmp_path / "straight", flows)
    assert trainer.train_dataset.sizes == {"drawing": 7, "conversation": 4}
    assert trainer.eval_dataset.sizes == {"drawing": 1, "conversation": 1}


def test_a_finished_run_is_only_saved_again(tmp_path: Path) -> None:
    build(tmp_path, TALK, ema_decay=0.5, max_steps=2).run()
    saved = weights_of(tmp_path)
    trainer = build(tmp_path, TALK, ema_decay=0.5, max_steps=2)
    trainer.run()
    assert trainer.state.global_step == 0
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights_of(tmp_path).items())


def test_the_loss_is_the_models_own(tmp_path: Path) -> None:
    trainer = build(tmp_path, BOTH)
    model = trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(6)])
    ours = trainer.compute_loss(model, batch)
    talk, draw = batch["conversation"], batch["drawing"]
    inputs = {name: talk[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    expected = model(**inputs, labels=talk["labels"]).loss
    token_ids = model.get_image_tokens(draw["drawn_pixel_values"])
    labels = draw["labels"].masked_scatter(draw["drawn"], token_ids)
    input_ids = draw["input_ids"].masked_scatter(draw["drawn"], token_ids)
    logits = model(input_ids=input_ids, attention_mask=draw["attention_mask"]).logits.double()
    expected = expected + 0.5 * F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)


def test_changed_patches_count_as_often_as_said(tmp_path: Path) -> None:
    trainer = build(tmp_path, EDIT)
    model = trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(6)])
    ours, edit = trainer.compute_loss(model, batch), batch["edit"]
    token_ids = model.get_image_tokens(edit["drawn_pixel_values"])
    input_ids = edit["input_ids"].masked_scatter(edit["drawn"], token_ids)
    inputs = {"attention_mask": edit["attention_mask"], "pixel_values": edit["pixel_values"]}
    before = F.pad(edit["drawn"][:, 1:], (0, 1))
    logits = model(input_ids=input_ids, **inputs).logits[before].double()
    losses = F.cross_entropy(logits, token_ids.flatten(), reduction="none")
    assert set(edit["label_weights"].tolist()) == {1.0, 3.0}
    assert ours.item() == pytest.approx((losses * edit["label_weights"]).mean().item(), rel=1e-5)


@pytest.mark.parametrize("flow", [{"conversation": FlowConfig("conversation")}, EDIT], ids=["plain", "weighted"])
def test_a_loss_in_pieces_has_the_same_value_and_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flow: dict[str, FlowConfig]
) -> None:
    """As a large vocabulary takes it: 16 000 labels with 168 000 logits each do not fit a GPU at once."""
    trainer = build(tmp_path, flow)
    model = trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(6)])
    calls: list[int] = []
    original = unified.UnifiedModelMixin._logits

    def counted(self: Any, hidden: torch.Tensor, vocabulary: Any) -> torch.Tensor:
        calls.append(len(hidden))
        return original(self, hidden, vocabulary)

    monkeypatch.setattr(unified.UnifiedModelMixin, "_logits", counted)
    found = []
    for limit in (model.logits_at_once, 10 * model.visual_vocabulary.end):
        monkeypatch.setattr(type(model), "logits_at_once", limit)
        loss = trainer.compute_loss(model, batch)
        parameters = [each for each in model.parameters() if each.requires_grad]
        found.append((loss, torch.autograd.grad(loss, parameters, allow_unused=True)))
    whole, pieces = calls[0], calls[1:]
    assert sum(pieces) == 2 * whole and max(pieces) == 10, "forward, then again in the backward"
    (expected, gradients), (loss, others) = found
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(others, gradients, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()) + 1e-9)


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """Not exactly so if every micro-batch were averaged by itself: their numbers of labels differ."""
    large = build(
        tmp_path / "large", BOTH, per_device_train_batch_size=8, max_steps=1, save_strategy="no", logging_steps=1
    )
    small = build(
        tmp_path / "small", BOTH, gradient_accumulation_steps=2, max_steps=1, save_strategy="no", logging_steps=1
    )
    for trainer in (large, small):
        trainer.train()
    (a, *_), (b, *_) = history(large), history(small)
    for name in ("loss", "loss_drawing", "loss_conversation", "grad_norm"):
        assert a[name] == pytest.approx(b[name], rel=1e-4)
    assert a["loss"] == pytest.approx(0.5 * a["loss_drawing"] + a["loss_conversation"], rel=1e-5)


@pytest.mark.slow
def test_the_loss_falls_on_a_batch_that_comes_again(tmp_path: Path) -> None:
    trainer = build(tmp_path, BOTH, Repeated(BOTH, 4), max_steps=40, save_strategy="no", logging_steps=1)
    trainer.train()
    first, *_, last = [entry for entry in history(trainer) if "loss" in entry]
    assert last["loss_drawing"] < 0.5 * first["loss_drawing"]
    assert last["loss_conversation"] < 0.5 * first["loss_conversation"]


def test_the_tower_stays_as_it_was(tmp_path: Path) -> None:
    trainer = build(tmp_path, BOTH, save_strategy="no", max_steps=2, weight_decay=0.1, ema_decay=0.9)
    before = {name: tensor.clone() for name, tensor in trainer.model.image_tokenizer.state_dict().items()}
    projector = trainer.model.model.multi_modal_projector.linear_1.weight.clone()
    trainer.train()
    after = trainer.model.image_tokenizer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not trainer.model.image_tokenizer.training
    assert not torch.equal(projector, trainer.model.model.multi_modal_projector.linear_1.weight)


def test_a_loss_that_is_not_finite_names_its_samples(tmp_path: Path) -> None:
    trainer = build(tmp_path, TALK, max_steps=8, logging_steps=4)

    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                model.get_input_embeddings().weight.data.fill_(float("nan"))

    trainer.add_callback(Poison())
    with pytest.raises(UserError, match=r"step 3 .* samples 8 to 11 .*data\.seed 0"):
        trainer.run()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_a_run_killed_while_it_saves_leaves_whole_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path, TALK)
    save = trainer._save_optimizer_and_scheduler

    def killed(folder: str) -> None:
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt
        save(folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    build(tmp_path, TALK).run()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_stream_needs_an_end_and_its_order(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_steps"):
        HostTrainingArguments(str(tmp_path))
    with pytest.raises(UserError, match="sequential"):
        HostTrainingArguments(str(tmp_path), max_steps=1, train_sampling_strategy="random")


def test_only_blocks_that_learn_are_compiled(monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((type(self), options)))
    build(tmp_path, TALK, compile_blocks=True)
    assert [(kind.__name__, options) for kind, options in compiled] == [("Qwen3DecoderLayer", {"dynamic": True})] * 2


@pytest.mark.slow
def test_muon_takes_the_blocks_matrices_and_resumes_to_the_bit(tmp_path):
    trainer = build(tmp_path / "whole", TALK, use_muon=True)
    trainer.run()
    groups = trainer.optimizer.param_groups
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    matrices = {names[id(p)] for group in groups if group["muon"] for p in group["params"]}
    assert len(matrices) == 14 and all(".layers." in name for name in matrices)
    learned = sum(len(group["params"]) for group in groups)
    assert learned == sum(p.requires_grad for p in trainer.model.parameters())
    cut = build(tmp_path / "cut", TALK, use_muon=True)
    cut.add_callback(StopAt(2))
    cut.run()
    build(tmp_path / "cut", TALK, use_muon=True).run()
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_a_batch_without_images_reaches_the_projector_with_zeros(tmp_path: Path) -> None:
    """Else the other processes of a run would wait, and a run of the projector alone would have nothing to follow."""
    trainer = build(tmp_path, TALK)
    train_projector_only(trainer.model)
    messages = [message("user", "one"), message("assistant", "red")]
    batch = trainer.data_collator([{"flow": "conversation", "kind": "conversation", "index": 0, "messages": messages}])
    with torch.no_grad():
        expected = trainer.model.eval()(**{k: v for k, v in batch["conversation"].items() if k != "drawn"}).loss
    loss = trainer.compute_loss(trainer.model.train(), batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    assert len(gradients) == 4 and all(g is not None and not g.any() for g in gradients)
