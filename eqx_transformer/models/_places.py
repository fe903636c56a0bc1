"""Where a parameter is in a model, and what its leading axes count."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import equinox as eqx
import jax
from jaxtyping import PyTree

from ..nn import MixtureOfExperts
from ..stacks import Stack
from ._physics_parts import ConditionEmbedding


class Place(NamedTuple):
    """Where a leaf is."""

    path: str
    """For example `"stack.blocks.attention.q_proj.weight"`."""
    stacked: tuple[str, ...]
    """What the leading axes count: `"layers"`, `"experts"`, `"conditions"`."""
    inside: tuple[Any, ...]
    """All nodes that contain the leaf, from the model down."""


_STACKED: Final = (
    (Stack, "blocks", "layers"),
    (MixtureOfExperts, "experts", "experts"),
    (ConditionEmbedding, "embeddings", "conditions"),
)
"""Modules that hold stacked modules, in which field, and what the leading axis counts."""


def map_with_place(
    function: Callable[[Place, Any], Any],
    model: PyTree,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
) -> PyTree:
    """A PyTree of the same structure, with `function(place, x)` for every leaf `x`."""

    def visit(path: tuple[Any, ...], x: Any) -> Any:
        inside, stacked = [model], []
        for entry in path:
            node, name = inside[-1], getattr(entry, "name", None)
            stacked += [k for kind, f, k in _STACKED if isinstance(node, kind) and name == f]
            inside.append(_child(node, entry))
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return function(Place(name, tuple(stacked), tuple(inside[:-1])), x)

    return jax.tree_util.tree_map_with_path(visit, model, is_leaf=is_leaf)


def is_shaped(x: Any) -> bool:
    """Whether a leaf is an array, or the shape of one."""
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _child(node: Any, entry: Any) -> Any:
    if isinstance(entry, jax.tree_util.GetAttrKey):
        return getattr(node, entry.name)
    if isinstance(entry, jax.tree_util.SequenceKey):
        return node[entry.idx]
    return node[entry.key]
