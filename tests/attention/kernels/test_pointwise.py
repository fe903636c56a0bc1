"""Functions of users as programs: the same numbers, as little work as can be, or a reason."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_transformer.attention as attn
from eqx_transformer.attention._kernels._pointwise import trace

from ..conformance import equations
from .problems import DENSE_BIAS, HOLES, RELATIVE, SCALED, Rows

MOD = {"score": jnp.float32, "q_pos": jnp.int32, "kv_pos": jnp.int32, "head": jnp.int32}
MASK = {"q_pos": jnp.int32, "kv_pos": jnp.int32}

_RNG = np.random.default_rng(3)
TABLE = jnp.asarray(_RNG.normal(size=(9, 4)), jnp.float32)
CUBE = jnp.asarray(_RNG.normal(size=(4, 9, 9)), jnp.float32)


@jax.custom_vjp
def sine(x: Any) -> Any:
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


def rows_then_columns(score, q_pos, kv_pos, head):
    return score + TABLE[q_pos][head] * jnp.take(TABLE, kv_pos, axis=0, mode="clip")[head]


def products(score, q_pos, kv_pos, head):
    return (
        score + TABLE[q_pos] @ TABLE[kv_pos % 9] + jnp.einsum("ij,j->i", CUBE[head], CUBE[0, 0])[2]
    )


def branches(score, q_pos, kv_pos, head):
    chosen = jax.lax.cond(score > 0, lambda x: x * 2, lambda x: TABLE[kv_pos, head] - x, score)
    return chosen + jax.lax.switch(head, [lambda: 1.0, lambda: 2.0, lambda: 3.0])


def loops(score, q_pos, kv_pos, head):
    def step(carry, row):
        return carry + row[head] * score, carry

    total, seen = jax.lax.scan(step, jnp.float32(0), TABLE, reverse=True)
    first = jax.lax.fori_loop(0, 3, lambda i, x: x + TABLE[i, head], score)
    return total + seen[q_pos] + first


def arrays(score, q_pos, kv_pos, head):
    stacked = jnp.stack([score, 2 * score, jnp.float32(3)])
    parts = jnp.split(jnp.concatenate([stacked, stacked[::2]]), [2])
    table = TABLE.T.reshape(4, 3, 3)[head] + stacked[:, None]
    return parts[0].max() + parts[1].sum() + table[q_pos % 3, 1] + table.T[1, kv_pos % 3]


def nested(score, q_pos, kv_pos, head):
    inner = jax.jit(lambda x: jax.checkpoint(jnp.tanh)(sine(x)) + jax.nn.relu(x))
    return inner(score) + jax.vmap(lambda row: row[kv_pos] * row[q_pos])(CUBE[:, 1]).prod()


def filled(score, q_pos, kv_pos, head):
    index = jnp.stack([q_pos - 3, kv_pos])
    outside = TABLE.at[index[0], index[1]].get(
        mode="fill", fill_value=7.0, wrap_negative_indices=False
    )
    clipped = TABLE.at[q_pos + 5, head].get(mode="clip")
    return (
        score + outside + clipped + jnp.where(jnp.isfinite(score), jnp.log2(1 + jnp.abs(score)), 0)
    )


def updates(score, q_pos, kv_pos, head):
    table = jax.lax.dynamic_update_slice(TABLE, score[None, None] * TABLE[2:5, :1], (q_pos, head))
    padded = jnp.pad(jnp.stack([score, -score]), (2, 1), constant_values=3.0)
    return table[kv_pos, 2] + padded[kv_pos % 5] + padded[3] + padded[0]


def narrow_integers(score, q_pos, kv_pos, head):
    signed, unsigned = (jnp.asarray(np.arange(9) * 27, x)[q_pos + 1] for x in ("int8", "uint16"))
    pairs = jnp.asarray(np.arange(9) * 31, "int8")[kv_pos] * signed - signed
    pairs = jnp.sign(pairs) + jnp.minimum(pairs, 3) // 2 % jnp.int8(5) + (-pairs << jnp.int8(3))
    other = kv_pos.astype(jnp.uint16) - unsigned * unsigned
    chosen = jnp.where((other > 40000) | (pairs < signed), abs(pairs), pairs**3)
    return score + chosen.astype(jnp.float32) + jnp.clip(other, 9, 60000).astype(jnp.float32)


def without_arguments(score, q_pos, kv_pos, head):
    return jnp.asarray(TABLE.sum() * 0 + 2.5)


FUNCTIONS = [
    attn.SoftCap(3.0),
    attn.ALiBi(4),
    RELATIVE,
    DENSE_BIAS,
    SCALED,
    Rows(TABLE),
    attn.Compose((SCALED, attn.SoftCap(2.0), RELATIVE)),
    rows_then_columns,
    products,
    branches,
    loops,
    arrays,
    nested,
    filled,
    updates,
    narrow_integers,
    without_arguments,
]
MASKS = [
    attn.Causal() & attn.SlidingWindow(3, None) | attn.Prefix(2),
    attn.SlidingWindow(None, None),
    attn.TokenGroups((3, 2, 4), ((1, 0, 1), (1, 1, 0), (1, 1, 1))),
    attn.Dense(HOLES[:6, :12]),
    attn.Segments(jnp.arange(7) // 3, jnp.arange(20) // 3) | attn.Padding(jnp.arange(9) < 4),
    attn.Prefix(jnp.int32(4)) & ~attn.Strided(3),
    attn.Predicate(lambda q_pos, kv_pos: TABLE[q_pos, 0] > TABLE[kv_pos % 9, 1]),
]
Q_POS, KV_POS = np.arange(-1, 7, dtype=np.int32)[:, None], np.arange(16, dtype=np.int32)[None, :]
SCORE = jnp.asarray(_RNG.normal(size=(8, 16)), jnp.float32)


def run(traced: Any, **arguments: Any) -> Any:
    """As a kernel would: head and queries first, keys and scores in a loop."""
    run = traced.program.start(traced.tables)
    for name in ("head", "q_pos", "kv_pos", "score", "dscore"):
        if name in arguments:
            run = run.bind(**{name: arguments[name]})
    return [jnp.broadcast_to(x, SCORE.shape) for x in run.outputs()]


def on_every_pair(function: Any, arguments: dict[str, Any]) -> Any:
    names = list(arguments)
    values = [jnp.broadcast_to(arguments[name], SCORE.shape) for name in names]

    def scalar(*xs: Any) -> Any:
        return function(**dict(zip(names, xs, strict=True)))

    return jax.vmap(jax.vmap(scalar))(*values)


def arguments(names: Any) -> dict[str, Any]:
    values = {"score": SCORE, "dscore": SCORE[::-1], "head": jnp.int32(2)}
    values |= {"q_pos": jnp.maximum(Q_POS, 0), "kv_pos": jnp.minimum(KV_POS, 8)}
    return {name: values[name] for name in names}


def name_of(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


@pytest.mark.parametrize("function", FUNCTIONS, ids=name_of)
def test_score_mods(function):
    def both(function: Any) -> Any:
        program = trace(lambda **xs: (function(**xs),), MOD, what="score_mod", like=SCORE)
        given = arguments(MOD)
        return run(program, **given)[0], on_every_pair(function, given)

    # The arrays of a Module are arguments of the program, those of a function are constants.
    np.testing.assert_allclose(*eqx.filter_jit(both)(function), rtol=2e-6, atol=2e-6)


def test_integers_are_computed_with_32_bits():
    """TPUs know no others."""
    program = trace(lambda **xs: (narrow_integers(**xs),), MOD, what="score_mod", like=SCORE)
    jaxpr = jax.make_jaxpr(lambda **given: run(program, **given))(**arguments(MOD)).jaxpr
    moving = {"convert_element_type", "broadcast_in_dim", "gather", "jit", "select_n", "squeeze"}
    for equation in equations(jaxpr):
        if equation.primitive.name not in moving:
            for x in equation.invars:
                assert x.aval.dtype == bool or x.aval.dtype.itemsize >= 4, equation


def test_the_sign_of_every_kind_of_number():
    numbers = jnp.asarray([-jnp.inf, -2.0, -0.0, 0.0, 1e-30, jnp.inf, jnp.nan, 3.0])[:, None]
    program = trace(lambda **xs: (jnp.sign(xs["score"]),), MOD, what="score_mod", like=SCORE)
    (found,) = run(program, score=numbers)
    np.testing.assert_array_equal(found, jnp.broadcast_to(jnp.sign(numbers), SCORE.shape))


@pytest.mark.parametrize(
    "function", [SCALED, RELATIVE, nested, branches, loops, updates], ids=name_of
)
def test_derivatives(function):
    def slope(score: Any, **rest: Any) -> Any:
        value, pull = jax.vjp(lambda x: function(x, **rest), score)
        return value, pull(jnp.ones_like(value))[0]

    @jax.jit
    def both() -> Any:
        traced = trace(slope, MOD, what="score_mod", like=SCORE)
        return run(traced, **arguments(MOD)), on_every_pair(slope, arguments(MOD))

    for actual, expected in zip(*both(), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks(mask):
    program = trace(lambda **xs: (mask(**xs),), MASK, what="mask", like=SCORE)
    positions = {"q_pos": jnp.asarray(Q_POS), "kv_pos": jnp.asarray(KV_POS)}
    np.testing.assert_array_equal(run(program, **positions)[0], mask(**positions))


def test_what_depends_on_arrays_alone_is_computed_before():
    def function(score: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
        table = jnp.exp(TABLE @ TABLE.T).cumsum(0)
        return score * table.mean() + jnp.sort(table[0])[head]

    program, tables = trace(lambda **xs: (function(**xs),), MOD, what="score_mod", like=SCORE)
    assert [x.shape for x in tables] == [(9,)]
    compiled = jax.jit(
        lambda x: (
            trace(lambda **xs: (function(**xs) * x,), MOD, what="score_mod", like=SCORE).tables
        )
    )
    assert [x.shape for x in compiled(jnp.float32(2))] == [(9,), (1,)]
    # score * mean + table[head], where negative heads count from the end.
    assert len(program.instructions) <= 12


def test_each_argument_is_used_as_soon_as_it_is_there():
    program, tables = trace(lambda **xs: (RELATIVE(**xs),), MOD, what="score_mod", like=SCORE)
    early = program.start(tables).bind(head=jnp.int32(1), q_pos=Q_POS)
    late = early.bind(kv_pos=KV_POS)
    assert late.values[program.outputs[0].inputs[1]].shape == SCORE.shape
    assert len(late.values) == len(program.instructions) - 2
    # Nothing is computed for all pairs that is the same for many.
    shapes = [np.shape(x) for x in early.values.values()]
    assert set(shapes) == {(), (8, 1)}


def test_unused_arrays_are_no_operands():
    def slope(score: Any, **rest: Any) -> Any:
        return (jax.vjp(lambda x: RELATIVE(x, **rest), score)[1](jnp.float32(1))[0],)

    program, tables = trace(slope, MOD, what="score_mod", like=SCORE)
    assert tables == [] and program.instructions == []
    np.testing.assert_array_equal(program.outputs, [1])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda score, **_: jax.scipy.special.erf(score), "uses `erf`"),
        (lambda score, **_: jnp.round(score), "uses `round`"),
        (lambda score, **_: jnp.sort(jnp.stack([score, -score]))[0], "uses `sort`"),
        (
            lambda score, kv_pos, **_: jax.lax.while_loop(
                lambda c: c[0] < kv_pos, lambda c: (c[0] + 1, c[1] * 2), (0, score)
            )[1],
            "uses `while`",
        ),
        (lambda score, **_: (jnp.arange(300.0) * score).sum(), "reduces an array of shape"),
        (lambda score, **_: (jnp.arange(300.0) * score) @ jnp.ones(300), "sums products over"),
        (
            lambda score, **_: jax.lax.fori_loop(0, 300, lambda i, x: x * 2, score),
            "loop of 300 steps",
        ),
        (
            lambda score, head, **_: (jnp.arange(6.0) * score).reshape(2, 3)[head, 0],
            "indexes an array that it reshapes",
        ),
    ],
)
def test_says_what_it_cannot_do(function, message):
    with pytest.raises(NotImplementedError, match=message) as info:
        trace(lambda **xs: (function(**xs),), MOD, what="score_mod", like=SCORE)
    assert "score_mod" in str(info.value) and "'chunked'" in str(info.value)
