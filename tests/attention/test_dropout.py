"""Dropout of attention weights: applied, unbiased, unstructured, and the same everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_transformer.attention as attn

from .conformance import (
    CHUNKED_SMALL,
    IMPLEMENTATIONS,
    REFERENCE,
    assert_close,
)

SEQ, HEADS = 160, 4


def _weights(implementation, rate, key, seq=SEQ, heads=HEADS):
    """The attention weights after dropout, `[heads, q, k]`: values are the identity matrix."""
    zero = jnp.zeros((seq, heads, 1))
    v = jnp.broadcast_to(jnp.eye(seq)[:, None, :], (seq, heads, seq))
    out, _ = implementation(zero, zero, v, dropout_rate=rate, dropout_key=key)
    return np.asarray(out.transpose(1, 0, 2)) * seq


def _kept(rate=0.5, key=0):
    return _weights(REFERENCE, rate, jax.random.key(key)) > 0


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.9])
def test_rate_and_scale(rate):
    weights = _weights(REFERENCE, rate, jax.random.key(0))
    deviation = np.sqrt(rate * (1 - rate) / weights.size)
    assert abs((weights == 0).mean() - rate) < 4 * deviation
    np.testing.assert_allclose(weights[weights > 0], 1 / (1 - rate), rtol=1e-5)
    assert abs(weights.mean() - 1) < 4 * deviation / (1 - rate)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:], ids=str)
def test_the_same_key_drops_the_same_weights(implementation):
    for key in range(2):
        key = jax.random.key(key)
        expected = _weights(REFERENCE, 0.3, key, seq=139)
        got = _weights(implementation, 0.3, key, seq=139)
        np.testing.assert_array_equal(got > 0, expected > 0)
        assert_close(got, expected, jnp.float32)


def test_raw_and_typed_keys_and_vmap():
    keys = jax.random.split(jax.random.key(0), 3)
    raw = _weights(REFERENCE, 0.3, jax.random.key_data(keys[0]), seq=8)
    np.testing.assert_array_equal(raw, _weights(REFERENCE, 0.3, keys[0], seq=8))
    q = jnp.ones((8, 2, 1))

    def run(key):
        return CHUNKED_SMALL(q, q, q, dropout_rate=0.3, dropout_key=key)[0]

    batched = jax.vmap(run)(keys)
    assert_close(batched, jnp.stack([run(key) for key in keys]), jnp.float32)
    assert jnp.abs(batched[0] - batched[1]).max() > 0.1


def test_rate_zero_needs_no_key_and_is_exact():
    q = jax.random.normal(jax.random.key(0), (5, 2, 3))
    plain = attn.dot_product_attention(q, q, q)
    for key in (None, jax.random.key(0)):
        np.testing.assert_array_equal(
            attn.dot_product_attention(q, q, q, dropout_rate=0.0, dropout_key=key), plain
        )


def test_mean_over_keys_is_the_output_without_dropout():
    q, k, v = (jax.random.normal(jax.random.key(n), (6, 2, 3)) for n in range(3))
    keys = jax.random.split(jax.random.key(1), 4000)

    @jax.jit
    @jax.vmap
    def run(key):
        return REFERENCE(q, k, v, dropout_rate=0.4, dropout_key=key)

    out, lse = run(keys)
    expected, expected_lse = REFERENCE(q, k, v)
    error = np.abs(out.mean(axis=0) - expected) / (np.asarray(out).std(axis=0) / np.sqrt(4000))
    assert error.max() < 4.5
    # The log-sum-exp is that of the scores, of which none is dropped.
    np.testing.assert_allclose(lse, jnp.broadcast_to(expected_lse[None], lse.shape), rtol=1e-5)


def _correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.std() * b.std()))


@pytest.mark.parametrize("key", [0, 1, 2])
def test_no_structure(key):
    """Neighbours, rows, columns, diagonals, heads and keys are uncorrelated."""
    kept = _kept(0.5, key).astype(np.float64)
    limit = 4.5 / np.sqrt(kept[:, 1:, 1:].size)
    for down in range(4):
        for right in range(-3, 4):
            if (down, right) > (0, 0):
                a = kept[:, down:, max(right, 0) : SEQ + min(right, 0)]
                b = kept[:, : SEQ - down, max(-right, 0) : SEQ - max(right, 0)]
                assert abs(_correlation(a, b)) < limit, (down, right)
    # Powers of two are where a weak counter hash shows.
    for shift in (8, 16, 32, 64, 128):
        assert abs(_correlation(kept[:, shift:], kept[:, :-shift])) < 2 * limit
        assert abs(_correlation(kept[:, :, shift:], kept[:, :, :-shift])) < 2 * limit
    for head in range(1, HEADS):
        assert abs(_correlation(kept[0], kept[head])) < 4.5 / SEQ
    assert abs(_correlation(kept, kept.transpose(0, 2, 1))) < 2 * limit
    assert abs(_correlation(kept, _kept(0.5, key + 10))) < limit


def test_row_and_column_counts_are_binomial():
    kept = _kept(0.3, 3)
    variance = SEQ * 0.3 * 0.7
    for axis in (1, 2):
        counts = kept.sum(axis=axis).ravel()
        spread = ((counts - SEQ * 0.7) ** 2).mean() / variance
        assert abs(spread - 1) < 5 * np.sqrt(2 / counts.size)
        assert np.abs(counts - SEQ * 0.7).max() < 5 * np.sqrt(variance)
    diagonal = np.array([np.trace(x) for x in kept])
    assert np.abs(diagonal - SEQ * 0.7).max() < 4.5 * np.sqrt(variance)


@pytest.mark.parametrize("implementation", [REFERENCE, CHUNKED_SMALL], ids=str)
def test_gradient_with_the_pattern_fixed(implementation):
    """Against differences of the function itself: backward must drop what forward dropped."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 6)
        args = tuple(jax.random.normal(key, (7, 2, 3), jnp.float64) for key in keys[:3])
        along = tuple(jax.random.normal(key, (7, 2, 3), jnp.float64) for key in keys[3:])

        @jax.jit
        def loss(*args):
            out, _ = implementation(*args, dropout_rate=0.5, dropout_key=jax.random.key(7))
            return jnp.sin(out).sum()

        gradient = jax.grad(loss, (0, 1, 2))(*args)
        slope = sum(float((x * y).sum()) for x, y in zip(gradient, along, strict=True))
        step = 1e-5

        def moved(n):
            return float(loss(*(x + n * step * y for x, y in zip(args, along, strict=True))))

        assert slope == pytest.approx((moved(1) - moved(-1)) / (2 * step), rel=1e-7)


def test_errors():
    q = jnp.ones((3, 1, 2))
    key = jax.random.key(0)
    for rate in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"dropout_rate={rate} must be"):
            attn.dot_product_attention(q, q, q, dropout_rate=rate, dropout_key=key)
    with pytest.raises(ValueError, match=r"dropout_rate=0.5 needs a dropout_key.*dropout_rate=0"):
        attn.dot_product_attention(q, q, q, dropout_rate=0.5)
