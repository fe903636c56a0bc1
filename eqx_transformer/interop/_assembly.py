"""Arrays assembled from parts, on the devices they are for."""

import mmap
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

# Rows that are transposed together: at least as many as a cache line has elements.
_ROWS = 64


class Assembly:
    """An array that is written part by part, on the host, and then passed to JAX.

    Only what the devices of this process hold is ever allocated. On a CPU the resulting array is
    the very memory that was written to, so nothing is held twice.
    """

    def __init__(self, shape: Sequence[int], dtype: np.dtype, sharding: Sharding | None):
        """Arguments:

        - `shape`, `dtype`: of the array.
        - `sharding`: where its parts go; the default device if `None`.
        """
        self._shape = tuple(shape)
        self._sharding = sharding
        everything = (slice(None),) * len(self._shape)
        self._places: dict[Any, Any] = {None: everything}
        if sharding is not None:
            self._places = dict(sharding.addressable_devices_indices_map(self._shape))
        self._buffers: dict[Any, np.ndarray] = {}
        for place in self._places.values():
            if _bounds(place, self._shape) not in self._buffers:
                bounds = _bounds(place, self._shape)
                self._buffers[bounds] = _aligned([stop - start for start, stop in bounds], dtype)

    def write(self, index: tuple[int, ...], part: np.ndarray) -> None:
        """Writes the part of the array at an index of its leading axes."""
        for bounds, buffer in self._buffers.items():
            leading, rest = bounds[: len(index)], bounds[len(index) :]
            if all(start <= i < stop for i, (start, stop) in zip(index, leading, strict=True)):
                local = tuple(i - start for i, (start, _) in zip(index, leading, strict=True))
                here = tuple(slice(*bound) for bound in rest)
                copy(buffer[(*local, ...)], part[(*here, ...)])

    def finish(self) -> jax.Array:
        """The array."""
        if self._sharding is None:
            (buffer,) = self._buffers.values()
            return jax.device_put(buffer)
        arrays = [
            jax.device_put(self._buffers[_bounds(place, self._shape)], device)
            for device, place in self._places.items()
        ]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, arrays)


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, fast even where `source` is transposed.

    NumPy traverses a transposed matrix with a stride that is often a power of two, at which a cache
    holds only a few rows; rows first copied to a buffer with another stride stay in it. This is 5
    to 15 times faster.
    """
    if source.ndim < 2 or source.strides[-2] >= source.strides[-1]:
        target[...] = source
        return
    for index in np.ndindex(source.shape[:-2]):
        rows, out = source[index].T, target[index]
        padded = np.empty((_ROWS, rows.shape[1] + 32), source.dtype)
        for start in range(0, rows.shape[0], _ROWS):
            some = rows[start : start + _ROWS]
            near = padded[: some.shape[0], : some.shape[1]]
            near[...] = some
            out[:, start : start + _ROWS] = near.T


def _bounds(place: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(place, shape, strict=True))


def host_memory(size: int) -> np.ndarray:
    """`size` zero bytes, which the system allocates only when they are touched.

    NumPy asks for huge pages, for which a machine that has been up for a while may have to make
    room: that has taken longer than everything else.
    """
    return np.frombuffer(mmap.mmap(-1, max(size, 1), access=mmap.ACCESS_COPY), np.uint8, size)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Empty memory, aligned so that JAX uses it without a copy."""
    shape = tuple(shape)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = host_memory(size + 64)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
