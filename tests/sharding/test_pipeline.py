"""Layers split over devices: the same loss and gradients, and activations that are handed on."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformer.attention import RelativeBias
from eqx_transformer.models import Llama
from eqx_transformer.nn import MLP
from eqx_transformer.sharding import batch_sharding, gathered, pipeline_parallel, shard
from eqx_transformer.stacks import BiasedStack, Stack, encoder_block

from .devices import (
    BATCH,
    CONFIG,
    CONFIGS,
    RULES,
    SEQ,
    batch,
    bytes_on,
    check_equal,
    cross_entropy,
    exchanged,
    mesh_of,
)

LAYERS, MICROBATCHES = 4, 8


def on_mesh(loss, model, mesh, *args):
    model = shard(model, mesh, RULES)
    tokens = jax.device_put(batch(), batch_sharding(mesh, RULES))
    step = eqx.filter_jit(eqx.filter_value_and_grad(loss)).lower(model, tokens, *args).compile()
    return step.compiled.as_text(), *step(model, tokens, *args), model


@pytest.mark.parametrize(
    "axes",
    [{"pipe": 4}, pytest.param({"pipe": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_loss_gradient_and_collectives(axes):
    mesh = mesh_of(**axes)
    model = Llama(CONFIG.replace(num_layers=LAYERS), key=jax.random.key(0))

    def loss(model, tokens):
        model = gathered(model, mesh, RULES)
        model = pipeline_parallel(model, mesh, RULES, num_microbatches=MICROBATCHES)
        return cross_entropy(model, tokens)

    expected = eqx.filter_jit(eqx.filter_value_and_grad(cross_entropy))(model, batch())
    text, value, gradient, placed = on_mesh(loss, model, mesh)
    check_equal(value, gradient, *expected, placed)
    found = exchanged(text)
    handed_on = BATCH // MICROBATCHES // axes.get("fsdp", 1), SEQ, CONFIG.d_model
    assert found["collective-permute"].count(handed_on) == 2  # forward and backward
    if set(axes) == {"pipe"}:
        # Besides, the examples of all devices come to the first stage, and return from the last.
        assert [math.prod(x) for x in found["all-gather"]] == 2 * [BATCH * SEQ * CONFIG.d_model]
        # No parameter of a layer travels, and no gradient of one is summed.
        assert not [x for kind in found for x in found[kind] if x[:1] == (1,) and len(x) == 3]
        layers = {bytes_on(d, placed.stack) for d in mesh.devices.flat}
        assert layers == {bytes_on(model.norm.weight.device, model.stack) // 4}


@pytest.mark.slow
def test_masks_keys_and_statistics_of_every_example():
    """What every example has of its own stays with it; dropout is that of the stack."""
    config = CONFIGS["experts"].replace(num_layers=LAYERS, dropout_rate=0.2, document_start_id=0)
    model, mesh = Llama(config, key=jax.random.key(0)), mesh_of(pipe=2, expert=2)
    keys = jax.random.split(jax.random.key(2), BATCH)

    def loss(model, tokens, mesh=None):
        if mesh is not None:
            model = pipeline_parallel(model, mesh, RULES, num_microbatches=4)
        logits, stats = jax.vmap(lambda x, key: model.apply_with_stats(x, key=key))(
            tokens[:, :-1], keys
        )
        weights = jnp.linspace(0, 1, BATCH * LAYERS).reshape(BATCH, LAYERS)
        return jnp.square(logits).mean() + (weights * stats.load_balance_loss).mean()

    expected = eqx.filter_jit(eqx.filter_value_and_grad(loss))(model, batch())
    _, *found, _ = on_mesh(loss, model, mesh, mesh)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6 * max(1, np.abs(y).max()), rtol=0)


def test_what_is_refused():
    model, mesh = Llama(CONFIG, key=jax.random.key(0)), mesh_of(pipe=4)
    assert pipeline_parallel(model, mesh_of(data=8), num_microbatches=3) is model
    with pytest.raises(
        ValueError, match=r"num_microbatches=6 is not a positive multiple of the 4 devices"
    ):
        pipeline_parallel(model, mesh, num_microbatches=6)
    with pytest.raises(ValueError, match=r"num_layers=2, which the 4 devices"):
        pipeline_parallel(model, mesh, num_microbatches=4)
    with pytest.raises(ValueError, match=r"there is no Stack"):
        pipeline_parallel(MLP(8, 8, key=jax.random.key(0)), mesh, num_microbatches=4)
    piped = pipeline_parallel(model, mesh_of(pipe=2), num_microbatches=4)
    with pytest.raises(ValueError, match=r"num_microbatches=4 does not divide the batch of 6"):
        jax.vmap(piped)(jnp.zeros((6, SEQ), jnp.int32))


@pytest.mark.slow
def test_what_all_examples_share():
    """Examples that begin alike, and layers with one bias, which get the sum of all gradients."""
    make = eqx.Partial(encoder_block, 8, 2, 8, dropout_rate=0.2)
    bias = RelativeBias(2, 4, 4, bidirectional=True, key=jax.random.key(1))
    stack = BiasedStack(Stack(make, 2, key=jax.random.key(0)), bias)
    x, mesh = jax.random.normal(jax.random.key(2), (5, 8)), mesh_of(pipe=2)
    keys = jax.random.split(jax.random.key(3), 4)

    def loss(inputs, mesh=None):
        stack, x = inputs
        if mesh is not None:
            stack = pipeline_parallel(stack, mesh, num_microbatches=2)
        return jnp.square(jax.vmap(lambda key: stack(x, key=key))(keys)).mean()

    value_and_grad = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    found, expected = value_and_grad((stack, x), mesh), value_and_grad((stack, x))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * max(1, np.abs(b).max()), rtol=0)
