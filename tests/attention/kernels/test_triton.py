"""The kernels against the definition, interpreted."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqx_transformer.attention as attn
from eqx_transformer.attention._chunked import chunked
from eqx_transformer.attention._dropout import keep
from eqx_transformer.attention._inputs import make_inputs
from eqx_transformer.attention._kernels import pallas, refusal
from eqx_transformer.attention._kernels._passes import kernel_passes
from eqx_transformer.attention._kernels._tuning import Tiles
from eqx_transformer.attention._reference import reference

from ..conformance import assert_close, compiled, equations
from .problems import CAUSAL, IDS, NAMED, PROBLEMS, RELATIVE, SCALED, Problem, like, marked

SMALL = kernel_passes(Tiles(16, 32))


def finite(output: Any) -> Any:
    """For derivatives: the log-sum-exp of nothing is no number, but does not depend on anything."""
    out, lse = output
    return out, jnp.where(jnp.isfinite(lse), lse, 0)


def wide(tree: Any) -> Any:
    """In float32, so that the reference does not round."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def of(problem: Problem, passes: Any) -> Any:
    return lambda args: finite(problem.run(passes, args))


@pytest.mark.parametrize("problem", marked(PROBLEMS))
def test_value_and_first_derivatives(problem):
    args = problem.args()
    moved = like(args, 1)
    shapes = jax.eval_shape(of(problem, reference), args)
    pulled = like(shapes, 2)

    def run(passes: Any, args: Any, moved: Any, pulled: Any) -> Any:
        value, pull = jax.vjp(of(problem, passes), args)
        _, tangent = jax.jvp(of(problem, passes), (args,), (moved,))
        return {"value": value, "vjp": pull(pulled)[0], "jvp": tangent}

    actual = compiled(lambda *xs: run(SMALL, *xs))(args, moved, pulled)
    assert actual["value"][0].dtype == problem.dtype
    expected = compiled(lambda *xs: run(reference, *xs))(*wide((args, moved, pulled)))
    assert_close(actual, expected, problem.dtype)


def test_rows_that_attend_to_nothing():
    problem = NAMED["nothing"]
    out, lse = problem.run(SMALL, problem.args())
    assert (out == 0).all() and (lse == -jnp.inf).all()


def test_second_derivatives():
    mask = CAUSAL & attn.Segments(IDS)
    problem = Problem("second", 20, 33, mask=mask, mod=SCALED, sinks=True)
    args = problem.args()
    moved = like(args, 1)
    pulled = like(jax.eval_shape(of(problem, reference), args), 2)

    def run(passes: Any, args: Any, moved: Any, pulled: Any) -> Any:
        def gradient(args: Any) -> Any:
            return jax.vjp(of(problem, passes), args)[1](pulled)[0]

        def slope(args: Any) -> Any:
            return jax.jvp(of(problem, passes), (args,), (moved,))[1]

        return {
            "forward_over_reverse": jax.jvp(gradient, (args,), (moved,))[1],
            "reverse_over_forward": jax.vjp(slope, args)[1](pulled)[0],
        }

    actual = compiled(lambda *xs: run(SMALL, *xs))(args, moved, pulled)
    expected = compiled(lambda *xs: run(reference, *xs))(args, moved, pulled)
    assert_close(actual, expected, problem.dtype)
    assert_close(actual["reverse_over_forward"], actual["forward_over_reverse"], problem.dtype)


