"""GAN training of an image tokenizer: the discriminator with its optimizer, its losses and LeCAM's statistics.

The GAN is active from step `gan.start` on. In each step the tokenizer is updated first, then the discriminator on the
same reconstruction, detached (VQRAE, arXiv 2511.23386; consistency and augmentation are IDEAL's, arXiv 2606.11096).
All micro-batches of a step use the same discriminator: the same weights, and the same state of its spectral norms at
the same call. Random numbers depend on the seed and the step only, so that augmentation does not depend on how a batch
is split.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.training.loop.arguments import TokenizerTrainingConfig
from unimm.training.loop.global_batch import micro_batch
from unimm.training.loop.micro_batches import accumulating
from unimm.training.loop.rng import seeded
from unimm.training.loop.schedules import warmup_cosine_scheduler
from unimm.training.loop.standstill import StandstillGuard
from unimm.training.tokenizer.augment import augment
from unimm.training.tokenizer.discriminator import (
    LeCam,
    build_discriminator,
    frozen,
    hinge_d_loss,
    hinge_g_loss,
    softplus_g_loss,
)
from unimm.training.tokenizer.objective import GANConfig
from unimm.training.tokenizer.parameters import decay_groups

_GENERATOR_LOSSES = {"hinge": hinge_g_loss, "softplus": softplus_g_loss}


class GANTrainer:
    """Train the discriminator for images of `output_size` pixels a side, and compute the tokenizer's GAN loss.

    `gan.start`, the first step of the GAN, must be set.
    """

    def __init__(
        self, gan: GANConfig, config: TokenizerTrainingConfig, output_size: int, accelerator: Accelerator
    ) -> None:
        assert gan.start is not None
        self.gan, self.start, self.accelerator, self.max_grad_norm = gan, gan.start, accelerator, config.max_grad_norm
        self.seed = config.seed
        self.lecam = LeCam(elementwise=gan.lecam == "elementwise").to(accelerator.device)
        discriminator = build_discriminator(gan.discriminator, gan.weights, output_size)
        optimizer = torch.optim.AdamW(
            decay_groups(discriminator.parameters(), config.weight_decay),
            lr=gan.learning_rate,
            betas=tuple(config.betas),
            eps=config.adam_epsilon,
        )
        begin = gan.start if gan.schedule == "run" else 0
        total = max(1, config.steps - gan.start + begin)
        self.scheduler = warmup_cosine_scheduler(
            optimizer,
            total=total,
            warmup=min(gan.warmup_steps, total),
            end_lr=config.end_learning_rate,
            begin=begin,
        )
        self.discriminator, self.optimizer = accelerator.prepare(discriminator, optimizer)

        self.guard = StandstillGuard(self.module, self.optimizer, "The discriminator's")

    @property
    def module(self) -> nn.Module:
        """Return the discriminator, unwrapped from DDP."""
        return self.accelerator.unwrap_model(self.discriminator)

    def generator_loss(self, pixels: Tensor, step: int, *, last: bool) -> Tensor:
        """Return the tokenizer's GAN loss of its pixels [B, 3, H, W]; the discriminator stays unchanged. `last` marks
        the last micro-batch of the step."""
        discriminator = self.module  # DDP has nothing to reduce in this step
        same = (kept_buffers(discriminator, put_back=not last), seeded(self._seed(step, 0)))
        with frozen(discriminator), same[0], same[1], self.accelerator.autocast():
            return _GENERATOR_LOSSES[self.gan.generator](discriminator(self._view(pixels)))

    def step(self, real: Sequence[Tensor], fake: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Update the discriminator once on the real and fake pixels [B, 3, H, W] of every micro-batch; return
        {"discriminator": its hinge loss}."""
        count, hinges = len(real), list[Tensor]()
        means = self._mean_logits(real, fake, step)
        for index in range(count):
            with accumulating(index, count, self.accelerator, self.discriminator):
                with kept_buffers(self.module, put_back=index < count - 1), seeded(self._seed(step, 1)):
                    logits = self._logits(self.discriminator, real[index], fake[index])
                    strong = self._strong_logits(real[index], fake[index]) if self.gan.consistency_weight else None
                hinges.append(hinge_d_loss(*logits))
                loss = self.gan.discriminator_weight * (hinges[-1] + self._regularizer(logits, means, index, count))
                if strong is not None:
                    loss = loss + self.gan.consistency_weight * F.mse_loss(strong, torch.cat(logits))
                self.accelerator.backward(loss / count)
        self.accelerator.clip_grad_norm_(self.discriminator.parameters(), self.max_grad_norm)
        self.guard.begin_step()
        self.optimizer.step()
        if self.accelerator.optimizer_step_was_skipped:
            self.guard.skip_step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return {"discriminator": torch.stack(hinges).mean().detach()}

    def _regularizer(self, logits: list[Tensor], means: Tensor | None, index: int, count: int) -> Tensor | float:
        """Return the weighted LeCAM loss of one micro-batch's logits; the running means move once per step, before the
        first micro-batch (elementwise) or after the last."""
        if not self.gan.lecam_weight:
            return 0.0
        means = self.lecam.means(*logits) if means is None else means
        if self.lecam.elementwise and index == 0:
            self.lecam.update(means)
        loss = self.gan.lecam_weight * self.lecam(*logits, means)
        if not self.lecam.elementwise and index == count - 1:
            self.lecam.update(means)
        return loss

    @torch.no_grad()
    def _mean_logits(self, real: Sequence[Tensor], fake: Sequence[Tensor], step: int) -> Tensor | None:
        """Compute LeCAM's means [2] over all micro-batches in a first pass; None if there is only one, or no LeCAM."""
        count = len(real)
        if count == 1 or not self.gan.lecam_weight:
            return None
        found = []
        for index in range(count):
            with micro_batch(index, count), kept_buffers(self.module, put_back=True), seeded(self._seed(step, 1)):
                found.append(self.lecam.means(*self._logits(self.module, real[index], fake[index])))
        return torch.stack(found).mean(0)

    def _logits(self, discriminator: nn.Module, real: Tensor, fake: Tensor) -> list[Tensor]:
        with self.accelerator.autocast():
            return [discriminator(self._view(pixels)) for pixels in (real, fake)]

    def _strong_logits(self, real: Tensor, fake: Tensor) -> Tensor:
        views = [augment(pixels, probability=1.0, cutout=self.gan.strong_cutout) for pixels in (real, fake)]
        with self.accelerator.autocast():
            return torch.cat([self.discriminator(pixels) for pixels in views])

    def _view(self, pixels: Tensor) -> Tensor:
        """Augment pixels [B, 3, H, W] for the discriminator."""
        return augment(pixels, probability=self.gan.augment_probability, cutout=self.gan.cutout)

    def _seed(self, step: int, use: int) -> int:
        return (self.seed << 32) + 2 * step + use

    def state_dict(self) -> dict[str, Any]:
        """Return the state of discriminator, optimizer, scheduler and LeCAM."""
        return {
            "discriminator": self.module.state_dict(),
            "d_optimizer": self.optimizer.state_dict(),
            "d_scheduler": self.scheduler.state_dict(),
            "lecam": self.lecam.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.module.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["d_optimizer"])
        self.scheduler.load_state_dict(state["d_scheduler"])
        self.lecam.load_state_dict(state["lecam"])


@contextmanager
def kept_buffers(module: nn.Module, *, put_back: bool) -> Iterator[None]:
    """Restore the module's buffers on exit if `put_back`: a forward moves them (spectral norms run a power iteration),
    and the next micro-batch must compute with the same weights."""
    before = {name: (buffer._version, buffer.clone()) for name, buffer in module.named_buffers()} if put_back else {}
    yield
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            version, value = before.get(name, (buffer._version, buffer))
            if buffer._version != version:  # writing to an unchanged one could invalidate tensors saved for backward
                buffer.copy_(value)
