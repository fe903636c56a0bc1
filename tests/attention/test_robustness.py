"""Garbage in padding, random problems, extreme scores, and narrow dtypes."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_transformer.attention as attn
from eqx_transformer.attention import _inputs

from .conformance import (
    CHUNKED_SMALL,
    IMPLEMENTATIONS,
    REFERENCE,
    Case,
    assert_close,
    compiled,
    definition,
    dropout_factor,
    tolerance,
)
from .oracles import (
    AFFINE,
    ALIBI,
    CAUSAL,
    CLOSURE,
    NO_MASK,
    NO_MOD,
    SOFT_CAP,
    compose,
    relative,
)
from .test_masks import expressions

SEQ, HEADS, KV_HEADS, DIM = 11, 4, 2, 3

# --- Padding, which is what a mask with arrays excludes, holds anything ---

_VALID = np.array([1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0], bool)
_RAGGED = np.random.default_rng(0).random((SEQ, SEQ)) < 0.5
_SLOTS = jnp.arange(SEQ, dtype=jnp.int32)

PADDED = {
    "padding": {"mask": attn.Padding(jnp.asarray(_VALID))},
    "causal_padding": {"mask": attn.Causal() & attn.Padding(jnp.asarray(_VALID))},
    "segments": {
        "mask": attn.Segments(jnp.asarray([0] * SEQ), jnp.asarray(np.where(_VALID, 0, -1)))
    },
    "dense": {"mask": attn.Dense(jnp.asarray(_RAGGED & _VALID[None]))},
    "prefix": {"mask": attn.Prefix(jnp.int32(6))},
}


def _garbage(name):
    """Which keys nobody attends to."""
    mask = PADDED[name]["mask"]
    allowed = jnp.broadcast_to(mask(_SLOTS[:, None], _SLOTS[None, :]), (SEQ, SEQ))
    unused = ~np.asarray(allowed).any(axis=0)
    assert unused.any() and not unused.all()
    return unused


def _everything(implementation, options):
    def run(args, tangents):
        def function(args):
            return implementation(*args, **options)

        value, pull = jax.vjp(function, args)
        moved = jax.jvp(function, (args,), (tangents,))[1]
        lse = jnp.where(jnp.isfinite(value[1]), jnp.cos(value[1]), 1)
        return value, moved, pull((jnp.cos(value[0]), lse))[0]

    return run


@pytest.mark.parametrize("implementation", [REFERENCE, CHUNKED_SMALL], ids=str)
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[] if x in ("padding", "dense") else pytest.mark.slow) for x in PADDED],
)
def test_what_padding_holds_is_nobodys_business(name, implementation):
    """NaN and infinity in keys and values, and in their tangents, change nothing at all."""
    unused = _garbage(name)
    rng = np.random.default_rng(0)
    shapes = ((SEQ, HEADS, DIM), (SEQ, KV_HEADS, DIM), (SEQ, KV_HEADS, DIM))
    clean, tangents = ([rng.normal(size=s).astype(np.float32) for s in shapes] for _ in range(2))
    dirty, dirty_tangents = [list(map(np.copy, x)) for x in (clean, tangents)]
    for k_or_v, junk in ((1, np.nan), (2, np.inf)):
        dirty[k_or_v][unused] = junk
        dirty_tangents[k_or_v][unused] = -junk
    run = compiled(_everything(implementation, PADDED[name]))

    def jax_tuple(x):
        return tuple(map(jnp.asarray, x))

    expected = run(jax_tuple(clean), jax_tuple(tangents))
    got = run(jax_tuple(dirty), jax_tuple(dirty_tangents))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got[1:]))
    for cotangent in got[2][1:]:
        assert (np.asarray(cotangent)[unused] == 0).all()


@pytest.mark.parametrize("implementation", [REFERENCE, CHUNKED_SMALL], ids=str)
def test_a_padded_row_of_everything(implementation):
    """Packed self-attention on activations that are NaN where there is no token."""
    ids = jnp.asarray([0, 0, 0, 1, 1, 1, 1, -1, -1, -1, -1], jnp.int32)
    x = np.random.default_rng(0).normal(size=(SEQ, HEADS, DIM)).astype(np.float32)
    dirty = x.copy()
    dirty[7:] = np.nan

    def run(x, tangent):
        def function(x):
            return implementation(x, x, x, mask=attn.Causal() & attn.Segments(ids))[0]

        out, pull = jax.vjp(function, x)
        return out, pull(jnp.cos(out))[0], jax.jvp(function, (x,), (tangent,))[1]

    expected = compiled(run)(jnp.asarray(x), jnp.asarray(x))
    got = compiled(run)(jnp.asarray(dirty), jnp.asarray(dirty))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("implementation", [REFERENCE, CHUNKED_SMALL], ids=str)
def test_documents_do_not_leak(implementation):
    """Changing one document changes nothing in the other, to the last bit."""
    ids = jnp.asarray([0] * 5 + [1] * 6, jnp.int32)
    x = jax.random.normal(jax.random.key(0), (SEQ, HEADS, DIM))
    y = x.at[:5].set(jax.random.normal(jax.random.key(1), (5, HEADS, DIM)) * 100)

    @compiled
    def run(x):
        return implementation(x, x, x, mask=attn.Segments(ids))

    for a, b in zip(run(x), run(y), strict=True):
        np.testing.assert_array_equal(a[5:], b[5:])
        assert jnp.abs(a[:5] - b[:5]).max() > 1e-2


# --- Extreme scores ------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [REFERENCE, CHUNKED_SMALL], ids=str)
@pytest.mark.parametrize("magnitude", [1e-20, 10.0, 1e8])
def test_scores_of_any_size(implementation, magnitude):
    """No overflow on the way: softmax is invariant to a shift, and so must its parts be."""
    q, k, v = (jax.random.normal(jax.random.key(n), (SEQ, 2, DIM)) for n in range(3))
    run = compiled(_everything(implementation, {"mask": attn.Causal()}))
    value, moved, cotangents = run((q * magnitude, k, v), (q, k, v))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((value, moved, cotangents)))
    with np.errstate(over="ignore"):
        case = Case("extreme", SEQ, SEQ, 2, 2, DIM, DIM, mask=CAUSAL)
        expected, _ = definition(case, {"q": q * magnitude, "k": k, "v": v, "mod": {}})
    if magnitude < 1e4:
        # Beyond, the rounding of a score to float32 is itself larger than one.
        assert_close(value[0], expected, jnp.float32)


@pytest.mark.parametrize("implementation", [REFERENCE, CHUNKED_SMALL], ids=str)
def test_a_sink_may_dwarf_or_vanish(implementation):
    q, k, v = (jax.random.normal(jax.random.key(n), (SEQ, 2, DIM)) for n in range(3))
    plain, _ = implementation(q, k, v)
    out, lse = implementation(q, k, v, sinks=jnp.array([-jnp.inf, 1e4]))
    assert_close(out[:, 0], plain[:, 0], jnp.float32)
    assert (out[:, 1] == 0).all() and jnp.allclose(lse[:, 1], 1e4)
    gradient = jax.grad(lambda s: implementation(q, k, v, sinks=s)[0].sum())
    assert jnp.isfinite(gradient(jnp.array([-1e4, 1e4]))).all()


# --- Random problems -----------------------------------------------------------------------------


@st.composite
def _cases(draw):
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    q_seq, kv_seq = draw(st.integers(1, 9)), draw(st.integers(1, 9))

    def positions(seq):
        return draw(st.none() | st.tuples(*[st.integers(-1, 10)] * seq))

    mods = [NO_MOD, NO_MOD, AFFINE, ALIBI, CLOSURE, SOFT_CAP, relative(True)]
    mods += [compose(AFFINE, SOFT_CAP)]
    # A mask may not end before the sequence does, where positions are not given.
    q_positions, kv_positions = positions(q_seq), positions(kv_seq)
    return Case(
        "random",
        q_seq,
        kv_seq,
        4,
        kv_heads,
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
        mask=draw(st.just(NO_MASK) | expressions),
        mod=draw(st.sampled_from(mods)),
        scale=draw(st.none() | st.floats(-2, 2)),
        q_positions=q_positions or tuple(range(q_seq)),
        kv_positions=kv_positions or tuple(range(kv_seq)),
        sinks=draw(st.booleans()),
        dropout_rate=draw(st.sampled_from([0.0, 0.0, 0.3])),
    )


def _check_random(case):
    args = case.args("float32")
    out, lse = definition(case, args, dropout_factor(case))
    for implementation in (REFERENCE, CHUNKED_SMALL):
        got = compiled(lambda args, run=implementation: run.of(case, args))(args)
        assert_close(got, (out, lse), jnp.float32, str(implementation))


@hypothesis.settings(max_examples=6, deadline=None, database=None, derandomize=True)
@hypothesis.given(_cases())
def test_random_problems(case):
    _check_random(case)


@pytest.mark.slow
@hypothesis.settings(max_examples=60, deadline=None, database=None)
@hypothesis.given(_cases())
def test_many_random_problems(case):
    _check_random(case)


# --- bfloat16 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_narrow_inputs_lose_only_the_last_rounding(implementation, dtype):
    """Against the exact result on the same inputs: as accurate as rounding that result, nearly."""
    case = Case("narrow", 150, 150, 2, 1, 16, 16)
    args = case.args(dtype)
    expected, expected_lse = definition(case, args)
    out, lse = compiled(lambda args: implementation.of(case, args))(args)
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    error = np.abs(np.asarray(out, np.float64) - expected)
    rounded = np.asarray(jnp.asarray(expected).astype(dtype), np.float64)
    correctly_rounded = np.abs(rounded - expected)
    assert np.sqrt((error**2).mean()) < 2 * np.sqrt((correctly_rounded**2).mean())
    # Weights may be rounded to the dtype of the values before they are multiplied: half an ulp of
    # each, relative to sums of magnitudes no larger than the greatest value.
    eps = float(jnp.finfo(dtype).eps)
    assert error.max() < eps * np.abs(np.asarray(args["v"], np.float64)).max()
    assert np.abs(np.asarray(lse) - expected_lse).max() < tolerance("float32") * 10


@pytest.mark.parametrize("name", PADDED)
def test_what_is_excluded_is_found_in_pieces(name, monkeypatch):
    """For long sequences, whose pairs of positions must never be there all at once."""
    q, kv = jnp.ones((SEQ, HEADS, DIM)), jnp.ones((SEQ, KV_HEADS, DIM))
    whole = _inputs.make_inputs(q, kv, kv, mask=PADDED[name]["mask"])
    monkeypatch.setattr(_inputs, "_PAIRS_AT_A_TIME", 3 * SEQ)
    pieces = _inputs.make_inputs(q, kv, kv, mask=PADDED[name]["mask"])
    assert not whole.k.all()
    for x, y in zip((whole.q, whole.k, whole.v), (pieces.q, pieces.k, pieces.v), strict=True):
        np.testing.assert_array_equal(x, y)
