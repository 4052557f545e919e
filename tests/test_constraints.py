"""constraints-cpu.txt names every package that the tests run with, in the version they run with, and nothing else."""

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

LINES = (ROOT / "constraints-cpu.txt").read_text(encoding="utf-8").splitlines()
PINS = {line.partition("==")[0]: line.partition("==")[2] for line in LINES if not line.startswith("#")}
CUDA = re.compile(r"nvidia-|cuda-|triton")  # what another build of torch than the CPU's requires


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_for_unimm() -> dict[str, str]:
    """The installed distributions that unimm reaches by its requirements, its extras included: name -> version."""
    found: dict[str, str] = {}
    pending = [("unimm", extra) for extra in ("", *(distribution("unimm").metadata.get_all("Provides-Extra") or []))]
    visited = set()
    while pending:
        name, extra = pending.pop()
        visited.add((name, extra))
        try:
            current = distribution(name)
        except PackageNotFoundError:  # of an extra that is not installed here, or of another platform
            continue
        found[name] = current.version.partition("+")[0]
        for requirement in map(Requirement, current.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = normal(requirement.name)
                pending += [pair for pair in ((needed, e) for e in ("", *requirement.extras)) if pair not in visited]
    del found["unimm"]
    return found


def test_each_line_is_a_name_and_a_version() -> None:
    assert all(re.fullmatch(r"#.*|[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in LINES)
    assert list(PINS) == sorted(PINS)


def test_every_installed_distribution_is_named_with_its_version() -> None:
    made = Path(sys.prefix) / ".dev"
    if not made.is_file() or "constraints-cpu.txt" not in made.read_text():
        pytest.skip("`make` did not install this environment by constraints-cpu.txt")
    found = installed_for_unimm()
    assert len(found) > 50 and found["torch"] == PINS["torch"]
    other = {
        name: (version, PINS.get(name))
        for name, version in found.items()
        if not CUDA.match(name) and PINS.get(name) != version
    }
    assert not other, f"installed and pinned versions, run `make constraints` and commit the file: {other}"


def test_sentencepiece_reads_models_with_the_protobuf_beside_it() -> None:
    """Hosts of Llama's family with a tokenizer.model are read through these messages."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    model = messages.ModelProto(trainer_spec=messages.TrainerSpec(vocab_size=300))
    assert messages.ModelProto.FromString(model.SerializeToString()).trainer_spec.vocab_size == 300
