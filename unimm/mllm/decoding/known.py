"""Language models whose decoder layers are known in each detail, so that steps can compute with their weights alone."""

from typing import Any

from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

_PARTS = ("DecoderLayer", "Attention", "MLP", "RMSNorm")
_KNOWN = {
    getattr(module, f"{name}Model"): tuple(getattr(module, name + part) for part in _PARTS)
    for module, name in ((modeling_llama, "Llama"), (modeling_qwen2, "Qwen2"), (modeling_qwen3, "Qwen3"))
}
_STILL_ROPES = ("default", "linear", "llama3", "yarn")  # frequencies do not depend on the sequence length


def is_known(model: Any) -> bool:
    """Return whether the language model is a Llama, Qwen2 or Qwen3 as transformers builds it: full attention, no
    adapters, no hooks, no quantized or replaced parts, all weights of one type on one device."""
    text = model.model.language_model
    if type(text) not in _KNOWN:
        return False
    config, head = text.config, model.get_output_embeddings()
    norm_class = _KNOWN[type(text)][-1]
    known = {*_KNOWN[type(text)], nn.Linear, type(ACT2FN["silu"])}  # adapter modules have other types
    parts = [model, model.model, head, *text.modules()]
    rope = config.rope_parameters or {}
    weights = [*text.parameters(), *head.parameters()]
    return bool(
        config._attn_implementation in ("sdpa", "eager")
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in _STILL_ROPES
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and type(text.embed_tokens) is nn.Embedding
        and type(head) is nn.Linear
        and head.bias is None
        and type(text.norm) is norm_class
        and all({type(part) for part in layer.modules()} <= known for layer in text.layers)
        and all(layer.self_attn.scaling == layer.self_attn.head_dim**-0.5 for layer in text.layers)
        and not any(_is_changed(part) for part in parts)
        and len({(weight.dtype, weight.device) for weight in weights}) == 1
        and not head.weight.is_meta
    )


def _is_changed(part: nn.Module) -> bool:
    """Return whether this module has hooks, or a replaced forward or parametrized weights."""
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    return any(hooks) or "forward" in vars(part) or hasattr(part, "_hf_hook") or hasattr(part, "parametrizations")
