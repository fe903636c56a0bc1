"""The moving average of a model over its training."""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._precision import accumulation_dtype

Model = TypeVar("Model")


class EMA(eqx.Module):
    """An exponential moving average of parameters.

        sums   = decay * sums   + (1 - decay) * parameters
        weight = decay * weight + (1 - decay)
        average = sums / weight

    It starts either from the initial parameters, which then remain in it for a while, or from zero;
    in the second case dividing by the weight corrects the bias towards zero. (Kingma and Ba, Adam,
    2015, section 3.) Like all state it is an immutable PyTree:

        ema = EMA.init(model)
        ema = ema.update(model, decay=0.999)      # after every step, inside jit
        evaluate(ema.average(model))
    """

    sums: PyTree
    """In float32 or wider; `None` for leaves that are not floating arrays."""
    weight: Float[Array, ""]

    @classmethod
    def init(cls, model: PyTree, *, debias: bool = False) -> "EMA":
        """The average before any update.

        Arguments:

        - `model`: the model, or its parameters.
        - `debias`: whether to start from zero: the average is then only that of the models given to
            `update`, and NaN before the first.
        """
        # A copy in either case, so that the model can be donated.
        sums = jax.tree.map(lambda x: jnp.where(debias, 0, x), _wide(model))
        return cls(sums, jnp.asarray(0.0 if debias else 1.0))

    def update(self, model: PyTree, decay: float | int | Float[Array, ""]) -> "EMA":
        """The average after one more model.

        Arguments:

        - `model`: of the same structure as the first.
        - `decay`: the share of the average that is kept, e.g. 0.999; an array if it changes.

        Raises:

        - `ValueError` if `decay` is a number outside of `[0, 1]`.
        """
        if isinstance(decay, int | float) and not 0 <= decay <= 1:
            raise ValueError(f"EMA: decay={decay} must be at least 0 and at most 1.")

        def mixed(old: Array, new: Array) -> Array:
            keep = jnp.asarray(decay, old.dtype)
            return keep * old + (1 - keep) * new

        one = jnp.ones_like(self.weight)
        return EMA(jax.tree.map(mixed, self.sums, _wide(model)), mixed(self.weight, one))

    def average(self, model: Model) -> Model:
        """The model with its parameters replaced by their averages, in their dtypes."""

        def mean(total: Array | None, x: Any) -> Any:
            return x if total is None else (total / self.weight.astype(total.dtype)).astype(x.dtype)

        return jax.tree.map(mean, self.sums, model, is_leaf=lambda x: x is None)


def _wide(model: PyTree) -> PyTree:
    params = eqx.filter(model, eqx.is_inexact_array)
    return jax.tree.map(lambda x: x.astype(accumulation_dtype(x.dtype)), params)
