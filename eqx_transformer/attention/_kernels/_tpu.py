"""The kernels for TPUs: those of `_triton.py`, in the form that suits a TPU.

A core runs the programs of a grid in order. So each tile of a line (a row or, for the cotangents of
keys and values, a column) is a program of its own: sums stay in scratch memory from the first to
the last, and blocks are fetched while the previous tile is computed. A kernel consists of three
functions: one begins a line, one adds a tile, and one finishes the line.

Tiles of scores are keys by queries. With queries along the lanes, numbers that belong to queries
are a row, which is cheap to keep and to multiply with.
"""

from typing import Any

import jax.numpy as jnp

from .._inputs import Inputs
from ._tile import LOG2E, dot, mod_program
from ._tpu_tile import Plan, Tile, call_kernel, make_plan
from ._tuning import Tuning

# --- forward ---


def forward(inputs: Inputs, tuning: Tuning) -> tuple[Any, Any]:
    """The output, and the log-sum-exp as `[heads, q_seq]`."""
    plan = make_plan(inputs, "forward", tuning, mod_program(inputs))
    q, k, v = plan.queries(inputs.q), plan.keys(inputs.k), plan.keys(inputs.v)
    rows = {}
    if inputs.sinks is not None:
        rows["sinks"] = inputs.sinks.astype(jnp.float32)[:, None, None]
    out, lse = call_kernel(
        _forward_kernel,
        plan,
        {"queries": {"q": q}, "keys": {"k": k, "v": v}, "rows": rows},
        [_queries(q, v.shape[2]), _rows(q)],
        [(1, plan.frame.block_q), (1, plan.frame.block_q), (v.shape[2], plan.frame.block_q)],
    )
    return _tokens(out, inputs.q, plan.frame.v_dim), lse[:, 0, : inputs.q_seq]


def _tokens(x: Any, like: Any, dim: int | None = None) -> Any:
    """Back to `[seq, heads, dim]`."""
    dim = like.shape[2] if dim is None else dim
    return x[:, : like.shape[0], :dim].swapaxes(0, 1).astype(like.dtype)


def _queries(q: Any, dim: int) -> tuple[str, Any, Any]:
    return "queries", (*q.shape[:2], dim), q.dtype


def _rows(q: Any) -> tuple[str, Any, Any]:
    return "rows", (q.shape[0], 1, q.shape[1]), jnp.float32


def _forward_kernel(
    tile: Tile, out_ref: Any, lse_ref: Any, peak_ref: Any, total_ref: Any, weighted_ref: Any
) -> Any:
    """`weighted` is transposed, `[dim, block_q]`."""

    def begin() -> None:
        peak = jnp.full(peak_ref.shape, -jnp.inf, jnp.float32)
        total = jnp.zeros(total_ref.shape, jnp.float32)
        if "sinks" in tile.refs["rows"]:
            # A sink acts as a key that has been seen already, and whose value is zero.
            peak = jnp.broadcast_to(tile.row("sinks") * LOG2E, peak.shape)
            total = jnp.where(peak == -jnp.inf, 0.0, 1.0)
        peak_ref[...], total_ref[...] = peak, total
        weighted_ref[...] = jnp.zeros(weighted_ref.shape, jnp.float32)

    def step(tile: Tile) -> None:
        v, frame = tile.token("v"), tile.plan.frame
        raw = dot(tile.token("k"), tile.token("q"), (1, 1))
        if frame.mod is None:
            scores = raw * (frame.scale * LOG2E)
        else:
            scores = tile.modified(raw * frame.scale)[0] * LOG2E
        allowed = tile.allowed()
        if allowed is not None:
            scores = jnp.where(allowed, scores, -jnp.inf)
        peak = peak_ref[...]
        new_peak = jnp.maximum(peak, scores.max(axis=0, keepdims=True))
        # A query that has seen no key yet has the peak -inf, and -inf - -inf is NaN.
        shift = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        weights, decay = jnp.exp2(scores - shift), jnp.exp2(peak - shift)
        peak_ref[...] = new_peak
        total_ref[...] = total_ref[...] * decay + weights.sum(axis=0, keepdims=True)
        (weights,) = tile.dropped(weights)
        added = dot(v, weights.astype(v.dtype), (0, 0))
        weighted_ref[...] = weighted_ref[...] * decay + added

    def finish() -> None:
        total = total_ref[...]
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        out_ref[...] = (weighted_ref[...] / total).T.astype(out_ref.dtype)
        lse_ref[...] = jnp.where(empty, -jnp.inf, peak_ref[...] / LOG2E + jnp.log(total))

    return begin, step, finish


# --- the transpose of the tangent ---


def _residuals(
    plan: Plan, inputs: Inputs, lse: Any, delta: Any, dout: Any
) -> dict[str, dict[str, Any]]:
    return {
        "queries": {"q": plan.queries(inputs.q), "dout": plan.queries(dout)},
        "keys": {"k": plan.keys(inputs.k), "v": plan.keys(inputs.v)},
        # Weights of queries that pad a tile are zero.
        "rows": {"lse": plan.row(lse, jnp.inf), "delta": plan.row(delta)},
    }


def transpose_q(inputs: Inputs, tuning: Tuning, lse: Any, delta: Any, dout: Any) -> Any:
    """The cotangent of the queries. Statistics are `[heads, q_seq]`."""
    plan = make_plan(inputs, "transpose_q", tuning, mod_program(inputs, slope=True))
    operands = _residuals(plan, inputs, lse, delta, dout)
    q = operands["queries"]["q"]
    scratch = [(q.shape[2], plan.frame.block_q)]
    (dq,) = call_kernel(_transpose_q_kernel, plan, operands, [_queries(q, q.shape[2])], scratch)
    return _tokens(dq, inputs.q)


