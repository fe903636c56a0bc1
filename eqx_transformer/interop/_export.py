"""Models of this library as folders that transformers loads."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from ._assembly import copy
from ._family import Family, as_it_is
from ._fields import Fields
from ._hub import CONFIG, INDEX, WEIGHTS
from ._names import Tensor, tensors
from ._pytree import named_arrays, replace, skeleton
from ._safetensors import write_safetensors
from .families import FAMILIES

# The size of the files into which transformers divides a large model.
_MAX_BYTES: Final = 5_000_000_000
_MAX_TENSORS: Final = 1_000_000
# More than all fields there are.
_UNSPEAKABLE: Final = 1_000
_WEIGHTS: Final = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def save_pretrained(model: Any, directory: str | Path, *, model_type: str | None = None) -> None:
    """Saves a model so that transformers can load it, and `load_pretrained` too.

    The weights keep their dtype and their bits; `config.json` describes the model in the
    terms of a family of transformers that computes the same. Training options, such as dropout, are
    not written, and there is no tokenizer. Tensors are written one at a time, into several files if
    they exceed 5 GB. To continue training, use `save`, which is safe against crashes.

    Arguments:

    - `model`: one of this library's models.
    - `directory`: created if it does not exist. Existing weights, under the names that transformers
        uses, are replaced.
    - `model_type`: the family, such as `"phi3"`; if not given, the first one that fits.

    Raises:

    - `ValueError` if no family of transformers (or not this one) computes what the model does,
        saying what the nearest one lacks; or if the model is no longer what its config builds.
    """
    family = _family_of(model, model_type)
    config = _trained(model.config)
    wanted = _tensors(family, config)
    leaves = named_arrays(model)
    expected = named_arrays(skeleton(family.model, model.config))
    changed = [
        path
        for path in {**expected, **leaves}
        if path not in expected or path not in leaves or expected[path].shape != leaves[path].shape
    ]
    if changed:
        raise ValueError(
            "save_pretrained: the model is not what its config builds: "
            f"{', '.join(sorted(changed))} differ."
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_weights(wanted, leaves, directory)
    fields = family.write(config) | {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        # Version 4 reads the first, version 5 both.
        "torch_dtype": _common_dtype(leaves).name,
    }
    _write_json(directory / CONFIG, fields)


def _tensors(family: Family, config: Any) -> list[Tensor]:
    return tensors(family.names(config), skeleton(family.model, config), most=_MAX_TENSORS)


def _trained(config: Any) -> Any:
    """The configuration without arrays that only training needs: the rates of drop path."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "drop_path_rate":
            changes[field.name] = 0.0
        elif dataclasses.is_dataclass(value) and hasattr(value, "drop_path_rate"):
            changes[field.name] = _trained(value)
    return dataclasses.replace(config, **changes)


def _family_of(model: Any, model_type: str | None) -> Family:
    """The first family whose description of the configuration means the same model."""
    if model_type is not None and model_type not in FAMILIES:
        raise ValueError(
            f"save_pretrained: model_type={model_type!r} must be one of {sorted(FAMILIES)}."
        )
    families = FAMILIES.values() if model_type is None else [FAMILIES[model_type]]
    missing: list[tuple[int, str]] = []
    for family in (x for main in families for x in (main, *main.heads)):
        if type(model) is not family.kind:
            continue
        try:
            again = family.read(Fields(family.write(model.config), CONFIG))
            if family.adapt is not as_it_is:
                names = {tensor.name for tensor in _tensors(family, _trained(model.config))}
                again = family.adapt(again, names)
        except ValueError as error:
            missing.append((_UNSPEAKABLE, f"{family.model_type}: {error}"))
            continue
        differences = family.differences(model.config, again)
        if not differences:
            return family
        missing.append((len(differences), f"{family.model_type}, but for {', '.join(differences)}"))
    name = type(model).__name__
    if not missing:
        raise ValueError(f"save_pretrained: the requested families have no {name}; use save.")
    raise ValueError(
        f"save_pretrained: transformers has no family for this {name}; the nearest is "
        f"{min(missing)[1]}. Use save."
    )


def _write_weights(wanted: list[Tensor], leaves: dict[str, Any], directory: Path) -> None:
    shapes = {tensor.name: (_dtype_of(tensor, leaves), tensor.shape) for tensor in wanted}
    by_name = {tensor.name: tensor for tensor in wanted}
    sizes = {name: dtype.itemsize * int(np.prod(shape)) for name, (dtype, shape) in shapes.items()}
    files = list(_divided(sizes))
    names = [WEIGHTS]
    if len(files) > 1:
        count = len(files)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for path in [*directory.iterdir()]:
        if _WEIGHTS.fullmatch(path.name) or path.name == INDEX:
            path.unlink()
    for name, members in zip(names, files, strict=True):
        temporary = directory / f".{name}.tmp"
        temporary.unlink(missing_ok=True)
        write_safetensors(
            temporary,
            {tensor: shapes[tensor] for tensor in members},
            lambda tensor: _data(by_name[tensor], shapes[tensor][0], leaves),
            # transformers rejects a file without this.
            {"format": "pt"},
        )
        replace(temporary, directory / name)
    if len(files) > 1:
        places = {t: name for name, members in zip(names, files, strict=True) for t in members}
        metadata = {"total_size": sum(sizes.values())}
        _write_json(directory / INDEX, {"metadata": metadata, "weight_map": places})


def _divided(sizes: dict[str, int]) -> Iterator[list[str]]:
    """The names in groups, in order, none of them too large for a file."""
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > _MAX_BYTES:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    yield group


def _data(tensor: Tensor, dtype: np.dtype, leaves: dict[str, Any]) -> np.ndarray:
    data = np.empty(tensor.shape, dtype)
    for view, part in zip(tensor.views(data), tensor.parts, strict=True):
        leaf = leaves[part.path]
        array = np.asarray(leaf[part.index] if part.index else leaf)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            array = array.view(np.float32)
        copy(view, array.reshape(view.shape))
    return data


def _dtype_of(tensor: Tensor, leaves: dict[str, Any]) -> np.dtype:
    dtypes = [np.dtype(leaves[part.path].dtype) for part in tensor.parts]
    # Integers hold the bits of float32 numbers; see `MixtureOfExperts.with_selection_bias`.
    floats = [d if jnp.issubdtype(d, jnp.floating) else np.dtype(np.float32) for d in dtypes]
    return np.dtype(jnp.result_type(*floats))


def _common_dtype(leaves: dict[str, Any]) -> np.dtype:
    largest = max(leaves.values(), key=lambda x: x.size)
    return np.dtype(largest.dtype)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")
    replace(temporary, path)
