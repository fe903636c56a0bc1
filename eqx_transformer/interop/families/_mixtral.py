"""Mixtral: Mistral with a mixture of experts in every layer."""

from typing import Any

from ...models import LlamaConfig, MoEConfig
from .._fields import Fields
from ._decoder import (
    ATTENTION_NAMES,
    EMBEDDING_NAMES,
    LAYER,
    PRE_NORM_NAMES,
    decoder_family,
    experts_of,
    read_llama,
    write_llama,
)

_EXPERT = "stack.{layer}.mlp.experts.{expert}"
_NAMES = {
    **EMBEDDING_NAMES,
    **ATTENTION_NAMES,
    **PRE_NORM_NAMES,
    f"{LAYER}block_sparse_moe.gate": "stack.{layer}.mlp.router",
    **{
        f"{LAYER}block_sparse_moe.experts.{{expert}}.{name}": f"{_EXPERT}.{ours}"
        for name, ours in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items()
    },
}


def _read(fields: Fields) -> LlamaConfig:
    # Noise on the router's input, in training only.
    fields.ignore("router_jitter_noise")
    return LlamaConfig(
        **read_llama(fields, theta=1e6),
        window=fields.take("sliding_window", None),
        moe=MoEConfig(
            num_experts=fields.count("num_local_experts", 8),
            experts_per_token=fields.take("num_experts_per_tok", 2),
        ),
    )


def _write(config: LlamaConfig) -> dict[str, Any]:
    moe = experts_of(config)
    return write_llama(config) | {
        "sliding_window": config.window,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
    }


MIXTRAL = decoder_family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read=_read,
    write=_write,
    names=_NAMES,
)
