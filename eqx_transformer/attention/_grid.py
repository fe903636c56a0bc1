"""Masks and score mods for tokens on a grid, such as the patches of an image.

Positions count tokens: first those before the grid (a class token, registers), then the cells of
the grid, row by row.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from .._precision import accumulation_dtype
from ._masks import EMPTY, FULL, PARTIAL, AbstractMask


class GridWindow(AbstractMask):
    """A cell attends to the square of cells around it; tokens before the grid see all and are seen.

    Arguments:

    - `width`: how many cells the grid is wide.
    - `reach`: how many rows and columns a cell sees in each direction.
    - `num_prefix`: how many tokens there are before the grid.

    Raises:

    - `ValueError` if a number is too small.
    """

    width: int = eqx.field(static=True)
    reach: int = eqx.field(static=True)
    num_prefix: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        for name, least in (("width", 1), ("reach", 0), ("num_prefix", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"GridWindow: {name}={getattr(self, name)} must be at least {least}."
                )

    def __call__(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        q, kv = q_pos - self.num_prefix, kv_pos - self.num_prefix
        rows = jnp.abs(q // self.width - kv // self.width)
        columns = jnp.abs(q % self.width - kv % self.width)
        near = (rows <= self.reach) & (columns <= self.reach)
        return near | (q < 0) | (kv < 0)

    def block(
        self,
        q_lo: Int[Array, "..."],
        q_hi: Int[Array, "..."],
        kv_lo: Int[Array, "..."],
        kv_hi: Int[Array, "..."],
    ) -> Int[Array, "..."]:
        q_lo, q_hi, kv_lo, kv_hi = (x - self.num_prefix for x in (q_lo, q_hi, kv_lo, kv_hi))
        below = kv_lo // self.width - q_hi // self.width > self.reach
        above = q_lo // self.width - kv_hi // self.width > self.reach
        none = (q_lo >= 0) & (kv_lo >= 0) & (below | above)
        all_ = (q_hi < 0) | (kv_hi < 0)
        return jnp.where(none, EMPTY, jnp.where(all_, FULL, PARTIAL))

    def __str__(self) -> str:
        return f"GridWindow({self.width}, {self.reach}, {self.num_prefix})"


class GridBias(eqx.Module):
    """A learned bias for every head and every offset in rows and columns.

    Pairs with a token before the grid use one of three further biases: from it, to it, or between
    two such tokens. (Liu et al., Swin Transformer, 2021, equation 4; with a class token: Bao et
    al., BEiT, 2022.)

    Row `(dr + height - 1) * (2 * width - 1) + dc + width - 1` of the table is for a query `dr` rows
    and `dc` columns after its key; the last three are for a query before the grid, a key before
    it, and both.
    """

    table: Float[Array, "differences heads"]
    grid: tuple[int, int] = eqx.field(static=True)
    num_prefix: int = eqx.field(static=True)

    def __init__(
        self,
        grid: tuple[int, int],
        num_heads: int,
        *,
        num_prefix: int = 0,
        dtype: DTypeLike | None = None,
    ):
        """Arguments:

        - `grid`: the height and the width of the grid, in cells.
        - `num_heads`: how many heads.
        - `num_prefix`: how many tokens there are before the grid.
        - `dtype`: of the table, initially zero; the default floating dtype if not given.
        """
        if min(grid) < 1 or num_heads < 1 or num_prefix < 0:
            raise ValueError(
                f"GridBias: grid={grid} and num_heads={num_heads} must be at least 1, and "
                f"num_prefix={num_prefix} not negative."
            )
        differences = (2 * grid[0] - 1) * (2 * grid[1] - 1) + (3 if num_prefix else 0)
        self.table = jnp.zeros((differences, num_heads), dtype)
        self.grid = grid
        self.num_prefix = num_prefix

    def __call__(
        self,
        score: Float[Array, "..."],
        q_pos: Int[Array, "..."],
        kv_pos: Int[Array, "..."],
        head: Int[Array, "..."],
    ) -> Float[Array, "..."]:
        """Adds the bias of the pair's offset."""
        height, width = self.grid
        q, kv = q_pos - self.num_prefix, kv_pos - self.num_prefix
        rows = q // width - kv // width + height - 1
        index: Any = rows * (2 * width - 1) + q % width - kv % width + width - 1
        if self.num_prefix:
            last = self.table.shape[0] - 1
            index = jnp.where(q < 0, last - 2, index)
            index = jnp.where(kv < 0, jnp.where(q < 0, last, last - 1), index)
        return score + self.table[index, head].astype(score.dtype)

    def resized(self, grid: tuple[int, int]) -> "GridBias":
        """The bias for a grid of another size: the table resized like an image, linearly.

        Biases of pairs with a token before the grid are unchanged.

        Arguments:

        - `grid`: the height and the width of the new grid, in cells.
        """
        height, width = self.grid
        new = GridBias(grid, self.table.shape[1], num_prefix=self.num_prefix)
        count = (2 * height - 1) * (2 * width - 1)
        dtype = accumulation_dtype(self.table.dtype)
        cells = self.table[:count].astype(dtype).reshape(2 * height - 1, 2 * width - 1, -1)
        rows, columns = (
            jnp.asarray(_linear_matrix(2 * size - 1, 2 * new_size - 1), dtype)
            for size, new_size in zip(self.grid, grid, strict=True)
        )
        cells = jnp.einsum("ri,ijh->rjh", rows, cells)
        cells = jnp.einsum("cj,rjh->rch", columns, cells).reshape(-1, self.table.shape[1])
        table = jnp.concatenate([cells.astype(self.table.dtype), self.table[count:]])
        return eqx.tree_at(lambda bias: bias.table, new, table)


def _linear_matrix(size: int, new_size: int) -> np.ndarray:
    """Linear interpolation at `new_size` points, like PyTorch's with `align_corners=False`."""
    place = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    distance = np.abs(np.clip(place, 0, size - 1)[:, None] - np.arange(size))
    return np.maximum(1 - distance, 0)
