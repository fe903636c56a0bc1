"""Labels of parameters for optimisers: weight decay, kinds of parameters, frozen ones."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from ..models._places import Place, map_with_place
from ..nn import AbstractLinear
from ..stacks import AbstractBlock


def weight_decay_mask(model: PyTree) -> PyTree:
    """Which parameters weight decay applies to: matrices, not norms and biases.

    The rule "at least two axes" is wrong for stacked layers, whose norm weights are
    `[num_layers, d_model]`; here axes of layers and experts do not count. Pass the function itself
    as the `mask` of `optax.adamw`.

    Arguments:

    - `model`: the parameters; leaves that are not floating arrays have no entry.

    Returns:

    A PyTree of the same structure with a boolean for every floating array.
    """
    return _map(lambda place, x: _axes(place, x) >= 2, model)


def parameter_labels(model: PyTree) -> PyTree:
    """The kind of every parameter: `"hidden"`, `"outer"` or `"vector"`.

    `"hidden"` are the weights of linear maps in blocks; `"vector"` are parameters with fewer than
    two axes in one layer: norms and biases; `"outer"` is everything else: embeddings, heads,
    tables. Pass the function itself as the `param_labels` of `optax.multi_transform`.

    Arguments:

    - `model`: the parameters; leaves that are not floating arrays have no entry.

    Returns:

    A PyTree of the same structure with a string for every floating array.
    """

    def label(place: Place, x: Any) -> str:
        if _axes(place, x) < 2:
            return "vector"
        return "hidden" if _is_hidden(place) else "outer"

    return _map(label, model)


def muon_dimension_numbers(model: PyTree) -> PyTree:
    """Which parameters Muon applies to, and which two axes of each are its matrix.

    It applies to those that `parameter_labels` calls `"hidden"`; layers and experts each have
    matrices of their own. The others, with `None`, get Adam. Pass the function itself as the
    `muon_weight_dimension_numbers` of `optax.contrib.muon`.

    Arguments:

    - `model`: the parameters; leaves that are not floating arrays have no entry.

    Returns:

    A PyTree of the same structure with `MuonDimensionNumbers` or `None` for every floating array.

    Raises:

    - `ImportError` without optax.
    """
    if importlib.util.find_spec("optax") is None:
        raise ImportError('this needs optax: pip install "eqx_transformer[train]".')
    numbers = importlib.import_module("optax.contrib").MuonDimensionNumbers(-2, -1)

    def mark(place: Place, x: Any) -> Any:
        return numbers if _axes(place, x) >= 2 and _is_hidden(place) else None

    return _map(mark, model)


def trainable(model: PyTree, where: Callable[[str], bool]) -> PyTree:
    """Which parameters to train, by their paths; the rest is frozen.

        trained, frozen = eqx.partition(model, trainable(model, lambda path: "head" in path))

    Then no gradient is computed for frozen parameters, and the optimiser has no state for them.

    Arguments:

    - `model`: the model.
    - `where`: whether to train a parameter, given its path, such as
        `"stack.blocks.attention.q_proj.weight"`.

    Returns:

    A PyTree of the same structure, with a boolean for every leaf.

    Raises:

    - `ValueError` if nothing is selected.
    """

    def mark(path: Any, x: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return eqx.is_inexact_array(x) and bool(where(name))

    spec = jax.tree_util.tree_map_with_path(mark, model)
    if not any(jax.tree.leaves(spec)):
        paths = jax.tree_util.tree_leaves_with_path(eqx.filter(model, eqx.is_inexact_array))
        names = [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in paths[:3]]
        raise ValueError(
            f"trainable: `where` selects no parameter; it is given paths such as {names}."
        )
    return spec


def _map(function: Callable[[Place, Any], Any], model: PyTree) -> PyTree:
    """Applies `function(place, x)` to the floating arrays, or to their shapes."""

    def visit(place: Place, x: Any) -> Any:
        if eqx.is_inexact_array(x) or isinstance(x, jax.ShapeDtypeStruct):
            return function(place, x)
        return x

    return map_with_place(visit, model)


def _axes(place: Place, x: Any) -> int:
    """How many axes the parameter has in one layer and one expert."""
    return x.ndim - len(place.stacked)


def _is_hidden(place: Place) -> bool:
    kinds = (AbstractBlock, AbstractLinear)
    return all(any(isinstance(node, kind) for node in place.inside) for kind in kinds)
