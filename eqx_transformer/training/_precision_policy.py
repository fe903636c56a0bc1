"""What parameters are stored in, computed in, and returned in."""

from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

Tree = TypeVar("Tree")


class PrecisionPolicy(eqx.Module):
    """Three dtypes: of parameters, of what is computed with them, and of what comes out.

        policy = PrecisionPolicy(jnp.float32, jnp.bfloat16, jnp.float32)

        def loss(model, batch):                    # the model has parameters in float32
            model = policy.to_compute(model)       # and so have the gradients, through the cast
            outputs = policy.to_output(jax.vmap(model)(policy.to_compute(batch.inputs)))

    Sums within layers, norms and softmaxes are in float32 or wider in any case. Models with `dtype`
    and `param_dtype` in their configuration can have the same done there.
    """

    param_dtype: DTypeLike = eqx.field(static=True, converter=jnp.dtype)
    compute_dtype: DTypeLike = eqx.field(static=True, converter=jnp.dtype)
    output_dtype: DTypeLike = eqx.field(static=True, converter=jnp.dtype)

    def to_param(self, tree: Tree) -> Tree:
        """The PyTree with its floating arrays as parameters are stored."""
        return _cast(tree, self.param_dtype)

    def to_compute(self, tree: Tree) -> Tree:
        """The PyTree with its floating arrays as they are computed with."""
        return _cast(tree, self.compute_dtype)

    def to_output(self, tree: Tree) -> Tree:
        """The PyTree with its floating arrays as they come out."""
        return _cast(tree, self.output_dtype)


def _cast(tree: Tree, dtype: DTypeLike) -> Tree:
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)
