"""Register unimm's models with transformers' Auto classes lazily: without importing them, transformers or torch.

`from_pretrained` of an Auto class finds a class by model type in `CONFIG_MAPPING`, or by name among the values of the
processor mappings. Both look up externally registered entries first (`_extra_content`); unimm's entries there import
the module that defines and registers them. All other mappings are keyed by configuration classes, which exist only
after that import. The entries are installed when transformers imports its mappings, or at once if it already has.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "vqrae": "unimm.tokenizer.vqrae",
    "vfmtok": "unimm.tokenizer.vfmtok",
    "ideal": "unimm.tokenizer.ideal",
    "llamagen_vq": "unimm.tokenizer.llamagen_vq",
    "llamagen_encoder": "unimm.tokenizer.llamagen_vq",
    "unimm_class_conditional": "unimm.class_conditional",
    "unimm_llava": "unimm.mllm.hosts.llava",
    "unimm_internvl": "unimm.mllm.hosts.internvl",
    "unimm_llava_next": "unimm.mllm.hosts.llava_next",
    "unimm_llava_onevision": "unimm.mllm.hosts.llava_onevision",
    "unimm_qwen2_5_vl": "unimm.mllm.hosts.qwen2_5_vl",
    "unimm_qwen3_vl": "unimm.mllm.hosts.qwen3_vl",
}
"""model_type -> the module that registers it on import. Packages import the modules below them, in this order."""

_AUTO = "transformers.models.auto"
_MAPPINGS = {
    f"{_AUTO}.configuration_auto": ("CONFIG_MAPPING", tuple(MODULES)),
    f"{_AUTO}.image_processing_auto": ("IMAGE_PROCESSOR_MAPPING", ()),
    f"{_AUTO}.processing_auto": ("PROCESSOR_MAPPING", ()),
}
"""transformers module -> the name of its mapping, and unimm's keys in it."""


def register() -> None:
    """Register unimm's classes with the Auto classes, now or when transformers imports them."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in _MAPPINGS:
        if name in sys.modules:
            _place(importlib.import_module(name))  # import_module waits for a thread that is still importing it


class _Registered(dict[Any, Any]):
    """The externally registered entries of one mapping (`_extra_content`); unimm's are imported on first access."""

    def __init__(self, entries: dict[Any, Any], later: Sequence[str]) -> None:
        super().__init__(dict.fromkeys(later) | entries)

    def __getitem__(self, key: Any) -> Any:
        if super().__getitem__(key) is None:
            importlib.import_module(MODULES[key])
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:  # overridden so that `dict(self)`, as in pickling, uses __getitem__
        return super().__iter__()

    def values(self) -> Any:
        import_below()
        return super().values()

    def items(self) -> Any:
        import_below()
        return super().items()


def import_below(package: str = "unimm") -> None:
    """Import the modules of the table that lie in `package`."""
    for module in MODULES.values():
        if module.startswith(f"{package}."):
            importlib.import_module(module)


def _place(module: ModuleType) -> None:
    name, later = _MAPPINGS[module.__name__]
    mapping = getattr(module, name)
    if not isinstance(mapping._extra_content, _Registered):
        mapping._extra_content = _Registered(mapping._extra_content, later)


class _Finder(MetaPathFinder):
    """An import hook that delegates to the other finders and adds unimm's entries once a mapping is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _MAPPINGS:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_place(module: ModuleType) -> None:
                execute(module)
                _place(module)

            spec.loader.exec_module = execute_and_place  # type: ignore[method-assign]
        return spec
