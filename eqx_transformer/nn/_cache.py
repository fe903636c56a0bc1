"""Keys and values of the positions a model has already seen."""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int

from ._cache_storage import (
    Int8Vectors,
    as_floats,
    empty,
    heads_first,
    heads_last,
    slots_axis,
    stored,
)


class KVCache(eqx.Module):
    """The keys and values of one attention layer, as an immutable value.

    Slot `i` holds position `i`; the first `length` slots are filled. Heads come first, the order in
    which attention reads them: in the other order they would be transposed, that is, copied, for
    every token. A single head has no axis. Every method returns a new cache and leaves the old one
    valid, so that a search can fork it and a draft can be rolled back.
    """

    k: Float[Array, "*kv_heads max_len head_dim"] | Int8Vectors
    v: Float[Array, "*kv_heads max_len v_dim"] | Int8Vectors
    length: Int[Array, ""]

    @classmethod
    def init(
        cls,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike | None = None,
        *,
        v_dim: int | None = None,
    ) -> "KVCache":
        """An empty cache.

        Arguments:

        - `max_len`: how many positions fit.
        - `num_kv_heads`, `head_dim`: of the keys and values.
        - `dtype`: what they are stored in: a floating dtype, the default one if not given; or int8,
            see `Int8Vectors`.
        - `v_dim`: size of the values; `head_dim` if not given.

        Raises:

        - `ValueError` for a `max_len` below 1, or an unsupported dtype.
        """
        if max_len < 1:
            raise ValueError(f"KVCache: max_len={max_len} must be at least 1.")
        v_dim = head_dim if v_dim is None else v_dim
        k, v = (empty(max_len, num_kv_heads, size, dtype) for size in (head_dim, v_dim))
        return cls(k, v, jnp.zeros((), jnp.int32))

    @property
    def max_len(self) -> int:
        """How many positions fit."""
        return self.k.shape[-2]

    def positions(self) -> Int[Array, " max_len"]:
        """The absolute position that each slot holds, -1 where it holds none."""
        slots = jnp.arange(self.max_len, dtype=jnp.int32)
        return jnp.where(slots < self.length, slots, -1)

    def append(
        self,
        k: Float[Array, "seq kv_heads head_dim"],
        v: Float[Array, "seq kv_heads v_dim"],
        length: int | Int[Array, ""] | None = None,
    ) -> "KVCache":
        """The cache with the keys and values of the next positions.

        Arguments:

        - `k`, `v`: to be stored, in the dtype of the cache.
        - `length`: how many of them count. The rest is padding: it is not stored, and need not fit.

        Raises:

        - An error, at run time under `jax.jit`, if they do not fit or there are fewer than
            `length`. Equinox's `EQX_ON_ERROR=nan` turns it into NaN where a check on the host
            is too slow.
        """
        seq = k.shape[0]
        if seq > self.max_len:
            raise ValueError(
                f"KVCache: {seq} positions cannot be appended to a cache of max_len="
                f"{self.max_len}; make it with a larger max_len."
            )
        count = jnp.asarray(seq if length is None else length, jnp.int32)
        end = self.length + count
        end = eqx.error_if(
            end,
            (end > self.max_len) | (count > seq) | (count < 0),
            f"KVCache: more positions than max_len={self.max_len}, or a length outside 0..{seq}; "
            "make the cache with a larger max_len.",
        )
        # XLA would shift a slice that ends beyond the array back, over slots that are filled.
        start = jnp.minimum(self.length, self.max_len - seq)

        def write(old: Any, new: Any) -> Any:
            here, there = (list(x.shape) for x in (new, old))
            if len(here) == len(there):
                here[slots_axis(old)] = there[slots_axis(old)]
            if here != there:
                raise ValueError(
                    f"KVCache: vectors of shape {new.shape} cannot be appended to slots of shape "
                    f"{old.shape}, heads and positions first; make the cache with init_cache of "
                    "this model."
                )
            if length is not None:
                axis, rows = slots_axis(old), jnp.arange(seq, dtype=jnp.int32)
                new = jnp.where(jnp.broadcast_to((rows < count)[:, None], new.shape), new, 0)
                new = jnp.roll(new, self.length - start, axis)
                filled = jnp.broadcast_to((start + rows < self.length)[:, None], new.shape)
                new = jnp.where(filled, lax.dynamic_slice_in_dim(old, start, seq, axis), new)
            return lax.dynamic_update_slice_in_dim(old, new, start, slots_axis(old))

        new = (heads_first(stored(x, self.k.dtype)) for x in (k, v))
        k, v = (jax.tree.map(write, *pair) for pair in zip((self.k, self.v), new, strict=True))
        return KVCache(k, v, end)

    def extended(
        self,
        k: Float[Array, "seq kv_heads head_dim"],
        v: Float[Array, "seq kv_heads v_dim"],
        length: int | Int[Array, ""] | None = None,
    ) -> tuple["KVCache", Array, Array, Int[Array, " kv_seq"]]:
        """The cache with the next positions, and the keys and values that these may attend to.

        Arguments and errors are those of `append`.

        Returns:

        The new cache; all keys and values, in the dtype of the new ones; and their positions, -1
        where there is nothing.
        """
        cache = self.append(k, v, length)
        k, v = (heads_last(as_floats(x, k.dtype)) for x in (cache.k, cache.v))
        return cache, k, v, cache.positions()

    def truncate(self, length: int | Int[Array, ""]) -> "KVCache":
        """The cache with only its first `length` positions, to take back what was appended.

        Raises:

        - An error, at run time under `jax.jit`, if `length` is negative or more than there are.
        """
        new = jnp.broadcast_to(jnp.asarray(length, jnp.int32), self.length.shape)
        new = eqx.error_if(
            new,
            jnp.any((new < 0) | (new > self.length)),
            "KVCache: truncate(length) needs a length from 0 to that of the cache.",
        )
        # Not by the constructor, which does not accept the arrays of a stack of layers.
        return eqx.tree_at(lambda cache: cache.length, self, new)


Cache = TypeVar("Cache")


def truncate(cache: Cache, length: int | Int[Array, ""]) -> Cache:
    """A cache with only its first `length` positions, to take back what was appended.

    Arguments:

    - `cache`: of one layer, of a stack of layers or of a model: any PyTree of caches that have a
        method `truncate`. Anything else in it, such as the memory of an encoder, is kept.
    - `length`: how many positions to keep.

    Raises:

    - `ValueError` for a cache that cannot be truncated, such as a sum over positions.
    - An error, at run time under `jax.jit`, if `length` is negative or more than there are.
    """

    def has_truncate(x: Any) -> bool:
        return hasattr(x, "truncate")

    def truncated(x: Any) -> Any:
        return x.truncate(length) if has_truncate(x) else x

    return jax.tree.map(truncated, cache, is_leaf=has_truncate)
