"""Linear attention against its dense definition, and what must never reach a result."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformer.attention import Causal, Padding, Prefix, Segments, SlidingWindow
from eqx_transformer.attention._linear import RandomFeatures, elu_plus_one, linear_attention

SEQ, HEADS, KV_HEADS, HEAD_DIM, V_DIM = 21, 4, 2, 8, 6
IDS = [0] * 5 + [-1] * 2 + [1] * 7 + [3] * 6 + [-1]
VALID = [False] * 3 + [True] * 8 + [False] * 6 + [True] * 4

MASKS = {
    "everyone": None,
    "causal": Causal(),
    "padding": Padding(jnp.array(VALID)),
    "causal padding": Causal() & Padding(jnp.array(VALID)),
    "segments": Segments(jnp.array(IDS)),
    "causal segments padding": Causal() & Segments(jnp.array(IDS)) & Padding(jnp.array(VALID)),
    "segments padding": Segments(jnp.array(IDS)) & Padding(jnp.array(VALID)),
}

# Eagerly, every operation would be compiled on its own.
attend = eqx.filter_jit(linear_attention)


@eqx.filter_jit
def dense(q, k, v, mask, feature_map=elu_plus_one):
    """The definition, with every weight written out."""
    group = q.shape[1] // k.shape[1]
    phi_q, phi_k = feature_map(q), jnp.repeat(feature_map(k), group, axis=1)
    weights = jnp.einsum("qhf,khf->hqk", phi_q, phi_k)
    if mask is not None:
        i, j = jnp.arange(q.shape[0])[:, None], jnp.arange(k.shape[0])[None, :]
        weights = jnp.where(jnp.broadcast_to(mask(i, j), weights.shape[1:])[None], weights, 0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    return jnp.einsum("hqk,khd->qhd", weights, jnp.repeat(v, group, axis=1))


def qkv(seed, seq=SEQ, kv_seq=None, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    kv_seq = seq if kv_seq is None else kv_seq
    shapes = (seq, HEADS, HEAD_DIM), (kv_seq, KV_HEADS, HEAD_DIM), (kv_seq, KV_HEADS, V_DIM)
    return tuple(jax.random.normal(x, s, dtype) for x, s in zip(keys, shapes, strict=True))


def close(x, y, dtype):
    tolerance = {"float32": 2e-5, "float64": 1e-11, "bfloat16": 3e-2}[jnp.dtype(dtype).name]
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(x, y, atol=tolerance * max(1, np.abs(y).max()), rtol=0)


CASES = [(name, 4) for name in MASKS]
CASES += [("causal segments padding", 1), ("segments padding", 1), ("causal padding", 64)]


@pytest.mark.parametrize(("name", "chunk_size"), CASES)
def test_equals_the_dense_definition(name, chunk_size):
    q, k, v = qkv(0)
    out = attend(q, k, v, mask=MASKS[name], chunk_size=chunk_size)
    close(out, dense(q, k, v, MASKS[name]), jnp.float32)


@pytest.mark.parametrize("kv_seq", [5, 40])
@pytest.mark.parametrize("mask", [None, Causal()], ids=["everyone", "causal"])
def test_queries_and_keys_of_different_lengths(mask, kv_seq):
    q, k, v = qkv(1, kv_seq=kv_seq)
    out = attend(q, k, v, mask=mask, chunk_size=4)
    close(out, dense(q, k, v, mask), jnp.float32)


@pytest.mark.parametrize(("seq", "kv_seq"), [(0, 3), (3, 0)])
@pytest.mark.parametrize("mask", [None, Causal()], ids=["everyone", "causal"])
def test_empty_sequences(mask, seq, kv_seq):
    out = attend(*qkv(2, seq, kv_seq), mask=mask)
    np.testing.assert_array_equal(out, np.zeros((seq, HEADS, V_DIM)))


@pytest.mark.parametrize("name", ["causal segments padding", "segments padding"])
def test_every_derivative(name):
    with jax.enable_x64(True):
        mask = MASKS[name]
        args, dots = qkv(3, dtype=jnp.float64), qkv(4, dtype=jnp.float64)
        cotangent = jax.random.normal(jax.random.key(5), (SEQ, HEADS, V_DIM), jnp.float64)

        def derivatives(function):
            def loss(*args):
                return jnp.sum(jnp.sin(function(*args)) * cotangent)

            out, dout = jax.jvp(function, args, dots)
            grads, hvp = jax.jvp(jax.grad(loss, (0, 1, 2)), args, dots)
            pairs = zip(args, dots, strict=True)
            batched = jax.vmap(function)(*(jnp.stack([x, y]) for x, y in pairs))
            return out, dout, grads, hvp, batched

        wanted = jax.jit(lambda: derivatives(lambda *x: dense(*x, mask)))()
        got = jax.jit(
            lambda: derivatives(lambda *x: linear_attention(*x, mask=mask, chunk_size=4))
        )()
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert x.dtype == jnp.float64
            close(x, y, jnp.float64)


@pytest.mark.parametrize("features", [elu_plus_one, RandomFeatures(16, key=jax.random.key(6))])
def test_causal_never_sees_the_future(features):
    q, k, v = qkv(7)
    cut = 10
    changed = [x.at[cut:].add(3.0) for x in (q, k, v)]
    options = {"mask": Causal(), "feature_map": features, "chunk_size": 4}
    before, after = attend(q, k, v, **options), attend(*changed, **options)
    np.testing.assert_array_equal(before[:cut], after[:cut])
    assert np.abs(before[cut:] - after[cut:]).min(axis=-1).max() > 0


@pytest.mark.parametrize("name", ["padding", "causal padding", "segments padding"])
def test_nan_in_padding_reaches_nothing(name):
    mask = MASKS[name]
    q, k, v = qkv(8)
    i, j = jnp.arange(SEQ)[:, None], jnp.arange(SEQ)[None, :]
    allowed = jnp.broadcast_to(mask(i, j), (SEQ, SEQ))
    rows, columns = allowed.any(axis=1)[:, None, None], jnp.array(VALID)[:, None, None]
    poisoned = [jnp.where(rows, q, jnp.nan)]
    poisoned += [jnp.where(columns, x, jnp.nan) for x in (k, v)]

    def loss(q, k, v):
        out = attend(q, k, v, mask=mask, chunk_size=4)
        return jnp.sum(out**2), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*poisoned)
    close(out, dense(q, k, v, mask), jnp.float32)
    assert np.all(np.asarray(out)[~np.asarray(allowed.any(axis=1))] == 0)
    for grad, used in zip(grads, (rows, columns, columns), strict=True):
        assert np.isfinite(grad).all()
        assert np.all(np.where(used, 0, grad) == 0)


def test_narrow_inputs_are_summed_in_float32():
    q, k, v = qkv(9, dtype=jnp.bfloat16)
    out = attend(q, k, v, mask=Causal(), chunk_size=4)
    assert out.dtype == jnp.bfloat16
    wide = dense(*(x.astype(jnp.float32) for x in (q, k, v)), Causal())
    close(out, wide, jnp.bfloat16)
    # Summing ones in bfloat16 would stop at 256.
    ones = jnp.ones((1000, 1, 1), jnp.bfloat16)
    ramp = (jnp.arange(1000) >= 500).astype(jnp.bfloat16)[:, None, None]
    assert linear_attention(ones, ones, ramp)[0, 0, 0] == 0.5


def test_tiny_features_do_not_underflow():
    q, k, v = qkv(10)
    out = attend(q - 60, k - 60, v, mask=Causal())
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q - 60, k - 60, v)]
        close(out, dense(*wide, Causal()), jnp.float32)


def test_random_features_estimate_softmax_attention():
    q, k, v = qkv(11)
    # The estimate's variance grows like the exponential of the squared norms.
    q, k = q / 2, k / 2
    weights = jax.nn.softmax(
        jnp.einsum("qhd,khd->hqk", q, jnp.repeat(k, 2, axis=1)) / HEAD_DIM**0.5, axis=-1
    )
    wanted = jnp.einsum("hqk,khd->qhd", weights, jnp.repeat(v, 2, axis=1))

    def error(num_features):
        keys = jax.random.split(jax.random.key(12), 8)
        maps = [RandomFeatures(num_features, key=key) for key in keys]
        outs = [attend(q, k, v, feature_map=x) for x in maps]
        return float(np.sqrt(np.mean([np.square(out - wanted).mean() for out in outs])))

    coarse, fine = error(32), error(2048)
    # The error falls with the root of the number of features.
    assert fine < coarse / 5 and fine < 0.05


def test_random_features_hold_no_parameter_and_use_their_key():
    features = RandomFeatures(24, key=jax.random.key(13))
    assert jax.tree.leaves(eqx.filter(features, eqx.is_inexact_array)) == []
    w = features.projection(HEAD_DIM)
    assert w.shape == (24, HEAD_DIM)
    block = np.asarray(w[:HEAD_DIM] @ w[:HEAD_DIM].T)
    np.testing.assert_allclose(block - np.diag(np.diag(block)), 0, atol=1e-4)
    np.testing.assert_array_equal(w, features.projection(HEAD_DIM))
    other = RandomFeatures(24, key=jax.random.key(14)).projection(HEAD_DIM)
    assert np.abs(w - other).max() > 0.1


def test_a_trained_feature_map_gets_gradients():
    q, k, v = qkv(15)
    linear = jax.random.normal(jax.random.key(16), (12, HEAD_DIM))

    def loss(w, function):
        def feature_map(x):
            return jax.nn.softplus(x @ w.T)

        return jnp.sum(function(feature_map) ** 2)

    def chunked(f):
        return linear_attention(q, k, v, mask=Causal(), feature_map=f, chunk_size=4)

    got = jax.jit(lambda w: jax.grad(loss)(w, chunked))(linear)
    wanted = jax.jit(lambda w: jax.grad(loss)(w, lambda f: dense(q, k, v, Causal(), f)))(linear)
    close(got, wanted, jnp.float32)


def test_memory_of_the_gradient_is_linear_in_the_sequence():
    def temporary(seq):
        args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv(17, seq)]

        def loss(args, valid):
            return jnp.sum(linear_attention(*args, mask=Causal() & Padding(valid)) ** 2)

        valid = jax.ShapeDtypeStruct((seq,), bool)
        compiled = jax.jit(jax.grad(loss)).lower(tuple(args), valid).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(1024), temporary(4096)
    assert long < 4.5 * short


@pytest.mark.parametrize(
    "mask", [SlidingWindow(3, 0), Causal() | Prefix(2), Causal() & ~Padding(jnp.array(VALID))]
)
def test_masks_without_a_linear_form_are_refused(mask):
    with pytest.raises(ValueError, match="no linear form"):
        linear_attention(*qkv(18), mask=mask)


def test_segments_out_of_order_are_refused():
    ids = jnp.array(IDS).at[0].set(2)
    with pytest.raises(Exception, match="must not decrease"):
        linear_attention(*qkv(19), mask=Segments(ids))
    with pytest.raises(Exception, match="the same for queries and keys"):
        linear_attention(*qkv(19), mask=Segments(jnp.array(IDS), jnp.array(IDS) + 1))
    with pytest.raises(ValueError, match="q_seq=21 and kv_seq=9"):
        linear_attention(*qkv(19, kv_seq=9), mask=Segments(jnp.array(IDS)))


def test_bad_arguments():
    q, k, v = qkv(20)
    with pytest.raises(ValueError, match="chunk_size=0"):
        linear_attention(q, k, v, chunk_size=0)
    with pytest.raises(ValueError, match="act only on the last axis"):
        linear_attention(q, k, v, feature_map=lambda x: x[..., 0])
    with pytest.raises(ValueError, match="covers 9 kv positions but kv_seq=21"):
        linear_attention(q, k, v, mask=Padding(jnp.ones(9, bool)))
    with pytest.raises(ValueError, match="num_features=0"):
        RandomFeatures(0, key=jax.random.key(0))
