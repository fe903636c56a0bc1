"""Falcon: one key head or groups of them, attention and MLP side by side."""

from typing import Any

from ...models import LlamaConfig
from .._fields import Fields
from .._names import Into
from ._decoder import (
    SIZES,
    decoder_family,
    read_activation,
    read_sizes,
    write_activation,
    write_sizes,
)
from ._rope import read_rope, write_rope

_HERE = "transformer.h.{layer}."
_SIZES = {**SIZES, "norm_eps": "layer_norm_epsilon", "d_ff": "ffn_hidden_size"}
_NORMS = {
    "two_norms": {"ln_attn": "attention_norm", "ln_mlp": "mlp_norm"},
    "one_norm": {"input_layernorm": "residual.norm"},
    "none": {
        "input_layernorm": "attention_residual.norm",
        "post_attention_layernorm": "mlp_residual.norm",
    },
}


def _names(config: LlamaConfig) -> dict[str, str | Into]:
    norms = _NORMS[config.parallel_residual]
    return {
        "transformer.word_embeddings": "embedding",
        **{f"{_HERE}{name}": f"stack.{{layer}}.{ours}" for name, ours in norms.items()},
        # All three layouts: for every key head its queries, then the key, then the value.
        f"{_HERE}self_attention.query_key_value": Into(
            *(f"stack.{{layer}}.attention.{name}" for name in ("q_proj", "k_proj", "v_proj")),
            groups=config.num_kv_heads or config.num_heads,
        ),
        f"{_HERE}self_attention.dense": "stack.{layer}.attention.o_proj",
        f"{_HERE}mlp.dense_h_to_4h": "stack.{layer}.mlp.up_proj",
        f"{_HERE}mlp.dense_4h_to_h": "stack.{layer}.mlp.down_proj",
        "transformer.ln_f": "norm",
        "lm_head": "head",
    }


def _read(fields: Fields) -> LlamaConfig:
    fields.default("ffn_hidden_size", None)
    fields.default("max_position_embeddings", 2048)
    sizes = read_sizes(fields, _SIZES)
    d_model, num_heads = sizes["d_model"], sizes["num_heads"]
    sizes["d_ff"] = sizes["d_ff"] or 4 * d_model
    new = fields.take("new_decoder_architecture", False)
    num_kv_heads = fields.take("num_kv_heads", None) or num_heads
    if fields.take("multi_query", True) and not new:
        num_kv_heads = 1
    parallel = fields.take("parallel_attn", True) or new
    num_norms = fields.take("num_ln_in_parallel_attn", None) or (2 if new else 1)
    layout = ("two_norms" if new and num_norms == 2 else "one_norm") if parallel else "none"
    rope = read_rope(fields, sizes["max_len"])
    alibi = fields.take("alibi", False)
    if alibi:
        positions = {"positions": "alibi", "alibi_scale": (d_model // num_heads) ** -0.5}
    else:
        positions = rope
    return LlamaConfig(
        **sizes | positions,
        num_kv_heads=num_kv_heads,
        activation=read_activation(fields, "activation", "gelu", gated=False),
        tie_embeddings=fields.take("tie_word_embeddings", True),
        parallel_residual=layout,
        norm="layer",
        norm_bias=True,
        use_bias=fields.take("bias", False),
    )


def _write(config: LlamaConfig) -> dict[str, Any]:
    new = config.parallel_residual == "two_norms" or (
        config.num_kv_heads not in (1, config.num_heads)
    )
    fields = {} if config.positions == "alibi" else write_rope(config)
    return (
        write_sizes(config, _SIZES)
        | fields
        | {
            "new_decoder_architecture": new,
            "num_kv_heads": config.num_kv_heads,
            "multi_query": config.num_kv_heads == 1,
            "parallel_attn": config.parallel_residual != "none",
            "num_ln_in_parallel_attn": 2 if config.parallel_residual == "two_norms" else 1,
            "alibi": config.positions == "alibi",
            "bias": config.mlp_bias,
            "activation": write_activation(config),
            "tie_word_embeddings": config.tie_embeddings,
        }
    )


FALCON = decoder_family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    read=_read,
    write=_write,
    names=_names,
    tied={"lm_head.weight": "transformer.word_embeddings.weight"},
)
