"""How caches store vectors: as floating-point numbers of some width, or in eight bits."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int8, Num

from .._precision import accumulation_dtype


class Int8Vectors(eqx.Module):
    """Vectors in eight bits, each with a scale of its own.

        scales = max |x| / 127
        values = round(x / scales)
        x      ~ scales * values

    along the last axis, which for keys and values is that of one position and head. The error of a
    number is at most `scales / 2 = max |x| / 254`.
    """

    values: Int8[Array, "*axes size"]
    scales: Float[Array, "*axes 1"]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the vectors."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """int8."""
        return self.values.dtype


Stored = Array | Int8Vectors
"""What a cache holds: an array of vectors, or their form in eight bits."""


def stored(x: Stored, dtype: DTypeLike) -> Stored:
    """Vectors as a cache of this dtype stores them.

    Raises:

    - `ValueError` if `dtype` is neither floating nor int8.
    """
    dtype = jnp.dtype(dtype)
    if isinstance(x, Int8Vectors):
        x = as_floats(x, jnp.float32)
    if dtype == jnp.int8:
        return Int8Vectors(*_rounded(x))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"cache: dtype={dtype} must be a floating dtype, or int8.")
    return x.astype(dtype)


def empty(max_len: int, num_heads: int, size: int, dtype: DTypeLike | None) -> Stored:
    """Empty slots."""
    return heads_first(
        stored(
            jnp.zeros((max_len, num_heads, size)),
            jnp.result_type(float) if dtype is None else dtype,
        )
    )


def as_floats(x: Stored, dtype: DTypeLike) -> Float[Array, "..."]:
    """The vectors themselves, for computing with them in `dtype`."""
    if not isinstance(x, Int8Vectors):
        return x.astype(dtype)
    wide = accumulation_dtype(dtype)
    return (x.values.astype(wide) * x.scales.astype(wide)).astype(dtype)


@jax.custom_jvp
def _rounded(x: Array) -> tuple[Array, Array]:
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0) / 127
    values = jnp.round(x / jnp.where(scales == 0, 1, scales))
    return values.astype(jnp.int8), scales


@_rounded.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "cache: rounding to int8 has no derivative; differentiate through a cache with a floating "
        "dtype."
    )


def heads_first(x: Stored) -> Stored:
    """`[seq, heads, size]` in the order in which attention reads it, `[heads, seq, size]`.

    A single head has no axis: XLA would remove an axis of size one before a product, and fuse this
    with the write of new positions, which would then copy the cache instead of updating it in
    place.
    """
    return jax.tree.map(lambda x: x[:, 0] if x.shape[1] == 1 else jnp.swapaxes(x, 0, 1), x)


def heads_last(x: Float[Array, "*heads seq size"]) -> Float[Array, "seq num_heads size"]:
    """The inverse of `heads_first`."""
    return x[:, None] if x.ndim == 2 else jnp.swapaxes(x, 0, 1)


def slots_axis(x: Num[Array, "..."]) -> int:
    """The axis of positions: the second to last of vectors, the only one of numbers."""
    return max(x.ndim - 2, 0)
