"""What the kernels for Hopper GPUs have in common: the work of a program's warpgroups.

A program has three warpgroups. Two compute: each keeps 64 rows (queries or, for the cotangents of
keys and values, keys) and loops over the tiles of the other side. The third prefetches these tiles
into shared memory. They synchronise by barriers: a part of a tile is ready once it has arrived, and
its slot may be refilled once both computing warpgroups have released it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from .._dropout import survives
from ._hopper_plan import COMPUTING, ROWS, Plan
from ._launch import launch
from ._pointwise import Program, Run
from ._tile import LOG2E

plgpu: Any = mosaic_gpu  # Not all that is public in it says so.

_LAYOUT: Final = plgpu.Layout.WGMMA

# --- the warpgroups ---


def call_kernel(
    kernel: Callable[..., Any], plan: Plan, outputs: dict[str, Any], staged: dict[str, str]
) -> list[Any]:
    """Launches a kernel.

    Arguments:

    - `kernel`: takes a `Tile` still to be placed, and returns a warpgroup's initial sums, a
        function that updates them with a tile, and one that computes the rows of the outputs from
        the final sums, by name.
    - `outputs`: the arrays' types, by name, on the side of `plan.own`.
    - `staged`: the own array whose place in shared memory an output is written through, if they
        have the same size.
    """
    staged = {x: y for x, y in staged.items() if outputs[x].shape == plan.own[y].shape}
    operands = (plan.lists, plan.scalars, plan.own, plan.parts, plan.late)
    leaves, treedef = jax.tree.flatten(operands)
    count = len(leaves)

    def run(*leaves: Any, interpret: bool) -> Any:
        def body(*refs: Any) -> None:
            lists, scalars, own, parts, late = jax.tree.unflatten(treedef, refs[:count])
            results = dict(zip(outputs, refs[count:-1], strict=True))
            program = _Program(plan, lists, scalars, own, parts, late, refs[-1], interpret)
            compute = partial(program.compute, kernel, results, staged)
            # Not two `pl.when`: in these, registers of the one would be kept through the other.
            lax.cond(lax.axis_index("warpgroup") < COMPUTING, compute, program.fetch)

        body.__name__ = kernel.__name__.strip("_")
        return plgpu.kernel(
            body,
            out_type=list(outputs.values()),
            scratch_types=[_shared_memory(plan, outputs, staged)],
            grid=plan.grid,
            grid_names=("heads", "lines"),
            num_threads=COMPUTING + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        )(*leaves)

    return launch(run, [jnp.asarray(x) for x in leaves], list(outputs.values()))


def _shared_memory(plan: Plan, outputs: dict[str, Any], staged: dict[str, str]) -> dict[str, Any]:
    """The shared memory and the barriers of a program."""

    def room(slots: int, size: int, x: Any) -> Any:
        if x.ndim == 2:
            return plgpu.SMEM((slots, size), x.dtype)
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM((slots, size, x.shape[2]), x.dtype, transforms=transforms)

    def barriers(arrivals: int, count: int) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    own = {name: x for name, x in plan.own.items() if x.ndim == 3}
    stages = plan.tiles.stages
    return {
        "own": {name: room(COMPUTING, ROWS, x) for name, x in own.items()},
        "out": {
            name: room(COMPUTING, ROWS, x) for name, x in outputs.items() if name not in staged
        },
        "parts": [
            {name: room(stages, plan.block, x) for name, x in part.items()} for part in plan.parts
        ],
        "own ready": barriers(len(own), COMPUTING),
        "ready": [barriers(len(part), stages) for part in plan.parts],
        "free": [barriers(COMPUTING, stages) for _ in plan.parts],
        "turn": plgpu.Barrier(num_arrivals=COMPUTING),
    }


def _rows_of(ref: Any, first: Any, size: int, token_head: Any, head: Any) -> Any:
    """A tile of an array in memory."""
    rows = pl.ds(first, size)
    if len(ref.shape) == 3:
        return ref.at[rows, token_head]
    return ref.at[head if ref.shape[0] > 1 else 0, rows]


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """The work of a program's warpgroups. Fields named as in `Plan` are references to arrays."""

    plan: Plan
    lists: Any
    scalars: Any
    own: Any
    parts: Any
    late: Any
    shared: Any
    interpret: bool

    @property
    def members(self) -> int:
        """How many query heads the program covers."""
        return self.plan.frame.group if self.plan.by_column else 1

    @property
    def line(self) -> Any:
        """Which tile the program keeps.

        Rows start with the last tile, which takes the longest under a causal mask.
        """
        line = lax.axis_index("lines")
        return line if self.plan.by_column else self.plan.grid[1] - 1 - line

    def head(self, member: Any) -> Any:
        """The query head."""
        return lax.axis_index("heads") * self.members + member

    def index(self, n: Any) -> Any:
        """The index of the first token of the line's `n`-th tile."""
        if len(self.lists) > 2:
            n = self.lists[2][self.line, n]
        return n * self.plan.block

    def rows(self, warpgroup: Any) -> tuple[dict[str, Any], Any]:
        """Where a warpgroup's rows are in shared memory, and the index of the first of them."""
        kept = {name: room.at[warpgroup] for name, room in self.shared["own"].items()}
        return kept, self.line * (ROWS * COMPUTING) + warpgroup * ROWS

    def slot(self, t: Any) -> Any:
        """The slot in shared memory of the program's `t`-th tile."""
        return lax.rem(t, jnp.int32(self.plan.tiles.stages))

    def fetch(self) -> None:
        """Fetches tiles."""
        plgpu.set_max_registers(24, action="decrease")
        plan, live = self.plan, self.lists[1][self.line]

        def of_member(member: Any) -> None:
            head = self.head(member)
            of_token = head if plan.by_column else lax.div(head, jnp.int32(plan.frame.group))

            @pl.loop(0, live)
            def _(n: Any) -> None:
                t, first = member * live + n, self.index(n)
                for which, part in enumerate(self.parts):
                    free, ready = (
                        self.shared[x][which].at[self.slot(t)] for x in ("free", "ready")
                    )
                    pl.when(t >= plan.tiles.stages)(partial(plgpu.barrier_wait, free))
                    for name, ref in part.items():
                        room = self.shared["parts"][which][name].at[self.slot(t)]
                        rows = _rows_of(ref, first, plan.block, of_token, head)
                        plgpu.copy_gmem_to_smem(rows, room, ready)

        if self.members > 1:
            pl.loop(0, self.members)(of_member)
        else:
            of_member(0)

        # Every arrival at a barrier must be waited for.
        count = live * self.members

        @pl.loop(jnp.maximum(count - plan.tiles.stages, 0), count)
        def _(t: Any) -> None:
            for free in self.shared["free"]:
                plgpu.barrier_wait(free.at[self.slot(t)])

    def compute(
        self, kernel: Callable[..., Any], results: dict[str, Any], staged: dict[str, str]
    ) -> None:
        """Computes the rows of one warpgroup."""
        plgpu.set_max_registers(240, action="increase")
        me, head, line = lax.axis_index("warpgroup"), lax.axis_index("heads"), self.line
        plan, (kept, first) = self.plan, self.rows(me)
        arrived = self.shared["own ready"].at[me]
        for name, room in kept.items():
            plgpu.copy_gmem_to_smem(
                _rows_of(self.own[name], first, ROWS, head, None), room, arrived
            )
        plgpu.barrier_wait(arrived)
        tile = Tile(self, kept, first)
        state, step, finish = kernel(tile.of(self.head(0)))
        full, live = (x[line] for x in self.lists[:2])

        def of_member(member: Any, state: Any) -> Any:
            of_head = tile.of(self.head(member))

            def body(masked: bool, n: Any, state: Any) -> Any:
                tile = of_head.at(self.slot(member * live + n), self.index(n), masked)
                if plan.by_column:
                    # Registers are scarce: recomputing where the rows are avoids spills.
                    kept, first = self.rows(lax.axis_index("warpgroup"))
                    tile = dataclasses.replace(tile, kept=kept, row=first)
                return step(tile, state)

            if plan.frame.loops.any_full:
                state = lax.fori_loop(0, full, partial(body, False), state)
            if plan.frame.loops.any_masked:
                state = lax.fori_loop(full, live, partial(body, True), state)
            return state

        if self.members > 1:
            state = lax.fori_loop(0, self.members, of_member, state)
        else:
            state = of_member(0, state)
        me = lax.axis_index("warpgroup")  # Recomputed, as for each tile.
        kept, first = self.rows(me)
        rooms = {name: room.at[me] for name, room in self.shared["out"].items()}
        rooms |= {name: kept[where] for name, where in staged.items()}
        for name, value in finish(state).items():
            rooms[name][...] = value.astype(rooms[name].dtype)
        plgpu.commit_smem()
        for name, room in rooms.items():
            plgpu.copy_smem_to_gmem(room, _rows_of(results[name], first, ROWS, head, self.head(0)))
        plgpu.wait_smem_to_gmem(0)


