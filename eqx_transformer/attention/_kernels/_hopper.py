"""The kernels for Hopper GPUs: those of `_triton.py`, with asynchronous copies and products.

FlashAttention-3 (Shah et al., 2024), §3.1: a separate warpgroup fetches tiles, and two warpgroups
take turns, so that one multiplies while the other computes weights. Only for 16-bit dtypes, since
the matrix unit takes no others at full speed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .._inputs import Inputs
from ._hopper_plan import ROWS, make_plan
from ._hopper_tile import Tile, by_row, call_kernel, filled
from ._tile import LOG2E, mod_program
from ._tuning import Tuning


def _tokens(x: Any, like: Any, dim: int | None = None) -> Any:
    """Without padding."""
    return x[: like.shape[0], :, : like.shape[2] if dim is None else dim]


def _like(x: Any, dim: int | None = None) -> Any:
    return jax.ShapeDtypeStruct((*x.shape[:2], x.shape[2] if dim is None else dim), x.dtype)


# --- forward ---


def forward(inputs: Inputs, tuning: Tuning) -> tuple[Any, Any]:
    """The output, and the log-sum-exp as `[heads, q_seq]`."""
    plan = make_plan(
        inputs,
        "forward",
        tuning,
        mod_program(inputs),
        queries=[{"q": inputs.q}],
        keys=[{"k": inputs.k}, {"v": inputs.v}],
    )
    if inputs.sinks is not None:
        plan.scalars["sinks"] = inputs.sinks.astype(jnp.float32)
    q, v = plan.own["q"], plan.parts[1]["v"]
    out = _like(q, v.shape[2])
    lse = jax.ShapeDtypeStruct((q.shape[1], q.shape[0]), jnp.float32)
    out, lse = call_kernel(_forward_kernel, plan, {"out": out, "lse": lse}, {"out": "q"})
    return _tokens(out, inputs.q, plan.frame.v_dim), lse[:, : inputs.q_seq]


def _forward_kernel(group: Tile) -> Any:
    frame = group.program.plan.frame
    wide = (ROWS, group.program.plan.parts[1]["v"].shape[2])
    peak, total = filled((ROWS,), -jnp.inf), filled((ROWS,), 0.0)
    if "sinks" in group.numbers:
        # A sink is a key that has been seen already, and whose value is zero.
        peak = filled((ROWS,), group.numbers["sinks"] * LOG2E)
        total = jnp.where(peak == -jnp.inf, 0.0, 1.0)
    other = lax.axis_index("warpgroup") == 1
    # The second warpgroup starts once the first has issued its first product.
    pl.when(other)(group.turn)

    def step(tile: Tile, state: Any) -> Any:
        peak, total, weighted = state
        tile.ready(0)
        (raw,) = tile.products([(tile.kept["q"], tile.fetched("k"))], then=tile.turn)
        scores, factor, _ = tile.scores(raw)
        new_peak = jnp.maximum(peak, scores.max(axis=1) * factor)
        # A query that has seen no key yet has the peak -inf, and -inf - -inf is NaN.
        shift = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        weights = jnp.exp2(scores * factor - by_row(shift, tile.shape))
        decay = jnp.exp2(peak - shift)
        total = total * decay + weights.sum(axis=1)
        (weights,) = tile.dropped(weights)
        tile.release(0)
        weighted = weighted * by_row(decay, wide)
        weights = weights.astype(frame.dtype)
        # The barrier keeps this before the wait, so that a turn starts with products.
        weighted, total, new_peak, weights = lax.optimization_barrier(
            (weighted, total, new_peak, weights)
        )
        tile.end_turn()
        tile.ready(1)
        tile.begin_turn()
        weighted = tile.accumulated(weighted, (weights, tile.fetched("v")))
        tile.release(1)
        return new_peak, total, weighted

    def finish(state: Any) -> Any:
        # The second warpgroup still waits for the first, which has ended one turn fewer.
        pl.when(jnp.logical_not(other))(group.turn)
        peak, total, weighted = state
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        lse = jnp.where(empty, -jnp.inf, peak / LOG2E + jnp.log(total))
        return {"out": weighted / by_row(total, wide), "lse": lse}

    return (peak, total, filled(wide, 0.0)), step, finish


# --- the transpose of the tangent ---


def transpose_q(inputs: Inputs, tuning: Tuning, lse: Any, delta: Any, dout: Any) -> Any:
    """The cotangent of the queries. Statistics are `[heads, q_seq]`."""
    plan = make_plan(
        inputs,
        "transpose_q",
        tuning,
        mod_program(inputs, slope=True),
        queries=[{"q": inputs.q, "dout": dout, "lse": lse, "delta": delta}],
        keys=[{"k": inputs.k, "v": inputs.v}],
    )
    outputs = {"dq": _like(plan.own["q"])}
    (dq,) = call_kernel(_transpose_q_kernel, plan, outputs, {"dq": "q"})
    return _tokens(dq, inputs.q)


def _transpose_q_kernel(group: Tile) -> Any:
    def step(tile: Tile, dq: Any) -> Any:
        k, v = tile.fetched("k"), tile.fetched("v")
        tile.ready(0)
        raw, dweights = tile.products([(tile.kept["q"], k)], [(tile.kept["dout"], v)])
        _, rate = tile.weights(raw)
        dq = tile.accumulated(dq, (tile.draw(rate, dweights), k))
        tile.release(0)
        return dq

    def finish(dq: Any) -> Any:
        return {"dq": dq * group.program.plan.frame.scale}

    return filled(group.kept["q"].shape, 0.0), step, finish


def transpose_kv(
    inputs: Inputs, tuning: Tuning, lse: Any, delta: Any, dout: Any
) -> tuple[Any, Any]:
    """The cotangents of the keys and of the values. Statistics are `[heads, q_seq]`."""
    plan = make_plan(
        inputs,
        "transpose_kv",
        tuning,
        mod_program(inputs, slope=True),
        queries=[{"q": inputs.q, "lse": lse, "delta": delta, "dout": dout}],
        keys=[{"k": inputs.k, "v": inputs.v}],
        by_column=True,
    )
    outputs = {"dk": _like(plan.own["k"]), "dv": _like(plan.own["v"])}
    dk, dv = call_kernel(_transpose_kv_kernel, plan, outputs, {"dk": "k", "dv": "v"})
    return _tokens(dk, inputs.k), _tokens(dv, inputs.v)


def _transpose_kv_kernel(group: Tile) -> Any:
    def step(tile: Tile, state: Any) -> Any:
        dk, dv = state
        q, dout = tile.fetched("q"), tile.fetched("dout")
        tile.ready(0)
        (raw,) = tile.products([(tile.kept["k"], q)])
        weights, rate = tile.weights(raw)
        (weights,) = tile.dropped(weights)
        dv = tile.accumulated(dv, (weights, dout))
        (dweights,) = tile.products([(tile.kept["v"], dout)])
        dk = tile.accumulated(dk, (tile.draw(rate, dweights), q))
        tile.release(0)
        return dk, dv

    def finish(state: Any) -> Any:
        dk, dv = state
        return {"dk": dk * group.program.plan.frame.scale, "dv": dv}

    return tuple(filled(group.kept[name].shape, 0.0) for name in ("k", "v")), step, finish


# --- tangent ---


def tangent(
    inputs: Inputs, tuning: Tuning, out: Any, lse: Any, dlse: Any, tangents: dict[str, Any]
) -> tuple[Any, Any]:
    """The tangents of `forward`, the second added to `dlse`. Statistics are `[heads, q_seq]`."""
    plan = make_plan(
        inputs,
        "tangent",
        tuning,
        mod_program(inputs, tangent=tangents["score_mod"]),
        queries=[{"q": inputs.q, "dq": tangents["q"], "lse": lse, "dlse": dlse}],
        keys=[{"k": inputs.k, "dk": tangents["k"], "v": inputs.v, "dv": tangents["v"]}],
        late={"out": out},
    )
    types = {"dout": _like(plan.late["out"]), "dlse": jax.typeof(plan.own["dlse"])}
    dout, dlse = call_kernel(_tangent_kernel, plan, types, {"dout": "q"})
    return _tokens(dout, out), dlse[:, : inputs.q_seq]


def _tangent_kernel(group: Tile) -> Any:
    scale, shape = group.program.plan.frame.scale, (ROWS, group.program.plan.late["out"].shape[2])

    def step(tile: Tile, state: Any) -> Any:
        dlse, dweighted = state
        q, dq, k, dk = tile.kept["q"], tile.kept["dq"], tile.fetched("k"), tile.fetched("dk")
        tile.ready(0)
        raw, draw = tile.products([(q, k)], [(dq, k), (q, dk)])
        weights, moved = tile.weights(raw, draw * scale)
        dlse += moved.sum(axis=1)
        weights, moved = tile.dropped(weights, moved)
        added = (moved, tile.fetched("v")), (weights, tile.fetched("dv"))
        dweighted = tile.accumulated(dweighted, *added)
        tile.release(0)
        return dlse, dweighted

    def finish(state: Any) -> Any:
        dlse, dweighted = state
        return {"dout": dweighted - by_row(dlse, shape) * group.late("out"), "dlse": dlse}

    return (group.columns["dlse"], filled(shape, 0.0)), step, finish
