"""The kernel for few queries and its pages, interpreted, against the definition; and lowered."""

import functools
import re
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
from eqx_transformer.attention._kernels._block_map import span
from eqx_transformer.attention._kernels._passes import kernel_passes
from eqx_transformer.attention._kernels._tuning import Tiles, decodes
from eqx_transformer.attention._paged import PagedKV
from eqx_transformer.attention._reference import reference
from eqx_transformer.nn import Attention, KVCache

from .conformance import assert_close, compiled
from .kernels.problems import CAUSAL, RELATIVE, SCALED, Problem, gpu, like, marked

SMALL = kernel_passes(Tiles(16, 16, split=32))
"""Several programs for a sequence, of two tiles each."""

AT = jnp.asarray([40, 41, 44])
IDS = jnp.asarray(np.concatenate([np.zeros(9), np.ones(20), np.full(20, 2), np.full(8, -1)]))
AHEAD = {"q_positions": AT}

PROBLEMS = [
    Problem("plain", 2, 57),
    Problem("one_query", 1, 64, 4, 1, 48, 24, mask=CAUSAL, options={"q_positions": AT[:1]}),
    Problem("window", 3, 90, mask=attn.SlidingWindow(9, 0), mod=SCALED, options=AHEAD),
    Problem("ragged", 3, 57, 6, 2, 20, 33, mask=attn.Prefix(jnp.int32(35)), sinks=True),
    Problem(
        "everything",
        3,
        57,
        mask=CAUSAL & attn.Segments(IDS.astype(jnp.int32)),
        mod=attn.Compose((RELATIVE, attn.SoftCap(3.0))),
        sinks=True,
        options={"dropout_rate": 0.3, "dropout_key": jr.key(1), "scale": -0.3} | AHEAD,
    ),
    Problem("slots", 1, 40, mask=~attn.Prefix(0) & CAUSAL, mod=attn.ALiBi(4), dtype=jnp.bfloat16),
    Problem("nothing", 2, 57, mask=attn.Prefix(jnp.int32(0)), mod=RELATIVE, slow=True),
    Problem("no_keys", 2, 0, sinks=True),
    Problem("float16", 4, 57, mask=attn.SlidingWindow(9, 9), dtype=jnp.float16, slow=True),
]
SLOTS = jnp.where(jnp.arange(40) < 23, jnp.arange(40), -1)
PROBLEMS[5].options.update(q_positions=AT[:1] - 18, kv_positions=SLOTS)
NAMED = {problem.name: problem for problem in PROBLEMS}


