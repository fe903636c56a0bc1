"""DeepSeek V2 and V3: latent attention, and many small experts in groups."""

from typing import Any

from ...models import LlamaConfig, MLAConfig, MoEConfig
from .._fields import Fields
from ._decoder import (
    BUFFERS,
    EMBEDDING_NAMES,
    LAYER,
    MLP_NAMES,
    PRE_NORM_NAMES,
    decoder_family,
    experts_of,
    read_activation,
    read_sizes,
    write_activation,
    write_sizes,
)
from ._rope import read_rope, write_rope

_ATTENTION = {
    "q_proj": "q_proj",
    "q_a_proj": "q_down_proj",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "q_up_proj",
    "kv_a_proj_with_mqa": "kv_down_proj",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "kv_up_proj",
    "o_proj": "o_proj",
}
_NAMES = {
    **EMBEDDING_NAMES,
    **PRE_NORM_NAMES,
    **MLP_NAMES,
    **{
        f"{LAYER}self_attn.{name}": f"stack.{{layer}}.attention.{ours}"
        for name, ours in _ATTENTION.items()
    },
    f"{LAYER}mlp.gate": "stack.{layer}.mlp.router",
    f"{LAYER}mlp.gate.e_score_correction_bias": "stack.{layer}.mlp.selection_bits",
    **{
        f"{LAYER}mlp.{there}.{name}": f"stack.{{layer}}.mlp.{there}.{name}"
        for there in ("experts.{expert}", "shared_experts")
        for name in ("gate_proj", "up_proj", "down_proj")
    },
}


def _read_common(fields: Fields) -> dict[str, Any]:
    # Options of training and parallelism.
    fields.ignore("ep_size", "aux_loss_alpha", "seq_aux", "num_key_value_heads")
    # All sizes of heads have fields of their own.
    fields.ignore("head_dim", "qk_head_dim")
    # first_k_dense_replace says which layers have experts.
    fields.choose("moe_layer_freq", {1: 1}, 1)
    sizes = read_sizes(fields)
    bias = fields.take("attention_bias", False)
    rope = read_rope(fields, sizes["max_len"])
    return {
        **sizes,
        **{name: rope[name] for name in ("rope_theta", "rope_scaling", "max_len")},
        "activation": read_activation(fields, "hidden_act", "silu", gated=True),
        "tie_embeddings": fields.take("tie_word_embeddings", False),
        "qkv_bias": bias,
        "o_bias": bias,
        "mla": MLAConfig(
            q_rank=fields.take("q_lora_rank", 1536),
            kv_rank=fields.take("kv_lora_rank", 512),
            nope_head_dim=fields.take("qk_nope_head_dim", 128),
            rope_head_dim=fields.take("qk_rope_head_dim", 64),
            v_head_dim=fields.take("v_head_dim", 128),
        ),
    }


def _read_experts(fields: Fields, *, first_dense: int, shared: int, experts: int) -> dict[str, Any]:
    return {
        "num_experts": fields.count("n_routed_experts", experts),
        "experts_per_token": fields.take("num_experts_per_tok", 8),
        "d_expert": fields.take("moe_intermediate_size"),
        "num_shared_experts": fields.take("n_shared_experts", shared) or 0,
        "first_dense": fields.take("first_k_dense_replace", first_dense) or 0,
    }


def _write(config: LlamaConfig) -> dict[str, Any]:
    moe, mla = experts_of(config), config.mla
    if mla is None:
        raise ValueError("there is no latent attention.")
    return {
        **write_sizes(config),
        **write_rope(config),
        "hidden_act": write_activation(config),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "num_key_value_heads": config.num_heads,
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.nope_head_dim,
        "qk_rope_head_dim": mla.rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.d_expert,
        "n_shared_experts": moe.num_shared_experts,
        "first_k_dense_replace": moe.first_dense,
        "routed_scaling_factor": moe.route_scale,
        "norm_topk_prob": moe.renormalize,
        "n_group": moe.num_groups,
        "topk_group": moe.top_groups,
    }


def _read_v2(fields: Fields) -> LlamaConfig:
    numbers = _read_common(fields)
    bias = fields.take("mlp_bias", False)
    fields.choose("scoring_func", {"softmax": 1}, "softmax")
    # transformers ignores it: the weights are never normalised.
    fields.ignore("norm_topk_prob")
    groups: dict[str, Any] = {
        "num_groups": fields.take("n_group", None) or 1,
        "top_groups": fields.take("topk_group", None) or 1,
    }
    methods = {"greedy": False, "group_limited_greedy": True}
    if not fields.choose("topk_method", methods, "greedy"):
        groups = {}
    return LlamaConfig(
        **numbers,
        mlp_bias=bias,
        rope_interleaved=True,
        moe=MoEConfig(
            **_read_experts(fields, first_dense=0, shared=2, experts=64),
            **groups,
            route_scale=fields.take("routed_scaling_factor", 1.0),
            renormalize=False,
        ),
    )


def _write_v2(config: LlamaConfig) -> dict[str, Any]:
    grouped = experts_of(config).num_groups > 1
    return _write(config) | {
        "mlp_bias": config.mlp_bias,
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy" if grouped else "greedy",
    }


def _read_v3(fields: Fields) -> LlamaConfig:
    numbers = _read_common(fields)
    fields.choose("scoring_func", {"sigmoid": 1}, "sigmoid")
    fields.choose("topk_method", {"noaux_tc": 1}, "noaux_tc")
    # A layer that predicts a further token, used in training.
    fields.ignore("num_nextn_predict_layers", "num_mtp_layers")
    num_groups = fields.take("n_group", 8) or 1
    return LlamaConfig(
        **numbers,
        rope_interleaved=fields.take("rope_interleave", True),
        moe=MoEConfig(
            **_read_experts(fields, first_dense=3, shared=1, experts=256),
            num_groups=num_groups,
            top_groups=fields.take("topk_group", 4) or 1,
            group_score="top2" if num_groups > 1 else "max",
            route_scale=fields.take("routed_scaling_factor", 2.5),
            renormalize=fields.take("norm_topk_prob", True),
            scores="sigmoid",
            selection_bias=True,
        ),
    )


def _write_v3(config: LlamaConfig) -> dict[str, Any]:
    return _write(config) | {
        "rope_interleave": config.rope_interleaved,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


DEEPSEEK_V2 = decoder_family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    read=_read_v2,
    write=_write_v2,
    names=_NAMES,
)
DEEPSEEK_V3 = decoder_family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read=_read_v3,
    write=_write_v3,
    names=_NAMES,
    # The layer that predicts a further token comes after the last one.
    ignored=(*BUFFERS, r"model\.layers\.{num_layers}\..*"),
)
