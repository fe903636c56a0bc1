"""The kernels for Hopper GPUs: interpreted, with a detector of races, and lowered without a GPU."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqx_transformer.attention as attn
from eqx_transformer.attention._inputs import make_inputs
from eqx_transformer.attention._kernels import _passes
from eqx_transformer.attention._kernels._passes import kernel_passes
from eqx_transformer.attention._kernels._tuning import HOPPER, HopperTiles, Measured
from eqx_transformer.attention._kernels._unrolled import NoKernelError
from eqx_transformer.attention._reference import reference

from .conformance import assert_close
from .kernels.problems import CAUSAL, NAMED, Problem, Rows, documents_gradient, gpu, like

needs_mosaic = pytest.mark.skipif(not HOPPER, reason="needs JAX 0.11, and this is older")
PASSES = kernel_passes(platform="hopper")
_RNG = np.random.default_rng(0)
DOCUMENTS = jnp.asarray(np.sort(_RNG.integers(0, 4, 200)), jnp.int32)
FEATURES = jnp.asarray(_RNG.normal(size=(7, 2)), jnp.float32)


def decay(score: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
    """Singular right behind the last query."""
    del head
    return score - jnp.log((130 - (q_pos - kv_pos)).astype(score.dtype))


def size(q_seq: int, kv_seq: int) -> dict[str, Any]:
    """Two heads that share one, in several tiles both ways."""
    return {"q_seq": q_seq, "kv_seq": kv_seq, "heads": 2, "kv_heads": 1, "dtype": jnp.bfloat16}


INTERPRETED = {
    # Queries that attend to nothing, heads that fill no tile, and default tiles.
    "causal": (
        PASSES,
        Problem(
            "causal",
            **size(130, 200),
            head_dim=72,
            v_dim=24,
            mask=CAUSAL & attn.Padding(jnp.arange(200) > 5),
            mod=attn.Compose((attn.ALiBi(2), decay)),
        ),
    ),
    "everything": (
        kernel_passes(HopperTiles(64, 3)),
        Problem(
            "everything",
            **size(150, 200) | {"dtype": jnp.float16},
            mask=attn.Segments(DOCUMENTS) & attn.SlidingWindow(90, 20),
            mod=attn.Compose((Rows(FEATURES), attn.SoftCap(3.0))),
            sinks=True,
            options={
                "dropout_rate": 0.2,
                "dropout_key": jr.key(6),
                "scale": -0.4,
                "q_positions": jnp.asarray(_RNG.permutation(200)[:150], jnp.int32),
                "kv_positions": jnp.asarray(_RNG.permutation(200), jnp.int32),
            },
        ),
    ),
}


@pytest.fixture
def interpreted(monkeypatch):
    """Runs kernels at once: the interpreter has effects, which our operations cannot have.

    It raises an error where what two warpgroups do to memory has no order.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    from eqx_transformer.attention._kernels import _hopper_tile

    def launch(run: Any, operands: Any, outputs: Any) -> Any:
        del outputs
        return run(*operands, interpret=True)

    monkeypatch.setattr(_hopper_tile, "launch", launch)
    monkeypatch.setattr(
        _passes, "by_platform", lambda run, args, outputs: run(*args, platform="cuda")
    )
    gpu_callbacks.reset_gpu_interpret_mode_state()
    with gpu():
        yield


def three(passes: Any, problem: Problem, args: Any, moved: Any, pulled: Any) -> dict[str, Any]:
    """The three passes of an implementation."""
    inputs = make_inputs(
        args["q"],
        args["k"],
        args["v"],
        sinks=args.get("sinks"),
        mask=problem.mask,
        score_mod=problem.mod,
        **problem.options,
    )
    tokens = {name: x for name, x in moved.items() if name != "mod"}
    residuals = (inputs, *passes.forward(inputs))
    return {
        "value": residuals[1:],
        "jvp": passes.tangent(residuals, tokens),
        "vjp": passes.transpose(residuals, pulled, frozenset(tokens)),
    }


def expected(problem: Problem, args: Any, moved: Any, pulled: Any) -> dict[str, Any]:
    """The same of the definition."""

    def function(tokens: Any) -> Any:
        out, lse = problem.run(reference, tokens | {"mod": args["mod"]})
        return out, jnp.where(jnp.isfinite(lse), lse, 0)

    tokens, moved = ({k: v for k, v in x.items() if k != "mod"} for x in (args, moved))
    _, pull = jax.vjp(function, tokens)
    return {
        "value": problem.run(reference, args),
        "jvp": jax.jvp(function, (tokens,), (moved,))[1],
        "vjp": pull(pulled)[0],
    }


@needs_mosaic
@pytest.mark.parametrize("name", INTERPRETED)
def test_values_and_derivatives_without_races(name, interpreted):
    passes, problem = INTERPRETED[name]
    args = problem.args()
    shapes = jax.eval_shape(lambda args: problem.run(reference, args), args)
    moved, pulled = like(args, 1), like(shapes, 2)
    actual = three(passes, problem, args, moved, pulled)
    assert actual["value"][0].dtype == problem.dtype
    # The interpreter's threads do not hear of 64 bits.
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: x.astype(jnp.float64), (args, moved, pulled))
        wanted = expected(problem, *exact)
    assert_close(actual, wanted, problem.dtype)


