"""Small runs of a unified model by `HostTrainer`, the same for one process and for several with accelerate's FSDP2.

`in_two` trains once from the start to the end, and once with a stop between.
"""

import os
from pathlib import Path

import torch
import yaml
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch import distributed as dist

from tests.conftest import ROOT
from tests.training.language_model.test_trainer import BOTH, StopAt, build
from unimm.training.language_model.trainer import HostTrainer
from unimm.training.loop.global_batch import process_count


def in_two(folder: Path) -> None:
    """What each of two processes does."""
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
