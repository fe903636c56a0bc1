import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from ..models import AbstractConfig
from ._rules import Rules


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(AbstractConfig):
    """The sizes of a mesh, as a configuration that can be kept in a file.

    One of the axes may be -1: it gets the remaining devices.
    """

    pipe: int = 1
    """Parts of the layers, and of the batch outside them."""
    data: int = -1
    """Parts of the batch, each with all parameters."""
    fsdp: int = 1
    """Parts of the batch, over which the parameters are split as well."""
    tensor: int = 1
    """Parts of heads, hidden units and vocabulary."""
    expert: int = 1
    """Parts of the batch, over which the experts are split as well."""
    context: int = 1
    """Parts of every sequence."""
    fsdp_min_size: int = 2**18
    """The fewest elements with which a parameter is split over `fsdp`."""

    def check(self) -> None:
        sizes = self._sizes()
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(
                    f"ParallelConfig: {name}={size} must be at least 1, or -1 for the rest."
                )
        rest = [name for name, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ValueError(
                f"ParallelConfig: {' and '.join(rest)} are all -1; only one can be the rest."
            )
        if self.fsdp_min_size < 0:
            raise ValueError(
                f"ParallelConfig: fsdp_min_size={self.fsdp_min_size} must be at least 0."
            )

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh of `devices`, or of all there are.

        Neighbours in the list are neighbours along `tensor`, which communicates most.

        Raises:

        - `ValueError` if the product of the axes is not the number of devices.
        """
        devices = jax.devices() if devices is None else list(devices)
        sizes = self._sizes()
        known = math.prod(size for size in sizes.values() if size != -1)
        rest = len(devices) // known if -1 in sizes.values() else 1
        if rest * known != len(devices) or rest == 0:
            raise ValueError(
                f"ParallelConfig: {', '.join(f'{k}={v}' for k, v in sizes.items())} are for "
                f"{'a multiple of ' if -1 in sizes.values() else ''}{known} devices, but there are "
                f"{len(devices)}; change one of the sizes, or pass that many devices."
            )
        sizes = {name: rest if size == -1 else size for name, size in sizes.items()}
        kinds = (AxisType.Auto,) * len(sizes)
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds, devices=devices)

    def rules(self) -> Rules:
        """The rules, with this `fsdp_min_size`."""
        return Rules(fsdp_min_size=self.fsdp_min_size)

    def _sizes(self) -> dict[str, int]:
        return {
            "pipe": self.pipe,
            "data": self.data,
            "fsdp": self.fsdp,
            "expert": self.expert,
            "context": self.context,
            "tensor": self.tensor,
        }
