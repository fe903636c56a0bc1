"""Llama, and models that differ from it in a few numbers."""

from typing import Any

from ...models import LlamaConfig
from .._fields import Fields
from ._decoder import decoder_family, read_llama, write_llama


def _read(fields: Fields) -> LlamaConfig:
    bias = fields.take("attention_bias", False)
    return LlamaConfig(
        **read_llama(fields),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.take("mlp_bias", False),
    )


def _write(config: LlamaConfig) -> dict[str, Any]:
    return write_llama(config) | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


LLAMA = decoder_family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=_read,
    write=_write,
)
