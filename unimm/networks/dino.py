"""The frozen DINO ViT-S/16 backbone of the discriminator (Caron et al., https://arxiv.org/abs/2104.14294).

It follows StyleGAN-T (https://arxiv.org/abs/2301.09515) and VAR's tokenizer training:

- five readouts of [B, 384, 196]: after the position embedding and after blocks 2, 5, 8 and 11, each the patch tokens
  plus the class token;
- no final norm, dropout or drop path; tanh GELU, as in the published discriminators; float32 also under autocast;
- the key bias is set to zero at load: softmax is invariant to it, but low-precision logits are not.

Shapes: B batch, H W pixels, 196 = 14 x 14 patches of a 224 px input, 384 channels.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.networks.weight_files import load_exactly, read_weights

IMAGE_SIZE, PATCH_SIZE, HIDDEN_SIZE, DEPTH, NUM_HEADS, NORM_EPS = 224, 16, 384, 12, 6, 1e-6
READOUT_BLOCKS = (2, 5, 8, 11)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAME = "the DINO discriminator"
GET = (
    "dino_deitsmall16_pretrain.pth, timm's vit_small_patch16_224.dino "
    "or the folder facebook/dino-vits16 of the Hugging Face hub"
)

# Hugging Face's ViT names -> the published file's; query, key and value are fused in `_from_hugging_face`.
HF_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer": "blocks",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


class Attention(nn.Module):
    """Self-attention with a fused qkv projection, [B, L, 384] -> [B, L, 384]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN_SIZE, 3 * HIDDEN_SIZE)
        self.proj = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)

    def forward(self, x: Tensor) -> Tensor:
        # [B, heads, L, 64] each
        query, key, value = self.qkv(x).unflatten(-1, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block, [B, L, 384] -> [B, L, 384]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(HIDDEN_SIZE, eps=NORM_EPS)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(HIDDEN_SIZE, eps=NORM_EPS)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(HIDDEN_SIZE, 4 * HIDDEN_SIZE))
        self.mlp.add_module("act", nn.GELU(approximate="tanh"))
        self.mlp.add_module("fc2", nn.Linear(4 * HIDDEN_SIZE, HIDDEN_SIZE))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DinoTrunk(nn.Module):
    """DINO ViT-S/16: pixels [B, 3, 224, 224] in [0, 1] -> five readouts [B, 384, 196]. Frozen, yet differentiable."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(3, HIDDEN_SIZE, PATCH_SIZE, PATCH_SIZE))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, HIDDEN_SIZE))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (IMAGE_SIZE // PATCH_SIZE) ** 2, HIDDEN_SIZE))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.requires_grad_(False).eval()

    def forward(self, pixels: Tensor) -> list[Tensor]:
        with torch.autocast(pixels.device.type, enabled=False):
            patches = self.patch_embed((pixels.float() - self.mean) / self.std).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
            readouts = [_readout(x)]
            for index, block in enumerate(self.blocks):
                x = block(x)
                if index in READOUT_BLOCKS:
                    readouts.append(_readout(x))
        return readouts


def load_dino_trunk(path: str | Path | None) -> DinoTrunk:
    """Load the trunk from `path`: the published `.pth`, timm's file, or a Hugging Face ViT file or folder.

    Raises UserError, naming the file to get, if there is none or it belongs to another network.
    """
    state = read_weights(path, name=NAME, get=GET, setting="the discriminator's weights")
    if any("attention.attention.query" in key for key in state):
        state = _from_hugging_face(state)
    state = {key: value.float() for key, value in state.items() if not key.startswith(("norm.", "fc_norm.", "head."))}
    trunk = DinoTrunk()
    load_exactly(trunk, state, name=NAME, get=GET)
    with torch.no_grad():
        for block in trunk.blocks:
            block.attn.qkv.bias[HIDDEN_SIZE : 2 * HIDDEN_SIZE] = 0
    return trunk


def _readout(x: Tensor) -> Tensor:
    """Return patch tokens plus the class token of x [B, 197, 384], as [B, 384, 196]."""
    return (x[:, 1:] + x[:, :1]).transpose(1, 2)


def _from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a Hugging Face ViT's tensors to the published file's names, without pooler and final norm."""
    state = {key.removeprefix("vit."): value for key, value in state.items()}
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(("pooler.", "layernorm.", "classifier.")) or ".key." in key or ".value." in key:
            continue  # keys and values are fused with their query below
        if ".query." in key:
            value = torch.cat([state[key.replace(".query.", f".{part}.")] for part in ("query", "key", "value")])
            key = key.replace("attention.attention.query", "attn.qkv")
        for theirs, ours in HF_NAMES.items():
            key = key.replace(theirs, ours)
        converted[key] = value
    return converted
