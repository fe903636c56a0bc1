"""Absolute positions as vectors that are added to embeddings."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._precision import accumulation_dtype
from ._checks import check_positive
from ._embedding import Embedding


class SinusoidalPositions(eqx.Module):
    """The fixed position vectors of the original transformer.

        vector[2 i]     = sin(position / theta ** (2 i / d_model))
        vector[2 i + 1] = cos(position / theta ** (2 i / d_model))

    It has no parameters and no maximum length. (Vaswani et al., 2017, section 3.5.)

    Arguments:

    - `d_model`: size of the vectors, even.
    - `theta`: base of the wavelengths.
    - `halves`: whether all sines come before all cosines, as in Marian, instead of alternating.

    Raises:

    - `ValueError` if `d_model` is odd, or `theta` not positive and finite.
    """

    d_model: int = eqx.field(static=True)
    theta: float = eqx.field(static=True, default=10_000.0)
    halves: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        if self.d_model < 2 or self.d_model % 2:
            raise ValueError(
                f"SinusoidalPositions: d_model={self.d_model} must be even and at least 2: every "
                "wavelength has a sine and a cosine."
            )
        check_positive("SinusoidalPositions", "theta", self.theta)

    def __call__(
        self, positions: Int[Array, " seq"], dtype: DTypeLike | None = None
    ) -> Float[Array, "seq d_model"]:
        """The vectors of `positions`, computed in float32 or wider and returned in `dtype`."""
        dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
        wide = accumulation_dtype(dtype)
        half = self.d_model // 2
        frequency = np.exp(-math.log(self.theta) * np.arange(half) / half)
        angle = positions.astype(wide)[:, None] * jnp.asarray(frequency, wide)[None, :]
        axis = -2 if self.halves else -1
        pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=axis)
        return pairs.reshape(positions.shape[0], self.d_model).astype(dtype)


class LearnedPositions(eqx.Module):
    """A learned vector for every position below `max_len`.

    A position beyond them gives a row of NaN, as in `Embedding`; a negative one, which padding on
    the left may have, gives zeros. (Gehring et al., 2017.)
    """

    table: Embedding

    def __init__(
        self, max_len: int, d_model: int, *, dtype: DTypeLike | None = None, key: PRNGKeyArray
    ):
        """Arguments:

        - `max_len`: how many positions there are.
        - `d_model`: size of the vectors.
        - `dtype`: of the parameters; the default floating dtype if not given.
        - `key`: for the initial vectors, of standard deviation `1 / sqrt(d_model)`.
        """
        if max_len < 1:
            raise ValueError(f"LearnedPositions: max_len={max_len} must be at least 1.")
        self.table = Embedding(max_len, d_model, dtype=dtype, key=key)

    def __call__(
        self, positions: Int[Array, " seq"], dtype: DTypeLike | None = None
    ) -> Float[Array, "seq d_model"]:
        """The vectors of `positions`, in `dtype` or that of the table."""
        vectors = self.table(jnp.maximum(positions, 0))
        vectors = jnp.where(positions[:, None] >= 0, vectors, 0)
        return vectors if dtype is None else vectors.astype(dtype)
