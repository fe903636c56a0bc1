"""Evaluates a function traced on scalars as far as possible, and takes the rest apart.

Values are either known, i.e. JAX arrays, or lazy: a shape and a function from an index to the
element. Elements of lazy values are opaque here; `_pointwise.py` says what they are.
"""

import abc
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._varying import vary_alike
from ._rules import MAX_UNROLLED, RULES, computation, is_number, select

# What a Triton kernel computes elementwise. Anything else would fail when the kernel is compiled.
_ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp clz "
    "convert_element_type cos cosh div eq erf_inv exp exp2 expm1 floor ge gt integer_pow le "
    "log log1p logistic lt max min mul ne neg not one_minus_square or population_count "
    "pow rem rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh "
    "sqrt square sub tan tanh xor".split()
)
_IDENTITIES = frozenset(
    "copy copy_p optimization_barrier pcast pvary reshard sharding_constraint stop_gradient".split()
)
_CALLS = frozenset(
    "jit pjit closed_call core_call custom_jvp_call custom_vjp_call checkpoint remat remat2 "
    "eval_jaxpr".split()
)


class NoKernelError(NotImplementedError):
    """There is no kernel for something. `reason` is a predicate, such as "has no kernels for x"."""

    def __init__(self, reason: str):
        super().__init__(f"attention: 'pallas' {reason}; use implementation='chunked'.")
        self.reason = reason


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """An array known by its elements: `element(index)` for a tuple of numbers and scalars."""

    shape: tuple[int, ...]
    dtype: Any
    element: Callable[[tuple[Any, ...]], Any]
    _cache: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def at(self, index: tuple[Any, ...]) -> Any:
        """An element, the same object for the same index."""
        if index not in self._cache:
            self._cache[index] = self.element(index)
        return self._cache[index]


