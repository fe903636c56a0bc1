"""Decisions at lowering time: which platform's kernels run, and whether they are interpreted.

So a program traced on one platform runs on another, and only the kernels it needs are traced. A
kernel is compiled where there is hardware for it, else interpreted.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from .._varying import vary_alike
from ._unrolled import NoKernelError


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

    def on(*operands: Any, platform: str) -> Sequence[Any]:
        return run(*operands, interpret=platform == "other")

    return _bind(on, operands, outputs)


def by_platform(run: Callable[..., Any], args: Any, outputs: Any) -> Any:
    """Computes `run(*args, platform=...)`, a PyTree of arrays with the types `outputs`.

    The platform is "cuda", "tpu" or "other". It can be batched, but not differentiated.
    """
    arrays, rest = eqx.partition(args, eqx.is_array)
    leaves, treedef = jax.tree.flatten(arrays)
    types, out_treedef = jax.tree.flatten(outputs)

    def on(*leaves: Any, platform: str) -> Sequence[Any]:
        args = eqx.combine(jax.tree.unflatten(treedef, leaves), rest)
        return jax.tree.leaves(run(*args, platform=platform))

    return jax.tree.unflatten(out_treedef, _bind(on, leaves, types))


def _bind(on: Callable[..., Sequence[Any]], operands: Sequence[Any], outputs: Any) -> list[Any]:
    types = tuple((tuple(x.shape), jnp.dtype(x.dtype)) for x in outputs)
    return _kernel_p.bind(*vary_alike(list(operands)), run=on, types=types)


@dataclasses.dataclass(frozen=True, eq=False)
class _Batched:
    """`inner` under `vmap`; operands that are not batched are not copied."""

    inner: Callable[..., Sequence[Any]]
    axes: tuple[int | None, ...]
    axis_size: int

    def __call__(self, *operands: Any, platform: str) -> Sequence[Any]:
        inner = partial(self.inner, platform=platform)
        return jax.vmap(inner, in_axes=self.axes, axis_size=self.axis_size)(*operands)


_kernel_p = Primitive("attention_kernel")
_kernel_p.multiple_results = True


def _run(*operands: Any, run: Any, types: Any, platform: str) -> Sequence[Any]:
    del types
    return run(*operands, platform=platform)


@_kernel_p.def_impl
def _impl(*operands: Any, **params: Any) -> Any:
    return jax.jit(lambda *xs: _kernel_p.bind(*xs, **params))(*operands)


@_kernel_p.def_abstract_eval
def _abstract_eval(*operands: Any, run: Any, types: Any) -> Any:
    del run
    return [typed_alike(shape, dtype, operands[0]) for shape, dtype in types]


def _lower(ctx: Any, *operands: Any, platform: str, **params: Any) -> Any:
    # Varying mesh axes have served their purpose, and the interpreter does not know them.
    plain = [
        [jax.core.ShapedArray(x.shape, x.dtype) for x in y] for y in (ctx.avals_in, ctx.avals_out)
    ]
    rule = mlir.lower_fun(partial(_run, platform=platform), multiple_results=True)
    with warnings.catch_warnings():
        # A later JAX is to replace this backend by one for the newest GPUs only.
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        try:
            return rule(ctx.replace(avals_in=plain[0], avals_out=plain[1]), *operands, **params)
        except NotImplementedError as error:
            if isinstance(error, NoKernelError):
                raise
            # Score mods and masks may use operations that only some platforms support.
            reason = str(error).partition(". Please file an issue")[0]
            message = f"has no kernel for this on platform {platform!r} ({reason})"
            raise NoKernelError(message) from error


mlir.register_lowering(_kernel_p, partial(_lower, platform="other"))
for _platform in ("cuda", "tpu"):
    mlir.register_lowering(_kernel_p, partial(_lower, platform=_platform), platform=_platform)


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
