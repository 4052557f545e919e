"""Validation rules for the fields of model configurations, in one table by field name, for unimm's and stock models.

transformers checks declared types but no ranges: `head_dim: 0`, `rms_norm_eps: NaN` or 2^40 layers reach the model, or
exhaust memory before it exists. The rules are applied before anything is built. Upper bounds are far above every
published model; below them, model size is checked against the size of the files (`checkpoint_files`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unimm.errors import UserError

DEEPEST = 32
"""Deepest nesting in a configuration file; published ones have five levels."""
LARGEST_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class Rule:
    """A constraint on a value, in words and as a test.

    Args:
        words: the constraint in words, for messages.
        holds: returns whether a single value, or an item of a list, is valid.
        items: the least and most items of a list; None if lists are not allowed.
        single: whether a value that is not a list is allowed.
        null: whether None is allowed.
    """

    words: str
    holds: Callable[[Any], bool]
    items: tuple[int, int] | None = None
    single: bool = True
    null: bool = False

    def allows(self, value: Any) -> bool:
        """Return whether the value, or each item if it is a list, is valid."""
        if value is None:
            return self.null
        if isinstance(value, list | tuple):
            least, most = self.items or (1, 0)
            return least <= len(value) <= most and all(self.holds(item) for item in value)
        return self.single and self.holds(value)

    def described(self) -> str:
        """Return the constraint in words, for messages."""
        words = self.words if self.single else ""
        if self.items is not None:
            least, most = self.items
            count = str(least) if least == most else f"{least} to {most}"
            words += f"{' or ' if words else ''}a list of {count}, each {self.words}"
        return words + (" or null" if self.null else "")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or (_is_whole(value) and abs(value) <= 10**31)


def whole(low: int, high: int, **more: Any) -> Rule:
    """Return the rule for an integer from `low` to `high`."""
    return Rule(f"a whole number from {low} to {high}", lambda value: _is_whole(value) and low <= value <= high, **more)


def number(low: float, high: float, *, above: bool = False, **more: Any) -> Rule:
    """Return the rule for a finite number from `low` (with `above`: greater than `low`) to `high`."""
    least = f"above {low:g}" if above else f"from {low:g}"
    return Rule(
        f"a number {least} to {high:g}",
        lambda value: _is_number(value) and (low < value if above else low <= value) and value <= high,
        **more,
    )


def one_of(*choices: str, **more: Any) -> Rule:
    """Return the rule for a string that is one of `choices`."""
    return Rule(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices, **more)


def _activation(value: Any) -> bool:
    from transformers.activations import ACT2FN

    return isinstance(value, str) and value in ACT2FN


def _dtype(value: Any) -> bool:
    import torch

    if isinstance(value, torch.dtype):
        return True
    return isinstance(value, str) and (
        value == "auto" or isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)
    )


def _attention(value: Any) -> bool:
    """Return whether `value` is an installed attention implementation (or a mapping of them).

    A name with a slash is a hub kernel that transformers would download and run; if the package `kernels` is installed,
    it does the same for a flash attention that is not installed.
    """
    from transformers import modeling_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, FLASH_ATTENTION_COMPATIBILITY_MATRIX

    if isinstance(value, Mapping):
        return all(each is None or _attention(each) for each in value.values())
    for version, facts in FLASH_ATTENTION_COMPATIBILITY_MATRIX.items():
        if value == f"flash_attention_{version}" and modeling_utils.is_kernels_available():
            return bool(facts["general_availability_check"]())
    return isinstance(value, str) and value in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())


def check_attention(value: Any) -> None:
    """Raise UserError unless `value` is an installed attention implementation, or None."""
    if not ATTENTION.allows(value):
        raise UserError(f"attn_implementation is {_shown(value)}, expected {ATTENTION.described()}.")


FLAG = Rule("true or false", lambda value: isinstance(value, bool))
SETTINGS = Rule("a mapping", lambda value: isinstance(value, Mapping) or hasattr(value, "to_dict"), null=True)
WIDTH, LAYERS, HEADS = whole(1, 2**20), whole(1, 1024), whole(1, 4096)
LAYER, SHARE = whole(-1024, 1024), number(0, 1)
TOKEN = whole(-1, 2**31 - 1, null=True)
EPSILON, SPREAD = number(0, 1, above=True), number(0, 100)
FACTOR = number(0, 2**16, above=True)
SIDE = whole(1, 2**16, items=(2, 2), null=True)
GRID = whole(1, 4096, items=(2, 2), single=False)
CHANNELS = number(-1000, 1000, items=(3, 3), single=False, null=True)
ACTIVATION = Rule("an activation that transformers knows", _activation)
ATTENTION = Rule(
    "an attention that is installed (eager, sdpa, flash_attention_2, flex_attention, ...): no kernel is fetched from "
    "the hub",
    _attention,
    null=True,
)
NO_MORE_THAN_NAMES = Rule("a list of words, or null", lambda value: isinstance(value, str), items=(0, 1024), null=True)


def _null(rule: Rule) -> Rule:
    return Rule(rule.words, rule.holds, rule.items, rule.single, null=True)


def _same(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    # widths, depths, counts
    **_same("hidden_size width projection_dim out_hidden_size sampler_inner_size n_embd ffn_dim", WIDTH),
    **_same("intermediate_size decoder_inner_size fusion_inner_size n_inner ffn_hidden_size", _null(WIDTH)),
    **_same("word_embed_proj_dim moe_intermediate_size", _null(WIDTH)),
    **_same("num_hidden_layers depth decoder_num_layers sampler_num_layers n_layer feature_layers", LAYERS),
    "decoder_num_hidden_layers": _null(LAYERS),
    **_same("num_attention_heads num_heads sampler_points n_head", HEADS),
    **_same("num_key_value_heads num_kv_heads num_ln_in_parallel_attn", _null(HEADS)),
    **_same("num_experts num_experts_per_tok decoder_sparse_step", whole(1, 2**16)),
    "mlp_only_layers": whole(0, 1024, items=(0, 1024), single=False, null=True),
    "head_dim": whole(1, 2**14, null=True),
    **_same("head_channels head_groups", whole(1, 2**14)),
    "head_multipliers": whole(1, 64, items=(1, 16), single=False),
    "mlp_ratio": number(0, 64, above=True),
    **_same("num_channels in_channels", whole(1, 64)),
    **_same("num_registers num_register_tokens", whole(0, 4096)),
    "vocab_size": whole(1, 2**24),
    **_same("codebook_size text_vocab_size image_vocab_start", whole(0, 2**24)),
    "codebook_dim": whole(1, 2**16),
    "num_classes": whole(1, 2**24),
    "num_labels": whole(0, 2**24),
    "pretraining_tp": whole(1, 4096, null=True),
    "chunk_size_feed_forward": whole(0, 2**31),
    # positions
    **_same("max_position_embeddings n_positions original_max_position_embeddings", whole(1, 2**31)),
    "num_position_embeddings": whole(1, 2**31),
    "sliding_window": whole(1, 2**31, null=True),
    "max_window_layers": whole(0, 2**20, null=True),
    "rope_theta": number(0, 1e15, above=True),
    **_same("rope_parameters rope_scaling", SETTINGS),
    "partial_rotary_factor": number(0, 1, above=True, null=True),
    "no_rope_layer_interval": whole(1, 1024),
    "no_rope_layers": whole(0, 1, items=(0, 1024), single=False, null=True),
    # images
    **_same("image_size patch_size temporal_patch_size", SIDE),
    "output_patch_size": whole(1, 4096, null=True),
    **_same("image_grid grid", GRID),
    "anchor_grid": whole(1, 4096),
    "image_seq_length": whole(1, 2**24, null=True),
    "image_mean": CHANNELS,
    "image_std": number(0, 1000, above=True, items=(3, 3), single=False, null=True),
    "rescale_factor": number(0, 1000, above=True, null=True),
    "resample": whole(0, 5, null=True),
    "spatial_merge_size": whole(1, 64),
    "downsample_ratio": number(0, 1, above=True),
    "window_size": whole(1, 2**16),
    "tokens_per_second": whole(1, 2**16),
    "image_position_mode": one_of("1d", "2d"),
    "pixel_head": one_of("patch", "conv"),
    "quantizer": one_of("simvq", "vq", "averaged", "normalized"),
    "vision_feature_select_strategy": one_of("default", "full", null=True),
    **_same("pos_embed_shift pos_embed_jitter pos_embed_rescale", number(-1000, 1000, null=True)),
    # layer indices
    **_same("feature_layer shallow_level deep_level", LAYER),
    "vision_feature_layer": whole(-1024, 1024, items=(1, 1024)),
    **_same(
        "levels deepstack_visual_indexes fullatt_block_indexes",
        whole(0, 1024, items=(0, 1024), single=False),
    ),
    **_same("layer_types architectures", NO_MORE_THAN_NAMES),
    # small numbers
    **_same("rms_norm_eps layer_norm_eps layer_norm_epsilon", EPSILON),
    **_same("initializer_range initializer_factor init_std", SPREAD),
    **_same("logits_scaling logit_scale embedding_multiplier residual_multiplier attention_multiplier", FACTOR),
    **_same("final_logit_softcapping attn_logit_softcapping query_pre_attn_scalar", _null(FACTOR)),
    "router_aux_loss_coef": number(0, 100),
    **_same("layer_scale_init_value layerscale_value", number(-1000, 1000)),
    **_same(
        """attention_dropout attention_probs_dropout_prob hidden_dropout_prob projection_dropout decoder_dropout dropout
        resid_pdrop embd_pdrop attn_pdrop hidden_dropout classifier_dropout layerdrop
        drop_path_rate token_dropout residual_dropout feed_forward_dropout class_dropout null_prompt_prob""",
        SHARE,
    ),
    # token ids
    **_same("bos_token_id pad_token_id boi_token_id eoi_token_id image_token_id", TOKEN),
    **_same("image_token_index video_token_id video_token_index", TOKEN),
    **_same("vision_start_token_id vision_end_token_id", TOKEN),
    "eos_token_id": whole(-1, 2**31 - 1, items=(0, 1024), null=True),
    "null_prompt": whole(0, 2**31 - 1, items=(0, 2**16), single=False),
    # flags
    **_same(
        """apply_layernorm apply_post_norm attention_bias codebook_bias train_codebook pre_quant_norm key_bias
        mlp_bias multimodal_projector_bias proj_bias qkv_bias query_bias value_bias reshape_hidden_states
        share_mask_token tie_word_embeddings use_absolute_position_embeddings use_gated_mlp use_mask_token
        use_mean_pooling use_qk_norm use_swiglu_ffn vision_use_head is_encoder_decoder mark_images
        head_bias finishes_logits qk_layernorm scale_attn_by_inverse_layer_idx scale_attn_weights is_decoder
        add_cross_attention reorder_and_upcast_attn use_parallel_residual enable_bias do_layer_norm_before
        layer_norm_elementwise_affine _remove_final_layer_norm alibi parallel_attn bias multi_query
        new_decoder_architecture norm_topk_prob output_router_logits""",
        FLAG,
    ),
    **_same("do_resize do_rescale do_normalize do_convert_rgb", _null(FLAG)),
    **_same("use_cache use_sliding_window output_hidden_states output_attentions", _null(FLAG)),
    "use_bidirectional_attention": _null(FLAG),
    "return_dict": _null(FLAG),
    # text tokenizers and generation
    "model_max_length": number(1, 1e31, null=True),
    **_same("padding_side truncation_side", one_of("left", "right", null=True)),
    **_same("temperature repetition_penalty guidance_scale", number(0, 1000, null=True)),
    "length_penalty": number(-1000, 1000, null=True),
    "top_p": number(0, 1, null=True),
    "top_k": whole(0, 2**31, null=True),
    "min_p": number(0, 1, null=True),
    "guidance_interval": whole(0, 2**31, items=(2, 2), single=False, null=True),
    "guidance_schedule": one_of("constant", "linear", null=True),
    **_same("max_new_tokens max_length min_new_tokens min_length", whole(0, 2**31, null=True)),
    **_same("num_beams num_return_sequences", whole(1, 2**16, null=True)),
    "do_sample": _null(FLAG),
    # names
    **_same("hidden_act projector_hidden_act hidden_activation activation_function activation", ACTIVATION),
    **_same("dtype torch_dtype", Rule("the name of a torch dtype", _dtype, null=True)),
    **_same("attn_implementation _attn_implementation", ATTENTION),
    "tokenizer_fingerprint": Rule("a word", lambda value: isinstance(value, str) and len(value) <= 128, null=True),
    "norm_type": one_of("layer_norm", "rms_norm"),
    **_same("encoder_config vision_config text_config host_config", SETTINGS),
}
"""Field name -> its rule, at any depth of a model's configuration."""

