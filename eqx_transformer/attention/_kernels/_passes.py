"""Attention by the kernels, with every derivative.

Pallas is imported when a kernel is used: it takes time, and later versions of JAX lack parts of it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._chunked import chunked
from .._derivatives import Output, Passes, Tangents
from .._inputs import Inputs
from ._launch import by_platform
from ._tuning import HopperTiles, Kernel, Tiles, Tuning, decodes
from ._unrolled import NoKernelError

Platform = Literal["cuda", "hopper", "tpu"]
"""What there are kernels for. Those for Hopper GPUs are used where they are known to be faster."""

_MAX_DIM = 256
"""The greatest head dimension whose tiles fit a program's shared memory."""


def refusal(inputs: Inputs) -> str | None:
    """Why the kernels cannot compute this call on any machine; `None` if they can."""
    if inputs.dtype != jnp.float32:
        return f"has no kernels for {inputs.q.dtype}"
    try:
        _check_dims(inputs)
        from . import _tile

        eqx.filter_eval_shape(_tile.programs, inputs)
    except ImportError:
        return "needs Pallas, which this version of JAX lacks"
    except NoKernelError as error:
        return error.reason
    return None


def _check_dims(inputs: Inputs) -> None:
    dim = max(inputs.q.shape[-1], inputs.v.shape[-1])
    if dim > _MAX_DIM:
        raise NoKernelError(f"takes heads of up to {_MAX_DIM} dimensions, and these have {dim}")


