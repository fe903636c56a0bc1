"""Experts split over devices: the same loss and gradients, and rows that travel to them."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformer.nn import GatedMLP, MixtureOfExperts
from eqx_transformer.sharding import batch_sharding, expert_parallel, gathered, shard

from .devices import (
    BATCH,
    CONFIG,
    RULES,
    SEQ,
    batch,
    check_equal,
    cross_entropy,
    exchanged,
    mesh_of,
    on_one_device,
)


@pytest.mark.parametrize("axes", [{"expert": 4}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=str)
@pytest.mark.slow
def test_loss_gradient_and_collectives(axes):
    mesh = mesh_of(**axes)

    def loss(model, tokens):
        model = expert_parallel(gathered(model, mesh, RULES), mesh, RULES)
        return cross_entropy(model, tokens)

    model, *expected = on_one_device("experts")
    model = shard(model, mesh, RULES)
    tokens = jax.device_put(batch(), batch_sharding(mesh, RULES))
    step = eqx.filter_jit(eqx.filter_value_and_grad(loss)).lower(model, tokens).compile()
    check_equal(*step(model, tokens), *expected, model)
    found = exchanged(step.compiled.as_text())
    rows = BATCH // math.prod(axes[x] for x in axes if x != "tensor") * SEQ * 2
    sent = math.ceil(1.25 * rows / axes["expert"]), CONFIG.d_model
    # Forward: rows and results. Backward: rows, cotangents, and cotangents of the rows. A part each
    # for every device.
    assert found["all-to-all"].count((1, *sent)) == (2 + 3) * axes["expert"]
    weights = found["all-gather"] + found["all-reduce"]
    assert not [x for x in weights if len(x) == 3 and x[0] == model.config.moe.num_experts]


def layer_and_rows():
    make = eqx.Partial(GatedMLP, 16, 24)
    layer = MixtureOfExperts(16, 8, make, top_k=2, key=jax.random.key(0))
    return layer, jax.random.normal(jax.random.key(1), (6, 5, 16))


@pytest.mark.parametrize("kind", ["crowded", pytest.param("padding", marks=pytest.mark.slow)])
def test_rounds(kind):
    """Every row has its result, however few devices they all go to, and however little is sent."""
    mesh, (layer, x) = mesh_of(expert=4), layer_and_rows()
    valid = jnp.ones(x.shape[:2], bool)
    if kind == "crowded":
        layer = eqx.tree_at(lambda x: x.router.weight, layer, replace_fn=lambda w: 0 * w)
    else:
        valid = valid.at[2:].set(False).at[0, 3:].set(False)

    def loss(layer, x, mesh=None):
        layer = layer if mesh is None else expert_parallel(layer, mesh, buffer_factor=0.3)
        y, stats = jax.vmap(lambda x, valid: layer.apply_with_stats(x, valid=valid))(x, valid)
        return jnp.square(y).sum() + stats.load_balance_loss.sum(), stats.dropped

    value_and_grad = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))
    (value, _), gradient = value_and_grad(layer, x)
    (found, dropped), found_gradient = value_and_grad(shard(layer, mesh), x, mesh)
    np.testing.assert_array_equal(dropped, 0)
    np.testing.assert_allclose(found, value, rtol=2e-6)
    for a, b in zip(jax.tree.leaves(found_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * max(1, np.abs(b).max()), rtol=0)


def test_what_is_refused():
    (layer, x), mesh = layer_and_rows(), mesh_of(expert=4)
    assert expert_parallel(layer, mesh_of(data=8)) is layer
    with pytest.raises(ValueError, match="buffer_factor=0 must be positive"):
        expert_parallel(layer, mesh, buffer_factor=0)
    with pytest.raises(ValueError, match="no MixtureOfExperts without a capacity_factor"):
        expert_parallel(GatedMLP(16, 24, key=jax.random.key(0)), mesh)
    with pytest.raises(ValueError, match=r"num_experts=8, which the 3 devices"):
        expert_parallel(layer, mesh_of(expert=3))

    def loss(layer, x):
        return jnp.sum(expert_parallel(layer, mesh)(x))

    with pytest.raises(ValueError, match="gradients of experts cannot be computed per example"):
        eqx.filter_vmap(eqx.filter_grad(loss), in_axes=(None, 0))(layer, x)
