"""Test support: lets the CUDA build of torchvision be imported beside a CPU-only torch, and starts programs so.

    python tests/integrations/shim.py -m lmms_eval --model unimm ...
    python tests/integrations/shim.py eval/lmms.py --tasks mme ...

torchvision declares how two of its operators behave on abstract tensors, which fails where the operators themselves
were not built; nothing here calls them. It has to happen before transformers or lmms-eval look for torchvision.
"""

import importlib.util
import runpy
import sys

import torch

_SCHEMAS = ("nms", "qnms")
_LIBRARIES: list[torch.library.Library] = []  # a library that is collected takes its operators with it


def declare_missing_operators() -> None:
    """Declare the operators, once, where torchvision is installed and torch was built without CUDA."""
    if torch.version.cuda is not None or _LIBRARIES or importlib.util.find_spec("torchvision") is None:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in _SCHEMAS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)


if __name__ == "__main__":
    declare_missing_operators()
    _, what, *rest = sys.argv
    if what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [what, *rest]
        runpy.run_path(what, run_name="__main__")
