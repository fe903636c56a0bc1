"""What the kernels for TPUs have in common: their grid and operands, and a tile of scores.

Which tile comes next is known ahead, as the lists of `_block_map.py` are prefetched scalars.

A kernel looks things up in small tables only. What a score mod or a mask looks up or computes for
queries alone, or for keys alone, XLA computes beforehand, in memory linear in the sequence. Lookups
for pairs in a table as large as the scores, like a dense mask, it also computes beforehand; their
results are read in tiles.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._dropout import column_hash, row_hash, survives
from .._inputs import Inputs
from ._launch import launch
from ._pointwise import Instruction, Program, Run, Traced, results, split, wide
from ._tile import LOG2E, Frame, dot, prepare
from ._tuning import Kernel, Tiles, Tuning
from ._unrolled import NoKernelError

_LANES: Final = 128
_BLOCK: Final = 512
"""The most queries, and keys, that a tile has. Larger ones take minutes to compile, or too much
memory."""
_MAX_TABLE: Final = 1024
"""The most elements that a table in a kernel has: a lookup takes one step per 128."""
_KINDS: Final = ("queries", "keys", "rows", "columns", "pairs", "tables")
"""Kinds of operands, by their blocks: see `Plan.spec`."""


def _tiles(inputs: Inputs) -> Tiles:
    most = min(inputs.block_size or _BLOCK, _BLOCK)
    sizes = (min(most, n) for n in (inputs.q_seq, inputs.kv_seq))
    return Tiles(*(n + -n % _LANES for n in sizes))


class _Place(NamedTuple):
    """Which tile a program computes."""

    head: Any
    kv_head: Any
    row: Any
    column: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The grid of a kernel, and what all kernels read."""

    frame: Frame
    """Its score mod and mask are the parts that are left to the kernel."""
    by_column: bool
    lists: tuple[Any, ...]
    """`full`, `live` and, if it is not trivial, `order`, as in `Visits`."""
    steps: int
    """The most tiles that a line has."""
    operands: dict[str, dict[str, Any]]
    """Arrays by the kind of their blocks (see `spec`), then by name."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Heads, lines, tiles. By column: key heads, lines, query heads of the key head, tiles."""
        frame = self.frame
        if self.by_column:
            return frame.kv_heads, frame.columns, frame.group, self.steps
        return frame.heads, frame.rows, self.steps

    def place(self, *ids: Any) -> _Place:
        """The tile of a program, from the program's indices and the lists."""
        rank, group = len(self.grid), self.frame.group
        (head, line, *member, n), (_, live, *order) = ids[:rank], ids[rank:]
        # After the last tile of a line, the same tile again: then nothing is fetched.
        n = jnp.maximum(jnp.minimum(n, live[line] - 1), 0)
        n = order[0][line, n] if order else n
        if self.by_column:
            return _Place(head * group + member[0], head, n, line)
        return _Place(head, lax.div(head, jnp.int32(group)), line, n)

    def spec(self, kind: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        """The block of a tile in an array `[heads, ..., ...]`, where one head may stand for all."""
        block_q, block_kv = self.frame.block_q, self.frame.block_kv
        if kind == "tables":
            return pl.BlockSpec(shape, lambda *_: (0, 0))

        def head(x: _Place) -> Any:
            return x.head if shape[0] > 1 else 0

        if kind == "queries":
            block, index = (block_q, shape[2]), lambda x: (x.head, x.row, 0)
        elif kind == "keys":
            block, index = (block_kv, shape[2]), lambda x: (x.kv_head, x.column, 0)
        elif kind == "pairs":
            block, index = (block_kv, block_q), lambda x: (head(x), x.column, x.row)
        elif kind == "columns":
            block, index = (1, block_kv), lambda x: (head(x), 0, x.column)
        elif shape[2] == 1:
            block, index = (1, 1), lambda x: (head(x), 0, 0)
        else:
            block, index = (1, block_q), lambda x: (head(x), 0, x.row)
        return pl.BlockSpec((None, *block), lambda *ids: index(self.place(*ids)))

    def queries(self, x: Any) -> Any:
        """As `[heads, queries, dim]`, in whole tiles."""
        return _blocked(x, self.frame.block_q)

    def keys(self, x: Any) -> Any:
        """As `[heads, keys, dim]`, in whole tiles."""
        return _blocked(x, self.frame.block_kv)

    def row(self, x: Any, fill: float = 0.0) -> Any:
        """`[heads, queries]` as `[heads, 1, queries]`, in whole tiles."""
        tail = (0, -x.shape[1] % self.frame.block_q)
        return jnp.pad(x[:, None], ((0, 0), (0, 0), tail), constant_values=fill)


def _blocked(x: Any, block: int) -> Any:
    # Memory has 128 lanes whether they are used or not. TPUs have no float16.
    x = x.swapaxes(0, 1).astype(jnp.float32 if x.dtype == jnp.float16 else x.dtype)
    # Padded with the last token: at zeros a score mod may be singular, and 0 * inf is NaN.
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0)), mode="edge")
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % _LANES)))


