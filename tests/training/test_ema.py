"""The moving average, against its definition."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformer.nn import Linear
from eqx_transformer.training import EMA


@pytest.mark.parametrize("debias", [False, True])
def test_it_is_the_weighted_mean(getkey, x64, debias):
    models = [Linear(2, 3, dtype=jnp.float64, key=getkey()) for _ in range(4)]
    decays = [0.5, 0.9, 0.8]
    ema = EMA.init(models[0], debias=debias)
    update = eqx.filter_jit(EMA.update)
    for model, decay in zip(models[1:], decays, strict=True):
        ema = update(ema, model, jnp.asarray(decay))
    weights = np.asarray([0.5 * 0.9 * 0.8 * (not debias), 0.5 * 0.9 * 0.8, 0.1 * 0.8, 0.2])
    expected = np.average([np.asarray(m.weight) for m in models], axis=0, weights=weights)
    np.testing.assert_allclose(ema.average(models[0]).weight, expected, rtol=1e-12)


def test_one_update_without_bias_is_the_model(getkey):
    model = Linear(2, 3, use_bias=True, key=getkey())
    ema = EMA.init(model, debias=True).update(model, 0.999)
    assert eqx.tree_equal(ema.average(model), model, rtol=1e-6)
    assert jnp.isnan(EMA.init(model, debias=True).average(model).weight).all()


def test_narrow_parameters_are_averaged_in_float32(getkey):
    """In bfloat16 a thousandth of a step is lost."""
    start = Linear(2, 3, dtype=jnp.bfloat16, key=getkey())
    start = jax.tree.map(jnp.ones_like, start)
    end = jax.tree.map(lambda x: x + 1, start)
    ema = EMA.init(start)
    for _ in range(10):
        ema = ema.update(end, 0.999)
    np.testing.assert_allclose(ema.sums.weight, 2 - 0.999**10, rtol=1e-6)
    assert ema.average(start).weight.dtype == jnp.bfloat16


def test_what_is_no_parameter_is_that_of_the_model(getkey):
    model = (Linear(2, 3, key=getkey()), jnp.int32(1), jax.nn.relu)
    ema = EMA.init(model)
    _, count, activation = ema.average((model[0], jnp.int32(2), jax.nn.gelu))
    assert count == 2 and activation is jax.nn.gelu


def test_decays_that_are_none(getkey):
    model = Linear(2, 3, key=getkey())
    for decay in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"decay={decay} must be at least 0 and at most 1"):
            EMA.init(model).update(model, decay)


def test_the_model_can_be_donated(getkey):
    model = Linear(2, 3, key=getkey())
    ema = EMA.init(model)
    jax.jit(lambda m: jax.tree.map(jnp.sin, m), donate_argnums=0)(model)
    assert jnp.isfinite(ema.sums.weight).all()


def test_it_follows_a_schedule_in_a_scan(getkey):
    model = Linear(2, 3, key=getkey())

    def step(ema, decay):
        return ema.update(model, decay), None

    ema, _ = jax.lax.scan(step, EMA.init(model), jnp.linspace(0, 1, 5))
    np.testing.assert_allclose(ema.average(model).weight, model.weight, rtol=1e-6)
