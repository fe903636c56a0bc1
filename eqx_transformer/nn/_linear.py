import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ._along_last import along_last
from ._product import product


class AbstractLinear(eqx.Module):
    """What layers accept as a projection: an affine map of the last axis.

    The layers of this library are built with `Linear`. Anything else that has these two attributes
    and is called in the same way can replace it, by `equinox.tree_at`: a quantised weight, an
    adapter. `weight` may be a property, computed on demand.
    """

    weight: eqx.AbstractVar[Float[Array, "in_features out_features"]]
    bias: eqx.AbstractVar[Float[Array, " out_features"] | None]

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, "*batch in_features"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out_features"]:
        """Maps the last axis of `x`."""


class Linear(AbstractLinear):
    """An affine map of the last axis: `y = x @ weight + bias`.

    The weight is `[in_features, out_features]` and all leading axes, those of an enclosing
    `jax.vmap` included, are rows of one matrix product. The product is computed in the dtype of
    `x`, which the parameters are cast to.
    """

    weight: Float[Array, "in_features out_features"]
    bias: Float[Array, " out_features"] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        init: jax.nn.initializers.Initializer | None = None,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `in_features`, `out_features`: sizes of the last axis before and after.
        - `use_bias`: whether to add a bias, initially zero.
        - `init`: the initialiser `(key, shape, dtype) -> weight`; if not given, a truncated normal
            distribution of standard deviation `1 / sqrt(in_features)`.
        - `dtype`: of the parameters; the default floating dtype if not given.
        - `key`: for the initial weight.
        """
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"Linear: {name}={size} must be at least 1.")
        init = jax.nn.initializers.lecun_normal() if init is None else init
        dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
        self.weight = init(key, (in_features, out_features), dtype)
        self.bias = jnp.zeros((out_features,), dtype) if use_bias else None

    def __call__(
        self, x: Float[Array, "*batch in_features"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out_features"]:
        """Maps the last axis of `x`. `key` is ignored, as in Equinox.

        Raises:

        - `ValueError` if the last axis of `x` is not `in_features` long.
        """
        check_linear("Linear", "weight", self.weight, x)
        y = product(x, self.weight.astype(x.dtype))
        if self.bias is not None:
            y = y + along_last("Linear", self.bias, y)
        return y


def check_linear(owner: str, name: str, weight: Array, x: Array) -> None:
    """Checks that the weight, in whatever form, is that of one layer, and fits `x`."""
    if weight.ndim != 2:
        raise ValueError(
            f"{owner}: {name} has {weight.ndim} axes {weight.shape}, so this is a stack of layers; "
            "take one of them, e.g. stack[i], or call the stack."
        )
    if x.shape[-1:] != weight.shape[:1]:
        raise ValueError(
            f"{owner}: x has shape {x.shape} but in_features={weight.shape[0]}; its last axis must "
            "have that length."
        )
