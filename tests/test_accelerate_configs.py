"""Every file in configs/accelerate is what accelerate makes of it."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from tests.conftest import ROOT

FILES = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
KINDS = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}


def test_all_strategies_are_there() -> None:
    assert [path.stem for path in FILES] == ["ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path: Path) -> None:
    """An unknown key is an error of accelerate's own."""
    config = load_config_from_file(str(path))
    assert config.distributed_type == KINDS.get(path.stem, DistributedType.DEEPSPEED)
    assert (config.num_processes, config.num_machines) == (8, 1)
    if path.stem.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
