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
    """What is known about `Visits` at trace time."""

    ordered: bool
    """Whether the tiles of a line are `0, 1, 2, ...`."""
    any_full: bool
    """Whether some tile may need no mask."""
    any_masked: bool
    """Whether some tile may need the mask."""


class Span(NamedTuple):
    """For a single row of tiles, the range from the first that is not empty to the last."""

    bounds: Int[Array | np.ndarray, "2"]
    """The first of them, and one past the last."""
    any_masked: bool
    """Whether some tile may need the mask."""


def loops(visits: Visits | Span) -> Loops:
    """The loops that a program needs for its line of tiles."""
    if isinstance(visits, Span):
        return Loops(True, not visits.any_masked, visits.any_masked)
    full, live = visits.full, visits.live
    if isinstance(full, np.ndarray) and isinstance(live, np.ndarray):
        return Loops(visits.order is None, bool((full > 0).any()), bool((full < live).any()))
    return Loops(visits.order is None, True, True)


def visits(inputs: Inputs, block_q: int, block_kv: int, *, transposed: bool = False) -> Visits:
    """Lists the tiles that are not empty, by row or, `transposed`, by column.

    What follows from static facts alone becomes constants. Everything else is computed at run time,
    and is one more operand, batched where the mask or the positions are.
    """
    kinds = _kinds(inputs, block_q, block_kv)
    kinds = kinds.T if transposed else kinds
    return _sorted(kinds, np if isinstance(kinds, np.ndarray) else jnp)


def span(inputs: Inputs, block_kv: int) -> Span:
    """The range of tiles that are not empty, where all queries are one tile.

    Few queries are cheap to mask, so a list of tiles would not be worth the time it takes to sort.
    """
    kinds = _kinds(inputs, inputs.q_seq, block_kv)[0]
    xp: Any = np if isinstance(kinds, np.ndarray) else jnp
    live = kinds != EMPTY
    first, behind = xp.argmax(live), len(kinds) - xp.argmax(live[::-1])
    bounds = xp.stack([first, xp.where(live.any(), behind, first)]).astype(xp.int32)
    return Span(bounds, xp is jnp or bool((kinds != FULL).any()))


def _kinds(inputs: Inputs, block_q: int, block_kv: int) -> Any:
    """Whether tiles are empty, full or partial: a NumPy array where known at trace time."""
    rows, columns = -(-inputs.q_seq // block_q), -(-inputs.kv_seq // block_kv)
    at_default = inputs.q_positions is None and inputs.kv_positions is None
    kinds: Any
    if inputs.mask is None:
        kinds = np.full((rows, columns), FULL)
    elif at_default and not any(map(_is_data, jax.tree.leaves(inputs.mask))):
        kinds = _static_kinds(inputs.mask, inputs.q_seq, inputs.kv_seq, block_q, block_kv)
    else:
        q = _ranges(inputs.q_positions, inputs.q_seq, block_q)
        kinds = _classified(inputs.mask, q, _ranges(inputs.kv_positions, inputs.kv_seq, block_kv))
    # Positions beyond the sequence are masked like those that a mask excludes.
    edge = np.full((rows, columns), FULL)
    if inputs.kv_seq % block_kv:
        edge[:, -1] = PARTIAL
    return (np if isinstance(kinds, np.ndarray) else jnp).minimum(kinds, edge)


def _is_data(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


@functools.lru_cache(maxsize=256)
def _static_kinds(mask: AbstractMask, q_seq: int, kv_seq: int, block_q: int, block_kv: int) -> Any:
    # Cached, because every kernel of a call asks, each time it is traced.
    q, kv = _ranges(None, q_seq, block_q), _ranges(None, kv_seq, block_kv)
    with jax.ensure_compile_time_eval():
        return np.array(_classified(mask, q, kv))


def _ranges(positions: Any, seq: int, block: int) -> tuple[Any, Any]:
    """The least and the greatest position of every tile."""
    if positions is None:
        first = np.arange(0, seq, block, dtype=np.int32)
        return first, np.minimum(first + np.int32(block), np.int32(seq)) - np.int32(1)
    tiles = position_tiles(positions, block)
    return tiles.min(axis=1), tiles.max(axis=1)


def _classified(mask: AbstractMask, q: tuple[Any, Any], kv: tuple[Any, Any]) -> Any:
    bounds = [jnp.asarray(x)[:, None] for x in q] + [jnp.asarray(x)[None, :] for x in kv]
    return jnp.broadcast_to(mask.block(*bounds), (len(q[0]), len(kv[0])))


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
