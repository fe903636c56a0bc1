"""Every implementation computes what the definition says, and every derivative of it."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_transformer.attention as attn
from eqx_transformer.attention._api import _choose
from eqx_transformer.attention._inputs import make_inputs

from .conformance import (
    CASES,
    CHUNKED,
    IMPLEMENTATIONS,
    LONG_CASES,
    NAMED,
    REFERENCE,
    Case,
    Implementation,
    all_args,
    assert_close,
    compiled,
    definition,
    dropout_factor,
    expected_first_order,
    expected_second_order,
    first_order,
    second_order,
    wide_args,
    wider,
)

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _param(case, order, *others, id):
    return pytest.param(case, *others, id=id, marks=[] if case.fast >= order else slow)


def _pairs(cases, implementations, order):
    """Everything, of which the fast part of the suite takes what is marked for this order."""
    return [
        _param(case, order, implementation, id=f"{implementation}-{case}")
        for implementation in implementations
        for case in cases
    ]


def _skip_excluded(case: Case, implementation: Implementation) -> None:
    if case.name in implementation.excluded:
        with pytest.raises(ValueError):
            implementation.of(case, case.args())
        pytest.skip(f"{implementation} declares that it refuses {case}")


# --- The reference against NumPy -----------------------------------------------------------------


@pytest.mark.parametrize("case", [_param(x, 1, id=x.name) for x in [*CASES, *LONG_CASES]])
def test_reference_is_the_definition(case):
    """Value against loops in NumPy; derivatives against differences of those loops."""
    args, tangents, cotangents = wide_args(case, "float64")
    result = expected_first_order(case)
    kept = dropout_factor(case)
    expected = definition(case, args, kept)
    assert_close(result["value"], expected, jnp.float64)

    # Fourth order differences of a function with derivatives of order one.
    step = 1e-3

    def moved(n):
        return definition(case, jax.tree.map(lambda x, t: x + n * step * t, args, tangents), kept)

    if case in LONG_CASES or case.q_seq == 0:
        return
    points = {n: moved(n) for n in (-2, -1, 1, 2)}

    def difference(k):
        with np.errstate(invalid="ignore"):
            near = points[1][k] - points[-1][k]
            far = points[2][k] - points[-2][k]
        return np.nan_to_num((8 * near - far) / (12 * step))

    for k in range(2):
        np.testing.assert_allclose(result["jvp"][k], difference(k), rtol=0, atol=2e-8)
    # Transposition: <c, J t> = <J^T c, t>.
    forward = sum(float((c * t).sum()) for c, t in zip(cotangents, result["jvp"], strict=True))
    products = jax.tree.map(lambda x, t: float((x * t).sum()), result["vjp"], tangents)
    assert forward == pytest.approx(sum(jax.tree.leaves(products)), rel=1e-9, abs=1e-10)


def test_a_row_that_attends_to_nothing_is_zero_with_zero_gradient():
    for name in ("some_nothing", "segments_shuffled", "dense"):
        case = NAMED[name]
        empty = ~case.allowed().any(axis=1)
        assert empty.any() and not empty.all()
        result = expected_first_order(case)
        assert np.all(np.asarray(result["value"][0])[empty] == 0)
        assert np.all(np.asarray(result["value"][1])[empty] == -np.inf)
        assert np.all(np.asarray(result["jvp"][0])[empty] == 0)
        assert np.all(np.asarray(result["jvp"][1])[empty] == 0)
        assert np.all(np.asarray(result["vjp"]["q"])[empty] == 0)
        unseen = ~case.allowed().any(axis=0)
        assert np.all(np.asarray(result["vjp"]["v"])[unseen] == 0)
        assert np.all(np.asarray(result["vjp"]["k"])[unseen] == 0)


# --- Every implementation against the reference --------------------------------------------------

OTHERS = [x for x in IMPLEMENTATIONS if x is not REFERENCE]
SMALL = [x for x in OTHERS if x is not CHUNKED]


def _check_first_order(case, implementation, dtype):
    _skip_excluded(case, implementation)
    args = all_args(case, dtype)
    result = compiled(first_order(case, implementation))(*args)
    expected = expected_first_order(case, dtype)
    assert result["value"][0].dtype == jnp.dtype(dtype)
    assert result["value"][1].dtype == wider(dtype)
    for name in ("value", "jvp", "vjp"):
        dtypes = jax.tree.map(lambda x: x.dtype, result[name])
        given = args[0] if name == "vjp" else args[2]
        assert dtypes == jax.tree.map(lambda x: x.dtype, given), name
        assert_close(result[name], expected[name], dtype, name)


@pytest.mark.parametrize(("case", "implementation"), _pairs(CASES, SMALL, 1))
def test_value_and_first_derivatives(case, implementation):
    _check_first_order(case, implementation, "float64")


@pytest.mark.parametrize(
    ("case", "implementation"),
    _pairs(LONG_CASES, [CHUNKED], 1) + _pairs(CASES, [CHUNKED], 2),
)
def test_value_and_first_derivatives_default_tiles(case, implementation):
    _check_first_order(case, implementation, "float64")


NARROW = ["plain", "sinks_causal_mod", "dropout_everything", "segments_shuffled", "relative"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", pytest.param("float32", marks=slow)])
@pytest.mark.parametrize(
    "implementation",
    [pytest.param(x, id=x.name, marks=[] if x in SMALL else slow) for x in IMPLEMENTATIONS],
)
@pytest.mark.parametrize("case", [_param(NAMED[name], 2, id=name) for name in NARROW])
def test_narrow_dtypes(case, implementation, dtype):
    if dtype not in implementation.dtypes:
        pytest.skip(f"{implementation} declares that it has no {dtype}")
    expected_first_order(case, dtype)
    with jax.enable_x64(False):
        _check_first_order(case, implementation, dtype)


@pytest.mark.parametrize(
    ("case", "implementation"),
    _pairs(CASES, SMALL, 2) + _pairs(LONG_CASES, [CHUNKED], 2),
)
def test_second_derivatives(case, implementation):
    """Forward over reverse, reverse over forward, reverse over reverse."""
    _skip_excluded(case, implementation)
    result = compiled(second_order(case, implementation))(*wide_args(case, "float64"))
    for name, product in result.items():
        assert_close(product, expected_second_order(case), jnp.float64, name)


@pytest.mark.parametrize("name", ["closure", pytest.param("some_nothing", marks=slow)])
def test_reference_second_derivatives_are_differences_of_its_gradient(name):
    case = NAMED[name]
    args, tangents, cotangents = wide_args(case, "float64")
    run = compiled(first_order(case, REFERENCE))
    step = 1e-3

    def gradient(n):
        point = jax.tree.map(lambda x, t: x + n * step * t, args, tangents)
        return run(point, tangents, cotangents)["vjp"]

    a, b, c, d = (gradient(n) for n in (-2, -1, 1, 2))
    slope = jax.tree.map(lambda a, b, c, d: (a - 8 * b + 8 * c - d) / (12 * step), a, b, c, d)
    for x, y in zip(
        jax.tree.leaves(slope), jax.tree.leaves(expected_second_order(case)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=5e-7)


def test_unknown_implementation_raises_with_the_list():
    q = jnp.ones((3, 1, 2))
    with pytest.raises(ValueError, match=r"implementation='flash'.*reference.*chunked"):
        inspect.unwrap(_choose)(make_inputs(q, q, q), "flash")  # pyright: ignore
    # With annotations checked it does not get that far.
    with pytest.raises(Exception, match=r"(?s)flash.*reference"):
        attn.dot_product_attention(q, q, q, implementation="flash")  # pyright: ignore


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_deterministic(implementation):
    case = NAMED["dropout_everything"]
    args = all_args(case, "float32")
    run = compiled(first_order(case, implementation))
    once, again = run(*args), run(*args)
    jax.tree.map(np.testing.assert_array_equal, once, again)
