"""Score mods against their papers, and their gradients in every implementation."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_transformer.attention as attn

from .conformance import (
    CHUNKED,
    CHUNKED_SMALL,
    REFERENCE,
    assert_close,
    compiled,
)
from .oracles import (
    Affine,
    t5_bucket,
)

BOTH = pytest.mark.parametrize("implementation", [REFERENCE, CHUNKED_SMALL], ids=str)


def _qkv(seq=7, heads=4):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (seq, heads, 3)) for key in keys)


# --- ALiBi ---------------------------------------------------------------------------------------


def test_alibi_slopes():
    """The numbers the paper lists for 8 and 16 heads, and its reference code's for 12."""
    eight = [1 / 2**n for n in range(1, 9)]
    np.testing.assert_allclose(attn.alibi_slopes(8), eight, rtol=1e-12)
    sixteen = [2 ** (-0.5 * n) for n in range(1, 17)]
    np.testing.assert_allclose(attn.alibi_slopes(16), sixteen, rtol=1e-12)
    twelve = [*eight, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    np.testing.assert_allclose(attn.alibi_slopes(12), twelve, rtol=1e-12)
    assert attn.alibi_slopes(1) == (2**-8,)
    for heads in range(1, 40):
        slopes = attn.alibi_slopes(heads)
        assert len(slopes) == heads == len(set(slopes)) and all(0 < x < 1 for x in slopes)


def test_alibi_is_not_trained():
    assert not jax.tree.leaves(attn.ALiBi(8))
    score = attn.ALiBi(8)(jnp.float32(0), jnp.int32(3), jnp.int32(10), jnp.int32(2))
    assert score == -7 / 8


# --- T5 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (16, 64), (12, 50)])
def test_relative_buckets(buckets, max_distance, bidirectional):
    mod = attn.RelativeBias(
        2, buckets, max_distance, bidirectional=bidirectional, key=jax.random.key(0)
    )
    offsets = np.arange(-300, 301)
    got = mod.bucket(jnp.zeros_like(offsets), jnp.asarray(offsets, jnp.int32))
    expected = [t5_bucket(int(x), buckets, max_distance, bidirectional) for x in offsets]
    np.testing.assert_array_equal(got, expected)
    assert set(expected) <= set(range(buckets)) and max(expected) == buckets - 1


def test_relative_buckets_published():
    """Bucket boundaries of T5 as trained: 32 buckets, 128 positions, both directions."""
    mod = attn.RelativeBias(1, bidirectional=True, key=jax.random.key(0))

    def bucket(offset):
        return int(mod.bucket(jnp.int32(0), jnp.int32(offset)))

    assert [bucket(-x) for x in range(9)] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    starts = {8: 8, 9: 12, 10: 16, 11: 23, 12: 32, 13: 46, 14: 64, 15: 91}
    for number, start in starts.items():
        assert bucket(-start) == number and bucket(-start + 1) == number - 1
        assert bucket(start) == number + 16
    assert bucket(-100_000) == 15 and bucket(100_000) == 31


def test_relative_bias_errors():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"num_buckets=2 gives 0 exact"):
        attn.RelativeBias(1, 2, bidirectional=True, key=key)
    with pytest.raises(ValueError, match=r"num_buckets=32 gives 8 exact.*max_distance=8"):
        attn.RelativeBias(1, 32, 8, bidirectional=True, key=key)


# --- Gradients -----------------------------------------------------------------------------------


class Net(eqx.Module):
    """A score mod with several leaves, a static number, and a function that closes over another."""

    weight: jax.Array
    inner: Affine
    function: object
    power: int = eqx.field(static=True)

    def __call__(self, score, q_pos, kv_pos, head):
        score = self.inner(score, q_pos, kv_pos, head) * self.weight**self.power
        return self.function(score)  # pyright: ignore


def _losses(build, *parameters):
    """The gradient of the parameters of a mod by both implementations."""
    q, k, v = _qkv()

    def loss(parameters, implementation):
        out, lse = implementation(q, k, v, mask=attn.Causal(), score_mod=build(*parameters))
        return (out**2).sum() + jnp.sin(lse).sum()

    return [
        compiled(jax.grad(lambda p, x=x: loss(p, x)))(parameters)
        for x in (REFERENCE, CHUNKED_SMALL)
    ]


def test_gradients_of_a_nested_module():
    per_head = jnp.arange(4.0)

    def build(w, s, c):
        return Net(w, Affine(s, s * 2), lambda x: x + c * x * x, 3)

    expected, got = _losses(build, jnp.float32(0.7), per_head, jnp.float32(0.3))
    assert all(jnp.abs(x).max() > 1e-3 for x in jax.tree.leaves(expected))
    assert_close(got, expected, jnp.float32)


