"""Attention with the sequence split over devices: keys and values travel round a ring.

Every device keeps its queries. The keys and values start at home and move on by one device per
step; a device merges its results for the shards by log-sum-exp. (Liu et al., Ring Attention with
Blockwise Transformers, 2023.) The backward pass goes round the ring once more, and the gradients of
keys and values travel with them, so that no device ever holds more than two shards of anything.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._precision import accumulation_dtype
from ._chunked import chunked
from ._derivatives import Output, Passes, Tangents
from ._inputs import Inputs, check_mask, make_inputs, sanitize
from ._masks import EMPTY, AbstractMask
from ._score_mods import ScoreMod
from ._varying import vary_alike

Layout = Literal["contiguous", "zigzag"]
"""How a sequence lies on the devices of a ring.

- `"contiguous"`: one piece each, in order.
- `"zigzag"`: two pieces each, the first with the last, the second with the last but one, and so
    on; under a causal mask all devices then have the same work. See `zigzag_order`.
"""


def ring_attention(
    q: Float[Array, "q_seq heads head_dim"],
    k: Float[Array, "kv_seq kv_heads head_dim"],
    v: Float[Array, "kv_seq kv_heads v_dim"],
    *,
    axis_name: str,
    mask: AbstractMask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    q_positions: Int[Array, " q_seq"] | None = None,
    kv_positions: Int[Array, " kv_seq"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
    layout: Layout = "contiguous",
) -> Float[Array, "q_seq heads v_dim"]:
    """Attention of one example whose sequence is split over a mesh axis, inside `jax.shard_map`.

    Equals `dot_product_attention` of the whole sequence. Only neighbours communicate, by
    `jax.lax.ppermute`. Pairs of shards that the mask excludes are not computed. Memory is linear
    in the local length, also for first derivatives in either mode; for second derivatives, every
    device keeps all keys and values.

    Arguments:

    - `q`, `k`, `v`: this device's shards of queries, keys and values, as for
        `dot_product_attention`. All devices have shards of the same length.
    - `axis_name`: the mesh axis the sequence is split over.
    - `mask`, `score_mod`, `scale`, `sinks`: as for `dot_product_attention`, and the same on every
        device. Positions are those in the whole sequence, so arrays in a mask (`Padding`,
        `Segments`, `Dense`) cover the whole sequence, in its original order: pass them through
        `shard_map` with the spec `P()`. Heads count from 0 on every device.
    - `q_positions`, `kv_positions`: absolute positions of this device's shards; if left out, they
        follow from `layout`.
    - `layout`: how the sequence lies on the devices, `"contiguous"` or `"zigzag"`. If positions
        are given, it only says whether a shard is one run of positions or two: the better it fits,
        the more excluded shards are skipped.

    Returns:

    This device's shard of the output, in the dtype of the inputs.

    Raises:

    - `ValueError` if there is no such mesh axis here, or for shapes, dtypes, masks or options that
        do not fit together.
    """
    try:
        devices, index = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    except NameError:
        raise ValueError(
            f"ring_attention: there is no mesh axis {axis_name!r} here. Call it inside "
            "jax.shard_map over a mesh with that axis, or dot_product_attention elsewhere."
        ) from None
    if layout not in ("contiguous", "zigzag"):
        raise ValueError(f"ring_attention: layout={layout!r} is not one of contiguous, zigzag.")
    stripes = 2 if layout == "zigzag" else 1
    positions = []
    for name, x, given in (("q", q, q_positions), ("kv", k, kv_positions)):
        if x.shape[0] % stripes:
            raise ValueError(
                f"ring_attention: the zigzag layout halves every shard, but {name}_seq="
                f"{x.shape[0]} is odd on each of {devices} devices; pad the sequence to a multiple "
                f"of {2 * devices}."
            )
        at_home = _positions(x.shape[0], index, devices, stripes)
        positions.append(at_home if given is None else given)
    inputs = make_inputs(
        q,
        k,
        v,
        score_mod=score_mod,
        scale=scale,
        q_positions=positions[0],
        kv_positions=positions[1],
        sinks=sinks,
    )
    if mask is not None:
        whole = range(devices * q.shape[0]), range(devices * k.shape[0])
        check_mask(mask, *whole, q_positions, kv_positions)
        mask = jax.tree.map(
            lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, mask
        )
        # Only now: given it, `make_inputs` zeroes keys that no query here attends to, and queries
        # elsewhere may.
        inputs = eqx.tree_at(lambda x: x.mask, inputs, mask, is_leaf=lambda x: x is None)
    out, _ = _passes(axis_name, stripes)(inputs)
    return out


def zigzag_order(
    seq: int, num_devices: int
) -> tuple[Int[np.ndarray, " seq"], Int[np.ndarray, " seq"]]:
    """The order in which a sequence is split for `layout="zigzag"`, and its inverse.

    `x[order]`, split in equal contiguous pieces, is the zigzag layout; `y[inverse]` undoes it.
    Reorder tokens and targets once, not in every layer: whatever treats each token on its own is
    unaffected. (Llama Team, The Llama 3 Herd of Models, 2024, section 3.3.2.)

    Raises:

    - `ValueError` if `seq` is not a multiple of `2 * num_devices`.
    """
    if num_devices < 1 or seq % (2 * num_devices):
        raise ValueError(
            f"zigzag_order: seq={seq} is not a multiple of {2 * num_devices}, two pieces for each "
            f"of {num_devices} devices; pad it."
        )
    pieces = np.arange(seq).reshape(2 * num_devices, -1)
    pairs = [(i, 2 * num_devices - 1 - i) for i in range(num_devices)]
    order = pieces[np.asarray(pairs).reshape(-1)].reshape(-1)
    return order, np.argsort(order)


def _positions(seq: int, index: Any, devices: int, stripes: int) -> Int[Array, " seq"]:
    """Absolute positions of a device's shard."""
    length = seq // stripes
    within = jnp.arange(length, dtype=jnp.int32)
    pieces = (index, 2 * devices - 1 - index)[:stripes]
    return jnp.concatenate([piece * length + within for piece in pieces])


