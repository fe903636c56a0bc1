"""RoBERTa: BERT with positions that do not count padding, and another head."""

from typing import Any

from ...models import TransformerConfig
from .._fields import Fields
from ._bert import BUFFERS, NAMES, PARTS, RENAMED, read_bert, write_bert
from ._transformer import encoder_family


def _read(fields: Fields) -> TransformerConfig:
    fields.ignore("tie_word_embeddings")
    padding = fields.take("pad_token_id", 1)
    numbers = read_bert(fields)
    numbers["max_len"] -= padding + 1
    return TransformerConfig(
        **numbers,
        norm_eps=fields.take("layer_norm_eps", 1e-12),
        num_token_types=fields.take("type_vocab_size", 2),
        position_offset=padding + 1,
        uncounted_token_id=padding,
        pooler=True,
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    return write_bert(config) | {
        "max_position_embeddings": config.max_len + config.position_offset,
        "pad_token_id": config.uncounted_token_id,
        "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.num_token_types or 0,
    }


ROBERTA = encoder_family(
    model_type="roberta",
    prefix="roberta.",
    name="Roberta",
    read=_read,
    write=_write,
    names=NAMES,
    parts=PARTS,
    masked_lm={
        "lm_head.dense": "transform.linear",
        "lm_head.layer_norm": "transform.norm",
        "lm_head.decoder": "head",
        "lm_head.bias": "logit_bias",
    },
    masked_lm_bias="lm_head.decoder.bias",
    renamed=RENAMED,
    ignored=BUFFERS,
)