CAPTURES = {
    "closure": lambda a: lambda s, i, j, h: s * a,
    "default": lambda a: lambda s, i, j, h, a=a: s * a,
    "partial": lambda a: functools.partial(lambda a, s, i, j, h: s * a, a),
    "jitted": lambda a: jax.jit(lambda s, i, j, h: s * a),
    "in_compose": lambda a: attn.Compose([attn.SoftCap(3.0), lambda s, i, j, h: s * a]),
    "composed_twice": lambda a: attn.Compose([attn.Compose([lambda s, i, j, h: s * a])]),
    "lookup": lambda a: lambda s, i, j, h: s + (a * jnp.arange(9.0))[i - j],
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=[] if x in ("closure", "default", "in_compose") else pytest.mark.slow)
        for x in CAPTURES
    ],
)
def test_gradients_of_what_a_function_captures(name):
    """However a function holds an array that is being differentiated, it gets its gradient."""
    expected, got = _losses(CAPTURES[name], jnp.float32(0.6))
    assert abs(expected[0]) > 1e-3
    assert_close(got, expected, jnp.float32)


@BOTH
def test_a_captured_tracer_under_vmap_and_jvp(implementation):
    q, k, v = _qkv()

    def run(a):
        return implementation(q, k, v, score_mod=lambda s, i, j, h: s * a)[0]

    values = jnp.array([0.3, -1.0])
    rows = jnp.stack([REFERENCE(q, k, v, scale=float(a) * 3**-0.5)[0] for a in values])
    assert_close(compiled(jax.vmap(run))(values), rows, jnp.float32)
    step = 1e-2
    moved = compiled(lambda a: jax.jvp(run, (a,), (jnp.ones(()),))[1])(values[0])
    difference = (run(values[0] + step) - run(values[0] - step)) / (2 * step)
    np.testing.assert_allclose(moved, difference, atol=1e-3)


@pytest.mark.parametrize("implementation", [REFERENCE, CHUNKED], ids=str)
@pytest.mark.parametrize("hold", ["closure", "module"])
def test_gradient_of_a_python_number_outside_jit(implementation, hold):
    """There it is a number within derivative rules, and no array."""
    q, k, v = _qkv()

    def loss(a):
        mod = attn.Compose([Scaled(a)]) if hold == "module" else lambda s, i, j, h: s * a
        return implementation(q, k, v, score_mod=mod)[0].sum()

    assert_close(jax.grad(loss)(0.5), jax.grad(loss)(jnp.float32(0.5)), jnp.float32)
    _, moved = jax.jvp(loss, (0.5,), (1.0,))
    assert_close(moved, jax.grad(loss)(0.5), jnp.float32)


class Scaled(eqx.Module):
    """A score mod of one number."""

    factor: object

    def __call__(self, score, q_pos, kv_pos, head):
        return score * self.factor


_TRACES = []


def _counted(s, i, j, h):
    _TRACES.append(s.shape)
    return s * 2


def test_the_same_function_is_not_compiled_again():
    q, k, v = _qkv()

    def run():
        attn.dot_product_attention(q, k, v, score_mod=_counted, implementation="chunked")

    run()
    count = len(_TRACES)
    run()
    # What remains is the check that the function is elementwise.
    assert len(_TRACES) - count <= 1


# --- Errors --------------------------------------------------------------------------------------


class Wrong(eqx.Module):
    function: object = eqx.field(static=True)

    def __call__(self, s, i, j, h):
        return self.function(s, i, j, h)  # pyright: ignore


NOT_ELEMENTWISE = {
    "vector": lambda s, i, j, h: s + jnp.zeros((2,), s.dtype),
    "axis": lambda s, i, j, h: s[..., None],
    "dtype": lambda s, i, j, h: s.astype(jnp.float16),
    "integer": lambda s, i, j, h: i - j,
    "nothing": lambda s, i, j, h: None,
    "tuple": lambda s, i, j, h: (s, s),
}


@pytest.mark.parametrize("wrap", [lambda x: x, Wrong], ids=["function", "module"])
@pytest.mark.parametrize("name", NOT_ELEMENTWISE)
def test_not_elementwise_is_refused(name, wrap):
    q, k, v = _qkv()
    with jax.numpy_rank_promotion("allow"):
        with pytest.raises(ValueError, match=r"score_mod.*elementwise.*float32"):
            attn.dot_product_attention(q, k, v, score_mod=wrap(NOT_ELEMENTWISE[name]))


def test_a_module_that_reduces_is_refused():
    q, k, v = _qkv()
    with pytest.raises(ValueError, match=r"score_mod.*elementwise"):
        attn.dot_product_attention(q, k, v, score_mod=Wrong(lambda s, i, j, h: s.sum()))


def test_a_function_sees_scalars_in_every_implementation():
    """So one that would normalise its tile cannot give different answers for different tiles."""
    q, k, v = _qkv()

    def mod(s, i, j, h):
        return s - s.mean() + jnp.asarray(i, s.dtype) * 0

    assert_close(
        CHUNKED_SMALL(q, k, v, score_mod=mod), REFERENCE(q, k, v, score_mod=mod), jnp.float32
    )


def test_errors_of_construction():
    with pytest.raises(ValueError, match="cap=0"):
        attn.SoftCap(0.0)
    with pytest.raises(ValueError, match="cap=nan"):
        attn.SoftCap(float("nan"))
    for make in (
        attn.ALiBi,
        attn.alibi_slopes,
        lambda n: attn.RelativeBias(n, bidirectional=True, key=jax.random.key(0)),
    ):
        with pytest.raises(ValueError, match="num_heads=0"):
            make(0)
