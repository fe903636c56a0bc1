"""Attention between slices: soft clusters that points are gathered into."""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._precision import accumulation_dtype
from .._unbatched import unbatched
from ..attention import AbstractMask, dot_product_attention
from ._attention import AbstractAttention, head_sizes
from ._checks import check_rate
from ._linear import AbstractLinear, Linear
from ._padding import padding_flags


class SliceAttention(AbstractAttention):
    """Attention of points through slices: the Physics-Attention of Transolver.

    In every head, with `h[i]` and `f[i]` two projections of point `i`,

        w[i] = softmax(slice_proj(h[i]) / temperature[i])               over the slices
        z[s] = sum_i w[i, s] f[i] / (sum_i w[i, s] + eps)
        z = attention(q_proj(z), k_proj(z), v_proj(z))                  of slices to slices
        y[i] = o_proj(sum_s w[i, s] z[s])

    The cost is linear in the number of points, whose order does not matter. Temperatures are
    `softplus` of a parameter of the head, initially 1/2. (Wu et al., Transolver, 2024, section
    3.2.)

    Transolver++ is `adaptive_temperature=True, gumbel=True, separate_values=False`: the temperature
    depends on the point, weights are drawn by the Gumbel-softmax in training, and `f` is `h`. With
    `inference` set nothing is drawn. (Luo et al., Transolver++, 2025, section 3.1.)
    """

    h_proj: AbstractLinear
    f_proj: AbstractLinear | None
    slice_proj: AbstractLinear
    temperature: Float[Array, " heads"]
    temperature_proj: AbstractLinear | None
    q_proj: AbstractLinear
    k_proj: AbstractLinear
    v_proj: AbstractLinear
    o_proj: AbstractLinear
    attention_fn: Callable[..., Array]
    inference: bool
    head_dim: int = eqx.field(static=True)
    gumbel: bool = eqx.field(static=True)
    dropout_rate: float = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_slices: int,
        *,
        head_dim: int | None = None,
        adaptive_temperature: bool = False,
        gumbel: bool = False,
        separate_values: bool = True,
        use_bias: bool = True,
        dropout_rate: float = 0.0,
        eps: float = 1e-5,
        attention_fn: Callable[..., Array] = dot_product_attention,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `d_model`: size of the input and the output.
        - `num_heads`: how many heads, each with its own slices.
        - `num_slices`: how many slices a head has.
        - `head_dim`: size of a head; `d_model / num_heads` if not given.
        - `adaptive_temperature`: whether the temperature depends on the point (initially it does
            not).
        - `gumbel`: whether Gumbel noise is added before the softmax, except in inference.
        - `separate_values`: whether what is gathered is a projection of its own.
        - `use_bias`: whether projections of points have biases; those of slices have none.
        - `dropout_rate`: the probability with which an attention weight between slices is dropped.
        - `eps`: added to the weight of a slice.
        - `attention_fn`, `dtype`: see `Attention`.
        - `key`: for the initial weights.

        Raises:

        - `ValueError` for sizes that do not divide each other.
        """
        _, head_dim = head_sizes("SliceAttention", d_model, num_heads, None, head_dim)
        check_rate("SliceAttention", "dropout_rate", dropout_rate)
        if num_slices < 1:
            raise ValueError(f"SliceAttention: num_slices={num_slices} must be at least 1.")
        if not 0 <= eps < math.inf:
            raise ValueError(f"SliceAttention: eps={eps} must be at least 0 and finite.")
        keys = jax.random.split(key, 7)
        size = num_heads * head_dim
        self.h_proj = Linear(d_model, size, use_bias=use_bias, dtype=dtype, key=keys[0])
        self.f_proj = None
        if separate_values:
            self.f_proj = Linear(d_model, size, use_bias=use_bias, dtype=dtype, key=keys[1])
        # Orthogonal, so that slices begin apart (as in the authors' code).
        self.slice_proj = Linear(
            head_dim,
            num_slices,
            use_bias=use_bias,
            init=jax.nn.initializers.orthogonal(),
            dtype=dtype,
            key=keys[2],
        )
        dtype = self.h_proj.weight.dtype
        self.temperature = jnp.full((num_heads,), np.log(np.expm1(0.5)), dtype)
        self.temperature_proj = None
        if adaptive_temperature:
            zeros = jax.nn.initializers.zeros
            self.temperature_proj = Linear(head_dim, 1, init=zeros, dtype=dtype, key=key)
        self.q_proj = Linear(head_dim, head_dim, dtype=dtype, key=keys[3])
        self.k_proj = Linear(head_dim, head_dim, dtype=dtype, key=keys[4])
        self.v_proj = Linear(head_dim, head_dim, dtype=dtype, key=keys[5])
        self.o_proj = Linear(size, d_model, use_bias=use_bias, dtype=dtype, key=keys[6])
        self.attention_fn = attention_fn
        self.inference = False
        self.head_dim = head_dim
        self.gumbel = gumbel
        self.dropout_rate = dropout_rate
        self.eps = eps

    @jax.named_scope("eqx_transformer.nn.SliceAttention")
    @unbatched(x="seq d_model")
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Attends within one set of points.

        Arguments:

        - `x`: the points.
        - `mask`: `Padding(valid)` where some are padding; no other mask is possible.
        - `positions`: must not be given; points have no order.
        - `key`: for Gumbel noise and dropout; needed if there is any, unless `inference` is set.
        """
        if positions is not None:
            raise ValueError("SliceAttention: points have no order; leave the positions out.")
        noisy, dropout_rate = self.gumbel, self.dropout_rate
        if self.inference:
            noisy, dropout_rate = False, 0.0
        if key is None and (noisy or dropout_rate > 0):
            raise RuntimeError(
                f"SliceAttention: gumbel={noisy} and dropout_rate={dropout_rate} need a key; pass "
                "key=, or switch them off with eqx.nn.inference_mode(model)."
            )
        noise_key, dropout_key = (None, None) if key is None else jax.random.split(key)
        valid = padding_flags("SliceAttention", mask, x.shape[0])
        if valid is not None:
            # NaN in padding must not reach a gradient either, through a product with zero.
            x = jnp.where(valid[:, None], x, 0)
        heads = (x.shape[0], self.h_proj.weight.shape[1] // self.head_dim, self.head_dim)
        h = self.h_proj(x).reshape(heads)
        f = h if self.f_proj is None else self.f_proj(x).reshape(heads)
        wide = accumulation_dtype(x.dtype)
        weights = self._weights(h, noise_key if noisy else None)
        if valid is not None:
            weights = jnp.where(valid[:, None, None], weights, 0)
        z = jnp.einsum("ihs,ihd->shd", weights, f.astype(wide))
        z = (z / (weights.sum(axis=0).T[:, :, None] + self.eps)).astype(x.dtype)
        z = self.attention_fn(
            self.q_proj(z),
            self.k_proj(z),
            self.v_proj(z),
            dropout_rate=dropout_rate,
            dropout_key=dropout_key if dropout_rate > 0 else None,
        )
        y = jnp.einsum("ihs,shd->ihd", weights, z.astype(wide)).astype(x.dtype)
        return self.o_proj(y.reshape(heads[0], heads[1] * heads[2]))

    def init_cache(self, max_len: int, dtype: DTypeLike | None = None) -> NoReturn:
        """Not possible: every point changes every slice, so there is nothing to cache."""
        raise ValueError(
            "SliceAttention: there is no cache, since every point changes every slice; call the "
            "layer with all points."
        )

    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: Any,
        *,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> NoReturn:
        """Not possible; see `init_cache`."""
        self.init_cache(0)

    def _weights(
        self, h: Float[Array, "seq heads head_dim"], key: PRNGKeyArray | None
    ) -> Float[Array, "seq heads slices"]:
        """How much of every point belongs to every slice, in float32 or wider."""
        wide = accumulation_dtype(h.dtype)
        scores = self.slice_proj(h).astype(wide)
        temperature = self.temperature.astype(wide)[None, :, None]
        if self.temperature_proj is not None:
            temperature = temperature + self.temperature_proj(h).astype(wide)
        if key is not None:
            scores = scores + jax.random.gumbel(key, scores.shape, scores.dtype)
        return jax.nn.softmax(scores / jax.nn.softplus(temperature), axis=-1)