@functools.cache
def _passes(axis_name: str, stripes: int) -> Passes:
    ring = _Ring(axis_name, stripes)
    return Passes(ring.forward, ring.tangent, ring.transpose)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The three passes of attention on a ring, from those on one device.

    Given the log-sum-exp over all keys, the tangent and its transpose are sums over shards of
    keys. Sinks belong to no shard and are added here.
    """

    axis_name: str
    stripes: int
    """How many runs of consecutive positions a shard consists of."""

    def forward(self, inputs: Inputs) -> Output:
        """Attention output, in the dtype of `v`, and the log-sum-exp of all scores."""

        def visit(shard: Inputs, found: Output, travelling: PyTree) -> PyTree:
            return _merge(found, chunked.forward(shard)), travelling

        lse = jnp.full((inputs.q_seq, inputs.heads), -jnp.inf, inputs.dtype)
        out = jnp.zeros((*lse.shape, inputs.v.shape[-1]), inputs.dtype)
        (out, lse), _ = self._around(inputs, visit, (out, lse), ())
        if inputs.sinks is not None:
            sinks = jnp.broadcast_to(inputs.sinks.astype(inputs.dtype)[None], lse.shape)
            out, lse = _merge((out, lse), (jnp.zeros_like(out), sinks))
        return out.astype(inputs.v.dtype), lse

    def tangent(self, residuals: tuple[Inputs, Array, Array], tangents: Tangents) -> Output:
        """The derivative of `forward`; the tangents of keys and values travel with them."""
        inputs, out, lse = residuals
        staying = {x: y for x, y in tangents.items() if x not in ("k", "v", "sinks")}

        def visit(shard: Inputs, sums: Output, travelling: Tangents) -> PyTree:
            found = chunked.tangent((shard, out, lse), staying | travelling)
            return jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, found), travelling

        zeros = jnp.zeros(out.shape, inputs.dtype), jnp.zeros(lse.shape, inputs.dtype)
        travelling = {name: tangents[name] for name in ("k", "v")}
        (dout, dlse), _ = self._around(inputs, visit, zeros, travelling)
        if inputs.sinks is not None and "sinks" in tangents:
            moved = _sink_weights(inputs, lse) * tangents["sinks"].astype(inputs.dtype)[None]
            dlse += moved
            dout -= moved[..., None] * out.astype(inputs.dtype)
        return dout.astype(out.dtype), dlse

    def transpose(
        self,
        residuals: tuple[Inputs, Array, Array],
        cotangents: Output,
        wanted: frozenset[str],
    ) -> Tangents:
        """The transpose of `tangent`; the cotangents of keys and values travel with them."""
        inputs, out, lse = residuals

        def visit(shard: Inputs, sums: Tangents, travelling: Tangents) -> PyTree:
            found = chunked.transpose((shard, out, lse), cotangents, wanted - {"sinks"})
            added = {
                name: jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, found[name])
                for name, total in (sums | travelling).items()
            }
            return {x: added[x] for x in sums}, {x: added[x] for x in travelling}

        names = ("q", "score_mod") if "score_mod" in wanted else ("q",)
        sums, travelling = (
            jax.tree.map(
                lambda x: jnp.zeros(x.shape, accumulation_dtype(x.dtype)),
                {x: eqx.filter(getattr(inputs, x), eqx.is_inexact_array) for x in some},
            )
            for some in (names, ("k", "v"))
        )
        sums, travelling = self._around(inputs, visit, sums, travelling)
        # One more step takes them home.
        result = sums | self._move(travelling)
        result = {
            name: jax.tree.map(
                lambda x, y: y.astype(x.dtype),
                eqx.filter(getattr(inputs, name), eqx.is_inexact_array),
                total,
            )
            for name, total in result.items()
        }
        if inputs.sinks is not None and "sinks" in wanted:
            dout, dlse = (x.astype(inputs.dtype) for x in cotangents)
            delta = (dout * out.astype(inputs.dtype)).sum(axis=-1) - dlse
            dsinks = -(_sink_weights(inputs, lse) * delta).sum(axis=0)
            result["sinks"] = dsinks.astype(inputs.sinks.dtype)
        return result

    def _around(
        self,
        inputs: Inputs,
        visit: Callable[[Inputs, PyTree, PyTree], PyTree],
        state: PyTree,
        travelling: PyTree,
    ) -> PyTree:
        """Runs `state, travelling = visit(shard, state, travelling)` on every shard of keys.

        `state` stays, `travelling` moves on with the shard; it ends one step from home.
        """

        def visit_or_skip(kv: PyTree, state: PyTree, travelling: PyTree) -> PyTree:
            shard = eqx.tree_at(
                lambda x: (x.k, x.v, x.kv_positions, x.sinks),
                inputs,
                (*kv, None),
                is_leaf=lambda x: x is None,
            )
            live = self._live(shard)

            def run(state: PyTree, travelling: PyTree) -> PyTree:
                return visit(sanitize(shard), state, travelling)

            if live is None:
                return run(state, travelling)
            # Jitted, because `vmap` turns a `cond` into a selection among its operands, which makes
            # constants among them vary over mesh axes that the branch did not expect.
            return jax.lax.cond(live, jax.jit(run), lambda *x: x, state, travelling)

        def step(carry: PyTree, _: None) -> tuple[PyTree, None]:
            kv, state, travelling = carry
            # Sent first, so that communication overlaps with computation.
            kv_next = self._move(kv)
            state, travelling = visit_or_skip(kv, state, travelling)
            return (kv_next, state, self._move(travelling)), None

        kv = (inputs.k, inputs.v, inputs.kv_positions)
        state, travelling = vary_alike((state, travelling), like=inputs)
        steps = jax.lax.axis_size(self.axis_name) - 1
        carry, _ = jax.lax.scan(step, (kv, state, travelling), None, length=steps)
        return visit_or_skip(*carry)

    def _move(self, tree: PyTree) -> PyTree:
        devices = jax.lax.axis_size(self.axis_name)
        to_next = [(i, (i + 1) % devices) for i in range(devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis_name, to_next), tree)

    def _live(self, shard: Inputs) -> Bool[Array, ""] | None:
        """Whether any pair of positions may attend; `None` if that is certain."""
        if shard.mask is None or 0 in (shard.q_seq, shard.kv_seq):
            return None
        q = shard.q_pos().reshape(self.stripes, -1, 1)
        kv = shard.kv_pos().reshape(1, -1, shard.kv_seq // self.stripes)
        bounds = (q.min(axis=1), q.max(axis=1), kv.min(axis=2), kv.max(axis=2))
        return jnp.any(shard.mask.block(*bounds) != EMPTY)


def _merge(left: Output, right: Output) -> Output:
    """Merges attention over two disjoint sets of keys."""
    (left_out, left_lse), (right_out, right_lse) = left, right
    peak = jnp.maximum(left_lse, right_lse)
    # A query that has met no key yet has -inf, and -inf - -inf is NaN.
    peak = jnp.where(jnp.isneginf(peak), 0, peak)
    left_weight, right_weight = jnp.exp(left_lse - peak), jnp.exp(right_lse - peak)
    total = left_weight + right_weight
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = left_out * (left_weight / total)[..., None]
    out += right_out.astype(out.dtype) * (right_weight / total)[..., None]
    return out, jnp.where(empty, -jnp.inf, jnp.log(total) + peak)


def _sink_weights(inputs: Inputs, lse: Float[Array, "q_seq heads"]) -> Float[Array, "q_seq heads"]:
    """The share of each softmax that goes to the sink."""
    assert inputs.sinks is not None
    return jnp.exp(inputs.sinks.astype(inputs.dtype)[None] - lse)
