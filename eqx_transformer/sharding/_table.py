import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from .._text_table import text_table
from ..models._places import is_shaped
from ._rules import Rules, axis_names, mesh_size, specs


def sharding_table(model: PyTree, mesh: Mesh | AbstractMesh, rules: Rules | None = None) -> str:
    """What is split how, and the bytes that every device holds, as text to print.

    Nothing is computed, so it can be asked before there are any devices:

        shapes = equinox.filter_eval_shape(lambda key: Llama(config, key=key), key)
        print(sharding_table(shapes, jax.sharding.AbstractMesh((64, 8), ("fsdp", "tensor"))))

    Arguments are those of `specs`.
    """
    splits = jax.tree.leaves(specs(model, mesh, rules), is_leaf=lambda x: isinstance(x, P))
    leaves = jax.tree_util.tree_leaves_with_path(model)
    arrays = [(path, x) for path, x in leaves if is_shaped(x)]
    rows, whole, held = [("parameter", "shape", "split over", "bytes per device")], 0, 0
    for (path, x), spec in zip(arrays, splits, strict=True):
        names = [name for entry in spec for name in axis_names(entry)]
        size = math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        local = size // math.prod(mesh_size(mesh, name) for name in names)
        whole, held = whole + size, held + local
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        rows.append((name, str(list(x.shape)), _text(spec, x.ndim), f"{local:,}"))
    axes = ", ".join(f"{name}={size}" for name, size in dict(mesh.shape).items())
    rows.append(("all", f"{whole:,} bytes", axes, f"{held:,}"))
    return text_table(rows, num_left=3)


def _text(spec: P, ndim: int) -> str:
    if not spec:
        return "-"
    entries = ["+".join(axis_names(entry)) or "-" for entry in spec]
    entries += ["-"] * (ndim - len(entries))
    return f"[{', '.join(entries)}]"
