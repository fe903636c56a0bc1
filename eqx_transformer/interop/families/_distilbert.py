"""DistilBERT: BERT without token types and pooler, under other names."""

from typing import Any

from ...models import TransformerConfig
from .._fields import Fields
from ._bert import BUFFERS, RENAMED, read_bert, write_bert
from ._transformer import encoder_family

_HERE = "transformer.layer.{layer}."
_NAMES = {
    "embeddings.word_embeddings": "embedding.embedding",
    "embeddings.position_embeddings": "embedding.positions.table",
    "embeddings.LayerNorm": "embedding.norm",
    f"{_HERE}attention.q_lin": "stack.{layer}.attention.q_proj",
    f"{_HERE}attention.k_lin": "stack.{layer}.attention.k_proj",
    f"{_HERE}attention.v_lin": "stack.{layer}.attention.v_proj",
    f"{_HERE}attention.out_lin": "stack.{layer}.attention.o_proj",
    f"{_HERE}sa_layer_norm": "stack.{layer}.attention_residual.output_norm",
    f"{_HERE}ffn.lin1": "stack.{layer}.mlp.up_proj",
    f"{_HERE}ffn.lin2": "stack.{layer}.mlp.down_proj",
    f"{_HERE}output_layer_norm": "stack.{layer}.mlp_residual.output_norm",
}
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "dim",
    "d_ff": "hidden_dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "max_len": "max_position_embeddings",
}


def _read(fields: Fields) -> TransformerConfig:
    # The initialisation of the table of positions, and dropout.
    fields.ignore("sinusoidal_pos_embds", "dropout", "qa_dropout", "seq_classif_dropout")
    fields.ignore("tie_word_embeddings", "tie_weights_")
    return TransformerConfig(**read_bert(fields, _SIZES, "activation"), norm_eps=1e-12)


def _write(config: TransformerConfig) -> dict[str, Any]:
    return write_bert(config, _SIZES, "activation")


DISTILBERT = encoder_family(
    model_type="distilbert",
    prefix="distilbert.",
    name="DistilBert",
    read=_read,
    write=_write,
    names=_NAMES,
    parts="embeddings|transformer",
    masked_lm={
        "vocab_transform": "transform.linear",
        "vocab_layer_norm": "transform.norm",
        "vocab_projector": "head",
        "vocab_projector.bias": "logit_bias",
    },
    renamed=RENAMED,
    ignored=BUFFERS,
)
