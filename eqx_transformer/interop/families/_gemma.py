"""Gemma: offsets in the norms, scaled embeddings, tanh GELU."""

import math
from typing import Any

from ...models import LlamaConfig
from .._fields import Fields
from ._decoder import decoder_family, read_llama, write_activation, write_llama


def read_gemma(fields: Fields, *, theta: float = 10_000.0) -> dict[str, Any]:
    """What the three generations have in common."""
    # Both fields, and both values, mean the tanh approximation.
    for name in ("hidden_act", "hidden_activation"):
        fields.choose(name, {"gelu": 1, "gelu_pytorch_tanh": 1, None: 1}, None)
    bias = fields.take("attention_bias", False)
    numbers = read_llama(fields, tied=True, theta=theta, head_dim=256)
    return numbers | {
        "activation": "geglu_tanh",
        "embedding_scale": math.sqrt(numbers["d_model"]),
        "norm_offset": 1.0,
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _read(fields: Fields) -> LlamaConfig:
    return LlamaConfig(**read_gemma(fields))


def _write(config: LlamaConfig) -> dict[str, Any]:
    return write_llama(config) | {
        "hidden_activation": write_activation(config),
        "attention_bias": config.qkv_bias,
    }


GEMMA = decoder_family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    read=_read,
    write=_write,
)
