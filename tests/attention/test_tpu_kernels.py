"""The kernels for TPUs: interpreted against the definition, and lowered without a TPU."""

import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqx_transformer.attention as attn
from eqx_transformer.attention._inputs import make_inputs
from eqx_transformer.attention._kernels import pallas
from eqx_transformer.attention._kernels._passes import kernel_passes
from eqx_transformer.attention._kernels._tpu_tile import make_plan
from eqx_transformer.attention._kernels._tuning import Tiles, Tuning
from eqx_transformer.attention._reference import reference

from .conformance import assert_close, compiled
from .kernels.problems import (
    CAUSAL,
    IDS,
    NAMED,
    RELATIVE,
    SCALED,
    Problem,
    Scaled,
    device,
    gpu,
    like,
)

SMALL = kernel_passes(Tiles(16, 32), "tpu")
TPU, GPU = "tpu_custom_call", "__gpu$xla.gpu.triton"
FAST = {"plain", "dense", "everything"}
# One of each kind of operand. How a mask and a score mod are combined makes no difference.
INTERPRETED = ["plain", "dense", "relative", "everything", "one_query", "nothing", "compose"]
INTERPRETED += ["bfloat16", "float16"]
# Of every other mask and score mod: `kernels/test_every_pair.py`.
LOWERED = ["plain", "one_head", "causal_mqa", "closure", "everything", "one_query"]
LOWERED += ["bfloat16", "float16"]
LOWERED_FAST = {"plain", "everything", "causal_mqa", "one_query", "float16"}


def finite(output: Any) -> Any:
    """For derivatives: the log-sum-exp of nothing is no number, but does not depend on anything."""
    out, lse = output
    return out, jnp.where(jnp.isfinite(lse), lse, 0)


def marked(problems: list[Problem], fast: set[str]) -> list[Any]:
    return [
        pytest.param(x, marks=[pytest.mark.slow] * (x.name not in fast), id=x.name)
        for x in problems
    ]


def lowered(function: Any, *args: Any, platform: str = "tpu") -> str:
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def every_kernel(problem: Problem, passes: Any) -> Any:
    """Of arguments, their tangents and cotangents: the value, and both of its derivatives."""

    def run(args: Any, moved: Any, pulled: Any) -> dict[str, Any]:
        def function(args: Any) -> Any:
            return finite(problem.run(passes, args))

        value, pull = jax.vjp(function, args)
        tangent = jax.jvp(function, (args,), (moved,))[1]
        return {"value": value, "vjp": pull(pulled)[0], "jvp": tangent}

    return run


def arguments(problem: Problem) -> tuple[Any, Any, Any]:
    args = problem.args()
    shapes = jax.eval_shape(lambda args: problem.run(reference, args), args)
    return args, like(args, 1), like(shapes, 2)


@pytest.mark.parametrize("problem", marked([NAMED[name] for name in INTERPRETED], FAST))
def test_value_and_first_derivatives(problem, x64):
    args = arguments(problem)
    actual = compiled(every_kernel(problem, SMALL))(*args)
    assert actual["value"][0].dtype == problem.dtype
    exact = jax.tree.map(lambda x: x.astype(jnp.float64), args)
    expected = compiled(every_kernel(problem, reference))(*exact)
    assert_close(actual, expected, problem.dtype)


KINDS = jnp.asarray(np.arange(53) % 5, jnp.int8)


