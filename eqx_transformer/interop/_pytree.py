"""Arrays of a PyTree in a safetensors file, keyed by their paths."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._safetensors import DTYPES, SafetensorsFile, TensorInfo, write_safetensors

Tree = TypeVar("Tree")


def save_pytree(tree: Any, path: str | Path) -> None:
    """Writes the arrays of a PyTree to a safetensors file, keyed by their paths.

    The file is replaced atomically: it is written beside `path`, flushed to the disk, and renamed.
    What is not an array (functions, Python numbers) is not written; `load_pytree` takes it from a
    PyTree of the same structure.

    Arguments:

    - `tree`: any PyTree.
    - `path`: of the file; an existing one is replaced.

    Raises:

    - `ValueError` for an array whose dtype the format has no name for, such as a PRNG key.
    """
    arrays = named_arrays(tree)
    for name, x in arrays.items():
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"save_pytree: {name} is a PRNG key; save jax.random.key_data of it instead."
            )
        if x.dtype.name not in DTYPES.values():
            raise ValueError(f"save_pytree: {name} has dtype {x.dtype}, which cannot be saved.")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shapes = {name: (np.dtype(x.dtype), x.shape) for name, x in arrays.items()}
    try:
        temporary.unlink(missing_ok=True)
        write_safetensors(temporary, shapes, arrays.__getitem__)
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_pytree(path: str | Path, like: Tree) -> Tree:
    """Reads what `save_pytree` wrote into a PyTree of the same structure.

    Before any data is read, names and shapes are compared, and whether each array is floating,
    integer or boolean. The width is that of the file: arrays saved in bfloat16 are loaded in
    bfloat16.

    Arguments:

    - `path`: of the file.
    - `like`: a PyTree with arrays, or `jax.ShapeDtypeStruct`s, in place of those to load.

    Returns:

    `like` with its arrays replaced.

    Raises:

    - `ValueError` if the file is damaged, or with a list of all arrays that are missing, unexpected
        or of another shape.
    """
    path = Path(path)
    expected = named_arrays(like)
    with SafetensorsFile(path) as file:
        _check_names(path, file.tensors, expected)
        leaves = [jnp.asarray(file.read(name)) for name in expected]
    return with_arrays(like, leaves)


def skeleton(make: Callable[..., Tree], config: Any) -> Tree:
    """The model of a configuration, with shapes in place of arrays."""
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    return eqx.filter_eval_shape(lambda key: make(config, key=key), key)


def named_arrays(tree: Any) -> dict[str, Any]:
    """The arrays of a PyTree (or their shapes) by dotted path, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, is_array))
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def with_arrays(tree: Tree, arrays: list[Any]) -> Tree:
    """The PyTree with other arrays, in the order of its leaves."""
    structure = jax.tree.structure(eqx.filter(tree, is_array))
    other = jax.tree.unflatten(structure, arrays)
    return eqx.combine(other, eqx.filter(tree, is_array, inverse=True))


def replace(source: Path, target: Path) -> None:
    """Renames a file over another so that a crash leaves one of the two intact on the disk."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _check_names(path: Path, found: Mapping[str, TensorInfo], expected: Mapping[str, Any]) -> None:
    problems = [
        f"missing: {name} {_describe(expected[name])}" for name in expected.keys() - found.keys()
    ]
    problems += [f"unexpected: {name} {found[name]}" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        info = found[name]
        if info.shape != expected[name].shape or _kind(info.dtype) != _kind(expected[name].dtype):
            problems.append(
                f"different: {name} is {info} in the file but "
                f"{_describe(expected[name])} in the model"
            )
    if problems:
        raise ValueError(
            "\n  ".join([f"{path} does not fit; nothing was read:", *sorted(problems)])
        )


def _describe(x: Any) -> str:
    return f"{x.dtype.name}{list(x.shape)}"


def _kind(dtype: Any) -> str:
    kinds = {"float": jnp.floating, "integer": jnp.integer, "bool": jnp.bool}
    return next(name for name, kind in kinds.items() if jnp.issubdtype(jnp.dtype(dtype), kind))


def is_array(x: Any) -> bool:
    """Whether a leaf is an array, or the shape and dtype of one."""
    return eqx.is_array(x) or isinstance(x, np.ndarray | jax.ShapeDtypeStruct)
