"""Learned positions on a grid, at any resolution."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._precision import accumulation_dtype


def bicubic_matrix(size: int, new_size: int, *, antialias: bool = False) -> np.ndarray:
    """Bicubic interpolation of `size` samples at `new_size` points, as a matrix.

    It is PyTorch's with `align_corners=False`. Without `antialias` the kernel is that of Keys
    (1981) with `a = -0.75`, and samples beyond the border repeat the last one. With it, `a = -0.5`,
    the kernel widens when there are fewer points than samples, and samples beyond the border have
    no weight.

    Arguments:

    - `size`: how many samples there are.
    - `new_size`: at how many points they are interpolated.
    - `antialias`: see above.

    Returns:

    A matrix `[new_size, size]` of float64 whose rows sum to one.

    Raises:

    - `ValueError` if a size is less than one.
    """
    if min(size, new_size) < 1:
        raise ValueError(f"bicubic_matrix: size={size} and new_size={new_size} must be at least 1.")
    scale = size / new_size
    centre = (np.arange(new_size) + 0.5) * scale
    matrix = np.zeros((new_size, size))
    for i, c in enumerate(centre):
        if antialias:
            stretch = max(scale, 1.0)
            low, high = int(c - 2 * stretch + 0.5), int(c + 2 * stretch + 0.5)
            sample = np.arange(max(low, 0), min(high, size))
            weight = _keys_kernel((sample + 0.5 - c) / stretch, -0.5)
            matrix[i, sample] = weight / weight.sum()
        else:
            sample = math.floor(c - 0.5) + np.arange(-1, 3)
            weight = _keys_kernel(sample + 0.5 - c, -0.75)
            np.add.at(matrix[i], np.clip(sample, 0, size - 1), weight)
    return matrix


def _keys_kernel(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


class PositionGrid(eqx.Module):
    """A learned vector for every cell of a grid, and for tokens that come before the grid.

    For a grid of another size vectors are interpolated, by two small matrices that are constants
    of the program. (Dosovitskiy et al., 2021, section 3.2; see `bicubic_matrix`.)
    """

    weight: Float[Array, "positions d_model"]
    grid: tuple[int, int] = eqx.field(static=True)
    antialias: bool = eqx.field(static=True)

    def __init__(
        self,
        grid: tuple[int, int],
        d_model: int,
        *,
        num_prefix: int = 0,
        antialias: bool = False,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `grid`: the height and the width of the grid, in cells.
        - `d_model`: size of the vectors.
        - `num_prefix`: how many tokens before the grid have a vector as well.
        - `antialias`: how vectors are interpolated; see `bicubic_matrix`.
        - `dtype`: of the parameters; the default floating dtype if not given.
        - `key`: for the initial vectors, of standard deviation `1 / sqrt(d_model)`.
        """
        sizes = (("grid", min(grid), 1), ("d_model", d_model, 1), ("num_prefix", num_prefix, 0))
        for name, size, least in sizes:
            if size < least:
                raise ValueError(f"PositionGrid: {name}={size} must be at least {least}.")
        dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
        shape = (num_prefix + grid[0] * grid[1], d_model)
        init = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)
        self.weight = init(key, shape, dtype)
        self.grid = grid
        self.antialias = antialias

    def __call__(self, grid: tuple[int, int] | None = None) -> Float[Array, "seq d_model"]:
        """The vectors of the tokens before the grid, then those of its cells, row by row.

        Arguments:

        - `grid`: its height and width in cells; those that the layer was built with if not given.
        """
        if grid is None or grid == self.grid:
            return self.weight
        num_prefix = self.weight.shape[0] - self.grid[0] * self.grid[1]
        dtype = accumulation_dtype(self.weight.dtype)
        rows, columns = (
            jnp.asarray(bicubic_matrix(size, new, antialias=self.antialias), dtype)
            for size, new in zip(self.grid, grid, strict=True)
        )
        cells = self.weight[num_prefix:].astype(dtype).reshape(*self.grid, -1)
        cells = jnp.einsum("ri,ijd->rjd", rows, cells)
        cells = jnp.einsum("cj,rjd->rcd", columns, cells).reshape(grid[0] * grid[1], -1)
        return jnp.concatenate([self.weight[:num_prefix], cells.astype(self.weight.dtype)])
