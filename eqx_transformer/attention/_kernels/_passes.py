"""Attention by the kernels, with every derivative.

Pallas is imported when a kernel is used: it takes time, and later versions of JAX lack a part.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._chunked import chunked
from .._derivatives import Output, Passes, Tangents
from .._inputs import Inputs
from ._tuning import Tiles, Tuning
from ._unrolled import NoKernelError

_MAX_DIM = 256
"""The greatest head dimension whose tiles fit a program's shared memory."""


def refusal(inputs: Inputs) -> str | None:
    """Why there are no kernels for a call on any machine; `None` if there are."""
    if inputs.dtype != jnp.float32:
        return f"has no kernels for {inputs.q.dtype}"
    try:
        _check_dims(inputs)
        from . import _tile

        eqx.filter_eval_shape(_tile.programs, inputs)
    except ImportError:
        return "needs Pallas for Triton, which this version of JAX lacks"
    except NoKernelError as error:
        return error.reason
    return None


def _check_dims(inputs: Inputs) -> None:
    dim = max(inputs.q.shape[-1], inputs.v.shape[-1])
    if dim > _MAX_DIM:
        raise NoKernelError(f"takes heads of up to {_MAX_DIM} dimensions, and these have {dim}")


def _chunked_instead(inputs: Inputs) -> bool:
    """Whether the chunked passes do it: in float64, and where nothing is to be computed."""
    if inputs.dtype != jnp.float32:
        return True
    _check_dims(inputs)
    return 0 in (*inputs.q.shape, *inputs.k.shape, *inputs.v.shape)


@dataclasses.dataclass(frozen=True)
class _Forward:
    tuning: Tuning

    def __call__(self, inputs: Inputs) -> Output:
        if _chunked_instead(inputs):
            return chunked.forward(inputs)
        from . import _triton

        out, lse = _triton.forward(inputs, self.tuning)
        return out, lse.T


@eqx.filter_custom_jvp
def _tangent(residuals: Any, tangents: Tangents, *, tuning: Tuning) -> Output:
    from . import _triton

    inputs, out, lse = residuals
    dlse = jnp.zeros_like(lse)
    if inputs.sinks is not None and "sinks" in tangents:
        sinks = inputs.sinks.astype(inputs.dtype)[None, :]
        dlse += jnp.exp(sinks - _finite(lse)) * tangents["sinks"].astype(inputs.dtype)[None, :]
    # Equinox spells "not perturbed" as a `None` for every leaf.
    unmoved = jax.tree.map(lambda _: None, inputs.score_mod)
    moved = dict(tangents) | {"score_mod": tangents.get("score_mod", unmoved)}
    dout, dlse = _triton.tangent(inputs, tuning, out, _finite(lse).T, dlse.T, moved)
    return dout, dlse.T


@_tangent.def_jvp
def _tangent_jvp(primals: Any, moved: Any, *, tuning: Tuning) -> tuple[Output, Output]:
    return _tangent(*primals, tuning=tuning), eqx.filter_jvp(chunked.tangent, primals, moved)[1]


@dataclasses.dataclass(frozen=True)
class _Tangent:
    tuning: Tuning

    def __call__(self, residuals: tuple[Inputs, Array, Array], tangents: Tangents) -> Output:
        if _chunked_instead(residuals[0]):
            return chunked.tangent(residuals, tangents)
        return _tangent(residuals, tangents, tuning=self.tuning)


@eqx.filter_custom_jvp
def _transpose(
    residuals: Any, cotangents: Output, *, wanted: frozenset[str], tuning: Tuning
) -> Tangents:
    from . import _triton

    inputs, out, lse = residuals
    dout, dlse = cotangents
    delta = (dout.astype(inputs.dtype) * out.astype(inputs.dtype)).sum(axis=-1) - dlse
    stats = (_finite(lse).T, delta.T, dout.astype(inputs.q.dtype))
    dq = _triton.transpose_q(inputs, tuning, *stats)
    dk, dv = _triton.transpose_kv(inputs, tuning, *stats)
    result = {"q": dq, "k": dk, "v": dv}
    if inputs.sinks is not None and "sinks" in wanted:
        weights = jnp.exp(inputs.sinks.astype(inputs.dtype)[None, :] - _finite(lse))
        result["sinks"] = -(weights * delta).sum(axis=0).astype(inputs.sinks.dtype)
    if "score_mod" in wanted:
        # A sum over tiles for every array of the score mod: no kernel for it, but little memory.
        rest = chunked.transpose(residuals, cotangents, frozenset({"score_mod"}))
        result["score_mod"] = rest["score_mod"]
    return result


@_transpose.def_jvp
def _transpose_jvp(
    primals: Any, moved: Any, *, wanted: frozenset[str], tuning: Tuning
) -> tuple[Tangents, Tangents]:
    def plain(residuals: Any, cotangents: Output) -> Tangents:
        return chunked.transpose(residuals, cotangents, wanted)

    out = _transpose(*primals, wanted=wanted, tuning=tuning)
    return out, eqx.filter_jvp(plain, primals, moved)[1]


@dataclasses.dataclass(frozen=True)
class _Transpose:
    tuning: Tuning

    def __call__(
        self,
        residuals: tuple[Inputs, Array, Array],
        cotangents: Output,
        wanted: frozenset[str],
    ) -> Tangents:
        if _chunked_instead(residuals[0]):
            return chunked.transpose(residuals, cotangents, wanted)
        return _transpose(residuals, cotangents, wanted=wanted, tuning=self.tuning)


def _finite(lse: Array) -> Array:
    """`inf` for rows that attend to nothing, whose weights are all zero."""
    return jnp.where(jnp.isneginf(lse), jnp.inf, lse)


def kernel_passes(tiles: Tiles | None = None) -> Passes:
    """The passes, with tiles of a given size or with those that suit the inputs."""
    tuning = Tuning(tiles)
    return Passes(_Forward(tuning), _Tangent(tuning), _Transpose(tuning))


pallas = kernel_passes()
