"""OLMo 2: norms after the branches, and over all heads of queries and keys."""

from typing import Any

from ...models import LlamaConfig
from .._fields import Fields
from ._decoder import (
    ATTENTION_NAMES,
    EMBEDDING_NAMES,
    LAYER,
    MLP_NAMES,
    decoder_family,
    read_llama,
    write_llama,
)

_NAMES = {
    **EMBEDDING_NAMES,
    **ATTENTION_NAMES,
    **MLP_NAMES,
    f"{LAYER}post_attention_layernorm": "stack.{layer}.attention_residual.branch_norm",
    f"{LAYER}post_feedforward_layernorm": "stack.{layer}.mlp_residual.branch_norm",
}


def _read(fields: Fields) -> LlamaConfig:
    bias = fields.take("attention_bias", False)
    return LlamaConfig(
        **read_llama(fields),
        pre_norm=False,
        post_attention_norm=True,
        post_mlp_norm=True,
        qk_norm=True,
        qk_norm_over="projection",
        qkv_bias=bias,
        o_bias=bias,
    )


def _write(config: LlamaConfig) -> dict[str, Any]:
    return write_llama(config) | {"attention_bias": config.qkv_bias}


OLMO2 = decoder_family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    read=_read,
    write=_write,
    names=_NAMES,
)
