"""Qwen 3: every head of queries and keys is normalised."""

from typing import Any

from ...models import LlamaConfig
from .._fields import Fields
from ._decoder import decoder_family, read_llama, write_llama
from ._qwen2 import read_last_windows, write_last_windows


def _read(fields: Fields) -> LlamaConfig:
    numbers = read_llama(fields, head_dim=128)
    window = read_last_windows(fields, numbers["num_layers"])
    bias = fields.take("attention_bias", False)
    return LlamaConfig(**numbers, **window, qk_norm=True, qkv_bias=bias, o_bias=bias)


def _write(config: LlamaConfig) -> dict[str, Any]:
    return write_llama(config) | write_last_windows(config) | {"attention_bias": config.qkv_bias}


QWEN3 = decoder_family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=_read,
    write=_write,
)
