"""A policy casts what is floating, and gradients come back in the dtype of the parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_transformer.nn import Linear
from eqx_transformer.training import PrecisionPolicy


def test_three_dtypes(getkey):
    policy = PrecisionPolicy(jnp.float32, jnp.bfloat16, jnp.float16)
    assert policy == PrecisionPolicy("float32", "bfloat16", "float16")
    tree = (jnp.ones(2), np.arange(2), jnp.arange(2), jax.nn.relu, None, "name")
    for cast, dtype in (
        (policy.to_param, jnp.float32),
        (policy.to_compute, jnp.bfloat16),
        (policy.to_output, jnp.float16),
    ):
        cast_tree = cast(tree)
        assert cast_tree[0].dtype == dtype
        assert cast_tree[1] is tree[1] and cast_tree[3:] == tree[3:]
        assert cast_tree[2].dtype == tree[2].dtype


def test_gradients_are_those_of_the_stored_parameters(getkey):
    policy = PrecisionPolicy(jnp.float32, jnp.bfloat16, jnp.float32)
    model = Linear(4, 8, key=getkey())
    seen = []

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(model, x):
        y = policy.to_compute(model)(policy.to_compute(x))
        seen.append(y.dtype)
        return policy.to_output(y).sum()

    value, gradient = loss(policy.to_param(model), jnp.ones((3, 4)))
    assert seen == [jnp.bfloat16] and value.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
