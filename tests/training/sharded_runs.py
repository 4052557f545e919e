"""Small runs of a unified model and of a tokenizer, the same for one process and for several with FSDP2.

`in_two` trains both from the start and leaves a sharded checkpoint of each; then it goes on from those that one process
has left in the folder, and saves the results as ordinary folders. Last it trains by `HostTrainer` and accelerate's
FSDP2.
"""

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from tests.conftest import ROOT
from tests.tokenizer.conftest import tiny_vqrae
from tests.training.test_host_trainer import BOTH, StopAt, build
from tests.training.tiny_host import tiny_host
from unimm.saving import save_whole
from unimm.training.ema import EMA
from unimm.training.global_batch import own_rows, process_count
from unimm.training.host_trainer import HostTrainer
from unimm.training.objective import ObjectiveConfig, PerceptualConfig, TokenizerObjective
from unimm.training.parameters import set_trainable
from unimm.training.reconstruct import Reconstruct
from unimm.training.sharding import (
    average_whole_gradients,
    load_sharded,
    save_sharded,
    shard_host,
    shard_tokenizer,
    whole_state_dict,
)

STEPS, ROWS = 3, 4


class Run:
    """A model, how it is sharded, and its loss of this process' rows."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.kind = kind
        self.processor: Any = None
        if kind == "host":
            self.model, self.processor = tiny_host()
            self.model.image_tokenizer.requires_grad_(False)
            self.root: nn.Module = self.model
        else:
            self.model = tiny_vqrae()
            set_trainable(self.model, stage=2)
            self.root = Reconstruct(self.model)
            self.objective = TokenizerObjective(ObjectiveConfig(perceptual=PerceptualConfig(kind="none")))
        self.ema = EMA(self.model, decay=0.5)
        if dist.is_initialized():
            shard_host(self.model) if kind == "host" else shard_tokenizer(self.root, self.model)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=1e-2, eps=1e-4)

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        if self.kind == "tokenizer":
            pixel_values = own_rows(torch.randn(ROWS, 3, 32, 32, generator=generator))
            output, _ = self.root(pixel_values)
            return self.objective.total(self.objective.terms(output, self.model.denormalize(pixel_values), None))
        pixel_values = own_rows(torch.randn(ROWS, 3, 64, 64, generator=generator))
        text = torch.randint(20, 40, (ROWS, 6), generator=generator)
        seen = torch.full((ROWS, 16), self.model.config.image_token_id)
        drawn = self.model.get_image_tokens(pixel_values)  # outside of a forward
        input_ids = torch.cat([own_rows(torch.cat([text, seen], dim=1)), drawn], dim=1)
        labels = input_ids.masked_fill(input_ids == self.model.config.image_token_id, -100)
        return self.root(input_ids=input_ids, pixel_values=pixel_values, labels=labels).loss

    def train(self, first: int, last: int) -> "Run":
        self.model.train()
        for step in range(first, last):
            self.loss(step).backward()
            if dist.is_initialized():
                average_whole_gradients(self.model.parameters())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update(self.model)
        return self

    def checkpoint(self, folder: Path) -> None:
        save_sharded(folder, self.model, self.optimizer)

    def resume(self, folder: Path) -> "Run":
        load_sharded(folder, self.model, self.optimizer)
        return self

    def save(self, folder: Path) -> None:
        """An ordinary folder, and the average beside it."""
        weights, average = whole_state_dict(self.model), self.ema.state_dict()
        if not dist.is_initialized() or dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_whole(folder, self.model, self.processor, weights)
            torch.save(average, folder / "ema.pt")


KINDS = ("host", "tokenizer")


def in_two(folder: Path) -> None:
    """What each of two processes does."""
    for kind in KINDS:
        run = Run(kind)
        sharded = {name for name, p in run.model.named_parameters() if isinstance(p, DTensor)}
        assert len(sharded) > 20 and not any(part in name for name in sharded for part in ("vision_tower", "quantizer"))
        run.train(0, STEPS).checkpoint(folder / f"{kind}-by-two")
        run.save(folder / f"{kind}-trained-by-two")
        again = Run(kind).resume(folder / f"{kind}-by-one").train(STEPS, STEPS + 1)
        again.save(folder / f"{kind}-went-on-by-two")
    AcceleratorState._reset_state(reset_partial_state=True)
    let_accelerate_shard_on_the_cpu()
    host_trainer(folder / "trainer-by-two").run()
    stopped = host_trainer(folder / "trainer-stopped-by-two")
    stopped.add_callback(StopAt(2))
    stopped.run()
    host_trainer(folder / "trainer-stopped-by-two").run()


def host_trainer(folder: Path) -> HostTrainer:
    """Of two flows, with an average; a global batch of 8."""
    batch, use_cpu = 8 // process_count(), not dist.is_initialized()
    settings = {"per_device_train_batch_size": batch, "adam_epsilon": 1e-4, "ema_decay": 0.5, "use_cpu": use_cpu}
    settings["bf16"] = False
    return build(folder, BOTH, max_steps=4, **settings)


def let_accelerate_shard_on_the_cpu() -> None:
    """accelerate knows FSDP2 on GPUs only: make it take this process for one of them, by its name."""
    wanted = yaml.safe_load((ROOT / "configs/accelerate/fsdp2.yaml").read_text())["fsdp_config"]
    os.environ |= {name.upper(): str(value) for name, value in wanted.items()}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    torch.accelerator.is_available = lambda: True
