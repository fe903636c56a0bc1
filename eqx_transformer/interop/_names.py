"""Tables of names: which tensor of a file is which part of which array of a model."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ..nn import Linear
from ..stacks import Stack, StackSequence, layer_address
from ._pytree import is_array, named_arrays


class Into:
    """A row of a table with more than a single path; see `tensors`.

    Arguments:

    - `paths`: the arrays in the tensor, concatenated along the output features.
    - `groups`: how often they alternate: once in `q|k|v`, as many times as there are heads in
        `q|k|v|q|k|v|...`.
    - `transpose`: whether the weight of a `Linear` is `[out_features, in_features]` in the file, as
        in PyTorch.
    - `shape`: that of the weight in the file, if it has other axes there.
    - `joint`: the separator between the name of a layer and that of its array.
    """

    def __init__(
        self,
        *paths: str,
        groups: int = 1,
        transpose: bool = True,
        shape: tuple[int, ...] | None = None,
        joint: str = ".",
    ):
        self.paths = paths
        self.groups = groups
        self.transpose = transpose
        self.shape = shape
        self.joint = joint


class Part(NamedTuple):
    """An array of the model, or its part at an index of its leading axes."""

    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file, and the parts of the model that are in it."""

    name: str
    parts: tuple[Part, ...]
    groups: int
    transposed: bool
    written: tuple[int, ...] | None
    """Its shape in the file, if it has other axes there."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        return self._axes if self.written is None else self.written

    @property
    def _axes(self) -> tuple[int, ...]:
        if len(self.parts) == 1 and not self.parts[0].shape:
            return ()
        *leading, _ = self.parts[0].shape
        shape = (*leading, sum(part.shape[-1] for part in self.parts))
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def views(self, data: np.ndarray) -> list[np.ndarray]:
        """Views of each part in the data of the tensor, for reading or writing.

        A view has the elements of its part in order, and one more axis if there are groups.
        """
        data = data.reshape(self._axes)
        if self.transposed:
            data = data.swapaxes(-1, -2)
        if len(self.parts) == 1:
            return [data]
        ends = itertools.accumulate(part.shape[-1] // self.groups for part in self.parts)
        if self.groups > 1:
            # Splitting an axis never copies.
            data = data.reshape(*data.shape[:-1], self.groups, -1)
        return np.split(data, list(ends)[:-1], axis=-1)


def tensors(table: Mapping[str, str | Into], model: Any, *, most: int) -> list[Tensor]:
    """All tensors of a model's file.

    A row of the table names a layer, or an array, in the file and in the model; a layer stands for
    its arrays, which have the same names in both. `{layer}` stands for every index of the `Stack`
    before it, and `{expert}` for every index of a leading axis. A row is used only if its path
    exists, so one table serves models with and without biases, heads and norms; but every array of
    the model must be in some row.

    Arguments:

    - `table`: from name in the file to path in the model.
    - `model`: with shapes in place of arrays.
    - `most`: how many tensors there may be at most.

    Raises:

    - `ValueError` if the table has no name for an array of the model, or there are too many.
    """
    every = (
        tensor
        for name, row in table.items()
        for tensor in _expand(name, row if isinstance(row, Into) else Into(row), model)
    )
    result = list(itertools.islice(every, most + 1))
    if len(result) > most:
        raise ValueError(f"the model would consist of more than {most} tensors.")
    named = {part.path for tensor in result for part in tensor.parts}
    missing = named_arrays(model).keys() - named
    if missing:
        raise ValueError(f"there is no name for {', '.join(sorted(missing))}")
    return result


class _Place(NamedTuple):
    """A node of the model, and the way to it."""

    node: Any
    path: tuple[str, ...] = ()
    index: tuple[int, ...] = ()
    """The index into the leading axes of the node's arrays."""
    numbers: tuple[tuple[str, int], ...] = ()
    """Which layer, which expert."""


def _expand(name: str, row: Into, model: Any) -> Iterator[Tensor]:
    places = [_resolve(_Place(model), path.split(".")) for path in row.paths]
    # The parts of a tensor come from the same layers.
    for together in zip(*places, strict=True):
        first = together[0]
        for field in _fields(first.node):
            linear = isinstance(first.node, Linear) and field == "weight"
            yield Tensor(
                row.joint.join(filter(None, (name.format(**dict(first.numbers)), field))),
                tuple(_part(place, field) for place in together),
                row.groups,
                linear and row.transpose,
                row.shape if field in ("", "weight") else None,
            )


def _resolve(place: _Place, steps: list[str]) -> Iterator[_Place]:
    """All nodes a path leads to; none if it does not exist."""
    if place.node is None:
        return
    if not steps:
        yield place
        return
    step, rest = steps[0], steps[1:]
    if step == "{layer}":
        for layer in _layers(place):
            yield from _resolve(layer, rest)
    elif step == "{expert}":
        some_array = jax.tree.leaves(place.node)[0]
        for i in range(some_array.shape[len(place.index)]):
            numbers = (*place.numbers, ("expert", i))
            yield from _resolve(place._replace(index=(*place.index, i), numbers=numbers), rest)
    else:
        child = getattr(place.node, step, None)
        yield from _resolve(place._replace(node=child, path=(*place.path, step)), rest)


def _layers(place: _Place) -> Iterator[_Place]:
    """The blocks of a stack, with their places."""
    for layer in range(_num_layers(place.node)):
        address = layer_address(place.node, layer)
        steps = re.findall(r"\w+", address.path)
        node = place.node
        for step in steps:
            node = node[int(step)] if step.isdigit() else getattr(node, step)
        yield _Place(
            node,
            (*place.path, *steps),
            (*place.index, address.index),
            (*place.numbers, ("layer", layer)),
        )


def _num_layers(stack: Stack | StackSequence) -> int:
    if isinstance(stack, StackSequence):
        return len(stack)
    return len(StackSequence((stack,)))


def _fields(node: Any) -> list[str]:
    """The names of a layer's own arrays; the empty name for an array itself."""
    if is_array(node):
        return [""]
    names = [field.name for field in dataclasses.fields(node)]
    return [name for name in names if is_array(getattr(node, name))]


def _part(place: _Place, field: str) -> Part:
    array = getattr(place.node, field) if field else place.node
    path = ".".join(filter(None, (*place.path, field)))
    return Part(path, place.index, array.shape[len(place.index) :], array.dtype)
