import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer._scan import filter_scan


class _Layer(eqx.Module):
    weight: jax.Array
    activation: object
    name: str = eqx.field(static=True)

    def __call__(self, x):
        return self.activation(x @ self.weight)


def _layers(key, depth=4):
    make = eqx.filter_vmap(lambda key: _Layer(jr.normal(key, (3, 3)) / 2, jnp.tanh, "name"))
    return make(jr.split(key, depth))


def _loop(layers, x):
    for i in range(layers.weight.shape[0]):
        x = jnp.tanh(x @ layers.weight[i])
    return x


_dots = jax.checkpoint_policies.dots_saveable


@pytest.mark.parametrize("remat", [None, True, _dots])
@pytest.mark.parametrize("unroll", [1, 3, 4])
def test_equals_loop(getkey, remat, unroll):
    layers, x, ct = _layers(getkey()), jr.normal(getkey(), (2, 3)), jr.normal(getkey(), (2, 3))

    def run(layers, x):
        step = lambda x, layer: (layer(x), None)  # noqa: E731
        return filter_scan(step, x, layers, remat=remat, unroll=unroll)[0]

    def vjp(f):
        return eqx.filter_jit(eqx.filter_value_and_grad(lambda p: jnp.vdot(f(*p), ct)))((layers, x))

    for a, b in zip(jax.tree.leaves(vjp(run)), jax.tree.leaves(vjp(_loop)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_remat_saves_less(getkey):
    layers, x = _layers(getkey(), 6), jr.normal(getkey(), (2, 3))

    def residuals(remat):
        step = lambda x, layer: (layer(layer(x)), None)  # noqa: E731
        f = lambda x: filter_scan(step, x, layers, remat=remat)[0]  # noqa: E731
        _, vjp = jax.vjp(f, x)
        return sum(leaf.size for leaf in jax.tree.leaves(vjp))

    assert residuals(True) < residuals(None)


def test_outputs_and_reverse():
    def step(carry, x):
        return carry + x, {"sum": carry, "name": "static", "function": jnp.tanh}

    carry, ys = filter_scan(step, jnp.zeros(()), jnp.arange(3.0), reverse=True)
    assert carry == 3
    assert ys["name"] == "static" and ys["function"] is jnp.tanh
    np.testing.assert_array_equal(ys["sum"], [3, 2, 0])


def test_numpy_is_scanned():
    carry, ys = filter_scan(lambda c, x: (c + x, x * x), np.float32(0), np.arange(3, dtype="f4"))
    assert carry == 3
    np.testing.assert_array_equal(ys, [0, 1, 4])


def test_length_only():
    carry, ys = filter_scan(lambda c, x: (c + 1, x), jnp.zeros((), int), None, 5)
    assert carry == 5 and ys is None


def test_static_carry_is_kept():
    (total, function), _ = filter_scan(
        lambda c, x: ((c[1](c[0] + x), c[1]), None), (jnp.zeros(()), jnp.sin), jnp.ones(2)
    )
    np.testing.assert_allclose(total, np.sin(1 + np.sin(1)), rtol=1e-6)
    assert function is jnp.sin


def test_changed_static_carry():
    with pytest.raises(ValueError, match=r"carry\['n'\].*from 0 to 1"):
        filter_scan(lambda c, x: ({"n": c["n"] + 1}, None), {"n": 0}, jnp.ones(2))
    with pytest.raises(ValueError, match=r"carry\['n'\].*pass it as an array"):
        filter_scan(lambda c, x: ({"n": c["n"] + x}, None), {"n": 0.0}, jnp.ones(2))
    with pytest.raises(ValueError, match="structure of the carry"):
        filter_scan(lambda c, x: ((c,), None), jnp.zeros(()), jnp.ones(2))


def test_vmap_and_jvp(getkey):
    layers, x, t = _layers(getkey()), jr.normal(getkey(), (5, 2, 3)), jr.normal(getkey(), (5, 2, 3))
    step = lambda x, layer: (layer(x), None)  # noqa: E731
    run = jax.vmap(lambda x: filter_scan(step, x, layers, remat=True)[0])
    expected = jax.jvp(jax.vmap(lambda x: _loop(layers, x)), (x,), (t,))
    for a, b in zip(jax.jvp(run, (x,), (t,)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
