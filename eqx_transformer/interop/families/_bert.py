"""BERT, and what its relatives share with it: norms after each sum, learned positions."""

from collections.abc import Mapping
from typing import Any, Final

from ...models import TransformerConfig
from .._fields import Fields
from ._decoder import read_activation, write_activation
from ._transformer import DROPOUT, encoder_family

_HERE: Final = "encoder.layer.{layer}."
NAMES: Final = {
    "embeddings.word_embeddings": "embedding.embedding",
    "embeddings.position_embeddings": "embedding.positions.table",
    "embeddings.token_type_embeddings": "embedding.token_types",
    "embeddings.LayerNorm": "embedding.norm",
    f"{_HERE}attention.self.query": "stack.{layer}.attention.q_proj",
    f"{_HERE}attention.self.key": "stack.{layer}.attention.k_proj",
    f"{_HERE}attention.self.value": "stack.{layer}.attention.v_proj",
    f"{_HERE}attention.output.dense": "stack.{layer}.attention.o_proj",
    f"{_HERE}attention.output.LayerNorm": "stack.{layer}.attention_residual.output_norm",
    f"{_HERE}intermediate.dense": "stack.{layer}.mlp.up_proj",
    f"{_HERE}output.dense": "stack.{layer}.mlp.down_proj",
    f"{_HERE}output.LayerNorm": "stack.{layer}.mlp_residual.output_norm",
    "pooler.dense": "pooler",
}
PARTS: Final = "embeddings|encoder|pooler"
# Names in files of the first releases, and a buffer.
RENAMED: Final = (
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
)
BUFFERS: Final = (r".*embeddings\.(position_ids|token_type_ids)",)
_SIZES: Final = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_len": "max_position_embeddings",
}


def read_bert(
    fields: Fields, sizes: Mapping[str, str] = _SIZES, activation: str = "hidden_act"
) -> dict[str, Any]:
    """The fields that BERT's relatives have in common with it.

    Arguments:

    - `fields`: to read.
    - `sizes`: the names of the sizes.
    - `activation`: the name of the activation.
    """
    fields.ignore(*DROPOUT)
    fields.choose("position_embedding_type", {"absolute": None}, "absolute")
    return {
        **{ours: fields.take(name) for ours, name in sizes.items()},
        "activation": read_activation(fields, activation, "gelu", gated=False),
        "pad_token_id": None,
        "embedding_norm": True,
        "positions": "learned",
        "layout": "post",
        "final_norm": False,
        "dropout_rate": 0.0,
    }


def write_bert(
    config: TransformerConfig, sizes: Mapping[str, str] = _SIZES, activation: str = "hidden_act"
) -> dict[str, Any]:
    """The inverse of `read_bert`."""
    return {
        **{name: getattr(config, ours) for ours, name in sizes.items()},
        activation: write_activation(config),
    }


def _read(fields: Fields) -> TransformerConfig:
    # Fields of the pooler in some files; transformers ignores them.
    fields.ignore(
        *("directionality", "pooler_fc_size", "pooler_num_attention_heads"),
        *("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
    )
    fields.ignore("tie_word_embeddings")
    return TransformerConfig(
        **read_bert(fields),
        norm_eps=fields.take("layer_norm_eps", 1e-12),
        num_token_types=fields.take("type_vocab_size", 2),
        pooler=True,
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    return write_bert(config) | {
        "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.num_token_types or 0,
    }


BERT = encoder_family(
    model_type="bert",
    prefix="bert.",
    name="Bert",
    read=_read,
    write=_write,
    names=NAMES,
    parts=PARTS,
    masked_lm={
        "cls.predictions.transform.dense": "transform.linear",
        "cls.predictions.transform.LayerNorm": "transform.norm",
        "cls.predictions.decoder": "head",
        "cls.predictions.bias": "logit_bias",
    },
    masked_lm_bias="cls.predictions.decoder.bias",
    renamed=RENAMED,
    # The head of BERT's second training task, which files for masked tokens may have as well.
    ignored=(*BUFFERS, r"cls\.seq_relationship\..*"),
)
