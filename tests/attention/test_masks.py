"""Masks: what they allow, what they may be skipped for, and that they are values."""

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_transformer.attention as attn
from eqx_transformer.attention import EMPTY, FULL, PARTIAL, _chunked
from eqx_transformer.attention._inputs import make_inputs
from eqx_transformer.attention._tiles import Tiling, tile_lists

from .conformance import CHUNKED
from .oracles import (
    CAUSAL,
    Mask,
    dense,
    groups,
    padding,
    predicate,
    prefix,
    segments,
    strided,
    window,
)

few = hypothesis.settings(max_examples=60, deadline=None, database=None, derandomize=True)

# --- Random masks, with their definitions --------------------------------------------------------

_SEQ = 9
_flags = st.lists(st.booleans(), min_size=_SEQ, max_size=_SEQ)
_ids = st.lists(st.integers(-2, 3), min_size=_SEQ, max_size=_SEQ)
_side = st.none() | st.integers(0, 5)


@st.composite
def _groups(draw):
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    row = st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes))
    return groups(sizes, draw(st.lists(row, min_size=len(sizes), max_size=len(sizes))))


_leaves = st.one_of(
    st.just(CAUSAL),
    st.builds(window, _side, _side),
    st.builds(prefix, st.integers(-1, 10), st.booleans()),
    st.builds(padding, _flags),
    st.builds(segments, _ids),
    st.builds(lambda x: segments(sorted(x)), _ids),
    st.builds(segments, _ids, _ids),
    _groups(),
    st.builds(strided, st.integers(1, 4)),
    st.builds(lambda x: dense(np.array(x).reshape(3, 3)), _flags),
    st.builds(predicate, st.booleans()),
)
expressions = st.recursive(
    _leaves,
    lambda x: st.one_of(
        st.builds(lambda a, b: a & b, x, x),
        st.builds(lambda a, b: a | b, x, x),
        st.builds(lambda a: ~a, x),
    ),
    max_leaves=5,
)

LOW, HIGH = -3, 13
"""Positions to try: also some before and some after everything a mask knows of."""


def _brute(mask: Mask) -> np.ndarray:
    pos = np.arange(LOW, HIGH)
    return np.broadcast_to(mask.allows(pos[:, None], pos[None, :]), (HIGH - LOW,) * 2)


def _rectangles():
    """Every rectangle of those positions."""
    pos = np.arange(LOW, HIGH)
    lo, hi = (x.ravel() for x in np.meshgrid(pos, pos, indexing="ij"))
    lo, hi = lo[lo <= hi], hi[lo <= hi]
    rows, columns = (x.ravel() for x in np.meshgrid(*[np.arange(len(lo))] * 2, indexing="ij"))
    return lo[rows], hi[rows], lo[columns], hi[columns]


