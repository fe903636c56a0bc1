"""Weights of a module, drawn anew."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from eqx_transformer.nn import Attention, LayerNorm, Linear, Modulation, reinitialized

INITS = jax.nn.initializers


@pytest.mark.parametrize(
    ("init", "std"),
    [
        # The names of noether and xlstm_jax, and the standard deviation for 128 features to 64.
        (INITS.truncated_normal(0.02, lower=-100, upper=100), 0.02),  # truncnormal002
        (INITS.variance_scaling(1 / 3, "fan_in", "uniform"), (1 / (3 * 128)) ** 0.5),  # torch
        (INITS.glorot_uniform(), (2 / (128 + 64)) ** 0.5),  # xavier
        (INITS.normal((2 / (5 * 128)) ** 0.5), (2 / (5 * 128)) ** 0.5),  # small
        (INITS.normal(2 / (12 * 128**0.5)), 2 / (12 * 128**0.5)),  # wang, 12 layers
        (INITS.zeros, 0.0),
    ],
)
def test_initialisers(init, std, getkey):
    layer = reinitialized(Linear(128, 64, use_bias=True, key=getkey()), init, key=getkey())
    assert jnp.std(layer.weight) == pytest.approx(std, rel=0.03)
    same = Linear(128, 64, init=init, key=jr.key(0)).weight
    assert jnp.std(same) == pytest.approx(std, rel=0.03)


def test_where_and_stacks(getkey):
    layers = eqx.filter_vmap(lambda key: Attention(16, 2, use_bias=True, key=key))(
        jr.split(getkey(), 3)
    )
    layers = eqx.tree_at(lambda m: m.o_proj.bias, layers, jnp.ones((3, 16)))
    new = reinitialized(layers, INITS.normal(1.0), where=lambda m: m.o_proj, key=getkey())
    assert eqx.tree_equal(new.q_proj, layers.q_proj)
    assert new.o_proj.weight.shape == (3, 16, 16) and not new.o_proj.bias.any()
    # Every layer has its own weights, of the fan-in of a layer.
    assert not jnp.allclose(new.o_proj.weight[0], new.o_proj.weight[1])
    all_new = reinitialized(layers, INITS.lecun_normal(), key=getkey())
    assert jnp.std(all_new.q_proj.weight) == pytest.approx(0.25, rel=0.1)


def test_modulations_stay_zero(getkey):
    module = (Modulation(4, 4, 2, key=getkey()), Linear(4, 4, key=getkey()))
    new = reinitialized(module, INITS.ones, key=getkey())
    assert not new[0].proj.weight.any() and (new[1].weight == 1).all()
    with pytest.raises(ValueError, match="no Linear layer"):
        reinitialized(LayerNorm(4), INITS.ones, key=getkey())
