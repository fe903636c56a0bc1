import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from ..attention import ALiBi, Causal, Implementation, dot_product_attention
from ..nn import (
    MLP,
    DynamicTanh,
    GatedMLP,
    LayerNorm,
    LearnedPositions,
    LinearAttention,
    MixtureOfExperts,
    RMSNorm,
    RoPE,
    SinusoidalPositions,
)
from ..stacks import (
    AbstractBlock,
    Layout,
    Stack,
    decoder_block,
    encoder_block,
    linear_drop_path,
)
from ._config import AbstractConfig

Activation = Literal["gelu", "gelu_tanh", "relu", "relu_squared", "silu", "swiglu", "geglu"]
"""The nonlinearity of the MLPs. `"swiglu"` and `"geglu"` have a multiplicative gate."""

Positions = Literal["sinusoidal", "learned", "rope", "alibi", "none"]
"""How a model knows where tokens are: vectors added to embeddings, turned queries and keys, a bias
on scores, or not at all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(AbstractConfig):
    """The numbers that make a `TransformerEncoder`, `TransformerDecoder` or `EncoderDecoder`.

    Arguments:

    - `vocab_size`: how many token ids there are.
    - `d_model`: size of the vectors between layers.
    - `num_layers`: how many blocks; of an encoder-decoder, in the encoder.
    - `num_decoder_layers`: how many blocks the decoder of an encoder-decoder has; `None` for
        `num_layers`.
    - `num_heads`: how many query heads.
    - `num_kv_heads`: how many key and value heads; `None` for `num_heads`.
    - `head_dim`: size of a head; `None` for `d_model / num_heads`.
    - `d_ff`: size inside the MLPs.
    - `max_len`: the longest sequence.
    - `cache_max_len`: how many positions a cache has if nothing else is said; `None` for `max_len`.
    - `pad_token_id`: the token that is padding, to which nobody attends; `None` if there is none.
    - `dropout_rate`: the probability with which an element of an embedding or of a residual branch,
        or an attention weight, is dropped.
    - `drop_path_rate`: the probability with which the last block's branches are dropped; that of
        the others grows linearly from 0.
    - `layout`: where the norms are.
    - `norm`: what they are.
    - `norm_eps`: added to the variance or mean square; without meaning for `"dynamic_tanh"`.
    - `final_norm`: whether there is a norm after the last block.
    - `positions`: how the model knows where tokens are.
    - `rope_theta`: base of the wavelengths of `positions="rope"`.
    - `activation`: the nonlinearity of the MLPs.
    - `use_bias`: whether projections have biases.
    - `window`: how many positions self-attention sees: in a decoder the own one and `window - 1`
        before it, in an encoder as many after it besides. `None` for all. Attention to a source has
        no window.
    - `qk_norm`: whether queries and keys are normalised, each head by an `RMSNorm`.
    - `gate`: a sigmoid gate on the output of attention, or on the values; see `Attention`.
    - `layer_scale`: initial factor of the learned scale of each branch; `None` for no scale.
    - `scale_embeddings`: whether embeddings are multiplied with `sqrt(d_model)`.
    - `tie_embeddings`: whether the output head is the embedding.
    - `num_experts`: how many experts a mixture in the place of each MLP has; `None` for MLPs.
    - `experts_per_token`: how many of them are computed for a token.
    - `expert_capacity_factor`: room for tokens in every expert, relative to an even distribution;
        `None` for as much as it takes.
    - `attention`: `"softmax"`, or `"linear"` for `linear_attention` within each sequence, whose
        weights are not dropped. Attention to a source is always a softmax.
    - `linear_chunk_size`: how many positions `attention="linear"` computes densely at a time.
    - `attention_implementation`: see `dot_product_attention`; `None` chooses.
    - `attention_block_size`: tile size of attention; `None` chooses.
    - `remat`: what reverse mode keeps of each block. `"none"`: all it needs. `"full"`: only the
        input. `"dots"`: the input and the results of matrix products with weights.
    - `unroll`: how many blocks make one iteration of the loop over depth.
    """

    vocab_size: int
    d_model: int = 512
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int = 2048
    max_len: int = 512
    cache_max_len: int | None = None
    pad_token_id: int | None = 0
    dropout_rate: float = 0.1
    drop_path_rate: float = 0.0
    layout: Layout = "pre"
    norm: Literal["layer", "rms", "dynamic_tanh"] = "layer"
    norm_eps: float = 1e-5
    final_norm: bool = True
    positions: Positions = "sinusoidal"
    rope_theta: float = 10_000.0
    activation: Activation = "gelu"
    use_bias: bool = True
    window: int | None = None
    qk_norm: bool = False
    gate: Literal["output", "value"] | None = None
    layer_scale: float | None = None
    scale_embeddings: bool = False
    tie_embeddings: bool = False
    num_experts: int | None = None
    experts_per_token: int = 2
    expert_capacity_factor: float | None = None
    attention: Literal["softmax", "linear"] = "softmax"
    linear_chunk_size: int = 64
    attention_implementation: Implementation | None = None
    attention_block_size: int | None = None
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 1

    def check(self) -> None:
        """Checks the values of the fields; see `AbstractConfig`."""
        for name in (
            *("vocab_size", "d_model", "num_layers", "num_decoder_layers", "num_heads"),
            *("num_kv_heads", "head_dim", "d_ff", "max_len", "cache_max_len", "window"),
            *("num_experts", "experts_per_token", "attention_block_size", "unroll"),
            "linear_chunk_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"TransformerConfig: {name}={value} must be at least 1.")
        for name in ("rope_theta", "norm_eps", "layer_scale", "expert_capacity_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"TransformerConfig: {name}={value} must be positive and finite.")
        for name in ("dropout_rate", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"TransformerConfig: {name}={getattr(self, name)} must be at least 0 and "
                    "below 1."
                )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"TransformerConfig: pad_token_id={self.pad_token_id} must be a token id, from 0 "
                f"to vocab_size - 1 = {self.vocab_size - 1}; None if no token is padding."
            )
        if self.cache_max_len is not None and self.cache_max_len > self.max_len:
            raise ValueError(
                f"TransformerConfig: cache_max_len={self.cache_max_len} is more than "
                f"max_len={self.max_len}."
            )
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"TransformerConfig: d_model={self.d_model} is not a multiple of "
                f"num_heads={self.num_heads}; change one, or give head_dim."
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"TransformerConfig: num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}; every key head must serve as many query heads."
            )
        head_dim = self.d_model // self.num_heads if self.head_dim is None else self.head_dim
        if self.positions == "rope" and head_dim % 2:
            raise ValueError(
                f"TransformerConfig: positions='rope' turns pairs of features, so head_dim="
                f"{head_dim} must be even."
            )
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(
                f"TransformerConfig: positions='sinusoidal' has pairs of features, so d_model="
                f"{self.d_model} must be even."
            )
        if self.attention == "linear":
            for name in ("window", "gate", "attention_implementation", "attention_block_size"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"TransformerConfig: {name}={getattr(self, name)!r} has no meaning for "
                        "attention='linear'; leave it out, or use 'softmax'."
                    )
            if self.positions == "alibi":
                raise ValueError(
                    "TransformerConfig: positions='alibi' changes scores, which "
                    "attention='linear' does not have; use 'rope' or vectors."
                )
        if self.num_experts is not None and self.experts_per_token > self.num_experts:
            raise ValueError(
                f"TransformerConfig: experts_per_token={self.experts_per_token} is more than "
                f"num_experts={self.num_experts}."
            )


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _relu_squared(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu_squared": _relu_squared,
    "silu": jax.nn.silu,
    "swiglu": jax.nn.silu,
    "geglu": _gelu,
}

_REMAT = {
    "none": None,
    "full": True,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def make_norm(config: TransformerConfig, size: int) -> Any:
    """The norm a configuration names."""
    if config.norm == "layer":
        return LayerNorm(size, eps=config.norm_eps, use_bias=config.use_bias)
    if config.norm == "rms":
        return RMSNorm(size, eps=config.norm_eps)
    return DynamicTanh(size)


def make_positions(
    config: TransformerConfig, *, key: PRNGKeyArray
) -> SinusoidalPositions | LearnedPositions | None:
    """What is added to embeddings; `None` if positions are known in another way."""
    if config.positions == "sinusoidal":
        return SinusoidalPositions(config.d_model)
    if config.positions == "learned":
        return LearnedPositions(config.max_len, config.d_model, key=key)
    return None


def make_stack(
    config: TransformerConfig,
    num_layers: int,
    *,
    causal: bool,
    cross: bool = False,
    key: PRNGKeyArray,
) -> Stack:
    """The blocks of an encoder or a decoder, with or without attention to a source."""
    stack = Stack(
        functools.partial(_make_block, config, causal, cross),
        num_layers,
        remat=_REMAT[config.remat],
        unroll=min(config.unroll, num_layers),
        key=key,
    )
    return linear_drop_path(stack, config.drop_path_rate) if config.drop_path_rate > 0 else stack


def _make_block(
    config: TransformerConfig, causal: bool, cross: bool, *, key: PRNGKeyArray
) -> AbstractBlock:
    attention_fn: Callable[..., Array] = dot_product_attention
    if config.attention_implementation is not None or config.attention_block_size is not None:
        attention_fn = eqx.Partial(
            dot_product_attention,
            implementation=config.attention_implementation,
            block_size=config.attention_block_size,
        )
    block_key, mlp_key, attention_key = jax.random.split(key, 3)
    options: dict[str, Any] = {
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "window": config.window,
        "score_mod": ALiBi(config.num_heads) if config.positions == "alibi" else None,
        "rope": RoPE(theta=config.rope_theta) if config.positions == "rope" else None,
        "qk_norm": config.qk_norm,
        "gate": config.gate,
        "attention_fn": attention_fn,
        "layout": config.layout,
        "make_norm": functools.partial(make_norm, config),
        "attention": _make_linear_attention(config, causal, key=attention_key),
        "mlp": _make_mlp(config, key=mlp_key),
        "use_bias": config.use_bias,
        "dropout_rate": config.dropout_rate,
        "layer_scale": config.layer_scale,
        "drop_path_rate": 0.0 if config.drop_path_rate > 0 else None,
        "key": block_key,
    }
    sizes = (config.d_model, config.num_heads, config.d_ff)
    if cross:
        return decoder_block(*sizes, causal=causal, cross_attention_fn=attention_fn, **options)
    return encoder_block(*sizes, causal=causal, **options)


def _make_linear_attention(
    config: TransformerConfig, causal: bool, *, key: PRNGKeyArray
) -> LinearAttention | None:
    if config.attention != "linear":
        return None
    return LinearAttention(
        config.d_model,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rope=RoPE(theta=config.rope_theta) if config.positions == "rope" else None,
        qk_norm=config.qk_norm,
        mask=Causal() if causal else None,
        chunk_size=config.linear_chunk_size,
        use_bias=config.use_bias,
        key=key,
    )


def _make_mlp(config: TransformerConfig, *, key: PRNGKeyArray) -> Callable[..., Array]:
    make_expert = functools.partial(
        GatedMLP if config.activation in ("swiglu", "geglu") else MLP,
        config.d_model,
        config.d_ff,
        activation=_ACTIVATIONS[config.activation],
        use_bias=config.use_bias,
    )
    if config.num_experts is None:
        return make_expert(key=key)
    return MixtureOfExperts(
        config.d_model,
        config.num_experts,
        make_expert,
        top_k=config.experts_per_token,
        # With one expert a token, weights that sum to one would be constant.
        renormalize=config.experts_per_token > 1,
        capacity_factor=config.expert_capacity_factor,
        key=key,
    )
