"""Attention tile by tile in plain XLA: memory linear in the sequence, on every platform.

Forward is the online softmax of Milakov & Gimelshein (2018) and Rabe & Staats (2021); backward
recomputes the tiles, as in FlashAttention (Dao et al., 2022). Three passes over the same list of
tiles: the output, its tangent, and the transpose of the tangent. Inside, heads that share a key
head are folded into the rows of one matrix product, so keys and values are never repeated.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ._derivatives import Output, Passes, Tangents
from ._inputs import Inputs
from ._tiles import TileList, Tiling, cost, position_tiles, tile_lists
from ._varying import vary_alike


def tilings(inputs: Inputs) -> list[Tiling]:
    """The ways to cut the scores that are worth considering, the longest tiles first.

    Measured on CPU by `tests/benchmarks/attention_cpu.py`: small enough that a tile of scores stays
    in cache, even under `vmap` over a batch, and large enough that the matrix products use every
    core. Small tiles fit a narrow band better, but cost more per score.
    """
    if inputs.block_size is not None:
        size = inputs.block_size
        return [Tiling(max(1, min(size, inputs.q_seq)), max(1, min(size, inputs.kv_seq)))]
    largest = 256 if max(inputs.q_seq, inputs.kv_seq) <= 2048 else 512
    return [
        Tiling(_even(inputs.q_seq, size), _even(inputs.kv_seq, size), cost)
        for size, cost in ((512, 1.0), (256, 1.6), (128, 2.1))
        if size <= largest
    ]


def _even(seq: int, size: int) -> int:
    """A tile length of at most `size` for which the last tile is not mostly padding."""
    tiles = max(1, -(-seq // size))
    each = max(1, -(-seq // tiles))
    # Products are faster if lengths fill vector registers; a sequence of one tile is not padded.
    return each if tiles == 1 else -(-each // 16) * 16


class _Tiled(eqx.Module):
    """One attention call cut into tiles, heads before positions."""

    inputs: Inputs
    q: Float[Array, "rows kv_heads group_block_q head_dim"]
    k: Float[Array, "columns kv_heads block_kv head_dim"]
    v: Float[Array, "columns kv_heads block_kv v_dim"]
    q_pos: Int[Array, "rows block_q"]
    kv_pos: Int[Array, "columns block_kv"]
    lists: list[TileList]
    block_q: int = eqx.field(static=True)
    block_kv: int = eqx.field(static=True)
    q_scale: float = eqx.field(static=True)
    score_scale: float = eqx.field(static=True)

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        # Scaling the queries saves a pass over the scores, but in a narrow dtype would round them.
        wide = inputs.q.dtype == inputs.dtype
        self.q_scale, self.score_scale = (inputs.scale, 1.0) if wide else (1.0, inputs.scale)
        candidates = [(x, tile_lists(inputs, x)) for x in tilings(inputs)]
        tiling, self.lists = min(candidates, key=lambda pair: cost(*pair))
        self.block_q, self.block_kv, _ = tiling
        self.q, self.k, self.v = (
            self.split_q(inputs.q * self.q_scale),
            self.split_kv(inputs.k),
            self.split_kv(inputs.v),
        )
        self.q_pos = position_tiles(inputs.q_pos(), self.block_q)
        self.kv_pos = position_tiles(inputs.kv_pos(), self.block_kv)

    def split_q(self, x: Float[Array, "q_seq heads dim"]) -> Float[Array, "rows kv_heads gq dim"]:
        kv_heads = self.inputs.kv_heads
        _, heads, dim = x.shape
        x = jnp.pad(x, ((0, -x.shape[0] % self.block_q), (0, 0), (0, 0)))
        group = heads // kv_heads
        # One axis at a time: arrays sharded over an explicit mesh cannot be reshaped otherwise.
        x = x.reshape(x.shape[0] // self.block_q, self.block_q, heads, dim)
        x = x.reshape(*x.shape[:2], kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
        return x.reshape(x.shape[0], kv_heads, group * self.block_q, dim)

    def join_q(self, x: Float[Array, "rows kv_heads gq dim"]) -> Float[Array, "q_seq heads dim"]:
        rows, kv_heads, height, dim = x.shape
        group = height // self.block_q
        x = x.reshape(rows, kv_heads, group, self.block_q, dim).transpose(0, 3, 1, 2, 4)
        x = x.reshape(rows, self.block_q, kv_heads * group, dim)
        return x.reshape(rows * self.block_q, kv_heads * group, dim)[: self.inputs.q_seq]

    def split_kv(
        self, x: Float[Array, "kv_seq kv_heads dim"]
    ) -> Float[Array, "columns kv_heads block_kv dim"]:
        x = jnp.pad(x, ((0, -x.shape[0] % self.block_kv), (0, 0), (0, 0)))
        columns = x.shape[0] // self.block_kv
        return x.reshape(columns, self.block_kv, *x.shape[1:]).transpose(0, 2, 1, 3)

    def join_kv(
        self, x: Float[Array, "columns kv_heads block_kv dim"]
    ) -> Float[Array, "kv_seq kv_heads dim"]:
        columns, kv_heads, _, dim = x.shape
        x = x.transpose(0, 2, 1, 3).reshape(columns * self.block_kv, kv_heads, dim)
        return x[: self.inputs.kv_seq]

    def modified(self, mod: Any, scores: Float[Array, "h gq kv"], i: Any, j: Any) -> Any:
        """Scores of tile `(i, j)` after scaling and the score mod `mod`."""
        inputs = eqx.tree_at(lambda x: x.score_mod, self.inputs, mod, is_leaf=lambda x: x is None)
        tile = self.by_head(scores)
        if self.score_scale != 1:
            tile *= self.score_scale
        return self.by_kv_head(inputs.modified(tile, *self.positions(i, j)))

    def masked(self, scores: Float[Array, "h gq kv"], i: Any, j: Any) -> Float[Array, "h gq kv"]:
        """Scores of tile `(i, j)` with `-inf` where the pair may not attend."""
        allowed = self.inputs.allowed(*self.positions(i, j))
        allowed &= self.kv_index(j)[None, :] < self.inputs.kv_seq
        # Computed once for all heads: fused into the selection, it would be recomputed for each.
        allowed = jax.lax.optimization_barrier(allowed)
        return self.by_kv_head(jnp.where(allowed[None], self.by_head(scores), -jnp.inf))

    def by_head(self, tile: Float[Array, "h gq kv"]) -> Float[Array, "heads q kv"]:
        tile = tile.reshape(tile.shape[0], -1, self.block_q, self.block_kv)
        return tile.reshape(self.inputs.heads, self.block_q, self.block_kv)

    def by_kv_head(self, tile: Float[Array, "heads q kv"]) -> Float[Array, "h gq kv"]:
        tile = tile.reshape(self.inputs.kv_heads, -1, self.block_q, self.block_kv)
        return tile.reshape(tile.shape[0], -1, self.block_kv)

    def positions(self, i: Any, j: Any) -> tuple[Int[Array, " block_q"], Int[Array, " block_kv"]]:
        """Absolute positions of the rows and columns of tile `(i, j)`."""
        # Where positions are indices, counting is faster than looking them up.
        q_pos = self.q_index(i) if self.inputs.q_positions is None else _at(self.q_pos, i)
        kv_pos = self.kv_index(j) if self.inputs.kv_positions is None else _at(self.kv_pos, j)
        return q_pos, kv_pos

    def q_index(self, i: Any) -> Int[Array, " block_q"]:
        return i * self.block_q + jnp.arange(self.block_q, dtype=jnp.int32)

    def kv_index(self, j: Any) -> Int[Array, " block_kv"]:
        return j * self.block_kv + jnp.arange(self.block_kv, dtype=jnp.int32)

    def dropped(self, weights: Float[Array, "h gq kv"], i: Any, j: Any) -> Float[Array, "h gq kv"]:
        """Attention weights of tile `(i, j)` after dropout."""
        factor = self.inputs.dropout(self.q_index(i), self.kv_index(j))
        return weights if factor is None else weights * self.by_kv_head(factor)

    def dot(self, spec: str, a: Array, b: Array) -> Array:
        """A product of tiles: operands in the dtype of the inputs, accumulated in the wide one."""
        dtype = self.inputs.q.dtype
        return jnp.einsum(
            spec,
            a.astype(dtype),
            b.astype(dtype),
            preferred_element_type=self.inputs.dtype,
        )

    def zeros(self, *shape: int) -> Array:
        """Zeros to accumulate in, which vary over the same mesh axes as the inputs."""
        return vary_alike(jnp.zeros(shape, self.inputs.dtype), like=self.inputs)


def forward(inputs: Inputs) -> Output:
    """Attention output, in the dtype of `v`, and the log-sum-exp of the scores."""
    tiled = _Tiled(inputs)
    rows, kv_heads, height, _ = tiled.q.shape

    def update(state: PyTree | None, i: Any, j: Any, masked: bool) -> PyTree:
        """The state of row `i` with tile `(i, j)` added; `None` if that is the first and last."""
        scores = tiled.dot("hqd,hkd->hqk", _at(tiled.q, i), _at(tiled.k, j))
        scores = tiled.modified(inputs.score_mod, scores, i, j)
        if masked:
            scores = tiled.masked(scores, i, j)
        peak = scores.max(axis=-1)
        if state is not None:
            peak = jnp.maximum(state[2], peak)
        shift = _finite(inputs, peak)
        weights = jnp.exp(scores - shift[..., None])
        total = weights.sum(axis=-1)
        weighted = tiled.dot("hqk,hkd->hqd", tiled.dropped(weights, i, j), _at(tiled.v, j))
        if state is not None:
            decay = jnp.exp(state[2] - shift)
            total += state[0] * decay
            weighted += state[1] * decay[..., None]
        return total, weighted, peak

    def step(state: PyTree, tile: PyTree, tiles: TileList) -> PyTree:
        i, j, live = tile

        def run(local: PyTree) -> PyTree:
            return update(local, i, j, tiles.masked)

        local = jax.tree.map(lambda x: _at(x, i), state)
        local = run(local) if live is None else jax.lax.cond(live, run, lambda x: x, local)
        return jax.tree.map(lambda x, y: _put(x, i, y), state, local)

    if rows == 1 and len(tiled.lists) == 1 and _is_one_tile(tiled.lists[0]):
        column, masked = int(tiled.lists[0].columns[0]), tiled.lists[0].masked
        state = jax.tree.map(lambda x: x[None], update(None, 0, column, masked))
    else:
        state = (
            tiled.zeros(rows, kv_heads, height),
            tiled.zeros(rows, kv_heads, height, inputs.v.shape[-1]),
            tiled.zeros(rows, kv_heads, height) - jnp.inf,
        )
        state = _visit(tiled, step, state)
    total, weighted, peak = state
    if inputs.sinks is not None:
        sinks = _row_sinks(tiled)
        new_peak = jnp.maximum(peak, sinks)
        shift = _finite(inputs, new_peak)
        decay = jnp.exp(peak - shift)
        total = total * decay + jnp.exp(sinks - shift)
        weighted, peak = weighted * decay[..., None], new_peak
    lse = jnp.log(total) + _finite(inputs, peak)  # log(0) is -inf, as it should be
    if _may_be_empty(inputs):
        total = jnp.where(total == 0, 1, total)
    out = tiled.join_q(weighted / total[..., None]).astype(inputs.v.dtype)
    return out, tiled.join_q(lse[..., None])[..., 0]


def _may_be_empty(inputs: Inputs) -> bool:
    """Whether a query may attend to nothing."""
    return inputs.mask is not None or inputs.score_mod is not None or inputs.kv_seq == 0


def _finite(inputs: Inputs, peak: Array) -> Array:
    """The greatest score of each row, made finite so that it can be subtracted.

    A row that has seen no key has the peak -inf, and -inf - -inf is NaN. If no row can be empty,
    there is no selection: XLA on CPU fuses product, softmax and product, but only with nothing in
    between.
    """
    return jnp.where(jnp.isneginf(peak), 0, peak) if _may_be_empty(inputs) else peak


def tangent(residuals: tuple[Inputs, Array, Array], tangents: Tangents) -> Output:
    """The derivative of `forward` at `inputs` in the direction `tangents`.

    With `p = exp(score - lse)` for the attention weights, `d lse = sum(p * d score)` and
    `d out = sum(p * d score * v + p * d v) - d lse * out`.
    """
    inputs, out, lse = residuals
    tiled = _Tiled(inputs)
    rows, kv_heads, height, _ = tiled.q.shape
    dq, dk, dv = (
        tiled.split_q(tangents["q"] * tiled.q_scale),
        tiled.split_kv(tangents["k"]),
        tiled.split_kv(tangents["v"]),
    )
    # Equinox spells "not perturbed" as a `None` for every leaf.
    dmod = tangents.get("score_mod", jax.tree.map(lambda _: None, inputs.score_mod))
    row_lse = _row_lse(tiled, lse)

    def contribution(i: Any, j: Any, masked: bool) -> PyTree:
        def scored(q: Array, k: Array, mod: Any) -> Array:
            return tiled.modified(mod, tiled.dot("hqd,hkd->hqk", q, k), i, j)

        args = (_at(tiled.q, i), _at(tiled.k, j), inputs.score_mod)
        scores, dscores = eqx.filter_jvp(scored, args, (_at(dq, i), _at(dk, j), dmod))
        if masked:
            scores = tiled.masked(scores, i, j)
            dscores = jnp.where(jnp.isneginf(scores), 0, dscores)
        weights = jnp.exp(scores - _at(row_lse, i)[..., None])
        moved = weights * dscores
        dweighted = tiled.dot("hqk,hkd->hqd", tiled.dropped(moved, i, j), _at(tiled.v, j))
        dweighted += tiled.dot("hqk,hkd->hqd", tiled.dropped(weights, i, j), _at(dv, j))
        return {"row": (dweighted, moved.sum(axis=-1)), "column": (), "shared": ()}

    sums = _accumulate(
        tiled,
        contribution,
        row=(
            tiled.zeros(rows, kv_heads, height, inputs.v.shape[-1]),
            tiled.zeros(rows, kv_heads, height),
        ),
        column=(),
        shared=(),
    )
    dweighted, dlse = sums["row"]
    if inputs.sinks is not None and "sinks" in tangents:
        dsinks = _row_sinks(tiled, tangents["sinks"])
        dlse = dlse + jnp.exp(_row_sinks(tiled) - row_lse) * dsinks
    dlse = tiled.join_q(dlse[..., None])
    dout = tiled.join_q(dweighted) - dlse * out.astype(inputs.dtype)
    return dout.astype(out.dtype), dlse[..., 0]


def transpose(
    residuals: tuple[Inputs, Array, Array], cotangents: Output, wanted: frozenset[str]
) -> Tangents:
    """The transpose of `tangent`: cotangents of the inputs named in `wanted`.

    With `dp` for the cotangent of an attention weight, that of its score is
    `p * (dp - sum(dout * out) + dlse)`; the middle term is one number per row.
    """
    inputs, out, lse = residuals
    dout, dlse = cotangents
    tiled = _Tiled(inputs)
    dout = dout.astype(inputs.dtype)
    delta = (dout * out.astype(inputs.dtype)).sum(axis=-1, keepdims=True) - dlse[..., None]
    delta = tiled.split_q(delta)[..., 0]
    dout = tiled.split_q(dout)
    row_lse = _row_lse(tiled, lse)
    # Products that contract the rows of the left operand are slow on CPU. Transposing the short
    # operands once, and accumulating the transposes of `dk` and `dv`, avoids them.
    q_t, dout_t = tiled.q.mT, dout.mT
    mod, mod_static = eqx.partition(inputs.score_mod, eqx.is_inexact_array)
    mod_wanted = "score_mod" in wanted

    def contribution(i: Any, j: Any, masked: bool) -> PyTree:
        def scored(scores: Array, mod: Any) -> Array:
            return tiled.modified(eqx.combine(mod, mod_static), scores, i, j)

        raw = tiled.dot("hqd,hkd->hqk", _at(tiled.q, i), _at(tiled.k, j))
        if mod_wanted:
            scores, pull = jax.vjp(scored, raw, mod)
        else:
            scores, pull = jax.vjp(lambda x: scored(x, mod), raw)
        if masked:
            scores = tiled.masked(scores, i, j)
        weights = jnp.exp(scores - _at(row_lse, i)[..., None])
        dweights = tiled.dropped(tiled.dot("hqd,hkd->hqk", _at(dout, i), _at(tiled.v, j)), i, j)
        dscores = weights * (dweights - _at(delta, i)[..., None])
        draw, *dmod = pull(dscores)
        return {
            "row": tiled.dot("hqk,hkd->hqd", draw, _at(tiled.k, j)),
            "column": (
                tiled.dot("hqk,hdq->hdk", draw, _at(q_t, i)),
                tiled.dot("hqk,hdq->hdk", tiled.dropped(weights, i, j), _at(dout_t, i)),
            ),
            "shared": dmod,
        }

    sums = _accumulate(
        tiled,
        contribution,
        row=tiled.zeros(*tiled.q.shape),
        column=(tiled.zeros(*tiled.k.mT.shape), tiled.zeros(*tiled.v.mT.shape)),
        shared=[jax.tree.map(lambda x: tiled.zeros(*x.shape).astype(x.dtype), mod)]
        if mod_wanted
        else [],
    )
    dk, dv = sums["column"]
    result = {
        "q": (tiled.join_q(sums["row"]) * tiled.q_scale).astype(inputs.q.dtype),
        "k": tiled.join_kv(dk.mT).astype(inputs.k.dtype),
        "v": tiled.join_kv(dv.mT).astype(inputs.v.dtype),
    }
    if mod_wanted:
        (result["score_mod"],) = sums["shared"]
    if inputs.sinks is not None and "sinks" in wanted:
        dsinks = -tiled.join_q((jnp.exp(_row_sinks(tiled) - row_lse) * delta)[..., None])
        result["sinks"] = dsinks.sum(axis=(0, 2)).astype(inputs.sinks.dtype)
    return result


# Slices, not `x.at[i]`, whose bounds check takes a pass over what it updates.
def _at(x: Array, index: Any) -> Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _put(x: Array, index: Any, y: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, y, index, 0)


def _row_lse(tiled: _Tiled, lse: Float[Array, "q_seq heads"]) -> Array:
    """Log-sum-exp by tile; `inf` for rows that attend to nothing, whose weights are all zero."""
    padded_lse = jnp.pad(lse, ((0, -lse.shape[0] % tiled.block_q), (0, 0)), constant_values=jnp.inf)
    padded_lse = jnp.where(jnp.isneginf(padded_lse), jnp.inf, padded_lse)
    return tiled.split_q(padded_lse[..., None])[..., 0]


def _row_sinks(tiled: _Tiled, sinks: Array | None = None) -> Array:
    """Sink scores by tile: one number per head, repeated over the rows of the head."""
    sinks = tiled.inputs.sinks if sinks is None else sinks
    assert sinks is not None
    rows, kv_heads, height, _ = tiled.q.shape
    group = tiled.inputs.heads // kv_heads
    sinks = sinks.astype(tiled.inputs.dtype).reshape(1, kv_heads, group, 1)
    shape = (rows, kv_heads, group, tiled.block_q)
    return jnp.broadcast_to(sinks, shape).reshape(rows, kv_heads, height)


def _is_one_tile(tiles: TileList) -> bool:
    """Whether there is neither a loop nor anything to decide at run time."""
    return len(tiles.rows) == 1 and tiles.live is None


def _visit(
    tiled: _Tiled, step: Callable[[PyTree, PyTree, TileList], PyTree], state: PyTree
) -> PyTree:
    """Runs `step(state, (row, column, live), tiles)` over every tile that may be non-empty."""
    for tiles in tiled.lists:
        if _is_one_tile(tiles):
            state = step(state, (int(tiles.rows[0]), int(tiles.columns[0]), None), tiles)
            continue
        # Must vary like the rest: a batched `cond` becomes a selection among its operands.
        indices = vary_alike(
            (jnp.asarray(tiles.rows, jnp.int32), jnp.asarray(tiles.columns, jnp.int32)),
            like=tiled.inputs,
        )

        def body(state: PyTree, tile: PyTree, tiles: TileList = tiles) -> tuple[PyTree, None]:
            return step(state, tile, tiles), None

        state, _ = jax.lax.scan(body, state, (*indices, tiles.live))
    return state


def _accumulate(
    tiled: _Tiled,
    contribution: Callable[[Any, Any, bool], PyTree],
    *,
    row: PyTree,
    column: PyTree,
    shared: PyTree,
) -> PyTree:
    """Sums `contribution(i, j, masked)` over all tiles: by row, by column, and overall.

    Sums are linear in the carry and each contribution is checkpointed, so that JAX's own derivative
    of this loop (for second derivatives) stores nothing per tile either.
    """

    def step(sums: PyTree, tile: PyTree, tiles: TileList) -> PyTree:
        i, j, live = tile

        def compute() -> PyTree:
            inner = jax.checkpoint(lambda: contribution(i, j, tiles.masked), prevent_cse=False)
            return inner()

        if live is None:
            added = compute()
        else:
            shapes = jax.eval_shape(compute)
            zeros = jax.tree.map(lambda x: tiled.zeros(*x.shape).astype(x.dtype), shapes)
            added = jax.lax.cond(live, compute, lambda: zeros)
        return {
            "row": jax.tree.map(lambda x, y: _put(x, i, _at(x, i) + y), sums["row"], added["row"]),
            "column": jax.tree.map(
                lambda x, y: _put(x, j, _at(x, j) + y), sums["column"], added["column"]
            ),
            "shared": jax.tree.map(jnp.add, sums["shared"], added["shared"]),
        }

    return _visit(tiled, step, {"row": row, "column": column, "shared": shared})


chunked = Passes(forward, tangent, transpose)
