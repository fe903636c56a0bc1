"""Conditioning by a vector: scales and shifts that depend on it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._precision import accumulation_dtype
from ._checks import check_positive
from ._linear import AbstractLinear, Linear


class Modulation(eqx.Module):
    """Vectors by which layers are modulated, from a condition: `proj(silu(condition))`.

    They are initially zero. So a residual branch with one of them as a gate begins as zero, and a
    block as the identity. (Peebles and Xie, Scalable Diffusion Models with Transformers, 2023,
    section 3.2: adaLN-Zero.)
    """

    proj: AbstractLinear
    num_vectors: int = eqx.field(static=True)

    def __init__(
        self,
        d_condition: int,
        d_model: int,
        num_vectors: int,
        *,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `d_condition`: size of the condition.
        - `d_model`: size of the vectors.
        - `num_vectors`: how many of them.
        - `dtype`: of the parameters; the default floating dtype if not given.
        - `key`: not used, since they are zero.
        """
        self.proj = Linear(
            d_condition,
            num_vectors * d_model,
            use_bias=True,
            init=jax.nn.initializers.zeros,
            dtype=dtype,
            key=key,
        )
        self.num_vectors = num_vectors

    def __call__(
        self, condition: Float[Array, " d_condition"]
    ) -> Float[Array, "num_vectors d_model"]:
        """The vectors for a condition."""
        return self.proj(jax.nn.silu(condition)).reshape(self.num_vectors, -1)


def modulate(
    x: Float[Array, "seq d_model"],
    shift: Float[Array, " d_model"],
    scale: Float[Array, " d_model"],
) -> Float[Array, "seq d_model"]:
    """`x * (1 + scale) + shift` at every position."""
    scale, shift = scale.astype(x.dtype), shift.astype(x.dtype)
    return x * (1 + scale)[None, :] + shift[None, :]


class TimestepEmbedding(eqx.Module):
    """A vector for a time: sinusoids of it, through a small MLP.

        down(silu(up([cos(time * f), sin(time * f)])))      f[i] = max_period ** (-i / half)

    (Peebles and Xie, 2023; the sinusoids are those of Ho et al., 2020.)
    """

    up_proj: AbstractLinear
    down_proj: AbstractLinear
    max_period: float = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        *,
        num_features: int = 256,
        max_period: float = 10_000.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `d_model`: size of the vector.
        - `num_features`: how many sinusoids, an even number.
        - `max_period`: the longest period is nearly `2 pi` times that, the shortest `2 pi`.
        - `dtype`: of the parameters; the default floating dtype if not given.
        - `key`: for the initial weights.

        Raises:

        - `ValueError` if `num_features` is odd, or `max_period` not positive and finite.
        """
        check_positive("TimestepEmbedding", "max_period", max_period)
        if num_features < 2 or num_features % 2:
            raise ValueError(
                f"TimestepEmbedding: num_features={num_features} must be even and at least 2: "
                "every period has a sine and a cosine."
            )
        up_key, down_key = jax.random.split(key)
        self.up_proj = Linear(num_features, d_model, use_bias=True, dtype=dtype, key=up_key)
        self.down_proj = Linear(d_model, d_model, use_bias=True, dtype=dtype, key=down_key)
        self.max_period = max_period

    def __call__(self, time: Float[Array, ""]) -> Float[Array, " d_model"]:
        """The vector of a time, in its dtype or that of the weights, whichever is wider."""
        half = self.up_proj.weight.shape[0] // 2
        dtype = jnp.promote_types(time.dtype, self.up_proj.weight.dtype)
        wide = accumulation_dtype(dtype)
        frequency = jnp.asarray(self.max_period ** (-np.arange(half) / half), wide)
        angle = time.astype(wide) * frequency
        features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)]).astype(dtype)
        return self.down_proj(jax.nn.silu(self.up_proj(features)))
