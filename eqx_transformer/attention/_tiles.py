"""Which tiles of the score matrix have to be computed, and which of them need the mask."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ._inputs import Inputs
from ._masks import EMPTY, FULL, PARTIAL, AbstractMask, And, Not, Or


class Tiling(NamedTuple):
    """How the score matrix is cut."""

    block_q: int
    block_kv: int
    cost: float = 1.0
    """The cost of one score, relative to other tilings."""


class TileList(NamedTuple):
    """Tiles that are treated alike, in the order in which they are visited."""

    rows: Int[np.ndarray, " tiles"]
    columns: Int[np.ndarray, " tiles"]
    masked: bool
    """Whether the predicate must be applied inside the tile."""
    live: Bool[Array, " tiles"] | None
    """Which tiles turn out to be non-empty, where that depends on data; `None`: all."""


class _Unknown(AbstractMask):
    """Stands for a mask that depends on data while tiles are classified ahead of time."""

    def __call__(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        raise NotImplementedError

    def block(
        self,
        q_lo: Int[Array, "..."],
        q_hi: Int[Array, "..."],
        kv_lo: Int[Array, "..."],
        kv_hi: Int[Array, "..."],
    ) -> Int[Array, "..."]:
        bounds = (q_lo, q_hi, kv_lo, kv_hi)
        return jnp.full(jnp.broadcast_shapes(*(x.shape for x in bounds)), PARTIAL)


def _depends_on_data(mask: AbstractMask) -> bool:
    return bool(jax.tree.leaves(eqx.filter(mask, eqx.is_array)))


def _static_part(mask: AbstractMask) -> AbstractMask:
    """The mask with everything that depends on data replaced by "unknown"."""

    def is_leaf(x: object) -> bool:
        return isinstance(x, AbstractMask) and not isinstance(x, And | Or | Not)

    def replace(x: object) -> object:
        return _Unknown() if isinstance(x, AbstractMask) and _depends_on_data(x) else x

    return jax.tree.map(replace, mask, is_leaf=is_leaf)


def position_tiles(positions: Int[Array, " seq"], block: int) -> Int[Array, "tiles block"]:
    """Positions by tile. The last tile is padded with the last position: its range stays tight."""
    tail = -positions.shape[0] % block
    filled = jnp.concatenate([positions, jnp.broadcast_to(positions[-1:], (tail,))])
    return filled.reshape(filled.shape[0] // block, block)


def cost(tiling: Tiling, lists: list[TileList]) -> float:
    """The cost of all tiles that are not known at trace time to be empty."""
    tiles = sum(len(x.rows) for x in lists)
    return tiles * tiling.block_q * tiling.block_kv * tiling.cost


def tile_lists(inputs: Inputs, tiling: Tiling) -> list[TileList]:
    """Classifies the tiles of one attention call.

    What follows from static facts (a causal mask at default positions, a window) is decided at
    trace time: empty tiles are not in the program at all, even under `vmap`. What depends on data
    (documents, padding, given positions) is decided at run time, by skipping.
    """
    block_q, block_kv, _ = tiling
    rows, columns = -(-inputs.q_seq // block_q), -(-inputs.kv_seq // block_kv)
    if rows == 0 or columns == 0:
        return []
    at_default = inputs.q_positions is None and inputs.kv_positions is None
    kinds = np.full((rows, columns), FULL if inputs.mask is None else PARTIAL)
    if inputs.mask is not None and at_default:
        q_lo, kv_lo = np.arange(rows) * block_q, np.arange(columns) * block_kv
        q_hi = np.minimum(q_lo + block_q, inputs.q_seq) - 1
        kv_hi = np.minimum(kv_lo + block_kv, inputs.kv_seq) - 1
        with jax.ensure_compile_time_eval():
            bounds = [jnp.asarray(x, jnp.int32)[:, None] for x in (q_lo, q_hi)]
            bounds += [jnp.asarray(x, jnp.int32)[None, :] for x in (kv_lo, kv_hi)]
            block = _static_part(inputs.mask).block(*bounds)
            kinds = np.array(jnp.broadcast_to(block, kinds.shape))
    if inputs.kv_seq % block_kv:
        kinds[:, -1] = np.minimum(kinds[:, -1], PARTIAL)

    lists = []
    if (kinds == FULL).any():
        lists.append(TileList(*np.nonzero(kinds == FULL), masked=False, live=None))
    if (kinds == PARTIAL).any():
        partial_rows, partial_columns = np.nonzero(kinds == PARTIAL)
        live = None
        if inputs.mask is not None and not (at_default and not _depends_on_data(inputs.mask)):
            q_pos = position_tiles(inputs.q_pos(), block_q)
            kv_pos = position_tiles(inputs.kv_pos(), block_kv)
            block = inputs.mask.block(
                q_pos.min(axis=1)[:, None],
                q_pos.max(axis=1)[:, None],
                kv_pos.min(axis=1)[None, :],
                kv_pos.max(axis=1)[None, :],
            )
            live = jnp.broadcast_to(block, kinds.shape)[partial_rows, partial_columns] != EMPTY
        lists.append(TileList(partial_rows, partial_columns, masked=True, live=live))
    return lists
