"""For the tests of training loops."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps the precision that was chosen first for the whole process: forget it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
