"""Host families: multimodal models whose vision tower an image tokenizer can replace. A family is one `HostFamily`.

The vision tower is the image tokenizer, set by configuration (`vision_config` goes through `AutoConfig`), never by
assignment: a tower that is assigned to a stock host is silently replaced by a random one on reload. A family is a
module in this folder that ends with `register_host`, and a line in `unimm.registration`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.configuration_utils import SubConfigSpec

from unimm.mllm.hosts.configs import shared_fields
from unimm.mllm.processing import UnimmProcessor
from unimm.tokenizer import ImageTokenizer

ALL_PATCHES = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
"""Settings of a LLaVA with an image tokenizer: its last hidden state is the feature layer, and has no CLS token."""


@dataclass(frozen=True)
class TinyHost:
    """Settings of the tiny random host of a family, built by `unimm.testing.hosts`.

    Args:
        tokens: {special token of the text tokenizer: the config field that holds its id, or None}.
        encoder: model type of its tower, if that is an encoder that a tokenizer can be built on.
        tower: fields of the tower's config, if it is not.
        text: fields of the text config.
        fields: other fields of the config.
    """

    tokens: Mapping[str, str | None]
    encoder: str | None = None
    tower: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=lambda: {"model_type": "qwen2"})
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StockExport:
    """How a unified model is exported as a stock model with the plain encoder as its tower.

    Args:
        carried: config fields that are copied.
        encoder: the only encoder family that the stock model has; None: any.
        processor: (model, processor, feature selection strategy, number of prefix tokens) -> the stock processor;
            None if it tiles images or takes videos, so that the host's own is needed.
    """

    carried: tuple[str, ...]
    encoder: str | None = None
    processor: Callable[[Any, UnimmProcessor, str, int], ProcessorMixin] | None = None


@dataclass(frozen=True)
class HostFamily:
    """The classes of a host family, and its differences in configuration and weights.

    Args:
        stock: config class of the stock host.
        model: the unified model's class; it also says whether images are tiled and positions are plain indices.
        tiny: settings of a tiny host for tests.
        image_token_field: config field with the token id of the placeholder of an input image.
        config_fields: (stock config) -> fields of the unified config besides the host's own and `shared_fields`.
        merged_side: (stock or unified config) -> side, in patches, of the block that becomes one input token.
        post_norm: whether the stock host reads its tower's features behind the final norm (`last_hidden_state`), and
            not at the `vision_feature_layer` of its config.
        tower: prefix of the stock tower's weights, which are dropped.
        kept_of_tower: {prefix of weights inside the stock tower that are kept: their prefix in the unified model}.
        plain_text: config class of the language model alone, if the family's text config is no standalone one.
        export: how it is exported as a stock model; None if the stock tower cannot be replaced.
    """

    stock: type[PreTrainedConfig]
    model: type[Any]
    tiny: TinyHost
    image_token_field: str = "image_token_index"
    config_fields: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    merged_side: Callable[[Any], int] = lambda config: 1
    post_norm: bool = False
    tower: str = "model.vision_tower."
    kept_of_tower: Mapping[str, str] = field(default_factory=dict)
    plain_text: type[PreTrainedConfig] | None = None
    export: StockExport | None = None

    @property
    def model_type(self) -> str:
        """Return the model type of the stock host."""
        return self.stock.model_type

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """Return the config class of the unified model."""
        found: type[PreTrainedConfig] = self.model.config_class
        return found

    @property
    def has_m_rope(self) -> bool:
        """Return whether positions have rows and columns (M-RoPE)."""
        return not self.model.positions_are_1d

    def unified_config(
        self, host: PreTrainedModel, image_tokenizer: ImageTokenizer, processor: UnimmProcessor, rows: int
    ) -> PreTrainedConfig:
        """Build the host's own config with the image tokenizer as its tower; `rows` is the host's vocabulary size."""
        dropped = ("model_type", "architectures", "text_config")
        own = {name: value for name, value in host.config.to_dict().items() if name not in dropped}
        shared = shared_fields(host, image_tokenizer, processor, rows)
        changed = {**self.config_fields(host.config), **shared, self.image_token_field: processor.image_token_id}
        return self.config_class(**own | changed)

    def kept_name(self, name: str) -> str | None:
        """Return the name in the unified model of a weight of the stock host that is copied as it is (projector,
        newline), None for one that is replaced or extended."""
        for stock, ours in self.kept_of_tower.items():
            name = name.replace(stock, ours)
        return None if name.startswith((self.tower, *EXTENDED)) else name


EXTENDED = ("model.language_model.", "lm_head.")
"""Prefixes of the weights that grow by the rows of the image ids."""

HOSTS: dict[str, HostFamily] = {}
"""The registered families by the model type of the stock host. Text-only hosts become a LLaVA (`text_only`)."""


def register_host(family: HostFamily) -> None:
    """Add a family to `HOSTS` and register its classes with the Auto classes."""
    config_class = family.config_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForImageTextToText.register(config_class, family.model, exist_ok=True)
    AutoModelForMultimodalLM.register(config_class, family.model, exist_ok=True)
    AutoProcessor.register(config_class, UnimmProcessor, exist_ok=True)
    HOSTS[family.model_type] = family


def family_of(config: PreTrainedConfig) -> HostFamily:
    """Return the family of a unified model by its config."""
    return next(family for family in HOSTS.values() if family.config_class.model_type == config.model_type)


def sub_configs(text_type: str) -> dict[str, SubConfigSpec]:
    """Return `sub_configs_defaults` of a unified config: an image tokenizer and a language model of `text_type`."""
    types = {"vision_config": "vqrae", "text_config": text_type}
    return {name: SubConfigSpec(config_class=AutoConfig, model_type=each) for name, each in types.items()}
