"""Gemma 2: norms on both sides of every branch, soft caps, windows in every other layer."""

from typing import Any

from ...models import LlamaConfig
from .._fields import Fields
from ._decoder import (
    ATTENTION_NAMES,
    EMBEDDING_NAMES,
    LAYER,
    MLP_NAMES,
    decoder_family,
    read_layer_types,
    windowed,
    write_activation,
    write_layer_types,
    write_llama,
    write_query_scale,
)
from ._gemma import read_gemma

NAMES = {
    **EMBEDDING_NAMES,
    **ATTENTION_NAMES,
    **MLP_NAMES,
    f"{LAYER}input_layernorm": "stack.{layer}.attention_residual.norm",
    f"{LAYER}post_attention_layernorm": "stack.{layer}.attention_residual.branch_norm",
    f"{LAYER}pre_feedforward_layernorm": "stack.{layer}.mlp_residual.norm",
    f"{LAYER}post_feedforward_layernorm": "stack.{layer}.mlp_residual.branch_norm",
}


def _read(fields: Fields) -> LlamaConfig:
    numbers = read_gemma(fields)
    alternating = [("sliding", "global")[i % 2] for i in range(numbers["num_layers"])]
    types = read_layer_types(fields, numbers["num_layers"], alternating)
    return LlamaConfig(
        **numbers,
        **windowed(fields.take("sliding_window", 4096), types),
        post_attention_norm=True,
        post_mlp_norm=True,
        query_scale=fields.take("query_pre_attn_scalar", 256) ** -0.5,
        attention_soft_cap=fields.take("attn_logit_softcapping", 50.0),
        logit_soft_cap=fields.take("final_logit_softcapping", 30.0),
    )


def _write(config: LlamaConfig) -> dict[str, Any]:
    return write_llama(config) | {
        "hidden_activation": write_activation(config),
        "attention_bias": config.qkv_bias,
        "layer_types": write_layer_types(config),
        "sliding_window": config.window,
        "query_pre_attn_scalar": write_query_scale(config),
        "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.logit_soft_cap,
    }


GEMMA2 = decoder_family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read=_read,
    write=_write,
    names=NAMES,
)
