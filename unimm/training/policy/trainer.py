"""Trainer that learns from rewards: GRPO over image ids and answers, on the loop of `HostTrainer`.

- A batch is a list of tasks. Before an optimizer step the policy samples a group of images or answers for each; the
  samples of all micro-batches are made together, so that they do not depend on how the batch is divided.
- With `policy.iterations` above 1 the same samples serve as many steps. A checkpoint in between keeps them.
- The loss is a sum over flows, divided by the rows or tokens of the whole batch (all processes and micro-batches).
- Samples whose gradient is exactly zero (a group of equal rewards, without KL divergence and entropy bonus) are left
  out of the forward.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput

from unimm.data.conversations import DRAWN_KINDS
from unimm.data.tasks import Kind, Task, Tasks
from unimm.errors import UserError
from unimm.training.language_model.adapters import Adapter
from unimm.training.language_model.trainer import HostTrainer
from unimm.training.loop.arguments import HostTrainingArguments
from unimm.training.loop.heap import release_heap
from unimm.training.loop.sharding import check_strategy
from unimm.training.loop.throughput import Work
from unimm.training.policy.averages import Averages
from unimm.training.policy.losses import advantages, constant, divisor, policy_terms, summed
from unimm.training.policy.reference import Reference
from unimm.training.policy.replay import Batch, Replay
from unimm.training.policy.rewarding import HeldOut, Rewards
from unimm.training.policy.rollouts import Rollout, Sampler
from unimm.training.policy.settings import PolicyConfig, WatchConfig
from unimm.training.policy.watch import Watch

Window = list[dict[str, Rollout]]
"""The samples of an optimizer step: for each micro-batch those of each flow."""
ROLLOUTS = "rollouts_{rank}.pt"


def _as_tasks(samples: list[Task]) -> Any:
    """Collate tasks to a list: what a batch holds does not exist before it is sampled."""
    return samples


class PolicyTrainer(HostTrainer):
    """Improve `model` by the rewards of its own images and answers.

    Args:
        model, args, processor, adapter: as in `HostTrainer`.
        tasks, held_out: training stream, and what evaluations score (None: nothing).
        policy, watch: settings of the update and of the stop rules.
        rewards: what samples are worth; the run ends if the reward rises and the judge's score falls.
        reference: the starting model; needed with `policy.kl_weight`.
        replay: what is learned from labels beside the rewards.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: HostTrainingArguments,
        *,
        processor: Any,
        tasks: Tasks,
        held_out: Tasks | None,
        policy: PolicyConfig,
        watch: WatchConfig,
        rewards: Rewards,
        reference: Reference | None = None,
        replay: Replay | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        flows = tasks.config.flows
        self.kinds: dict[str, Kind] = {name: flows[name].kind for name in sorted(flows)}
        learned = tasks.config.learned
        if replay is None and all(self.kinds[name] == "drawing" for name in learned):
            model.model.multi_modal_projector.requires_grad_(False)  # no image inputs: weight decay alone would move it
        super().__init__(
            model,
            args,
            processor=processor,
            data_collator=_as_tasks,
            train_dataset=tasks,
            eval_dataset=held_out,
            flow_weights={name: flows[name].weight for name in learned},
            stream_seed=tasks.config.seed,
            adapter=adapter,
        )
        check_strategy(
            self.is_fsdp_enabled,
            self.is_deepspeed_enabled,
            sharded_by_trainer=True,
            whole_only="sampling while training",
        )
        self.policy, self.reference, self.rewards, self.replay = policy, reference, rewards, replay
        self.sampler = Sampler(model, processor, policy)
        self.held_out = None if held_out is None else HeldOut(held_out, self.sampler, rewards, args.device, reference)
        self.panel = None if self.held_out is None else self.held_out.log_panel
        self.watch = Watch(watch)
        self.add_callback(self.watch)
        names = ["reward", "reward_std", "without_signal", "entropy", "clipped", "ratio_error", "length", "cut"]
        names += ["kl"] if policy.kl_weight else []
        parts = [f"reward_{name}" for name in rewards.names]
        means = [f"{flow}/{name}" for flow in learned for name in [*names, *parts * (self.kinds[flow] in DRAWN_KINDS)]]
        means += [] if replay is None else [f"replay/loss_{flow}" for flow in replay.weights]
        self.averages = Averages(means, args.device)
        self._kept: Window = []
        self._replayed: list[Batch] = []  # micro-batches of the step, and the labeled tokens of each flow
        self._replayed_tokens: dict[str, Tensor] = {}
        self._silent, self._last_logged = False, 0

    # ---- sampling ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[Window, Tensor]:
        """Return the samples for the tasks of an optimizer step, and the rows and tokens of each flow [F, 2]."""
        tasks, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.state.global_step % self.policy.iterations == 0:
            release_heap()  # no two steps sample the same lengths: without this 7.7 GB became 12.9 GB in 75 steps
            self._kept = self._sampled(tasks)
        if len(self._kept) != len(tasks):
            raise UserError(
                f"The checkpoint of step {self.state.global_step} holds samples for {len(self._kept)} micro-batches "
                f"and this run takes {len(tasks)}: go on with the same batch and number of processes."
            )
        self.window = self._kept
        if self.replay is not None:
            self._take_replay(self.replay, len(tasks))
        counts = torch.stack([self._counts(flow) for flow in self.flow_weights])
        return self.window, self.accelerator.reduce(counts, "sum")

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Return nothing of use: what is counted does not exist before it is sampled."""
        return torch.zeros((), device=device)

    def _take_replay(self, replay: Replay, micro_batches: int) -> None:
        """Keep the step's replayed samples, and count their labeled tokens over all micro-batches and processes."""
        place = self.args.process_index, self.args.world_size
        self._replayed = replay.batches(self.state.global_step, micro_batches, *place)
        labels = [[len(batch[flow]["labels_at"]) for batch in self._replayed] for flow in replay.weights]
        counts = torch.tensor(labels, device=self.args.device, dtype=torch.float64).sum(1)
        self._replayed_tokens = dict(zip(replay.weights, self.accelerator.reduce(counts, "sum"), strict=True))

    def _counts(self, flow: str) -> Tensor:
        counts = [batch[flow].counted for batch in self.window if flow in batch]
        return torch.tensor(counts, device=self.args.device, dtype=torch.float64).view(-1, 2).sum(0)

    def _precision(self) -> AbstractContextManager[Any]:
        """Return the precision of sampling: that of training, on a CPU float32, which the engine needs there."""
        return nullcontext() if self.args.device.type == "cpu" else self.accelerator.autocast()

    def _sampled(self, tasks: Sequence[Sequence[Task]]) -> Window:
        """Sample and reward a group for each task of each micro-batch."""
        window: Window = [{} for _ in tasks]
        self.model.eval()
        for flow in self.flow_weights:
            own = [[task for task in batch if task["flow"] == flow] for batch in tasks]
            if self.args.world_size > 1 and not all(own):
                raise UserError(
                    f"A batch of {self.args.train_batch_size} tasks holds none of {flow!r}; with several processes "
                    "each needs all flows: raise train.per_device_train_batch_size."
                )
            together = [task for batch in own for task in batch]
            if not together:
                continue
            with torch.compiler.set_stance("force_eager"):
                rollout = self._rewarded(flow, together)
            start = 0
            for batch, found in zip(own, window, strict=True):
                stop = start + len(batch) * self.policy.group_size
                if batch:
                    found[flow] = self._learned(rollout.rows(start, stop))
                start = stop
        return window

    def _rewarded(self, flow: str, tasks: Sequence[Task]) -> Rollout:
        """Sample a group for each task of a flow, and compute rewards and advantages."""
        size, kind = self.policy.group_size, self.kinds[flow]
        with self._precision():
            inputs, chosen = self.sampler.sample(tasks, size)
        rollout = self.sampler.rollout(kind, inputs, chosen, size)
        every = [task for task in tasks for _ in range(size)]
        if kind in DRAWN_KINDS:
            parts = self.rewards.of_images(every, self.sampler.images(chosen))
            rewards, cut = self.rewards.total(parts), torch.zeros(len(chosen))
        else:
            right = self.rewards.answers([task["answer"] for task in every], self.sampler.answers(chosen))
            rewards, cut = torch.tensor(right, dtype=torch.float64), self.sampler.cut(chosen)
            parts = rewards[:, None]
        groups = rewards.view(-1, size)
        self._note_samples(flow, groups, parts, rollout.mask, cut)
        rollout.advantage = advantages(groups, self.policy.advantage).flatten().to(rollout.advantage)
        return rollout

    def _note_samples(self, flow: str, groups: Tensor, parts: Tensor, mask: Tensor, cut: Tensor) -> None:
        self.averages.add(f"{flow}/reward", groups)
        self.averages.add(f"{flow}/reward_std", groups.std(1))
        self.averages.add(f"{flow}/without_signal", constant(groups))
        self.averages.add(f"{flow}/length", mask.sum(1))
        self.averages.add(f"{flow}/cut", cut)
        if self.kinds[flow] in DRAWN_KINDS:
            for n, name in enumerate(self.rewards.names):
                self.averages.add(f"{flow}/reward_{name}", parts[:, n])

    def _learned(self, rollout: Rollout) -> Rollout:
        """Leave out the rows that have no gradient, but never all: every process calls the model equally often."""
        if self.policy.kl_weight or self.policy.entropy_weight:
            return rollout
        learned = rollout.advantage != 0
        learned[0] |= not bool(learned.any())
        return rollout.select(learned.nonzero()[:, 0])

    # ---- the loss ----

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """Compute the weighted sum of the flows' losses; `num_items_in_batch` [F, 2] are the rows and tokens of the
        whole batch."""
        assert num_items_in_batch is not None
        self.model.image_tokenizer.eval()  # Trainer puts the whole model into training mode
        loss, seen = torch.zeros((), device=self.args.device), False
        for k, (flow, weight) in enumerate(self.flow_weights.items()):
            if flow in inputs:
                loss = loss + weight * self._flow_policy_loss(model, flow, inputs[flow], num_items_in_batch[k])
                learned = bool((inputs[flow].advantage != 0).any())
                self._saw_images += learned and inputs[flow].pixel_values is not None
                seen |= inputs[flow].pixel_values is not None
        if self.replay is not None:
            batch = self._prepare_inputs(self._replayed.pop(0))
            loss = loss + self._replay_loss(model, self.replay, batch)
            seen |= (looked_at := any("pixel_values" in each for each in batch.values()))
            self._saw_images += looked_at
        if not seen and self._projector_learns:
            loss = loss + self._no_image()
        loss = loss * self.args.world_size  # DDP divides the gradients by it; the counts above are global already
        return (loss, {}) if return_outputs else loss

    def _replay_loss(self, model: nn.Module, replay: Replay, batch: Batch) -> Tensor:
        loss = torch.zeros((), device=self.args.device)
        for flow, weight in replay.weights.items():
            total, count = self._flow_loss(model, batch[flow])
            loss = loss + weight * total / self._replayed_tokens[flow].to(total.dtype)
            self.averages.add(f"replay/loss_{flow}", (total.detach() / count).expand(count))
        return loss

    def _flow_policy_loss(self, model: nn.Module, flow: str, rollout: Rollout, counts: Tensor) -> Tensor:
        policy, mask = self.policy, rollout.mask
        logps, entropy = self.sampler.log_probabilities(model, rollout)
        if rollout.old is None:  # the first step on these samples: nothing has moved since they were sampled
            rollout.old = logps.detach()
            if self.reference is not None and policy.kl_weight:
                with torch.no_grad(), self.reference.model() as start:
                    rollout.reference, _ = self.sampler.log_probabilities(start, rollout)
        terms = policy_terms(logps, rollout.old, rollout.advantage, mask, policy, rollout.reference)
        loss = summed(terms.loss, mask, policy.loss_type, self.sampler.longest(rollout.kind))
        loss = loss / divisor(counts[0], counts[1], policy.loss_type)
        if policy.entropy_weight:
            loss = loss - policy.entropy_weight * (entropy * mask).sum() / counts[1]
        self.averages.add(f"{flow}/entropy", entropy[mask])
        self.averages.add(f"{flow}/clipped", terms.clipped.expand_as(mask)[mask])
        self.averages.add(f"{flow}/ratio_error", (terms.ratio - 1).abs().expand_as(mask)[mask])
        if policy.kl_weight:
            self.averages.add(f"{flow}/kl", terms.kl[mask])
        return loss.to(logps.dtype)

    # ---- evaluation ----

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Return the mean reward, each reward, the judge's score and the share of right answers on held-out tasks."""
        assert self.held_out is not None
        self.model.eval()
        place = self.args.process_index, self.args.world_size
        averages = self.held_out.score(*place, self._precision, self.accelerator.autocast)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in averages.read(self.accelerator).items()}
        self.watch.evaluation(metrics, self.state.log_history, self.state.global_step)
        count = len(self.held_out.tasks)
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=count)

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with the averages of all samples since the last call. Raises UserError as `Watch`
        does."""
        step = self.state.global_step
        if "loss" in logs:
            means = self.averages.read(self.accelerator)
            logs = {**logs, **means}
            shares = [
                means[f"{flow}/without_signal"] for flow in self.flow_weights if f"{flow}/without_signal" in means
            ]
            self._silent = bool(shares) and min(shares) >= 1
            if shares:
                self.watch.signal(min(shares), step - self._last_logged, step)
            self._last_logged = step
            for flow in self.flow_weights:
                self.watch.divergence(means.get(f"{flow}/kl", 0.0), step)
        super().log(logs, start_time)

    def resting_parts(self) -> set[str]:
        """Return the projector if no answer taught anything, and all parts if no sample did and none is replayed."""
        resting, guard = super().resting_parts(), self.movement.guard
        silent = self._silent and self.replay is None
        return set(guard.parts) if silent and guard is not None else resting

    def work_of(self, inputs: Any) -> Work:
        """Return the images and tokens of the samples of a micro-batch, without FLOPs."""
        images = sum(len(each.chosen) for each in inputs.values() if each.drawn)
        return Work(images, torch.stack([each.mask.sum() for each in inputs.values()]).sum())

    # ---- checkpoints ----

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random state, and the samples if further steps will use them."""
        super()._save_rng_state(output_dir)
        if self.state.global_step % self.policy.iterations:
            state = [{flow: rollout.tensors() for flow, rollout in batch.items()} for batch in self._kept]
            torch.save(state, Path(output_dir) / ROLLOUTS.format(rank=self.args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._last_logged = self.state.global_step
        if checkpoint is not None and self.state.global_step % self.policy.iterations:
            path = Path(checkpoint) / ROLLOUTS.format(rank=self.args.process_index)
            if not path.is_file():
                raise UserError(
                    f"{checkpoint} lies between two steps on the same samples and was written by fewer processes: go "
                    "on with as many as before."
                )
            state = torch.load(path, map_location=self.args.device, weights_only=True)
            self._kept = [{flow: Rollout(**tensors) for flow, tensors in batch.items()} for batch in state]
