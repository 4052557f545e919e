"""Perceptual loss: a weighted sum of distances between reconstruction and original under frozen networks.

The networks are `lpips`, `convnext_s` (mean squared difference of logits) and `features` (hidden states of a given
frozen encoder, if no pretrained weights are at hand). We interpret VQRAE's "convnext-s, weight 1.1" as TA-TiTok's
weighted average (1.0 LPIPS + 0.1 ConvNeXt) / 1.1, times 1.1: exactly "lpips+0.1*convnext_s" here, with weight 1.0.
Papers: VQRAE https://arxiv.org/abs/2511.23386, TA-TiTok https://arxiv.org/abs/2501.07730.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from unimm.errors import UserError
from unimm.networks.perceptual import load_convnext, load_lpips, unit_length

NETWORKS = ("lpips", "convnext_s", "features")
HiddenStates = Callable[[Tensor], Sequence[Tensor]]


class PerceptualLoss(nn.Module):
    """Sum of weight * network(predicted, target); with `average`, divided by the sum of weights as in TA-TiTok.

    Pixels are [B, 3, H, W] in [0, 1]; everything runs in fp32, also under autocast. The networks are frozen and stay
    in eval mode; gradients reach `predicted` only. Without networks the loss is 0.
    """

    def __init__(self, networks: Mapping[str, tuple[float, nn.Module]], *, average: bool = False) -> None:
        super().__init__()
        total = sum(weight for weight, _ in networks.values()) if average else 1.0
        self.weights = {name: weight / total for name, (weight, _) in networks.items()}
        self.networks = nn.ModuleDict({name: network for name, (_, network) in networks.items()})
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stay in eval mode, whatever `mode` is."""
        super().train(False)
        return self

    def terms(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return each network's unweighted distance (a scalar)."""
        if predicted.shape != target.shape:
            raise ValueError(f"Predicted pixels are {tuple(predicted.shape)} and target pixels {tuple(target.shape)}.")
        with torch.autocast(predicted.device.type, enabled=False):
            predicted, target = predicted.float(), target.detach().float()
            return {name: network(predicted, target) for name, network in self.networks.items()}

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of `terms`, so that a trainer that logs the terms computes them once."""
        return sum((self.weights[name] * term for name, term in terms.items()), torch.zeros(()))

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        return self.total(self.terms(predicted, target))


class FeaturePerceptualLoss(nn.Module):
    """Distance between a frozen encoder's hidden states: mean |u - v|^2 of unit vectors over `layers` and tokens.

    `encoder_forward` maps pixels [B, 3, H, W] in [0, 1] to hidden states, each [B, N, D]; `layers` index them (-1 is
    the last). For unit vectors this is 2 (1 - cosine), in [0, 4], so layers of different scale weigh the same. The
    callable's parameters must be frozen, or they would be trained too.
    """

    def __init__(self, encoder_forward: HiddenStates, layers: Sequence[int]) -> None:
        super().__init__()
        if not layers:
            raise ValueError("A feature loss needs at least one layer and got none.")
        # A tuple keeps a module out of registration: it is not saved, moved or optimized with the loss.
        self._encoder_forward = (encoder_forward,)
        self.layers = tuple(layers)

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = self._states(target)
        ours = self._states(predicted)
        distances = [
            (unit_length(u, dim=-1) - unit_length(v, dim=-1)).square().sum(-1).mean()
            for u, v in zip(ours, theirs, strict=True)
        ]
        return torch.stack(distances).mean()

    def _states(self, pixels: Tensor) -> list[Tensor]:
        states = self._encoder_forward[0](pixels)
        if not all(-len(states) <= layer < len(states) for layer in self.layers):
            raise UserError(
                f"The feature loss asks for layers {self.layers} of an encoder with {len(states)} hidden states: set "
                f"loss.perceptual.feature_layers to numbers below {len(states)}."
            )
        return [states[layer].float() for layer in self.layers]


def parse_perceptual(kind: str) -> dict[str, float]:
    """Parse names and weights: "lpips+0.1*convnext_s" -> {"lpips": 1.0, "convnext_s": 0.1}; "none" -> {}.

    Raises:
        UserError: an unknown or repeated name, or a term that is not `name` or `weight*name`.
    """
    weights: dict[str, float] = {}
    for term in [] if kind.strip() == "none" else kind.split("+"):
        match = re.fullmatch(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)\s*\*\s*)?(\w+)\s*", term)
        if match is None or match[2] not in NETWORKS or match[2] in weights:
            raise UserError(
                f'"{term.strip()}" in the perceptual loss "{kind}" is not understood: write "none" or a sum of '
                f"different networks out of {', '.join(NETWORKS)}, each with a weight if need be, "
                'such as "lpips+0.1*convnext_s".'
            )
        weights[match[2]] = float(match[1] or 1.0)
    return weights


def build_perceptual(
    kind: str,
    *,
    vgg16: str | None = None,
    lpips_heads: str | None = None,
    convnext_s: str | None = None,
    features: FeaturePerceptualLoss | None = None,
    average: bool = False,
) -> PerceptualLoss:
    """Build the loss of `kind` (see `parse_perceptual`) and load its networks from the given weight files.

    `lpips_heads` may be omitted if the Python package `lpips` is installed.

    Raises:
        UserError: a weight file is missing; the message says which file to get and which argument takes its path.
    """
    weights = parse_perceptual(kind)
    networks: dict[str, nn.Module] = {}
    if "lpips" in weights:
        networks["lpips"] = load_lpips(vgg16, lpips_heads)
    if "convnext_s" in weights:
        networks["convnext_s"] = load_convnext(convnext_s)
    if "features" in weights:
        if features is None:
            raise UserError(
                f'The perceptual loss "{kind}" needs an encoder whose features it compares and none was given.'
            )
        networks["features"] = features
    return PerceptualLoss({name: (weights[name], network) for name, network in networks.items()}, average=average)
