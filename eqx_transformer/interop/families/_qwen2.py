"""Qwen 2 and 2.5: biases on queries, keys and values; a window, if at all, in the last layers."""

from typing import Any

from ...models import LlamaConfig
from .._fields import Fields
from ._decoder import (
    decoder_family,
    read_layer_types,
    read_llama,
    windowed,
    write_layer_types,
    write_llama,
)


def read_last_windows(fields: Fields, num_layers: int) -> dict[str, Any]:
    """The window of the layers from `max_window_layers` on, if it is used at all."""
    window = fields.take("sliding_window", 4096)
    if not fields.take("use_sliding_window", False):
        window = None
    first = fields.take("max_window_layers", 28)
    default = ["sliding" if window and i >= first else "global" for i in range(num_layers)]
    return windowed(window, read_layer_types(fields, num_layers, default))


def write_last_windows(config: LlamaConfig) -> dict[str, Any]:
    """The inverse of `read_last_windows`."""
    types = write_layer_types(config)
    sliding = "sliding_attention" in types
    return {
        "use_sliding_window": sliding,
        "sliding_window": config.window,
        "max_window_layers": types.index("sliding_attention") if sliding else config.num_layers,
        "layer_types": types,
    }


def _read(fields: Fields) -> LlamaConfig:
    numbers = read_llama(fields)
    window = read_last_windows(fields, numbers["num_layers"])
    return LlamaConfig(**numbers, **window, qkv_bias=True)


def _write(config: LlamaConfig) -> dict[str, Any]:
    return write_llama(config) | write_last_windows(config)


QWEN2 = decoder_family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=_read,
    write=_write,
)
