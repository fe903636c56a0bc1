"""Inside `jax.shard_map`, values have types that say over which mesh axes they vary."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree


def vary_alike(tree: PyTree, like: PyTree = None) -> PyTree:
    """Lets every array vary over the mesh axes that any of them, or of `like`, varies over.

    A loop must not change the type of what it carries, so what starts it (zeros, say) has to vary
    as what is added to it does. Outside of `jax.shard_map` nothing happens. The transpose, a sum
    over the devices, is JAX's.
    """
    arrays = jax.tree.leaves(eqx.filter((tree, like), eqx.is_array))
    axes = frozenset[Any]().union(*(_varying_axes(x) for x in arrays))

    def vary(x: Any) -> Any:
        missing = axes - _varying_axes(x) if eqx.is_array(x) else ()
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(vary, tree)


def _varying_axes(x: Any) -> frozenset[Any]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)