class Unrolled(abc.ABC):
    """An interpreter of jaxprs whose values are arrays or `Lazy`."""

    def __init__(self, what: str):
        self.what = what

    @abc.abstractmethod
    def apply(self, compute: Callable[..., Any], *inputs: Any) -> Any:
        """The element that an elementwise function computes from others (or from integers)."""

    @abc.abstractmethod
    def load(self, array: Any, flat_index: Any) -> Any:
        """The element of a known array."""

    def refuse(self, reason: str) -> NoReturn:
        """Raises `NoKernelError` for a reason."""
        raise NoKernelError(f"has no kernels for a {self.what} that {reason}")

    # --- values ---

    def element(self, value: Any, index: tuple[Any, ...]) -> Any:
        """An element of a value, at an index of numbers and scalars."""
        if isinstance(value, Lazy):
            return value.at(index)
        strides = [int(np.prod(value.shape[d + 1 :])) for d in range(len(value.shape))]
        return self.load(value, self.flat(index, strides))

    def flat(self, index: Sequence[Any], strides: Sequence[int]) -> Any:
        """The place of an element in memory."""
        total: Any = 0
        for i, stride in zip(index, strides, strict=True):
            total = self.add(total, self.times(i, stride))
        return total

    def add(self, x: Any, y: Any) -> Any:
        """A sum of indices, each of which may be known."""
        x, y = (int(z) if is_number(z) else z for z in (x, y))
        if is_number(x) and is_number(y):
            return x + y
        if is_number(x) and x == 0:
            return y
        return x if is_number(y) and y == 0 else self.apply(lax.add, x, y)

    def times(self, x: Any, y: int) -> Any:
        """A multiple of an index that may be known."""
        if is_number(x):
            return int(x) * int(y)
        return x if y == 1 else self.apply(lax.mul, x, int(y))

    def clip(self, x: Any, most: int) -> Any:
        """An index that may be known, clipped to `0..most`."""
        if is_number(x):
            return min(max(int(x), 0), int(most))
        return self.apply(lax.min, self.apply(lax.max, x, 0), int(most))

    def choose(self, index: Any, options: Sequence[Callable[[], Any]]) -> Any:
        """`options[index]()`, where the index may be known only in the kernel."""
        if is_number(index):
            return options[int(index)]()
        if len(options) > MAX_UNROLLED:
            self.refuse(f"chooses among {len(options)} values")
        chosen = options[-1]()
        for i in reversed(range(len(options) - 1)):
            chosen = self.apply(select, self.apply(lax.eq, index, i), options[i](), chosen)
        return chosen

    def index(self, value: Any, index: tuple[Any, ...]) -> Any:
        """An element that is used as an index: an `int` where it is known, else int32."""
        x = self.element(value, index)
        if is_number(x):
            return int(x)
        return x if x.dtype == jnp.int32 else self.apply(lambda x: x.astype(jnp.int32), x)

    # --- programs ---

    def run(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """Evaluates a jaxpr, closed or without constants."""
        consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
        values: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else values[atom]

        values.update(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            inputs = [read(x) for x in eqn.invars]
            if eqn.primitive.name in _IDENTITIES:
                outputs = inputs
            elif eqn.primitive.name in _CALLS:
                body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
                outputs = self.run(body, inputs)
            elif any(isinstance(x, Lazy) for x in inputs):
                outputs = self._lazy(eqn, inputs)
            else:
                outputs = _known(eqn, inputs)
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def _lazy(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        name, params = eqn.primitive.name, eqn.params
        shapes = [x.aval.shape for x in eqn.outvars]
        dtypes = [x.aval.dtype for x in eqn.outvars]
        if name == "call_hi_primitive":
            return self.run(_expanded(eqn), inputs)
        if name == "scan":
            return self._scan(eqn, inputs)
        if name == "cond":
            branches = [self.run(branch, inputs[1:]) for branch in params["branches"]]
            which = self.clip(self.index(inputs[0], ()), len(branches) - 1)
            return [
                Lazy(
                    shape,
                    dtype,
                    lambda index, outs=outs: self.choose(
                        which, [lambda x=x: self.element(x, index) for x in outs]
                    ),
                )
                for shape, dtype, outs in zip(
                    shapes, dtypes, zip(*branches, strict=True), strict=True
                )
            ]
        if name in ("split", "unstack"):
            return self._parts(eqn, inputs[0])
        if name in _ELEMENTWISE:
            element = self._elementwise(eqn, inputs)
        elif name in RULES:
            element = RULES[name](self, eqn, *inputs)
        else:
            self.refuse(f"uses `{name}`")
        out = Lazy(shapes[0], dtypes[0], element)
        if not out.shape:
            # Now, not on demand: at the end of a long program, that would recurse too deeply.
            out.at(())
        return [out]

    def _elementwise(self, eqn: Any, inputs: list[Any]) -> Callable[[tuple[Any, ...]], Any]:
        compute = computation(eqn)

        def element(index: tuple[Any, ...]) -> Any:
            return self.apply(compute, *(self.element(x, index if x.shape else ()) for x in inputs))

        return element

    def _scan(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        length, body = eqn.params["length"], eqn.params["jaxpr"]
        if length > MAX_UNROLLED:
            self.refuse(f"has a loop of {length} steps")
        inner = getattr(body, "jaxpr", body)
        # What is scanned over has one more axis outside than inside; the rest does not.
        scanned = sum(
            len(x.aval.shape) > len(y.aval.shape)
            for x, y in zip(eqn.invars, inner.invars, strict=True)
        )
        stacked = sum(
            len(x.aval.shape) > len(y.aval.shape)
            for x, y in zip(eqn.outvars, inner.outvars, strict=True)
        )
        carried = len(eqn.outvars) - stacked
        consts = inputs[: len(inputs) - scanned - carried]
        carry = inputs[len(consts) : len(consts) + carried]
        xs = inputs[len(consts) + carried :]
        steps: list[list[Any]] = [[] for _ in range(length)]
        order = range(length)
        for i in reversed(order) if eqn.params["reverse"] else order:
            slices = [
                Lazy(x.shape[1:], x.dtype, lambda index, x=x, i=i: self.element(x, (i, *index)))
                for x in xs
            ]
            out = self.run(body, [*consts, *carry, *slices])
            carry, steps[i] = out[:carried], out[carried:]
        ys = [
            Lazy(
                var.aval.shape,
                var.aval.dtype,
                lambda index, n=n: self.choose(
                    index[0], [lambda s=s: self.element(s[n], index[1:]) for s in steps]
                ),
            )
            for n, var in enumerate(eqn.outvars[carried:])
        ]
        return [*carry, *ys]

    def _parts(self, eqn: Any, x: Any) -> list[Any]:
        axis = eqn.params["axis"]
        stack = eqn.primitive.name == "unstack"
        sizes = [1] * len(eqn.outvars) if stack else [int(n) for n in eqn.params["sizes"]]
        starts = [0, *itertools.accumulate(sizes)]

        def part(start: int) -> Callable[[tuple[Any, ...]], Any]:
            def element(index: tuple[Any, ...]) -> Any:
                before, after = index[:axis], index[axis:]
                if stack:
                    return self.element(x, (*before, start, *after))
                return self.element(x, (*before, self.add(after[0], start), *after[1:]))

            return element

        return [
            Lazy(var.aval.shape, var.aval.dtype, part(start))
            for var, start in zip(eqn.outvars, starts[:-1], strict=True)
        ]


def _known(eqn: Any, inputs: list[Any]) -> list[Any]:
    """Computes what depends on arrays alone: now if it can, else as part of the whole program."""
    if any(isinstance(x, jax.core.Tracer) for x in inputs):
        out = eqn.primitive.bind(*vary_alike([jnp.asarray(x) for x in inputs]), **eqn.params)
    else:
        with jax.ensure_compile_time_eval():
            out = eqn.primitive.bind(*inputs, **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _expanded(eqn: Any) -> Any:
    """What an operation consists of, for those that newer versions of JAX define through others."""
    operation = eqn.params["_prim"]

    def expand(*args: Any) -> Any:
        return jax.tree.leaves(operation.expand(*jax.tree.unflatten(operation.in_tree, args)))

    return jax.make_jaxpr(expand)(*(x.aval for x in eqn.invars))
