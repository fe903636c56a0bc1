"""How the kernels cut the scores."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, NamedTuple

import equinox as eqx
import jax

from .._inputs import Inputs
from .._masks import lookback

Kernel = Literal["forward", "tangent", "transpose_q", "transpose_kv", "decode"]
Pattern = Literal["full", "masked", "sparse", "listed"]
Mod = Literal["none", "arithmetic", "lookup"]


class Tiles(NamedTuple):
    """How a kernel cuts the scores, and how it is compiled."""

    block_q: int
    block_kv: int
    num_warps: int = 4
    num_stages: int = 2
    split: int = 512
    """How many keys one program takes when decoding."""


class HopperTiles(NamedTuple):
    """How a kernel for Hopper GPUs cuts the scores. A program has 128 rows."""

    block: int
    """How many tokens a fetched tile has: a multiple of 64."""
    stages: int = 2
    """How many tiles are in shared memory at a time."""


def padded(dim: int) -> int:
    """The side of a tile in registers: a power of two, and at least what a product takes."""
    return max(16, 1 << (dim - 1).bit_length())


class Measured(NamedTuple):
    """Which tiles were the fastest for some call on some device."""

    device: str
    """Its `jax.Device.device_kind`."""
    kernel: Kernel
    dtype: str
    head_dim: int
    """The larger of those of queries and values, rounded up to a power of two."""
    seq: int
    """The larger of `q_seq` and `kv_seq`. The row nearest to a call, as a ratio, is used."""
    pattern: Pattern
    mod: Mod
    tiles: Tiles | HopperTiles
    """Those of the kernels for Hopper GPUs, where these were faster."""


MEASURED: Final[tuple[Measured, ...]] = ()
"""What `tests/benchmarks/tune_kernels.py` found. None yet: it has not been run on a GPU."""


HOPPER: Final = jax.__version_info__ >= (0, 11)
"""Whether this version of JAX has what the kernels for Hopper GPUs need."""

_MAX_BLOCK: Final = 128
"""Larger tiles do not fit registers."""


def decodes(inputs: Inputs) -> bool:
    """Whether there are so few queries that the forward pass is the kernel for decoding."""
    # The rows of the smallest product of tiles.
    return inputs.q_seq * (inputs.heads // inputs.kv_heads) <= 16


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tiles for every kernel: the given ones, or those that suit the inputs."""

    fixed: Tiles | HopperTiles | None = None

    def __call__(self, kernel: Kernel, inputs: Inputs, looks_up_pairs: bool) -> Tiles:
        """The tiles of a kernel, which may load something for every pair of positions."""
        if isinstance(self.fixed, Tiles):
            return self.fixed
        mod = mod_kind(inputs, looks_up_pairs)
        tiles = measured_tiles(kernel, inputs, mod)
        if not isinstance(tiles, Tiles):
            tiles = default_tiles(kernel, inputs, mod)
        if inputs.block_size is not None:
            size = min(padded(inputs.block_size), _MAX_BLOCK)
            tiles = tiles._replace(block_q=size, block_kv=size)
        # No larger than the sequences.
        return tiles._replace(
            block_q=min(tiles.block_q, padded(inputs.q_seq)),
            block_kv=min(tiles.block_kv, padded(inputs.kv_seq)),
        )

    def hopper(
        self, kernel: Kernel, inputs: Inputs, takes: Callable[[], bool], *, asked: bool
    ) -> HopperTiles | None:
        """The tiles of a kernel for Hopper GPUs; `None` where that for all GPUs is to be used.

        Arguments:

        - `takes`: whether there is one for the score mod and the mask.
        - `asked`: whether to use it wherever there is one, not only where it is known to be faster.
        """
        if self.fixed is not None:
            return self.fixed if isinstance(self.fixed, HopperTiles) else None
        # Measurements have equal dims; their tiles may not fit unequal ones.
        even = inputs.q.shape[-1] == inputs.v.shape[-1]
        known = even and any(isinstance(row.tiles, HopperTiles) for row in _of_device())
        if inputs.block_size is not None or not (asked or known) or not takes():
            return None
        tiles = measured_tiles(kernel, inputs, mod_kind(inputs, looks_up_pairs=False))
        if tiles is None and asked:
            tiles = default_hopper_tiles(kernel, inputs)
        return tiles if isinstance(tiles, HopperTiles) else None


def mod_kind(inputs: Inputs, looks_up_pairs: bool) -> Mod:
    """What a kernel does to scores besides masking them."""
    if looks_up_pairs:
        return "lookup"
    return "none" if inputs.score_mod is None and not inputs.dropout_rate else "arithmetic"


def pattern(inputs: Inputs) -> Pattern:
    """How much of the scores is needed, or that this depends on data (`"listed"`)."""
    if inputs.mask is None:
        return "full"
    data = (inputs.mask, inputs.q_positions, inputs.kv_positions)
    if jax.tree.leaves(eqx.filter(data, eqx.is_array)):
        return "listed"
    window = lookback(inputs.mask)
    return "sparse" if window is not None and 4 * window <= inputs.kv_seq else "masked"


