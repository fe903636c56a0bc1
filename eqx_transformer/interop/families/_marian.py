"""Marian: BART with fixed positions, and without a norm of embeddings."""

from typing import Any

from ...models import TransformerConfig
from .._fields import Fields
from ._bart import RENAMED, TIED, adapt, bart_names, read_seq2seq, write_seq2seq
from ._transformer import seq2seq_family


def _read(fields: Fields) -> TransformerConfig:
    # Options of other models in its first implementation, which transformers ignores.
    fields.ignore(
        *("normalize_before", "normalize_embedding", "add_final_layer_norm", "add_bias_logits"),
        *("static_position_embeddings", "extra_pos_embeddings", "force_bos_token_to_be_generated"),
    )
    fields.choose("share_encoder_decoder_embeddings", {True: None}, True)
    numbers = read_seq2seq(fields)
    fields.choose("decoder_vocab_size", {numbers["vocab_size"]: None, None: None}, None)
    return TransformerConfig(
        **numbers,
        max_len=fields.take("max_position_embeddings"),
        head_bias=True,
        positions="sinusoidal_halves",
        layout="post",
        final_norm=False,
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    return write_seq2seq(config) | {
        "max_position_embeddings": config.max_len,
        "decoder_vocab_size": config.vocab_size,
        # As in all published models: the last token is padding, and begins the target.
        "pad_token_id": config.vocab_size - 1,
        "decoder_start_token_id": config.vocab_size - 1,
    }


MARIAN = seq2seq_family(
    model_type="marian",
    architecture="MarianMTModel",
    read=_read,
    write=_write,
    names=bart_names,
    ignored=(r"model\.(encoder|decoder)\.embed_positions\.weight",),
    renamed=RENAMED,
    tied=TIED,
    adapt=adapt,
)
