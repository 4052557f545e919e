"""Check that the data of a run exists, before a model is built, so that a wrong path costs only seconds."""

from unimm.data.editing import require_targets
from unimm.data.mixture import FlowConfig, MixtureConfig
from unimm.data.sources.ids import IdsManifest, holds_ids
from unimm.data.sources.llava import require_files
from unimm.data.sources.registry import open_images
from unimm.data.sources.storage import data_path, filled
from unimm.data.sources.table_conversations import require_conversations
from unimm.errors import UserError


def require_sources(config: MixtureConfig) -> None:
    """Raise UserError if a source of a mixture is missing or lacks the columns that its flow needs; reads no row."""
    config.refuse_overlaps()
    for flow in config.flows.values():
        for place in (flow.source, flow.eval_source):
            if place not in (None, "shapes"):
                _require(flow, str(place))


def _require(flow: FlowConfig, place: str) -> None:
    if flow.image_folder is not None:
        require_files(data_path(place), data_path(flow.image_folder))
    elif flow.kind == "drawing" and holds_ids(place):
        flow.read.refuse_others(place, "a folder of ids")
        IdsManifest.read(filled(place))
    else:
        rows = open_images(place, flow.read, strict=place == flow.source)
        if flow.kind == "conversation":
            require_conversations(rows, place)
        elif flow.kind == "editing":
            require_targets(rows, place, flow.read)
        elif rows.caption_gap is not None:
            raise UserError(f"{place} has no captions: {rows.caption_gap}.")
