"""Published models, from their folders."""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import DTypeLike

from ._assembly import Assembly, host_memory
from ._family import Family
from ._fields import Fields
from ._hub import CONFIG, INDEX, WEIGHTS, checked_file, local_folder, read_index, read_json
from ._names import Part, Tensor, tensors
from ._pytree import named_arrays, skeleton, with_arrays
from ._safetensors import SafetensorsFile, TensorInfo
from .families import FAMILIES

Place = Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding]
"""A sharding for all arrays, or a function from path and shape to one."""

# Plain floating dtypes; those of eight bits need scales, which no family has.
_FLOATS: Final = ("float64", "float32", "bfloat16", "float16")
# More tensors than any published model has.
_MAX_TENSORS: Final = 1_000_000
_MAX_REPORT: Final = 200


def load_pretrained(
    path_or_repo_id: str | Path,
    *,
    dtype: DTypeLike | None = None,
    sharding: Place | None = None,
) -> Any:
    """A model with published weights, from a folder or from the Hugging Face hub.

    The folder has a `config.json`, which describes the model, and weights in safetensors files.
    Nothing else is read, and no code is loaded or run. Names, shapes and kinds of all tensors are
    compared with the model before any data is read. Then they are read one at a time, to where they
    belong; on a CPU that takes the memory of the model and of one tensor.

    Arguments:

    - `path_or_repo_id`: a folder; if there is no such folder, a repository `"name"` or
        `"owner/name"` on the hub, followed by `"@revision"` for a branch, tag or commit.
    - `dtype`: of the parameters; that of the file if not given.
    - `sharding`: where arrays go: a sharding for all, or a function of an array's path, such as
        `"stack.blocks.attention.q_proj.weight"`, and shape that returns one. Only what the devices
        of this process hold is kept. The default device if not given.

    Returns:

    A model of this library, without dropout.

    Raises:

    - `FileNotFoundError` if there is no such folder, or a file is missing in it.
    - `ImportError` if it is to be downloaded and huggingface_hub is not installed.
    - `ValueError` if the kind of model is not known, or `config.json` has fields that are not
        understood; if a file is damaged, or a link out of its folder; or with the list of all
        tensors that are missing, unexpected or of another shape.
    """
    folder = local_folder(path_or_repo_id, CONFIG, WEIGHTS, INDEX)
    with contextlib.ExitStack() as stack:
        family, config = _read_config(folder)
        found = _open(folder, stack)
        config = family.adapt(config, {_our_name(family, raw) for raw in found})
        # Needed before the model is built: a model in bfloat16 has another configuration.
        parameters = _common_dtype(found.values()) if dtype is None else jnp.dtype(dtype)
        if hasattr(config, "param_dtype"):
            config = config.replace(param_dtype=parameters.name)
        with _blamed(folder / CONFIG):
            model = skeleton(family.model, config)
            wanted = tensors(family.names(config), model, most=_MAX_TENSORS)
        found, copies = _by_our_names(family, config, wanted, found)
        _check(folder, wanted, found, copies)
        arrays = _read(model, family, wanted, found, copies, dtype, sharding)
    return with_arrays(model, arrays)


class _Stored(NamedTuple):
    """A tensor in an open file."""

    file: SafetensorsFile
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.file.tensors[self.name]

    def read(self, memory: np.ndarray | None = None) -> np.ndarray:
        return self.file.read(self.name, memory)


def _read_config(folder: Path) -> tuple[Family, Any]:
    values = read_json(folder, CONFIG)
    kind = values.get("model_type")
    if kind is None and "format" in values:
        raise ValueError(f"{folder / CONFIG} was written by save; use load.")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{folder / CONFIG} has model_type={kind!r}; the families that can be loaded are "
            f"{', '.join(sorted(FAMILIES))}."
        )
    family = FAMILIES[kind]
    architectures = values.get("architectures")
    for other in family.heads:
        if architectures == [other.architecture]:
            family = other
    fields = Fields(values, CONFIG)
    with _blamed(folder / CONFIG):
        config = family.read(fields)
        fields.finish()
    return family, config


