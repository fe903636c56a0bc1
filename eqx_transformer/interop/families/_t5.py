"""T5 and its version 1.1: one relative bias for all layers, and unscaled scores."""

from collections.abc import Collection, Mapping
from typing import Any

from ...models import TransformerConfig
from .._fields import Fields
from ._transformer import seq2seq_family

_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "head_dim": "d_kv",
    "d_ff": "d_ff",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
}
_OPTIONS = {
    "relative_buckets": ("relative_attention_num_buckets", 32),
    "relative_max_distance": ("relative_attention_max_distance", 128),
    "norm_eps": ("layer_norm_epsilon", 1e-6),
}
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "silu": "silu",
    "gated-gelu": "geglu_tanh",
    "gated-silu": "swiglu",
    "gated-relu": "reglu",
}
# There is no maximum length.
_MAX_LEN, _CACHE_MAX_LEN = 2**15, 512


def _read(fields: Fields) -> TransformerConfig:
    # `feed_forward_proj` implies the first two, and lengths are not limited.
    fields.ignore("dense_act_fn", "is_gated_act", "n_positions", "output_past")
    fields.ignore("dropout_rate", "is_encoder_decoder")
    tied = fields.take("tie_word_embeddings", True)
    scaled = fields.take("scale_decoder_outputs", tied)
    numbers = {ours: fields.take(name) for ours, name in _SIZES.items()}
    options = {ours: fields.take(name, default) for ours, (name, default) in _OPTIONS.items()}
    return TransformerConfig(
        **numbers,
        **options,
        num_decoder_layers=fields.take("num_decoder_layers", None) or numbers["num_layers"],
        activation=fields.choose("feed_forward_proj", _ACTIVATIONS, "relu"),
        max_len=_MAX_LEN,
        cache_max_len=_CACHE_MAX_LEN,
        pad_token_id=None,
        positions="relative",
        query_scale=1.0,
        norm="rms",
        use_bias=False,
        tie_embeddings=tied,
        scale_output=scaled,
        dropout_rate=0.0,
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    names = {ours: name for name, ours in _ACTIVATIONS.items()}
    if config.activation not in names:
        raise ValueError(f"activation={config.activation!r} must be one of {sorted(names)}.")
    return {
        **{name: getattr(config, ours) for ours, name in _SIZES.items()},
        **{name: getattr(config, ours) for ours, (name, _) in _OPTIONS.items()},
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": names[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_output,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
    }


def _names(config: TransformerConfig) -> Mapping[str, str]:
    up = {"wi": "up_proj"}
    if config.activation in ("geglu_tanh", "swiglu", "reglu"):
        up = {"wi_0": "gate_proj", "wi_1": "up_proj"}
    names = {"shared": "embedding.embedding", "lm_head": "head"}
    for side, branches in (
        ("encoder", ("SelfAttention", "DenseReluDense")),
        ("decoder", ("SelfAttention", "EncDecAttention", "DenseReluDense")),
    ):
        residuals = {
            "SelfAttention": "attention",
            "EncDecAttention": "cross",
            "DenseReluDense": "mlp",
        }
        layers = f"{side}.stack.{{layer}}."
        for i, branch in enumerate(branches):
            there = f"{side}.block.{{layer}}.layer.{i}."
            here = {"SelfAttention": "attention", "EncDecAttention": "cross_attention"}
            if branch in here:
                for name in "qkvo":
                    names[f"{there}{branch}.{name}"] = f"{layers}{here[branch]}.{name}_proj"
            else:
                for name, ours in {**up, "wo": "down_proj"}.items():
                    names[f"{there}{branch}.{name}"] = f"{layers}mlp.{ours}"
            names[f"{there}layer_norm"] = f"{layers}{residuals[branch]}_residual.norm"
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names[bias] = f"{side}.score_mod.table"
        names[f"{side}.final_layer_norm"] = f"{side}_norm"
    return names


def _adapt(config: TransformerConfig, names: Collection[str]) -> TransformerConfig:
    """transformers 5 marks all as tied, but T5 1.1 has a head nevertheless."""
    if config.scale_output:
        return config
    return config.replace(tie_embeddings="lm_head.weight" not in names)


T5 = seq2seq_family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    read=_read,
    write=_write,
    names=_names,
    # In the first releases; never used.
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    tied={
        f"{name}.weight": "shared.weight"
        for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    },
    adapt=_adapt,
)
