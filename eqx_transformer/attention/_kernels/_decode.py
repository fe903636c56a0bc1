"""Decoding: few queries and many keys, which are split over programs.

The queries of all heads that share a key head are the rows of one tile, so that keys are read once.
A program takes some hundreds of keys and writes a partial output and its log-sum-exp, by which the
parts are merged (Dao et al., Flash-Decoding, 2023). How many keys depends on the shapes of a single
sequence only: its result does not depend on what else is in a batch.

Keys are read in place, from a cache with heads first or from pages.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .._inputs import Inputs, Source
from ._tile import Frame, Side, Tile, mod_program, prepare, start
from ._triton import attended, call_kernel, normalised, nothing_seen
from ._triton_memory import load, store, store_stat
from ._tuning import Tuning, padded


def forward(inputs: Inputs, tuning: Tuning) -> tuple[Any, Any]:
    """The output, and the log-sum-exp as `[heads, q_seq]`."""
    frame, operands = prepare(inputs, "decode", tuning, mod_program(inputs))
    source = inputs.source or Source(inputs.q, inputs.k, inputs.v)
    k, k_spec = _in_place(source.k, source.page_table)
    v, v_spec = _in_place(source.v, source.page_table)
    # Rows run over queries, and for each of them over heads.
    q = source.q.reshape(frame.q_seq, frame.kv_heads, frame.group, frame.head_dim)
    q = q.swapaxes(0, 1).reshape(frame.kv_heads, -1, frame.head_dim)
    operands |= {"q": q, "k": k, "v": v, "page_table": source.page_table}
    q_block = (None, frame.block_q, padded(frame.head_dim))
    specs = {"q": pl.BlockSpec(q_block, lambda s, g: (g, 0, 0)), "k": k_spec, "v": v_spec}
    parts = (pl.cdiv(frame.columns, _tiles_of_program(frame)), frame.kv_heads, q.shape[1])
    block = (None, None, frame.block_q)
    outputs = [
        (
            jax.ShapeDtypeStruct((*parts, frame.v_dim), jnp.float32),
            pl.BlockSpec((*block, padded(frame.v_dim)), lambda s, g: (s, g, 0, 0)),
        ),
        (
            jax.ShapeDtypeStruct(parts, jnp.float32),
            pl.BlockSpec(block, lambda s, g: (s, g, 0)),
        ),
    ]
    out, lse = call_kernel(_decode_kernel, frame, parts[:2], operands, specs, outputs)

    def unfolded(x: Any) -> Any:
        x = x.reshape(-1, frame.kv_heads, frame.q_seq, frame.group, *x.shape[3:])
        return x.swapaxes(1, 2).reshape(-1, frame.q_seq, frame.heads, *x.shape[4:])

    out, lse = _added_up(unfolded(out), unfolded(lse), inputs.sinks)
    return out.astype(frame.dtype), lse.T


def _tiles_of_program(frame: Frame) -> int:
    return max(1, frame.tiles.split // frame.block_kv)


def _in_place(x: Any, page_table: Any) -> tuple[Any, pl.BlockSpec]:
    """Keys or values, and the block that a program may read: all positions of one head."""
    dim = padded(x.shape[-1])
    if page_table is not None:
        return x, pl.BlockSpec((*x.shape[:2], None, dim), lambda s, g: (0, 0, g, 0))
    # Caches have heads first, and were transposed for the call. XLA cancels the two transposes.
    x = x.swapaxes(0, 1)
    return x, pl.BlockSpec((None, x.shape[1], dim), lambda s, g: (g, 0, 0))


def _added_up(out: Any, lse: Any, sinks: Any) -> tuple[Any, Any]:
    """Merges the parts along the first axis."""
    total = jax.nn.logsumexp(lse, axis=0)
    if sinks is not None:
        total = jnp.logaddexp(total, sinks.astype(total.dtype)[None, :])
    # Where no key was seen at all, all shares are zero.
    share = jnp.exp(lse - jnp.where(jnp.isneginf(total), jnp.inf, total)[None])
    return (out * share[..., None]).sum(axis=0), total


def _decode_kernel(frame: Frame, refs: dict[str, Any], out_ref: Any, lse_ref: Any) -> None:
    split, kv_head = pl.program_id(0), pl.program_id(1)
    outer = _with_rows(start(frame, refs), kv_head)
    assert outer.q is not None
    q = load(refs["q"], 0, frame.block_q, frame.head_dim, below=outer.q.below)

    def step(column: Any, state: Any) -> Any:
        tile = outer.at(column=column, masked=frame.loops.any_masked)
        assert tile.kv is not None
        allowed, place = tile.allowed(), _place(tile, column)
        k = load(refs["k"], place, frame.block_kv, frame.head_dim, below=tile.kv.below)
        v = load(refs["v"], place, frame.block_kv, frame.v_dim, below=tile.kv.below)
        if allowed is not None:
            # A weight of zero does not keep out a NaN, and these values are not sanitized.
            seen = allowed.astype(jnp.int32).max(axis=0) > 0
            v = jnp.where(jnp.broadcast_to(seen[:, None], v.shape), v, jnp.zeros_like(v))
        return attended(tile, q, k, v, allowed, state)

    per_program = _tiles_of_program(frame)
    first = jnp.maximum(split * per_program, refs["bounds"][0])
    behind = jnp.minimum((split + 1) * per_program, refs["bounds"][1])
    out, lse = normalised(lax.fori_loop(first, behind, step, nothing_seen(frame)))
    store(out_ref, out, frame.v_dim, outer.q.below)
    store_stat(lse_ref, lse, outer.q.below)


def _with_rows(tile: Tile, kv_head: Any) -> Tile:
    """The tile, with the queries and heads of its rows."""
    frame = tile.frame
    row = jnp.arange(frame.block_q, dtype=jnp.int32)
    count = frame.q_seq * frame.group
    # Surplus rows repeat the last query, so that they may see only keys that a query may see.
    inside = jnp.minimum(row, count - 1)
    index = lax.div(inside, jnp.full_like(inside, frame.group))
    positions = tile.refs["q_pos"]
    side = Side(
        index,
        row < count if count < frame.block_q else None,
        index if positions is None else positions[index],
    )
    return tile.at(head=kv_head * frame.group + inside - index * frame.group, queries=side)


def _place(tile: Tile, column: Any) -> Any:
    """Where the keys of a tile are: the first one's index, or each one's page and offset in it."""
    table, frame = tile.refs["page_table"], tile.frame
    if table is None:
        return column * frame.block_kv
    assert tile.kv is not None
    num_pages, page_size = tile.refs["k"].shape[:2]
    index = jnp.minimum(tile.kv.index, frame.kv_seq - 1)
    which = lax.div(index, jnp.full_like(index, page_size))
    # Table entries beyond the sequence may be any number. What they lead to is masked.
    page = jnp.clip(table[which], 0, num_pages - 1)
    return page, index - which * page_size
