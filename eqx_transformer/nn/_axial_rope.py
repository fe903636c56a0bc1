"""Rotary position embedding for coordinates in space."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._precision import accumulation_dtype
from ._checks import check_positive
from ._coordinates import check_dims


class AxialRoPE(eqx.Module):
    """Rotary position embedding with several, real-valued coordinates.

    The `head_dim / 2` pairs of features are divided evenly among the coordinates. Pair `k` of the
    `n` that belong to a coordinate `c` is rotated by the angle

        scale * c * theta ** (-k / n)

    and left-over pairs are not rotated. Feature `i` is paired with feature `i + head_dim / 2`. A
    token at the origin is not rotated at all. With the defaults and coordinates from
    `grid_coordinates` this is what DINOv3 does. (Su et al., 2021; axial: Heo et al., Rotary
    Position Embedding for Vision Transformer, 2024, section 3.2.)

    It has no parameters. It is differentiable with respect to the coordinates.

    Arguments:

    - `num_dims`: how many coordinates a token has.
    - `theta`: the ratio of the longest wavelength to the shortest, nearly.
    - `scale`: the angle by which the fastest pair is rotated from coordinate 0 to 1. The shortest
        wavelength is `2 pi / scale`.

    Raises:

    - `ValueError` if a number is not positive and finite.
    """

    num_dims: int = eqx.field(static=True, default=2)
    theta: float = eqx.field(static=True, default=100.0)
    scale: float = eqx.field(static=True, default=2 * math.pi)

    def __check_init__(self) -> None:
        for name in ("num_dims", "theta", "scale"):
            check_positive("AxialRoPE", name, getattr(self, name))

    def __call__(
        self, x: Float[Array, "seq heads head_dim"], coordinates: Float[Array, "seq dims"]
    ) -> Float[Array, "seq heads head_dim"]:
        """Rotates `x[i]` to `coordinates[i]`, in float32 or wider.

        Raises:

        - `ValueError` if there are not `num_dims` coordinates, or too few features for them.
        """
        check_dims("AxialRoPE", self.num_dims, coordinates)
        half = x.shape[-1] // 2
        count = half // self.num_dims
        if count < 1 or x.shape[-1] % 2:
            raise ValueError(
                f"AxialRoPE: cannot rotate head_dim={x.shape[-1]} features by {self.num_dims} "
                f"coordinates; head_dim must be even and at least {2 * self.num_dims}."
            )
        dtype = accumulation_dtype(x.dtype)
        frequency = jnp.asarray(self.scale * self.theta ** (-np.arange(count) / count), dtype)
        angle = coordinates.astype(dtype)[:, :, None] * frequency[None, None, :]
        angle = angle.reshape(x.shape[0], self.num_dims * count)
        angle = jnp.pad(angle, ((0, 0), (0, half - angle.shape[1])))
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        # Full-width tables and one swap of halves: the rotation is then a single elementwise pass.
        cos = jnp.concatenate([cos, cos], axis=-1)[:, None, :]
        sin = jnp.concatenate([-sin, sin], axis=-1)[:, None, :]
        h = x.astype(dtype)
        swapped = jnp.concatenate([h[..., half:], h[..., :half]], axis=-1)
        return (h * cos + swapped * sin).astype(x.dtype)
