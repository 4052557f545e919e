"""For the tests of benchmarks that train."""

from tests.training.conftest import fresh_accelerator

__all__ = ["fresh_accelerator"]
