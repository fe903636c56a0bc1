"""Maximal update parametrisation: what was tuned for a narrow model stays right for a wide one."""

import math
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
from jaxtyping import PyTree

from ..models._places import Place, is_shaped, map_with_place
from ..nn import Convolution, Embedding

Model = TypeVar("Model")


def mup_init(model: Model, base: PyTree) -> Model:
    """A newly built model with the initial weights of the maximal update parametrisation.

        embedding    width / base width  times its variance, which then is the same in all widths
        head         base width / width  times its variance, and so for all that lead from the width
                     to a size that stays: routers, keys and values of as many heads of a size
        other maps   as they are: variance 1 / fan_in

    (Yang et al., 2022, "Tensor Programs V", table 3. What does not depend on the width is as in
    `base`, so a model of the base width does not change.) Two things are for the configuration: if
    heads become larger, and not more, scores must be divided by their size and not its root,
    `query_scale=base_head_dim**0.5 / head_dim`; and the head must have weights of its own.

    Arguments:

    - `model`: the model.
    - `base`: one of the width that was tuned, or only its shapes, as of
        `equinox.filter_eval_shape`; alike in all but sizes.

    Raises:

    - `ValueError` if the two do not have the same parameters, or if no map of its own leads out of
        the width, as with `tie_embeddings=True`.
    """
    widths = _widths(model, base)
    # Others than the head may lead to a size that stays: routers, keys of as many heads.
    config, head = getattr(model, "config", None), getattr(model, "head", None)
    tied = head is None and getattr(config, "tie_embeddings", False)
    is_wider = any(w.fan_out != 1 for w in widths.values())
    if is_wider and (tied or not any(map(_is_head, widths.values()))):
        raise ValueError(
            "mup_init: no head leads from the width to a size that stays; one that is the "
            "embedding cannot be scaled apart from it, so use tie_embeddings=False."
        )

    def scaled(place: Place, x: Any) -> Any:
        width = widths.get(place.path)
        if width is None:
            return x
        if _is_head(width):
            return x / math.sqrt(width.fan_in)
        # The library's standard deviation is one over the root of the size of the vectors.
        is_table = isinstance(place.inside[-1], Embedding)
        return x * math.sqrt(width.fan_out) if is_table else x

    return map_with_place(scaled, model)


def mup_learning_rates(model: PyTree, base: PyTree) -> PyTree[float | None]:
    """Factors on the learning rate of every parameter, for Adam and the like.

    `base fan_in / fan_in` for the weights of linear maps, the output head among them, and one for
    embeddings, norms and biases. (Yang et al., 2022, table 3.) In optax, before weight decay,
    which then does not depend on the width:

        factors = mup_learning_rates(model, base)
        optax.chain(
            optax.scale_by_adam(),
            optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)),
            optax.add_decayed_weights(0.1, weight_decay_mask),
            optax.scale_by_learning_rate(schedule),
        )

    Arguments are those of `mup_init`; shapes are enough for both.

    Returns:

    A PyTree of the same structure with a number for every floating array, and `None` for all else.
    """
    widths = _widths(model, base)

    def factor(place: Place, _: Any) -> float | None:
        return 1 / widths[place.path].fan_in if place.path in widths else None

    return map_with_place(factor, model)


class _Width(NamedTuple):
    """How many times the base a map's sizes are."""

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
            "model and the base; they must be alike in all but sizes."
        )
    return {
        path: _Width(size[0] / base_sizes[path][0], size[1] / base_sizes[path][1])
        for path, size in sizes.items()
    }


def _sizes(model: PyTree) -> dict[str, tuple[int, int]]:
    """Sizes before and after, by path. Vectors come from a single number, as biases do."""
    found: dict[str, tuple[int, int]] = {}

    def visit(place: Place, x: Any) -> None:
        if is_shaped(x) and jnp.issubdtype(x.dtype, jnp.inexact):
            shape = x.shape[len(place.stacked) :]
            if isinstance(place.inside[-1], Convolution) and len(shape) == 3:
                shape = shape[1::-1]
            found[place.path] = (shape[-2] if len(shape) > 1 else 1, shape[-1] if shape else 1)

    map_with_place(visit, model)
    return found
