"""ModernBERT: rotary positions, most layers with a window, and norms before each branch."""

from typing import Any

from ...models import TransformerConfig
from .._fields import Fields
from .._names import Into
from ._decoder import read_activation, shortest_pattern, write_activation
from ._transformer import encoder_family

_HERE = "layers.{layer}."
_NAMES = {
    "embeddings.tok_embeddings": "embedding.embedding",
    "embeddings.norm": "embedding.norm",
    # Missing in the first layer.
    f"{_HERE}attn_norm": "stack.{layer}.attention_residual.norm",
    f"{_HERE}attn.Wqkv": Into(
        *(f"stack.{{layer}}.attention.{name}" for name in ("q_proj", "k_proj", "v_proj"))
    ),
    f"{_HERE}attn.Wo": "stack.{layer}.attention.o_proj",
    f"{_HERE}mlp_norm": "stack.{layer}.mlp_residual.norm",
    f"{_HERE}mlp.Wi": Into("stack.{layer}.mlp.gate_proj", "stack.{layer}.mlp.up_proj"),
    f"{_HERE}mlp.Wo": "stack.{layer}.mlp.down_proj",
    "final_norm": "norm",
}
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_len": "max_position_embeddings",
    "norm_eps": "norm_eps",
}
_LAYER_TYPES = {"full_attention": "global", "sliding_attention": "sliding"}
_BIASES = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")


def _read(fields: Fields) -> TransformerConfig:
    fields.default("norm_eps", 1e-5)
    numbers: dict[str, Any] = {ours: fields.take(name) for ours, name in _SIZES.items()}
    # Dropout, initialisation and implementation of training; older versions normalise embeddings in
    # another way, for which there is no field.
    fields.ignore(
        *("attention_dropout", "embedding_dropout", "mlp_dropout", "initializer_cutoff_factor"),
        *(
            "cls_token_id",
            "deterministic_flash_attn",
            "reference_compile",
            "repad_logits_with_grad",
        ),
        *("sparse_prediction", "sparse_pred_ignore_index", "tie_word_embeddings"),
        *("classifier_pooling", "classifier_dropout", "layer_norm_eps"),
    )
    for name in _BIASES:
        fields.choose(name, {False: None}, False)
    fields.choose("decoder_bias", {True: None}, True)
    fields.choose("position_embedding_type", {"absolute": None, "sans_pos": None}, "absolute")
    activation = read_activation(fields, "hidden_activation", "gelu", gated=True)
    used = read_activation(fields, "classifier_activation", "gelu", gated=True)
    if used != activation:
        raise ValueError(f"classifier_activation must be hidden_activation, not for {used!r}.")
    every = fields.take("global_attn_every_n_layers", 3)
    num_layers = numbers["num_layers"]
    types = fields.take("layer_types", None)
    if types is None:
        types = [("sliding" if i % every else "full") + "_attention" for i in range(num_layers)]
    if len(types) != num_layers or not set(types) <= _LAYER_TYPES.keys():
        raise ValueError(f"layer_types={types!r} must be known words, one for each layer.")
    pattern = shortest_pattern([_LAYER_TYPES[kind] for kind in types])
    local = fields.take("local_attention", 128)
    thetas = _read_thetas(fields)
    windowed = "sliding" in pattern
    numbers |= {"activation": activation, "layer_types": pattern if windowed else None}
    return TransformerConfig(
        **numbers,
        pad_token_id=None,
        embedding_norm=True,
        positions="rope",
        rope_theta=thetas["full_attention"],
        rope_local_theta=thetas["sliding_attention"] if windowed else None,
        first_norm=False,
        use_bias=False,
        # As many before as after, and the position itself.
        window=local // 2 + 1 if windowed else None,
        dropout_rate=0.0,
    )


def _read_thetas(fields: Fields) -> dict[str, float]:
    """The bases of wavelengths by type of layer, in the format of transformers 4 or 5."""
    thetas = {
        "full_attention": fields.take("global_rope_theta", 160_000.0),
        "sliding_attention": fields.take("local_rope_theta", 10_000.0),
    }
    both = fields.nested("rope_parameters")
    if both is not None:
        for kind in thetas:
            of_kind = both.nested(kind)
            if of_kind is not None:
                of_kind.choose("rope_type", {"default": None}, "default")
                thetas[kind] = of_kind.take("rope_theta", thetas[kind])
                of_kind.finish()
        both.finish()
    return thetas


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds = config.block_kinds(config.num_layers)
    types = [("sliding" if kind.sliding else "full") + "_attention" for kind in kinds]
    fields = {name: getattr(config, ours) for ours, name in _SIZES.items()}
    activation = write_activation(config)
    theta = config.rope_theta
    return fields | {
        "hidden_activation": activation,
        "classifier_activation": activation,
        "layer_types": types,
        # For versions without layer_types.
        "global_attn_every_n_layers": next(
            (i for i in range(1, len(types)) if types[i] == "full_attention"), len(types)
        ),
        "local_attention": 2 * (config.window - 1) if config.window else 128,
        "global_rope_theta": theta,
        # That of the published ones, which must be an id of the vocabulary.
        "pad_token_id": min(50_283, config.vocab_size - 1),
        "local_rope_theta": theta if config.rope_local_theta is None else config.rope_local_theta,
    }


MODERNBERT = encoder_family(
    model_type="modernbert",
    prefix="model.",
    name="ModernBert",
    read=_read,
    write=_write,
    names=_NAMES,
    parts="embeddings|layers|final_norm",
    masked_lm={
        "head.dense": "transform.linear",
        "head.norm": "transform.norm",
        "decoder": "head",
        "decoder.bias": "logit_bias",
    },
)