@needs_mosaic
def test_the_detector_of_races_detects_one(interpreted, monkeypatch):
    from eqx_transformer.attention._kernels import _hopper_tile

    # Without waiting for a tile to arrive.
    monkeypatch.setattr(_hopper_tile.Tile, "ready", lambda self, part: None)
    problem = Problem("race", **size(64, 200))
    args = problem.args()
    inputs = make_inputs(args["q"], args["k"], args["v"])
    with pytest.raises(Exception, match=r"RACE DETECTED|no threads observed"):
        jax.block_until_ready(kernel_passes(HopperTiles(64, 1)).forward(inputs))


def kernels(problem: Problem, passes: Any = PASSES) -> tuple[int, int]:
    """How many kernels for Hopper GPUs, and others, a value and its derivatives are lowered to."""

    def run(args: Any, moved: Any) -> Any:
        def function(args: Any) -> Any:
            return problem.run(passes, args)

        value, pull = jax.vjp(function, args)
        return pull(value), jax.jvp(function, (args,), (moved,))[1]

    args = problem.args()
    with gpu():
        traced = jax.jit(run).trace(args, like(args, 1))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text.count("@mosaic_gpu"), text.count("__gpu$xla.gpu.triton")


def curved(score: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
    """Of an operation that Pallas knows on other platforms."""
    del q_pos, kv_pos, head
    return score + jnp.log1p(score * score)


# Of every other mask and score mod: `kernels/test_every_pair.py`.
LOWERED = [*(NAMED[x] for x in ("plain", "causal_mqa", "dense", "closure", "expression"))]
LOWERED.append(Problem("curved", mod=curved))
OTHERS = ("dense", "curved", "closure")
"""What looks something up for every pair, lacks an operation, or takes sines of distances."""


@needs_mosaic
@pytest.mark.parametrize("problem", LOWERED, ids=str)
def test_whose_kernels_run_depends_on_score_mod_and_mask(problem):
    found = kernels(dataclasses.replace(problem, dtype=jnp.bfloat16))
    # A closure is another function each time it is passed, so it has two forward kernels.
    count = 5 if problem.name == "closure" else 4
    assert found == ((0, count) if problem.name in OTHERS else (count, 0))


@needs_mosaic
@pytest.mark.parametrize("name", INTERPRETED)
def test_what_is_interpreted_is_lowered_with_64_bits_enabled(name, x64):
    passes, problem = INTERPRETED[name]
    assert kernels(problem, passes) == (4, 0)


@needs_mosaic
@pytest.mark.parametrize(
    ("dims", "dtype", "count"),
    [
        ((64, 64), "float16", 4),
        ((128, 128), "bfloat16", 4),
        ((192, 128), "bfloat16", 1),
        ((256, 256), "bfloat16", 1),
        ((192, 256), "bfloat16", 1),
        ((128, 128), "float32", 0),
    ],
)
def test_kernels_by_size_of_head_and_dtype(dims, dtype, count):
    problem = Problem("sizes", 512, 512, 8, 2, *dims, mask=CAUSAL, dtype=jnp.dtype(dtype))
    assert kernels(problem) == (count, 4 - count)


@needs_mosaic
def test_few_queries_are_decoded_by_the_kernel_for_that(monkeypatch):
    row = Measured("GPU", "forward", "bfloat16", 16, 4096, "full", "none", HopperTiles(64))
    monkeypatch.setattr("eqx_transformer.attention._kernels._tuning._of_device", lambda: [row])
    for passes in (PASSES, kernel_passes()):
        # Forward; the backward pass of few queries is that of many.
        few, many = (Problem("few", n, 4096, dtype=jnp.bfloat16) for n in (1, 40))
        of_passes = (3, 1) if passes is PASSES else (0, 4)
        assert kernels(few, passes) == of_passes
        assert kernels(many, passes) == ((4, 0) if passes is PASSES else (1, 3))


@needs_mosaic
def test_batches_are_more_programs_of_one_call():
    gradient = documents_gradient(PASSES)
    q, k = (jnp.zeros((*batch, 64, 2, 16), jnp.bfloat16) for batch in ((3,), ()))
    ids = jnp.zeros((3, 64), jnp.int32)
    with gpu():
        traced = jax.jit(jax.vmap(gradient, in_axes=(0, None, 0))).trace(q, k, ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 3 and "stablehlo.while" not in text


@needs_mosaic
@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"dtype": jnp.float32}, "no kernels for Hopper GPUs in float32"),
        ({"mask": attn.Dense(np.ones((41, 53), bool))}, "look something up for every pair"),
    ],
)
def test_tiles_that_are_given_are_not_replaced(changed, why):
    problem = Problem("refused", dtype=jnp.bfloat16)
    with pytest.raises(NoKernelError, match=why):
        kernels(dataclasses.replace(problem, **changed), kernel_passes(HopperTiles(64)))


def test_an_older_jax_takes_the_kernels_for_any_gpu(monkeypatch):
    monkeypatch.setattr("eqx_transformer.attention._kernels._tuning.HOPPER", False)
    assert kernels(Problem("old", mask=CAUSAL, dtype=jnp.bfloat16)) == (0, 4)