def make_plan(
    inputs: Inputs, kernel: Kernel, tuning: Tuning, mod: Traced | None, *, by_column: bool = False
) -> Plan:
    """The grid of a kernel, and the operands that all kernels have."""
    tuning = Tuning(tuning.fixed if isinstance(tuning.fixed, Tiles) else _tiles(inputs))
    frame, shared = prepare(inputs, kernel, tuning, mod, by_column=by_column)
    head = jnp.arange(frame.heads, dtype=jnp.int32)[:, None, None]
    # Positions that exist, so that functions of them are as well-behaved as elsewhere.
    q_pos = jnp.pad(inputs.q_pos(), (0, -frame.q_seq % frame.block_q), mode="edge")
    kv_pos = jnp.pad(inputs.kv_pos(), (0, -frame.kv_seq % frame.block_kv), mode="edge")
    operands: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
    rest = {}
    for what, program in (("mod", frame.mod), ("mask", frame.mask)):
        if program is None:
            continue
        tables = shared[what]
        rest[what], given = _given(what, program, tables, frame, head, q_pos, kv_pos)
        for kind, arrays in given.items():
            operands[kind][what] = arrays
    if inputs.dropout_seed is not None:
        q_index, kv_index = (jnp.arange(x.size, dtype=jnp.int32) for x in (q_pos, kv_pos))
        row = row_hash(inputs.dropout_seed, head, q_index[None, None, :])
        operands["rows"]["dropout"] = row
        column = column_hash(inputs.dropout_seed, kv_index)[None, None, :]
        operands["columns"]["dropout"] = column
    live, order = shared["live"], shared["order"]
    longest = frame.rows if by_column else frame.columns
    return Plan(
        frame=dataclasses.replace(frame, **rest),
        by_column=by_column,
        lists=(shared["full"], live) if order is None else (shared["full"], live, order),
        steps=max(1, int(live.max())) if isinstance(live, np.ndarray) else longest,
        operands=operands,
    )


def _given(
    what: str, program: Program, tables: list[Any], frame: Frame, head: Any, q_pos: Any, kv_pos: Any
) -> tuple[Program, dict[str, Any]]:
    """The part of a program that is left to a kernel, and what that is given, by kind."""
    pair = frozenset(("q_pos", "kv_pos"))
    read = dict(zip(program.used, tables, strict=True))
    of_pairs: set[Any] = set()

    def before(node: Instruction) -> bool:
        if not node.needs <= pair | {"head"}:
            return False
        if not node.needs >= pair:
            return True
        large = node.table is not None and read[node.table].size >= frame.q_seq * frame.kv_seq
        if large or any(x in of_pairs for x in node.inputs):
            of_pairs.add(node)
        return node in of_pairs

    rest, given = split(program, before)
    name = "score_mod" if what == "mod" else "mask"
    for size in (read[n].size for n in rest.used):
        if size > _MAX_TABLE:
            raise NoKernelError(
                f"has no kernels on a TPU for a {name} that indexes, for every pair of positions, "
                f"a table of {size} elements, more than {_MAX_TABLE}"
            )
    if any(x.dtype == jnp.float16 for x in rest.instructions):
        raise NoKernelError(
            f"has no kernels on a TPU for a {name} that computes in float16 for every pair of "
            "positions"
        )
    operands: dict[str, Any] = {kind: {} for kind in ("rows", "columns", "pairs")}
    places = {"head": head, "q_pos": q_pos[None, None, :], "kv_pos": kv_pos[None, :, None]}
    for name, x in results(program, tables, given, **places).items():
        needs = given[name].needs
        kind = "pairs" if needs >= pair else "columns" if "kv_pos" in needs else "rows"
        # As int8, booleans of pairs take less memory; the kernel converts them.
        small = x.dtype == bool and kind == "pairs"
        x = x.astype(jnp.int8 if small else wide(x.dtype))
        operands[kind][name] = x.swapaxes(1, 2) if kind == "columns" else x
    operands["tables"] = [_table(read[n]) for n in rest.used]
    return rest, operands