def _chunked_instead(inputs: Inputs) -> bool:
    """Whether to use the chunked passes instead: in float64, and where an input is empty."""
    if inputs.dtype != jnp.float32:
        return True
    _check_dims(inputs)
    return 0 in (*inputs.q.shape, *inputs.k.shape, *inputs.v.shape)


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The kernels of a platform: by default, the one that a program is lowered for."""

    tuning: Tuning
    platform: Platform | None = None

    def __call__(
        self, kernel: Kernel, run: Callable[..., Any], outputs: Any, inputs: Inputs, *args: Any
    ) -> Any:
        """Computes `run(kernels, tuning, inputs, *args)`, with results like `outputs`.

        Arguments:

        - `kernel`: which of the kernels `run` calls.
        """

        def on(inputs: Inputs, *args: Any, platform: str) -> Any:
            if (self.platform or platform) == "tpu":
                from . import _tpu as kernels

                return run(kernels, self.tuning, inputs, *args)
            tiles = self._hopper_tiles(kernel, inputs) if platform == "cuda" else None
            if tiles is not None:
                from . import _hopper as kernels

                return run(kernels, Tuning(tiles), inputs, *args)
            try:
                if kernel == "decode":
                    from . import _decode as kernels
                else:
                    from . import _triton as kernels
            except ImportError as error:
                if platform == "cuda":
                    reason = "needs Pallas for Triton on this GPU, which this version of JAX lacks"
                    raise NoKernelError(reason) from error
                # The kernels will be interpreted, so those for TPUs do just as well.
                from . import _tpu as kernels

            return run(kernels, self.tuning, inputs, *args)

        return by_platform(on, (inputs, *args), outputs)

    def _hopper_tiles(self, kernel: Kernel, inputs: Inputs) -> HopperTiles | None:
        def takes() -> bool:
            from ._hopper_plan import takes

            return takes(inputs)

        return self.tuning.hopper(kernel, inputs, takes, asked=self.platform == "hopper")


def _statistics(inputs: Inputs) -> Any:
    return jax.ShapeDtypeStruct((inputs.q_seq, inputs.heads), jnp.float32)


def _output(inputs: Inputs) -> Any:
    return jax.ShapeDtypeStruct((*inputs.q.shape[:2], inputs.v.shape[-1]), inputs.q.dtype)


@dataclasses.dataclass(frozen=True)
class _Forward:
    kernels: _Kernels

    def __call__(self, inputs: Inputs) -> Output:
        if _chunked_instead(inputs):
            return chunked.forward(inputs)

        kernel: Kernel = "decode" if decodes(inputs) else "forward"

        def run(kernels: Any, tuning: Tuning, inputs: Inputs) -> Output:
            out, lse = kernels.forward(inputs, tuning)
            return out, lse.T

        return self.kernels(kernel, run, (_output(inputs), _statistics(inputs)), inputs)


@eqx.filter_custom_jvp
def _tangent(residuals: Any, tangents: Tangents, *, kernels: _Kernels) -> Output:
    inputs, out, lse = residuals
    dlse = jnp.zeros_like(lse)
    if inputs.sinks is not None and "sinks" in tangents:
        sinks = inputs.sinks.astype(inputs.dtype)[None, :]
        dlse += jnp.exp(sinks - _finite(lse)) * tangents["sinks"].astype(inputs.dtype)[None, :]
    # Equinox spells "not perturbed" as a `None` for every leaf.
    unmoved = jax.tree.map(lambda _: None, inputs.score_mod)
    moved = dict(tangents) | {"score_mod": tangents.get("score_mod", unmoved)}

    def run(kernels: Any, tuning: Tuning, inputs: Inputs, *rest: Any) -> Output:
        dout, dlse = kernels.tangent(inputs, tuning, *rest)
        return dout, dlse.T

    args = (inputs, out, _finite(lse).T, dlse.T, moved)
    return kernels("tangent", run, (_output(inputs), _statistics(inputs)), *args)


@_tangent.def_jvp
def _tangent_jvp(primals: Any, moved: Any, *, kernels: _Kernels) -> tuple[Output, Output]:
    return _tangent(*primals, kernels=kernels), eqx.filter_jvp(chunked.tangent, primals, moved)[1]


@dataclasses.dataclass(frozen=True)
class _Tangent:
    kernels: _Kernels

    def __call__(self, residuals: tuple[Inputs, Array, Array], tangents: Tangents) -> Output:
        if _chunked_instead(residuals[0]):
            return chunked.tangent(residuals, tangents)
        return _tangent(residuals, tangents, kernels=self.kernels)


@eqx.filter_custom_jvp
def _transpose(
    residuals: Any, cotangents: Output, *, wanted: frozenset[str], kernels: _Kernels
) -> Tangents:
    inputs, out, lse = residuals
    dout, dlse = cotangents
    delta = (dout.astype(inputs.dtype) * out.astype(inputs.dtype)).sum(axis=-1) - dlse
    args = (inputs, _finite(lse).T, delta.T, dout.astype(inputs.q.dtype))

    def of_q(kernels: Any, tuning: Tuning, inputs: Inputs, *stats: Any) -> Any:
        return kernels.transpose_q(inputs, tuning, *stats)

    def of_kv(kernels: Any, tuning: Tuning, inputs: Inputs, *stats: Any) -> Any:
        return kernels.transpose_kv(inputs, tuning, *stats)

    dq = kernels("transpose_q", of_q, inputs.q, *args)
    dk, dv = kernels("transpose_kv", of_kv, (inputs.k, inputs.v), *args)
    result = {"q": dq, "k": dk, "v": dv}
    if inputs.sinks is not None and "sinks" in wanted:
        weights = jnp.exp(inputs.sinks.astype(inputs.dtype)[None, :] - _finite(lse))
        result["sinks"] = -(weights * delta).sum(axis=0).astype(inputs.sinks.dtype)
    if "score_mod" in wanted:
        # A sum over tiles for every array of the score mod. Not by a kernel, but in little memory.
        rest = chunked.transpose(residuals, cotangents, frozenset({"score_mod"}))
        result["score_mod"] = rest["score_mod"]
    return result


@_transpose.def_jvp
def _transpose_jvp(
    primals: Any, moved: Any, *, wanted: frozenset[str], kernels: _Kernels
) -> tuple[Tangents, Tangents]:
    def plain(residuals: Any, cotangents: Output) -> Tangents:
        return chunked.transpose(residuals, cotangents, wanted)

    out = _transpose(*primals, wanted=wanted, kernels=kernels)
    return out, eqx.filter_jvp(plain, primals, moved)[1]


@dataclasses.dataclass(frozen=True)
class _Transpose:
    kernels: _Kernels

    def __call__(
        self,
        residuals: tuple[Inputs, Array, Array],
        cotangents: Output,
        wanted: frozenset[str],
    ) -> Tangents:
        if _chunked_instead(residuals[0]):
            return chunked.transpose(residuals, cotangents, wanted)
        return _transpose(residuals, cotangents, wanted=wanted, kernels=self.kernels)


def _finite(lse: Array) -> Array:
    """The log-sum-exp, but `inf` for rows that attend to nothing, whose weights are all zero."""
    return jnp.where(jnp.isneginf(lse), jnp.inf, lse)


def kernel_passes(
    tiles: Tiles | HopperTiles | None = None, platform: Platform | None = None
) -> Passes:
    """The passes by a platform's kernels, with the given tiles or those that suit the inputs."""
    kernels = _Kernels(Tuning(tiles), platform)
    return Passes(_Forward(kernels), _Tangent(kernels), _Transpose(kernels))


pallas = kernel_passes()