@contextlib.contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """Turns errors about the content of a file into errors that name the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be turned into a model: {error}") from error


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    """All tensors by the names in the files."""
    index = None
    if not (folder / WEIGHTS).exists():
        if not (folder / INDEX).exists():
            raise FileNotFoundError(
                f"there is neither {WEIGHTS} nor {INDEX} in {folder}; other formats are not read."
            )
        index = read_index(folder)
    found: dict[str, _Stored] = {}
    for name in [WEIGHTS] if index is None else sorted(set(index.values())):
        file = stack.enter_context(SafetensorsFile(checked_file(folder, name)))
        for tensor in file.tensors:
            if tensor in found:
                raise ValueError(f"{tensor} is in {name} and in {found[tensor].file.path.name}.")
            if index is not None and index.get(tensor) != name:
                raise ValueError(
                    f"{tensor} is in {name}, but {INDEX} has it in {index.get(tensor)}."
                )
            found[tensor] = _Stored(file, tensor)
    absent = [] if index is None else sorted(index.keys() - found.keys())
    if absent:
        raise ValueError(f"{absent[0]} is not in {(index or {})[absent[0]]}, where {INDEX} has it.")
    return found


def _common_dtype(found: Iterable[_Stored]) -> np.dtype:
    """The dtype of most numbers."""
    counts: Counter[np.dtype] = Counter()
    for stored in found:
        if stored.info.dtype.name in _FLOATS:
            counts[stored.info.dtype] += stored.info.nbytes // stored.info.dtype.itemsize
    if not counts:
        return np.dtype(np.float32)
    return jax.dtypes.canonicalize_dtype(counts.most_common(1)[0][0])


def _our_name(family: Family, name: str) -> str:
    """The name of a tensor in the table of a family."""
    for pattern, replacement in family.renamed:
        name = re.sub(pattern, replacement, name)
    return name


def _by_our_names(
    family: Family, config: Any, wanted: Iterable[Tensor], found: Mapping[str, _Stored]
) -> tuple[dict[str, _Stored], dict[str, _Stored]]:
    """The tensors by the names of the family; separately, copies of tied tensors."""
    names = {tensor.name for tensor in wanted}
    depth = str(getattr(config, "num_layers", ""))
    ignored = [pattern.replace("{num_layers}", depth) for pattern in family.ignored]
    tensors: dict[str, _Stored] = {}
    copies: dict[str, _Stored] = {}
    for raw, stored in found.items():
        name = _our_name(family, raw)
        if name not in names and any(re.fullmatch(pattern, name) for pattern in ignored):
            continue
        is_copy = name not in names and family.tied.get(name) in names
        target = copies if is_copy else tensors
        if name in target:
            raise ValueError(f"{raw} and {target[name].name} are both names of {name}.")
        target[name] = stored
    return tensors, copies


def _check(
    folder: Path,
    wanted: Iterable[Tensor],
    found: Mapping[str, _Stored],
    copies: Mapping[str, _Stored],
) -> None:
    """Raises one error that lists all tensors that are not those of the model."""
    shapes = {tensor.name: tensor.shape for tensor in wanted}
    problems = [f"missing: {name} {list(shapes[name])}" for name in shapes.keys() - found.keys()]
    for name, stored in [*found.items(), *copies.items()]:
        info = stored.info
        if name not in shapes and name not in copies:
            problems.append(f"unexpected: {stored.name} {info}")
        elif name in shapes and info.shape != shapes[name]:
            problems.append(
                f"different: {stored.name} is {info} in the file but {list(shapes[name])} in the "
                "model"
            )
        elif info.dtype.name not in _FLOATS:
            problems.append(f"different: {stored.name} is {info}, which is not one of {_FLOATS}")
    if problems:
        shown = sorted(problems)[:_MAX_REPORT]
        more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise ValueError("\n  ".join([f"{folder} does not fit; nothing was read:", *shown, *more]))


def _read(
    model: Any,
    family: Family,
    wanted: Iterable[Tensor],
    found: Mapping[str, _Stored],
    copies: Mapping[str, _Stored],
    dtype: DTypeLike | None,
    sharding: Place | None,
) -> list[jax.Array]:
    """The arrays of the model, tensor by tensor."""
    leaves = named_arrays(model)
    dtypes: dict[str, Any] = {}
    parts: Counter[str] = Counter()
    for tensor in wanted:
        for part in tensor.parts:
            parts[part.path] += 1
            stored = found[tensor.name].info.dtype
            dtypes[part.path] = jnp.promote_types(dtypes.get(part.path, stored), stored)
    originals: dict[str, list[str]] = {}
    for copied in copies:
        originals.setdefault(family.tied[copied], []).append(copied)
    unfinished: dict[str, Assembly] = {}
    arrays: dict[str, jax.Array] = {}
    # One buffer for all of them: allocating memory costs more than reading.
    memory = host_memory(max((found[t.name].info.nbytes for t in wanted), default=0))
    for tensor in wanted:
        data = found[tensor.name].read(memory)
        for copied in originals.get(tensor.name, ()):
            if not _equal(data, copies[copied].read()):
                raise ValueError(
                    f"{copied} must be equal to {tensor.name}, to which it is tied, but is not."
                )
        for view, part in zip(tensor.views(data), tensor.parts, strict=True):
            if part.path not in unfinished:
                leaf = leaves[part.path]
                place = sharding(part.path, leaf) if callable(sharding) else sharding
                kind = _dtype_of(leaf.dtype, dtypes[part.path] if dtype is None else dtype)
                unfinished[part.path] = Assembly(leaf.shape, kind, place)
            unfinished[part.path].write(part.index, _as_part(view, part))
            parts[part.path] -= 1
            if not parts[part.path]:
                arrays[part.path] = unfinished.pop(part.path).finish()
    return [arrays[path] for path in leaves]


def _dtype_of(leaf: np.dtype, floating: DTypeLike) -> np.dtype:
    """The dtype of an array: that of integers is not for the user to choose."""
    if not jnp.issubdtype(leaf, jnp.floating):
        return leaf
    return np.dtype(jax.dtypes.canonicalize_dtype(floating))


def _as_part(view: np.ndarray, part: Part) -> np.ndarray:
    part_of_file = view.reshape(part.shape)
    if jnp.issubdtype(part.dtype, jnp.floating):
        return part_of_file
    # Bits of numbers that no optimiser may change; see `MixtureOfExperts.with_selection_bias`.
    return part_of_file.astype(np.float32).view(part.dtype)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Bitwise, so that NaN equals itself."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return bool((a.reshape(-1).view(np.uint8) == b.reshape(-1).view(np.uint8)).all())
