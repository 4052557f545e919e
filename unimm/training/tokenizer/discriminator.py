"""Discriminators and GAN losses for image tokenizer training.

- `PatchGAN`: the convolutional discriminator of TiTok (https://arxiv.org/abs/2406.07550), blur-pooled and
  group-normed; needs no weights.
- `DinoDiscriminator`: spectral-norm heads over a frozen DINO ViT-S/16 (StyleGAN-T, https://arxiv.org/abs/2301.09515),
  as VFMTok and IDEAL use it.
- Hinge losses and LeCAM (https://arxiv.org/abs/2104.03310), as pure functions.

Both discriminators take pixels [B, 3, H, W] in [0, 1] and return unbounded logits, high for real.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from unimm.errors import UserError
from unimm.networks.dino import HIDDEN_SIZE, IMAGE_SIZE, READOUT_BLOCKS, DinoTrunk, load_dino_trunk
from unimm.training.loop.global_batch import as_mean, mean_over_processes

DiscriminatorKind = Literal["patchgan", "dino"]
MIN_IMAGE_SIZE = 16


class BlurPool(nn.Module):
    """Blurred downsampling by 2 (rounding up), with the binomial kernel [1, 3, 3, 1] under SAME padding."""

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(line, line)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        # SAME padding of a 4-tap kernel at stride 2: one pixel on each side, and one more at the end of an odd side.
        x = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
        channels = x.shape[1]
        return F.conv2d(x, self.kernel.to(x.dtype).expand(channels, -1, -1, -1), stride=2, groups=channels)


class PatchGAN(nn.Module):
    """TiTok's convolutional discriminator: pixels [B, 3, H, W] -> logits [B, 1, h, w]; 1.910 M parameters.

    One logit per 16 px, at most 16 x 16: the published 16 x 16 from 256 px on, 4 x 4 at 64 px, 2 x 2 at 32 px. A fixed
    16 x 16 would upsample the 8 x 8 feature map of a 64 px image and count every feature four times.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 5, padding="same"), nn.LeakyReLU(0.1))
        channels = (width, width, 2 * width, 4 * width)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, padding="same"), BlurPool(), nn.GroupNorm(32, after), nn.LeakyReLU(0.1)
                )
                for before, after in zip(channels, channels[1:], strict=False)
            )
        )
        self.to_logits = nn.Sequential(
            nn.Conv2d(channels[-1], channels[-1], 1), nn.LeakyReLU(0.1), nn.Conv2d(channels[-1], 1, 5, padding="same")
        )

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stages(self.stem(pixels))
        height, width = (min(16, max(1, side // 2)) for side in x.shape[-2:])
        return self.to_logits(F.adaptive_max_pool2d(x, (height, width)))


class LocalBatchNorm(nn.Module):
    """Batch norm of [B, C, L] over groups of neighboring samples, without running statistics.

    The group size is the largest divisor of B up to `virtual_batch_size`, so that any batch size works (9 makes three
    groups of 3). B is the micro-batch of one process: splitting a global batch differently changes the groups, unless
    every micro-batch is a multiple of `virtual_batch_size`.
    """

    def __init__(self, num_features: int, *, virtual_batch_size: int = 8, eps: float = 1e-6) -> None:
        super().__init__()
        self.virtual_batch_size, self.eps = virtual_batch_size, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        size = next(n for n in range(min(self.virtual_batch_size, batch), 0, -1) if batch % n == 0)
        groups = x.float().unflatten(0, (batch // size, size))  # [G, n, C, L]
        variance, mean = torch.var_mean(groups, dim=(1, 3), keepdim=True, correction=0)
        normalised = ((groups - mean) * torch.rsqrt(variance + self.eps)).flatten(0, 1)
        return normalised * self.weight[:, None] + self.bias[:, None]


def _spectral_conv(out_channels: int, kernel_size: int) -> nn.Module:
    padding = kernel_size // 2
    return spectral_norm(nn.Conv1d(HIDDEN_SIZE, out_channels, kernel_size, padding=padding, padding_mode="circular"))


def _head_block(kernel_size: int) -> nn.Sequential:
    return nn.Sequential(_spectral_conv(HIDDEN_SIZE, kernel_size), LocalBatchNorm(HIDDEN_SIZE), nn.LeakyReLU(0.2))


class DinoHead(nn.Module):
    """A convolutional head from a DINO readout [B, 384, L] to logits [B, L]."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = _head_block(kernel_size=1)
        self.mixer = _head_block(kernel_size=9)
        self.to_logits = _spectral_conv(1, kernel_size=1)

    def forward(self, readout: Tensor) -> Tensor:
        x = self.inlet(readout)
        x = (self.mixer(x) + x) / math.sqrt(2)
        return self.to_logits(x).squeeze(1)


class DinoDiscriminator(nn.Module):
    """Five heads over a frozen DINO: pixels [B, 3, H, W] -> logits [B, 980]; 7.386 M parameters, all in the heads.

    Images larger than 224 px are cropped with probability 1/2 (training only, torch's CPU generator, one position for
    the whole batch), otherwise area-resized; smaller ones are resized bicubically. The trunk is not a registered
    submodule: it follows `.to(device)`, but is in no `parameters()` and no `state_dict()`, so it is neither optimized
    nor saved, and it stays fp32.
    """

    def __init__(self, trunk: DinoTrunk) -> None:
        super().__init__()
        self._trunk = (trunk,)  # a tuple hides it from registration
        self.heads = nn.ModuleList(DinoHead() for _ in range(len(READOUT_BLOCKS) + 1))

    @property
    def trunk(self) -> DinoTrunk:
        return self._trunk[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DinoDiscriminator":
        super()._apply(fn, recurse)
        self.trunk._apply(fn, recurse).float()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        readouts = self.trunk(self._to_trunk_size(pixels))
        return torch.cat([head(readout) for head, readout in zip(self.heads, readouts, strict=True)], dim=1)

    def _to_trunk_size(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        if (height, width) == (IMAGE_SIZE, IMAGE_SIZE):
            return pixels
        if self.training and min(height, width) > IMAGE_SIZE and torch.rand(()) < 0.5:
            top = int(torch.randint(height - IMAGE_SIZE + 1, ()))
            left = int(torch.randint(width - IMAGE_SIZE + 1, ()))
            return pixels[..., top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        mode = "area" if height > IMAGE_SIZE else "bicubic"
        return F.interpolate(pixels.float(), size=(IMAGE_SIZE, IMAGE_SIZE), mode=mode)


def build_discriminator(kind: DiscriminatorKind, weights: str | None, image_size: int) -> PatchGAN | DinoDiscriminator:
    """Build the discriminator `kind` for images of `image_size` px; `weights` is DINO's file, None for PatchGAN.

    Raises:
        UserError: an unknown kind, weights that are missing or not needed, or images under 16 px.
    """
    if image_size < MIN_IMAGE_SIZE:
        raise UserError(f"A discriminator needs images of at least {MIN_IMAGE_SIZE} px and got {image_size} px.")
    if kind == "patchgan":
        if weights is not None:
            raise UserError(
                f'The discriminator "patchgan" takes no weights and got {weights}: drop them or choose "dino".'
            )
        return PatchGAN()
    if kind == "dino":
        return DinoDiscriminator(load_dino_trunk(weights))
    raise UserError(f'There is no discriminator "{kind}": choose "patchgan" or "dino".')


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Disable gradients of `module`'s parameters, but not of its input, inside the context: for the generator loss."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def hinge_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return (mean relu(1 - real) + mean relu(1 + fake)) / 2 of logits of any shape; `fake` is of detached pixels."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_g_loss(fake: Tensor) -> Tensor:
    """Return -mean of the logits of reconstructed pixels."""
    return -fake.float().mean()


def softplus_g_loss(fake: Tensor) -> Tensor:
    """Return mean softplus(-logit) of reconstructed pixels: VFMTok's, with a hinge loss for the discriminator."""
    return F.softplus(-fake.float()).mean()


def lecam_loss(real: Tensor, fake: Tensor, real_ema: Tensor, fake_ema: Tensor) -> Tensor:
    """Return mean relu(real - fake_ema)^2 + mean relu(real_ema - fake)^2 of logits (or their means) and running
    means."""
    return F.relu(real - fake_ema).square().mean() + F.relu(real_ema - fake).square().mean()


class LeCam(nn.Module):
    """LeCAM's regularizer with its running means, which `update` moves in training mode only.

    TiTok's form compares mean logits. They must be those of the global batch (`means`), because the square of a mean
    is not the mean of the micro-batches' squares. `elementwise` is IDEAL's form: every logit is compared, and the
    running means move before the loss instead of after it.
    """

    real_ema: Tensor
    fake_ema: Tensor

    def __init__(
        self,
        *,
        decay: float = 0.999,
        elementwise: bool = False,
        mean: Callable[[Tensor], Tensor] = mean_over_processes,
    ) -> None:
        super().__init__()
        self.decay, self.elementwise, self.mean = decay, elementwise, mean
        self.register_buffer("real_ema", torch.zeros(()))
        self.register_buffer("fake_ema", torch.zeros(()))

    def means(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the mean logits (real, fake) of all processes, [2]."""
        return self.mean(_means(real, fake).detach())

    def forward(self, real: Tensor, fake: Tensor, means: Tensor) -> Tensor:
        """Compute the unweighted regularizer (a scalar) of logits of any shape; `means` [2] are of the global batch."""
        if self.elementwise:
            return lecam_loss(real.float(), fake.float(), self.real_ema, self.fake_ema)
        real_mean, fake_mean = as_mean(_means(real, fake), means)
        return lecam_loss(real_mean, fake_mean, self.real_ema, self.fake_ema)

    def update(self, means: Tensor) -> None:
        """Move the running means toward the `means` [2] of the global batch; call it once per step."""
        if self.training:
            self.real_ema, self.fake_ema = torch.stack([self.real_ema, self.fake_ema]).lerp(means, 1 - self.decay)


def _means(real: Tensor, fake: Tensor) -> Tensor:
    return torch.stack([real.float().mean(), fake.float().mean()])