def _table(x: Any) -> Any:
    """As rows of 128 numbers."""
    return jnp.pad(x, (0, -x.size % _LANES)).reshape(-1, _LANES).astype(wide(x.dtype))


@dataclasses.dataclass(frozen=True)
class _Lookup:
    """A table in a kernel, indexed by tiles."""

    ref: Any

    def __getitem__(self, index: Any) -> Any:
        table, parts = self.ref[...], []
        for first in range(0, index.shape[1], _LANES):
            part = index[:, first : first + _LANES]
            shape = (part.shape[0], _LANES)
            lane, found = part & (_LANES - 1), jnp.zeros(part.shape, table.dtype)
            for n in range(table.shape[0]):
                row = jnp.broadcast_to(table[n : n + 1], shape)
                there = jnp.take_along_axis(row, lane, axis=1, mode="promise_in_bounds")
                # A shift, as division is expensive.
                found = jnp.where(part >> 7 == n, there, found)
            parts.append(found)
        return jnp.concatenate(parts, axis=1)


def call_kernel(
    kernel: Callable[..., Any],
    plan: Plan,
    operands: dict[str, dict[str, Any]],
    outputs: list[tuple[str, tuple[int, ...], Any]],
    scratch: list[tuple[int, int]],
) -> list[Any]:
    """Launches a kernel. Outputs are kinds of blocks, shapes and dtypes."""
    operands = {kind: plan.operands[kind] | operands.get(kind, {}) for kind in _KINDS}
    specs = {
        kind: jax.tree.map(lambda x, kind=kind: plan.spec(kind, x.shape), arrays)
        for kind, arrays in operands.items()
    }
    leaves, treedef = jax.tree.flatten((plan.lists, operands))
    types = [jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(plan.lists),
        grid=plan.grid,
        in_specs=[specs],
        out_specs=[plan.spec(kind, shape) for kind, shape, _ in outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    )
    # Heads and lines may be split over two cores; axes that are summed over may not.
    semantics = (pltpu.PARALLEL,) * 2 + (pltpu.ARBITRARY,) * (len(plan.grid) - 2)

    def run(*leaves: Any, interpret: bool) -> Any:
        lists, operands = jax.tree.unflatten(treedef, leaves)
        axes = jax.typeof(leaves[0]).manual_axis_type
        call = pl.pallas_call(
            partial(_program, kernel, plan),
            grid_spec=grid_spec,
            out_shape=[
                jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=axes) for x in types
            ],
            interpret=interpret,
            compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        )
        return call(*lists, operands)

    return launch(run, [jnp.asarray(x) for x in leaves], types)


def _program(kernel: Callable[..., Any], plan: Plan, *refs: Any) -> None:
    """One program of a kernel."""
    count = len(plan.lists)
    full_ref, live_ref = refs[:2]
    ids = [pl.program_id(axis) for axis in range(len(plan.grid))]
    tile = Tile(plan, refs[count], plan.place(*ids, *refs[:count]).column)
    begin, step, finish = kernel(tile, *refs[count + 1 :])
    n, full, live = ids[-1], full_ref[ids[1]], live_ref[ids[1]]
    first, last = n == 0, n == plan.steps - 1
    if plan.by_column:
        first, last = first & (ids[2] == 0), last & (ids[2] == plan.frame.group - 1)
    pl.when(first)(begin)
    if plan.frame.loops.any_full:
        pl.when(n < full)(partial(step, dataclasses.replace(tile, masked=False)))
    if plan.frame.loops.any_masked:
        pl.when((n >= full) & (n < live))(partial(step, tile))
    pl.when(last)(finish)


