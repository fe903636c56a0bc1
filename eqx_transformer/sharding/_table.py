import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from ..models._places import Place, map_with_place
from ._rules import Rules, is_shaped, mesh_size, specs


def sharding_table(model: PyTree, mesh: Mesh | AbstractMesh, rules: Rules | None = None) -> str:
    """What is split how, and the bytes that every device holds, as text to print.

    Nothing is computed, so it can be asked before there are any devices:

        shapes = equinox.filter_eval_shape(lambda key: Llama(config, key=key), key)
        print(sharding_table(shapes, jax.sharding.AbstractMesh((64, 8), ("fsdp", "tensor"))))

    Arguments are those of `specs`.
    """
    splits = jax.tree.leaves(specs(model, mesh, rules), is_leaf=lambda x: isinstance(x, P))

    def named(place: Place, x: Any) -> _Named | None:
        return _Named(place.path, x) if is_shaped(x) else None

    arrays = jax.tree.leaves(map_with_place(named, model))
    rows, whole, held = [("parameter", "shape", "split over", "bytes per device")], 0, 0
    for array, spec in zip(arrays, splits, strict=True):
        names = [n for entry in spec if entry is not None for n in _tuple(entry)]
        size = math.prod(array.x.shape) * jnp.dtype(array.x.dtype).itemsize
        local = size // math.prod(mesh_size(mesh, name) for name in names)
        whole, held = whole + size, held + local
        shape = array.x.shape
        rows.append((array.path, str(list(shape)), _text(spec, len(shape)), f"{local:,}"))
    axes = ", ".join(f"{name}={size}" for name, size in dict(mesh.shape).items())
    rows.append(("all", f"{whole:,} bytes", axes, f"{held:,}"))
    return _aligned(rows)


class _Named:
    """An array with its path."""

    def __init__(self, path: str, x: Any):
        self.path, self.x = path, x


def _tuple(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _text(spec: P, ndim: int) -> str:
    if not spec:
        return "-"
    entries = ["-" if entry is None else "+".join(_tuple(entry)) for entry in spec]
    entries += ["-"] * (ndim - len(entries))
    return f"[{', '.join(entries)}]"


def _aligned(rows: list[tuple[str, str, str, str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}"
        for a, b, c, d in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
