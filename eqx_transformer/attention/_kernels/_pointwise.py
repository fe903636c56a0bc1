"""Functions of users as small programs that a kernel can run.

A kernel has tiles of scores in registers and everything else in memory. A score mod or a mask is
any JAX function, with arrays it indexes. Being elementwise, it is traced on scalars; then

- what depends on its arrays alone is computed before the kernel, by XLA;
- what is left is flattened into instructions on scalars. Arrays in it, like the vector of indices
  that indexing creates, are taken apart, and indexing an array becomes a load from memory.

In the kernel the instructions run on tiles in place of the scalars.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from ._launch import typed_alike
from ._unrolled import Lazy, Unrolled


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """A scalar that is computed in the kernel."""

    compute: Callable[..., Any]
    """A function of the inputs' tiles; for a load, first of the array's reference."""
    inputs: tuple[Any, ...]
    """Instructions, and NumPy scalars."""
    needs: frozenset[str]
    """Which arguments it depends on."""
    dtype: Any
    table: int | None = None
    """Which array a load reads."""


_PAIR = frozenset(("q_pos", "kv_pos"))


class Program:
    """Instructions for an elementwise function. It holds none of the caller's arrays."""

    def __init__(self, outputs: Sequence[Any]):
        self.outputs = tuple(outputs)
        self.instructions: list[Instruction] = []
        seen: set[Instruction] = set()
        todo = [(x, False) for x in reversed(self.outputs)]
        while todo:
            node, done = todo.pop()
            if not isinstance(node, Instruction) or (node in seen and not done):
                continue
            if done:
                self.instructions.append(node)
                continue
            seen.add(node)
            todo.append((node, True))
            todo.extend((x, False) for x in reversed(node.inputs))
        self.used = sorted({x.table for x in self.instructions if x.table is not None})
        """Which of the collected arrays are read. A run is given references to these."""

    @property
    def looks_up_pairs(self) -> bool:
        """Whether something is loaded for every pair of positions, not for rows or columns."""
        return any(x.table is not None and x.needs >= _PAIR for x in self.instructions)

    @property
    def operations(self) -> set[str]:
        """The names of all JAX operations that a run consists of."""
        found: set[str] = set()
        for node in self.instructions:
            if node.compute is not _argument and node.table is None:
                scalars = [jax.ShapeDtypeStruct((), x.dtype) for x in node.inputs]
                found |= _names(jax.make_jaxpr(node.compute)(*scalars).jaxpr)
        return found

    def start(self, refs: Sequence[Any]) -> "Run":
        """Begins a run in a kernel, with references to the tables."""
        return Run(self, tuple(refs), frozenset(), {}).bind()


def split(
    program: Program, before: Callable[[Instruction], bool]
) -> tuple[Program, dict[str, Instruction]]:
    """Splits off the instructions that are computed before the kernel.

    Returns the rest of the program, which takes their results as arguments, and by name the
    instructions whose results these are. What the rest is given, or loads, has 32 bits: see `wide`.
    """
    given: dict[str, Instruction] = {}
    new: dict[Any, Any] = {}
    for n, node in enumerate(program.instructions):
        if before(node):
            given[f"given{n}"] = node
            argument = Instruction(_argument, (), frozenset((f"given{n}",)), wide(node.dtype))
            new[node] = _narrowed(argument, node.dtype)
        elif node.compute is _argument:
            new[node] = node
        else:
            inputs = tuple(new.get(x, x) for x in node.inputs)
            needs = frozenset().union(*(x.needs for x in inputs if isinstance(x, Instruction)))
            dtype = node.dtype if node.table is None else wide(node.dtype)
            moved = dataclasses.replace(node, inputs=inputs, needs=needs, dtype=dtype)
            new[node] = _narrowed(moved, node.dtype)
    rest = Program([new.get(x, x) for x in program.outputs])
    used = frozenset().union(*(x.needs for x in rest.instructions))
    return rest, {name: node for name, node in given.items() if name in used}


def results(
    program: Program, tables: Sequence[Any], given: dict[str, Instruction], **arguments: Any
) -> dict[str, Any]:
    """Computes what a kernel is given (see `split`), from arrays of one rank.

    Each result has the broadcast shape of the arguments it depends on.
    """
    start, ones = program.start(tables), (1,) * max(x.ndim for x in arguments.values())
    runs: dict[frozenset[str], Any] = {}
    found = {}
    for name, node in given.items():
        needed = {x: arguments[x] for x in node.needs}
        if node.needs not in runs:
            runs[node.needs] = start.bind(**needed).values
        shape = np.broadcast_shapes(ones, *(x.shape for x in needed.values()))
        found[name] = jnp.broadcast_to(runs[node.needs][node], shape)
    return found


def wide(dtype: Any) -> Any:
    """The 32-bit dtype for numbers of fewer bits; others are kept."""
    if jnp.dtype(dtype).itemsize >= 4:
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else jnp.int32)


def _narrowed(node: Instruction, dtype: Any) -> Instruction:
    if node.dtype == dtype:
        return node
    compute = _is_nonzero if dtype == jnp.bool else lambda x: x.astype(dtype)
    return Instruction(compute, (node,), node.needs, dtype)


