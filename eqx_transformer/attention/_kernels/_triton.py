"""The kernels: forward, its tangent, and the two halves of its transpose.

FlashAttention-2 (Dao, 2023): one program for a tile of queries (or of keys, for their cotangents)
runs over the tiles of the other side, with sums in registers and scores in base two.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from .._inputs import Inputs
from ._launch import launch
from ._tile import LOG2E, Frame, Tile, dot, mod_program, prepare, start, visit
from ._triton_memory import load, load_stat, store, store_stat
from ._tuning import Tuning, padded


def call_kernel(
    kernel: Callable[..., None],
    frame: Frame,
    grid: tuple[int, int],
    operands: dict[str, Any],
    specs: dict[str, Any],
    outputs: list[tuple[Any, Any]],
) -> list[Any]:
    """Launches a kernel. Operands without a block are read whole."""
    leaves, treedef = jax.tree.flatten(operands)
    in_specs = {
        name: specs.get(name, jax.tree.map(lambda x: _whole(x.shape), value))
        for name, value in operands.items()
    }
    types = [x for x, _ in outputs]

    def run(*leaves: Any, interpret: bool) -> Any:
        axes = jax.typeof(leaves[0]).manual_axis_type
        call = pl.pallas_call(
            partial(kernel, frame),
            grid=grid,
            in_specs=[in_specs],
            out_specs=[x for _, x in outputs],
            out_shape=[
                jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=axes) for x in types
            ],
            interpret=interpret,
            compiler_params=None
            if interpret
            else plt.CompilerParams(
                num_warps=frame.tiles.num_warps, num_stages=frame.tiles.num_stages
            ),
        )
        return call(jax.tree.unflatten(treedef, leaves))

    return launch(run, [jnp.asarray(x) for x in leaves], types)


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _by_row(frame: Frame) -> tuple[Any, Any, Any]:
    """Blocks for a grid of tiles of queries and heads: of queries, of keys, and of statistics."""

    def q(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((frame.block_q, None, padded(dim)), lambda i, h: (i, h, 0))

    def kv(dim: int) -> pl.BlockSpec:
        shape = (frame.kv_seq, None, padded(dim))
        return pl.BlockSpec(shape, lambda i, h: (0, h // frame.group, 0))

    return q, kv, pl.BlockSpec((None, frame.block_q), lambda i, h: (h, i))


def _load_kv(tile: Tile, refs: dict[str, Any], column: Any, prefix: str = "") -> tuple[Any, Any]:
    """Keys and values of a tile. In tiles that need no mask, all are within the sequence."""
    assert tile.kv is not None
    size, first = tile.frame.block_kv, column * tile.frame.block_kv
    # A sequence shorter than a tile has no tile without a mask, but may have the code for one.
    below = tile.kv.below if tile.masked or tile.frame.kv_seq < size else None
    k = load(refs[prefix + "k"], first, size, tile.frame.head_dim, below=below)
    return k, load(refs[prefix + "v"], first, size, tile.frame.v_dim, below=below)


def _scores(tile: Tile, raw: Any) -> Any:
    """Scores in base two."""
    scale = tile.frame.scale
    if tile.mod is None:
        return raw * (scale * LOG2E)
    return tile.modified(raw * scale)[0] * LOG2E


# --- forward ---


def forward(inputs: Inputs, tuning: Tuning) -> tuple[Any, Any]:
    """The output, and the log-sum-exp as `[heads, q_seq]`."""
    call, shared = prepare(inputs, "forward", tuning, mod_program(inputs))
    q, kv, stat = _by_row(call)
    specs = {"q": q(call.head_dim), "k": kv(call.head_dim), "v": kv(call.v_dim)}
    operands = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "sinks": inputs.sinks}
    out = jax.ShapeDtypeStruct((call.q_seq, call.heads, call.v_dim), call.dtype)
    lse = jax.ShapeDtypeStruct((call.heads, call.q_seq), jnp.float32)
    operands |= shared
    outputs = [(out, q(call.v_dim)), (lse, stat)]
    out, lse = call_kernel(_forward_kernel, call, (call.rows, call.heads), operands, specs, outputs)
    return out, lse


def _forward_kernel(frame: Frame, refs: dict[str, Any], out_ref: Any, lse_ref: Any) -> None:
    row, head = pl.program_id(0), pl.program_id(1)
    outer = start(frame, refs).at(head=head, row=row)
    assert outer.q is not None
    q = load(refs["q"], 0, frame.block_q, frame.head_dim, below=outer.q.below)

    def step(column: Any, masked: bool, state: Any) -> Any:
        tile = outer.at(column=column, masked=masked)
        return attended(tile, q, *_load_kv(tile, refs, column), tile.allowed(), state)

    peak, total, weighted = nothing_seen(frame)
    if refs["sinks"] is not None:
        # A sink acts as a key that has been seen already, and whose value is zero.
        sink = refs["sinks"][head].astype(jnp.float32)
        peak = jnp.zeros_like(peak) + sink * LOG2E
        total = jnp.where(peak == -jnp.inf, 0.0, 1.0)
    out, lse = normalised(visit(frame, refs, row, step, (peak, total, weighted)))
    store(out_ref, out, frame.v_dim, outer.q.below)
    store_stat(lse_ref, lse, outer.q.below)


def nothing_seen(frame: Frame) -> tuple[Any, Any, Any]:
    """Before any key: the greatest score in base two, the sums of weights and weighted values."""
    peak = jnp.full((frame.block_q,), -jnp.inf, jnp.float32)
    weighted = jnp.zeros((frame.block_q, padded(frame.v_dim)), jnp.float32)
    return peak, jnp.zeros_like(peak), weighted


def attended(tile: Tile, q: Any, k: Any, v: Any, allowed: Any, state: Any) -> tuple[Any, Any, Any]:
    """The state with one more tile added."""
    peak, total, weighted = state
    scores = _scores(tile, dot(q, k, (1, 1)))
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    new_peak = jnp.maximum(peak, scores.max(axis=1))
    # A row that has seen no key yet has the peak -inf, and -inf - -inf is NaN.
    shift = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
    weights = jnp.exp2(scores - shift[:, None])
    decay = jnp.exp2(peak - shift)
    total = total * decay + weights.sum(axis=1)
    (weights,) = tile.dropped(weights)
    weighted = weighted * decay[:, None] + dot(weights.astype(v.dtype), v)
    return new_peak, total, weighted


def normalised(state: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    """Output and log-sum-exp."""
    peak, total, weighted = state
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, peak / LOG2E + jnp.log(total))
    return weighted / total[:, None], lse


# --- the transpose of the tangent ---


def _weights(tile: Tile, raw: Any, lse: Any) -> tuple[Any, Any]:
    """Attention weights, and the derivative of the score mod, if there is one."""
    scale = tile.frame.scale
    if tile.mod is None:
        return jnp.exp2(raw * (scale * LOG2E) - lse[:, None] * LOG2E), None
    scores, slope = tile.modified(raw * scale)
    return jnp.exp2((scores - lse[:, None]) * LOG2E), slope


def _pulled(tile: Tile, q: Any, k: Any, v: Any, dout: Any, lse: Any, delta: Any) -> tuple[Any, Any]:
    """Attention weights after dropout, and the cotangent of `scale * q . k`."""
    weights, slope = _weights(tile, dot(q, k, (1, 1)), lse)
    allowed = tile.allowed()
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0.0)
    assert tile.q is not None
    if slope is not None and tile.q.below is not None:
        # Queries that pad a tile are zeros, where a score mod need not have a value.
        weights = jnp.where(tile.q.below[:, None], weights, 0.0)
    dropped, dweights = tile.dropped(weights, dot(dout, v, (1, 1)))
    draw = weights * (dweights - delta[:, None])
    if slope is not None:
        # Where a score mod is singular at a pair of zero weight, 0 * inf is NaN.
        draw = jnp.where(weights == 0, 0.0, draw * slope)
    return dropped, draw


def transpose_q(inputs: Inputs, tuning: Tuning, lse: Any, delta: Any, dout: Any) -> Any:
    """The cotangent of the queries. Statistics are `[heads, q_seq]`."""
    call, shared = prepare(inputs, "transpose_q", tuning, mod_program(inputs, slope=True))
    q, kv, stat = _by_row(call)
    operands = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    operands |= {"lse": lse, "delta": delta, "dout": dout}
    specs = {"q": q(call.head_dim), "k": kv(call.head_dim), "v": kv(call.v_dim)}
    specs |= {"lse": stat, "delta": stat, "dout": q(call.v_dim)}
    operands |= shared
    grid = (call.rows, call.heads)
    outputs = [(jax.ShapeDtypeStruct(inputs.q.shape, call.dtype), q(call.head_dim))]
    (dq,) = call_kernel(_transpose_q_kernel, call, grid, operands, specs, outputs)
    return dq


def _transpose_q_kernel(frame: Frame, refs: dict[str, Any], dq_ref: Any) -> None:
    row, head = pl.program_id(0), pl.program_id(1)
    outer = start(frame, refs).at(head=head, row=row)
    assert outer.q is not None
    below = outer.q.below
    q = load(refs["q"], 0, frame.block_q, frame.head_dim, below=below)
    dout = load(refs["dout"], 0, frame.block_q, frame.v_dim, below=below)
    lse = load_stat(refs["lse"], (slice(None),), below, jnp.inf)
    delta = load_stat(refs["delta"], (slice(None),), below, 0.0)

    def step(column: Any, masked: bool, dq: Any) -> Any:
        tile = outer.at(column=column, masked=masked)
        k, v = _load_kv(tile, refs, column)
        _, draw = _pulled(tile, q, k, v, dout, lse, delta)
        return dq + dot(draw.astype(k.dtype), k)

    dq = jnp.zeros((frame.block_q, padded(frame.head_dim)), jnp.float32)
    dq = visit(frame, refs, row, step, dq)
    store(dq_ref, dq * frame.scale, frame.head_dim, below)


def transpose_kv(
    inputs: Inputs, tuning: Tuning, lse: Any, delta: Any, dout: Any
) -> tuple[Any, Any]:
    """The cotangents of the keys and of the values. Statistics are `[heads, q_seq]`."""
    mod = mod_program(inputs, slope=True)
    call, shared = prepare(inputs, "transpose_kv", tuning, mod, by_column=True)

    def q(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((call.q_seq, call.group, padded(dim)), lambda j, g: (0, g, 0))

    def kv(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((call.block_kv, None, padded(dim)), lambda j, g: (j, g, 0))

    stat = pl.BlockSpec((call.group, call.q_seq), lambda j, g: (g, 0))
    operands = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    operands |= {"lse": lse, "delta": delta, "dout": dout}
    specs = {"q": q(call.head_dim), "k": kv(call.head_dim), "v": kv(call.v_dim)}
    specs |= {"lse": stat, "delta": stat, "dout": q(call.v_dim)}
    operands |= shared
    outputs = [
        (jax.ShapeDtypeStruct(inputs.k.shape, call.dtype), kv(call.head_dim)),
        (jax.ShapeDtypeStruct(inputs.v.shape, call.dtype), kv(call.v_dim)),
    ]
    grid = (call.columns, call.kv_heads)
    dk, dv = call_kernel(_transpose_kv_kernel, call, grid, operands, specs, outputs)
    return dk, dv


def _transpose_kv_kernel(frame: Frame, refs: dict[str, Any], dk_ref: Any, dv_ref: Any) -> None:
    column, kv_head = pl.program_id(0), pl.program_id(1)
    outer = start(frame, refs).at(column=column)
    assert outer.kv is not None
    below = outer.kv.below
    k = load(refs["k"], 0, frame.block_kv, frame.head_dim, below=below)
    v = load(refs["v"], 0, frame.block_kv, frame.v_dim, below=below)

    def of_head(member: Any, state: Any) -> Any:
        of_column = outer.at(head=kv_head * frame.group + member)

        def step(row: Any, masked: bool, state: Any) -> Any:
            dk, dv = state
            tile = of_column.at(row=row, masked=masked)
            assert tile.q is not None
            first, size = row * frame.block_q, frame.block_q
            edge = {"below": tile.q.below, "head": member}
            q = load(refs["q"], first, size, frame.head_dim, **edge)
            dout = load(refs["dout"], first, size, frame.v_dim, **edge)
            rows = (member, pl.ds(first, size))
            lse = load_stat(refs["lse"], rows, tile.q.below, jnp.inf)
            delta = load_stat(refs["delta"], rows, tile.q.below, 0.0)
            weights, draw = _pulled(tile, q, k, v, dout, lse, delta)
            dk += dot(draw.astype(q.dtype), q, (0, 0))
            dv += dot(weights.astype(dout.dtype), dout, (0, 0))
            return dk, dv

        return visit(frame, refs, column, step, state)

    state = (
        jnp.zeros((frame.block_kv, padded(frame.head_dim)), jnp.float32),
        jnp.zeros((frame.block_kv, padded(frame.v_dim)), jnp.float32),
    )
    # One program takes all heads that share the key head, so no sums are kept in memory.
    dk, dv = lax.fori_loop(0, frame.group, of_head, state)
    store(dk_ref, dk * frame.scale, frame.head_dim, below)
    store(dv_ref, dv, frame.v_dim, below)


# --- tangent ---


def tangent(
    inputs: Inputs,
    tuning: Tuning,
    out: Any,
    lse: Any,
    dlse: Any,
    tangents: dict[str, Any],
) -> tuple[Any, Any]:
    """The tangents of `forward`, the second added to `dlse`. Statistics are `[heads, q_seq]`."""
    mod = mod_program(inputs, tangent=tangents["score_mod"])
    call, shared = prepare(inputs, "tangent", tuning, mod)
    q, kv, stat = _by_row(call)
    operands = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "out": out}
    operands |= {"dq": tangents["q"], "dk": tangents["k"], "dv": tangents["v"]}
    operands |= {"lse": lse, "dlse": dlse}
    specs = {"q": q(call.head_dim), "k": kv(call.head_dim), "v": kv(call.v_dim)}
    specs |= {f"d{name}": spec for name, spec in specs.items()}
    specs |= {"out": q(call.v_dim), "lse": stat, "dlse": stat}
    operands |= shared
    outputs = [
        (jax.ShapeDtypeStruct(out.shape, call.dtype), q(call.v_dim)),
        (jax.ShapeDtypeStruct(lse.shape, jnp.float32), stat),
    ]
    grid = (call.rows, call.heads)
    dout, dlse = call_kernel(_tangent_kernel, call, grid, operands, specs, outputs)
    return dout, dlse


def _tangent_kernel(frame: Frame, refs: dict[str, Any], dout_ref: Any, dlse_ref: Any) -> None:
    row, head = pl.program_id(0), pl.program_id(1)
    outer = start(frame, refs).at(head=head, row=row)
    assert outer.q is not None
    below = outer.q.below
    q, dq = (load(refs[x], 0, frame.block_q, frame.head_dim, below=below) for x in ("q", "dq"))
    lse = load_stat(refs["lse"], (slice(None),), below, jnp.inf)

    def step(column: Any, masked: bool, state: Any) -> Any:
        dweighted, dlse = state
        tile = outer.at(column=column, masked=masked)
        k, v = _load_kv(tile, refs, column)
        dk, dv = _load_kv(tile, refs, column, prefix="d")
        raw, draw = dot(q, k, (1, 1)), dot(dq, k, (1, 1)) + dot(q, dk, (1, 1))
        dscores = draw * frame.scale
        if tile.mod is None:
            weights = jnp.exp2(raw * (frame.scale * LOG2E) - lse[:, None] * LOG2E)
        else:
            scores, dscores = tile.modified(raw * frame.scale, dscore=dscores)
            weights = jnp.exp2((scores - lse[:, None]) * LOG2E)
        allowed = tile.allowed()
        if allowed is not None:
            weights = jnp.where(allowed, weights, 0.0)
            dscores = jnp.where(allowed, dscores, 0.0)
        moved = weights * dscores
        dlse += moved.sum(axis=1)
        weights, moved = tile.dropped(weights, moved)
        dweighted += dot(moved.astype(v.dtype), v) + dot(weights.astype(v.dtype), dv)
        return dweighted, dlse

    dlse = load_stat(refs["dlse"], (slice(None),), below, 0.0)
    dweighted = jnp.zeros((frame.block_q, padded(frame.v_dim)), jnp.float32)
    dweighted, dlse = visit(frame, refs, row, step, (dweighted, dlse))
    out = load(refs["out"], 0, frame.block_q, frame.v_dim, below=below)
    store(dout_ref, dweighted - dlse[:, None] * out.astype(jnp.float32), frame.v_dim, below)
    store_stat(dlse_ref, dlse, below)