def wide(tree: Any) -> Any:
    """In float32, so that the reference does not round."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def run(problem: Problem, passes: Any, args: Any, moved: Any, pulled: Any) -> Any:
    """The value, and what the derivatives are made of."""

    def function(args: Any) -> Any:
        out, lse = problem.run(passes, args)
        return out, jnp.where(jnp.isfinite(lse), lse, -7)

    value, pull = jax.vjp(function, args)
    return {"value": value, "vjp": pull(pulled), "jvp": jax.jvp(function, (args,), (moved,))[1]}


@pytest.mark.parametrize("problem", marked(PROBLEMS))
def test_value(problem):
    args = problem.args()
    assert decodes(make_inputs(args["q"], args["k"], args["v"]))
    actual = compiled(functools.partial(problem.run, SMALL))(args)
    assert actual[0].dtype == problem.dtype and actual[1].dtype == jnp.float32
    assert_close(
        actual, compiled(functools.partial(problem.run, reference))(wide(args)), problem.dtype
    )


@pytest.mark.parametrize("name", ["window", pytest.param("everything", marks=pytest.mark.slow)])
def test_derivatives_are_those_of_the_other_passes(name):
    problem = NAMED[name]
    args = problem.args()
    moved = like(args, 1)
    pulled = like(jax.eval_shape(functools.partial(problem.run, reference), args), 2)
    actual, expected = (
        compiled(functools.partial(run, problem, passes))(args, moved, pulled)
        for passes in (SMALL, reference)
    )
    assert_close(actual, expected, jnp.float32)


@pytest.mark.parametrize("heads", [(8, 2), (16, 1)])
def test_more_rows_than_a_tile_has_are_for_the_other_kernel(heads):
    q, k = jnp.zeros((4, heads[0], 16)), jnp.zeros((20, heads[1], 16))
    assert decodes(make_inputs(q[:1], k, k))
    assert decodes(make_inputs(q, k, k)) == (heads == (8, 2))


def test_tiles_that_are_not_visited():
    q, k = jnp.zeros((2, 4, 16)), jnp.zeros((100, 2, 16))
    at = jnp.asarray([70, 71])

    def bounds(mask: Any, **positions: Any) -> list[int]:
        return span(make_inputs(q, k, k, mask=mask, **positions), 16).bounds.tolist()

    assert bounds(None) == [0, 7]
    assert bounds(CAUSAL) == [0, 1]
    assert bounds(CAUSAL, q_positions=at) == [0, 5]
    assert bounds(CAUSAL & attn.SlidingWindow(20, 0), q_positions=at) == [3, 5]
    assert bounds(attn.Prefix(jnp.int32(33))) == [0, 3]
    slots = jnp.where(jnp.arange(100) < 40, jnp.arange(100), -1)
    assert bounds(~attn.Prefix(0) & CAUSAL, q_positions=at, kv_positions=slots) == [0, 3]
    low, high = bounds(attn.Prefix(jnp.int32(0)))
    assert low == high
    assert not span(make_inputs(q, k[:96], k[:96]), 16).any_masked


def test_what_is_beyond_the_length_does_no_harm():
    """In value and gradient, and without rewriting the keys before."""
    problem = Problem("nan", 2, 57)
    args = problem.args()
    valid = jnp.arange(57) < 20
    args |= {x: jnp.where(valid[:, None, None], args[x], jnp.nan) for x in ("k", "v")}

    def loss(passes: Any, args: Any) -> Any:
        mask = attn.Padding(valid)
        return jnp.sin(passes(make_inputs(args["q"], args["k"], args["v"], mask=mask))[0]).sum()

    found = [
        compiled(jax.value_and_grad(functools.partial(loss, x)))(args) for x in (SMALL, reference)
    ]
    assert_close(*found, jnp.float32)


TRITON = "__gpu$xla.gpu.triton"


def launches(function: Any, *args: Any) -> list[set[str]]:
    """The shapes that each kernel of a program for a GPU is given."""
    with gpu():
        text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if TRITON in line]
    types = [re.findall(r"tensor<([^>]*)x[a-z]+\d+>", x[x.rindex(" : (") :]) for x in calls]
    return [set(x) for x in types]


def test_a_batch_of_different_lengths_is_one_launch():
    q, k, v = jr.normal(jr.key(0), (3, 1, 4, 16)), *jr.normal(jr.key(1), (2, 3, 2, 57, 16))
    lengths = jnp.asarray([5, 57, 33])

    def one(q: Any, k: Any, v: Any, length: Any) -> Any:
        # As from a cache, with heads first.
        k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
        return SMALL(make_inputs(q, k, v, mask=attn.Prefix(length)))

    args = (q, k, v, lengths)
    (shapes,) = launches(jax.vmap(one), *args)
    # The cache as it was given, and which of its tiles to visit.
    assert {"3x2x57x16", "3x2"} <= shapes and "3x57x2x16" not in shapes
    batch = compiled(jax.vmap(one))(*args)
    # The same numbers whatever the company, as lengths are cut the same way.
    for i in range(3):
        alone = compiled(one)(*(x[i] for x in args))
        jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda x: x[i], batch))
    assert_close(batch, _by_reference(args), jnp.float32)


def _by_reference(args: Any) -> Any:
    def one(q: Any, k: Any, v: Any, length: Any) -> Any:
        k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
        return reference(make_inputs(q, k, v, mask=attn.Prefix(length)))

    return compiled(jax.vmap(one))(*args)


def test_a_layer_decodes_from_its_cache():
    kernel = eqx.Partial(attn.dot_product_attention, implementation="pallas")
    layer = Attention(32, 4, num_kv_heads=2, mask=attn.SlidingWindow(30, 0), key=jr.key(0))
    x, token = jr.normal(jr.key(1), (7, 32)), jr.normal(jr.key(2), (1, 32))
    _, cache = eqx.filter_jit(layer.extend)(x, KVCache.init(50, 2, 8))
    plain = eqx.filter_jit(layer.extend)(token, cache)
    fused = eqx.tree_at(lambda x: x.attention_fn, layer, kernel)
    assert_close(eqx.filter_jit(fused.extend)(token, cache), plain, jnp.float32)


# --- pages ---

PAGE_SIZE, NUM_PAGES, MAX_PAGES = 4, 19, 9


def pool(seed: int, length: int) -> tuple[Any, Any, Any, Any]:
    """Keys and values; the same in random pages, with NaN everywhere else; and their table."""
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, length, 2, 16)).astype(np.float32)
    order, used = rng.permutation(NUM_PAGES)[:MAX_PAGES], -(-length // PAGE_SIZE)
    pages = []
    for x in (k, v):
        flat = np.full((NUM_PAGES * PAGE_SIZE, 2, 16), np.nan, np.float32)
        at = order[np.arange(length) // PAGE_SIZE] * PAGE_SIZE + np.arange(length) % PAGE_SIZE
        flat[at] = x
        pages.append(jnp.asarray(flat.reshape(NUM_PAGES, PAGE_SIZE, 2, 16)))
    stale = np.where(np.arange(MAX_PAGES) % 2, -1, NUM_PAGES + 3)
    table = np.where(np.arange(MAX_PAGES) < used, order, stale)
    return k, v, PagedKV(*pages), jnp.asarray(table, jnp.int32)


OPTIONS = {
    "causal": {"mask": CAUSAL, "score_mod": attn.ALiBi(4)},
    "window": {"mask": attn.SlidingWindow(5, 0), "sinks": jnp.arange(4.0)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pages_equal_one_piece(name):
    paged = eqx.filter_jit(
        functools.partial(attn.paged_attention, implementation="pallas", **OPTIONS[name])
    )
    q = jr.normal(jr.key(2), (3, 4, 16))
    for length in (3, 16, 35):
        k, v, pages, table = pool(length, length)
        at = jnp.arange(length - 3, length)
        whole = make_inputs(q, *map(jnp.asarray, (k, v)), q_positions=at, **OPTIONS[name])
        out = paged(q, pages, table, jnp.asarray(length))
        assert_close(out, reference(whole)[0], jnp.float32)


def test_pages_are_read_where_they_are():
    q = jr.normal(jr.key(2), (2, 1, 4, 16))
    *_, pages, table = pool(0, 35)
    args = (q, jnp.stack([table, table[::-1]]), jnp.asarray([35, 7]))

    def one(q: Any, table: Any, length: Any) -> Any:
        return attn.paged_attention(q, pages, table, length, implementation="pallas")

    (shapes,) = launches(jax.vmap(one), *args)
    assert "19x4x2x16" in shapes
    # Nothing as long as the capacity of a sequence is an operand.
    assert not any(str(MAX_PAGES * PAGE_SIZE) in shape.split("x") for shape in shapes)


def test_derivatives_for_queries_and_pages():
    *_, pages, table = pool(1, 11)
    pages = jax.tree.map(jnp.nan_to_num, pages)
    q = jr.normal(jr.key(3), (3, 4, 16))

    def loss(implementation: Any, q: Any, pages: Any) -> Any:
        out = attn.paged_attention(
            q, pages, table, jnp.asarray(11), mask=CAUSAL, implementation=implementation
        )
        return jnp.sin(out).sum()

    def both(implementation: Any) -> Any:
        gradient = jax.grad(functools.partial(loss, implementation), (0, 1))
        return compiled(lambda: jax.jvp(gradient, (q, pages), like((q, pages), 4)))()

    assert_close(both("pallas"), both("reference"), jnp.float32)


# --- lowering ---


@pytest.mark.parametrize("problem", marked([x for x in PROBLEMS if x.kv_seq]))
def test_lowering(problem):
    assert len(launches(functools.partial(problem.run, pallas), problem.args())) == 1


FAST = [((128, 128), "bfloat16", None), ((128, 128), "bfloat16", 16), ((80, 40), "float32", 100)]
SIZES = [
    (dims, dtype, page_size)
    for dims in ((64, 64), (80, 40), (128, 128), (192, 128), (256, 256))
    for dtype in ("float32", "bfloat16")
    for page_size in (None, 16, 100)
]


@pytest.mark.parametrize(
    ("dims", "dtype", "page_size"),
    [pytest.param(*x, marks=[] if x in FAST else pytest.mark.slow) for x in SIZES],
)
def test_lowering_of_every_size(dims, dtype, page_size):
    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    lengths = jax.ShapeDtypeStruct((3,), jnp.int32)
    if page_size is None:

        def one(q: Any, k: Any, v: Any, length: Any) -> Any:
            return pallas(make_inputs(q, k, v, mask=attn.Prefix(length)))[0]

        k, v = (array(3, 1000, 2, dim) for dim in dims)
        found = launches(jax.vmap(one), array(3, 1, 8, dims[0]), k, v, lengths)
    else:

        def one(q: Any, k: Any, v: Any, length: Any) -> Any:
            table = jnp.arange(10, dtype=jnp.int32)
            return attn.paged_attention(q, PagedKV(k, v), table, length, implementation="pallas")

        k, v = (array(30, page_size, 2, dim) for dim in dims)
        batched = jax.vmap(one, in_axes=(0, None, None, 0))
        found = launches(batched, array(3, 1, 8, dims[0]), k, v, lengths)
    assert len(found) == 1
