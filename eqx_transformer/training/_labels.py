"""Which parameter is what, for optimisers: decay, learning rates, what is not trained."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Final

import equinox as eqx
import jax
from jaxtyping import PyTree

from ..models._physics_parts import ConditionEmbedding
from ..nn import AbstractLinear, MixtureOfExperts
from ..stacks import AbstractBlock, Stack


def weight_decay_mask(model: PyTree) -> PyTree:
    """Which parameters weight decay applies to: matrices, not norms and biases.

    The rule "at least two axes" is wrong for stacked layers, whose norm weights are
    `[num_layers, d_model]`; here the axes that count layers and experts do not count. Pass the
    function itself as the `mask` of `optax.adamw`.

    Arguments:

    - `model`: the parameters; what is no floating array has no entry.

    Returns:

    A PyTree of the same structure with a boolean for every floating array.
    """
    return _map(lambda x, stacked, nodes: x.ndim - stacked >= 2, model)


def parameter_labels(model: PyTree) -> PyTree:
    """What kind of parameter each is: `"hidden"`, `"outer"` or `"vector"`.

    Those of `"hidden"` are the weights of linear maps in blocks; `"vector"` is what has less than
    two axes in one layer, norms and biases; `"outer"` is all else: embeddings, heads, tables. Pass
    the function itself as the `param_labels` of `optax.multi_transform`.

    Arguments:

    - `model`: the parameters; what is no floating array has no entry.

    Returns:

    A PyTree of the same structure with a string for every floating array.
    """

    def label(x: Any, stacked: int, nodes: list[Any]) -> str:
        if x.ndim - stacked < 2:
            return "vector"
        return "hidden" if _is_hidden(nodes) else "outer"

    return _map(label, model)


def muon_dimension_numbers(model: PyTree) -> PyTree:
    """The parameters that Muon is for, and which two axes of each are its matrix.

    Those that `parameter_labels` calls `"hidden"`; layers and experts each have matrices of their
    own. The others, with `None`, get Adam. Pass the function itself as the
    `muon_weight_dimension_numbers` of `optax.contrib.muon`.

    Arguments:

    - `model`: the parameters; what is no floating array has no entry.

    Returns:

    A PyTree of the same structure with `MuonDimensionNumbers` or `None` for every floating array.

    Raises:

    - `ImportError` without optax.
    """
    if importlib.util.find_spec("optax") is None:
        raise ImportError('this needs optax: pip install "eqx_transformer[train]".')
    numbers = importlib.import_module("optax.contrib").MuonDimensionNumbers(-2, -1)

    def mark(x: Any, stacked: int, nodes: list[Any]) -> Any:
        return numbers if x.ndim - stacked >= 2 and _is_hidden(nodes) else None

    return _map(mark, model)


def trainable(model: PyTree, where: Callable[[str], bool]) -> PyTree:
    """Which parameters to train, by their paths; the rest is frozen.

        trained, frozen = eqx.partition(model, trainable(model, lambda path: "head" in path))

    With this no gradient is computed for what is frozen, and the optimiser keeps nothing for it.

    Arguments:

    - `model`: the model.
    - `where`: whether to train a parameter, given its path, such as
        `"stack.blocks.attention.q_proj.weight"`.

    Returns:

    A PyTree of the same structure, with a boolean for every leaf.

    Raises:

    - `ValueError` if there would be nothing to train.
    """

    def mark(path: Any, x: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return eqx.is_inexact_array(x) and bool(where(name))

    spec = jax.tree_util.tree_map_with_path(mark, model)
    if not any(jax.tree.leaves(spec)):
        paths = jax.tree_util.tree_leaves_with_path(eqx.filter(model, eqx.is_inexact_array))
        names = [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in paths[:3]]
        raise ValueError(
            f"trainable: `where` chooses no parameter; it is given paths such as {names}."
        )
    return spec


_STACKED: Final = (
    (Stack, "blocks"),
    (MixtureOfExperts, "experts"),
    (ConditionEmbedding, "embeddings"),
)
"""Modules that hold many of a kind as one, with a leading axis, and in which field."""


def _map(function: Callable[[Any, int, list[Any]], Any], model: PyTree) -> PyTree:
    """Applies `function(x, stacked, nodes)` to the floating arrays.

    `stacked` is how many leading axes count layers and experts, `nodes` are all that `x` is in.
    """

    def visit(path: tuple[Any, ...], x: Any) -> Any:
        if not (eqx.is_inexact_array(x) or isinstance(x, jax.ShapeDtypeStruct)):
            return x
        nodes, stacked = [model], 0
        for entry in path:
            name = getattr(entry, "name", None)
            stacked += any(isinstance(nodes[-1], c) and name == field for c, field in _STACKED)
            nodes.append(_child(nodes[-1], entry))
        return function(x, stacked, nodes)

    return jax.tree_util.tree_map_with_path(visit, model)


def _child(node: Any, entry: Any) -> Any:
    if isinstance(entry, jax.tree_util.GetAttrKey):
        return getattr(node, entry.name)
    if isinstance(entry, jax.tree_util.SequenceKey):
        return node[entry.idx]
    return node[entry.key]


def _is_hidden(nodes: list[Any]) -> bool:
    kinds = (AbstractBlock, AbstractLinear)
    return all(any(isinstance(node, kind) for node in nodes) for kind in kinds)
