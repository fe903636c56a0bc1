import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ._along_last import along_last


class LayerScale(eqx.Module):
    """A learned factor for every feature of a residual branch: `weight * x`.

    Initially small, so that a deep network begins near the identity. (Touvron et al., CaiT, 2021,
    section 2.)
    """

    weight: Float[Array, " size"]

    def __init__(self, size: int, *, init: float = 1e-4, dtype: DTypeLike | None = None):
        """Arguments:

        - `size`: length of the last axis.
        - `init`: the initial factor.
        - `dtype`: of the parameters; the default floating dtype if not given.
        """
        if size < 1:
            raise ValueError(f"LayerScale: size={size} must be at least 1.")
        self.weight = jnp.full((size,), init, dtype)

    def __call__(
        self, x: Float[Array, "*batch size"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch size"]:
        """Scales the last axis of `x`. `key` is ignored, as in Equinox."""
        return x * along_last("LayerScale", self.weight, x)
