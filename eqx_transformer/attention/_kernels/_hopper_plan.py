"""What programs of the kernels for Hopper GPUs read, and which calls there are kernels for.

Registers hold tiles in the layout of the matrix unit, in which nothing can be looked up. What a
score mod or a mask looks up or computes for queries alone, or for keys alone, is computed before by
XLA, in memory linear in the sequence.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import jax.numpy as jnp

from .._dropout import column_hash, row_hash
from .._inputs import Inputs
from ._pointwise import Instruction, Program, Traced, results, split, wide
from ._tile import Frame, mask_program, mod_program, prepare
from ._tuning import HopperTiles, Kernel, Tiles, Tuning
from ._unrolled import NoKernelError

ROWS: Final = 64
"""Of a warpgroup: as many as the matrix unit takes at a time."""
COMPUTING: Final = 2
"""How many warpgroups of a program compute."""
_POSITIONS: Final = frozenset(("q_pos", "kv_pos"))
_MISSING: Final = frozenset(
    "acos acosh asin asinh atan atanh cbrt ceil cosh erf_inv expm1 floor log1p population_count "
    "pow sinh tan cos sin".split()
)
"""Operations that other platforms have, and this one does not.

It does have `cos` and `sin`, but they are not accurate for large arguments, such as distances.
"""


def takes(inputs: Inputs) -> bool:
    """Whether there are kernels for a score mod and a mask."""
    traced = (mod_program(inputs, slope=True), mask_program(inputs))
    programs = [x.program for x in traced if x is not None]
    return not any(x.looks_up_pairs or x.operations & _MISSING for x in programs)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The grid of a kernel, and what its programs read.

    Arrays of tokens are `[seq, heads, dim]`, those of vectors `[heads or 1, seq]`.
    """

    frame: Frame
    """With what is left of the score mod and the mask for the kernel to compute."""
    tiles: HopperTiles
    by_column: bool
    lists: tuple[Any, ...]
    """`full`, `live` and, if it is not trivial, `order`, as in `Visits`."""
    scalars: dict[str, Any]
    """One number for each head, or one for all: `[heads or 1]`."""
    own: dict[str, Any]
    """Arrays of which a warpgroup keeps its rows."""
    parts: tuple[dict[str, Any], ...]
    """Arrays of which tiles are fetched. Those in one dictionary go together."""
    late: dict[str, Any]
    """Like `own`, but read only after the last tile."""

    @property
    def block(self) -> int:
        """How many tokens a fetched tile has."""
        return self.frame.block_q if self.by_column else self.frame.block_kv

    @property
    def grid(self) -> tuple[int, int]:
        """Heads, and tiles of the side that programs keep."""
        frame = self.frame
        if self.by_column:
            return frame.kv_heads, frame.columns
        return frame.heads, frame.rows


def make_plan(
    inputs: Inputs,
    kernel: Kernel,
    tuning: Tuning,
    mod: Traced | None,
    *,
    queries: Sequence[dict[str, Any]],
    keys: Sequence[dict[str, Any]],
    late: dict[str, Any] | None = None,
    by_column: bool = False,
) -> Plan:
    """Grid and operands of a kernel.

    Arguments:

    - `queries`, `keys`: their arrays, in the parts that the kernel awaits one after the other.
    - `late`: arrays of queries that are read at the end.
    - `by_column`: whether a program keeps keys rather than queries.
    """
    if inputs.q.dtype.itemsize != 2:
        raise NoKernelError(f"has no kernels for Hopper GPUs in {inputs.q.dtype}")
    tiles = tuning.fixed
    assert isinstance(tiles, HopperTiles)
    sizes = (ROWS * COMPUTING, tiles.block)
    blocks = Tiles(*(sizes[::-1] if by_column else sizes))
    frame, shared = prepare(inputs, kernel, Tuning(blocks), mod, by_column=by_column)
    q_pos = jnp.pad(inputs.q_pos(), (0, -frame.q_seq % frame.block_q), mode="edge")
    kv_pos = jnp.pad(inputs.kv_pos(), (0, -frame.kv_seq % frame.block_kv), mode="edge")
    given_positions = {"q_pos": inputs.q_positions, "kv_pos": inputs.kv_positions}
    counted = {name for name, x in given_positions.items() if x is None}
    scalars: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    rest = {}
    for what, program in (("mod", frame.mod), ("mask", frame.mask)):
        if program is None:
            continue
        rest[what], given = _given(program, shared[what], frame, q_pos, kv_pos, counted)
        for values, found in zip((scalars, rows, columns), given, strict=True):
            values |= {f"{what} {name}": x for name, x in found.items()}
    if inputs.dropout_seed is not None:
        heads = jnp.arange(frame.heads, dtype=jnp.int32)[:, None]
        q_index, kv_index = (jnp.arange(x.size, dtype=jnp.int32)[None] for x in (q_pos, kv_pos))
        rows["dropout row"] = row_hash(inputs.dropout_seed, heads, q_index)
        columns["dropout column"] = column_hash(inputs.dropout_seed, kv_index)

    def side(parts: Sequence[dict[str, Any]], given: Any, block: int) -> tuple[Any, ...]:
        padded = [{name: _in_tiles(name, x, block) for name, x in part.items()} for part in parts]
        return padded[0] | given, *padded[1:]

    sides = (side(queries, rows, frame.block_q), side(keys, columns, frame.block_kv))
    own, parts = sides[::-1] if by_column else sides
    live, order = shared["live"], shared["order"]
    return Plan(
        frame=dataclasses.replace(frame, **rest),
        tiles=tiles,
        by_column=by_column,
        lists=(shared["full"], live) if order is None else (shared["full"], live, order),
        scalars=scalars,
        own={name: x for part in own for name, x in part.items()},
        parts=parts,
        late={name: _in_tiles(name, x, frame.block_q) for name, x in (late or {}).items()},
    )


def _in_tiles(name: str, x: Any, block: int) -> Any:
    """Pads to whole tiles of tokens, and to the columns that the layout of shared memory needs."""
    if x.ndim == 2:
        # This gives padded queries weights of zero.
        fill = jnp.inf if name == "lse" else 0.0
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=fill)
    # Repeats the last token: at zero a score mod may be singular, and zero times infinity is NaN.
    x = jnp.pad(x, ((0, -x.shape[0] % block), (0, 0), (0, 0)), mode="edge")
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % 64)))


def _given(
    program: Program, tables: list[Any], frame: Frame, q_pos: Any, kv_pos: Any, counted: set[str]
) -> tuple[Program, tuple[dict[str, Any], ...]]:
    """What is left of a program for the kernel, and the numbers, rows and columns passed to it.

    Arguments:

    - `counted`: positions that are `0, 1, 2, ...`, which a kernel can count itself.
    """

    def before(node: Instruction) -> bool:
        position = not node.inputs and node.table is None and node.needs <= counted
        return not position and node.needs <= _POSITIONS | {"head"} and not node.needs >= _POSITIONS

    rest, given = split(program, before)
    if rest.used:
        raise NoKernelError(
            "has no kernels for Hopper GPUs that look something up for every pair of positions"
        )
    head = jnp.arange(frame.heads, dtype=jnp.int32)[:, None]
    places = {"head": head, "q_pos": q_pos[None], "kv_pos": kv_pos[None]}
    scalars, rows, columns = {}, {}, {}
    for name, x in results(program, tables, given, **places).items():
        needs, x = given[name].needs, x.astype(wide(x.dtype))
        if needs & _POSITIONS:
            (columns if "kv_pos" in needs else rows)[name] = x
        else:
            scalars[name] = x[:, 0]
    return rest, (scalars, rows, columns)