_SETTINGS_BELOW = ("image_processor", "image_generation", "image_editing")


def check_settings(fields: Mapping[str, Any], source: object) -> None:
    """Check configuration fields, nested ones too, from a file or a caller against `RULES`.

    Args:
        source: where the fields came from, for messages.

    Raises:
        UserError: a value of the wrong type or out of range, a number that is not finite, fields that contradict each
            other, or nesting that is too deep.
    """
    _check(fields, source, "", 0)


def _check(fields: Mapping[str, Any], source: object, prefix: str, depth: int) -> None:
    for name, value in fields.items():
        key = f"{prefix}{name}"
        rule = RULES.get(name) if isinstance(name, str) else None
        if rule is not None and not rule.allows(value):
            raise UserError(f"{source}: {key} is {_shown(value)}, expected {rule.described()}.")
        if isinstance(value, Mapping) and isinstance(name, str) and _holds_settings(name):
            _check(value, source, f"{key}.", depth + 1)
        else:
            _check_plain(value, source, key, depth + 1)
    _check_agreement(fields, source, prefix)


def _holds_settings(name: str) -> bool:
    """Return whether the field holds a nested model configuration.

    Configurations of other programs (`transformers.js_config`) are excluded: their field names mean other things.
    """
    other = name == "quantization_config" or "." in name
    return (name.endswith("_config") and not other) or name in _SETTINGS_BELOW