def _truth(allowed, bounds):
    """Exact classification of rectangles, by two-dimensional prefix sums."""
    sums = np.pad(allowed.astype(int).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    a, b, c, d = bounds[0] - LOW, bounds[1] - LOW + 1, bounds[2] - LOW, bounds[3] - LOW + 1
    inside = sums[b, d] - sums[a, d] - sums[b, c] + sums[a, c]
    return np.where(inside == 0, EMPTY, np.where(inside == (b - a) * (d - c), FULL, PARTIAL))


def _classified(mask, bounds):
    got = mask.build().block(*(jnp.asarray(x, jnp.int32) for x in bounds))
    return np.broadcast_to(got, bounds[0].shape)


@few
@hypothesis.given(expressions)
def test_predicate_is_its_definition(mask):
    pos = jnp.arange(LOW, HIGH, dtype=jnp.int32)
    got = jnp.broadcast_to(mask.build()(pos[:, None], pos[None, :]), (HIGH - LOW,) * 2)
    np.testing.assert_array_equal(got, _brute(mask))


@few
@hypothesis.given(expressions)
def test_classification_is_never_wrong(mask):
    bounds = _rectangles()
    got, truth = _classified(mask, bounds), _truth(_brute(mask), bounds)
    assert set(np.unique(got)) <= {EMPTY, PARTIAL, FULL}
    wrong = (got != PARTIAL) & (got != truth)
    assert not wrong.any(), (mask.build(), [tuple(b[wrong][0] for b in bounds)])


@pytest.mark.parametrize(
    ("mask", "rate"),
    [
        (CAUSAL, 1),
        (window(3, 0), 1),
        (window(2, 4), 1),
        (window(None, 1), 1),
        (~window(2, 2), 1),
        (prefix(5), 1),
        (prefix(5, True), 1),
        (padding([1, 1, 1, 0, 0, 1, 0, 1, 1]), 1),
        (segments([0, 0, 1, 1, 1, 2, 2, 2, 2]), 1),
        (segments([0, 0, 1, 1, 1, 2, 2, -1, -1]), 1),
        (groups((3, 4, 5), [[1, 0, 1], [1, 1, 1], [0, 0, 1]]), 1),
        (strided(3), 1),
        (CAUSAL & window(3, None), 1),
        (CAUSAL | prefix(4), 0.9),
        (CAUSAL & segments([0, 0, 1, 1, 1, 2, 2, 2, 2]), 0.95),
    ],
)
def test_classification_is_exact_for_common_masks(mask, rate):
    bounds = _rectangles()
    got, truth = _classified(mask, bounds), _truth(_brute(mask), bounds)
    assert ((got == truth) | (got == PARTIAL)).all()
    assert (got == truth).mean() >= rate


@few
@hypothesis.given(expressions, expressions)
def test_laws(a, b):
    pos = jnp.arange(LOW, HIGH, dtype=jnp.int32)
    a, b = a.build(), b.build()

    def table(mask):
        return np.broadcast_to(mask(pos[:, None], pos[None, :]), (HIGH - LOW,) * 2)

    np.testing.assert_array_equal(table(~(a & b)), table(~a | ~b))
    np.testing.assert_array_equal(table(~~a), table(a))
    np.testing.assert_array_equal(table(a & b), table(b & a))
    assert not table(a & ~a).any() and table(a | ~a).all()


# --- Values --------------------------------------------------------------------------------------

ALL = [
    attn.Causal(),
    attn.SlidingWindow(3, 0),
    attn.Prefix(4),
    attn.TokenGroups((2, 3), [[1, 0], [1, 1]]),
    attn.Strided(2),
    attn.Padding(jnp.ones(5, bool)),
    attn.Segments(jnp.arange(5, dtype=jnp.int32)),
    attn.Dense(jnp.ones((5, 5), bool)),
    attn.Causal() & ~attn.Strided(2) | attn.Prefix(jnp.int32(2)),
]


@pytest.mark.parametrize("mask", ALL, ids=str)
def test_no_leaf_is_a_parameter(mask):
    assert not jax.tree.leaves(eqx.filter(mask, eqx.is_inexact_array))
    weights = jnp.array([0.5, -1.0])
    closure = attn.Predicate(lambda i, j: weights[i % 2] + weights[j % 2] > 0)
    q = jnp.ones((5, 1, 2))

    def loss(q):
        return attn.dot_product_attention(q, q, q, mask=mask & closure).sum()

    assert jnp.isfinite(jax.grad(loss)(q)).all()


def test_static_masks_are_equal_and_do_not_retrace():
    def build():
        return (attn.Causal() & attn.SlidingWindow(3, 0)) | ~attn.TokenGroups([5], [[True]])

    assert build() == build() and hash(build()) == hash(build())
    assert build() != attn.Causal() & attn.SlidingWindow(4, 0)
    traces = []

    @eqx.filter_jit
    def run(q, mask):
        traces.append(mask)
        return attn.dot_product_attention(q, q, q, mask=mask, implementation="chunked")

    q = jnp.ones((5, 1, 2))
    run(q, build())
    run(q, build())
    assert len(traces) == 1


@pytest.mark.parametrize("mask", ALL, ids=str)
def test_crosses_jit_scan_checkpoint_and_grad(mask):
    pos = jnp.arange(5, dtype=jnp.int32)
    expected = jnp.broadcast_to(mask(pos[:, None], pos[None, :]), (5, 5))

    def table(mask):
        return jnp.broadcast_to(mask(pos[:, None], pos[None, :]), (5, 5))

    np.testing.assert_array_equal(jax.jit(table)(mask), expected)
    np.testing.assert_array_equal(jax.checkpoint(table)(mask), expected)
    carried, _ = jax.lax.scan(lambda m, _: (m, None), jax.tree.map(jnp.asarray, mask), None, 2)
    np.testing.assert_array_equal(table(carried), expected)
    stacked = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), mask)
    if jax.tree.leaves(mask):
        np.testing.assert_array_equal(jax.vmap(table)(stacked)[1], expected)


