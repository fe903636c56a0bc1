"""Whisper: convolutions over sound, an encoder, and a decoder with norms before each branch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...models import TransformerConfig, Whisper, WhisperConfig
from .._family import Family
from .._fields import Fields
from ._bart import RENAMED, layer_names, read_seq2seq, write_seq2seq
from ._transformer import completed, differences


def _read(fields: Fields) -> WhisperConfig:
    # Fields of training, of classification, and of word timestamps.
    fields.ignore(
        *("apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_time_min_masks"),
        *("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks"),
        *("classifier_proj_size", "median_filter_width", "forced_decoder_ids"),
    )
    numbers = read_seq2seq(fields)
    return WhisperConfig(
        num_mel_bins=fields.take("num_mel_bins", 80),
        max_source_len=fields.take("max_source_positions", 1500),
        transformer=TransformerConfig(
            **numbers,
            max_len=fields.take("max_target_positions", 448),
            positions="learned",
            k_bias=False,
        ),
    )


def _write(config: WhisperConfig) -> dict[str, Any]:
    transformer = completed(config.transformer)
    return write_seq2seq(transformer) | {
        "num_mel_bins": config.num_mel_bins,
        "max_source_positions": config.max_source_len,
        "max_target_positions": transformer.max_len,
        # That of the published models, if it is an id of the vocabulary.
        "pad_token_id": min(50_256, transformer.vocab_size - 1),
    }


def _differences(a: WhisperConfig, b: WhisperConfig) -> list[str]:
    own = [x.name for x in dataclasses.fields(WhisperConfig) if x.name != "transformer"]
    found = [name for name in own if getattr(a, name) != getattr(b, name)]
    return found + differences(a.transformer, b.transformer)


_NAMES: Mapping[str, str] = layer_names("norm") | {
    "model.encoder.conv1": "conv1",
    "model.encoder.conv2": "conv2",
    "model.encoder.embed_positions": "positions.table",
    "model.encoder.layer_norm": "encoder_norm",
    "model.decoder.embed_tokens": "embedding.embedding",
    "model.decoder.embed_positions": "embedding.positions.table",
    "model.decoder.layer_norm": "decoder_norm",
    "proj_out": "head",
}
WHISPER = Family(
    model_type="whisper",
    architecture="WhisperForConditionalGeneration",
    model=Whisper,
    read=_read,
    write=_write,
    differences=_differences,
    names=lambda config: _NAMES,
    renamed=RENAMED,
    tied={"proj_out.weight": "model.decoder.embed_tokens.weight"},
)
