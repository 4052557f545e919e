"""lmms-eval requires torchvision, whose ordinary build does not load beside a CPU-only torch: see `shim`."""

from tests.integrations.shim import declare_missing_operators

declare_missing_operators()
