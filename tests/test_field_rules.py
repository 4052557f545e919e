"""Every field of every model's settings has a rule, and what breaks one is refused before anything is built."""

import dataclasses
from typing import Any

import pytest
from transformers import PreTrainedConfig
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unimm.class_conditional.configuration import ClassConditionalConfig
from unimm.errors import UserError
from unimm.field_rules import RULES, check_attention, check_settings
from unimm.mllm.hosts.registry import HOSTS
from unimm.mllm.hosts.text_only import TEXT_HOSTS
from unimm.tokenizer import TOKENIZERS, VQRAEConfig
from unimm.tokenizer.encoders import FAMILIES

CONFIGS = [family.config_class for family in HOSTS.values()]
INNER = ("qwen2_5_vl_text", "qwen2_5_vl_vision", "qwen3_vl_text", "qwen3_vl_vision")
CLASSES: dict[str, type[PreTrainedConfig]] = {
    **{name: tokenizer.config_class for name, tokenizer in TOKENIZERS.items()},
    **{config.model_type: config for config in (*CONFIGS, ClassConditionalConfig)},
    **{name: CONFIG_MAPPING[name] for name in (*FAMILIES, *TEXT_HOSTS, *HOSTS, *INNER)},
}
WITHOUT_RULE = {
    *("_out_features", "_out_indices", "id2label", "label2id", "image_grid_pinpoints", "problem_type"),
    *("transformers_version", "vision_aspect_ratio"),
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
}
"""transformers checks these, or nothing here reads them."""


def fields_of(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_has_a_rule_that_its_default_meets(name: str) -> None:
    fields = fields_of(CLASSES[name])
    assert set(fields) - set(RULES) - WITHOUT_RULE == set()
    check_settings(fields, name)
    check_settings(CLASSES[name]().to_dict(), name)


WRONG = ["many", -8, 0.5, float("nan"), float("inf"), [], {}, [[]], 10**400, 2**40, True, None]


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_refuses_something_in_one_sentence(name: str) -> None:
    refused = 0
    for value in WRONG:
        try:
            check_settings({name: value}, "config.json")
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"config.json: {name} is ") and "\n" not in str(error)
            assert len(str(error)) < 300
    assert refused >= 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "many"}, "hidden_size is 'many', expected a whole number from 1 to 1048576"),
        ({"head_dim": 0}, "head_dim is 0, expected a whole number from 1 to 16384 or null"),
        ({"text_config": {"head_dim": 0}}, "text_config.head_dim is 0"),
        ({"image_grid": [-8, 8]}, r"image_grid is \[-8, 8\], expected a list of 2, each a whole number from 1 to 4096"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number above 0 to 1"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776, expected a whole number from 1 to 1024"),
        ({"num_hidden_layers": 10**5000}, "num_hidden_layers is a number of 16610 bits"),
        ({"rope_parameters": {"factor": float("inf")}}, "rope_parameters.factor is inf, expected a finite number"),
        ({"anything": [0.0, float("nan")]}, "anything is nan"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads 3"),
        ({"hidden_size": 10, "num_attention_heads": 4}, "hidden_size 10 is no multiple of num_attention_heads 4"),
        ({"image_size": 8, "patch_size": 16}, "patch_size 16 is larger than image_size 8"),
        ({"attn_implementation": "org/kernel"}, "no kernel is fetched from the hub"),
        ({"text_config": {"_attn_implementation": {"": "org/kernel"}}}, "no kernel is fetched"),
        ({"hidden_act": "os.system"}, "hidden_act is 'os.system', expected an activation"),
        ({"dtype": "float31"}, "dtype is 'float31'"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^config.json: .*{message}"):
        check_settings(fields, "config.json")


PUBLISHED = {
    "llava": {
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "torch_dtype": "float16",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-05, "torch_dtype": "float16"},
        "vision_config": {"hidden_size": 1024, "image_size": 336, "patch_size": 14, "projection_dim": 768},
    },
    "qwen2.5-vl": {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_window_layers": 70,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "vision_config": {"depth": 32, "in_chans": 3, "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112},
    },
    "internvl": {
        "model_type": "internvl_chat",
        "llm_config": {
            "attn_implementation": "flash_attention_2",
            "temperature": 1.0,
            "top_k": 50,
            "eos_token_id": [2],
        },
        "vision_config": {"drop_path_rate": 0.1, "initializer_factor": 0.1, "norm_type": "layer_norm"},
    },
    "llama": {
        "eos_token_id": [128001, 128008],
        "pad_token_id": None,
        "head_dim": None,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "rope_type": "llama3"},
        "quantization_config": {"bits": 4, "dtype": "nf4"},
        "transformers.js_config": {"dtype": "q4f16"},
    },
    "processor": {"patch_size": 14, "vision_feature_select_strategy": None, "num_additional_image_tokens": 1},
    "image processor": {"do_convert_rgb": None, "resample": 3, "size": {"shortest_edge": 336}, "image_mean": [0.5] * 3},
    "tokenizer": {"model_max_length": 1000000000000000019884624838656, "padding_side": "left", "chat_template": "x"},
}
"""Parts of what published checkpoints hold, as they write it."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_pass(name: str) -> None:
    check_settings(PUBLISHED[name], name)


def test_deep_nesting_is_refused() -> None:
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    with pytest.raises(UserError, match="more than 32 levels deep"):
        check_settings({"extra": deep}, "config.json")


def test_settings_in_memory_are_held_against_the_same_table() -> None:
    with pytest.raises(UserError, match="VQRAEConfig: encoder_config.num_hidden_layers is 1099511627776"):
        VQRAEConfig(encoder_config={"model_type": "siglip_vision_model", "num_hidden_layers": 2**40})
    for config_class in CONFIGS:
        with pytest.raises(UserError, match=f"{config_class.__name__}: image_grid is"):
            config_class(image_grid=[-8, 8])
    with pytest.raises(UserError, match="ClassConditionalConfig: num_hidden_layers is 0"):
        ClassConditionalConfig(num_hidden_layers=0)


@pytest.mark.parametrize("name", ["org/repo", "org/repo@main:layer", "nonsense", 3])
def test_an_attention_that_is_not_here_is_refused(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="^attn_implementation is .*no kernel is fetched from the hub or null.$"):
        check_attention(name)
    check_attention("flash_attention_2")
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda: True)
    monkeypatch.setitem(FLASH_ATTENTION_COMPATIBILITY_MATRIX[2], "general_availability_check", lambda: False)
    with pytest.raises(UserError, match="no kernel is fetched from the hub"):
        check_attention("flash_attention_2")  # which is not installed, and would be fetched
    check_attention("sdpa")
    check_attention(None)
