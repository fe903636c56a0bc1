"""The dtypes of parameters, computations and outputs."""

from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

Tree = TypeVar("Tree")


class PrecisionPolicy(eqx.Module):
    """Three dtypes: of parameters, of computations with them, and of outputs.

        policy = PrecisionPolicy(jnp.float32, jnp.bfloat16, jnp.float32)

        def loss(model, batch):                    # the model has parameters in float32
            model = policy.to_compute(model)       # and so have the gradients, through the cast
            outputs = policy.to_output(jax.vmap(model)(policy.to_compute(batch.inputs)))

    Sums within layers, norms and softmaxes are in float32 or wider in any case. For models with
    `dtype` and `param_dtype` in their configuration, these do the same.
    """

    param_dtype: DTypeLike = eqx.field(static=True, converter=jnp.dtype)
    compute_dtype: DTypeLike = eqx.field(static=True, converter=jnp.dtype)
    output_dtype: DTypeLike = eqx.field(static=True, converter=jnp.dtype)

    def to_param(self, tree: Tree) -> Tree:
        """The PyTree with its floating arrays in the dtype of parameters."""
        return _cast(tree, self.param_dtype)

    def to_compute(self, tree: Tree) -> Tree:
        """The PyTree with its floating arrays in the dtype of computations."""
        return _cast(tree, self.compute_dtype)

    def to_output(self, tree: Tree) -> Tree:
        """The PyTree with its floating arrays in the dtype of outputs."""
        return _cast(tree, self.output_dtype)


def _cast(tree: Tree, dtype: DTypeLike) -> Tree:
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)
