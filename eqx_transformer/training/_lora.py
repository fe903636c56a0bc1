"""Low-rank adapters: a few new parameters beside frozen weights."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray, PyTree

from .._precision import accumulation_dtype
from ..nn import MLP, AbstractAttention, AbstractLinear, CrossAttention, GatedMLP, Linear
from ..nn._along_last import along_last

Model = TypeVar("Model")


class LoRALinear(AbstractLinear):
    """A linear map with an adapter of low rank, and optionally a magnitude for every output.

        LoRA   y = base(x) + scale * (x @ a) @ b
        DoRA   y = x @ (magnitude * direction / norm(direction)) + bias
               direction = base.weight + scale * a @ b          norm: that of every column

    The base can be any `AbstractLinear`, also one with quantised weights. `b` is initially zero, so
    that the adapter initially changes nothing. (Hu et al., LoRA, 2021, equation 3; Liu et al.,
    DoRA, 2024, equation 5. Unlike in section 4.3 there, gradients go through the norm.)
    """

    base: AbstractLinear
    a: Float[Array, "in_features rank"]
    b: Float[Array, "rank out_features"]
    magnitude: Float[Array, " out_features"] | None
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        base: AbstractLinear,
        rank: int,
        *,
        alpha: float | int,
        dora: bool = False,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `base`: the map to adapt.
        - `rank`: of the adapter.
        - `alpha`: `scale` is `alpha / rank`.
        - `dora`: whether there are magnitudes, initially the norms of the columns.
        - `dtype`: of the new parameters; that of the base's weight if not given.
        - `key`: for `a`, which is uniform within `1 / sqrt(in_features)`, as in the code published
            with LoRA.

        Raises:

        - `ValueError` if `rank` is not between 1 and the smaller size of the weight.
        """
        weight = _weight_shape(base)
        in_features, out_features = weight.shape
        if not 1 <= rank <= min(weight.shape):
            raise ValueError(
                f"LoRALinear: rank={rank} must be at least 1 and at most {min(weight.shape)}, the "
                f"smaller size of the weight {weight.shape}."
            )
        if not 0 < alpha < math.inf:
            raise ValueError(
                f"LoRALinear: alpha={alpha} must be positive and finite; with 0 nothing is learned."
            )
        dtype = weight.dtype if dtype is None else jnp.dtype(dtype)
        init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.base = base
        self.a = init(key, (in_features, rank), dtype)
        self.b = jnp.zeros((rank, out_features), dtype)
        self.magnitude = _column_norms(base.weight).astype(dtype) if dora else None
        self.scale = float(alpha) / rank

    @property
    def weight(self) -> Float[Array, "*stack in_features out_features"]:
        """The weight of the equivalent `Linear`."""
        direction = self._direction()
        if self.magnitude is not None:
            direction = direction * self._gain(direction)[..., None, :]
        return direction.astype(_weight_shape(self.base).dtype)

    @property
    def bias(self) -> Float[Array, "*stack out_features"] | None:
        """That of the base."""
        return self.base.bias

    def __call__(
        self, x: Float[Array, "*batch in_features"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out_features"]:
        """Maps the last axis of `x`. `key` is ignored, as in Equinox."""
        y = self.base(x)
        y = y + self.scale * ((x @ self.a.astype(x.dtype)) @ self.b.astype(x.dtype))
        if self.magnitude is None:
            return y
        # Recomputed in the backward pass: its intermediates are as large as the weight.
        gain = eqx.filter_checkpoint(lambda layer: layer._gain(layer._direction()))(self)
        gain = along_last("LoRALinear", gain, y)
        y = y * gain
        if self.bias is not None:
            # The base has added the bias, which must not be scaled.
            y = y + (1 - gain) * along_last("LoRALinear", self.bias, y)
        return y

    def _direction(self) -> Array:
        weight = self.base.weight
        dtype = accumulation_dtype(weight.dtype)
        product = jnp.matmul(
            self.a.astype(dtype), self.b.astype(dtype), precision=jax.lax.Precision.HIGHEST
        )
        return weight.astype(dtype) + self.scale * product

    def _gain(self, direction: Array) -> Array:
        """The factor on every column."""
        assert self.magnitude is not None
        norms = _column_norms(direction)
        return self.magnitude.astype(norms.dtype) / jnp.where(norms == 0, 1, norms)


def add_lora(
    model: Model,
    rank: int,
    *,
    alpha: float | int,
    where: Callable[[str], bool] | None = None,
    dora: bool = False,
    dtype: DTypeLike | None = None,
    key: PRNGKeyArray,
) -> Model:
    """The model with adapters on its linear maps: initially the same function.

    Each layer of a `Stack`, and each expert, gets adapters of its own. Train what `lora_filter`
    selects, and `merge_lora` in the end.

    Arguments:

    - `model`: a layer, a stack, a model.
    - `rank`, `alpha`, `dora`, `dtype`: see `LoRALinear`.
    - `where`: which maps, given their paths, e.g. `lambda path: path.endswith("q_proj")` for
        `"stack.blocks.attention.q_proj"`. If not given, all within attention and MLPs, those of
        experts too; not routers, embeddings and heads.
    - `key`: for the adapters; split once for each map, layer and expert.

    Raises:

    - `ValueError` if there is no such map, one of them has an adapter already, or `rank` is more
        than one of them allows.
    """
    found = _linear_maps(model, where)
    if not found:
        raise ValueError(
            "add_lora: there is no linear map to adapt; `where` is given paths such as "
            f"{[path for path, _ in _linear_maps(model, lambda path: True)][:3]}."
        )
    new = []
    for (path, layer), k in zip(found, jax.random.split(key, len(found)), strict=True):
        if isinstance(layer, LoRALinear):
            raise ValueError(f"add_lora: {path} has an adapter already; merge_lora first.")
        shape = _weight_shape(layer).shape
        if not 1 <= rank <= min(shape[-2:]):
            raise ValueError(
                f"add_lora: rank={rank} must be at least 1 and at most {min(shape[-2:])}, the "
                f"smaller size of {path}.weight {shape[-2:]}; leave that map out with `where`."
            )

        def adapted(layer: AbstractLinear, key: PRNGKeyArray) -> LoRALinear:
            return LoRALinear(layer, rank, alpha=alpha, dora=dora, dtype=dtype, key=key)

        for _ in shape[:-2]:
            adapted = eqx.filter_vmap(adapted)
        # With the original arrays, not the copies that `vmap` returned.
        lora = adapted(layer, jax.random.split(k, shape[:-2]))
        new.append(eqx.tree_at(lambda x: x.base, lora, layer))
    return eqx.tree_at(lambda model: [x for _, x in _linear_maps(model, where)], model, new)


def merge_lora(model: Model) -> Model:
    """The model with every adapter merged into a plain `Linear`: the same function up to rounding.

    Raises:

    - `ValueError` if there are no adapters.
    """

    def merged(node: Any) -> Any:
        if not _is_lora(node):
            return node
        weight, bias = node.weight, node.bias
        plain = Linear(1, 1, use_bias=bias is not None, key=jax.random.key(0))
        if bias is None:
            return eqx.tree_at(lambda x: x.weight, plain, weight)
        return eqx.tree_at(lambda x: (x.weight, x.bias), plain, (weight, bias))

    _check_any("merge_lora", model)
    return jax.tree.map(merged, model, is_leaf=_is_lora)


def lora_filter(model: PyTree) -> PyTree:
    """Which leaves belong to adapters: `adapters, rest = eqx.partition(model, lora_filter(model))`.

    Then no gradient is computed for the rest. The adapters are a PyTree that can be saved and
    loaded alone, and `eqx.combine` puts the two together.

    Returns:

    A PyTree of the same structure, with a boolean for every leaf.

    Raises:

    - `ValueError` if there are no adapters.
    """

    def mark(node: Any) -> Any:
        spec = jax.tree.map(lambda _: False, node)
        if not _is_lora(node):
            return spec
        count = 2 if node.magnitude is None else 3
        return eqx.tree_at(lambda x: [x.a, x.b, x.magnitude][:count], spec, [True] * count)

    _check_any("lora_filter", model)
    return jax.tree.map(mark, model, is_leaf=_is_lora)


def _linear_maps(
    model: Any, where: Callable[[str], bool] | None
) -> list[tuple[str, AbstractLinear]]:
    """The maps to adapt, by path."""

    def is_layer(x: Any) -> bool:
        return isinstance(x, AbstractAttention | CrossAttention | MLP | GatedMLP)

    def is_linear(x: Any) -> bool:
        return isinstance(x, AbstractLinear)

    def nodes(tree: Any, kind: Callable[[Any], bool]) -> list[tuple[Any, Any]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=kind)
        return [(path, x) for path, x in leaves if kind(x)]

    if where is None:
        found = [
            (outer + inner, x)
            for outer, layer in nodes(model, is_layer)
            for inner, x in nodes(layer, is_linear)
        ]
    else:
        found = nodes(model, is_linear)
    named = [(jax.tree_util.keystr(p, simple=True, separator="."), x) for p, x in found]
    return [(path, x) for path, x in named if where is None or where(path)]


def _is_lora(x: Any) -> bool:
    return isinstance(x, LoRALinear)


def _check_any(name: str, model: Any) -> None:
    if not any(map(_is_lora, jax.tree.leaves(model, is_leaf=_is_lora))):
        raise ValueError(f"{name}: the model has no adapters; give it some with add_lora.")


def _weight_shape(layer: AbstractLinear) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the weight, which may be expensive to compute."""
    return eqx.filter_eval_shape(lambda layer: layer.weight, layer)


def _column_norms(weight: Array) -> Array:
    wide = weight.astype(accumulation_dtype(weight.dtype))
    squares = jnp.sum(jnp.square(wide), axis=-2)
    # The derivative of a root is infinite at zero.
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))
