"""Keys and values of the positions inside a window."""

from typing import Any

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

_SPARE = 32


class RingCache(eqx.Module):
    """The keys and values of the last positions, for one attention layer with a window.

    Position `i` is in slot `i % slots`, where it replaces position `i - slots`: memory is that of
    the window, however long the sequence. There are a few more slots than positions in the window,
    so that the last tokens can be taken back. Every method returns a new cache and leaves the old
    one valid.

    Arguments:

    - `k`, `v`: the slots.
    - `positions`: what each of them holds, -1 for nothing.
    - `length`: how many positions there were.
    - `window`: how many positions a query needs, its own included.
    """

    k: Float[Array, "*kv_heads slots head_dim"] | Int8Vectors
    v: Float[Array, "*kv_heads slots head_dim"] | Int8Vectors
    positions: Int[Array, " slots"]
    length: Int[Array, ""]
    window: int = eqx.field(static=True)

    @classmethod
    def init(
        cls, window: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike | None = None
    ) -> "RingCache":
        """An empty cache.

        Arguments:

        - `window`: how many positions a query needs, its own included.
        - `num_kv_heads`, `head_dim`: of the keys and values.
        - `dtype`: what they are stored in, as in `KVCache`.

        Raises:

        - `ValueError` for a dtype that is neither floating nor int8.
        """
        slots = window + _SPARE
        k, v = (empty(slots, num_kv_heads, head_dim, dtype) for _ in range(2))
        nothing = jnp.full((slots,), -1, jnp.int32)
        return cls(k, v, nothing, jnp.zeros((), jnp.int32), window)

    @staticmethod
    def saves_memory(window: int, max_len: int) -> bool:
        """Whether this is smaller than a cache of all positions."""
        return window + _SPARE < max_len

    def extended(
        self,
        k: Float[Array, "seq kv_heads head_dim"],
        v: Float[Array, "seq kv_heads head_dim"],
        length: int | Int[Array, ""] | None = None,
    ) -> tuple["RingCache", Array, Array, Int[Array, " kv_seq"]]:
        """The cache with the next positions, and the keys and values that these may attend to.

        Arguments:

        - `k`, `v`: the keys and values of the next positions.
        - `length`: how many of them count; the rest is padding. All if not given.

        Returns:

        The new cache; the keys and values that the new positions need, in the dtype of the new
        ones; and their positions, -1 where there is nothing.
        """
        seq, slots, dtype = k.shape[0], self.positions.shape[0], k.dtype
        count = jnp.asarray(seq if length is None else length, jnp.int32)
        count = eqx.error_if(
            count,
            (count > seq) | (count < 0),
            f"RingCache: the length must be from 0 to {seq}.",
        )
        rows = jnp.arange(seq, dtype=jnp.int32)
        valid = rows < count
        new = jnp.where(valid, self.length + rows, -1)
        kept = (jnp.where(valid[:, None, None], x, 0) for x in (k, v))
        added = (*(heads_first(stored(x, self.k.dtype)) for x in kept), new)
        # Only the last of the new positions that share a slot.
        last = valid & (rows >= count - slots)
        places = jnp.where(last, new % slots, slots)

        def write(old: Any, rows: Any) -> Any:
            axis = slots_axis(old)
            if seq > 1:
                at = (slice(None),) * axis + (places,)
                return old.at[at].set(rows, mode="drop", unique_indices=True)
            # Writes one row: the new one or, if that is padding, the one that is there.
            start = self.length % slots
            row = jnp.where(valid[0], rows, lax.dynamic_slice_in_dim(old, start, 1, axis))
            return lax.dynamic_update_slice_in_dim(old, row, start, axis)

        before = (self.k, self.v, self.positions)
        k, v, positions = jax.tree.map(write, before, added)
        cache = RingCache(k, v, positions, self.length + count, self.window)
        if seq - 1 > slots - self.window:
            # The first new position needs old ones whose slots the last new ones take.
            k, v, positions = jax.tree.map(
                lambda old, new: jnp.concatenate([old, new], slots_axis(old)), before, added
            )
        k, v = (heads_last(as_floats(x, dtype)) for x in (k, v))
        return cache, k, v, positions

    def truncate(self, length: int | Int[Array, ""]) -> "RingCache":
        """The cache with only its first `length` positions, to take back what was appended.

        Raises:

        - An error, at run time under `jax.jit`, if `length` is negative or more than there are, or
            if so many are taken back that positions inside the window are lost.
        """
        new = jnp.broadcast_to(jnp.asarray(length, jnp.int32), self.length.shape)
        slots = self.positions.shape[-1]
        # Positions taken back before have left empty slots: the oldest is not `length - slots`.
        held = self.positions >= 0
        oldest = jnp.min(jnp.where(held, self.positions, self.length[..., None]), axis=-1)
        lost = oldest > jnp.maximum(new - self.window + 1, 0)
        new = eqx.error_if(
            new,
            jnp.any((new < 0) | (new > self.length) | lost),
            f"RingCache: truncate(length) needs a length from 0 to that of the cache, and at most "
            f"{slots - self.window + 1} positions can be taken back in all.",
        )
        positions = jnp.where(self.positions < new[..., None], self.positions, -1)
        # Not by the constructor, which does not accept the arrays of a stack of layers.
        return eqx.tree_at(lambda cache: (cache.length, cache.positions), self, (new, positions))
