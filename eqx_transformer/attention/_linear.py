"""Linear attention: a kernel in place of the softmax, in time and memory linear in the sequence.

Positions are cut into chunks. Within a chunk the scores are dense; earlier chunks contribute one
matrix `sum_j phi(k[j]) v[j]^T` per key head, computed for all chunks at once by an associative
scan. There is no loop over positions, and JAX differentiates all of it by itself.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray, UInt32

from .._precision import accumulation_dtype
from ._inputs import check_arrays, check_mask
from ._masks import AbstractMask, And, Causal, Padding, Segments, _lookup

FeatureMap = Callable[[Float[Array, "seq heads head_dim"]], Float[Array, "seq heads features"]]
"""What `linear_attention` accepts as `feature_map`: it acts on the last axis, may change its size,
and should return positive numbers. If it is a Module, its array leaves are trained."""


def elu_plus_one(x: Float[Array, "*axes head_dim"]) -> Float[Array, "*axes head_dim"]:
    """The feature map `elu(x) + 1` of Katharopoulos et al. (2020), positive everywhere."""
    # Not `jax.nn.elu(x) + 1`, which in float32 is zero below about x = -17.
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


class RandomFeatures(eqx.Module):
    """Positive orthogonal random features, with which linear attention estimates softmax attention.

    `phi(x) = exp(w x' - |x'|^2 / 2) / sqrt(num_features)` with `x' = x / head_dim ** (1/4)` has
    `E[phi(q) . phi(k)] = exp(q . k / sqrt(head_dim))`, where the rows of `w` are normal and
    orthogonal in blocks of `head_dim`. (Choromanski et al., Rethinking Attention with Performers,
    2021, lemma 1 and section 2.4.)

    The projection `w` is not a parameter and not a leaf: it is drawn in every call from `seed`,
    an integer leaf, which optimisers leave alone and checkpoints keep. To redraw it, build another
    `RandomFeatures`. Exponentials are not rescaled, because a factor common to all keys would leak
    future keys into a causal result; so keys whose norm exceeds about `13 * head_dim ** (1/4)`
    underflow in float32.

    Raises:

    - `ValueError` if `num_features` is less than one.
    """

    seed: UInt32[Array, "2"]
    num_features: int = eqx.field(static=True)

    def __init__(self, num_features: int, *, key: PRNGKeyArray):
        if num_features < 1:
            raise ValueError(f"RandomFeatures: num_features={num_features} must be at least 1.")
        self.seed = jax.random.bits(key, (2,), jnp.uint32)
        self.num_features = num_features

    def projection(self, head_dim: int) -> Float[Array, "features head_dim"]:
        """The rows `w`, in float32."""
        key = jax.random.wrap_key_data(self.seed, impl="threefry2x32")
        key_directions, key_norms = jax.random.split(key)
        blocks = -(-self.num_features // head_dim)
        gaussian = jax.random.normal(key_directions, (blocks, head_dim, head_dim), jnp.float32)
        directions, upper = jnp.linalg.qr(gaussian)
        # The directions are uniform only if the triangular factor has a positive diagonal.
        signs = jnp.where(jnp.diagonal(upper, axis1=1, axis2=2) < 0, -1, 1)
        directions = (directions * signs[:, None, :].astype(jnp.float32)).mT
        directions = directions.reshape(-1, head_dim)[: self.num_features]
        norms = jax.random.normal(key_norms, directions.shape, jnp.float32)
        return directions * jnp.linalg.norm(norms, axis=-1, keepdims=True)

    def __call__(self, x: Float[Array, "*axes head_dim"]) -> Float[Array, "*axes features"]:
        """Computes the features of queries or keys."""
        x = x * x.shape[-1] ** -0.25
        exponent = jnp.einsum("...d,fd->...f", x, self.projection(x.shape[-1]).astype(x.dtype))
        exponent -= jnp.sum(x * x, axis=-1, keepdims=True) / 2
        return jnp.exp(exponent) / math.sqrt(self.num_features)


def linear_attention(
    q: Float[Array, "q_seq heads head_dim"],
    k: Float[Array, "kv_seq kv_heads head_dim"],
    v: Float[Array, "kv_seq kv_heads v_dim"],
    *,
    mask: AbstractMask | None = None,
    feature_map: FeatureMap = elu_plus_one,
    chunk_size: int = 64,
) -> Float[Array, "q_seq heads v_dim"]:
    """Linear attention of one example (Katharopoulos et al., 2020, equations 4 to 9).

    For every query `i` and head `h`, with the key head `g` that `h` belongs to,

        weight[j] = phi(q[i, h]) . phi(k[j, g])    where mask(i, j)
        out[i, h] = sum_j weight[j] * v[j, g] / sum_j weight[j]

    A query that may attend to nothing gives zeros. Time and memory are linear in the sequence, for
    every derivative too. There are no score mods, as there is no score to modify.

    Arguments:

    - `q`, `k`, `v`: as for `dot_product_attention`; `heads` must be a multiple of `kv_heads`.
    - `mask`: who may attend to whom: `Causal()`, `Padding(valid)`, `Segments(ids)`, any `&` of
        them, or `None` for everyone to everyone. Segments must be those of one sequence, in
        non-decreasing order (negative ids, padding, may be anywhere).
    - `feature_map`: `phi`, applied to queries and keys in float32 or wider.
    - `chunk_size`: how many positions are computed densely at a time. It affects only speed.

    Returns:

    The output, in the dtype of the inputs.

    Raises:

    - `ValueError` for shapes that do not fit together, and for a mask without a linear form.
    - A run-time error if segments are not in order, or differ between queries and keys.
    """
    check_arrays(q, k, v, None)
    return _attend(q, k, v, _parse(mask, q, k), feature_map, chunk_size, None)[0]


class LinearState(eqx.Module):
    """All that causal linear attention has to keep of the keys and values before a position."""

    sums: Float[Array, "kv_heads features columns"]
    """`sum_j phi(k[j]) v[j]^T`, and in the last column `sum_j phi(k[j])`, over one segment."""
    segment: Int[Array, ""]
    """The id of that segment, the most recent one; -1 before any key."""

    @classmethod
    def init(cls, kv_heads: int, features: int, v_dim: int, dtype: DTypeLike) -> "LinearState":
        """The state before the first position."""
        sums = jnp.zeros((kv_heads, features, v_dim + 1), dtype)
        return cls(sums, jnp.full((), -1, jnp.result_type(int)))


def num_features(feature_map: FeatureMap, head_dim: int, dtype: DTypeLike) -> int:
    """How many features `feature_map` computes from `head_dim` numbers."""
    x = jax.ShapeDtypeStruct((1, 1, head_dim), dtype)
    return jax.eval_shape(lambda x: _features(feature_map, x), x).shape[-1]


def extend_linear_attention(
    q: Float[Array, "seq heads head_dim"],
    k: Float[Array, "seq kv_heads head_dim"],
    v: Float[Array, "seq kv_heads v_dim"],
    state: LinearState,
    *,
    mask: AbstractMask | None,
    positions: Int[Array, " seq"],
    feature_map: FeatureMap = elu_plus_one,
    chunk_size: int = 64,
) -> tuple[Float[Array, "seq heads v_dim"], LinearState]:
    """Causal linear attention at the next positions of a sequence (equations 16 to 20).

    Arguments:

    - `q`, `k`, `v`: of the next positions.
    - `state`: the state after the earlier ones.
    - `mask`: as for `linear_attention`, and causal. A key that it hides now is hidden from all
        later queries; without `Segments` the last segment continues.
    - `positions`: the absolute positions, at which the mask is evaluated; negative ones are
        padding.
    - `feature_map`, `chunk_size`: see `linear_attention`.

    Returns:

    The output of `linear_attention` at these positions, and the state after them.

    Raises:

    - What `linear_attention` raises, and `ValueError` for a mask that is not causal.
    """
    check_arrays(q, k, v, None)
    rule = _parse(None if mask is None else at_positions(mask, positions), q, k)
    if not rule.causal:
        raise ValueError(
            f"linear_attention: extending a sequence needs a causal mask, but mask={mask}: outputs "
            "would depend on later keys, so there is nothing to cache. Add Causal(), or attend "
            "within whole sequences."
        )
    if rule.segmented:
        ids = rule.kv_ids.astype(state.segment.dtype)
        ids = eqx.error_if(
            ids,
            jnp.any((ids >= 0) & (ids < state.segment)),
            "linear_attention: the ids of Segments must not decrease, not even from one part of a "
            "sequence to the next. Sort the documents, or use dot_product_attention.",
        )
    else:
        ids = jnp.broadcast_to(jnp.maximum(state.segment, 0), rule.kv_ids.shape)
    rule = rule._replace(valid=rule.valid & (positions >= 0), q_ids=ids, kv_ids=ids)
    return _attend(q, k, v, rule, feature_map, chunk_size, state)


def at_positions(mask: AbstractMask, positions: Int[Array, " seq"]) -> AbstractMask:
    """A mask on the indices of a sequence, from one on their absolute `positions`.

    Only for masks with a linear form, and positions that increase where `mask` is causal.
    """

    def at(part: Any) -> Any:
        if isinstance(part, Padding):
            return Padding(_lookup(part.valid, positions, False))
        if isinstance(part, Segments):
            return Segments(*(_lookup(x, positions, -1) for x in (part.q_ids, part.kv_ids)))
        return part

    return jax.tree.map(at, mask, is_leaf=lambda x: isinstance(x, Padding | Segments))


def is_causal(mask: AbstractMask | None) -> bool:
    """Whether `Causal()` is a part of `mask`."""
    return mask is not None and any(isinstance(part, Causal) for part in _conjuncts(mask))


def _attend(
    q: Float[Array, "q_seq heads head_dim"],
    k: Float[Array, "kv_seq kv_heads head_dim"],
    v: Float[Array, "kv_seq kv_heads v_dim"],
    rule: "_Rule",
    feature_map: FeatureMap,
    chunk_size: int,
    state: LinearState | None,
) -> tuple[Float[Array, "q_seq heads v_dim"], Any]:
    if chunk_size < 1:
        raise ValueError(f"linear_attention: chunk_size={chunk_size} must be at least 1.")
    (q_seq, heads, _), (kv_seq, kv_heads, _) = q.shape, k.shape
    seen = _attends_to_something(rule, state)
    # The contents of padding, which may be NaN, must not enter the products.
    q = jnp.where(seen[:, None, None], q, 0)
    k, v = (jnp.where(rule.valid[:, None, None], x, 0) for x in (k, v))

    out_dtype, dtype = q.dtype, accumulation_dtype(q.dtype)
    if state is not None:
        dtype = max(dtype, state.sums.dtype, key=lambda x: jnp.finfo(x).bits)
    q, k = _features(feature_map, q.astype(dtype)), _features(feature_map, k.astype(dtype))
    k = jnp.where(rule.valid[:, None, None], k, 0)
    # A factor common to a whole query cancels; this one keeps the products from underflowing.
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(q), axis=-1, keepdims=True, initial=0))
    q = q / jnp.where(size == 0, 1, size)
    q = q.reshape(q_seq, kv_heads, heads // kv_heads, q.shape[-1])
    # A column of ones appended to the values makes the denominator one more output.
    v = jnp.concatenate([v.astype(dtype), jnp.ones((kv_seq, kv_heads, 1), dtype)], axis=-1)

    if rule.causal or rule.segmented:
        out, state = _chunked(q, k, v, rule, chunk_size, state)
    else:
        out = jnp.einsum("qhgf,hfv->qhgv", q, jnp.einsum("khf,khv->hfv", k, v))
    total, out = out[..., -1:], out[..., :-1]
    out = out / jnp.where(total == 0, 1, total)
    return out.reshape(q_seq, heads, out.shape[-1]).astype(out_dtype), state


class _Rule(NamedTuple):
    """A mask that has a linear form, taken apart."""

    causal: bool
    valid: Bool[Array, " kv_seq"]
    segmented: bool
    q_ids: Int[Array, " q_seq"]
    """The segment of every query, negative for padding; all zero without segments."""
    kv_ids: Int[Array, " kv_seq"]


def _parse(
    mask: AbstractMask | None,
    q: Float[Array, "q_seq heads head_dim"],
    k: Float[Array, "kv_seq kv_heads head_dim"],
) -> _Rule:
    q_seq, kv_seq = q.shape[0], k.shape[0]
    rule = _Rule(
        causal=False,
        valid=jnp.ones(kv_seq, bool),
        segmented=False,
        q_ids=jnp.zeros(q_seq, jnp.int32),
        kv_ids=jnp.zeros(kv_seq, jnp.int32),
    )
    if mask is None:
        return rule
    check_mask(mask, q, k, None, None)
    for part in _conjuncts(mask):
        if isinstance(part, Causal):
            rule = rule._replace(causal=True)
        elif isinstance(part, Padding):
            rule = rule._replace(valid=rule.valid & part.valid[:kv_seq])
        elif isinstance(part, Segments) and not rule.segmented:
            if q_seq != kv_seq:
                raise ValueError(
                    f"linear_attention: Segments with q_seq={q_seq} and kv_seq={kv_seq}; segments "
                    "have a linear form only within one sequence. Use dot_product_attention."
                )
            rule = rule._replace(
                segmented=True, q_ids=part.q_ids[:q_seq], kv_ids=part.kv_ids[:kv_seq]
            )
        else:
            raise ValueError(
                f"linear_attention: the mask {mask} has no linear form because of {part}; only "
                "Causal(), Padding, one Segments and any `&` of them have one. Use "
                "dot_product_attention, or leave that part out."
            )
    if not rule.segmented:
        return rule
    ids = jnp.maximum(rule.kv_ids, -1)
    wrong = (ids != jnp.maximum(rule.q_ids, -1)) | ((ids >= 0) & (ids < jax.lax.cummax(ids)))
    ids = eqx.error_if(
        ids,
        jnp.any(wrong),
        "linear_attention: the ids of Segments must be the same for queries and keys, and must not "
        "decrease along the sequence. Sort the documents, or use dot_product_attention.",
    )
    return rule._replace(valid=rule.valid & (ids >= 0), q_ids=ids, kv_ids=ids)


def _conjuncts(mask: AbstractMask) -> Iterator[AbstractMask]:
    if isinstance(mask, And):
        yield from _conjuncts(mask.left)
        yield from _conjuncts(mask.right)
    else:
        yield mask


def _attends_to_something(rule: _Rule, state: LinearState | None) -> Bool[Array, " q_seq"]:
    """Whether there is a key for each query, the ones in `state` included."""
    if not (rule.causal or rule.segmented):
        return jnp.broadcast_to(jnp.any(rule.valid), rule.q_ids.shape)
    # Segments are in order, so the greatest id so far is the query's own, if that has a key.
    before = jax.lax.cummax(jnp.where(rule.valid, rule.kv_ids, -1))
    if state is not None:
        before = jnp.maximum(before, state.segment)
    before = _resize(before, rule.q_ids.shape[0])
    seen = before == rule.q_ids
    if not rule.causal:
        last = jnp.iinfo(rule.kv_ids.dtype).max
        after = jax.lax.cummin(jnp.where(rule.valid, rule.kv_ids, last), reverse=True)
        seen |= after == rule.q_ids
    return seen & (rule.q_ids >= 0)


def _resize(x: Int[Array, " kv_seq"], q_seq: int) -> Int[Array, " q_seq"]:
    """`x` truncated, or extended with its last element (with -1 if it has none)."""
    x = jnp.concatenate([jnp.full(1, -1, x.dtype), x])
    return x[jnp.minimum(jnp.arange(1, q_seq + 1), x.shape[0] - 1)]


def _features(
    feature_map: FeatureMap, x: Float[Array, "seq heads head_dim"]
) -> Float[Array, "seq heads features"]:
    out = feature_map(x)
    if out.shape[:-1] != x.shape[:-1] or out.dtype != x.dtype:
        raise ValueError(
            f"linear_attention: feature_map must act only on the last axis, but turned "
            f"{x.dtype}{list(x.shape)} into {out.dtype}{list(out.shape)}."
        )
    return out


def _chunked(
    q: Float[Array, "q_seq kv_heads group features"],
    k: Float[Array, "kv_seq kv_heads features"],
    v: Float[Array, "kv_seq kv_heads columns"],
    rule: _Rule,
    chunk_size: int,
    state: LinearState | None,
) -> tuple[Float[Array, "q_seq kv_heads group columns"], LinearState | None]:
    """Sums of `weight[j] * v[j]` over the keys each query may attend to, and the final state."""
    q_seq = q.shape[0]
    seq = max(q_seq, k.shape[0])
    chunk_size = max(1, min(chunk_size, seq))
    chunks = max(1, -(-seq // chunk_size))

    def cut(x: Array, fill: int) -> Array:
        rest = chunks * chunk_size - x.shape[0]
        x = jnp.pad(x, ((0, rest), *[(0, 0)] * (x.ndim - 1)), constant_values=fill)
        return x.reshape(chunks, chunk_size, *x.shape[1:])

    q, k, v = cut(q, 0), cut(k, 0), cut(v, 0)
    q_ids, kv_ids = cut(rule.q_ids, -1), cut(jnp.where(rule.valid, rule.kv_ids, -1), -1)

    allowed = q_ids[:, :, None] == kv_ids[:, None, :]
    if rule.causal:
        allowed &= jnp.tri(chunk_size, dtype=bool)[None]
    scores = jnp.einsum("cqhgf,ckhf->chgqk", q, k)
    scores = jnp.where(allowed[:, None, None], scores, 0)
    out = jnp.einsum("chgqk,ckhv->cqhgv", scores, v)
    for reverse in (False,) if rule.causal else (False, True):
        carried, carried_id = _carry(k, v, kv_ids, state, reverse)
        if state is not None:
            state = LinearState(carried[-1].astype(state.sums.dtype), carried_id[-1])
        carried, carried_id = (x[:chunks] for x in (carried, carried_id))
        if reverse:
            carried, carried_id = carried[::-1], carried_id[::-1]
        continued = (q_ids == carried_id[:, None])[:, :, None, None, None]
        out += jnp.einsum("cqhgf,chfv->cqhgv", jnp.where(continued, q, 0), carried)
    return out.reshape(chunks * chunk_size, *out.shape[2:])[:q_seq], state


def _carry(
    k: Float[Array, "chunks chunk kv_heads features"],
    v: Float[Array, "chunks chunk kv_heads columns"],
    ids: Int[Array, "chunks chunk"],
    state: LinearState | None,
    reverse: bool,
) -> tuple[Float[Array, "parts kv_heads features columns"], Int[Array, " parts"]]:
    """The state before each chunk and, last, the state after all of them.

    That is `sum_j k[j] v[j]^T` over the keys of the most recent segment, and that segment's id:
    segments are in order, so no other one can continue into the chunk. With `reverse`, chunks are
    counted from the end.
    """
    if reverse:
        k, v, ids = k[::-1], v[::-1], ids[::-1]
        last = jnp.iinfo(ids.dtype).max
        met = jnp.where(ids < 0, last, ids).min(axis=1)
        met = jax.lax.cummin(jnp.concatenate([jnp.full(1, last, met.dtype), met]))
    else:
        met = ids.max(axis=1)
        first = jnp.full(1, -1, met.dtype) if state is None else state.segment[None]
        met = jax.lax.cummax(jnp.concatenate([first, met]))
    of_last = (ids == met[1:, None])[:, :, None, None]
    sums = jnp.einsum("ckhf,ckhv->chfv", jnp.where(of_last, k, 0), v)
    before = jnp.zeros_like(sums[:1]) if state is None else state.sums.astype(sums.dtype)[None]
    sums = jnp.concatenate([before, sums])
    continues = jnp.concatenate([jnp.zeros(1, bool), met[1:] == met[:-1]])

    def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        keep = right[0][:, None, None, None]
        return left[0] & right[0], jnp.where(keep, left[1], 0) + right[1]

    return jax.lax.associative_scan(combine, (continues, sums))[1], met
