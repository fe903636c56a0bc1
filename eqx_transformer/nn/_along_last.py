import jax.numpy as jnp
from jaxtyping import Array, Float


def along_last(
    owner: str, parameter: Float[Array, " size"], x: Float[Array, "*batch size"]
) -> Array:
    """`parameter` in the dtype and with as many axes as `x`, to add to it or multiply it with.

    The added axes have length one, not the lengths of `x`: then the gradient is one sum over
    positions and examples together. Otherwise, with examples on several devices, sums over examples
    come first, and devices exchange all positions instead of one vector.
    """
    if parameter.shape != x.shape[-1:]:
        if parameter.ndim > 1:
            raise ValueError(
                f"{owner}: a parameter has {parameter.ndim} axes {parameter.shape}, so this is a "
                "stack of layers; take one of them, e.g. stack[i], or call the stack."
            )
        raise ValueError(
            f"{owner}: x has shape {x.shape} but size={parameter.shape[0]}; its last axis must "
            "have that length."
        )
    return jnp.expand_dims(parameter.astype(x.dtype), range(x.ndim - 1))
