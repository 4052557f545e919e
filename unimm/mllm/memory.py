"""The memory that a drawing takes, estimated before it starts: KV cache, reading the prompts, and a step's logits."""

from typing import Any

import psutil
import torch

from unimm.errors import UserError

_LOGITS = 4  # copies of a step's logits in float32: raw, guided, warped, with noise
_ACTIVATIONS = 4  # tensors of the width of the hidden states and of the MLP that live at once in a layer
_GB = 1e9


def check_memory(model: Any, rows: int, sequences: int, read: int, length: int) -> None:
    """Raise UserError if a drawing takes more memory than is free.

    Args:
        rows: rows of a step: sequences, and the other sides of guidance.
        read: token positions in the forward that reads the prompts.
        length: tokens of a row, prompt and image.
    """
    needed, free = drawing_bytes(model, rows, read, length), free_bytes(model)
    if needed > free:
        smaller = ((n, -(-rows * n // sequences)) for n in range(sequences - 1, 0, -1))
        fit = next((n for n, fewer in smaller if drawing_bytes(model, fewer, read, length) <= free), 0)
        advice = f"draw {fit} at a time" if fit else "use a smaller model or dtype"
        raise UserError(
            f"{sequences} images at once take about {needed / _GB:.3g} GB beside the model, and {free / _GB:.3g} GB "
            f"are free: {advice}."
        )


def drawing_bytes(model: Any, rows: int, read: int, length: int) -> int:
    """Estimate the bytes of a drawing, see `check_memory`."""
    config = model.config.get_text_config()
    layer = _ACTIVATIONS * max(read, rows) * (config.hidden_size + config.intermediate_size) * model.dtype.itemsize
    logits = _LOGITS * rows * model.visual_vocabulary.size * 4
    return cache_bytes_per_token(model) * rows * length + layer + logits


def cache_bytes_per_token(model: Any) -> int:
    """Return the bytes of keys and values that a token takes in the cache."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)


def free_bytes(model: Any) -> int:
    """Return the free memory of the devices that the language model lies on; what torch holds in reserve is free."""
    devices = {parameter.device for parameter in model.model.language_model.parameters()} - {torch.device("meta")}
    free = 0
    for device in devices:
        if device.type == "cuda":
            reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free += torch.cuda.mem_get_info(device)[0] + reserve
        else:
            free += psutil.virtual_memory().available
    return free
