"""What the kernels have in common: sizes, operands, and what is computed of one tile of scores."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from .._dropout import column_hash, row_hash, survives
from .._inputs import Inputs
from ._block_map import Loops, loops, span, visits
from ._pointwise import Program, Run, Traced, trace
from ._tuning import Kernel, Tiles, Tuning

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """The static facts of one attention call."""

    q_seq: int
    kv_seq: int
    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    dtype: Any
    scale: float
    dropout_rate: float
    tiles: Tiles
    loops: Loops
    mod: Program | None
    mask: Program | None

    @property
    def block_q(self) -> int:
        """How many queries a tile has."""
        return self.tiles.block_q

    @property
    def block_kv(self) -> int:
        """How many keys a tile has."""
        return self.tiles.block_kv

    @property
    def group(self) -> int:
        """How many query heads share a key head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """How many tiles there are along the queries."""
        return pl.cdiv(self.q_seq, self.block_q)

    @property
    def columns(self) -> int:
        """How many tiles there are along the keys."""
        return pl.cdiv(self.kv_seq, self.block_kv)


def mask_program(inputs: Inputs) -> Traced | None:
    """The mask's predicate."""
    mask = inputs.mask
    if mask is None:
        return None
    positions = {"q_pos": jnp.int32, "kv_pos": jnp.int32}
    return trace(
        lambda q_pos, kv_pos: (mask(q_pos, kv_pos),), positions, what="mask", like=inputs.q
    )


