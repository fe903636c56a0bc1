import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from .._precision import accumulation_dtype


class DropPath(eqx.Module):
    """Drops the whole residual branch of an example, with some probability.

    A branch that is kept is divided by the probability of keeping it. Under `jax.vmap` every
    example has its own key, so branches are dropped independently. (Huang et al., Deep Networks
    with Stochastic Depth, 2016.)

    The rate is stored as an integer, a fraction of `2 ** 32`: it may differ from layer to layer of
    a stack, like a parameter, but no optimiser trains an integer.
    """

    threshold: UInt32[Array, ""]
    inference: bool

    def __init__(self, rate: float | Float[Array, ""]):
        """Arguments:

        - `rate`: the probability with which the branch is dropped. An array where it depends on
            the layer.

        Raises:

        - `ValueError` if `rate` is a number outside `[0, 1)`.
        """
        if isinstance(rate, int | float) and not 0 <= rate < 1:
            raise ValueError(f"DropPath: rate={rate} must be at least 0 and below 1.")
        # Two halves, because float32 has 24 bits and a rate close to 1 must not become 2 ** 32.
        share = jnp.asarray(rate, jnp.float32) * 2**16
        high = jnp.floor(share)
        low = jnp.floor((share - high) * 2**16)
        self.threshold = (high.astype(jnp.uint32) << 16) + low.astype(jnp.uint32)
        self.inference = False

    @property
    def rate(self) -> Float[Array, "*stack"]:
        """The probability with which the branch is dropped."""
        return self.threshold.astype(jnp.float32) / 2.0**32

    def __call__(
        self, x: Float[Array, "*axes"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes"]:
        """All of `x`, divided by the probability of being kept, or zeros.

        Raises:

        - `RuntimeError` if there is no key and `inference` is not set.
        """
        if self.inference:
            return x
        if key is None:
            raise RuntimeError(
                "DropPath: a key is needed; pass key=, or switch it off with "
                "eqx.nn.inference_mode(model)."
            )
        kept = jax.random.bits(key, (), jnp.uint32) >= self.threshold
        factor = jnp.where(kept, 1 / (1 - self.rate), 0)
        return (x.astype(accumulation_dtype(x.dtype)) * factor).astype(x.dtype)
