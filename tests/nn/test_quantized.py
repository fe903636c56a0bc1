"""Weights in eight bits."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.models import Llama, LlamaConfig
from eqx_transformer.nn import GatedMLP, Int8Linear, Linear, MixtureOfExperts, quantized
from eqx_transformer.stacks import unstacked


def _f64(x):
    return np.asarray(x, np.float64)


def _layer(key, *, use_bias=True, dtype=jnp.float32):
    weight_key, bias_key = jr.split(key)
    linear = Linear(48, 80, use_bias=use_bias, dtype=dtype, key=weight_key)
    if use_bias:
        linear = eqx.tree_at(lambda m: m.bias, linear, jr.normal(bias_key, (80,), dtype))
    return linear, Int8Linear.from_linear(linear)


def _model(key):
    config = LlamaConfig(
        vocab_size=32, d_model=16, num_layers=2, num_heads=2, d_ff=24, max_len=64, use_bias=True
    )
    return Llama(config, key=key)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_entry_changes_by_half_a_step(getkey, dtype):
    linear, layer = _layer(getkey(), dtype=dtype)
    assert layer.values.dtype == jnp.int8 and layer.scale.dtype == dtype
    assert layer.weight.dtype == dtype and layer.bias is linear.bias
    meant = _f64(layer.values) * _f64(layer.scale)
    # The largest entry may be cut off by what bfloat16 rounds off the scale: 127 times 1/256.
    steps = 0.5001 if dtype == jnp.float32 else 0.76
    assert (abs(meant - _f64(linear.weight)) <= steps * _f64(layer.scale)).all()


def test_columns_of_zeros(getkey):
    linear = eqx.tree_at(lambda m: m.weight, Linear(4, 3, key=getkey()), jnp.zeros((4, 3)))
    layer = Int8Linear.from_linear(linear)
    assert not layer.weight.any() and not layer(jnp.ones(4)).any()


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_only_the_weight_is_rounded(getkey, rows):
    _, layer = _layer(getkey())
    x = jr.normal(getkey(), (rows, 48)) * jnp.exp(8 * jr.normal(getkey(), (rows, 1)))
    weight = _f64(layer.values) * _f64(layer.scale)
    error = abs(_f64(layer(x)) - (_f64(x) @ weight + _f64(layer.bias)))
    largest = abs(_f64(x)).max(axis=1, keepdims=True)
    # In float32 a sum of n products is wrong by less than n roundings; this is by fewer.
    assert (error <= 4 * 2**-24 * (largest * abs(weight).sum(0) + abs(_f64(layer.bias)))).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", [1, 9])
def test_rounds_narrow_types_once(getkey, dtype, rows):
    _, layer = _layer(getkey(), use_bias=False)
    # Sums of integers that float16 has no room for.
    x = (100 * jr.uniform(getkey(), (rows, 48))).astype(dtype)
    y = layer(x)
    expected = _f64(x) @ (_f64(layer.values) * _f64(layer.scale))
    assert y.dtype == dtype
    np.testing.assert_allclose(_f64(y), expected, rtol=float(jnp.finfo(dtype).eps), atol=1e-2)


def test_extreme_rows(getkey):
    _, layer = _layer(getkey(), use_bias=False)
    x = jr.normal(getkey(), (48,))
    for size in (1e-30, 1e30):
        np.testing.assert_allclose(layer(x * size) / size, layer(x), rtol=2e-4, atol=1e-5)
    assert not layer(jnp.zeros(48)).any()
    for bad in (jnp.nan, jnp.inf):
        assert not jnp.isfinite(layer(x.at[3].set(bad))).any()


def test_batches(getkey):
    _, layer = _layer(getkey())
    x = jr.normal(getkey(), (3, 5, 48))
    rows = jnp.stack([layer(row) for row in x.reshape(15, 48)]).reshape(3, 5, 80)
    for y in (layer(x), jax.vmap(layer)(x), jax.vmap(jax.vmap(layer))(x)):
        np.testing.assert_allclose(y, rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 9])
def test_derivatives_are_those_of_the_product(getkey, x64, rows):
    """Of the exact product, in double precision; and not of its digits, in single."""
    linear, _ = _layer(getkey(), dtype=jnp.float64)
    layer = Int8Linear.from_linear(linear)
    for dtype, tolerance in ((jnp.float64, 1e-11), (jnp.float32, 2e-5)):
        x, dx, y_bar = (jr.normal(getkey(), (rows, n), dtype) for n in (48, 48, 80))
        scale, bias = layer.scale.astype(dtype), layer.bias.astype(dtype)

        def ours(x, scale, bias):
            return Int8Linear(layer.values, scale, bias)(x)

        def exact(x, scale, bias):
            return (x @ layer.values.astype(x.dtype)) * scale[None, :] + bias[None, :]

        def everything(f, x, scale, bias):
            y, back = jax.vjp(f, x, scale, bias)

            def energy(x, scale):
                return jnp.sum(jnp.tanh(f(x, scale, bias)))

            # Forward over reverse, through the product of x and scale.
            second = jax.jvp(jax.grad(energy, (0, 1)), (x, scale), (dx, jnp.cos(scale)))[1]
            forward = jax.jvp(f, (x, scale, bias), (dx, jnp.cos(scale), jnp.sin(bias)))[1]
            return y, *back(y_bar), forward, *second

        pairs = [jax.jit(everything, static_argnums=0)(f, x, scale, bias) for f in (ours, exact)]
        for got, wanted in zip(*pairs, strict=True):
            assert got.dtype == dtype and float(abs(wanted).max()) > 0.1
            limit = tolerance * float(abs(wanted).max())
            np.testing.assert_allclose(got, wanted, rtol=0, atol=limit)


def test_derivatives_in_bfloat16(getkey):
    _, layer = _layer(getkey(), dtype=jnp.bfloat16)
    x = jr.normal(getkey(), (48,), jnp.bfloat16)
    dx = jax.grad(lambda x: layer(x).astype(jnp.float32).sum())(x)
    expected = _f64(layer.values) @ _f64(layer.scale)
    assert dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(_f64(dx), expected, atol=0.02 * abs(expected).max())


def test_integers_are_not_parameters(getkey):
    _, layer = _layer(getkey())
    gradient = eqx.filter_grad(lambda layer, x: layer(x).sum())(layer, jnp.ones(48))
    assert gradient.values is None
    assert gradient.scale.shape == gradient.bias.shape == (80,)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA does it on CPU")
def test_one_token_never_makes_float_weights(getkey):
    _, layer = _layer(getkey())

    def program(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: layer(x)[:48], x)

    def text(program):
        return jax.jit(program).lower(jnp.ones(48)).compile().as_text()

    assert "[48,80]" in text(program)
    assert "f32[48,80]" not in text(program)
    product = text(lambda x: x @ layer.values.astype(x.dtype))
    assert "f32[48,80]" in product  # what it would be otherwise


def test_a_model(getkey):
    model = _model(getkey())
    small = quantized(model)
    assert isinstance(small.head, Int8Linear)
    attention = small.stack.blocks.attention
    assert attention.q_proj.values.shape == (2, 16, 16)
    assert attention.q_proj.weight.shape == (2, 16, 16)
    leaves = jax.tree.leaves(small, is_leaf=lambda x: isinstance(x, Linear | Int8Linear))
    assert not any(isinstance(x, Linear) for x in leaves)
    assert sum(isinstance(x, Int8Linear) for x in leaves) == 8
    # Layer by layer it is what the stack is.
    apart, other = quantized(unstacked(model)), unstacked(small)
    assert eqx.tree_equal(apart, other)


def test_keeping_some(getkey):
    model = _model(getkey())
    small = quantized(model, keep=lambda model: (model.head, model.stack.blocks.mlp))
    assert small.head is model.head
    assert isinstance(small.stack.blocks.mlp.up_proj, Linear)
    assert isinstance(small.stack.blocks.attention.o_proj, Int8Linear)
    assert eqx.tree_equal(quantized(small, keep=lambda model: model.head).head, model.head)


def test_cache_is_forward(getkey):
    model = quantized(_model(getkey()))
    tokens = jr.randint(getkey(), (12,), 0, 32)

    @eqx.filter_jit
    def in_parts(model, tokens):
        first, cache = model.extend(tokens[:11], model.init_cache(12))
        last, _ = model.extend(tokens[11:], cache)
        return jnp.concatenate([first, last])

    expected = eqx.filter_jit(model)(tokens)
    np.testing.assert_allclose(in_parts(model, tokens), expected, rtol=1e-4, atol=1e-5)


def test_how_much_logits_change(getkey, x64):
    """By less than 2 % of their spread, in a model of this size with random weights."""
    model = _model(getkey())
    tokens = jr.randint(getkey(), (20,), 0, 32)
    small = quantized(model)
    exact, ours = (_f64(eqx.filter_jit(m)(tokens)) for m in (model, small))
    error = ours - exact
    share = np.sqrt((error**2).mean() / exact.var())
    assert 1e-3 < share < 0.02
    # What single precision adds to that is nothing beside it.
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, small)
    difference = _f64(eqx.filter_jit(narrow)(tokens)) - ours
    assert np.sqrt((difference**2).mean() / exact.var()) < 1e-5


def test_experts(getkey):
    moe = MixtureOfExperts(8, 4, lambda key: GatedMLP(8, 12, key=key), top_k=2, key=getkey())
    small = quantized(moe, keep=lambda moe: moe.router)  # so that the choice is the same
    x = jr.normal(getkey(), (5, 8))
    y, exact = (eqx.filter_jit(m)(x) for m in (small, moe))
    assert 0 < float(abs(y - exact).max()) < 0.03 * float(abs(exact).max())


def test_errors(getkey):
    _, layer = _layer(getkey())
    with pytest.raises(ValueError, match=r"x has shape \(2, 47\) but in_features=48"):
        layer(jnp.ones((2, 47)))
    stack = quantized(_model(getkey())).stack
    with pytest.raises(ValueError, match="stack of layers"):
        stack.blocks.attention.q_proj(jnp.ones(16))
    with pytest.raises(ValueError, match=r"scale has shape \(48,\) but values \(48, 80\)"):
        Int8Linear(layer.values, jnp.ones(48))
    with pytest.raises(ValueError, match="no Linear to replace in this Int8Linear"):
        quantized(layer)
