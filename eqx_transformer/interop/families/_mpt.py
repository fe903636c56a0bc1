"""MPT: ALiBi, and no bias anywhere."""

from typing import Any

from ...models import LlamaConfig
from .._fields import Fields
from .._names import Into
from ._decoder import decoder_family, read_sizes, write_sizes

_HERE = "transformer.blocks.{layer}."
_NAMES = {
    "transformer.wte": "embedding",
    f"{_HERE}norm_1": "stack.{layer}.attention_residual.norm",
    f"{_HERE}attn.Wqkv": Into(
        *(f"stack.{{layer}}.attention.{name}" for name in ("q_proj", "k_proj", "v_proj"))
    ),
    f"{_HERE}attn.out_proj": "stack.{layer}.attention.o_proj",
    f"{_HERE}norm_2": "stack.{layer}.mlp_residual.norm",
    f"{_HERE}ffn.up_proj": "stack.{layer}.mlp.up_proj",
    f"{_HERE}ffn.down_proj": "stack.{layer}.mlp.down_proj",
    "transformer.norm_f": "norm",
    "lm_head": "head",
}
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "max_len": "max_seq_len",
}


def _read(fields: Fields) -> LlamaConfig:
    # The embedding's gradient, initialisation, and what ALiBi replaces.
    fields.ignore("embedding_fraction", "init_device", "init_config", "learned_pos_emb", "verbose")
    fields.ignore("emb_pdrop", "resid_pdrop", "loss_fn", "tokenizer_name")
    numbers = read_sizes(fields, _SIZES)
    # transformers always computes these values, whatever the fields.
    fields.choose("expansion_ratio", {4: 4}, 4)
    fields.choose("no_bias", {True: True}, True)
    fields.choose("norm_type", {"low_precision_layernorm": 1, "layernorm": 1}, "layernorm")
    attention = fields.nested("attn_config") or Fields({}, "")
    attention.ignore("attn_impl", "attn_pdrop", "model_type")
    attention.choose("attn_type", {"multihead_attention": 1}, "multihead_attention")
    attention.choose("alibi", {True: True}, True)
    attention.choose("alibi_bias_max", {8: 8}, 8)
    numbers["clip_qkv"] = attention.take("clip_qkv", None)
    numbers["query_scale"] = attention.take("softmax_scale", None)
    attention.finish()
    return LlamaConfig(
        **numbers,
        d_ff=4 * numbers["d_model"],
        norm_eps=fields.take("layer_norm_epsilon", 1e-5),
        tie_embeddings=fields.take("tie_word_embeddings", True),
        norm="layer",
        positions="alibi",
        activation="gelu",
    )


def _write(config: LlamaConfig) -> dict[str, Any]:
    return write_sizes(config, _SIZES) | {
        "expansion_ratio": 4,
        "no_bias": True,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_config": {
            "alibi": True,
            "clip_qkv": config.clip_qkv,
            "softmax_scale": config.query_scale,
        },
    }


MPT = decoder_family(
    model_type="mpt",
    architecture="MptForCausalLM",
    read=_read,
    write=_write,
    names=_NAMES,
    tied={"lm_head.weight": "transformer.wte.weight"},
)
