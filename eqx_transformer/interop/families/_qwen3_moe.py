"""Qwen 3 with a mixture of experts in some layers."""

from typing import Any

from ...models import LlamaConfig, MoEConfig
from .._fields import Fields
from ._decoder import LAYER, LLAMA_NAMES, decoder_family, experts_of, read_llama, write_llama

_NAMES = {
    **LLAMA_NAMES,
    f"{LAYER}mlp.gate": "stack.{layer}.mlp.router",
    **{
        f"{LAYER}mlp.experts.{{expert}}.{name}": f"stack.{{layer}}.mlp.experts.{{expert}}.{name}"
        for name in ("gate_proj", "up_proj", "down_proj")
    },
}


def _read(fields: Fields) -> LlamaConfig:
    numbers = read_llama(fields)
    window = fields.take("sliding_window", 4096)
    if not fields.take("use_sliding_window", False):
        window = None
    # All layers have the window, or none.
    fields.ignore("max_window_layers")
    bias = fields.take("attention_bias", False)
    old_name = fields.take("num_local_experts", 128)
    return LlamaConfig(
        **numbers,
        window=window,
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        moe=MoEConfig(
            num_experts=fields.count("num_experts", old_name),
            experts_per_token=fields.take("num_experts_per_tok", 8),
            d_expert=fields.take("moe_intermediate_size", 768),
            renormalize=fields.take("norm_topk_prob", False),
            every=fields.take("decoder_sparse_step", 1),
            dense_layers=tuple(fields.take("mlp_only_layers", None) or ()),
        ),
    )


def _write(config: LlamaConfig) -> dict[str, Any]:
    moe = experts_of(config)
    return write_llama(config) | {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "attention_bias": config.qkv_bias,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.d_expert,
        "norm_topk_prob": moe.renormalize,
        "decoder_sparse_step": moe.every,
        "mlp_only_layers": list(moe.dense_layers),
    }


QWEN3_MOE = decoder_family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=_read,
    write=_write,
    names=_NAMES,
)
