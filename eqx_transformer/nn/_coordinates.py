"""Coordinates in space, and vectors that encode them."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from .._precision import accumulation_dtype
from ._checks import check_positive


def grid_coordinates(sizes: tuple[int, ...], dtype: DTypeLike | None = None) -> Float[Array, "..."]:
    """The centres of the cells of a grid that fills the cube from -1 to 1.

    Arguments:

    - `sizes`: how many cells there are along each axis.
    - `dtype`: of the result; the default floating dtype if not given.

    Returns:

    `[cells, len(sizes)]`, the last axis of the grid varying fastest. Along an axis of `n` cells,
    cell `i` is at `2 * (i + 0.5) / n - 1`.

    Raises:

    - `ValueError` if there is no axis, or an axis has no cells.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"grid_coordinates: sizes={sizes} must be one or more of at least 1.")
    axes = [2 * (np.arange(n) + 0.5) / n - 1 for n in sizes]
    cells = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(sizes))
    return jnp.asarray(cells, jnp.result_type(float) if dtype is None else dtype)


class SinusoidalCoordinates(eqx.Module):
    """Fixed sinusoidal vectors for coordinates in space.

    Each coordinate has an equal share of the features, sines and then cosines of

        coordinate / theta ** (i / n)       for i = 0..n-1, where n = d_model // (2 * num_dims)

    and left-over features are zero. With rows and columns counted 0, 1, 2, ... these are the
    position vectors of MAE and DiT. There are no parameters. (Vaswani et al., 2017, section 3.5,
    for each coordinate; He et al., 2022.)

    Arguments:

    - `num_dims`: how many coordinates a point has.
    - `d_model`: size of the vectors.
    - `theta`: base of the wavelengths.

    Raises:

    - `ValueError` if there is no feature for some coordinate, or `theta` is not positive and
        finite.
    """

    num_dims: int = eqx.field(static=True)
    d_model: int = eqx.field(static=True)
    theta: float = eqx.field(static=True, default=10_000.0)

    def __check_init__(self) -> None:
        if self.num_dims < 1:
            raise ValueError(f"SinusoidalCoordinates: num_dims={self.num_dims} must be at least 1.")
        if self.d_model < 2 * self.num_dims:
            raise ValueError(
                f"SinusoidalCoordinates: d_model={self.d_model} must be at least 2 * num_dims = "
                f"{2 * self.num_dims}: every coordinate has a sine and a cosine."
            )
        check_positive("SinusoidalCoordinates", "theta", self.theta)

    def __call__(
        self, coordinates: Float[Array, "seq dims"], dtype: DTypeLike | None = None
    ) -> Float[Array, "seq d_model"]:
        """The vectors of `coordinates`, computed in float32 or wider and returned in `dtype`."""
        check_dims("SinusoidalCoordinates", self.num_dims, coordinates)
        dtype = coordinates.dtype if dtype is None else jnp.dtype(dtype)
        wide = accumulation_dtype(coordinates.dtype)
        count = self.d_model // (2 * self.num_dims)
        frequency = np.exp(-math.log(self.theta) * np.arange(count) / count)
        angle = coordinates.astype(wide)[:, :, None] * jnp.asarray(frequency, wide)[None, None, :]
        vectors = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        vectors = vectors.reshape(coordinates.shape[0], 2 * self.num_dims * count)
        rest = self.d_model - vectors.shape[1]
        return jnp.pad(vectors, ((0, 0), (0, rest))).astype(dtype)


def check_dims(owner: str, num_dims: int, coordinates: Float[Array, "seq dims"]) -> None:
    """Checks how many coordinates there are for each position."""
    if coordinates.shape[1] != num_dims:
        raise ValueError(
            f"{owner}: coordinates have shape {coordinates.shape}, so {coordinates.shape[1]} for "
            f"each position, but num_dims={num_dims}."
        )