def magnitude(score: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
    """Has no value at zero; looks up integers of one byte."""
    del head
    score = jnp.where(KINDS[q_pos] + KINDS[kv_pos] > 3, score, 2 * score)
    return score * score / jnp.abs(score)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_what_fills_up_a_tile_has_no_gradient_even_where_a_score_mod_is_singular(platform):
    problem = Problem("ragged", 20, 33, mod=magnitude)
    args = problem.args()

    def gradient(passes: Any) -> Any:
        return compiled(jax.grad(lambda args: problem.run(passes, args)[0].sum()))(args)

    actual = gradient(kernel_passes(Tiles(16, 32), platform))
    assert_close(actual, gradient(reference), problem.dtype)


@pytest.mark.slow
def test_second_derivatives():
    problem = Problem("second", 20, 33, mask=CAUSAL & attn.Segments(IDS), mod=SCALED, sinks=True)
    args, moved, pulled = arguments(problem)

    def product(passes: Any) -> Any:
        def gradient(args: Any) -> Any:
            return jax.vjp(lambda x: finite(problem.run(passes, x)), args)[1](pulled)[0]

        return compiled(lambda x, dx: jax.jvp(gradient, (x,), (dx,))[1])(args, moved)

    assert_close(product(SMALL), product(reference), problem.dtype)


def test_batches():
    """Those of documents have lists of tiles of their own; there a batch is a loop of kernels."""

    def gradient(q: Any, k: Any, ids: Any) -> Any:
        def loss(q: Any, k: Any) -> Any:
            mask = CAUSAL & attn.Segments(ids)
            inputs = make_inputs(q, k, k, mask=mask, score_mod=attn.ALiBi(4))
            return jnp.sin(SMALL(inputs)[0]).sum()

        return jax.value_and_grad(loss, argnums=1)(q, k)

    q, k = jr.normal(jr.key(0), (2, 40, 4, 16)), jr.normal(jr.key(1), (40, 2, 16))
    ids = jnp.stack([jnp.arange(40) // n for n in (7, 40)])
    one = compiled(gradient)
    loop = [one(q[i], k, ids[i]) for i in range(2)]
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *loop)
    batched = compiled(jax.vmap(gradient, in_axes=(0, None, 0)))
    assert_close(batched(q, k, ids), expected, jnp.float32)


@pytest.mark.parametrize("problem", marked([NAMED[name] for name in LOWERED], LOWERED_FAST))
def test_every_kernel_is_lowered(problem):
    text = lowered(every_kernel(problem, pallas), *arguments(problem))
    # A closure is another function each time it is passed, so it has two forward kernels.
    assert text.count(TPU) == (5 if problem.name == "closure" else 4)
    assert GPU not in text


@pytest.mark.parametrize("batched", [False, True])
def test_batches_are_programs_of_one_kernel_unless_they_differ_in_what_is_visited(batched):
    def run(q: Any, k: Any, ids: Any) -> Any:
        mask = CAUSAL & attn.Segments(ids) if batched else CAUSAL
        return jax.grad(lambda q: pallas(make_inputs(q, k, k, mask=mask))[0].sum())(q)

    q, k, ids = jnp.zeros((3, 40, 2, 16)), jnp.zeros((40, 2, 16)), jnp.zeros((3, 40), jnp.int32)
    text = lowered(jax.vmap(run, in_axes=(0, None, 0)), q, k, ids)
    assert text.count(TPU) == 3
    assert ("stablehlo.while" in text) == batched


@pytest.mark.parametrize(
    ("platform", "check_vma"),
    [("tpu", True), ("tpu", False), pytest.param("cuda", True, marks=pytest.mark.slow)],
)
def test_every_kernel_where_batch_and_heads_are_split_over_devices(platform, check_vma):
    mask = CAUSAL & attn.Segments(IDS)
    problem = Problem("split", 40, 40, mask=mask, mod=SCALED, sinks=True)
    args = problem.args()
    args |= {name: jnp.stack([args[name]] * 2) for name in "qkv"}
    spec = jax.sharding.PartitionSpec
    of_tokens, of_heads = spec("batch", None, "heads"), spec("heads")
    specs: dict[str, Any] = dict.fromkeys("qkv", of_tokens) | {"sinks": of_heads}
    specs["mod"] = Scaled(spec(), of_heads, spec())

    def run(args: Any) -> Any:
        args |= {name: args[name][0] for name in "qkv"}
        result = every_kernel(problem, pallas)(args, args, problem.run(pallas, args))
        of_devices = [result["jvp"][0], *(result["vjp"][name] for name in "qkv")]
        return [x[None] for x in of_devices]

    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((2, 2), ("batch", "heads"), axes, **device(platform))
    split = jax.shard_map(
        run, mesh=mesh, in_specs=(specs,), out_specs=of_tokens, check_vma=check_vma
    )
    text = lowered(split, args, platform=platform)
    assert [text.count(x) for x in (TPU, GPU)] == ([4, 0] if platform == "tpu" else [0, 4])


def test_the_size_of_tiles_is_a_multiple_of_the_lanes():
    q, k = jnp.zeros((700, 2, 16)), jnp.zeros((90, 2, 16))
    assert make_plan(make_inputs(q, k, k), "forward", Tuning(), None).grid == (2, 2, 1)
    frame = make_plan(make_inputs(q, k, k, block_size=200), "forward", Tuning(), None).frame
    assert (frame.block_q, frame.block_kv, frame.rows) == (256, 128, 3)
    frame = make_plan(make_inputs(q, k, k, block_size=9999), "forward", Tuning(), None).frame
    assert (frame.block_q, frame.block_kv, frame.rows) == (512, 128, 2)


def test_whose_kernels_run_is_decided_by_platform():
    problem = Problem("portable", mask=CAUSAL, mod=attn.ALiBi(4))
    args = problem.args()

    def run(args: Any) -> Any:
        return problem.run(pallas, args)

    tpu, cpu = lowered(run, args), lowered(run, args, platform="cpu")
    with gpu():
        cuda = lowered(run, args, platform="cuda")
    assert [[x in text for x in (TPU, GPU)] for text in (tpu, cuda, cpu)] == [
        [True, False],
        [False, True],
        [False, False],
    ]


WITHOUT_TRITON = """
import sys

sys.modules["jax.experimental.pallas.triton"] = None  # What imports it now fails.
import jax
import jax.numpy as jnp
from eqx_transformer.attention import Causal, dot_product_attention


def run(q):
    return dot_product_attention(q, q, q, mask=Causal(), implementation="pallas").sum()


q = jnp.zeros((40, 2, 16))
program = jax.jit(jax.grad(run)).trace(q)
print(program.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call"))
"""


def test_without_pallas_for_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert done.stdout == "3\n", done.stderr


def test_refuses_what_a_tpu_cannot_do_when_it_is_lowered_for_one():
    q = jnp.zeros((40, 4, 16))
    large = eqx.tree_at(lambda x: x.table, RELATIVE, jnp.zeros((300, 4)))

    def run(mod: Any, q: Any) -> Any:
        return pallas(make_inputs(q, q, q, score_mod=mod))[0]

    message = "on a TPU for a score_mod that indexes.* a table of 1200 elements, more than 1024"
    with pytest.raises(NotImplementedError, match=message):
        lowered(run, large, q)
    assert np.isfinite(run(large, q)).all()

    def inverse(score: Any, *_: Any) -> Any:
        return jnp.arccos(jnp.tanh(score))

    with pytest.raises(NotImplementedError, match=r"acos.*use implementation='chunked'"):
        lowered(lambda q: run(inverse, q), q)

    def half(score: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
        return score + (q_pos - kv_pos).astype(jnp.float16).astype(score.dtype)

    with pytest.raises(NotImplementedError, match="score_mod that computes in float16"):
        lowered(lambda q: run(half, q), q)
    assert np.isfinite(run(half, q)).all()
