"""Intermediate values of layers, as outputs."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from ..stacks import AbstractBlock, Stack
from ._sites import Edit, Site, check_site, count, insert
from ._stacks import AbstractStandIn, stacks_of, with_stand_ins


def capture(
    model: Callable[..., Any], *sites: Site, stack: str | None = None
) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """The same function, which also returns intermediate values of its layers.

        logits, seen = capture(model, "output", "weights")(tokens)
        seen["weights"][3]                                      # [heads, seq, seq] of layer 3

    What the model returns does not change, and nothing is computed twice except `"weights"`, which
    fast attention never materialises. It is a function like the model: batch it by `jax.vmap`,
    compile it by `eqx.filter_jit`, differentiate it. In a `patched` model, the values are those
    after the patch.

    Arguments:

    - `model`: a model, a method of one (`model.encode`), a stack or a block.
    - `sites`: which values; see `Site`.
    - `stack`: the path of the stack to look into, if a model has several whose values differ in
        shape: `"encoder"`, `"decoder"`.

    Returns:

    A function with the arguments of `model`. It returns what `model` returns, and for every site an
    array with a leading axis: one entry for each layer that has such a value, in order.

    Raises:

    - `ValueError` if there is no such site in the model.
    """
    if not sites:
        raise ValueError("capture: name at least one site, e.g. capture(model, 'output').")
    for site in sites:
        check_site("capture", site)
        check_any("capture", model, site, stack)
    return _Capture(model, sites, stack)


def check_any(owner: str, model: Any, site: str, stack: str | None) -> int:
    """How many values of a site there are; at least one."""
    found = stacks_of(model, stack)
    if not found:
        inside = "" if stack is None else f" at {stack!r}"
        raise ValueError(f"{owner}: {type(model).__name__} has no stack of blocks{inside}.")
    total = sum(_length(x) * count(x, site) for x in found)
    if not total:
        raise ValueError(f"{owner}: no layer of {type(model).__name__} has {site!r}.")
    return total


def _length(x: Any) -> int:
    return x.num_layers if isinstance(x, Stack) else 1


class _Capture(eqx.Module):
    """See `capture`."""

    model: Callable[..., Any]
    sites: tuple[str, ...] = eqx.field(static=True)
    stack: str | None = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Array]]:
        # Lives as long as this call, and is filled while it is traced.
        seen: list[dict[str, list[Array]]] = []

        def recording(x: Any) -> AbstractStandIn:
            return _Recording(x, self.sites, seen.append)

        out = with_stand_ins(recording, self.model, self.stack)(*args, **kwargs)
        if _is_traced(seen) and not _is_traced(out):
            raise ValueError(
                "capture: the model calls its layers inside eqx.filter_jit, eqx.filter_vmap or the "
                "like, which values cannot leave; transform what capture returns instead, e.g. "
                "eqx.filter_vmap(capture(model, 'output'))."
            )
        return out, {site: _joined(site, seen) for site in self.sites}


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def _joined(site: str, seen: list[dict[str, list[Array]]]) -> Array:
    parts = [part for values in seen for part in values[site]]
    if not parts:
        raise ValueError(f"capture: no layer that has {site!r} was called.")
    shapes = dict.fromkeys(part.shape[1:] for part in parts)
    if len(shapes) > 1:
        raise ValueError(
            f"capture: the values of {site!r} have different shapes in different layers, "
            f"{' and '.join(map(str, shapes))}; choose some of them with stack=."
        )
    return jnp.concatenate(parts)


class _Recording(AbstractStandIn):
    """Passes on what the blocks compute, and records it."""

    inner: Any
    sites: tuple[str, ...] = eqx.field(static=True)
    keep: Callable[[dict[str, list[Array]]], None]

    def __call__(self, x: Float[Array, "seq d_model"], **options: Any) -> Array:
        def apply(block: Any, x: Array, **options: Any) -> tuple[Array, None]:
            return block(x, **options), None

        return self.apply_with(apply, x, **options)[0]

    def apply_with_stats(self, x: Array, **options: Any) -> tuple[Array, Any]:
        def apply(block: Any, x: Array, **options: Any) -> tuple[Array, Any]:
            return block.apply_with_stats(x, **options)

        return self.apply_with(apply, x, **options)

    def extend(self, x: Array, cache: Any, **options: Any) -> tuple[Array, Any]:
        raise ValueError(
            "capture: values are captured for a whole sequence, not with a cache; call the model "
            "on all tokens so far, which gives the same."
        )

    def apply_with(
        self, apply: Callable[..., tuple[Array, Any]], x: Array, **options: Any
    ) -> tuple[Array, Any]:
        def recorded(block: AbstractBlock, x: Array, **options: Any) -> tuple[Array, Any]:
            block, values = _recorders(block, self.sites)
            x, stats = apply(block, x, **options)
            return x, (stats, {site: jnp.stack(values[site]) for site in values})

        if isinstance(self.inner, Stack):
            x, (stats, values) = self.inner.apply_with(recorded, x, **options)
        else:
            x, (stats, values) = recorded(self.inner, x, **options)
            values = jax.tree.map(lambda v: v[None], values)
        # [layers, values in a layer, ...]
        merged = {site: v.reshape(-1, *v.shape[2:]) for site, v in values.items()}
        self.keep({site: [merged[site]] if site in merged else [] for site in self.sites})
        return x, stats


def _recorders(
    block: AbstractBlock, sites: tuple[str, ...]
) -> tuple[AbstractBlock, dict[str, list[Any]]]:
    """The block, and lists with a place for every value, which it fills when called."""
    values: dict[str, list[Any]] = {}

    def recorder(place: list[Any], i: int) -> Callable[[Array], Array]:
        def record(value: Array) -> Array:
            place[i] = value
            return value

        return record

    for site in sites:
        number = count(block, site)
        if number:
            values[site] = place = [None] * number
            block = insert(block, site, [Edit(site, recorder(place, i)) for i in range(number)])
    return block, values
