"""Check that lmms-eval finds the unimm plug-in, for `unimm doctor`.

lmms-eval itself only logs a warning if a plug-in cannot be loaded, and then does not know the model. This module can be
imported without lmms-eval.
"""

import importlib
import importlib.util
from importlib.metadata import entry_points

from unimm.mllm.doctor import Finding

GROUP, NAME = "lmms_eval.models", "unimm"
FIX = "Install unimm again (entry points are part of the installation), with the extra lmms"


def lmms_finding(number: int) -> Finding | None:
    """Return the finding with this number, None if lmms-eval is not installed."""
    if importlib.util.find_spec("lmms_eval") is None:
        return None
    try:
        ok, found = _load_plugin()
    except Exception as error:  # whatever a broken installation raises is the finding
        ok, found = False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return Finding(number, "lmms-eval", ok, found, FIX)


def _load_plugin() -> tuple[bool, str]:
    """Load the plug-in as lmms-eval does: entry point, manifest, chat class."""
    entries = list(entry_points(group=GROUP, name=NAME))
    if not entries:
        return False, f"no entry point {NAME} in {GROUP}"
    manifest = entries[0].load()()
    module, _, name = manifest.chat_class_path.rpartition(".")
    chat = getattr(importlib.import_module(module), name)
    base = importlib.import_module("lmms_eval.api.model").lmms
    return issubclass(chat, base) and not chat.is_simple, f"--model {manifest.model_id} is {manifest.chat_class_path}"
