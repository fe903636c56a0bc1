from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, PRNGKeyArray

from .._precision import accumulation_dtype
from ._along_last import along_last
from ._linear import AbstractLinear, Linear, check_linear

Model = TypeVar("Model")

# Up to this many rows, reading the weights takes longer than multiplying by them.
_FEW_ROWS = 8


class Int8Linear(AbstractLinear):
    """A `Linear` whose weight is stored in eight bits: `y = (x @ values) * scale + bias`.

    It takes a quarter of the memory of float32, and a token reads a quarter of the bytes. Only the
    weight is rounded: the product is that of `x` with `weight`, up to the rounding of float32, and
    so are its derivatives with respect to `x`, `scale` and `bias`. The integers have none; an
    optimiser sees `scale` and `bias`.
    """

    values: Int8[Array, "*stack in_features out_features"]
    scale: Float[Array, "*stack out_features"]
    bias: Float[Array, "*stack out_features"] | None

    def __init__(self, values: Array, scale: Array, bias: Array | None = None):
        """Arguments:

        - `values`: the integers, `[in_features, out_features]`.
        - `scale`: the size of a step of 1, for every column.
        - `bias`: added to the product, if given.

        Raises:

        - `ValueError` if there is not one entry of `scale` for each column.
        """
        if scale.shape != (*values.shape[:-2], values.shape[-1]):
            raise ValueError(
                f"Int8Linear: scale has shape {scale.shape} but values {values.shape}; give one "
                "number for each column."
            )
        self.values = values
        self.scale = scale
        self.bias = bias

    @classmethod
    def from_linear(cls, linear: AbstractLinear) -> "Int8Linear":
        """Rounds a weight, each column in steps of 1/127 of its largest entry.

        An entry changes by at most half a step. Leading axes, those of a stack of layers, are kept.
        """
        weight = linear.weight
        wide = weight.astype(accumulation_dtype(weight.dtype))
        largest = jnp.max(jnp.abs(wide), axis=-2)
        # Rounded to its dtype first, so that the integers make up for that.
        scale = jnp.where(largest > 0, largest / 127, 1).astype(weight.dtype)
        steps = jnp.round(wide / jnp.expand_dims(scale.astype(wide.dtype), -2))
        return cls(jnp.clip(steps, -127, 127).astype(jnp.int8), scale, linear.bias)

    @property
    def weight(self) -> Float[Array, "*stack in_features out_features"]:
        """The weight that this represents, in the dtype of `scale`; computed on demand."""
        return self.values.astype(self.scale.dtype) * jnp.expand_dims(self.scale, -2)

    def __call__(
        self, x: Float[Array, "*batch in_features"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out_features"]:
        """Maps the last axis of `x`. `key` is ignored, as in Equinox.

        Raises:

        - `ValueError` if the last axis of `x` is not `in_features` long.
        """
        check_linear("Int8Linear", "values", self.values, x)
        y = _product(x, self.values)
        y = y * along_last("Int8Linear", self.scale, y)
        if self.bias is not None:
            y = y + along_last("Int8Linear", self.bias, y)
        return y.astype(x.dtype)


def quantized(model: Model, *, keep: Callable[[Model], Any] | None = None) -> Model:
    """The model with an `Int8Linear` for every `Linear`.

    Embedding tables, norms and biases stay as they are. It is meant for generating text one token
    at a time, where the time goes into reading weights. Apply it before `unstacked` or after.

    Arguments:

    - `model`: any PyTree.
    - `keep`: the layers, or parts of the model, to leave as they are, e.g.
        `lambda model: model.head`.

    Raises:

    - `ValueError` if there is no `Linear` to replace.
    """

    def is_linear(x: Any) -> bool:
        return isinstance(x, Linear)

    kept = [] if keep is None else jax.tree.leaves(keep(model), is_leaf=is_linear)
    kept_ids = {id(x) for x in kept if is_linear(x)}
    count = 0

    def replaced(x: Any) -> Any:
        nonlocal count
        if not is_linear(x) or id(x) in kept_ids:
            return x
        count += 1
        return Int8Linear.from_linear(x)

    result = jax.tree.map(replaced, model, is_leaf=is_linear)
    if not count:
        raise ValueError(
            f"quantized: there is no Linear to replace in this {type(model).__name__}; give a "
            "model whose projections are Linear, and keep fewer of them."
        )
    return result


@jax.custom_jvp
def _product(x: Array, values: Array) -> Array:
    """`x @ values`, accumulated and returned in float32 or wider."""
    if x.size // x.shape[-1] > _FEW_ROWS or jnp.finfo(x.dtype).bits > 32:
        return _converted(x, values)
    return jax.lax.platform_dependent(x, values, cpu=_by_digits, default=_converted)


@_product.defjvp
def _product_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    x, values = primals
    # Digits are a way to compute the product; its derivative does not depend on them.
    return _product(x, values), _converted(tangents[0], values)


def _converted(x: Array, values: Array) -> Array:
    dtype = accumulation_dtype(x.dtype)
    return jnp.matmul(x, values.astype(x.dtype), preferred_element_type=dtype)


def _by_digits(x: Array, values: Array) -> Array:
    """The product in integers only.

    XLA on CPU does not convert inside a product: for one row it would first write the weights out
    in float32, or keep them so throughout a loop. So each row is written in three digits of base
    254, as exact as float32 relative to the largest entry of the row. Three rows take as long as
    one: the time goes into reading `values`.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    unit = jnp.where(largest == 0, 1, largest / 127)  # NaN stays NaN
    rest = x / unit
    digits = []
    for _ in range(3):
        digit = jnp.round(rest)
        digits.append(digit.astype(jnp.int8))
        rest = (rest - digit) * 254
    sums = jnp.matmul(jnp.stack(digits), values, preferred_element_type=jnp.int32)
    first, second, third = sums.astype(jnp.float32)
    return (first + (second + third / 254) / 254) * unit