def measured_tiles(kernel: Kernel, inputs: Inputs, mod: Mod) -> Tiles | HopperTiles | None:
    """The tiles of the nearest measurement, if there is one on this device."""
    wanted = (kernel, inputs.q.dtype.name, _dim(inputs), pattern(inputs), mod)
    seq = max(inputs.q_seq, inputs.kv_seq)

    def matches(row: Measured) -> bool:
        return wanted == (row.kernel, row.dtype, row.head_dim, row.pattern, row.mod)

    rows = list(filter(matches, _of_device()))
    if not rows:
        return None
    return min(rows, key=lambda row: abs(math.log(row.seq / seq))).tiles


def _of_device() -> list[Measured]:
    """The measurements on the device at hand."""
    if jax.default_backend() != "gpu":
        return []
    device = jax.devices()[0].device_kind
    rows = (*_of_user(), *MEASURED)
    return [x for x in rows if x.device == device and (HOPPER or isinstance(x.tiles, Tiles))]


@functools.cache
def _of_user() -> tuple[Measured, ...]:
    """The user's own measurements, from the file named by `EQX_TRANSFORMER_TILES`."""
    file = os.environ.get("EQX_TRANSFORMER_TILES")
    if file is None:
        return ()
    rows = json.loads(Path(file).read_text())
    return tuple(Measured(**(row | {"tiles": _named(row["tiles"])})) for row in rows)


def _named(tiles: list[int]) -> Tiles | HopperTiles:
    # Those for Hopper GPUs have fewer numbers.
    return HopperTiles(*tiles) if len(tiles) == len(HopperTiles._fields) else Tiles(*tiles)


def _dim(inputs: Inputs) -> int:
    return max(padded(inputs.q.shape[-1]), padded(inputs.v.shape[-1]))


def default_hopper_tiles(kernel: Kernel, inputs: Inputs) -> HopperTiles | None:
    """Tiles for which registers suffice; `None` where there are none, or no kernel.

    Chosen as `default_tiles` are.
    """
    if not HOPPER or kernel == "decode" or inputs.q.dtype.itemsize != 2:
        return None
    if _dim(inputs) > 128:
        # If the dims differ, the output cannot pass through the memory of the queries.
        stages = 2 if inputs.q.shape[-1] == inputs.v.shape[-1] else 1
        return HopperTiles(64, stages) if kernel == "forward" else None
    return HopperTiles(128 if kernel == "forward" else 64)


def default_tiles(kernel: Kernel, inputs: Inputs, mod: Mod) -> Tiles:
    """Tiles that fit registers and shared memory of an NVIDIA GPU of compute capability 9.0.

    Chosen by compiling for it (see `tests/benchmarks/attention_aot.py`), not by timing.
    """
    if inputs.q.dtype.itemsize > 2:
        return _wide(kernel, _dim(inputs), mod)
    return _narrow(kernel, _dim(inputs), pattern(inputs), mod)


def _narrow(kernel: Kernel, dim: int, pattern: Pattern, mod: Mod) -> Tiles:
    """For two-byte dtypes."""
    # Registers hold a tile of scores, sums, and what masks and mods are computed with; in shared
    # memory are keys and values for every stage, and what is looked up for every pair.
    listed, lookup = pattern == "listed", mod == "lookup"
    if kernel == "decode":
        return Tiles(16, 32 if dim > 128 else 64, 4, 3)
    if kernel == "forward" and dim > 128:
        return Tiles(128, 32 if lookup else 64, 8, 2)
    if kernel == "forward" and (listed or lookup):
        return Tiles(128, 64, 8, 2 if lookup and dim > 64 else 3)
    if kernel == "forward":
        return Tiles(128, 128, 8, 2)
    if dim > 128:
        return Tiles(32, 32, 8 if kernel == "transpose_kv" else 4, 1)
    if kernel == "transpose_q":
        return Tiles(128, 32 if lookup and pattern != "full" and dim > 64 else 64, 8, 2)
    if dim <= 64:
        # The compiler lets the products of a single loop wait for each other if it has two stages.
        single = kernel == "transpose_kv" and pattern == "full"
        return Tiles(128, 64, 8, 1) if single else Tiles(64, 64, 4, 2)
    if kernel == "tangent":
        return Tiles(128, 32, 8, 2)
    return Tiles(128, 64, 8, 1 if lookup or (listed and mod != "none") else 2)


def _wide(kernel: Kernel, dim: int, mod: Mod) -> Tiles:
    """For four-byte dtypes."""
    if kernel == "decode":
        return Tiles(16, 32, 4, 2)
    if dim > 128 and kernel in ("tangent", "transpose_kv"):
        return Tiles(16, 32 if kernel == "tangent" else 16, 8, 1)
    if dim > 128 or (dim > 64 and (kernel == "transpose_kv" or mod == "lookup")):
        return Tiles(32, 32, 8, 1)
    return Tiles(64, 32, 8 if kernel == "tangent" else 4, 1)
