"""Counter-based dropout of attention weights, so that every implementation drops the same ones.

Whether a weight is kept is a hash of (seed, head, query index, key index). Nothing depends on the
order in which tiles are visited, and a backward pass recomputes the pattern instead of storing it.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3: every input bit affects every output bit."""
    x ^= x >> 16
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def keep(
    seed: UInt32[Array, "2"],
    rate: float,
    heads: int,
    q_index: Int[Array, " q"],
    kv_index: Int[Array, " kv"],
) -> Bool[Array, "heads q kv"]:
    """Which attention weights survive dropout at `rate`."""
    row = row_hash(seed, jnp.arange(heads, dtype=jnp.int32)[:, None], q_index[None, :])
    return survives(row[:, :, None], column_hash(seed, kv_index)[None, None, :], rate)


def row_hash(
    seed: Any, head: Int[Array, "..."], q_index: Int[Array, "..."]
) -> UInt32[Array, "..."]:
    """The hash of a query in a head. `seed` may be a kernel's reference to the array."""
    head = _mix(seed[0] ^ _mix(head.astype(jnp.uint32) + seed[1]))
    return _mix(head + q_index.astype(jnp.uint32) * np.uint32(0x9E3779B1))


def column_hash(seed: Any, kv_index: Int[Array, "..."]) -> UInt32[Array, "..."]:
    """The hash of a key."""
    return _mix(kv_index.astype(jnp.uint32) * np.uint32(0x7FEB352D) + seed[1])


def survives(
    row: UInt32[Array, "..."], column: UInt32[Array, "..."], rate: float
) -> Bool[Array, "..."]:
    """Which pairs of a query and a key survive dropout at `rate`."""
    return _mix(row ^ column) >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
