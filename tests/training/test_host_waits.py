"""What makes the host wait for a GPU in every step, found on the CPU: a tensor read as a number, and a size that
depends on values. Only the exact nearest-code search may, whose candidates are as many as they are."""

import traceback
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eval.bench_training import drawing_split, size_of
from tests.conftest import ROOT
from tests.tokenizer.conftest import tiny_vqrae
from tests.training.tokenizer.test_trainer import NO_JUDGE, Small
from unimm.tokenizer.codebook_usage import CodebookUsage
from unimm.training.language_model.trainer import HostTrainer
from unimm.training.loop.arguments import TokenizerTrainingConfig
from unimm.training.tokenizer.objective import GANConfig, ObjectiveConfig
from unimm.training.tokenizer.trainer import TokenizerTrainer

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "repeat_interleave"}
pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class Waits(TorchDispatchMode):
    """Collects which lines of unimm ran an operator whose result the host must know."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Any = None) -> Any:
        masks = func.overloadpacket.__name__ == "index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masks or func.overloadpacket.__name__ in WAITING:
            stack = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
            if stack[-1].filename.startswith(str(ROOT / "unimm")):  # what a library does on its own is not ours to mend
                self.found.add(f"{Path(stack[-1].filename).relative_to(ROOT)}: {stack[-1].line}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_of_a_tokenizer_waits_for_its_search_alone(tmp_path: Path, stage: int) -> None:
    gan = GANConfig(start=0, warmup_steps=1) if stage == 2 else GANConfig()
    config = TokenizerTrainingConfig(
        str(tmp_path), stage=stage, steps=3, batch_size=4, warmup_steps=1, mixed_precision="no"
    )
    run = TokenizerTrainer(tiny_vqrae(), Small(12), config, ObjectiveConfig(perceptual=NO_JUDGE, gan=gan))
    batches = run._batches(run._remaining())
    run._optimizer_step(batches)
    with Waits() as waits:
        run._optimizer_step(batches)
    places = {place.split(":")[0] for place in waits.found}
    assert places == {"unimm/tokenizer/search.py"}, waits.found


def test_a_step_of_a_language_model_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawings from ids, between the batch's arrival and the optimizer."""
    waits, step = Waits(), HostTrainer.training_step

    def watched(*arguments: Any, **options: Any) -> Any:
        with waits:
            return step(*arguments, **options)

    monkeypatch.setattr(HostTrainer, "training_step", watched)
    settings = Namespace(steps=1, batch_size=2, workers=0, precision="no", profile=False)
    split = drawing_split(size_of("debug"), True, "plain", settings, str(tmp_path))
    assert split.step_seconds > 0 and waits.found == set()


def test_waits_are_found() -> None:
    """A mode that sees nothing would pass both."""
    usage = CodebookUsage(4)
    with Waits() as waits:
        usage.count(torch.tensor([1, 2]))
        assert waits.found == set()
        usage.update(torch.tensor([1, 2]))
    assert any("flat.min()" in place for place in waits.found) and any("bincount" in place for place in waits.found)
