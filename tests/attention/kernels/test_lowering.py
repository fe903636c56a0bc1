"""Every kernel is accepted by the compiler's front end for GPUs, on a machine without one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from eqx_transformer.attention._inputs import make_inputs
from eqx_transformer.attention._kernels import pallas

from .problems import CAUSAL, NAMED, Problem, documents_gradient, gpu, like, marked

TRITON = "__gpu$xla.gpu.triton"
# Masks and score mods are the business of `test_every_pair.py`.
LOWERED = ["plain", "one_head", "causal_mqa", "closure", "everything", "one_query"]
LOWERED += ["bfloat16", "float16"]


def lowered(function: Any, *args: Any) -> str:
    with gpu():
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def calls(function: Any, *args: Any) -> int:
    return lowered(function, *args).count(TRITON)


@pytest.mark.parametrize("problem", marked([NAMED[name] for name in LOWERED]))
def test_every_kernel_for_every_problem(problem):
    args = problem.args()

    def run(args: Any, moved: Any) -> Any:
        # Forward, tangent, and the two of the transpose.
        def function(args: Any) -> Any:
            return problem.run(pallas, args)

        value, pull = jax.vjp(function, args)
        return pull(value), jax.jvp(function, (args,), (moved,))[1]

    # A closure is another function each time it is passed, so it has two forward kernels.
    assert calls(run, args, like(args, 1)) == (5 if problem.name == "closure" else 4)


@pytest.mark.parametrize("dims", [(64, 64), (80, 40), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_size_of_head(dims, dtype):
    problem = Problem("sizes", 512, 512, 8, 2, *dims, mask=CAUSAL, dtype=jnp.dtype(dtype))

    def gradient(args: Any) -> Any:
        out, pull = jax.vjp(lambda x: problem.run(pallas, x), args)
        return pull(out)

    assert calls(gradient, problem.args()) == 3


def test_batches_are_more_programs_of_one_call():
    for axes, batch in [((0, None, 0), (3,)), ((0, 0, None), (3, 5))]:
        function = documents_gradient(pallas)
        for _ in batch:
            function = jax.vmap(function, in_axes=axes)
        q = jnp.zeros((*batch, 64, 2, 16))
        k = jnp.zeros((*(batch if axes[1] == 0 else ()), 64, 2, 16))
        ids = jnp.zeros((*(batch if axes[2] == 0 else ()), 64), jnp.int32)
        text = lowered(function, q, k, ids)
        assert text.count(TRITON) == 3
        # The chunked passes loop over tiles; nothing may loop over the batch.
        assert "stablehlo.while" not in text


def test_traced_on_one_platform_and_run_on_another():
    problem = Problem("portable", mask=CAUSAL)
    with gpu():
        traced = jax.jit(lambda args: problem.run(pallas, args)).trace(problem.args())
        assert TRITON in traced.lower(lowering_platforms=("cuda",)).as_text()
        assert TRITON not in traced.lower(lowering_platforms=("cpu",)).as_text()


# What score mods may compute: every operation on numbers and on integers.
FLOATS = {
    "abs": jnp.abs,
    "acos": lambda x: jnp.arccos(jnp.tanh(x)),
    "acosh": lambda x: jnp.arccosh(1 + jnp.abs(x)),
    "asin": lambda x: jnp.arcsin(jnp.tanh(x)),
    "asinh": jnp.arcsinh,
    "atan": jnp.arctan,
    "atan2": lambda x: jnp.arctan2(x, 2.0),
    "atanh": lambda x: jnp.arctanh(x / 100),
    "cbrt": jnp.cbrt,
    "ceil": jnp.ceil,
    "clip": lambda x: jax.lax.clamp(-1.0, x, 1.0),
    "cosh": jnp.cosh,
    "cos": jnp.cos,
    "erf_inv": lambda x: jax.lax.erf_inv(jnp.tanh(x)),
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "floor": jnp.floor,
    "gelu": jax.nn.gelu,
    "isfinite": lambda x: jnp.where(jnp.isfinite(x), x, 0.0),
    "log": lambda x: jnp.log(1 + x * x),
    "log1p": lambda x: jnp.log1p(x * x),
    "log2": lambda x: jnp.log2(1 + x * x),
    "mod": lambda x: x % 3.0,
    "power": lambda x: jnp.abs(x) ** 2.5 + x**3,
    "reciprocal": lambda x: 1 / (1 + x * x),
    "rsqrt": lambda x: jax.lax.rsqrt(1 + x * x),
    "sigmoid": jax.nn.sigmoid,
    "sign": jnp.sign,
    "sin": jnp.sin,
    "sinh": jnp.sinh,
    "softplus": jax.nn.softplus,
    "sqrt": lambda x: jnp.sqrt(1 + x * x),
    "tan": jnp.tan,
    "where": lambda x: jnp.where((x > 0) ^ (x >= 1) | ~(x < 2) & (x != 0), x, -x),
}
INTEGERS = {
    "arithmetic": lambda i, j: (i * 3 - j) // 2 + abs(i - j) % 3,
    "bits": lambda i, j: ((i << 2) ^ (j >> 1)) & 31 | ~j,
    "comparisons": lambda i, j: jnp.where((i == j) | (i <= j) & (i != 3), i, jnp.sign(j)),
    "count": lambda i, j: jax.lax.population_count(i) + jax.lax.clz(j),
    "extremes": lambda i, j: jnp.maximum(i, 3) + jnp.minimum(j, 4) + jnp.clip(i, 1, 5),
    "power": lambda i, j: i**2 + j,
    "unsigned": lambda i, j: (
        (i.astype(jnp.uint32) * jnp.uint32(7) // jnp.uint32(3) >> jnp.uint32(1)).astype(jnp.int32)
        + j
    ),
}


@dataclasses.dataclass(frozen=True)
class All:
    """Many operations in one kernel."""

    def __call__(self, score: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
        total = sum(f(score) for f in FLOATS.values())
        whole = sum(f(q_pos, kv_pos + head) for f in INTEGERS.values())
        return total + whole.astype(score.dtype)


def test_every_operation():
    q = jr.normal(jr.key(0), (16, 1, 16))

    def function(q: Any) -> Any:
        def mod(*args: Any) -> Any:
            return All()(*args)

        return pallas(make_inputs(q, q, q, score_mod=mod))[0]

    assert calls(function, q) == 1
    assert calls(jax.grad(lambda q: function(q).sum()), q) == 3