def test_predicate_carries_what_it_closes_over():
    def build(threshold):
        return attn.Predicate(lambda i, j: i + j < threshold)

    pos = jnp.arange(6, dtype=jnp.int32)
    thresholds = jnp.array([3, 7], jnp.int32)
    masks = eqx.filter_vmap(build)(thresholds)
    table = eqx.filter_vmap(lambda m: m(pos[:, None], pos[None, :]))(masks)
    expected = (pos[:, None] + pos[None, :])[None] < thresholds[:, None, None]
    np.testing.assert_array_equal(table, expected)
    as_default = attn.Predicate(lambda i, j, limit=thresholds[0]: i + j < limit)
    np.testing.assert_array_equal(as_default(pos[:, None], pos[None, :]), expected[0])


def test_numpy_arrays_are_taken():
    """A NumPy leaf would be a constant for some transformations and a value for others."""
    masks = [
        attn.Padding(np.array([True, False])),
        attn.Segments(np.array([0, 1], np.int32)),
        attn.Dense(np.eye(2, dtype=bool)),
    ]
    assert all(isinstance(x, jax.Array) for mask in masks for x in jax.tree.leaves(mask))


def test_draw():
    assert attn.Causal().draw(3) == "# . .\n# # .\n# # #"
    assert attn.Prefix(2).draw(2, 4) == "# # . .\n# # . ."
    assert attn.Padding(jnp.array([True, False])).draw(2, 3) == "# . .\n# . ."
    assert str(attn.Causal() & ~attn.Prefix(3)) == "(Causal() & ~Prefix(3))"


# --- Errors --------------------------------------------------------------------------------------


def test_construction_errors():
    with pytest.raises(ValueError, match=r"left=-1 is negative.*None"):
        attn.SlidingWindow(-1, 0)
    with pytest.raises(ValueError, match=r"right=-2 is negative"):
        attn.SlidingWindow(None, -2)
    with pytest.raises(ValueError, match=r"2 sizes.*square"):
        attn.TokenGroups((1, 2), [[True, False]])
    with pytest.raises(ValueError, match=r"2 sizes.*lengths"):
        attn.TokenGroups((1, 2), [[True], [False]])
    with pytest.raises(ValueError, match="negative size"):
        attn.TokenGroups((1, -2), [[True, True], [False, True]])
    with pytest.raises(ValueError, match="stride=0"):
        attn.Strided(0)
    with pytest.raises(ValueError, match=r"Predicate.*elementwise.*bool"):
        attn.Predicate(lambda i, j: i - j)
    with pytest.raises(ValueError, match=r"Predicate.*elementwise"):
        attn.Predicate(lambda i, j: jnp.zeros((3,), bool))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (attn.Padding(jnp.ones(4, bool)), r"Padding.*covers 4 kv positions.*kv_seq=5"),
        (attn.Segments(jnp.zeros(4, jnp.int32)), r"Segments.*covers 4 q positions.*q_seq=5"),
        (attn.Dense(jnp.ones((5, 3), bool)), r"Dense.*covers 3 kv positions.*kv_seq=5"),
        (attn.Causal() & ~attn.Dense(jnp.ones((2, 5), bool)), r"Dense.*covers 2 q.*q_seq=5"),
    ],
    ids=str,
)
def test_a_mask_shorter_than_the_sequence_is_refused(mask, message):
    q = jnp.ones((5, 1, 2))
    with pytest.raises(ValueError, match=message):
        attn.dot_product_attention(q, q, q, mask=mask)
    positions = jnp.arange(5, dtype=jnp.int32)
    attn.dot_product_attention(q, q, q, mask=mask, q_positions=positions, kv_positions=positions)


