"""Models with interventions in their layers."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from ..stacks import Stack
from ._capture import check_any
from ._sites import Edit, Site, check_site, count, insert
from ._stacks import map_stacks

Model = TypeVar("Model")


def patched(
    model: Model, site: Site, edit: Callable[..., Any], *rows: Any, stack: str | None = None
) -> Model:
    """The model with an intermediate value of its layers changed.

        steered = patched(model, "output", lambda x, v: x + jnp.broadcast_to(v, x.shape), vectors)

    It is a model of the same kind: call it, train it, patch it again, generate with it. Patches
    apply in the order in which they were made.

    Arguments:

    - `model`: a model, a method of one (`model.encode`), a stack or a block.
    - `site`: which value; see `Site`.
    - `edit`: `edit(value, *rows_of_this_layer) -> value`, of the same shape and dtype.
    - `rows`: further arguments of `edit`: PyTrees of arrays with a leading axis, one entry for each
        layer that has such a value, in order; `jnp.arange(num_layers)` tells it the layer. Modules
        made by `eqx.filter_vmap` are such PyTrees. They are leaves of the new model, so `jax.vmap`,
        `jax.grad` and `eqx.filter_jit` treat them like its parameters. `edit` may close over what
        is the same for all layers.
    - `stack`: the path of the stack, if a model has several: `"encoder"`, `"decoder"`.

    Raises:

    - `ValueError` if there is no such site in the model, if there is not one row per layer, or if
        `edit` is a PyTree with arrays, such as a Module.
    """
    check_site("patched", site)
    total = check_any("patched", model, site, stack)
    if any(map(eqx.is_array, jax.tree.leaves(edit))):
        raise ValueError(
            f"patched: the function for {site!r} holds arrays, which a stack would mistake for "
            "those of its layers; close over it, lambda x: function(x), or pass it as rows, with a "
            "leading axis for the layers: patched(model, site, lambda x, f: f(x), functions)."
        )
    rows = jax.tree.map(lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x, rows)
    for row in filter(eqx.is_array, jax.tree.leaves(rows)):
        if row.shape[:1] != (total,):
            raise ValueError(
                f"patched: rows have shape {row.shape}, but there are {total} layers with "
                f"{site!r}; their first axis must have that length."
            )
    start = 0

    def visit(x: Any) -> Any:
        nonlocal start
        number = count(x, site)
        repeats = x.num_layers if isinstance(x, Stack) else None
        first = start
        start = first + number * (1 if repeats is None else repeats)

        def of_value(i: int) -> Any:
            at = first + i if repeats is None else slice(first + i, start, number)
            return jax.tree.map(lambda row: row[at] if eqx.is_array(row) else row, rows)

        edits = [Edit(site, edit, of_value(i)) for i in range(number)]
        if not edits:
            return x
        if isinstance(x, Stack):
            return eqx.tree_at(lambda x: x.blocks, x, insert(x.blocks, site, edits))
        return insert(x, site, edits)

    return map_stacks(visit, model, stack)


def replaced(
    model: Model,
    site: Site,
    values: Num[Array, "layers ..."],
    where: Bool[Array, "layers ..."],
    *,
    stack: str | None = None,
) -> Model:
    """The model with values replaced by those of another run: activation patching.

        _, other = capture(model, "heads")(another_prompt)
        where = jnp.zeros((num_layers, 1, num_heads), bool).at[1, 0, 2].set(True)
        replaced(model, "heads", other["heads"], where)(prompt)     # layer 1, head 2

    (Vig et al., Investigating Gender Bias in Language Models Using Causal Mediation Analysis, 2020;
    Meng et al., Locating and Editing Factual Associations in GPT, 2022.)

    Arguments:

    - `model`, `site`, `stack`: see `patched`.
    - `values`: with a leading axis for the layers, such as `capture` returns.
    - `where`: which of them to replace: its axes are those of `values`, or of length 1. Trailing
        axes may be left out, so `where[layer]` replaces the whole value of a layer.

    Raises:

    - `ValueError` where `patched` does.
    """
    lengths = zip(where.shape, values.shape, strict=False)
    if where.ndim > values.ndim or any(a not in (1, b) for a, b in lengths):
        raise ValueError(
            f"replaced: where has shape {where.shape} but values has {values.shape}; its leading "
            "axes must be those of values, or of length 1."
        )
    where = where.reshape(where.shape + (1,) * (values.ndim - where.ndim))
    return patched(model, site, _chosen, values, where, stack=stack)


def ablated(
    model: Model,
    keep: Num[Array, "layers heads"] | Bool[Array, "layers heads"],
    *,
    stack: str | None = None,
) -> Model:
    """The model with the output of each attention head multiplied by a number.

        without = 1 - jnp.eye(num_layers * num_heads).reshape(-1, num_layers, num_heads)
        losses = jax.vmap(lambda keep: loss(ablated(model, keep)))(without)

    Zero switches a head off. The gradient of a loss with respect to `keep`, at ones, estimates how
    much each head matters, for all of them at once (Michel et al., Are Sixteen Heads Really Better
    than One?, 2019, equation 2).

    Arguments:

    - `model`, `stack`: see `patched`.
    - `keep`: the factor of each head.

    Raises:

    - `ValueError` where `patched` does.
    """
    if keep.ndim != 2:
        raise ValueError(f"ablated: keep has shape {keep.shape} but must be [layers, heads].")
    return patched(model, "heads", _scaled, keep, stack=stack)


def _chosen(old: Array, new: Array, where: Array) -> Array:
    if new.shape != old.shape:
        raise ValueError(
            f"replaced: values have shape {new.shape} in a layer but must have {old.shape}; take "
            "them from an input of the same length."
        )
    return jnp.where(where, new.astype(old.dtype), old)


def _scaled(heads: Float[Array, "seq heads head_dim"], keep: Array) -> Array:
    if keep.shape != heads.shape[1:2]:
        raise ValueError(
            f"ablated: keep has {keep.shape[0]} entries for a layer that has {heads.shape[1]} "
            "heads."
        )
    return heads * jnp.broadcast_to(keep.astype(heads.dtype)[None, :, None], heads.shape)
