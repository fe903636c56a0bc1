"""BLOOM: ALiBi, and a norm after the embedding."""

from typing import Any

from ...models import LlamaConfig
from .._fields import Fields
from .._names import Into
from ._decoder import decoder_family, read_sizes, write_sizes

_HERE = "transformer.h.{layer}."
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "norm_eps": "layer_norm_epsilon",
}


def _names(config: LlamaConfig) -> dict[str, str | Into]:
    return {
        "transformer.word_embeddings": "embedding",
        "transformer.word_embeddings_layernorm": "embedding_norm",
        f"{_HERE}input_layernorm": "stack.{layer}.attention_residual.norm",
        f"{_HERE}self_attention.query_key_value": Into(
            *(f"stack.{{layer}}.attention.{name}" for name in ("q_proj", "k_proj", "v_proj")),
            groups=config.num_heads,
        ),
        f"{_HERE}self_attention.dense": "stack.{layer}.attention.o_proj",
        f"{_HERE}post_attention_layernorm": "stack.{layer}.mlp_residual.norm",
        f"{_HERE}mlp.dense_h_to_4h": "stack.{layer}.mlp.up_proj",
        f"{_HERE}mlp.dense_4h_to_h": "stack.{layer}.mlp.down_proj",
        "transformer.ln_f": "norm",
        "lm_head": "head",
    }


def _read(fields: Fields) -> LlamaConfig:
    # Implementation details of training.
    fields.ignore("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion")
    fields.ignore("skip_bias_add", "skip_bias_add_qkv", "slow_but_exact", "offset_alibi")
    old_names = {"n_embed": "hidden_size", "num_hidden_layers": "n_layer"}
    old_names["num_attention_heads"] = "n_head"
    for old, name in old_names.items():
        fields.rename(old, name)
    numbers = read_sizes(fields, _SIZES)
    return LlamaConfig(
        **numbers,
        d_ff=4 * numbers["d_model"],
        # The length in training; ALiBi has no maximum length.
        max_len=fields.take("seq_length", 2048),
        tie_embeddings=fields.take("tie_word_embeddings", True),
        embedding_norm=True,
        norm="layer",
        norm_bias=True,
        positions="alibi",
        activation="gelu_tanh",
        use_bias=True,
    )


def _write(config: LlamaConfig) -> dict[str, Any]:
    return write_sizes(config, _SIZES) | {
        "seq_length": config.max_len,
        "tie_word_embeddings": config.tie_embeddings,
    }


BLOOM = decoder_family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    read=_read,
    write=_write,
    names=_names,
    tied={"lm_head.weight": "transformer.word_embeddings.weight"},
    renamed=((r"^(word_embeddings|word_embeddings_layernorm|h|ln_f)\.", r"transformer.\1."),),
)
