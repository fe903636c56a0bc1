"""Scalings of RoPE against numbers from Hugging Face's transformers 5.23."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.nn import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    RoPE,
    YaRNScaling,
    apply_rope,
)

HEAD_DIM, THETA = 12, 1000.0
YARN = {"factor": 8.0, "original_max_len": 64, "beta_fast": 4.0}
LONG = LongRoPEScaling(
    short_factors=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5),
    long_factors=(2.0, 3.0, 4.0, 5.0, 6.0, 7.0),
    factor=8.0,
    original_max_len=64,
)
# A scaling and a length; the frequency of every pair, and the factor on queries and keys.
PUBLISHED = {
    "linear": (
        (LinearScaling(factor=4.0), 9),
        [0.25, 0.079056941, 0.025, 0.0079056947, 0.0025, 0.00079056952],
        1.0,
    ),
    "dynamic": (
        (DynamicScaling(factor=4.0, original_max_len=64), 200),
        [1.0, 0.20158362, 0.040635958, 0.0081915455, 0.0016512811, 0.00033287142],
        1.0,
    ),
    "dynamic short": (
        (DynamicScaling(factor=4.0, original_max_len=64), 50),
        [1.0, 0.31622776, 0.1, 0.031622779, 0.01, 0.0031622781],
        1.0,
    ),
    "llama3": (
        (Llama3Scaling(factor=8.0, original_max_len=64), 9),
        [1.0, 0.24438459, 0.013042253, 0.0039528473, 0.00125, 0.00039528476],
        1.0,
    ),
    "yarn": (
        (YaRNScaling(**YARN), 9),
        [1.0, 0.22399466, 0.04166666, 0.0039528473, 0.00125, 0.00039528476],
        1.2079441541679836,
    ),
    "yarn not truncated": (
        (YaRNScaling(**YARN, truncate=False), 9),
        [1.0, 0.27299902, 0.013662696, 0.0039528473, 0.00125, 0.00039528476],
        1.2079441541679836,
    ),
    "yarn mscale": (
        (YaRNScaling(**YARN, mscale=1.5, mscale_all_dim=0.5), 9),
        [1.0, 0.22399466, 0.04166666, 0.0039528473, 0.00125, 0.00039528476],
        1.188359976202698,
    ),
    "yarn factor": (
        (YaRNScaling(**YARN, attention_factor=1.25), 9),
        [1.0, 0.22399466, 0.04166666, 0.0039528473, 0.00125, 0.00039528476],
        1.25,
    ),
    "longrope short": (
        (LONG, 64),
        [1.0, 0.28747976, 0.083333321, 0.024325214, 0.0071428563, 0.0021081853],
        1.224744871391589,
    ),
    "longrope": (
        (LONG, 65),
        [0.5, 0.10540925, 0.025, 0.0063245557, 0.0016666664, 0.00045175402],
        1.224744871391589,
    ),
}


def _expected(x, positions, frequency, factor, interleaved):
    """The rotation as multiplication by complex numbers."""
    x = np.asarray(x, np.float64)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else np.split(x, 2, axis=-1)
    turn = factor * np.exp(1j * np.asarray(positions)[:, None] * np.asarray(frequency))
    z = (first + 1j * second) * turn[:, None, :]
    if interleaved:
        return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_frequencies(getkey, x64, name, interleaved):
    (scaling, length), frequency, factor = PUBLISHED[name]
    rope = RoPE(theta=THETA, interleaved=interleaved, scaling=scaling)
    x, positions = jr.normal(getkey(), (4, 2, HEAD_DIM)), jnp.array([0, 7, 3, 11])
    expected = _expected(x, positions, frequency, factor, interleaved)
    # Their inverse frequencies are in float32.
    np.testing.assert_allclose(rope(x, positions, length=length), expected, atol=2e-6)
    # A length known while tracing and one known at run time are the same.
    traced = jax.jit(lambda n: rope(x, positions, length=n))(length)
    np.testing.assert_allclose(traced, rope(x, positions, length=length), atol=1e-12)
    assert rope.needs_length == (scaling.__class__ in (DynamicScaling, LongRoPEScaling))


def test_length_is_that_of_the_positions(getkey):
    x = jr.normal(getkey(), (2, 1, HEAD_DIM))
    for last in (63, 64):
        positions = jnp.array([last, 5])
        got = apply_rope(x, positions, theta=THETA, scaling=LONG)
        expected = RoPE(theta=THETA, scaling=LONG)(x, positions, length=last + 1)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert apply_rope(x[:0], jnp.arange(0), scaling=LONG).shape == (0, 1, HEAD_DIM)


def test_derivatives(getkey, x64):
    """A rotation is linear, and its transpose turns back: `R R^T` is the factor, squared."""
    x, t, ct = jr.normal(getkey(), (3, 5, 2, HEAD_DIM))
    rope = RoPE(theta=THETA, interleaved=True, scaling=PUBLISHED["yarn factor"][0][0])
    f = lambda x: rope(x, jnp.arange(5))  # noqa: E731
    _, tangent = jax.jvp(f, (x,), (t,))
    np.testing.assert_allclose(tangent, f(t), atol=1e-12)
    (grad,) = jax.vjp(f, x)[1](ct)
    np.testing.assert_allclose(jnp.vdot(grad, t), jnp.vdot(ct, tangent), rtol=1e-12)
    np.testing.assert_allclose(f(grad) / 1.25**2, ct, atol=1e-12)


def test_values():
    scaling = YaRNScaling(**YARN, mscale_all_dim=0.5)
    assert scaling == dataclasses.replace(scaling) and hash(scaling) == hash(scaling)
    assert scaling.score_factor == (0.05 * math.log(8) + 1) ** 2
    assert YaRNScaling(**YARN).score_factor == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling(factor=0.5), "LinearScaling: factor=0.5 must be at least 1"),
        (lambda: DynamicScaling(factor=2.0, original_max_len=0), "original_max_len=0"),
        (lambda: Llama3Scaling(factor=2.0, high_freq_factor=0.5), "low_freq_factor=1.0"),
        (lambda: YaRNScaling(**YARN, beta_slow=9.0), "beta_slow=9.0 must be positive and less"),
        (lambda: YaRNScaling(**YARN, attention_factor=0.0), "attention_factor=0.0"),
        (lambda: YaRNScaling(**YARN, mscale=-1.0), r"mscale=-1\.0 must be positive"),
        (lambda: dataclasses.replace(LONG, long_factors=(1.0, -1.0)), "one of long_factors=-1.0"),
        (
            lambda: apply_rope(jnp.ones((1, 1, 8)), jnp.arange(1), scaling=LONG),
            "there are 6 short_factors but 4 rotated pairs",
        ),
        (
            lambda: apply_rope(
                jnp.ones((1, 1, 2)),
                jnp.arange(1),
                scaling=DynamicScaling(factor=2.0, original_max_len=4),
            ),
            "at least 4 rotated features",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
