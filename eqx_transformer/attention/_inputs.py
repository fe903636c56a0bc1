"""What one attention call depends on, gathered in a PyTree that every implementation takes."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Final, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from .._precision import accumulation_dtype
from ._dropout import keep
from ._hoist import hoist
from ._masks import AbstractMask, Dense, Padding, Segments
from ._varying import vary_alike


class Source(eqx.Module):
    """Queries, keys and values not yet sanitized or gathered, for kernels that do so on reading."""

    q: Float[Array, "q_seq heads head_dim"]
    k: Float[Array, "*positions kv_heads head_dim"]
    v: Float[Array, "*positions kv_heads v_dim"]
    page_table: Int[Array, " max_pages"] | None = None
    """If given, `k` and `v` are pools of pages, and these are the pages of the sequence."""


class Inputs(eqx.Module):
    """The arguments of `dot_product_attention`, validated and completed."""

    q: Float[Array, "q_seq heads head_dim"]
    k: Float[Array, "kv_seq kv_heads head_dim"]
    v: Float[Array, "kv_seq kv_heads v_dim"]
    score_mod: Callable[..., Float[Array, "..."]] | None
    sinks: Float[Array, " heads"] | None
    mask: AbstractMask | None
    q_positions: Int[Array, " q_seq"] | None
    kv_positions: Int[Array, " kv_seq"] | None
    dropout_seed: UInt32[Array, "2"] | None
    dropout_rate: float = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    block_size: int | None = eqx.field(static=True, default=None)
    source: Source | None = None
    """What `q`, `k` and `v` were copied from, if anything; derivatives are those of the copies."""

    @property
    def q_seq(self) -> int:
        """How many queries there are."""
        return self.q.shape[0]

    @property
    def kv_seq(self) -> int:
        """How many keys there are."""
        return self.k.shape[0]

    @property
    def heads(self) -> int:
        """How many query heads there are."""
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        """How many key (and value) heads there are."""
        return self.k.shape[1]

    @property
    def dtype(self) -> Any:
        """The dtype scores are computed and sums accumulated in: float32 or better."""
        return accumulation_dtype(self.q.dtype)

    def q_pos(self) -> Int[Array, " q_seq"]:
        """The absolute position of every query."""
        if self.q_positions is None:
            return jnp.arange(self.q_seq, dtype=jnp.int32)
        return self.q_positions

    def kv_pos(self) -> Int[Array, " kv_seq"]:
        """The absolute position of every key."""
        if self.kv_positions is None:
            return jnp.arange(self.kv_seq, dtype=jnp.int32)
        return self.kv_positions

    def modified(
        self,
        scores: Float[Array, "heads q kv"],
        q_pos: Int[Array, " q"],
        kv_pos: Int[Array, " kv"],
    ) -> Float[Array, "heads q kv"]:
        """The scores after the score mod."""
        if self.score_mod is None:
            return scores
        head = jnp.arange(self.heads, dtype=jnp.int32)[:, None, None]
        out = self.score_mod(scores, q_pos[None, :, None], kv_pos[None, None, :], head)
        return jnp.broadcast_to(out, scores.shape)

    def allowed(self, q_pos: Int[Array, " q"], kv_pos: Int[Array, " kv"]) -> Bool[Array, "q kv"]:
        """Which of the pairs may attend."""
        shape = (q_pos.shape[0], kv_pos.shape[0])
        if self.mask is None:
            return jnp.ones(shape, bool)
        return jnp.broadcast_to(self.mask(q_pos[:, None], kv_pos[None, :]), shape)

    def dropout(
        self, q_index: Int[Array, " q"], kv_index: Int[Array, " kv"]
    ) -> Float[Array, "heads q kv"] | None:
        """The factors on attention weights, or `None` without dropout."""
        if self.dropout_seed is None:
            return None
        kept = keep(self.dropout_seed, self.dropout_rate, self.heads, q_index, kv_index)
        return kept.astype(self.dtype) / (1 - self.dropout_rate)


def make_inputs(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    score_mod: Any = None,
    scale: float | None = None,
    q_positions: Any = None,
    kv_positions: Any = None,
    sinks: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    block_size: int | None = None,
) -> Inputs:
    """Checks the arguments of an attention function against each other and completes them."""
    check_arrays(q, k, v, sinks)
    if mask is not None:
        check_mask(mask, q, k, q_positions, kv_positions)
        # Arrays that a predicate holds are not differentiated: a mask has no derivative.
        mask = jax.tree.map(
            lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, mask
        )
    if score_mod is not None:
        score, position = accumulation_dtype(q.dtype), jnp.int32
        examples = (
            jax.ShapeDtypeStruct((q.shape[1], 3, 5), score),
            jax.ShapeDtypeStruct((1, 3, 1), position),
            jax.ShapeDtypeStruct((1, 1, 5), position),
            jax.ShapeDtypeStruct((q.shape[1], 1, 1), position),
        )
        score_mod = hoist(score_mod, *examples, what="score_mod", out_dtype=score)
        # A Python number that is being differentiated outside `jit` looks like an array here but
        # is a number again inside a derivative rule; converting makes it one array everywhere.
        score_mod = jax.tree.map(
            lambda x: jax.lax.convert_element_type(x, x.dtype) if eqx.is_inexact_array(x) else x,
            score_mod,
        )
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"attention: dropout_rate={dropout_rate} must be at least 0 and below 1.")
    if dropout_rate > 0 and dropout_key is None:
        raise ValueError(
            f"attention: dropout_rate={dropout_rate} needs a dropout_key; pass one, or "
            "dropout_rate=0 for inference."
        )
    if block_size is not None and block_size < 1:
        raise ValueError(f"attention: block_size={block_size} must be at least 1.")
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        score_mod=score_mod,
        sinks=sinks,
        mask=mask,
        q_positions=_check_positions("q", q_positions, q.shape[0]),
        kv_positions=_check_positions("kv", kv_positions, k.shape[0]),
        dropout_seed=jax.random.bits(dropout_key, (2,), jnp.uint32) if dropout_rate > 0 else None,
        dropout_rate=dropout_rate,
        scale=1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale),
        block_size=block_size,
    )
    return sanitize(inputs)


_PAIRS_AT_A_TIME: Final = 2**20


def sanitize(inputs: Inputs) -> Inputs:
    """Zeroes queries, keys and values that a mask with arrays excludes altogether.

    A weight of zero does not keep out a NaN: `0 * nan` is NaN. So that the contents of padding
    never matter, they are replaced, in value and in gradient, before anything else is computed.
    Masks without arrays mark no padding, and rewriting a cache for them at every decoded token
    would cost more than attending to it.
    """
    if inputs.mask is None or not jax.tree.leaves(eqx.filter(inputs.mask, eqx.is_array)):
        return inputs
    q_used, kv_used = (used[:, None, None] for used in _used(inputs))
    kept = (
        jnp.where(q_used, inputs.q, 0),
        jnp.where(kv_used, inputs.k, 0),
        jnp.where(kv_used, inputs.v, 0),
    )
    source = Source(inputs.q, inputs.k, inputs.v)
    return dataclasses.replace(inputs, **dict(zip("qkv", kept, strict=True)), source=source)


def _used(inputs: Inputs) -> tuple[Bool[Array, " q_seq"], Bool[Array, " kv_seq"]]:
    """Which queries attend to any key, and which keys any query attends to."""
    q_pos, kv_pos = inputs.q_pos(), inputs.kv_pos()
    rows = max(1, _PAIRS_AT_A_TIME // max(1, inputs.kv_seq))
    if inputs.q_seq <= rows:
        allowed = inputs.allowed(q_pos, kv_pos)
        return allowed.any(axis=1), allowed.any(axis=0)
    # Repeating the last query does not change which keys are used.
    some = jnp.pad(q_pos, (0, -inputs.q_seq % rows), mode="edge").reshape(-1, rows)

    def step(kv_used: Array, q_pos: Array) -> tuple[Array, Array]:
        allowed = inputs.allowed(q_pos, kv_pos)
        return kv_used | allowed.any(axis=0), allowed.any(axis=1)

    none = vary_alike(jnp.zeros(inputs.kv_seq, bool), like=inputs)
    kv_used, q_used = jax.lax.scan(step, none, vary_alike(some, like=inputs))
    return q_used.reshape(-1)[: inputs.q_seq], kv_used


def check_arrays(q: Any, k: Any, v: Any, sinks: Any) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(
                f"attention: {name} has {x.ndim} axes {x.shape} but takes one example, "
                f"[{'q' if name == 'q' else 'kv'}_seq, heads, head_dim]; "
                "wrap the call in jax.vmap for a batch."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"attention: {name} has dtype {x.dtype}, which is not floating.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; cast them to "
            "one dtype."
        )
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: q has head_dim={q.shape[2]} but k has head_dim={k.shape[2]}; they must "
            "be equal (only v may differ)."
        )
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"attention: k is [kv_seq={k.shape[0]}, kv_heads={k.shape[1]}] but v is "
            f"[kv_seq={v.shape[0]}, kv_heads={v.shape[1]}]; they must agree."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: heads={q.shape[1]} is not a multiple of kv_heads={k.shape[1]}; every key "
            "head must serve the same number of query heads."
        )
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(
            f"attention: sinks has shape {sinks.shape} but there are heads={q.shape[1]}; it needs "
            "one score per head."
        )


def check_mask(mask: Any, q: Any, k: Any, q_positions: Any, kv_positions: Any) -> None:
    if not isinstance(mask, AbstractMask):
        raise ValueError(
            f"attention: mask must be a mask but has type {type(mask).__name__}; wrap a boolean "
            "matrix in Dense(...), a function in Predicate(...), a row of flags in Padding(...)."
        )
    # A mask that ends early would silently hide the rest of the sequence. With explicit positions
    # that is intended; with default ones it is a mistake.
    for leaf in jax.tree.leaves(mask, is_leaf=lambda x: isinstance(x, Padding | Segments | Dense)):
        if isinstance(leaf, Padding | Segments | Dense):
            _check_axes(leaf)
        axes: tuple[tuple[Literal["q", "kv"], Any, int], ...] = (
            ("q", q_positions, len(q)),
            ("kv", kv_positions, len(k)),
        )
        for axis, positions, seq in axes:
            extent = leaf.extent(axis) if isinstance(leaf, Padding | Segments | Dense) else None
            if positions is None and extent is not None and extent < seq:
                raise ValueError(
                    f"attention: the mask {leaf} covers {extent} {axis} positions but "
                    f"{axis}_seq={seq}; make it as long as the sequence."
                )


def _check_axes(mask: Padding | Segments | Dense) -> None:
    expected = 2 if isinstance(mask, Dense) else 1
    for array in jax.tree.leaves(mask):
        if array.ndim != expected:
            raise ValueError(
                f"attention: an array of the mask {mask} has {array.ndim} axes {array.shape} but "
                f"must have {expected}; for a batch, hand the mask to jax.vmap with the sequences."
            )


def _check_positions(name: str, positions: Any, seq: int) -> Int[Array, " seq"] | None:
    if positions is None:
        return None
    if positions.shape != (seq,) or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(
            f"attention: {name}_positions is {positions.dtype}{list(positions.shape)} but must be "
            f"integers, one for each of the {seq} positions."
        )
    return jnp.asarray(positions, jnp.int32)
