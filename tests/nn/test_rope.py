import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.nn import RoPE, apply_rope


def _reference(x, positions, theta, rotary_dim):
    x = np.asarray(x, np.float64)
    half = rotary_dim // 2
    angle = np.asarray(positions, np.float64)[:, None] * theta ** (-np.arange(half) / half)
    turned = x[..., :half] + 1j * x[..., half:rotary_dim]
    turned = turned * np.exp(1j * angle)[:, None, :]
    return np.concatenate([turned.real, turned.imag, x[..., rotary_dim:]], axis=-1)


@pytest.mark.parametrize("rotary_dim", [None, 4])
@pytest.mark.parametrize("theta", [10_000.0, 10.0])
def test_equals_complex_rotation(getkey, rotary_dim, theta):
    x, positions = jr.normal(getkey(), (5, 2, 8)), jnp.array([0, 3, 100, 7, 1])
    out = apply_rope(x, positions, theta=theta, rotary_dim=rotary_dim)
    expected = _reference(x, positions, theta, rotary_dim or 8)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=2e-5)


def test_scores_depend_on_distance_only(getkey):
    q, k = jr.normal(getkey(), (2, 1, 1, 16))
    rope = RoPE()
    score = lambda i, j: jnp.vdot(rope(q, jnp.array([i])), rope(k, jnp.array([j])))  # noqa: E731
    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert abs(score(7, 3) - score(8, 3)) > 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_at_long_positions(getkey, dtype):
    x = jr.normal(getkey(), (1, 1, 64)).astype(dtype)
    positions = [1000, 1001, 30_000, 30_001]
    out = [apply_rope(x, jnp.array([p])) for p in positions]
    assert out[0].dtype == dtype
    for p, y in zip(positions, out, strict=True):
        expected = _reference(x.astype("f4"), [p], 10_000.0, 64)
        np.testing.assert_allclose(y.astype("f4"), expected, rtol=8e-3, atol=2e-2)
    assert (out[0] != out[1]).any() and (out[2] != out[3]).any()


def test_float64_stays_float64(getkey):
    with jax.enable_x64(True):
        x, positions = jr.normal(getkey(), (3, 1, 8), jnp.float64), jnp.array([1, 50_000, 9])
        out = apply_rope(x, positions)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, _reference(x, positions, 10_000.0, 8), atol=1e-9)


def test_nothing_to_train():
    assert jax.tree.leaves(eqx.filter(RoPE(), eqx.is_array)) == []
    assert RoPE(theta=5.0) == RoPE(theta=5.0) != RoPE(theta=6.0)


def test_errors():
    with pytest.raises(ValueError, match="theta=0"):
        RoPE(theta=0.0)
    with pytest.raises(ValueError, match="theta=inf must be positive and finite"):
        RoPE(theta=float("inf"))
    with pytest.raises(ValueError, match="rotary_dim=3"):
        RoPE(rotary_dim=3)
    for head_dim, rope in ((4, RoPE(rotary_dim=6)), (5, RoPE())):
        with pytest.raises(ValueError, match=f"head_dim={head_dim}"):
            rope(jnp.ones((2, 1, head_dim)), jnp.arange(2))
