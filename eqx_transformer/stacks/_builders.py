"""Blocks from numbers and functions, for the usual arrangements of the usual layers."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..attention import AbstractMask, Causal, ScoreMod, SlidingWindow, dot_product_attention
from ..nn import (
    MLP,
    AbstractAttention,
    Attention,
    AxialRoPE,
    CrossAttention,
    DropPath,
    GatedMLP,
    LayerNorm,
    LayerScale,
    RoPE,
)
from ._block import ParallelBlock, TransformerBlock
from ._decoder_block import DecoderBlock
from ._residual import Norm, Residual

Layout = Literal["pre", "post", "sandwich", "parallel"]
"""Where a block has its norms.

- `"pre"`: before each branch.
- `"post"`: after each sum.
- `"sandwich"`: before and after each branch.
- `"parallel"`: attention and MLP are one branch, with one norm before it.
"""

Activation = Callable[[Array], Array]


def encoder_block(
    d_model: int,
    num_heads: int,
    d_ff: int,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    causal: bool = False,
    window: int | None = None,
    mask: AbstractMask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    rope: RoPE | AxialRoPE | None = None,
    qk_norm: bool = False,
    gate: Literal["output", "value"] | None = None,
    attention_fn: Callable[..., Array] = dot_product_attention,
    attention: AbstractAttention | None = None,
    layout: Layout = "pre",
    make_norm: Callable[[int], Norm] = LayerNorm,
    activation: Activation = jax.nn.gelu,
    gated: bool = False,
    mlp: Callable[..., Array] | None = None,
    use_bias: bool = True,
    k_bias: bool | None = None,
    dropout_rate: float = 0.0,
    layer_scale: float | None = None,
    drop_path_rate: float | Float[Array, ""] | None = None,
    dtype: DTypeLike | None = None,
    key: PRNGKeyArray,
) -> TransformerBlock | ParallelBlock:
    """A block of self-attention and an MLP: one layer of an encoder, or of a decoder-only model.

    Arguments:

    - `d_model`, `num_heads`, `num_kv_heads`, `head_dim`, `qk_norm`, `gate`, `score_mod`, `scale`,
        `rope`, `k_bias`, `attention_fn`: of the attention layer; see `Attention`.
    - `d_ff`: size inside the MLP.
    - `causal`: whether a position sees only itself and earlier ones.
    - `window`: how many positions it sees: itself and `window - 1` before it, and, if not causal,
        as many after it. All if not given.
    - `mask`: a further mask of the architecture.
    - `attention`: replaces that attention layer, all of whose options are then ignored.
    - `layout`: where the norms are.
    - `make_norm`: makes a norm of a given size.
    - `activation`, `gated`: of the MLP; gated, it is a `GatedMLP`.
    - `mlp`: replaces that MLP, called as `mlp(x, key=key)`.
    - `use_bias`: whether projections have biases.
    - `dropout_rate`: the probability with which an attention weight, and an element of a branch,
        is dropped.
    - `layer_scale`: the initial factor of a `LayerScale` on each branch; none if not given.
    - `drop_path_rate`: of a `DropPath` on each branch; none if not given. Inside a stack, see
        `linear_drop_path`.
    - `dtype`: of the parameters; the default floating dtype if not given.
    - `key`: for the initial weights.
    """
    attention_key, mlp_key = jax.random.split(key)
    if attention is None:
        attention = Attention(
            d_model,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope,
            qk_norm=qk_norm,
            mask=attention_mask(causal, window, mask),
            score_mod=score_mod,
            scale=scale,
            gate=gate,
            use_bias=use_bias,
            k_bias=k_bias,
            dropout_rate=dropout_rate,
            attention_fn=attention_fn,
            dtype=dtype,
            key=attention_key,
        )
    if mlp is None:
        mlp = _mlp(d_model, d_ff, activation, gated, use_bias, dtype, mlp_key)
    options = (d_model, make_norm, dropout_rate, layer_scale, drop_path_rate)
    if layout == "parallel":
        return ParallelBlock(attention, mlp, _residual("pre", *options))
    return TransformerBlock(
        attention, mlp, _residual(layout, *options), _residual(layout, *options)
    )


def decoder_block(
    d_model: int,
    num_heads: int,
    d_ff: int,
    *,
    d_memory: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    causal: bool = True,
    window: int | None = None,
    mask: AbstractMask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    rope: RoPE | None = None,
    qk_norm: bool = False,
    gate: Literal["output", "value"] | None = None,
    attention_fn: Callable[..., Array] = dot_product_attention,
    attention: AbstractAttention | None = None,
    cross_attention_fn: Callable[..., Array] = dot_product_attention,
    layout: Literal["pre", "post", "sandwich"] = "pre",
    make_norm: Callable[[int], Norm] = LayerNorm,
    activation: Activation = jax.nn.gelu,
    gated: bool = False,
    mlp: Callable[..., Array] | None = None,
    use_bias: bool = True,
    k_bias: bool | None = None,
    dropout_rate: float = 0.0,
    layer_scale: float | None = None,
    drop_path_rate: float | Float[Array, ""] | None = None,
    dtype: DTypeLike | None = None,
    key: PRNGKeyArray,
) -> DecoderBlock:
    """A block of self-attention, attention to a source, and an MLP: one layer of a decoder.

    Masks, windows, score mods and RoPE are those of self-attention; attention to the source has
    none. Arguments are those of `encoder_block`, and

    - `d_memory`: size of the vectors of the source; `d_model` if not given.
    - `cross_attention_fn`: the function that computes attention to the source.
    """
    attention_key, cross_key, mlp_key = jax.random.split(key, 3)
    if attention is None:
        attention = Attention(
            d_model,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope,
            qk_norm=qk_norm,
            mask=attention_mask(causal, window, mask),
            score_mod=score_mod,
            scale=scale,
            gate=gate,
            use_bias=use_bias,
            k_bias=k_bias,
            dropout_rate=dropout_rate,
            attention_fn=attention_fn,
            dtype=dtype,
            key=attention_key,
        )
    cross_attention = CrossAttention(
        d_model,
        num_heads,
        d_memory=d_memory,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        qk_norm=qk_norm,
        scale=scale,
        use_bias=use_bias,
        k_bias=k_bias,
        dropout_rate=dropout_rate,
        attention_fn=cross_attention_fn,
        dtype=dtype,
        key=cross_key,
    )
    if mlp is None:
        mlp = _mlp(d_model, d_ff, activation, gated, use_bias, dtype, mlp_key)
    options = (d_model, make_norm, dropout_rate, layer_scale, drop_path_rate)
    residuals = (_residual(layout, *options) for _ in range(3))
    return DecoderBlock(attention, cross_attention, mlp, *residuals)


def attention_mask(
    causal: bool, window: int | None, mask: AbstractMask | None
) -> AbstractMask | None:
    """The masks of an architecture as one; `None` if nothing is masked."""
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1: a position sees itself.")
    parts: list[Any] = []
    if window is not None:
        parts.append(SlidingWindow(window - 1, 0 if causal else window - 1))
    elif causal:
        parts.append(Causal())
    if mask is not None:
        parts.append(mask)
    if len(parts) == 2:
        return parts[0] & parts[1]
    return parts[0] if parts else None


def _mlp(
    d_model: int,
    d_ff: int,
    activation: Activation,
    gated: bool,
    use_bias: bool,
    dtype: DTypeLike | None,
    key: PRNGKeyArray,
) -> Callable[..., Array]:
    make = GatedMLP if gated else MLP
    return make(d_model, d_ff, activation=activation, use_bias=use_bias, dtype=dtype, key=key)


def _residual(
    layout: Layout,
    d_model: int,
    make_norm: Callable[[int], Norm],
    dropout_rate: float,
    layer_scale: float | None,
    drop_path_rate: float | Float[Array, ""] | None,
) -> Residual:
    if layout not in ("pre", "post", "sandwich"):
        raise ValueError(f"layout={layout!r} must be 'pre', 'post' or 'sandwich'.")
    return Residual(
        make_norm(d_model) if layout != "post" else None,
        branch_norm=make_norm(d_model) if layout == "sandwich" else None,
        output_norm=make_norm(d_model) if layout == "post" else None,
        scale=None if layer_scale is None else LayerScale(d_model, init=layer_scale),
        dropout_rate=dropout_rate,
        drop_path=None if drop_path_rate is None else DropPath(drop_path_rate),
    )
