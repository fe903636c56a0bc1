"""GPT-OSS: attention sinks, and a mixture of experts with clipped gates."""

from typing import Any

from ...models import LlamaConfig, MoEConfig
from .._fields import Fields
from .._names import Into
from ._decoder import (
    ATTENTION_NAMES,
    EMBEDDING_NAMES,
    LAYER,
    PRE_NORM_NAMES,
    decoder_family,
    experts_of,
    read_layer_types,
    read_llama,
    windowed,
    write_layer_types,
    write_llama,
)
from ._rope import write_scaling

_EXPERTS = "stack.{layer}.mlp.experts."


def _names(config: LlamaConfig) -> dict[str, str | Into]:
    d_expert = experts_of(config).d_expert or config.d_ff or 0
    return {
        **EMBEDDING_NAMES,
        **ATTENTION_NAMES,
        **PRE_NORM_NAMES,
        f"{LAYER}self_attn.sinks": "stack.{layer}.attention.sinks",
        f"{LAYER}mlp.router": "stack.{layer}.mlp.router",
        # Columns of gate and up alternate; these arrays are not transposed.
        f"{LAYER}mlp.experts.gate_up_proj": Into(
            f"{_EXPERTS}gate_proj.weight", f"{_EXPERTS}up_proj.weight", groups=d_expert
        ),
        f"{LAYER}mlp.experts.gate_up_proj_bias": Into(
            f"{_EXPERTS}gate_proj.bias", f"{_EXPERTS}up_proj.bias", groups=d_expert
        ),
        f"{LAYER}mlp.experts.down_proj": f"{_EXPERTS}down_proj.weight",
        f"{LAYER}mlp.experts.down_proj_bias": f"{_EXPERTS}down_proj.bias",
    }


_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read(fields: Fields) -> LlamaConfig:
    fields.choose("hidden_act", {"silu": "silu"}, "silu")
    # `gate * sigmoid(1.702 * gate)`.
    fields.choose("swiglu_alpha", {1.702: 1.702}, 1.702)
    # Other fields give these too.
    fields.ignore("initial_context_length", "experts_per_token")
    if not (fields.has("rope_parameters") or fields.has("rope_scaling")):
        fields.default("rope_scaling", _YARN)
    numbers = read_llama(fields, theta=150_000.0, head_dim=64)
    num_layers = numbers["num_layers"]
    alternating = [("sliding", "global")[i % 2] for i in range(num_layers)]
    types = read_layer_types(fields, num_layers, alternating)
    bias = fields.take("attention_bias", True)
    numbers["activation"] = "quick_geglu"
    return LlamaConfig(
        **numbers,
        **windowed(fields.take("sliding_window", 128), types),
        sinks=True,
        mlp_clip=fields.take("swiglu_limit", 7.0),
        mlp_up_offset=1.0,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        moe=MoEConfig(
            num_experts=fields.count("num_local_experts", 128),
            experts_per_token=fields.take("num_experts_per_tok", 4),
            router_bias=True,
        ),
    )


def _write(config: LlamaConfig) -> dict[str, Any]:
    moe = experts_of(config)
    return write_llama(config) | {
        "hidden_act": "silu",
        "rope_scaling": write_scaling(config.rope_scaling) or {"rope_type": "default"},
        "layer_types": write_layer_types(config),
        "sliding_window": config.window,
        "swiglu_limit": config.mlp_clip,
        "attention_bias": config.qkv_bias,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
    }


GPT_OSS = decoder_family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    read=_read,
    write=_write,
    names=_names,
)
