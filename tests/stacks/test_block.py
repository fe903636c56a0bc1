"""Every derivative of a single block, against the dense reference in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Causal, dot_product_attention
from eqx_transformer.nn import Attention, GatedMLP, RMSNorm, RoPE
from eqx_transformer.stacks import Residual, TransformerBlock

SEQ, D_MODEL = 11, 8


def make(attention_fn, key):
    attention_key, mlp_key = jr.split(key)
    attention = Attention(
        D_MODEL,
        4,
        num_kv_heads=2,
        rope=RoPE(),
        mask=Causal(),
        attention_fn=attention_fn,
        key=attention_key,
    )
    mlp = GatedMLP(D_MODEL, 16, key=mlp_key)
    residuals = (Residual(RMSNorm(D_MODEL)) for _ in range(2))
    return TransformerBlock(attention, mlp, *residuals)


def derivatives(block, x, dx, weight):
    """Value, jvp, gradients, Hessian-vector product, and all of it for a batch."""
    arrays, static = eqx.partition(block, eqx.is_inexact_array)

    def loss(arrays, x):
        return (eqx.combine(arrays, static)(x) * weight).sum()

    def everything(x, dx):
        primals, tangents = (arrays, x), (jax.tree.map(jnp.cos, arrays), dx)
        gradient = jax.grad(loss, argnums=(0, 1))
        return jax.jvp(loss, primals, tangents), jax.jvp(gradient, primals, tangents)

    batch = jnp.stack([x, 2 * x]), jnp.stack([dx, -dx])
    return jax.jit(lambda: (everything(x, dx), jax.vmap(everything)(*batch)))()


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_derivatives(getkey, implementation):
    key, arrays = getkey(), [jr.normal(getkey(), (SEQ, D_MODEL)) for _ in range(3)]
    block = make(eqx.Partial(dot_product_attention, implementation=implementation), key)
    reference = make(eqx.Partial(dot_product_attention, implementation="reference"), key)
    got = derivatives(block, *arrays)
    with jax.enable_x64(True):

        def wide(tree):
            return jax.tree.map(
                lambda x: jnp.asarray(np.asarray(x), jnp.float64) if eqx.is_array(x) else x, tree
            )

        expected = derivatives(wide(reference), *wide(arrays))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == jnp.float32 and y.dtype == jnp.float64
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5 * float(np.abs(y).max()))
