"""Masked loads and stores, for tiles that may extend beyond an array; only for Triton.

Separate from `_tile.py`, so that other kernels do not import Pallas for Triton.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from ._tuning import padded


def load(
    ref: Any,
    start: Any,
    size: int,
    dim: int,
    *,
    below: Any = None,
    head: Any = None,
) -> Any:
    """Loads `size` rows, with zeros where `below` is false and in missing columns.

    They are those from `start` on; if `start` is a tuple, it holds the indices of every row.
    """
    kept = _kept(size, dim, below)
    if isinstance(start, tuple):
        # Pallas's interpreter takes slices or indices for a load, but not both.
        columns = jnp.arange(padded(dim), dtype=jnp.int32)[None, :]
        shape = (size, padded(dim))
        rows = (x[:, None] for x in start)
        index = tuple(jnp.broadcast_to(x, shape) for x in (*rows, columns))
    else:
        rows = pl.ds(start, size)
        index = (rows, slice(None)) if head is None else (rows, head, slice(None))
    return ref[index] if kept is None else plt.load(ref.at[index], mask=kept, other=0)


def _kept(size: int, dim: int, below: Any) -> Any:
    """Which elements of a tile exist; `None` if all do."""
    kept = None if below is None else below[:, None]
    if padded(dim) != dim:
        columns = (jnp.arange(padded(dim), dtype=jnp.int32) < dim)[None, :]
        kept = columns if kept is None else kept & columns
    return None if kept is None else jnp.broadcast_to(kept, (size, padded(dim)))


def load_stat(ref: Any, index: Any, below: Any, other: float) -> Any:
    """Loads one number per row, `other` where `below` is false."""
    if below is None:
        return ref[index]
    return plt.load(ref.at[index], mask=below, other=other)


def store(ref: Any, values: Any, dim: int, below: Any) -> None:
    """Stores the rows and columns that exist."""
    values, kept = values.astype(ref.dtype), _kept(len(values), dim, below)
    if kept is None:
        ref[...] = values
    else:
        plt.store(ref.at[:, :], values, mask=kept)


def store_stat(ref: Any, values: Any, below: Any) -> None:
    """Stores one number per row."""
    if below is None:
        ref[...] = values
    else:
        plt.store(ref.at[:], values, mask=below)