@dataclasses.dataclass(frozen=True, eq=False)
class Tile:
    """A tile of scores in a kernel, keys by queries."""

    plan: Plan
    refs: dict[str, dict[str, Any]]
    column: Any
    masked: bool = True
    """Whether some pairs may be excluded, or be beyond the sequence."""

    @property
    def shape(self) -> tuple[int, int]:
        """Keys, queries."""
        return self.plan.frame.block_kv, self.plan.frame.block_q

    def token(self, name: str) -> Any:
        """Queries or keys, `[block, dim]`."""
        return (self.refs["queries"] | self.refs["keys"])[name][...]

    def row(self, name: str) -> Any:
        """One number for each query, `[1, block_q]`."""
        return self.refs["rows"][name][...]

    def run(self, what: str, program: Program) -> Run:
        """A run of a score mod or mask, given what was computed beforehand."""
        arrays = {name: ref[...] for name, ref in self.refs["rows"].get(what, {}).items()}
        columns = self.refs["columns"].get(what, {})
        arrays |= {name: ref[...].T for name, ref in columns.items()}
        for name, ref in self.refs["pairs"].get(what, {}).items():
            x = ref[...]
            arrays[name] = x.astype(jnp.int32) if x.dtype == jnp.int8 else x
        tables = [_Lookup(ref) for ref in self.refs["tables"][what]]
        given = {name: jnp.broadcast_to(x, self.shape) for name, x in arrays.items()}
        return program.start(tables).bind(**given)

    def modified(self, score: Any, **tangents: Any) -> tuple[Any, ...]:
        """The results of the score mod for scaled scores."""
        mod = self.plan.frame.mod
        assert mod is not None
        out = self.run("mod", mod).bind(score=score, **tangents).outputs()
        return tuple(jnp.broadcast_to(x, self.shape) for x in out)

    def allowed(self) -> Any:
        """Which pairs may attend; `None` if all may."""
        frame = self.plan.frame
        if not self.masked:
            return None
        kept = None
        if frame.mask is not None:
            kept = self.run("mask", frame.mask).outputs()[0]
            kept = jnp.broadcast_to(kept, self.shape)
        if frame.kv_seq % frame.block_kv:
            index = self.column * frame.block_kv + lax.broadcasted_iota(jnp.int32, self.shape, 0)
            inside = index < frame.kv_seq
            kept = inside if kept is None else kept & inside
        return kept

    def dropped(self, *tiles: Any) -> tuple[Any, ...]:
        """Attention weights, or their tangents, after dropout."""
        rate = self.plan.frame.dropout_rate
        if not rate:
            return tiles
        row = jnp.broadcast_to(self.row("dropout"), self.shape)
        column = jnp.broadcast_to(self.refs["columns"]["dropout"][...].T, self.shape)
        kept = survives(row, column, rate)
        return tuple(jnp.where(kept, x * (1 / (1 - rate)), 0.0) for x in tiles)

    def weights(self, raw: Any, dscores: Any = None) -> tuple[Any, Any]:
        """Weights before dropout and, if there is a score mod, its derivative.

        If tangents of the scores are given, returns instead of the derivative their tangents after
        the score mod, if there is one.
        """
        scale, lse = self.plan.frame.scale, self.row("lse")
        if self.plan.frame.mod is None:
            return jnp.exp2(raw * (scale * LOG2E) - lse * LOG2E), dscores
        tangents = {} if dscores is None else {"dscore": dscores}
        scores, derivative = self.modified(raw * scale, **tangents)
        return jnp.exp2((scores - lse) * LOG2E), derivative

    def pulled(self) -> tuple[Any, Any]:
        """Weights after dropout, and the cotangent of `scale * q . k`."""
        raw = dot(self.token("k"), self.token("q"), (1, 1))
        weights, slope = self.weights(raw)
        allowed = self.allowed()
        if allowed is not None:
            weights = jnp.where(allowed, weights, 0.0)
        dropped, dweights = self.dropped(weights, dot(self.token("v"), self.token("dout"), (1, 1)))
        draw = weights * (dweights - self.row("delta"))
        if slope is not None:
            # Where a score mod is singular at a pair of zero weight, 0 * inf is NaN.
            draw = jnp.where(weights == 0, 0.0, draw * slope)
        return dropped, draw
