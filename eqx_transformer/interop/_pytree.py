"""Arrays of a PyTree in a safetensors file, keyed by their paths."""

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

Tree = TypeVar("Tree")

# A header is a few hundred bytes a tensor; the format itself stops here too.
_MAX_HEADER = 100_000_000
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def save_pytree(tree: Any, path: str | Path) -> None:
    """Writes the arrays of a PyTree to a safetensors file, keyed by their paths.

    The file appears whole or not at all: it is written beside `path`, flushed to the disk, and
    renamed. What is not an array (functions, Python numbers) is not written; `load_pytree` takes
    it from a PyTree of the same structure.

    Arguments:

    - `tree`: any PyTree.
    - `path`: of the file; an existing one is replaced.

    Raises:

    - `ImportError` without safetensors.
    - `ValueError` for an array whose dtype the format has no name for, such as a PRNG key.
    """
    _require_safetensors()
    from safetensors.numpy import save_file

    arrays = named_arrays(tree)
    for name, x in arrays.items():
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"save_pytree: {name} is a PRNG key; save jax.random.key_data of it instead."
            )
        if x.dtype.name not in _DTYPES.values():
            raise ValueError(f"save_pytree: {name} has dtype {x.dtype}, which cannot be saved.")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({k: np.asarray(x, order="C") for k, x in arrays.items()}, temporary)
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_pytree(path: str | Path, like: Tree) -> Tree:
    """Reads what `save_pytree` wrote into a PyTree of the same structure.

    Names and shapes are compared before any data is read, and so is whether each array is
    floating, integer or boolean. The width is that of the file: what was saved in bfloat16 comes
    back in bfloat16.

    Arguments:

    - `path`: of the file.
    - `like`: a PyTree with arrays, or `jax.ShapeDtypeStruct`s, where arrays go.

    Returns:

    `like` with its arrays replaced.

    Raises:

    - `ImportError` without safetensors.
    - `ValueError` if the file is damaged, or with the list of all that is missing, unexpected or
        of another shape.
    """
    _require_safetensors()
    from safetensors import safe_open

    path = Path(path)
    expected = named_arrays(like)
    _check_names(path, read_header(path), expected)
    with safe_open(path, framework="numpy") as file:
        leaves = [jnp.asarray(file.get_tensor(name)) for name in expected]
    structure = jax.tree.structure(eqx.filter(like, _is_array))
    arrays = jax.tree.unflatten(structure, leaves)
    return eqx.combine(arrays, eqx.filter(like, _is_array, inverse=True))


def named_arrays(tree: Any) -> dict[str, Any]:
    """The arrays of a PyTree (or their shapes) by dotted path, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, _is_array))
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor in a safetensors file, without reading their data.

    Raises:

    - `ValueError` if the file is not whole, or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{path} is damaged: its header would be {length} bytes long in a file of {size}."
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        tensors = {k: v for k, v in header.items() if k != "__metadata__"}
        described = {
            name: (_DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"]))
            for name, entry in tensors.items()
        }
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read ({error}).") from error
    if 8 + length + end != size:
        raise ValueError(
            f"{path} is damaged: its header describes {8 + length + end} bytes, but it has {size}."
        )
    return described


def replace(source: Path, target: Path) -> None:
    """Renames a file over another so that a crash leaves one of the two, whole, on the disk."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _check_names(
    path: Path, found: Mapping[str, tuple[str, tuple[int, ...]]], expected: Mapping[str, Any]
) -> None:
    problems = [
        f"missing: {name} {_describe(expected[name])}" for name in expected.keys() - found.keys()
    ]
    problems += [f"unexpected: {name} {found[name]}" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        dtype, shape = found[name]
        if shape != expected[name].shape or _kind(dtype) != _kind(expected[name].dtype):
            problems.append(
                f"different: {name} is {dtype}{list(shape)} in the file but "
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


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, np.ndarray | jax.ShapeDtypeStruct)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(names) != len(set(names)):
        raise ValueError("a name stands in it twice")
    return dict(pairs)


def _require_safetensors() -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError('Saving and loading need safetensors: pip install "eqx_transformer[io]".')
