"""Training over ids: it learns what there is to learn, and an interrupted run ends with the same bits."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from tests.class_conditional.tiny import FIELDS, random_ids
from unimm.class_conditional import ClassConditionalConfig, ClassConditionalGPT
from unimm.class_conditional.ids import IdRows, IdStream
from unimm.errors import UserError
from unimm.training.language_model.class_conditional_trainer import ClassConditionalTrainer
from unimm.training.loop.arguments import C2ITrainingArguments


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def trainer_in(folder, *, rows=20, **settings) -> ClassConditionalTrainer:
    torch.manual_seed(0)
    given = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True}
    given |= {"ema_decay": 0.9}
    args = C2ITrainingArguments(output_dir=str(folder), disable_tqdm=True, **given | settings)
    ids = random_ids(rows)
    model = ClassConditionalGPT(ClassConditionalConfig(**FIELDS))
    return ClassConditionalTrainer(
        model,
        args,
        train_dataset=IdStream(ids, args.max_steps * args.train_batch_size, seed=1),
        eval_dataset=IdRows(ids),
    )


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path):
    whole = trainer_in(tmp_path / "whole")
    whole.train_or_load()
    stopped = trainer_in(tmp_path / "stopped")
    stopped.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        stopped.train_or_load()
    again = trainer_in(tmp_path / "stopped")
    assert again.done == 2
    again.train_or_load()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    for name, tensor in whole.ema.shadow.items():
        assert torch.equal(tensor, again.ema.shadow[name]), name
    finished = trainer_in(tmp_path / "stopped")
    finished.train_or_load()
    assert finished.held_out_loss() == again.held_out_loss() == whole.held_out_loss()


def test_one_sequence_is_learnt_by_heart(tmp_path):
    trainer = trainer_in(tmp_path, rows=1, max_steps=20, save_steps=20, warmup_steps=2)
    before = trainer.held_out_loss()
    trainer.train_or_load()
    assert before == pytest.approx(np.log(64), abs=1e-5)
    assert trainer.held_out_loss() < 0.5 * before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-20", "tensorboard"]


def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(tmp_path):
    trainer = trainer_in(tmp_path)
    with torch.no_grad():
        trainer.model.class_embedding.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="loss of step 1 is not finite.*samples 0 to 3 of the stream with data.seed 1"):
        trainer.train_or_load()
    assert not list(tmp_path.glob("checkpoint-*"))
