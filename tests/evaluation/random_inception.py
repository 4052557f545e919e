"""FID's Inception with random weights that every layer of it shows in: fresh batch norms do nothing."""

import torch
from torch import nn

from unimm.networks.inception import FidInception


def random_inception() -> FidInception:
    torch.manual_seed(0)
    made = FidInception()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.8, 1.6)
    return made
