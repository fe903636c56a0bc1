"""A kernel call as a JAX primitive: compiled where there is hardware for it, else interpreted.

Which of the two is decided when a program is lowered, so that a program traced on one platform
runs on another, and only the one that is needed is traced.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from .._varying import vary_alike


def typed_alike(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """The type of an array that varies over the mesh axes of `jax.shard_map` as `like` does."""
    like = like if isinstance(like, jax.core.ShapedArray) else jax.typeof(like)
    spec = jax.sharding.PartitionSpec(*(None for _ in shape))
    sharding = jax.sharding.NamedSharding(like.sharding.mesh, spec)
    return like.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)


def launch(
    run: Callable[..., Sequence[Any]], operands: Sequence[Any], outputs: Sequence[Any]
) -> list[Any]:
    """Computes `run(*operands, interpret=...)`, a list of arrays with the types `outputs`.

    It can be batched, but not differentiated.
    """
    types = tuple((tuple(x.shape), jnp.dtype(x.dtype)) for x in outputs)
    return _kernel_p.bind(*vary_alike(list(operands)), run=run, types=types)


@dataclasses.dataclass(frozen=True, eq=False)
class _Batched:
    """`inner` under `vmap`; operands that are not batched are not copied."""

    inner: Callable[..., Sequence[Any]]
    axes: tuple[int | None, ...]
    axis_size: int

    def __call__(self, *operands: Any, interpret: bool) -> Sequence[Any]:
        inner = partial(self.inner, interpret=interpret)
        return jax.vmap(inner, in_axes=self.axes, axis_size=self.axis_size)(*operands)


_kernel_p = Primitive("attention_kernel")
_kernel_p.multiple_results = True


def _run(*operands: Any, run: Any, types: Any, interpret: bool) -> Sequence[Any]:
    del types
    return run(*operands, interpret=interpret)


@_kernel_p.def_impl
def _impl(*operands: Any, **params: Any) -> Any:
    return jax.jit(lambda *xs: _kernel_p.bind(*xs, **params))(*operands)


@_kernel_p.def_abstract_eval
def _abstract_eval(*operands: Any, run: Any, types: Any) -> Any:
    del run
    return [typed_alike(shape, dtype, operands[0]) for shape, dtype in types]


def _lower(ctx: Any, *operands: Any, interpret: bool, **params: Any) -> Any:
    # Over which mesh axes values vary has been settled; the interpreter does not know of it.
    plain = [
        [jax.core.ShapedArray(x.shape, x.dtype) for x in y] for y in (ctx.avals_in, ctx.avals_out)
    ]
    rule = mlir.lower_fun(partial(_run, interpret=interpret), multiple_results=True)
    with warnings.catch_warnings():
        # It is to be removed from some later JAX, in favour of one for the newest GPUs only.
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        return rule(ctx.replace(avals_in=plain[0], avals_out=plain[1]), *operands, **params)


mlir.register_lowering(_kernel_p, partial(_lower, interpret=True))
mlir.register_lowering(_kernel_p, partial(_lower, interpret=False), platform="cuda")


def _batch(operands: Any, axes: Any, *, run: Any, types: Any) -> Any:
    size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    moved = [x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(operands, axes, strict=True)]
    fronts = tuple(None if a is None else 0 for a in axes)
    out = _kernel_p.bind(
        *moved,
        run=_Batched(run, fronts, size),
        types=tuple(((size, *shape), dtype) for shape, dtype in types),
    )
    return out, [0] * len(out)


batching.primitive_batchers[_kernel_p] = _batch