# --- tiles ---


def filled(shape: tuple[int, ...], value: Any) -> Any:
    """A tile of 64 rows, or a column of them, in registers."""
    layout = _LAYOUT if len(shape) == 2 else _LAYOUT.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def by_row(column: Any, shape: tuple[int, int]) -> Any:
    """A tile whose rows are constant."""
    return lax.broadcast_in_dim(column, shape, (0,))


@dataclasses.dataclass(frozen=True, eq=False)
class Tile:
    """A tile of scores, a warpgroup's 64 rows by the fetched tokens.

    Some fields are filled in only later, by `of` and `at`.
    """

    program: _Program
    kept: dict[str, Any]
    """The warpgroup's rows, in shared memory."""
    row: Any
    """The index of the first of them."""
    head: Any = None
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The warpgroup's vectors, for the head."""
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Scalars of the head, or of all heads."""
    slot: Any = None
    first: Any = None
    """The index of the first fetched token."""
    masked: bool = True
    """Whether some pairs may be excluded, or be beyond the sequence."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and fetched tokens."""
        return ROWS, self.program.plan.block

    def of(self, head: Any) -> "Tile":
        """Sets the query head."""
        columns = {
            name: _load(_rows_of(ref, self.row, ROWS, None, head), _LAYOUT.reduce(1))
            for name, ref in self.program.own.items()
            if name not in self.kept
        }
        numbers = {
            name: ref[head if ref.shape[0] > 1 else 0] for name, ref in self.program.scalars.items()
        }
        return dataclasses.replace(self, head=head, columns=columns, numbers=numbers)

    def at(self, slot: Any, first: Any, masked: bool) -> "Tile":
        """Sets which tile it is."""
        return dataclasses.replace(self, slot=slot, first=first, masked=masked)

    def ready(self, part: int) -> None:
        """Waits until a part of the tile has arrived."""
        plgpu.barrier_wait(self.program.shared["ready"][part].at[self.slot])

    def release(self, part: int) -> None:
        """Signals that this warpgroup has read a part of the tile."""
        if any(len(ref.shape) == 2 for ref in self.program.parts[part].values()):
            # A fence: vectors are read by ordinary loads, but written by asynchronous copies.
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.program.shared["free"][part].at[self.slot])

    def end_turn(self) -> None:
        """Lets the other warpgroup go on."""
        plgpu.barrier_arrive(self.program.shared["turn"])

    def begin_turn(self) -> None:
        """Waits for the other warpgroup to end its turn."""
        plgpu.barrier_wait(self.program.shared["turn"])

    def turn(self) -> None:
        """Ends a turn and waits for the next."""
        self.end_turn()
        self.begin_turn()

    def fetched(self, name: str) -> Any:
        """A tile of tokens, in shared memory."""
        return self._room(name).at[self.slot]

    def _room(self, name: str) -> Any:
        (room,) = (part[name] for part in self.program.shared["parts"] if name in part)
        return room

    def late(self, name: str) -> Any:
        """The warpgroup's rows of an array, in registers."""
        rows = _rows_of(self.program.late[name], self.row, ROWS, self.head, None)
        return _load(rows, _LAYOUT).astype(jnp.float32)

    def vector(self, name: str, scale: float | None = None) -> Any:
        """A tile of a vector that has a number for each row, or for each fetched token."""
        mine = name in self.columns
        x = self.columns[name] if mine else _load(self.fetched(name), _LAYOUT.reduce(0))
        return lax.broadcast_in_dim(x if scale is None else x * scale, self.shape, (1 - mine,))

    def products(self, *sums: list[tuple[Any, Any]], then: Callable[[], None] | None = None) -> Any:
        """Sums of products `a @ b.T` of tiles in shared memory. Calls `then` while they run."""

        def multiply(*results: Any) -> Any:
            for result, pairs in zip(results, sums, strict=True):
                for a, b in pairs:
                    plgpu.wgmma(result, a, b.T)
            if then is not None:
                then()
            return [result[...] for result in results]

        return pl.run_scoped(multiply, *(plgpu.ACC(self.shape, jnp.float32) for _ in sums))

    def accumulated(self, total: Any, *pairs: tuple[Any, Any]) -> Any:
        """Adds products `a @ b` of a tile in registers and one in shared memory."""
        if self.program.interpret:
            # The interpreter supports only factors in shared memory.
            for a, b in pairs:
                total += jnp.dot(a.astype(b.dtype).astype(jnp.float32), b[...].astype(jnp.float32))
            plgpu.commit_smem()
            return total

        def multiply(result: Any) -> None:
            for a, b in pairs:
                plgpu.wgmma(result, a.astype(b.dtype), b)

        return pl.run_state(multiply)(plgpu.ACC.init(total))

    def _index(self, side: str) -> Any:
        """The index in the sequence of the query, or of the key, of each pair."""
        plan = self.program.plan
        fetched = (side == "q") == plan.by_column
        count = plgpu.broadcasted_iota(jnp.int32, self.shape, int(fetched), layout=_LAYOUT)
        index = count + (self.first if fetched else self.row)
        if fetched and side == "q" and plan.frame.q_seq % plan.block:
            # Positions that exist: a score mod may be singular elsewhere, and 0 * NaN is NaN.
            index = jnp.minimum(index, plan.frame.q_seq - 1)
        return index

    def _run(self, what: str, program: Program) -> Run:
        """Starts a score mod or mask with its precomputed numbers and the pairs' positions."""
        arguments = {}
        for name in frozenset().union(*(x.needs for x in program.instructions)):
            if f"{what} {name}" in self.numbers:
                number = self.numbers[f"{what} {name}"]
                arguments[name] = lax.broadcast_in_dim(number, self.shape, ())
            elif name in ("q_pos", "kv_pos"):
                arguments[name] = self._index(name.removesuffix("_pos"))
            elif name not in ("score", "dscore"):
                arguments[name] = self.vector(f"{what} {name}")
        return program.start([]).bind(**arguments)

    def allowed(self) -> Any:
        """Which pairs may attend; `None` if all may."""
        plan, frame = self.program.plan, self.program.plan.frame
        if not self.masked:
            return None
        kept = None
        if frame.mask is not None:
            kept = jnp.broadcast_to(self._run("mask", frame.mask).outputs()[0], self.shape)
        if frame.kv_seq % frame.block_kv and not plan.by_column:
            inside = self._index("kv") < frame.kv_seq
            kept = inside if kept is None else kept & inside
        return kept

    def dropped(self, *tiles: Any) -> tuple[Any, ...]:
        """Attention weights, or their tangents, after dropout."""
        rate = self.program.plan.frame.dropout_rate
        if not rate:
            return tiles
        kept = survives(self.vector("dropout row"), self.vector("dropout column"), rate)
        return tuple(jnp.where(kept, x * (1 / (1 - rate)), 0.0) for x in tiles)

    def scores(self, raw: Any, **tangents: Any) -> tuple[Any, float, Any]:
        """Scores, the positive factor that takes them to base two, and a score mod's other result.

        Scores of excluded pairs are `-inf`. The other result is a tile, a number, or `None` without
        a score mod. The factor is applied later, where it fuses with a subtraction.
        """
        frame, rest, factor = self.program.plan.frame, None, LOG2E
        if frame.mod is not None:
            run = self._run("mod", frame.mod).bind(score=raw * frame.scale, **tangents)
            scores, *others = run.outputs()
            scores = jnp.broadcast_to(scores, self.shape)
            rest = others[0] if others else None
        elif frame.scale > 0:
            scores, factor = raw, frame.scale * LOG2E
        else:
            scores = raw * frame.scale
        allowed = self.allowed()
        if allowed is not None:
            scores = jnp.where(allowed, scores, -jnp.inf)
        return scores, factor, rest

    def weights(self, raw: Any, dscores: Any = None) -> tuple[Any, Any]:
        """Weights before dropout, and weights times the derivative of a score by its product.

        If tangents of the products are given, weights times the tangents of the scores instead.
        """
        tangents = {} if dscores is None else {"dscore": dscores}
        scores, factor, derivative = self.scores(raw, **tangents)
        weights = jnp.exp2(scores * factor - self.vector("lse", scale=LOG2E))
        derivative = dscores if self.program.plan.frame.mod is None else derivative
        if derivative is None:
            return weights, weights
        if jnp.ndim(derivative):
            # Where a score mod is singular at a pair of no weight, zero times infinity is NaN.
            derivative = jnp.where(weights == 0, 0.0, derivative)
        return weights, weights * derivative

    def draw(self, rate: Any, dweights: Any) -> Any:
        """The cotangent of `scale * q . k`."""
        (dweights,) = self.dropped(dweights)
        return rate * (dweights - self.vector("delta"))


def _load(ref: Any, layout: Any) -> Any:
    return plgpu.load(ref, layout=layout, optimized=False)