def test_an_array_is_not_a_mask():
    q = jnp.ones((5, 1, 2))
    with pytest.raises(ValueError, match=r"Dense\(...\)"):
        make_inputs(q, q, q, mask=jnp.ones((5, 5), bool))
    with pytest.raises(ValueError, match=r"Predicate\(...\)"):
        make_inputs(q, q, q, mask=lambda i, j: i >= j)


# --- Skipping ------------------------------------------------------------------------------------


def _counts(seq, block, mask, **positions):
    q = jnp.zeros((seq, 1, 1))
    lists = tile_lists(make_inputs(q, q, q, mask=mask, **positions), Tiling(block, block))
    return {
        kind: sum(len(x.rows) for x in lists if x.masked is masked)
        for kind, masked in (("masked", True), ("full", False))
    }, lists


def test_static_tiles_that_are_empty_do_not_exist():
    counts, lists = _counts(1024, 128, attn.Causal())
    assert counts == {"masked": 8, "full": 28}
    assert all(x.live is None for x in lists)
    # A window of 256 keys touches the diagonal, one full neighbour, and one partial one.
    counts, _ = _counts(1024, 128, attn.SlidingWindow(255, 0))
    assert counts == {"masked": 8 + 6, "full": 7}
    counts, _ = _counts(1024, 128, None)
    assert counts == {"masked": 0, "full": 64}
    counts, _ = _counts(1000, 128, None)
    assert counts == {"masked": 8, "full": 56}
    # A static factor of a mask that depends on data is still skipped ahead of time.
    counts, _ = _counts(1024, 128, attn.Causal() & attn.Padding(jnp.ones(1024, bool)))
    assert counts == {"masked": 36, "full": 0}
    counts, _ = _counts(1024, 128, attn.Prefix(0))
    assert counts == {"masked": 0, "full": 0}


@pytest.mark.parametrize(
    ("mask", "size"),
    [
        (None, 512),
        (attn.Causal(), 512),
        (attn.SlidingWindow(1023, 0), 512),
        (attn.SlidingWindow(255, 0), 128),
        (attn.SlidingWindow(31, 31), 128),
    ],
    ids=str,
)
def test_a_narrow_band_is_cut_into_small_tiles(mask, size):
    q = jnp.zeros((4096, 1, 1))
    tiled = _chunked._Tiled(make_inputs(q, q, q, mask=mask))
    assert (tiled.block_q, tiled.block_kv) == (size, size)
    window = attn.SlidingWindow(255, 0)
    out = _chunked.chunked(make_inputs(q[:, :, :0], q[:, :, :0], q + 1, mask=window))[0]
    assert jnp.allclose(out, 1)


def test_dynamic_tiles_that_are_empty_are_dead_at_run_time():
    ids = jnp.repeat(jnp.arange(4, dtype=jnp.int32), 256)
    _, lists = _counts(1024, 128, attn.Causal() & attn.Segments(ids))
    live = sum(int(x.live.sum()) for x in lists if x.live is not None)
    assert live == 4 * 3
    positions = jnp.arange(1024, dtype=jnp.int32)
    _, lists = _counts(1024, 128, attn.Causal(), q_positions=positions, kv_positions=positions)
    assert sum(int(x.live.sum()) for x in lists if x.live is not None) == 36


def test_dead_tiles_cost_nothing_at_run_time():
    """Scores are counted by a callback in the score mod: once for every tile that is computed."""
    seq, seen = 640, []

    class Counting(eqx.Module):
        def __call__(self, s, i, j, h):
            jax.debug.callback(lambda _: seen.append(1), s.ravel()[0])
            return s

    q = jnp.ones((seq, 1, 2))

    def tiles(mask):
        seen.clear()
        jax.block_until_ready(CHUNKED(q, q, q, mask=mask, score_mod=Counting()))
        jax.effects_barrier()
        return len(seen)

    everything = tiles(None)
    ids = jnp.repeat(jnp.arange(5, dtype=jnp.int32), 128)
    assert 0 < tiles(attn.Causal() & attn.Segments(ids)) < tiles(attn.Causal()) < everything
