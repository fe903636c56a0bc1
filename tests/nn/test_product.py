"""The product of rows and a weight: JAX's value and derivatives, and another program."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.nn import Linear
from eqx_transformer.nn._product import product

BATCHES = {
    "one": lambda f: f,
    "shared weight": lambda f: jax.vmap(f, (0, None)),
    "shared input": lambda f: jax.vmap(f, (None, 0)),
    "each its own": jax.vmap,
    "last axis of a batch": lambda f: jax.vmap(f, (2, None), 2),
    "two": lambda f: jax.vmap(jax.vmap(f, (0, None)), (0, 0)),
}
SHAPES = {
    "one": ((4, 3), (3, 5)),
    "shared weight": ((2, 4, 3), (3, 5)),
    "shared input": ((4, 3), (2, 3, 5)),
    "each its own": ((2, 4, 3), (2, 3, 5)),
    "last axis of a batch": ((4, 3, 2), (3, 5)),
    "two": ((2, 6, 4, 3), (2, 3, 5)),
}


def derivatives(multiply, batch, x, weight, key):
    """Everything that a solver may ask for, of a function that is not linear in the product."""

    def value(x, weight):
        out = jnp.tanh(BATCHES[batch](multiply)(x, weight))
        return jnp.sum(out * jr.normal(jr.key(7), out.shape))

    def directional(x, weight):
        return jax.jvp(value, (x, weight), (dx, dweight))[1]

    dx, dweight = jr.normal(key, x.shape), jr.normal(jr.key(8), weight.shape)
    return {
        "value": value(x, weight),
        "gradient": jax.grad(value, (0, 1))(x, weight),
        "in one argument": (jax.grad(value, 0)(x, weight), jax.grad(value, 1)(x, weight)),
        "jvp": directional(x, weight),
        "reverse of forward": jax.grad(directional, (0, 1))(x, weight),
        "forward of reverse": jax.jvp(jax.grad(value, (0, 1)), (x, weight), (dx, dweight)),
        "remat": jax.grad(jax.checkpoint(value), (0, 1))(x, weight),
    }


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("batch", BATCHES)
def test_derivatives_are_those_of_a_plain_product(batch, getkey):
    shape_x, shape_weight = SHAPES[batch]
    x, weight, key = jr.normal(getkey(), shape_x), jr.normal(getkey(), shape_weight), getkey()
    ours = jax.jit(lambda *args: derivatives(product, batch, *args))(x, weight, key)
    plain = jax.jit(lambda *args: derivatives(jnp.matmul, batch, *args))(x, weight, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), ours, plain)


def test_gradients_of_single_examples(getkey):
    layer, x = Linear(3, 5, use_bias=True, key=getkey()), jr.normal(getkey(), (2, 4, 3))

    def loss(layer, x):
        return jnp.sum(layer(x) ** 2)

    each = jax.vmap(eqx.filter_grad(loss), (None, 0))(layer, x)
    for i in range(2):
        alone = eqx.filter_grad(loss)(layer, x[i])
        np.testing.assert_allclose(each.weight[i], alone.weight, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(8, 24), (24, 8)])
def test_a_batch_is_summed_in_one_product_that_starts_with_what_is_narrower(sizes, getkey):
    # Of the two ways to write this, one takes several times as long on a CPU.
    layer, x = Linear(*sizes, key=getkey()), jr.normal(getkey(), (4, 16, sizes[0]))
    loss = eqx.filter_grad(lambda layer: jnp.sum(jnp.tanh(jax.vmap(layer)(x))))
    products = [
        line
        for line in eqx.filter_jit(loss).lower(layer).as_text().splitlines()
        if "stablehlo.dot_general" in line
    ]
    assert len(products) == 2
    assert "(tensor<4x16x8xf32>, tensor<4x16x24xf32>) -> tensor<8x24xf32>" in products[1]


def test_a_policy_recognises_the_product(getkey):
    layer, x = Linear(8, 8, key=getkey()), jr.normal(getkey(), (4, 16, 8))
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    @eqx.filter_grad
    def loss(layer):
        return jnp.sum(
            jnp.sin(eqx.filter_checkpoint(lambda x: jnp.tanh(jax.vmap(layer)(x)), policy=policy)(x))
        )

    text = eqx.filter_jit(loss).lower(layer).as_text()
    assert text.count("stablehlo.dot_general") == 2  # the product itself is not computed again
