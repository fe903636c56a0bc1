import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._precision import accumulation_dtype
from ._along_last import along_last


class RMSNorm(eqx.Module):
    """Root mean square normalisation of the last axis.

        y = (offset + weight) * x / sqrt(mean(x**2) + eps)

    Computed in float32 or wider, the product with the weight included, and returned in the dtype of
    `x`. There is no bias. (Zhang and Sennrich, 2019, equation 4.)
    """

    weight: Float[Array, " size"]
    eps: float = eqx.field(static=True)
    offset: float | int = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        *,
        eps: float = 1e-5,
        offset: float | int = 0,
        dtype: DTypeLike | None = None,
    ):
        """Arguments:

        - `size`: length of the last axis.
        - `eps`: added to the mean square.
        - `offset`: added to the weight. With 1, as in Gemma, weight decay pulls the factor to one.
        - `dtype`: of the weight, initially `1 - offset`; the default floating dtype if not given.
        """
        _check("RMSNorm", size, eps)
        self.weight = jnp.full(
            (size,), 1 - offset, jnp.result_type(float) if dtype is None else dtype
        )
        self.eps = eps
        self.offset = offset

    def __call__(
        self, x: Float[Array, "*batch size"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch size"]:
        """Normalises the last axis of `x`. `key` is ignored, as in Equinox."""
        h = x.astype(accumulation_dtype(x.dtype))
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        factor = along_last("norm", self.weight, h)
        if self.offset:
            factor = self.offset + factor
        return (h * factor).astype(x.dtype)


class LayerNorm(eqx.Module):
    """Layer normalisation of the last axis: `weight * (x - mean) / sqrt(var + eps) + bias`.

    Computed in float32 or wider, returned in the dtype of `x`. (Ba et al., 2016, equation 4.)
    """

    weight: Float[Array, " size"] | None
    bias: Float[Array, " size"] | None
    eps: float = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        *,
        eps: float = 1e-5,
        use_weight: bool = True,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
    ):
        """Arguments:

        - `size`: length of the last axis.
        - `eps`: added to the variance.
        - `use_weight`: whether to multiply with a weight, initially one.
        - `use_bias`: whether to add a bias, initially zero.
        - `dtype`: of the parameters; the default floating dtype if not given.
        """
        _check("LayerNorm", size, eps)
        self.weight = jnp.ones((size,), dtype) if use_weight else None
        self.bias = jnp.zeros((size,), dtype) if use_bias else None
        self.eps = eps

    def __call__(
        self, x: Float[Array, "*batch size"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch size"]:
        """Normalises the last axis of `x`. `key` is ignored, as in Equinox."""
        h = x.astype(accumulation_dtype(x.dtype))
        h = h - jnp.mean(h, axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        if self.weight is not None:
            h = h * along_last("norm", self.weight, h)
        if self.bias is not None:
            h = h + along_last("norm", self.bias, h)
        return h.astype(x.dtype)


class DynamicTanh(eqx.Module):
    """A bounded map in the place of a norm: `weight * tanh(alpha * x) + bias`.

    It is elementwise: no statistics over features are needed. (Zhu et al., Transformers without
    Normalization, 2025, equation 2.)
    """

    alpha: Float[Array, ""]
    weight: Float[Array, " size"]
    bias: Float[Array, " size"]

    def __init__(self, size: int, *, alpha: float = 0.5, dtype: DTypeLike | None = None):
        """Arguments:

        - `size`: length of the last axis.
        - `alpha`: the initial factor before the `tanh`, learned.
        - `dtype`: of the parameters; the default floating dtype if not given.
        """
        _check("DynamicTanh", size, 0.0)
        self.alpha = jnp.full((), alpha, dtype)
        self.weight = jnp.ones((size,), dtype)
        self.bias = jnp.zeros((size,), dtype)

    def __call__(
        self, x: Float[Array, "*batch size"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch size"]:
        """Maps every element of `x`. `key` is ignored, as in Equinox."""
        h = x.astype(accumulation_dtype(x.dtype))
        h = jnp.tanh(self.alpha.astype(h.dtype) * h)
        h = h * along_last("norm", self.weight, h) + along_last("norm", self.bias, h)
        return h.astype(x.dtype)


def _check(name: str, size: int, eps: float) -> None:
    if size < 1:
        raise ValueError(f"{name}: size={size} must be at least 1.")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{name}: eps={eps} must be at least 0 and finite.")
