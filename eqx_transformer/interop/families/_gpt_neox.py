"""GPT-NeoX and Pythia: attention and MLP side by side, partial rotary positions."""

from typing import Any

from ...models import LlamaConfig
from .._fields import Fields
from .._names import Into
from ._decoder import (
    BUFFERS,
    SIZES,
    decoder_family,
    read_activation,
    read_sizes,
    write_activation,
    write_sizes,
)
from ._rope import read_rope, write_rope

_HERE = "gpt_neox.layers.{layer}."
_SIZES = {**SIZES, "norm_eps": "layer_norm_eps"}


def _names(config: LlamaConfig) -> dict[str, str | Into]:
    parallel = config.parallel_residual != "none"
    return {
        "gpt_neox.embed_in": "embedding",
        f"{_HERE}input_layernorm": (
            "stack.{layer}.attention_norm" if parallel else "stack.{layer}.attention_residual.norm"
        ),
        f"{_HERE}post_attention_layernorm": (
            "stack.{layer}.mlp_norm" if parallel else "stack.{layer}.mlp_residual.norm"
        ),
        f"{_HERE}attention.query_key_value": Into(
            *(f"stack.{{layer}}.attention.{name}" for name in ("q_proj", "k_proj", "v_proj")),
            groups=config.num_heads,
        ),
        f"{_HERE}attention.dense": "stack.{layer}.attention.o_proj",
        f"{_HERE}mlp.dense_h_to_4h": "stack.{layer}.mlp.up_proj",
        f"{_HERE}mlp.dense_4h_to_h": "stack.{layer}.mlp.down_proj",
        "gpt_neox.final_layer_norm": "norm",
        "embed_out": "head",
    }


def _read(fields: Fields) -> LlamaConfig:
    sizes = read_sizes(fields, _SIZES)
    theta = fields.take("rotary_emb_base", 10_000.0)
    fraction = fields.take("rotary_pct", 0.25)
    bias = fields.take("attention_bias", True)
    parallel = fields.take("use_parallel_residual", True)
    return LlamaConfig(
        **sizes | read_rope(fields, sizes["max_len"], theta=theta, fraction=fraction),
        activation=read_activation(fields, "hidden_act", "gelu", gated=False),
        tie_embeddings=fields.take("tie_word_embeddings", False),
        parallel_residual="two_norms" if parallel else "none",
        norm="layer",
        norm_bias=True,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
    )


def _write(config: LlamaConfig) -> dict[str, Any]:
    fields = write_sizes(config, _SIZES) | write_rope(config)
    fields.pop("partial_rotary_factor", None)
    return fields | {
        "rotary_emb_base": fields.pop("rope_theta"),
        "rotary_pct": config.rotary_fraction,
        "hidden_act": write_activation(config),
        "tie_word_embeddings": config.tie_embeddings,
        "use_parallel_residual": config.parallel_residual != "none",
        "attention_bias": config.qkv_bias,
    }


GPT_NEOX = decoder_family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    read=_read,
    write=_write,
    names=_names,
    ignored=(*BUFFERS, r".*\.attention\.(bias|masked_bias)"),
    tied={"embed_out.weight": "gpt_neox.embed_in.weight"},
)
