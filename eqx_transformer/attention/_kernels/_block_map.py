"""Which tiles of the score matrix a kernel visits, in which order, and which need the mask."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .._inputs import Inputs
from .._masks import EMPTY, FULL, PARTIAL, AbstractMask
from .._tiles import position_tiles


class Visits(NamedTuple):
    """For every row of tiles (or column, see `transposed`), the tiles that are not empty."""

    order: Int[Array | np.ndarray, "rows columns"] | None
    """Their columns: first those that need no mask, then the others, then empty ones. `None` where
    that is `0, 1, 2, ...`."""
    full: Int[Array | np.ndarray, " rows"]
    """How many need no mask."""
    live: Int[Array | np.ndarray, " rows"]
    """How many are not empty."""


class Loops(NamedTuple):
    """What is known of `Visits` ahead of time."""

    ordered: bool
    """Whether the tiles of a line are `0, 1, 2, ...`."""
    any_full: bool
    """Whether some tile may need no mask."""
    any_masked: bool
    """Whether some tile may need the mask."""


def loops(visits: Visits) -> Loops:
    """The loops that a program needs for its line of tiles."""
    full, live = visits.full, visits.live
    if isinstance(full, np.ndarray) and isinstance(live, np.ndarray):
        return Loops(visits.order is None, bool((full > 0).any()), bool((full < live).any()))
    return Loops(visits.order is None, True, True)


def visits(inputs: Inputs, block_q: int, block_kv: int, *, transposed: bool = False) -> Visits:
    """Lists the tiles that are not empty, by row or, `transposed`, by column.

    What follows from static facts alone consists of constants. Everything else is computed by the
    program, and is one more operand with a batch axis where the mask or the positions have one.
    """
    rows, columns = -(-inputs.q_seq // block_q), -(-inputs.kv_seq // block_kv)
    at_default = inputs.q_positions is None and inputs.kv_positions is None
    kinds: Any
    if inputs.mask is None:
        kinds = np.full((rows, columns), FULL)
    elif at_default and not any(map(_is_data, jax.tree.leaves(inputs.mask))):
        kinds = _static_kinds(inputs.mask, inputs.q_seq, inputs.kv_seq, block_q, block_kv)
    else:
        kinds = _classified(inputs.mask, inputs.q_pos(), inputs.kv_pos(), block_q, block_kv)
    # What sticks out of the sequence is masked like what a mask excludes.
    edge = np.full((rows, columns), FULL)
    if inputs.kv_seq % block_kv:
        edge[:, -1] = PARTIAL
    if transposed:
        kinds, edge = kinds.T, edge.T
    if isinstance(kinds, np.ndarray):
        return _sorted(np.minimum(kinds, edge), np)
    return _sorted(jnp.minimum(kinds, edge), jnp)


def _is_data(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


@functools.lru_cache(maxsize=256)
def _static_kinds(mask: AbstractMask, q_seq: int, kv_seq: int, block_q: int, block_kv: int) -> Any:
    # Every kernel of a call asks, each time it is traced.
    with jax.ensure_compile_time_eval():
        q_pos, kv_pos = (jnp.arange(n, dtype=jnp.int32) for n in (q_seq, kv_seq))
        return np.array(_classified(mask, q_pos, kv_pos, block_q, block_kv))


def _classified(mask: AbstractMask, q_pos: Any, kv_pos: Any, block_q: int, block_kv: int) -> Any:
    q_pos, kv_pos = position_tiles(q_pos, block_q), position_tiles(kv_pos, block_kv)
    block = mask.block(
        q_pos.min(axis=1)[:, None],
        q_pos.max(axis=1)[:, None],
        kv_pos.min(axis=1)[None, :],
        kv_pos.max(axis=1)[None, :],
    )
    return jnp.broadcast_to(block, (q_pos.shape[0], kv_pos.shape[0]))


def _sorted(kinds: Any, xp: Any) -> Visits:
    full = (kinds == FULL).sum(axis=1).astype(xp.int32)
    live = (kinds != EMPTY).sum(axis=1).astype(xp.int32)
    order = xp.argsort(FULL - kinds, axis=1, stable=True).astype(xp.int32)
    if xp is np:
        order = order[:, : max(1, int(live.max(initial=0)))]
        counted = np.arange(order.shape[1], dtype=np.int32)
        if np.where(counted < live[:, None], order == counted, True).all():
            order = None
    return Visits(order, full, live)
