"""What the families of decoder-only language models have in common."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ...models import Llama, LlamaConfig, MoEConfig, TransformerConfig, ViTConfig
from ...nn import DynamicScaling
from .._family import Family, Table
from .._fields import Fields
from ._rope import read_rope, write_rope

# The name there, then here, in an MLP without a gate and with one.
_ACTIVATIONS: Final = {
    "silu": ("silu", "swiglu"),
    "gelu": ("gelu", "geglu"),
    "gelu_pytorch_tanh": ("gelu_tanh", "geglu_tanh"),
    "quick_gelu": ("quick_gelu", "quick_geglu"),
    "relu": ("relu", "reglu"),
    "relu2": ("relu_squared", None),
    "swish": ("silu", "swiglu"),
    "gelu_new": ("gelu_tanh", "geglu_tanh"),
    "gelu_fast": ("gelu_tanh", "geglu_tanh"),
}
# Fields for how something is computed or trained, not for what is computed.
_NOT_COMPUTED: Final = (
    *("dropout_rate", "embedding_dropout_rate", "param_dtype", "dtype", "logits_dtype"),
    *("remat", "unroll", "attention_implementation"),
)
_LAYER_TYPES: Final = {"full_attention": "global", "sliding_attention": "sliding"}
SIZES: Final = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}

LAYER: Final = "model.layers.{layer}."
EMBEDDING_NAMES: Final = {
    "model.embed_tokens": "embedding",
    "model.norm": "norm",
    "lm_head": "head",
}
ATTENTION_NAMES: Final = {
    f"{LAYER}self_attn.{name}": f"stack.{{layer}}.attention.{name}"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
}
MLP_NAMES: Final = {
    f"{LAYER}mlp.{name}": f"stack.{{layer}}.mlp.{name}"
    for name in ("gate_proj", "up_proj", "down_proj")
}
PRE_NORM_NAMES: Final = {
    f"{LAYER}input_layernorm": "stack.{layer}.attention_residual.norm",
    f"{LAYER}post_attention_layernorm": "stack.{layer}.mlp_residual.norm",
}
LLAMA_NAMES: Final = EMBEDDING_NAMES | ATTENTION_NAMES | MLP_NAMES | PRE_NORM_NAMES
TIED: Final = {"lm_head.weight": "model.embed_tokens.weight"}
# Tables of sines, in old files.
BUFFERS: Final = (r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)",)


# A model does not know which tokens begin and end texts; if left out, they would default to those
# of the model that gave the family its name.
_NO_TOKENS: Final = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def decoder_family(
    *,
    model_type: str,
    architecture: str,
    read: Callable[[Fields], LlamaConfig],
    write: Callable[[LlamaConfig], dict[str, Any]],
    names: Callable[[LlamaConfig], Table] | Table = LLAMA_NAMES,
    renamed: tuple[tuple[str, str], ...] = (),
    ignored: tuple[str, ...] = BUFFERS,
    tied: Mapping[str, str] = TIED,
) -> Family:
    """A family whose model is `Llama`; see `Family`.

    The configurations given to `write`, and finally returned by `read`, have numbers wherever a
    default would follow from other fields.
    """
    return Family(
        model_type=model_type,
        architecture=architecture,
        model=Llama,
        read=lambda fields: completed(read(fields)),
        write=lambda config: _NO_TOKENS | write(completed(config)),
        differences=_differences,
        names=names if callable(names) else lambda config: names,
        renamed=renamed,
        ignored=ignored,
        tied=tied,
    )


def completed(config: LlamaConfig) -> LlamaConfig:
    """The configuration with numbers in place of defaults that follow from other fields."""
    changes: dict[str, Any] = {
        name: config.use_bias if getattr(config, name) is None else getattr(config, name)
        for name in ("qkv_bias", "o_bias", "mlp_bias")
    }
    if config.mla is None:
        changes["num_kv_heads"] = config.num_kv_heads or config.num_heads
        changes["head_dim"] = config.attention_head_dim
    if config.moe is not None and config.moe.d_expert is None:
        changes["moe"] = dataclasses.replace(config.moe, d_expert=config.mlp_dim)
    return dataclasses.replace(
        config,
        d_ff=config.mlp_dim,
        ffn_multiple_of=LlamaConfig.ffn_multiple_of,
        ffn_dim_multiplier=LlamaConfig.ffn_dim_multiplier,
        use_bias=False,
        **changes,
    )


def canonical(config: LlamaConfig) -> LlamaConfig:
    """The same for all configurations whose models compute the same.

    Options of training and of the implementation do not count.
    """
    config = completed(config)
    kinds = config.layer_kinds
    types = shortest_pattern(["sliding" if kind.sliding else "global" for kind in kinds])
    changes: dict[str, Any] = {"layer_types": None if len(types) == 1 else types}
    for name in _NOT_COMPUTED:
        changes[name] = getattr(LlamaConfig, name)
    if config.positions != "rope":
        changes["rope_theta"] = LlamaConfig.rope_theta
    elif config.mla is None:
        changes["rotary_fraction"] = config.rotary_dim / config.attention_head_dim
    if config.rope_local_theta == config.rope_theta and config.rope_scaling is None:
        changes["rope_local_theta"] = None
    if isinstance(config.rope_scaling, DynamicScaling):
        # There is no such field there.
        changes["max_len"] = LlamaConfig.max_len
    scale = config.query_scale
    if scale is not None and math.isclose(scale, config.attention_head_dim**-0.5, rel_tol=1e-12):
        changes["query_scale"] = None
    if config.moe is not None:
        dense = tuple(i for i, kind in enumerate(kinds) if not kind.experts)
        changes["moe"] = dataclasses.replace(config.moe, first_dense=0, every=1, dense_layers=dense)
        if not dense:
            changes["d_ff"] = config.moe.d_expert
    return dataclasses.replace(config, **changes)


def _differences(a: LlamaConfig, b: LlamaConfig) -> list[str]:
    a, b = canonical(a), canonical(b)
    names = [field.name for field in dataclasses.fields(LlamaConfig)]
    return [name for name in names if getattr(a, name) != getattr(b, name)]


def read_sizes(fields: Fields, names: Mapping[str, str] = SIZES) -> dict[str, Any]:
    """The sizes every decoder has; `names` maps our names to theirs."""
    return {
        ours: fields.count(name) if ours == "num_layers" else fields.take(name)
        for ours, name in names.items()
    }


def write_sizes(config: LlamaConfig, names: Mapping[str, str] = SIZES) -> dict[str, Any]:
    """The inverse of `read_sizes`."""
    return {name: getattr(config, ours) for ours, name in names.items()}


def read_llama(
    fields: Fields,
    *,
    tied: bool = False,
    theta: float = 10_000.0,
    head_dim: int | None = None,
    original_max_len: int | None = None,
    partial: bool = False,
) -> dict[str, Any]:
    """The fields that most families have in common with Llama.

    Arguments:

    - `fields`: to read.
    - `tied`, `theta`, `head_dim`, `original_max_len`: what a missing field means in this family.
    - `partial`: whether a part of each head may be rotated.
    """
    sizes = read_sizes(fields)
    num_heads = sizes["num_heads"]
    head_dim = fields.take("head_dim", head_dim)
    return {
        **sizes,
        "num_kv_heads": fields.take("num_key_value_heads", None) or num_heads,
        "head_dim": head_dim or sizes["d_model"] // num_heads,
        "activation": read_activation(fields, "hidden_act", "silu", gated=True),
        "tie_embeddings": fields.take("tie_word_embeddings", tied),
        **read_rope(
            fields,
            sizes["max_len"],
            theta=theta,
            fraction=1.0 if partial else None,
            original_max_len=original_max_len,
        ),
    }


def write_llama(config: LlamaConfig) -> dict[str, Any]:
    """The inverse of `read_llama`."""
    return {
        **write_sizes(config),
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": write_activation(config),
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(config),
    }


def read_activation(fields: Fields, name: str, default: str, *, gated: bool) -> Any:
    """The activation that a field names."""
    options = {k: ours[gated] for k, ours in _ACTIVATIONS.items() if ours[gated]}
    return fields.choose(name, options, default)


def write_activation(config: LlamaConfig | TransformerConfig | ViTConfig) -> str:
    """The first name of the activation, whether it has a gate or not."""
    return next(name for name, ours in _ACTIVATIONS.items() if config.activation in ours)


def experts_of(config: LlamaConfig) -> MoEConfig:
    """The mixture of experts, for families that have one.

    Raises:

    - `ValueError` if there is none.
    """
    if config.moe is None:
        raise ValueError("there are no experts.")
    return config.moe


def read_layer_types(fields: Fields, num_layers: int, default: Sequence[str]) -> tuple[str, ...]:
    """Whether each layer attends to everything before it or to a window.

    Arguments:

    - `fields`: to read.
    - `num_layers`: how many layers there are.
    - `default`: the type of every layer if the field is missing.
    """
    found = fields.take("layer_types", None)
    types: list[Any] = list(default)
    if found is not None:
        types = [_LAYER_TYPES.get(kind) for kind in found]
    if None in types or len(types) != num_layers:
        raise ValueError(
            f"layer_types={found!r} must be one of {sorted(_LAYER_TYPES)} for each of "
            f"{num_layers} layers."
        )
    return tuple(types)


def write_layer_types(config: LlamaConfig) -> list[str]:
    """The inverse of `read_layer_types`."""
    names = ("full_attention", "sliding_attention")
    return [names[kind.sliding] for kind in config.layer_kinds]


def windowed(window: int | None, types: Sequence[str]) -> dict[str, Any]:
    """Fields for these layer types, without a window if no layer needs it."""
    if window is None or "sliding" not in types:
        return {}
    return {"window": window, "layer_types": shortest_pattern(types)}


def shortest_pattern(types: Sequence[str]) -> tuple[str, ...]:
    """The shortest sequence that gives `types` when it is repeated."""
    count = len(types)
    for period in range(1, count + 1):
        if all(types[i] == types[i % period] for i in range(count)):
            return tuple(types[:period])
    return ()


def write_query_scale(config: LlamaConfig) -> float | int:
    """The number by whose root scores are divided, rounded where it is meant to be an integer."""
    scale = config.attention_head_dim if config.query_scale is None else config.query_scale**-2
    return round(scale) if math.isclose(scale, round(scale), rel_tol=1e-12) else scale
