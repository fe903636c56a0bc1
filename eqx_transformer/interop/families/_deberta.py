"""DeBERTa, versions 2 and 3: BERT with vectors of distances."""

import dataclasses
from typing import Any

from ...models import DeBERTa, DeBERTaConfig, TransformerConfig
from .._family import Family
from .._fields import Fields
from ._bert import BUFFERS, NAMES, RENAMED, read_bert, write_bert
from ._transformer import differences

_HERE = "encoder.layer.{layer}.attention.self."
_NAMES = {
    there.replace(".query", ".query_proj")
    .replace(".key", ".key_proj")
    .replace(".value", ".value_proj"): here
    for there, here in NAMES.items()
    if here != "pooler"
} | {
    f"{_HERE}pos_key_proj": "stack.{layer}.attention.pos_k_proj",
    f"{_HERE}pos_query_proj": "stack.{layer}.attention.pos_q_proj",
    "encoder.rel_embeddings": "relative",
    "encoder.LayerNorm": "relative_norm",
    "encoder.conv.conv": "convolution",
    "encoder.conv.LayerNorm": "convolution_norm",
}


def _read(fields: Fields) -> DeBERTaConfig:
    # Fields of heads that are not read.
    fields.ignore(
        *("pooler_dropout", "pooler_hidden_act", "pooler_hidden_size", "legacy"),
        *("tie_word_embeddings", "summary_type", "attention_head_size"),
    )
    fields.choose("relative_attention", {True: None}, False)
    numbers = read_bert(fields)
    fields.choose("embedding_size", {numbers["d_model"]: None}, numbers["d_model"])
    if not fields.take("position_biased_input", True):
        numbers["positions"] = "none"
    terms = fields.take("pos_att_type", None) or []
    terms = terms.lower().split("|") if isinstance(terms, str) else terms
    terms = [term.strip() for term in terms]
    if not set(terms) <= {"c2p", "p2c"}:
        raise ValueError(f"pos_att_type={terms!r} is not supported; only 'c2p' and 'p2c'.")
    norm = fields.choose(
        "norm_rel_ebd", {"none": False, "layer_norm": True, "none|layer_norm": True}, "none"
    )
    size = fields.take("conv_kernel_size", 0)
    fields.choose("conv_groups", {1: None}, 1)
    distance, buckets = (
        fields.take("max_relative_positions", -1),
        fields.take("position_buckets", -1),
    )
    return DeBERTaConfig(
        transformer=TransformerConfig(
            **numbers,
            norm_eps=fields.take("layer_norm_eps", 1e-7),
            num_token_types=fields.take("type_vocab_size", 0) or None,
        ),
        max_distance=distance if distance >= 1 else None,
        num_buckets=buckets if buckets > 0 else None,
        content_to_position="c2p" in terms,
        position_to_content="p2c" in terms,
        share_projections=fields.take("share_att_key", False),
        relative_norm=norm,
        convolution_size=size if size > 0 else None,
        convolution_activation=fields.choose("conv_act", {"tanh": "tanh", "gelu": "gelu"}, "tanh"),
    )


def _write(config: DeBERTaConfig) -> dict[str, Any]:
    numbers = config.transformer
    terms = {"c2p": config.content_to_position, "p2c": config.position_to_content}
    return write_bert(numbers) | {
        "layer_norm_eps": numbers.norm_eps,
        "type_vocab_size": numbers.num_token_types or 0,
        "position_biased_input": numbers.positions == "learned",
        "relative_attention": True,
        "pos_att_type": [name for name, there in terms.items() if there],
        "max_relative_positions": config.max_distance or -1,
        "position_buckets": config.num_buckets or -1,
        "share_att_key": config.share_projections,
        "norm_rel_ebd": "layer_norm" if config.relative_norm else "none",
        "conv_kernel_size": config.convolution_size or 0,
        "conv_act": config.convolution_activation,
    }


def _differences(a: DeBERTaConfig, b: DeBERTaConfig) -> list[str]:
    names = [field.name for field in dataclasses.fields(DeBERTaConfig)]
    own = [name for name in names if name not in ("transformer", "max_distance")]
    found = [name for name in own if getattr(a, name) != getattr(b, name)]
    if a.distances != b.distances:
        found.append("max_distance")
    return found + differences(a.transformer, b.transformer)


DEBERTA_V2 = Family(
    model_type="deberta-v2",
    architecture="DebertaV2Model",
    model=DeBERTa,
    read=_read,
    write=_write,
    differences=_differences,
    names=lambda config: _NAMES,
    renamed=((r"^deberta\.", ""), *RENAMED),
    # Heads used in training, which files without a class have.
    ignored=(*BUFFERS, r"(lm|mask)_predictions\..*"),
)
