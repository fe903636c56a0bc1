"""Parameter counts of a model, as numbers and as a table to print."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import PyTree

from .._text_table import text_table
from ..models._places import Place, is_shaped, map_with_place
from ..nn import Embedding, MixtureOfExperts
from ._flops import model_flops


class ParameterCounts(NamedTuple):
    """How many parameters a model has."""

    total: int
    """All of them."""
    embedding: int
    """Those in tables of token and position embeddings; with tied weights also the head."""
    active: int
    """Those used for a token: of experts, only as many as it chooses."""

    @property
    def non_embedding(self) -> int:
        """All but the tables: the `N` of scaling laws, where the head is tied; a separate head
        counts here. (Kaplan et al., 2020, section 2.1.)"""
        return self.total - self.embedding


def parameter_counts(model: PyTree) -> ParameterCounts:
    """Counts the parameters: floating arrays, and the weights of quantised layers.

    Arguments:

    - `model`: the model, or only its shapes, as from `equinox.filter_eval_shape`.
    """
    rows = _rows(model)
    return ParameterCounts(
        total=sum(row.parameters for row in rows),
        embedding=sum(row.parameters for row in rows if row.kind == Embedding.__name__),
        active=sum(row.active for row in rows),
    )


def summary(model: PyTree, *args: Any) -> str:
    """The parameters of a model in a table, as text to print; nothing is computed.

    Arguments:

    - `model`: the model, or only its shapes, as from `equinox.filter_eval_shape`.
    - `args`: what the model is called with, or only shapes: then the table ends with the
        operations of this call; see `model_flops`.
    """
    rows = _rows(model)
    cells = [("path", "kind", "shape", "dtype", "parameters", "bytes")]
    for row in rows:
        numbers = (f"{row.parameters:,}", f"{row.bytes:,}")
        cells.append((row.path, row.kind, str(list(row.shape)), row.dtype, *numbers))
    counts = parameter_counts(model)
    cells.append(("all", "", "", "", f"{counts.total:,}", f"{sum(row.bytes for row in rows):,}"))
    parts = [f"{counts.embedding:,} in embeddings", f"{counts.non_embedding:,} elsewhere"]
    if counts.active != counts.total:
        parts.append(f"{counts.active:,} active for a token")
    lines = [text_table(cells, num_left=4), "; ".join(parts)]
    if args:
        lines.append(f"{model_flops(model, *args):,} floating-point operations in this call")
    return "\n".join(lines)


class _Row(NamedTuple):
    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    active: int
    bytes: int


def _rows(model: PyTree) -> list[_Row]:
    rows: list[_Row] = []

    def visit(place: Place, x: Any) -> None:
        if not is_shaped(x):
            return
        dtype, size = jnp.dtype(x.dtype), math.prod(x.shape)
        learned = jnp.issubdtype(dtype, jnp.inexact) or dtype == jnp.int8
        count = size if learned else 0
        active = count
        for node in place.inside if "experts" in place.stacked else ():
            if isinstance(node, MixtureOfExperts):
                active = active * node.top_k // node.num_experts
        kind = type(place.inside[-1]).__name__ if place.inside else ""
        rows.append(
            _Row(place.path, kind, x.shape, dtype.name, count, active, size * dtype.itemsize)
        )

    map_with_place(visit, model)
    return rows
