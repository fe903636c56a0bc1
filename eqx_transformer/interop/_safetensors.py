"""Safetensors files, read and written tensor by tensor; nothing in them is trusted."""

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np

# A header has a few hundred bytes per tensor; this is also the format's own limit.
_MAX_HEADER: Final = 100_000_000
_MAX_AXES: Final = 32
DTYPES: Final = {
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
    # Known by size, so that files with them can be described; they are not read as arrays.
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


class TensorInfo(NamedTuple):
    """What a header says about one tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """The offset of its data in the file."""

    @property
    def nbytes(self) -> int:
        """The size of its data."""
        return self.dtype.itemsize * _product(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype.name}{list(self.shape)}"


class SafetensorsFile:
    """An open file whose header has been checked against its size.

    The tensors must be contiguous and fill the file, so that nothing overlaps, is truncated, or is
    hidden between them. The file that was checked is the one that is read, even if another takes
    its name meanwhile.
    """

    def __init__(self, path: Path):
        """Arguments:

        - `path`: of the file.

        Raises:

        - `ValueError` if it is not a regular file, not complete, or not a safetensors file.
        """
        self.path = path
        # Without O_NONBLOCK, opening a named pipe would block forever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path} is not a regular file.")
            self.tensors = self._read_header(status.st_size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str, memory: np.ndarray | None = None) -> np.ndarray:
        """The data of one tensor.

        Arguments:

        - `name`: of the tensor.
        - `memory`: a buffer of at least its size to read it into; a new one if not given.
        """
        info = self.tensors[name]
        if memory is None:
            memory = np.empty(info.nbytes, np.uint8)
        data = memory[: info.nbytes]
        self._fill(data, info.start)
        return data.view(info.dtype).reshape(info.shape)

    def _fill(self, data: np.ndarray, start: int) -> None:
        # Read, not mapped: pages of a mapped file count as this process's memory.
        self._file.seek(start)
        view = data.data
        while len(view):
            count = self._file.readinto(view)
            if not count:
                raise ValueError(f"{self.path} became shorter while it was being read.")
            view = view[count:]

    def _read_header(self, size: int) -> dict[str, TensorInfo]:
        prefix = self._file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{self.path} is damaged: its header would be {length} bytes long in a file of "
                f"{size}."
            )
        text = np.empty(length, np.uint8)
        self._fill(text, 8)
        try:
            header = parse_json(text.tobytes())
            tensors = {
                name: _parse(name, entry, 8 + length)
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path} is damaged: its header cannot be read ({error})."
            ) from error
        end = 8 + length
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if info.start != end:
                raise ValueError(
                    f"{self.path} is damaged: {name} begins at byte {info.start}, but what comes "
                    f"before it ends at {end}."
                )
            end += info.nbytes
        if end != size:
            raise ValueError(
                f"{self.path} is damaged: its header describes {end} bytes, but it has {size}."
            )
        return tensors


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    get: Callable[[str], Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file tensor by tensor, so that only one of them is in memory at a time.

    Arguments:

    - `path`: of the file; it should not exist.
    - `shapes`: dtype and shape by name.
    - `get`: the data of the tensor of this name.
    - `metadata`: for other programs.
    """
    names = {np.dtype(dtype): name for name, dtype in _numpy_dtypes().items()}
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    # Wide dtypes first, so that everything is aligned.
    order = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))
    end = 0
    for name in order:
        dtype, shape = shapes[name]
        start, end = end, end + dtype.itemsize * _product(shape)
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            data = np.asarray(get(name), order="C")
            assert (data.dtype, data.shape) == shapes[name], name
            file.write(data.reshape(-1).view(np.uint8).data)


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object without duplicate names.

    Raises:

    - `ValueError` if it is not one, or nested too deeply.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object")
    return value


def _parse(name: str, entry: Any, offset: int) -> TensorInfo:
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has the fields {sorted(entry)}")
    dtypes = _numpy_dtypes()
    if entry["dtype"] not in dtypes:
        raise ValueError(f"{name} has the dtype {entry['dtype']!r}")
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    for number in (*shape, start, end):
        # In Python `True` is an integer, and 1.0 equals 1.
        if type(number) is not int or number < 0:
            raise ValueError(f"{name} has the number {number!r}")
    if len(shape) > _MAX_AXES:
        raise ValueError(f"{name} has {len(shape)} axes")
    info = TensorInfo(dtypes[entry["dtype"]], shape, offset + start)
    if end - start != info.nbytes:
        raise ValueError(f"{name} is {info} but has {end - start} bytes")
    return info


def _numpy_dtypes() -> dict[str, np.dtype]:
    # ml_dtypes comes with JAX; NumPy does not know its dtypes by name.
    return {k: np.dtype(getattr(ml_dtypes, v, v)) for k, v in DTYPES.items()}


def _product(shape: Iterable[int]) -> int:
    # Not NumPy's, which wraps around.
    product = 1
    for n in shape:
        product *= n
    return product


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(names) != len(set(names)):
        raise ValueError("it has a duplicate name")
    return dict(pairs)
