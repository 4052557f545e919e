"""Training loop of the image tokenizers, written by hand because a GAN needs two optimizers (accelerate does the rest).

Stage 1 trains everything but the encoder, which is all that VFMTok and IDEAL need. Stage 2 trains the encoder too,
regularized by self-distillation from the frozen original, optionally with a GAN (VQRAE, arXiv 2511.23386, sections 3.3
to 3.5 and table 7). Stage 3 trains the decoder alone. A checkpoint holds the full state and images are addressed by
index, so a resumed run is bit-identical to an uninterrupted one on the CPU.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from unimm.data.image_streams import Images
from unimm.data.shuffling import OwnBatches
from unimm.runs.processes import refuse_together
from unimm.saving import save_whole
from unimm.tokenizer import ImageTokenizer, ImageTokenizerOutput, ImageTokenizerProcessor
from unimm.tokenizer.codebook_usage import CodebookUsage
from unimm.tokenizer.encoders import encode_features
from unimm.training.loop.arguments import TokenizerTrainingConfig
from unimm.training.loop.checkpoint import (
    bytes_of,
    checkpoints,
    clear_leftovers,
    load_checkpoint,
    model_bytes,
    optimizer_bytes,
    require_space,
    save_checkpoint,
)
from unimm.training.loop.ema import EMA
from unimm.training.loop.finite import FiniteGuard
from unimm.training.loop.global_batch import all_rows
from unimm.training.loop.interruption import Interruption
from unimm.training.loop.micro_batches import accumulating
from unimm.training.loop.rng import preserve_rng_state, random_states, set_random_states
from unimm.training.loop.run_log import RunLog, in_words
from unimm.training.loop.schedules import warmup_cosine_scheduler
from unimm.training.loop.sharding import check_strategy
from unimm.training.loop.standstill import StandstillGuard
from unimm.training.loop.throughput import Meter, TokenizerCost, Work
from unimm.training.tokenizer.codebook_maintenance import CodebookMaintenance
from unimm.training.tokenizer.gan_trainer import GANTrainer
from unimm.training.tokenizer.objective import ObjectiveConfig, TokenizerObjective
from unimm.training.tokenizer.parameters import parameter_groups, set_trainable
from unimm.training.tokenizer.perceptual import FeaturePerceptualLoss
from unimm.training.tokenizer.reconstruct import Reconstruct, Window, cell_size, target_pixels
from unimm.training.tokenizer.teacher import Teacher

PANEL_IMAGES = 8


class TokenizerTrainer:
    """Train `tokenizer` in place on `images`; recipes call it inside `open_run`.

    Args:
        tokenizer: the model to train.
        images: training images, addressed by index.
        config: settings of the loop.
        objective: weights of the loss terms.
        evaluate: called with the tokenizer at every panel step; the scalars that it returns are logged.
        held_out: images shown in panels; None shows the first training images.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        images: Images,
        config: TokenizerTrainingConfig,
        objective: ObjectiveConfig,
        *,
        evaluate: Callable[[ImageTokenizer], dict[str, float]] | None = None,
        held_out: Images | None = None,
    ) -> None:
        self.config = config
        self.evaluate = evaluate
        self.images = images
        self.shown = images if held_out is None else held_out
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)  # the loop below accumulates itself
        kind = self.accelerator.distributed_type
        fsdp, deepspeed = kind == DistributedType.FSDP, kind == DistributedType.DEEPSPEED
        check_strategy(fsdp, deepspeed, sharded_by_trainer=False)
        set_seed(config.seed)
        if config.tf32:
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.allow_tf32 = True
        self.step = 0
        self.output_dir = Path(config.output_dir)
        self.processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
        self.tokenizer = tokenizer
        set_trainable(tokenizer, config.stage)
        # Copied before any step: the teacher and the feature loss compare with the encoder as it was before this stage.
        self.teacher = Teacher(tokenizer) if config.stage == 2 else None
        self.objective = TokenizerObjective(objective, self._feature_loss(objective))
        self.patch_mixes = objective.context_weight > 0
        if self.patch_mixes:
            cell_size(tokenizer)
        self.entropy_temperature = objective.entropy_temperature if objective.entropy_weight else None
        self._prepare(objective)
        if config.codebook_init == "data" and not checkpoints(self.output_dir):
            self.maintenance.fit()

    # ---- building
    # ---------------------------------------------------------------------------------------------------------------

    def _feature_loss(self, objective: ObjectiveConfig) -> FeaturePerceptualLoss | None:
        if "features" not in objective.perceptual.kind:
            return None
        encoder = copy.deepcopy(self.tokenizer.encoder).requires_grad_(False).eval().to(self.accelerator.device)
        return FeaturePerceptualLoss(
            lambda pixels: encode_features(encoder, self.tokenizer.normalize(pixels)),
            objective.perceptual.feature_layers,
        )

    def _prepare(self, objective: ObjectiveConfig) -> None:
        config, device = self.config, self.accelerator.device
        optimizer = torch.optim.AdamW(
            parameter_groups(self.tokenizer, config.learning_rate, config.encoder_learning_rate),
            betas=tuple(config.betas),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scheduler = warmup_cosine_scheduler(
            optimizer,
            total=config.steps,
            warmup=config.warmup_steps,
            end_lr=config.end_learning_rate,
            shared_lr_multiplier=config.shared_lr_multiplier,
        )
        self.reconstruct_module = Reconstruct(self.tokenizer, self.entropy_temperature)
        self.reconstruct, self.optimizer = self.accelerator.prepare(self.reconstruct_module, optimizer)
        self.guard = StandstillGuard(self.tokenizer, self.optimizer, "The tokenizer's")
        self.ema = EMA(self.tokenizer, decay=config.ema_decay)
        self.usage = CodebookUsage(self.tokenizer.config.codebook_size, device)  # since the last log
        self.finite = FiniteGuard()
        self.maintenance = CodebookMaintenance(self.tokenizer, config, self._batches, len(self.images))
        for module in (self.teacher, self.objective):
            if module is not None:
                module.to(device)
        self.gan_trainer = None
        if objective.gan.start is not None:
            self.gan_trainer = GANTrainer(objective.gan, config, self.tokenizer.config.output_size, self.accelerator)

    def _batches(self, indices: Sequence[int], images: Images | None = None) -> Iterator[Tensor]:
        """Yield the pixel_values [B, 3, H, W] of the images at `indices`, in order; `images` defaults to the training
        images."""
        gpu = self.accelerator.device.type == "cuda"
        loader = DataLoader(
            Subset(self.images if images is None else images, indices),
            batch_size=self.config.batch_size,
            num_workers=self.config.num_workers,
            pin_memory=gpu,  # so that the copy to the device overlaps with its work
            # A DataLoader draws a seed whenever it starts; from the global generator, a resumed run would draw twice.
            generator=torch.Generator(),
            collate_fn=lambda rows: (
                self.processor(images=[row["image"] for row in rows], return_tensors="pt").pixel_values
            ),
        )
        for pixel_values in loader:
            yield pixel_values.to(self.accelerator.device, non_blocking=gpu)

    # ---- the loop
    # ---------------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to `config.steps`, resuming from the newest checkpoint if there is one, and save the averaged weights
        in output_dir.

        Raises:
            Interrupted: a signal ended the run after a step; its checkpoint is written.
        """
        self._go_on()
        config, main = self.config, self.accelerator.is_main_process
        self.meter = Meter(self.accelerator)
        known = self.meter.peak is not None
        flops = TokenizerCost.of(self.tokenizer, config.stage).training(config.batch_size) if known else 0.0
        of_a_step = Work(config.batch_size, flops=flops) * config.gradient_accumulation_steps
        self.log = RunLog(self.output_dir, config.report_to, step=self.step, main=main)
        self.tokenizer.train()
        bar = tqdm(total=config.steps, initial=self.step, disable=not main, unit="step")
        batches = self._batches(self._remaining())
        self.meter.restart()
        with Interruption() as interruption:
            while self.step < config.steps:
                logged = self._optimizer_step(batches)
                self.meter.add(of_a_step)
                bar.update()
                over = self.step == config.steps
                stop = interruption.agreed(self.accelerator) and not over
                if self.step % config.log_steps == 0 or over:
                    self._log(self._means(logged), bar)
                with self.meter.paused():
                    if self.step % config.panel_steps == 0 or over:
                        self._panel()
                    if self.step % config.save_steps == 0 or over or stop:
                        self._save()
                if stop:
                    break
        bar.close()
        self.log.close()
        if self.step < config.steps:
            raise interruption.final_log_line(checkpoints(self.output_dir)[-1], self.step, config.steps)
        self.save_pretrained()

    def _go_on(self) -> None:
        """Load the newest checkpoint, and raise UserError if the run will not fit on the disk."""
        found = checkpoints(self.output_dir)
        if found:
            self.load_state_dict(load_checkpoint(found[-1]))
            self.accelerator.print(f"Going on from {found[-1]}.")
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.output_dir)
        if self.step < self.config.steps:
            self._require_space(max(1, self.config.keep_last + 1 - len(found)), extra=model_bytes(self.tokenizer))

    def _remaining(self) -> OwnBatches:
        """Return the indices of this process's images from the current step on; processes take batches in turn."""
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        seen = self.step * self.samples_per_step
        return OwnBatches(seen, len(self.images), size=self.config.batch_size, index=index, count=count)

    def _optimizer_step(self, batches: Iterator[Tensor]) -> dict[str, Tensor]:
        """Run one optimizer step of the tokenizer and the discriminator; return each term's mean over micro-batches."""
        count = self.config.gradient_accumulation_steps
        window = Window([next(batches) for _ in range(count)])
        with self.accelerator.autocast():
            window = self.reconstruct_module.look_ahead(window, patch_mixes=self.patch_mixes)
        gan_trainer = self.gan_trainer if self.gan_trainer is not None and self.step >= self.gan_trainer.start else None
        restarts = bool(self.config.restart_steps) and (self.step + 1) % (self.config.restart_steps or 1) == 0
        found, fake, latents = list[dict[str, Tensor]](), list[Tensor](), list[Tensor]()
        for index in range(count):
            with accumulating(index, count, self.accelerator, self.reconstruct):
                terms, output = self._micro_batch(window, index, gan_trainer)
                self.accelerator.backward(terms["loss"] / count)
            found.append({name: term.detach() for name, term in terms.items()})
            if gan_trainer is not None:
                fake.append(output.pixels.detach())
            if restarts:
                latents.append(all_rows(output.latents.detach()).flatten(0, 1))
            ids = all_rows(output.ids)
            self.usage.count(ids)
            self.maintenance.chosen.count(ids)
        norm = self.accelerator.clip_grad_norm_(self._trainable(), self.config.max_grad_norm)
        self.guard.begin_step()
        self.optimizer.step()
        if self.accelerator.optimizer_step_was_skipped:
            self.guard.skip_step()
        self.optimizer.zero_grad()
        logged = {name: torch.stack([terms[name] for terms in found]).mean(0) for name in found[0]}
        if gan_trainer is not None:
            real = [target_pixels(self.tokenizer, pixel_values) for pixel_values in window.pixel_values]
            logged |= gan_trainer.step(real, fake, self.step)  # after the tokenizer's step, on the same reconstructions
        self.scheduler.step()
        self.ema.update(self.tokenizer)
        self.step += 1
        if restarts:
            self.refuse_nan()
            self.maintenance.restart(self.step, torch.cat(latents))
        return logged | {"grad_norm": norm}

    def _micro_batch(
        self, window: Window, index: int, gan_trainer: GANTrainer | None
    ) -> tuple[dict[str, Tensor], ImageTokenizerOutput]:
        """Return the loss terms of one micro-batch, with their weighted sum as "loss", and the tokenizer's output."""
        pixel_values = window.pixel_values[index]
        pixels = target_pixels(self.tokenizer, pixel_values)
        with self.accelerator.autocast():
            taught = None if self.teacher is None else self.teacher(pixel_values)
            output, patch_mix = self.reconstruct(pixel_values, self.step if self.patch_mixes else None, window)
            terms = self.objective.terms(output, pixels, taught, patch_mix)
        loss = self.objective.total(terms)
        if gan_trainer is not None:
            last = index == len(window.pixel_values) - 1
            terms["gan"] = gan_trainer.generator_loss(output.pixels, self.step, last=last)
            loss = loss + gan_trainer.gan.weight * terms["gan"]
        terms |= {"loss": loss}
        self.finite.note(terms, self.step)
        return terms, output

    def modules(self) -> list[nn.Module]:
        """Return every module that takes part in a step."""
        discriminators = [] if self.gan_trainer is None else [self.gan_trainer.discriminator]
        return [self.tokenizer, self.objective, *([] if self.teacher is None else [self.teacher]), *discriminators]

    def _trainable(self) -> list[Tensor]:
        return [p for p in self.tokenizer.parameters() if p.requires_grad]

    @property
    def samples_per_step(self) -> int:
        """Return the samples of one optimizer step, over all processes and accumulation steps."""
        return self.config.batch_size * self.accelerator.num_processes * self.config.gradient_accumulation_steps

    def refuse_nan(self) -> None:
        """Raise UserError after a loss that is not finite: at every log line, and before the weights are saved."""
        self.finite.check(self.samples_per_step)

    # ---- logging and saving
    # -----------------------------------------------------------------------------------------------------

    def _means(self, scalars: dict[str, Tensor]) -> dict[str, float]:
        """Return the scalars averaged over all processes."""
        values = self.accelerator.reduce(torch.stack([value.float() for value in scalars.values()]), "mean")
        return dict(zip(scalars, values.tolist(), strict=True))

    def _log(self, scalars: dict[str, float], bar: tqdm) -> None:
        self.refuse_nan()
        for part in (self, self.gan_trainer):
            if part is not None:
                part.guard.check(self.step)
        size, device = self.tokenizer.config.codebook_size, self.accelerator.device
        usage, self.usage = self.usage, CodebookUsage(size, device)
        scalars |= {f"codebook/{name}": getattr(usage, name) for name in ("use", "perplexity", "dead")}
        scalars["learning_rate"] = self.scheduler.get_last_lr()[0]
        scalars |= self.meter.read(self.step * self.samples_per_step)
        self.log.scalars(scalars, self.step)
        if self.accelerator.is_main_process:
            bar.write(f"step {self.step}: {in_words(scalars)}")

    @torch.no_grad()
    def _panel(self) -> None:
        """Log originals above their reconstructions and the scalars of `evaluate`, with the averaged weights."""
        self.refuse_nan()
        if not self.accelerator.is_main_process:
            return
        self.tokenizer.eval()
        with self.ema.swapped(self.tokenizer), preserve_rng_state(self.accelerator.device):
            pixel_values = next(self._batches(range(min(PANEL_IMAGES, len(self.shown))), self.shown))
            pixels = self.tokenizer.decode(self.tokenizer.encode(pixel_values).ids)
            scalars = self.evaluate(self.tokenizer) if self.evaluate else {}
        original = F.interpolate(self.tokenizer.denormalize(pixel_values), size=pixels.shape[-2:]).clamp(0, 1)
        panel = torch.cat([torch.cat(list(original), dim=2), torch.cat(list(pixels), dim=2)], dim=1)
        self.log.image("reconstruction", panel, self.step)
        self.log.scalars({f"evaluation/{name}": value for name, value in scalars.items()}, self.step)
        for name, value in scalars.items():
            print(f"step {self.step}: {name} {value:.4f}")
        self.tokenizer.train()

    def checkpoint_bytes(self) -> int:
        """Return the bytes of one checkpoint on the disk."""
        size = model_bytes(self.tokenizer) + bytes_of(self.ema.shadow.values()) + optimizer_bytes(self.optimizer)
        if self.gan_trainer is not None:
            size += model_bytes(self.gan_trainer.discriminator) + optimizer_bytes(self.gan_trainer.optimizer)
        return size

    def _require_space(self, copies: int, extra: int = 0) -> None:
        size = self.checkpoint_bytes()
        refuse_together(lambda: require_space(self.output_dir, size, copies, extra))

    def _save(self) -> None:
        self.refuse_nan()
        state = self.state_dict()
        self._require_space(copies=1)
        if self.accelerator.is_main_process:
            save_checkpoint(self.output_dir, self.step, state, self.config.keep_last)
        self.accelerator.wait_for_everyone()

    def save_pretrained(self) -> None:
        """Re-estimate the codebook (`reestimation_rounds`) and save the averaged weights with the processor."""
        if self.accelerator.is_main_process:
            with self.ema.swapped(self.tokenizer):
                self.maintenance.reestimate()
                save_whole(self.output_dir, self.tokenizer, self.processor)
        self.accelerator.wait_for_everyone()

    def state_dict(self) -> dict[str, Any]:
        """Return the full state of the run; call it on every process."""
        return {
            "step": self.step,
            "tokenizer": self.tokenizer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": self.ema.state_dict(),
            "chosen": self.maintenance.chosen.counts,
            "rng": random_states(self.accelerator),
            **(self.gan_trainer.state_dict() if self.gan_trainer is not None else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint of the same run."""
        self.step = state["step"]
        self.tokenizer.load_state_dict(state["tokenizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.ema.load_state_dict(state["ema"])
        self.maintenance.chosen.counts.copy_(state["chosen"])
        set_random_states(state["rng"], self.accelerator)
        if self.gan_trainer is not None:
            self.gan_trainer.load_state_dict(state)
