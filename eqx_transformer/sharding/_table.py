import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from .._text_table import text_table
from ..models._places import is_shaped
from ._rules import TENSOR, Rule, Rules, axis_names, first_rule, mesh_size, specs


def sharding_table(model: PyTree, mesh: Mesh | AbstractMesh, rules: Rules | None = None) -> str:
    """How every parameter is split, and the bytes that every device holds, as text to print.

    Nothing is computed, so no devices are needed:

        shapes = equinox.filter_eval_shape(lambda key: Llama(config, key=key), key)
        print(sharding_table(shapes, jax.sharding.AbstractMesh((64, 8), ("fsdp", "tensor"))))

    Below are the patterns of your own rules that decide nothing, because no path matches or earlier
    rules come first: a misspelt one is no error, for the same rules are used for states of
    optimisers and for parts of models.

    Arguments are those of `specs`.
    """
    rules = Rules() if rules is None else rules
    splits = jax.tree.leaves(specs(model, mesh, rules), is_leaf=lambda x: isinstance(x, P))
    leaves = jax.tree_util.tree_leaves_with_path(model)
    arrays = [(path, x) for path, x in leaves if is_shaped(x)]
    used: set[Rule | None] = set()
    rows, whole, held = [("parameter", "shape", "split over", "bytes per device")], 0, 0
    for (path, x), spec in zip(arrays, splits, strict=True):
        names = [name for entry in spec for name in axis_names(entry)]
        size = math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        local = size // math.prod(mesh_size(mesh, name) for name in names)
        whole, held = whole + size, held + local
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        used.add(first_rule(name, rules))
        rows.append((name, str(list(x.shape)), _text(spec, x.ndim), f"{local:,}"))
    axes = ", ".join(f"{name}={size}" for name, size in dict(mesh.shape).items())
    rows.append(("all", f"{whole:,} bytes", axes, f"{held:,}"))
    idle = [rule.pattern for rule in rules.table if rule not in used and rule not in TENSOR]
    notes = [f"\nthe rule {pattern!r} decides nothing" for pattern in idle]
    return text_table(rows, num_left=3) + "".join(notes)


def _text(spec: P, ndim: int) -> str:
    if not spec:
        return "-"
    entries = ["+".join(axis_names(entry)) or "-" for entry in spec]
    entries += ["-"] * (ndim - len(entries))
    return f"[{', '.join(entries)}]"