def mod_program(inputs: Inputs, *, slope: bool = False, tangent: Any = None) -> Traced | None:
    """The score mod: the new score, with its derivative (`slope`) or its tangent (`tangent`).

    The tangent is in direction `dscore` and, for the mod's arrays, `tangent`: a PyTree like the
    mod, with `None` for what is not perturbed.
    """
    mod = inputs.score_mod
    if mod is None:
        return None
    names = {"score": inputs.dtype, "q_pos": jnp.int32, "kv_pos": jnp.int32, "head": jnp.int32}

    def value(score: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
        return (mod(score, q_pos, kv_pos, head),)

    def with_slope(score: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
        new, pull = jax.vjp(lambda x: mod(x, q_pos, kv_pos, head), score)
        return new, pull(jnp.ones_like(new))[0]

    def moved(score: Any, dscore: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
        def function(mod: Any, score: Any) -> Any:
            return mod(score, q_pos, kv_pos, head)

        return eqx.filter_jvp(function, (mod, score), (tangent, dscore))

    if tangent is not None:
        return trace(moved, names | {"dscore": inputs.dtype}, what="score_mod", like=inputs.q)
    return trace(with_slope if slope else value, names, what="score_mod", like=inputs.q)


def programs(inputs: Inputs) -> None:
    """Raises `NoKernelError` if score mod or mask have no counterpart in a kernel."""
    mask_program(inputs)
    mod_program(inputs, slope=True)


def prepare(
    inputs: Inputs, kernel: Kernel, tuning: Tuning, mod: Traced | None, *, by_column: bool = False
) -> tuple[Frame, dict[str, Any]]:
    """The facts of a call, and operands that every program of the kernel may read.

    Arguments:

    - `by_column`: whether a program visits a column of tiles, and not a row.
    """
    mask = mask_program(inputs)
    looks_up_pairs = any(x is not None and x.program.looks_up_pairs for x in (mod, mask))
    tiles = tuning(kernel, inputs, looks_up_pairs)
    if kernel == "decode":
        lists = span(inputs, tiles.block_kv)
        visited: dict[str, Any] = {"bounds": lists.bounds}
    else:
        lists = visits(inputs, tiles.block_q, tiles.block_kv, transposed=by_column)
        visited = lists._asdict()
    frame = Frame(
        q_seq=inputs.q_seq,
        kv_seq=inputs.kv_seq,
        heads=inputs.heads,
        kv_heads=inputs.kv_heads,
        head_dim=inputs.q.shape[-1],
        v_dim=inputs.v.shape[-1],
        dtype=inputs.q.dtype,
        scale=inputs.scale,
        dropout_rate=inputs.dropout_rate,
        tiles=tiles,
        loops=loops(lists),
        mod=None if mod is None else mod.program,
        mask=None if mask is None else mask.program,
    )
    operands = visited | {
        "q_pos": inputs.q_positions,
        "kv_pos": inputs.kv_positions,
        "seed": inputs.dropout_seed,
        "mod": [] if mod is None else mod.tables,
        "mask": [] if mask is None else mask.tables,
    }
    return frame, operands


def dot(a: Any, b: Any, contract: tuple[int, int] = (1, 0)) -> Any:
    """A product of tiles, with sums in float32."""
    return lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """The queries, or the keys, of a tile."""

    index: Any
    """Their indices in the sequence, `[block]`."""
    below: Any
    """Which of them are within the sequence; `None` if all are."""
    pos: Any
    """Their absolute positions, `[block]`."""


def side(start: Any, block: int, seq: int, positions: Any) -> Side:
    """Queries or keys from `start` on."""
    index = start + jnp.arange(block, dtype=jnp.int32)
    ragged = seq % block != 0
    # Positions that exist, so that functions of them are as well-behaved as elsewhere.
    inside = jnp.minimum(index, seq - 1) if ragged else index
    return Side(
        index,
        index < seq if ragged else None,
        inside if positions is None else positions[inside],
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Tile:
    """A tile of scores in a kernel. Some fields may be filled in only later, by `at`."""

    frame: Frame
    refs: dict[str, Any]
    mod: Run | None
    mask: Run | None
    masked: bool = True
    """Whether some pairs may be excluded, or be beyond the sequence."""
    head: Any = None
    """One for the tile, or one for each of its rows."""
    q: Side | None = None
    kv: Side | None = None

    def at(
        self,
        *,
        head: Any = None,
        row: Any = None,
        queries: Side | None = None,
        column: Any = None,
        masked: bool = True,
    ) -> "Tile":
        """Sets which tile it is. What score mod and mask compute from that is computed here."""
        new: dict[str, Any] = {"masked": masked}
        mod, mask = {}, {}
        if head is not None:
            new["head"] = head
            mod["head"] = head if jnp.ndim(head) == 0 else head[:, None]
        if row is not None:
            size = self.frame.block_q
            queries = side(row * size, size, self.frame.q_seq, self.refs["q_pos"])
        if queries is not None:
            new["q"] = queries
            mod["q_pos"] = mask["q_pos"] = queries.pos[:, None]
        if column is not None:
            size = self.frame.block_kv
            new["kv"] = side(column * size, size, self.frame.kv_seq, self.refs["kv_pos"])
            mod["kv_pos"] = mask["kv_pos"] = new["kv"].pos[None, :]
        if self.mod is not None:
            new["mod"] = self.mod.bind(**mod)
        if self.mask is not None and masked:
            new["mask"] = self.mask.bind(**mask)
        return dataclasses.replace(self, **new)

    def modified(self, score: Any, **tangents: Any) -> tuple[Any, ...]:
        """The results of the score mod for scaled scores, in tiles of the same shape."""
        assert self.mod is not None
        out = self.mod.bind(score=score, **tangents).outputs()
        return tuple(jnp.broadcast_to(x, score.shape) for x in out)

    def allowed(self) -> Any:
        """Which pairs may attend; `None` if all may."""
        assert self.kv is not None
        if not self.masked:
            return None
        kept = None if self.mask is None else self.mask.outputs()[0]
        if self.kv.below is not None:
            inside = self.kv.below[None, :]
            kept = inside if kept is None else jnp.logical_and(*_alike(kept, inside))
        shape = (self.frame.block_q, self.frame.block_kv)
        return None if kept is None else jnp.broadcast_to(kept, shape)

    def dropped(self, *tiles: Any) -> tuple[Any, ...]:
        """Attention weights, or their tangents, after dropout."""
        rate = self.frame.dropout_rate
        if not rate:
            return tiles
        assert self.q is not None and self.kv is not None
        seed = self.refs["seed"]
        row = row_hash(seed, self.head, self.q.index)[:, None]
        column = column_hash(seed, self.kv.index)[None, :]
        kept = survives(*_alike(row, column), rate)
        return tuple(jnp.where(kept, x * (1 / (1 - rate)), 0.0) for x in tiles)


def _alike(x: Any, y: Any) -> tuple[Any, Any]:
    shape = np.broadcast_shapes(np.shape(x), np.shape(y))
    return jnp.broadcast_to(x, shape), jnp.broadcast_to(y, shape)


def start(frame: Frame, refs: dict[str, Any]) -> Tile:
    """A tile of a program, still to be placed by `at`."""
    mod = None if frame.mod is None else frame.mod.start(refs["mod"])
    mask = None if frame.mask is None else frame.mask.start(refs["mask"])
    return Tile(frame, refs, mod, mask)


def visit(
    frame: Frame,
    refs: dict[str, Any],
    line: Any,
    step: Callable[[Any, bool, Any], Any],
    state: Any,
) -> Any:
    """Runs `step(tile, masked, state)` over the tiles of a row, or column, that are not empty."""
    full, live = refs["full"][line], refs["live"][line]

    def loop(masked: bool) -> Callable[[Any, Any], Any]:
        def body(n: Any, state: Any) -> Any:
            return step(n if frame.loops.ordered else refs["order"][line, n], masked, state)

        return body

    if frame.loops.any_full:
        state = lax.fori_loop(0, full, loop(False), state)
    if frame.loops.any_masked:
        state = lax.fori_loop(full, live, loop(True), state)
    return state
