"""The GAN's other side: a discriminator with its optimizer and LeCAM's statistics, beside a tokenizer that learns.

It judges from step `gan.start` on. Within a step the tokenizer moves first, then the discriminator on the same
reconstruction, detached (VQRAE, arXiv 2511.23386; the consistency and the augmentation are IDEAL's, arXiv 2606.11096).
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from unimm.training.arguments import TokenizerTrainingConfig
from unimm.training.augment import augment
from unimm.training.discriminator import (
    LeCam,
    build_discriminator,
    frozen,
    hinge_d_loss,
    hinge_g_loss,
    softplus_g_loss,
)
from unimm.training.objective import GANConfig
from unimm.training.schedules import warmup_cosine_scheduler

_GENERATOR_LOSSES = {"hinge": hinge_g_loss, "softplus": softplus_g_loss}


class Adversary:
    """Of pictures of `output_size` pixels a side; `gan.start` is a step."""

    def __init__(
        self, gan: GANConfig, config: TokenizerTrainingConfig, output_size: int, accelerator: Accelerator
    ) -> None:
        assert gan.start is not None
        self.gan, self.start, self.accelerator, self.max_grad_norm = gan, gan.start, accelerator, config.max_grad_norm
        self.lecam = LeCam().to(accelerator.device)
        discriminator = build_discriminator(gan.discriminator, gan.weights, output_size)
        optimizer = torch.optim.AdamW(
            discriminator.parameters(),
            lr=gan.learning_rate,
            betas=tuple(config.betas),
            weight_decay=config.weight_decay,
        )
        total = max(1, config.steps - gan.start)
        self.scheduler = warmup_cosine_scheduler(
            optimizer, total=total, warmup=min(gan.warmup_steps, total), end_lr=config.end_learning_rate
        )
        self.discriminator, self.optimizer = accelerator.prepare(discriminator, optimizer)

    def generator_loss(self, pixels: Tensor) -> Tensor:
        """What the tokenizer hears of its pixels [B, 3, H, W]; the discriminator does not move."""
        judge = self.accelerator.unwrap_model(self.discriminator)  # DDP has nothing to reduce in this step
        with frozen(judge), self.accelerator.autocast():
            return _GENERATOR_LOSSES[self.gan.generator](judge(self._view(pixels)))

    def step(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Learn from pixels [B, 3, H, W] that are real and that are not; {"discriminator": its hinge loss}."""
        with self.accelerator.accumulate(self.discriminator):
            with self.accelerator.autocast():
                logits = [self.discriminator(self._view(pixels)) for pixels in (real, fake)]
            hinge = hinge_d_loss(*logits)
            loss = hinge + self.gan.lecam_weight * self.lecam(*logits)
            if self.gan.consistency_weight:
                strong = [augment(pixels, probability=1.0, cutout=self.gan.strong_cutout) for pixels in (real, fake)]
                with self.accelerator.autocast():
                    others = [self.discriminator(pixels) for pixels in strong]
                loss = loss + self.gan.consistency_weight * F.mse_loss(torch.cat(others), torch.cat(logits))
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.discriminator.parameters(), self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.scheduler.step()
        return {"discriminator": hinge.detach()}

    def _view(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] as the discriminator sees them."""
        return augment(pixels, probability=self.gan.augment_probability, cutout=self.gan.cutout)

    def state_dict(self) -> dict[str, Any]:
        return {
            "discriminator": self.accelerator.unwrap_model(self.discriminator).state_dict(),
            "d_optimizer": self.optimizer.state_dict(),
            "d_scheduler": self.scheduler.state_dict(),
            "lecam": self.lecam.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accelerator.unwrap_model(self.discriminator).load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["d_optimizer"])
        self.scheduler.load_state_dict(state["d_scheduler"])
        self.lecam.load_state_dict(state["lecam"])