class Traced(NamedTuple):
    """A program, and what it reads."""

    program: Program
    tables: list[Any]
    """One-dimensional arrays, operands of the kernel."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A partially evaluated program: what follows from the arguments so far has been computed."""

    program: Program
    refs: tuple[Any, ...]
    bound: frozenset[str]
    values: dict[Any, Any]

    def bind(self, **arguments: Any) -> "Run":
        """Supplies arguments. What they determine is computed here, once, not where it is used."""
        bound = self.bound | set(arguments)
        values = dict(self.values)
        for node in self.program.instructions:
            if node in values or not node.needs <= bound:
                continue
            if node.compute is _argument:
                (name,) = node.needs
                values[node] = arguments[name]
                continue
            inputs = _together([values.get(x, x) for x in node.inputs])
            refs = () if node.table is None else (self.refs[self.program.used.index(node.table)],)
            values[node] = node.compute(*refs, *inputs)
        return Run(self.program, self.refs, bound, values)

    def outputs(self) -> tuple[Any, ...]:
        """The results, each a tile that broadcasts to the arguments' shape, or a NumPy scalar."""
        return tuple(self.values.get(x, x) for x in self.program.outputs)


def _names(jaxpr: Any) -> set[str]:
    params = [x for eqn in jaxpr.eqns for x in eqn.params.values()]
    inner = [x.jaxpr for x in params if isinstance(x, ClosedJaxpr)]
    return {eqn.primitive.name for eqn in jaxpr.eqns}.union(*map(_names, inner))


def _argument(*_: Any) -> Any:
    raise AssertionError("Arguments are supplied, not computed.")


def _together(tiles: Sequence[Any]) -> list[Any]:
    shape = np.broadcast_shapes(*(np.shape(x) for x in tiles))
    return [x if np.shape(x) == shape else jnp.broadcast_to(x, shape) for x in tiles]


def _load(ref: Any, index: Any) -> Any:
    return ref[index]


def _is_nonzero(x: Any) -> Any:
    return x != 0


def trace(
    function: Callable[..., Any], arguments: dict[str, Any], *, what: str, like: Any
) -> Traced:
    """Turns a function of scalars into a program.

    Arguments:

    - `function`: takes the arguments by name and returns a tuple of scalars. Arrays that it closes
        over, or what is computed from them alone, become the tables.
    - `arguments`: names and dtypes.
    - `what`: whose function it is, for error messages.
    - `like`: an array that varies over the same mesh axes of `jax.shard_map` as those arrays.

    Raises:

    - `NoKernelError` if it does something that has no counterpart in a kernel.
    """
    scalars = [typed_alike((), dtype, like) for dtype in arguments.values()]
    closed = jax.make_jaxpr(lambda *xs: function(**dict(zip(arguments, xs, strict=True))))(*scalars)
    builder = _Builder(what)
    values = [
        Lazy((), dtype, lambda _, node=Instruction(_argument, (), frozenset((name,)), dtype): node)
        for name, dtype in arguments.items()
    ]
    outputs = builder.run(closed, values)
    program = Program([builder.element(x, ()) for x in outputs])
    return Traced(program, [builder.tables[i] for i in program.used])


class _Builder(Unrolled):
    """Collects instructions and tables."""

    def __init__(self, what: str):
        super().__init__(what)
        self.tables: list[Any] = []
        self._table_of: dict[int, int] = {}
        self._sources: list[Any] = []

    def apply(self, compute: Callable[..., Any], *inputs: Any) -> Any:
        """The scalar `compute(*inputs)`."""
        scalars = [np.asarray(x, np.int32)[()] if type(x) is int else x for x in inputs]
        if not any(isinstance(x, Instruction) for x in scalars):
            with jax.ensure_compile_time_eval():
                return np.asarray(compute(*(jnp.asarray(x) for x in scalars)))[()]
        shapes = [jax.ShapeDtypeStruct((), x.dtype) for x in scalars]
        needs = frozenset().union(*(x.needs for x in scalars if isinstance(x, Instruction)))
        dtype = jax.eval_shape(compute, *shapes).dtype
        return Instruction(compute, tuple(scalars), needs, dtype)

    def load(self, array: Any, flat_index: Any) -> Any:
        """An element of an array that is known before the kernel."""
        if type(flat_index) is int and not isinstance(array, jax.core.Tracer):
            return np.asarray(array).reshape(-1)[flat_index]
        index = np.asarray(flat_index, np.int32)[()] if type(flat_index) is int else flat_index
        needs = index.needs if isinstance(index, Instruction) else frozenset()
        table = self._table(array)
        node = Instruction(_load, (index,), needs, self.tables[table].dtype, table)
        return self.apply(_is_nonzero, node) if array.dtype == bool else node

    def _table(self, array: Any) -> int:
        if id(array) not in self._table_of:
            if array.size > np.iinfo(np.int32).max:
                self.refuse(f"reads an array of {array.size} elements, more than 32 bits address")
            self._table_of[id(array)] = len(self.tables)
            self._sources.append(array)
            flat = jnp.asarray(array).reshape(-1)
            # Booleans cannot be loaded.
            self.tables.append(flat.astype(jnp.int8) if array.dtype == bool else flat)
        return self._table_of[id(array)]
