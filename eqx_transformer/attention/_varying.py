"""Inside `jax.shard_map`, the type of a value says over which mesh axes it varies."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree


def vary_alike(tree: PyTree, like: PyTree = None) -> PyTree:
    """Makes every array vary over all mesh axes that any of them, or of `like`, varies over.

    A loop must not change the type of its carry, so the initial values (zeros, say) have to vary
    like what is added to them. Outside `jax.shard_map` this does nothing. JAX transposes it, to a
    sum over devices.
    """
    arrays = jax.tree.leaves(eqx.filter((tree, like), eqx.is_array))
    axes = frozenset[Any]().union(*(_varying_axes(x) for x in arrays))

    def vary(x: Any) -> Any:
        missing = axes - _varying_axes(x) if eqx.is_array(x) else ()
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(vary, tree)


def _varying_axes(x: Any) -> frozenset[Any]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)