def _transpose_q_kernel(tile: Tile, dq_ref: Any, sum_ref: Any) -> Any:
    """The sum is transposed, `[dim, block_q]`."""

    def begin() -> None:
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    def step(tile: Tile) -> None:
        k, (_, draw) = tile.token("k"), tile.pulled()
        sum_ref[...] += dot(k, draw.astype(k.dtype), (0, 0))

    def finish() -> None:
        dq_ref[...] = (sum_ref[...] * tile.plan.frame.scale).T.astype(dq_ref.dtype)

    return begin, step, finish


def transpose_kv(
    inputs: Inputs, tuning: Tuning, lse: Any, delta: Any, dout: Any
) -> tuple[Any, Any]:
    """The cotangents of the keys and of the values. Statistics are `[heads, q_seq]`."""
    mod = mod_program(inputs, slope=True)
    plan = make_plan(inputs, "transpose_kv", tuning, mod, by_column=True)
    operands = _residuals(plan, inputs, lse, delta, dout)
    like = operands["keys"]["k"], operands["keys"]["v"]
    outputs = [("keys", x.shape, x.dtype) for x in like]
    scratch = [(plan.frame.block_kv, x.shape[2]) for x in like]
    dk, dv = call_kernel(_transpose_kv_kernel, plan, operands, outputs, scratch)
    return _tokens(dk, inputs.k), _tokens(dv, inputs.v)


def _transpose_kv_kernel(
    tile: Tile, dk_ref: Any, dv_ref: Any, k_sum_ref: Any, v_sum_ref: Any
) -> Any:
    def begin() -> None:
        k_sum_ref[...] = jnp.zeros(k_sum_ref.shape, jnp.float32)
        v_sum_ref[...] = jnp.zeros(v_sum_ref.shape, jnp.float32)

    def step(tile: Tile) -> None:
        q, dout, (weights, draw) = tile.token("q"), tile.token("dout"), tile.pulled()
        k_sum_ref[...] += dot(draw.astype(q.dtype), q)
        v_sum_ref[...] += dot(weights.astype(dout.dtype), dout)

    def finish() -> None:
        dk_ref[...] = (k_sum_ref[...] * tile.plan.frame.scale).astype(dk_ref.dtype)
        dv_ref[...] = v_sum_ref[...].astype(dv_ref.dtype)

    return begin, step, finish


# --- tangent ---


def tangent(
    inputs: Inputs, tuning: Tuning, out: Any, lse: Any, dlse: Any, tangents: dict[str, Any]
) -> tuple[Any, Any]:
    """The tangents of `forward`, the second added to `dlse`. Statistics are `[heads, q_seq]`."""
    plan = make_plan(inputs, "tangent", tuning, mod_program(inputs, tangent=tangents["score_mod"]))
    queries = {"q": inputs.q, "dq": tangents["q"], "out": out}
    keys = {"k": inputs.k, "v": inputs.v, "dk": tangents["k"], "dv": tangents["v"]}
    operands = {
        "queries": {name: plan.queries(x) for name, x in queries.items()},
        "keys": {name: plan.keys(x) for name, x in keys.items()},
        "rows": {"lse": plan.row(lse, jnp.inf), "dlse": plan.row(dlse)},
    }
    q, v_dim = operands["queries"]["q"], operands["keys"]["v"].shape[2]
    outputs = [_queries(q, v_dim), _rows(q)]
    scratch = [(1, plan.frame.block_q), (v_dim, plan.frame.block_q)]
    dout, dlse = call_kernel(_tangent_kernel, plan, operands, outputs, scratch)
    return _tokens(dout, inputs.q, plan.frame.v_dim), dlse[:, 0, : inputs.q_seq]


def _tangent_kernel(
    tile: Tile, dout_ref: Any, dlse_ref: Any, moved_ref: Any, weighted_ref: Any
) -> Any:
    """`weighted` is transposed, `[dim, block_q]`."""

    def begin() -> None:
        moved_ref[...] = tile.row("dlse")
        weighted_ref[...] = jnp.zeros(weighted_ref.shape, jnp.float32)

    def step(tile: Tile) -> None:
        q, k, v = tile.token("q"), tile.token("k"), tile.token("v")
        draw = dot(k, tile.token("dq"), (1, 1)) + dot(tile.token("dk"), q, (1, 1))
        weights, dscores = tile.weights(dot(k, q, (1, 1)), draw * tile.plan.frame.scale)
        allowed = tile.allowed()
        if allowed is not None:
            weights = jnp.where(allowed, weights, 0.0)
            dscores = jnp.where(allowed, dscores, 0.0)
        moved = weights * dscores
        moved_ref[...] += moved.sum(axis=0, keepdims=True)
        weights, moved = tile.dropped(weights, moved)
        added = dot(v, moved.astype(v.dtype), (0, 0))
        weighted_ref[...] += added + dot(tile.token("dv"), weights.astype(v.dtype), (0, 0))

    def finish() -> None:
        out = tile.token("out").astype(jnp.float32)
        dlse_ref[...] = moved_ref[...]
        dout = weighted_ref[...].T - moved_ref[...].T * out
        dout_ref[...] = dout.astype(dout_ref.dtype)

    return begin, step, finish
