"""BART, and what Marian shares with it: norms after each sum, a bias on logits."""

from collections.abc import Collection, Mapping
from typing import Any, Final

from ...models import TransformerConfig
from .._fields import Fields
from .._names import Into
from ._decoder import read_activation, write_activation
from ._transformer import seq2seq_family

_SIZES: Final = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "num_layers": "encoder_layers",
    "num_heads": "encoder_attention_heads",
    "d_ff": "encoder_ffn_dim",
    "num_decoder_layers": "decoder_layers",
    "num_decoder_heads": "decoder_attention_heads",
    "decoder_d_ff": "decoder_ffn_dim",
}
TIED: Final = {
    f"{name}.weight": "model.shared.weight"
    for name in ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
}
# Files of the model without its head have no prefix.
RENAMED: Final = ((r"^(shared|encoder|decoder)\.", r"model.\1."),)


def read_seq2seq(fields: Fields) -> dict[str, Any]:
    """What BART, Marian and Whisper have in common."""
    # Dropout in training, and sizes that other fields give too.
    fields.ignore(
        *("dropout", "attention_dropout", "activation_dropout", "classif_dropout"),
        *("encoder_layerdrop", "decoder_layerdrop", "init_std", "is_encoder_decoder"),
        *("num_hidden_layers", "encoder_no_repeat_ngram_size", "save_step"),
    )
    return {
        **{ours: fields.take(name) for ours, name in _SIZES.items()},
        "activation": read_activation(fields, "activation_function", "gelu", gated=False),
        "scale_embeddings": fields.take("scale_embedding", False),
        "tie_embeddings": fields.take("tie_word_embeddings", True),
        "pad_token_id": None,
        "dropout_rate": 0.0,
    }


def write_seq2seq(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_seq2seq`."""
    return {
        **{name: getattr(config, ours) for ours, name in _SIZES.items()},
        "activation_function": write_activation(config),
        "scale_embedding": config.scale_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "is_encoder_decoder": True,
    }


def layer_names(norm: str) -> dict[str, str]:
    """The names of the layers.

    Arguments:

    - `norm`: which of the norms of a `Residual` theirs are.
    """
    attention = {name: name for name in ("q_proj", "k_proj", "v_proj")} | {"out_proj": "o_proj"}
    names = {}
    for side in ("encoder", "decoder"):
        there, here = f"model.{side}.layers.{{layer}}.", f"{side}.{{layer}}."
        branches = {"self_attn": ("attention", "attention")}
        if side == "decoder":
            branches["encoder_attn"] = ("cross_attention", "cross")
        for branch, (ours, residual) in branches.items():
            for name, projection in attention.items():
                names[f"{there}{branch}.{name}"] = f"{here}{ours}.{projection}"
            names[f"{there}{branch}_layer_norm"] = f"{here}{residual}_residual.{norm}"
        names[f"{there}fc1"] = f"{here}mlp.up_proj"
        names[f"{there}fc2"] = f"{here}mlp.down_proj"
        names[f"{there}final_layer_norm"] = f"{here}mlp_residual.{norm}"
    return names


def adapt(config: TransformerConfig, names: Collection[str]) -> TransformerConfig:
    """Files of the model without its head have no bias on logits."""
    return config.replace(head_bias="final_logits_bias" in names)


def bart_names(config: TransformerConfig) -> Mapping[str, str | Into]:
    """The names of BART's tensors, and of Marian's, which has fewer."""
    return layer_names("output_norm") | {
        "model.shared": "embedding.embedding",
        "model.encoder.embed_positions": "embedding.positions.table",
        "model.decoder.embed_positions": "decoder_embedding.positions.table",
        "model.encoder.layernorm_embedding": "embedding.norm",
        "model.decoder.layernorm_embedding": "decoder_embedding.norm",
        "lm_head": "head",
        "final_logits_bias": Into("logit_bias", shape=(1, config.vocab_size)),
    }


def _read(fields: Fields) -> TransformerConfig:
    # Options of other models in its first implementation, which transformers ignores.
    fields.ignore(
        *("normalize_before", "normalize_embedding", "add_final_layer_norm", "add_bias_logits"),
        *("static_position_embeddings", "extra_pos_embeddings", "force_bos_token_to_be_generated"),
    )
    return TransformerConfig(
        **read_seq2seq(fields),
        max_len=fields.take("max_position_embeddings"),
        embedding_norm=True,
        head_bias=True,
        positions="learned",
        position_offset=2,
        layout="post",
        final_norm=False,
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    return write_seq2seq(config) | {
        "max_position_embeddings": config.max_len,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }


BART = seq2seq_family(
    model_type="bart",
    architecture="BartForConditionalGeneration",
    read=_read,
    write=_write,
    names=bart_names,
    renamed=RENAMED,
    tied=TIED,
    adapt=adapt,
)