def test_vmap_is_a_loop():
    """Also of masks and positions, which batch the lists of tiles."""

    def loss(q: Any, k: Any, v: Any, ids: Any, positions: Any) -> Any:
        mask = CAUSAL & attn.Segments(ids)
        inputs = make_inputs(q, k, v, mask=mask, score_mod=attn.ALiBi(4), q_positions=positions)
        out, lse = finite(SMALL(inputs))
        return (out * jnp.cos(out)).sum() + lse.sum(), out

    q, v = jr.normal(jr.key(0), (3, 40, 4, 16)), jr.normal(jr.key(1), (3, 40, 2, 16))
    k = jr.normal(jr.key(2), (40, 2, 16))
    ids = jnp.stack([jnp.arange(40) // n for n in (7, 13, 40)])
    positions = jnp.stack([jnp.arange(40), jnp.arange(40)[::-1], jnp.arange(40)])
    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    one = compiled(gradient)
    loop = [one(q[i], k, v[i], ids[i], positions[i]) for i in range(3)]
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *loop)
    batched = compiled(jax.vmap(gradient, in_axes=(0, None, 0, 0, 0)))
    assert_close(batched(q, k, v, ids, positions), expected, jnp.float32)


def test_vmap_copies_nothing():
    def run(q: Any, k: Any, table: Any) -> Any:
        mod = eqx.tree_at(lambda x: x.table, RELATIVE, table)
        return SMALL(make_inputs(q, k, k, mask=CAUSAL, score_mod=mod))

    q, k = jnp.zeros((3, 40, 4, 16)), jnp.zeros((40, 2, 16))
    batched = jax.vmap(run, in_axes=(0, None, None))
    program = jax.make_jaxpr(batched)(q, k, RELATIVE.table).jaxpr
    (kernel,) = [x for x in equations(program) if x.primitive.name == "attention_kernel"]
    shapes = sorted(x.aval.shape for x in kernel.invars if len(x.aval.shape) > 2)
    assert shapes == [q.shape, k.shape, k.shape]


def test_drops_the_same_weights():
    seed, rate = jnp.asarray([3, 2**32 - 5], jnp.uint32), 0.4
    q, k = jnp.zeros((20, 3, 16)), jnp.zeros((33, 3, 16))
    v = jnp.broadcast_to(jnp.eye(33)[:, None], (33, 3, 33))
    inputs = make_inputs(q, k, v, dropout_rate=rate, dropout_key=jr.key(0))
    inputs = eqx.tree_at(lambda x: x.dropout_seed, inputs, seed)
    out, _ = SMALL(inputs)
    index = (jnp.arange(n, dtype=jnp.int32) for n in (20, 33))
    kept = keep(seed, rate, 3, *index)
    np.testing.assert_array_equal(np.asarray(out > 0).transpose(1, 0, 2), kept)


def test_without_jit_and_with_default_tiles():
    problem = NAMED["causal_mqa"]
    args = problem.args()
    assert_close(problem.run(pallas, args), problem.run(reference, args), jnp.float32)


def test_float64_is_computed_by_the_chunked_passes(x64):
    q, k, v = (jr.normal(jr.key(i), (9, 2, 4), jnp.float64) for i in range(3))
    inputs = make_inputs(q, k, v, mask=CAUSAL)
    assert "float64" in str(refusal(inputs))
    np.testing.assert_array_equal(pallas(inputs)[0], chunked(inputs)[0])


def test_with_64_bit_numbers_enabled(x64):
    problem = Problem("x64", mask=CAUSAL, mod=SCALED, sinks=True)
    args = problem.args()
    run = jax.jit(lambda passes, args: problem.run(passes, args), static_argnums=0)
    assert_close(run(SMALL, args), run(reference, args), jnp.float32)


def test_excluded_values_do_no_harm():
    """NaN in padding, and a score mod that is singular where nobody looks."""

    def root(score: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
        del head
        return score - jnp.sqrt(jnp.maximum(q_pos - kv_pos, 0).astype(score.dtype))

    q, k, v = (jr.normal(jr.key(i), (40, 2, 16)) for i in range(3))
    valid = jnp.arange(40) < 21
    k, v = (jnp.where(valid[:, None, None], x, jnp.nan) for x in (k, v))

    def loss(passes: Any, q: Any, k: Any, v: Any) -> Any:
        mask = CAUSAL & attn.Padding(valid)
        return jnp.sin(passes(make_inputs(q, k, v, mask=mask, score_mod=root))[0]).sum()

    gradients = [
        compiled(jax.grad(functools.partial(loss, passes), argnums=(0, 1, 2)))(q, k, v)
        for passes in (SMALL, reference)
    ]
    assert_close(*gradients, jnp.float32)


def test_in_shard_map():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    q, v = (jr.normal(jr.key(i), (4, 40, 2, 16)) for i in range(2))
    k = jr.normal(jr.key(2), (40, 2, 16))
    ids = jnp.stack([jnp.arange(40) // n for n in (5, 9, 16, 40)])

    def loss(q: Any, k: Any, v: Any, ids: Any) -> Any:
        mask = CAUSAL & attn.Segments(ids)
        out, _ = SMALL(make_inputs(q, k, v, mask=mask, score_mod=attn.ALiBi(2)))
        return jnp.sin(out).sum()

    def gradients(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return jax.vmap(jax.grad(loss, argnums=(0, 2)), in_axes=(0, None, 0, 0))(q, k, v, ids)

    sharded = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(spec("x"), spec(), spec("x"), spec("x")),
        out_specs=spec("x"),
    )
    assert_close(compiled(sharded)(q, k, v, ids), compiled(gradients)(q, k, v, ids), jnp.float32)


def test_refuses_what_no_kernel_can_do():
    q = jnp.zeros((20, 2, 16))

    def erf(score: Any, *_: Any) -> Any:
        return jax.scipy.special.erf(score)

    inputs = make_inputs(q, q, q, score_mod=erf)
    reason = refusal(inputs)
    assert reason is not None and "`erf`" in reason and "score_mod" in reason
    with pytest.raises(NotImplementedError, match="`erf`"):
        pallas(inputs)

    wide_heads = jnp.zeros((20, 2, 264))
    inputs = make_inputs(wide_heads, wide_heads, wide_heads)
    with pytest.raises(NotImplementedError, match="up to 256 dimensions, and these have 264"):
        pallas(inputs)
    assert refusal(make_inputs(q, q, q, mask=CAUSAL, score_mod=RELATIVE)) is None
