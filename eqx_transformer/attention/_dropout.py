"""Attention-weight dropout from a counter, so that every implementation drops the same weights.

Whether a weight is kept is a hash of (seed, head, query index, key index). Nothing depends on the
order in which tiles are visited, and a backward pass recomputes the pattern instead of storing it.
"""

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
    head = _mix(seed[0] ^ _mix(jnp.arange(heads, dtype=jnp.uint32) + seed[1]))
    row = _mix(head[:, None] + q_index.astype(jnp.uint32)[None, :] * np.uint32(0x9E3779B1))
    column = _mix(kv_index.astype(jnp.uint32) * np.uint32(0x7FEB352D) + seed[1])
    bits = _mix(row[:, :, None] ^ column[None, None, :])
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
