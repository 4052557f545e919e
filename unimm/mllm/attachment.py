"""`Attachment`: which parts of an attached model come from the host, and which need training."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from unimm.mllm.hosts.text_only import is_text_only


@dataclass(frozen=True)
class Attachment:
    """The parts of a model after `attach`: `kept` from the host bit for bit, and `untrained`, which need training."""

    host: str
    kept: tuple[str, ...]
    untrained: tuple[str, ...]

    def sentence(self) -> str:
        """Return a summary for the user: what was kept, and what to train in which order."""
        stages = ["recipes/t2i.py (image rows)"]
        if "projector" in self.untrained:
            stages.insert(0, "recipes/sft.py (projector first, then all)")
        return (
            f"Kept of the {self.host}: {', '.join(self.kept)}. New and untrained: {', '.join(self.untrained)}. "
            f"Train with {', then '.join(stages)}."
        )

    @classmethod
    def of(cls, host: PreTrainedModel, lost: Sequence[str]) -> "Attachment":
        """Describe the model made of `host`; `lost` names its weights that do not fit the image tokenizer."""
        projector = is_text_only(host.config.model_type) or any("multi_modal_projector" in name for name in lost)
        kept = ("language model", "text rows") if projector else ("language model", "text rows", "projector")
        untrained = ("projector", "image rows") if projector else ("image rows",)
        return cls(host.config.model_type, kept, untrained)
