"""Files of a published model: in a folder, or on the Hugging Face hub."""

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any, Final

from ._safetensors import parse_json

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
TOKENIZER: Final = "tokenizer.json"
_MAX_JSON: Final = 50_000_000
# No path separators, nothing hidden, nothing that could be an option or a drive.
_PLAIN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
_REPO: Final = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")


def load_tokenizer(path_or_repo_id: str | Path) -> Any:
    """The tokenizer of a published model: a `tokenizers.Tokenizer`.

    Arguments:

    - `path_or_repo_id`: as for `load_pretrained`.

    Raises:

    - `ImportError` without tokenizers.
    - `FileNotFoundError` if there is no `tokenizer.json`.
    """
    if importlib.util.find_spec("tokenizers") is None:
        raise ImportError('this needs tokenizers: pip install "eqx_transformer[hub]".')
    tokenizers = importlib.import_module("tokenizers")
    folder = local_folder(path_or_repo_id, TOKENIZER)
    return tokenizers.Tokenizer.from_file(str(checked_file(folder, TOKENIZER)))


def local_folder(path_or_repo_id: str | Path, *names: str) -> Path:
    """The folder that has these files, downloaded if it is not on this machine.

    An existing folder takes precedence. From the hub only these files are downloaded, and the
    weights that the index among them names.
    """
    path = Path(path_or_repo_id)
    if path.is_dir():
        return path.resolve()
    match = _REPO.fullmatch(str(path_or_repo_id))
    if isinstance(path_or_repo_id, Path) or match is None:
        raise FileNotFoundError(f"there is no folder {path_or_repo_id}.")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ImportError(
            f"{path_or_repo_id!r} is not a local folder, and downloading it needs huggingface_hub: "
            'pip install "eqx_transformer[hub]".'
        )
    snapshot_download = importlib.import_module("huggingface_hub").snapshot_download
    repo, revision = match["id"], match["revision"]
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(names)))
    if INDEX in names and (folder / INDEX).exists():
        # The same revision, even if the branch has moved since.
        shards = sorted(set(read_index(folder).values()))
        commit = folder.name
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=shards))
    return folder.resolve()


def checked_file(folder: Path, name: str) -> Path:
    """A file of the folder, by its plain name.

    A symbolic link must point to a file in the same folder, or, as in the cache of the hub, from
    `snapshots/<commit>` to the `blobs` of the same model.

    Raises:

    - `FileNotFoundError` if there is no such file.
    - `ValueError` if it is a link to somewhere else.
    """
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"there is no {name} in {folder}.")
    target = path.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if target.parent not in [place.resolve() for place in allowed]:
        raise ValueError(f"{path} is a link out of its folder, to {target}; it is not followed.")
    return target


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of the folder.

    Raises:

    - `ValueError` if it is not one, or larger than any config or index.
    """
    path = checked_file(folder, name)
    if not path.is_file() or path.stat().st_size > _MAX_JSON:
        raise ValueError(f"{path} is not a file of at most {_MAX_JSON} bytes.")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def read_index(folder: Path) -> dict[str, str]:
    """Which file has which tensor, from the index of weights in several files.

    Raises:

    - `ValueError` if it is not such an index, or names files by more than plain names.
    """
    names = read_json(folder, INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{folder / INDEX} has no weight_map.")
    for tensor, file in names.items():
        if not isinstance(file, str) or not _PLAIN.fullmatch(file):
            raise ValueError(
                f"{folder / INDEX} says that {tensor} is in {file!r}, which is not the plain name "
                "of a safetensors file."
            )
    return names
