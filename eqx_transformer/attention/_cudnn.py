"""cuDNN's fused attention, for the calls it computes correctly, with every derivative.

JAX's public function is differentiable once, in reverse mode only. Here its forward and backward
kernels are two of the passes of an implementation; forward mode and second derivatives, which
cuDNN lacks, come from the chunked implementation.
"""

import re
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ._chunked import chunked
from ._derivatives import Passes, Tangents
from ._inputs import Inputs
from ._masks import And, Causal, SlidingWindow

_OLDEST_JAX: Final = (0, 11)


def unavailable() -> str | None:
    """Why cuDNN cannot be used in this process; `None` if it can."""
    if jax.__version_info__ < _OLDEST_JAX:
        return f"jax {jax.__version__} cannot batch its gradient; jax 0.11 can"
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, and this program runs on {jax.default_backend()}"
    # Not a number on other vendors' GPUs.
    capability = str(getattr(jax.devices()[0], "compute_capability", None))
    if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < 8:
        return f"needs an NVIDIA GPU of compute capability 8.0 or more, not {capability}"
    return None


def refusal(inputs: Inputs) -> str | None:
    """Why cuDNN cannot compute this call on any machine; `None` if it can."""
    head_dim, v_dim = inputs.q.shape[-1], inputs.v.shape[-1]
    if inputs.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {inputs.q.dtype}"
    if inputs.score_mod is not None:
        return "takes no score_mod"
    if inputs.sinks is not None:
        return "takes no sinks"
    if inputs.dropout_seed is not None:
        return "would drop different weights for the same key"
    if inputs.q_positions is not None or inputs.kv_positions is not None:
        return "takes no explicit positions"
    if _pattern(inputs) is None:
        # A window without a causal mask is silently wrong on its left: jax-ml/jax#39576.
        return f"takes no mask, Causal() and a causal window, not {inputs.mask}"
    if inputs.mask is not None and inputs.q_seq != inputs.kv_seq:
        return f"a mask needs as many keys as queries, not {inputs.kv_seq} for {inputs.q_seq}"
    if inputs.q_seq % 2 or inputs.kv_seq % 2 or inputs.kv_seq == 0:
        return f"its gradient needs even lengths, not {inputs.q_seq} and {inputs.kv_seq}"
    if head_dim != v_dim or head_dim % 8 or not 0 < head_dim <= 128:
        return (
            "takes head_dim = v_dim, a multiple of 8 up to 128, not "
            f"head_dim={head_dim}, v_dim={v_dim}"
        )
    return None


def _pattern(inputs: Inputs) -> dict[str, Any] | None:
    """The mask as arguments of JAX's function; `None` if they cannot express it."""
    mask = inputs.mask
    if mask is None:
        return {}
    parts = (mask.left, mask.right) if isinstance(mask, And) else (mask,)
    left = [part.left for part in parts if isinstance(part, SlidingWindow)]
    causal = any(
        isinstance(part, Causal) or (isinstance(part, SlidingWindow) and part.right == 0)
        for part in parts
    )
    if not causal or not all(isinstance(part, Causal | SlidingWindow) for part in parts):
        return None
    bounds = [x for x in left if x is not None]
    if not bounds:
        return {"is_causal": True}
    return {"is_causal": True, "local_window_size": (min(bounds), 0)}


def _fused(q: Array, k: Array, v: Array, scale: float, pattern: dict[str, Any]) -> Array:
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn", **pattern)


def _save(inputs: Inputs) -> tuple[tuple[Array, None], tuple[Any, ...]]:
    pattern = _pattern(inputs)
    assert pattern is not None
    out, pull = jax.vjp(
        lambda q, k, v: _fused(q, k, v, inputs.scale, pattern), inputs.q, inputs.k, inputs.v
    )
    return (out, None), (pull,)


def _forward(inputs: Inputs) -> tuple[Array, None]:
    pattern = _pattern(inputs)
    assert pattern is not None
    # JAX rounds cuDNN's log-sum-exp to the dtype of the output, which makes it useless.
    return _fused(inputs.q, inputs.k, inputs.v, inputs.scale, pattern), None


def _tangent(residuals: tuple[Inputs, Any], tangents: Tangents) -> tuple[Array, None]:
    inputs, _ = residuals
    out, lse = chunked(inputs)
    dout, _ = chunked.tangent((inputs, out, lse), tangents)
    return dout, None


def _transpose(
    residuals: tuple[Inputs, Any], cotangents: tuple[Array, None], wanted: frozenset[str]
) -> Tangents:
    inputs, pull = residuals
    dout, _ = cotangents
    return _pulled(inputs, pull, dout, wanted=wanted)


@eqx.filter_custom_jvp
def _pulled(inputs: Inputs, pull: Any, dout: Array, *, wanted: frozenset[str]) -> Tangents:
    return dict(zip(("q", "k", "v"), pull(dout), strict=True))


@_pulled.def_jvp
def _pulled_jvp(primals: Any, tangents: Any, *, wanted: frozenset[str]) -> Any:
    inputs, pull, dout = primals
    dinputs, _, ddout = tangents

    # `pull` depends on `inputs` but is opaque; the chunked pass is the same function, spelled out.
    def exact(inputs: Inputs, dout: Array) -> Tangents:
        out, lse = chunked(inputs)
        return chunked.transpose((inputs, out, lse), (dout, jnp.zeros_like(lse)), wanted)

    _, moved = eqx.filter_jvp(exact, (inputs, dout), (dinputs, ddout))
    return _pulled(inputs, pull, dout, wanted=wanted), moved


cudnn = Passes(_forward, _tangent, _transpose, _save)
