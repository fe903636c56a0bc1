"""ELECTRA: BERT with smaller embeddings, a discriminator and a generator."""

import functools
from typing import Any

from ...models import TokenClassifier, TransformerConfig
from .._family import Family
from .._fields import Fields
from ._bert import BUFFERS, NAMES, RENAMED, read_bert, write_bert
from ._transformer import differences, encoder_family, encoder_names

_NAMES = {there: here for there, here in NAMES.items() if here != "pooler"} | {
    "embeddings_project": "embedding.projection"
}
_PARTS = "embeddings|embeddings_project|encoder"
_DISCRIMINATOR = {
    "discriminator_predictions.dense": "transform.linear",
    "discriminator_predictions.dense_prediction": "head",
}


def _read(fields: Fields) -> TransformerConfig:
    fields.ignore("tie_word_embeddings")
    fields.ignore("summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout")
    numbers = read_bert(fields)
    size = fields.take("embedding_size", 128)
    return TransformerConfig(
        **numbers,
        d_embedding=None if size == numbers["d_model"] else size,
        norm_eps=fields.take("layer_norm_eps", 1e-12),
        num_token_types=fields.take("type_vocab_size", 2),
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    return write_bert(config) | {
        "embedding_size": config.embedding_dim,
        "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.num_token_types or 0,
    }


_PRETRAINING = Family(
    model_type="electra",
    architecture="ElectraForPreTraining",
    model=functools.partial(TokenClassifier, num_classes=1, transform="linear"),
    read=_read,
    write=_write,
    differences=differences,
    names=lambda config: encoder_names(_NAMES, "electra.") | _DISCRIMINATOR,
    renamed=RENAMED,
    ignored=(*BUFFERS, r"generator_(predictions|lm_head)\..*"),
)
ELECTRA = encoder_family(
    model_type="electra",
    prefix="electra.",
    name="Electra",
    read=_read,
    write=_write,
    names=_NAMES,
    parts=_PARTS,
    masked_lm={
        "generator_predictions.dense": "transform.linear",
        "generator_predictions.LayerNorm": "transform.norm",
        "generator_lm_head": "head",
        "generator_lm_head.bias": "logit_bias",
    },
    renamed=RENAMED,
    ignored=(*BUFFERS, r"discriminator_predictions\..*"),
    heads=(_PRETRAINING,),
)