def _check_plain(value: Any, source: object, key: str, depth: int) -> None:
    """Raise UserError unless all numbers of a field are finite, integers fit 64 bits, and nesting is not too deep."""
    if depth > DEEPEST:
        raise UserError(f"{source}: {key[:60]} is nested more than {DEEPEST} levels deep.")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{source}: {key} is {value}, expected a finite number.")
    if _is_whole(value) and abs(value) > LARGEST_INTEGER and "max_length" not in key:  # "no limit" is written 10^30
        raise UserError(f"{source}: {key} is {_shown(value)}, expected at most {LARGEST_INTEGER}.")
    if isinstance(value, Mapping):
        for name, item in value.items():
            _check_plain(item, source, f"{key}.{name}", depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(item, source, key, depth + 1)


def _check_agreement(fields: Mapping[str, Any], source: object, prefix: str) -> None:
    """Raise UserError if two fields of one configuration contradict each other."""

    def given(*names: str) -> Sequence[Any] | None:
        values = [fields.get(name) for name in names]
        return values if all(_is_whole(value) for value in values) else None

    if (pair := given("num_attention_heads", "num_key_value_heads")) and pair[0] % pair[1]:
        raise UserError(
            f"{source}: {prefix}num_attention_heads {pair[0]} is no multiple of num_key_value_heads {pair[1]}."
        )
    if (pair := given("hidden_size", "num_attention_heads")) and fields.get("head_dim") is None and pair[0] % pair[1]:
        raise UserError(f"{source}: {prefix}hidden_size {pair[0]} is no multiple of num_attention_heads {pair[1]}.")
    if (pair := given("image_size", "patch_size")) and pair[1] > pair[0]:
        raise UserError(f"{source}: {prefix}patch_size {pair[1]} is larger than image_size {pair[0]}.")


def _shown(value: Any) -> str:
    """Return the value in at most 60 characters; the `repr` of a huge integer would have thousands."""
    if _is_whole(value) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)} entries"
    text = repr(value[:60] if isinstance(value, str) else value[:8] if isinstance(value, list | tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
