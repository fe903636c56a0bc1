"""Phi-3: fused projections, partial rotary positions, LongRoPE."""

from typing import Any

from ...models import LlamaConfig
from ...nn import LongRoPEScaling
from .._fields import Fields
from .._names import Into
from ._decoder import (
    EMBEDDING_NAMES,
    LAYER,
    PRE_NORM_NAMES,
    decoder_family,
    read_llama,
    write_llama,
)

_NAMES = {
    **EMBEDDING_NAMES,
    **PRE_NORM_NAMES,
    f"{LAYER}self_attn.qkv_proj": Into(
        *(f"stack.{{layer}}.attention.{name}" for name in ("q_proj", "k_proj", "v_proj"))
    ),
    f"{LAYER}self_attn.o_proj": "stack.{layer}.attention.o_proj",
    f"{LAYER}mlp.gate_up_proj": Into("stack.{layer}.mlp.gate_proj", "stack.{layer}.mlp.up_proj"),
    f"{LAYER}mlp.down_proj": "stack.{layer}.mlp.down_proj",
}


def _read(fields: Fields) -> LlamaConfig:
    fields.ignore("resid_pdrop", "embd_pdrop")
    return LlamaConfig(
        **read_llama(fields, original_max_len=4096, partial=True),
        window=fields.take("sliding_window", None),
    )


def _write(config: LlamaConfig) -> dict[str, Any]:
    fields = write_llama(config) | {"sliding_window": config.window}
    if isinstance(config.rope_scaling, LongRoPEScaling):
        # Outside rope_scaling it takes precedence.
        fields["original_max_position_embeddings"] = config.rope_scaling.original_max_len
    return fields


PHI3 = decoder_family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read=_read,
    write=_write,
    names=_NAMES,
)
