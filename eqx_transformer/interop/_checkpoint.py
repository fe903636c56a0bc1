"""Models on disk: a directory with a config and the weights."""

import json
import os
import re
import secrets
from pathlib import Path
from typing import Any, Final

from ..models import (
    CLIP,
    CLIPConfig,
    DiT,
    DiTConfig,
    Llama,
    LlamaConfig,
    VisionTransformer,
    ViTConfig,
)
from ._pytree import load_pytree, named_arrays, replace, save_pytree, skeleton

_MODELS: Final = {
    "CLIP": (CLIP, CLIPConfig),
    "DiT": (DiT, DiTConfig),
    "Llama": (Llama, LlamaConfig),
    "VisionTransformer": (VisionTransformer, ViTConfig),
}
_FORMAT: Final = "eqx_transformer"
_VERSION: Final = 1
_WEIGHTS: Final = re.compile(r"model-[0-9a-f]{16}\.safetensors")


def save(model: Any, directory: str | Path) -> None:
    """Saves a model to a directory: `config.json`, and the weights in a safetensors file.

    A crash at any moment leaves either the previous checkpoint or the new one, whole. The weights
    go to a file with a new name; `config.json`, which names that file, is replaced atomically once
    they are on the disk; files it no longer names are removed after that.

    Arguments:

    - `model`: one of this library's models.
    - `directory`: created if it does not exist.

    Raises:

    - `ValueError` if the model is not one of this library's, or no longer what its config builds
        (after surgery): it could not be loaded again. `save_pytree` saves any PyTree.
    """
    name = type(model).__name__
    if _MODELS.get(name, (None,))[0] is not type(model):
        raise ValueError(
            f"save: {name} is not one of the models {sorted(_MODELS)}; use save_pytree."
        )
    expected, found = named_arrays(skeleton(_MODELS[name][0], model.config)), named_arrays(model)
    changed = [
        k
        for k in {**expected, **found}
        if k not in expected or k not in found or expected[k].shape != found[k].shape
    ]
    if changed:
        raise ValueError(
            f"save: the model is not what its config builds, so it could not be loaded again: "
            f"{', '.join(sorted(changed))} differ; use save_pytree."
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = f"model-{secrets.token_hex(8)}.safetensors"
    save_pytree(model, directory / weights)
    description = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "model": name,
        "config": model.config.to_dict(),
        "weights": weights,
    }
    temporary = directory / f".config.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(description, indent=2, allow_nan=False) + "\n")
    replace(temporary, directory / "config.json")
    for path in directory.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name != weights:
            path.unlink()


def load(directory: str | Path) -> Any:
    """Loads a model that `save` saved, with weights equal to the last bit.

    The model is rebuilt from its config without memory for weights; names, shapes and kinds of
    all tensors are compared with it before any is read. No code is loaded or run.

    Raises:

    - `FileNotFoundError` if there is no checkpoint.
    - `ValueError` if a file is damaged or of a newer format, or with a list of all tensors that
        are missing, unexpected or of another shape.
    """
    directory = Path(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"load: there is no checkpoint in {directory}: no config.json.")
    try:
        description = json.loads(path.read_text())
        if "model_type" in description and "format" not in description:
            raise ValueError("it belongs to published weights, which load_pretrained reads")
        if description["format"] != _FORMAT:
            raise ValueError(f"it says format={description['format']!r}, not {_FORMAT!r}")
        version, name = description["format_version"], description["model"]
        fields, weights = description["config"], description["weights"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load: {path} is not a config of a checkpoint: {error}.") from error
    if version != _VERSION:
        raise ValueError(
            f"load: {path} has format_version={version}, but this release reads {_VERSION}; "
            "use a newer release."
        )
    if name not in _MODELS:
        raise ValueError(f"load: {path} has the model {name!r}, not one of {sorted(_MODELS)}.")
    # A plain file name of this form cannot point outside the directory.
    if not isinstance(weights, str) or not _WEIGHTS.fullmatch(weights):
        raise ValueError(f"load: {path} names the weights {weights!r}, which save does not write.")
    if not (directory / weights).is_file():
        raise FileNotFoundError(f"load: {path} names the weights {weights}, which do not exist.")
    config = _MODELS[name][1].from_dict(fields)
    return load_pytree(directory / weights, skeleton(_MODELS[name][0], config))
