"""Places arrays on devices by the rules."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PRNGKeyArray, PyTree

from ._rules import Rules, check_axes, mesh_size, specs

Model = TypeVar("Model")


def shard(model: Model, mesh: Mesh, rules: Rules | None = None) -> Model:
    """The model with its arrays split over devices.

    It is the same model and used in the same way: under `jax.jit`, all devices compute. The state
    of an optimiser, which has the same paths as the parameters, is split alike by this function.

    Arguments:

    - `model`: the model, or any PyTree that contains models.
    - `mesh`: the devices. Axes of type `Explicit`, like those of `jax.make_mesh`, are treated as
        `Auto`: layers leave the sharding of what they compute to the compiler.
    - `rules`: `Rules()` if not given.

    Raises:

    - `ValueError` like `specs`.
    """
    arrays, static = eqx.partition(model, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, shardings(arrays, mesh, rules)), static)


def init_sharded(
    make: Callable[..., Model], mesh: Mesh, rules: Rules | None = None, *, key: PRNGKeyArray
) -> Model:
    """Builds a model that is split from the start: no device, and no host, ever holds all of it.

    The weights are those that `make(key=key)` gives, up to rounding.

    Arguments:

    - `make`: `make(key=key)` builds the model, e.g. `equinox.Partial(Llama, config)`.
    - `mesh`, `rules`: as in `shard`.
    - `key`: for the initial weights.

    Raises:

    - `ValueError` like `specs`.
    """
    shapes = eqx.filter_eval_shape(lambda key: make(key=key), key)
    _, static = eqx.partition(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def arrays(key: PRNGKeyArray) -> PyTree:
        return eqx.filter(make(key=key), eqx.is_array)

    return eqx.combine(jax.jit(arrays, out_shardings=shardings(shapes, mesh, rules))(key), static)


def batch_sharding(
    mesh: Mesh, rules: Rules | None = None, *, sequence: bool = False
) -> NamedSharding:
    """How the first axis of every array in a batch is split, for `jax.device_put`.

    With several hosts, which have a part of the batch each, pass it to
    `jax.make_array_from_process_local_data`.

    Arguments:

    - `mesh`, `rules`: as in `shard`.
    - `sequence`: whether the second axis is a sequence, which is split for `context_parallel`.
    """
    rules = check_axes(mesh, rules)
    names = tuple(name for name in rules.batch if mesh_size(mesh, name) > 1)
    entries = [names if names else None]
    if sequence and rules.context is not None and mesh_size(mesh, rules.context) > 1:
        entries.append((rules.context,))
    return NamedSharding(auto(mesh), P(*entries) if any(entries) else P())


def shardings(model: PyTree, mesh: Mesh, rules: Rules | None) -> PyTree:
    """The `NamedSharding` of every array."""
    mesh = auto(mesh)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs(model, mesh, rules),
        is_leaf=lambda x: isinstance(x, P),
    )


def mesh_here(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """The mesh, or inside `jax.shard_map` the current one, with its manual axes."""
    here = jax.sharding.get_abstract_mesh()
    return here if here.manual_axes else mesh


def auto(mesh: Mesh) -> Mesh:
    """The same devices, with all axes left to the compiler."""
    kinds: Any = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
