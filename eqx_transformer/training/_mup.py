"""Maximal update parametrisation: hyperparameters of a narrow model transfer to a wide one."""

import math
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
from jaxtyping import PyTree

from ..models._places import Place, is_shaped, map_with_place
from ..nn import Convolution, Embedding

Model = TypeVar("Model")


def mup_init(model: Model, base: PyTree) -> Model:
    """A newly built model with the initial weights of the maximal update parametrisation.

        embedding    width / base width  times its variance, which is then the same for all widths
        head         base width / width  times its variance, as for all maps from the width to a
                     fixed size: routers, keys and values with a fixed number and size of heads
        other maps   unchanged: variance 1 / fan_in

    (Yang et al., 2022, "Tensor Programs V", table 3. What does not depend on the width is as in
    `base`, so a model of the base width does not change.) Two things are up to the configuration:
    if heads become larger rather than more, scores must be divided by their size, not its root:
    `query_scale=base_head_dim**0.5 / head_dim`; and the head must have weights of its own.

    Arguments:

    - `model`: the model.
    - `base`: a model of the width that was tuned, or only its shapes, as from
        `equinox.filter_eval_shape`; identical except for sizes.

    Raises:

    - `ValueError` if the two do not have the same parameters, or if no separate map leads from the
        width to a fixed size, as with `tie_embeddings=True`.
    """
    widths = _widths(model, base)
    # Not only the head leads to a fixed size: routers do, and keys of a fixed number of heads.
    config, head = getattr(model, "config", None), getattr(model, "head", None)
    tied = head is None and getattr(config, "tie_embeddings", False)
    is_wider = any(w.fan_out != 1 for w in widths.values())
    if is_wider and (tied or not any(map(_is_head, widths.values()))):
        raise ValueError(
            "mup_init: no head leads from the width to a fixed size; one that is tied to the "
            "embedding cannot be scaled separately, so use tie_embeddings=False."
        )

    def scaled(place: Place, x: Any) -> Any:
        width = widths.get(place.path)
        if width is None:
            return x
        if _is_head(width):
            return x / math.sqrt(width.fan_in)
        # The library's standard deviation for embeddings is `1 / sqrt(d_model)`.
        is_table = isinstance(place.inside[-1], Embedding)
        return x * math.sqrt(width.fan_out) if is_table else x

    return map_with_place(scaled, model)


def mup_learning_rates(model: PyTree, base: PyTree) -> PyTree[float | None]:
    """Factors on the learning rate of every parameter, for Adam and similar optimisers.

    `base fan_in / fan_in` for the weights of linear maps, including the output head, and one for
    embeddings, norms and biases. (Yang et al., 2022, table 3.) In optax, put them before weight
    decay, which then does not depend on the width:

        factors = mup_learning_rates(model, base)
        optax.chain(
            optax.scale_by_adam(),
            optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)),
            optax.add_decayed_weights(0.1, weight_decay_mask),
            optax.scale_by_learning_rate(schedule),
        )

    Arguments are those of `mup_init`; shapes are enough for both.

    Returns:

    A PyTree of the same structure with a number for every floating array, and `None` for the rest.
    """
    widths = _widths(model, base)

    def factor(place: Place, _: Any) -> float | None:
        return 1 / widths[place.path].fan_in if place.path in widths else None

    return map_with_place(factor, model)


class _Width(NamedTuple):
    """The sizes of a map, relative to the base."""

    fan_in: float
    fan_out: float


def _is_head(width: _Width) -> bool:
    return width.fan_in != 1 and width.fan_out == 1


def _widths(model: PyTree, base: PyTree) -> dict[str, _Width]:
    """By path, for every floating array."""
    sizes, base_sizes = _sizes(model), _sizes(base)
    if sizes.keys() != base_sizes.keys():
        raise ValueError(
            f"mup: {sorted(sizes.keys() ^ base_sizes.keys())[0]} is a parameter of only one of the "
            "model and the base; they must be identical except for sizes."
        )
    return {
        path: _Width(size[0] / base_sizes[path][0], size[1] / base_sizes[path][1])
        for path, size in sizes.items()
    }


def _sizes(model: PyTree) -> dict[str, tuple[int, int]]:
    """Input and output sizes, by path. Vectors, such as biases, have input size 1."""
    found: dict[str, tuple[int, int]] = {}

    def visit(place: Place, x: Any) -> None:
        if is_shaped(x) and jnp.issubdtype(x.dtype, jnp.inexact):
            shape = x.shape[len(place.stacked) :]
            if isinstance(place.inside[-1], Convolution) and len(shape) == 3:
                shape = shape[1::-1]
            found[place.path] = (shape[-2] if len(shape) > 1 else 1, shape[-1] if shape else 1)

    map_with_place(visit, model)
    return found
