"""How the kernels cut the scores."""

import dataclasses
from typing import Literal, NamedTuple

from .._inputs import Inputs

Kernel = Literal["forward", "tangent", "transpose_q", "transpose_kv"]


class Tiles(NamedTuple):
    """How a kernel cuts the scores, and how it is compiled."""

    block_q: int
    block_kv: int
    num_warps: int = 4
    num_stages: int = 2


def padded(dim: int) -> int:
    """Tiles in registers have sides that are powers of two, and at least what a product takes."""
    return max(16, 1 << (dim - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tiles for every kernel: the given ones, or those that suit the inputs."""

    fixed: Tiles | None = None

    def __call__(self, kernel: Kernel, inputs: Inputs, looks_up_pairs: bool) -> Tiles:
        """The tiles of a kernel, which may load something for every pair of positions."""
        return self.fixed or default_tiles(kernel, inputs, looks_up_pairs)


def default_tiles(kernel: Kernel, inputs: Inputs, looks_up_pairs: bool) -> Tiles:
    """Tiles that fit registers and shared memory of an NVIDIA GPU of compute capability 9.0.

    Chosen by compiling for it: hardly anything is spilled to memory. Not by timing them.
    """
    dim = max(padded(inputs.q.shape[-1]), padded(inputs.v.shape[-1]))
    narrow = inputs.q.dtype.itemsize <= 2
    tiles = (_narrow if narrow else _wide)(kernel, dim)
    if looks_up_pairs:
        # What is looked up for every pair waits in shared memory, next to keys and values.
        tiles = tiles._replace(block_kv=min(tiles.block_kv, 64))
    return tiles._replace(
        block_q=min(tiles.block_q, padded(inputs.q_seq)),
        block_kv=min(tiles.block_kv, padded(inputs.kv_seq)),
    )


def _narrow(kernel: Kernel, dim: int) -> Tiles:
    """For numbers of two bytes."""
    if kernel == "forward":
        return Tiles(128, 64 if dim > 128 else 128, 8, 3 if dim <= 64 else 2)
    if dim > 128:
        return Tiles(32, 32, 4, 1)
    return Tiles(128, 64, 8, 2) if kernel == "transpose_q" else Tiles(64, 64, 4, 2)


def _wide(kernel: Kernel, dim: int) -> Tiles:
    """For numbers of four bytes."""
    if dim > 128:
        return Tiles(32, 32, 8, 1)
    if dim > 64 and kernel == "transpose_kv":
        return Tiles(32, 32, 8, 1)
    return Tiles(64, 32, 8 if kernel == "tangent" else 4, 1)
