"""Linear, Embedding, norms, MLPs."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.nn import (
    MLP,
    Convolution,
    DynamicTanh,
    Embedding,
    GatedMLP,
    Int8Linear,
    LayerNorm,
    LayerScale,
    Linear,
    RMSNorm,
)
from eqx_transformer.training import LoRALinear


def _f64(x):
    return np.asarray(x, np.float64)


@pytest.mark.parametrize("use_bias", [False, True])
def test_linear(getkey, use_bias):
    linear = Linear(3, 5, use_bias=use_bias, key=getkey())
    if use_bias:
        linear = eqx.tree_at(lambda m: m.bias, linear, jr.normal(getkey(), (5,)))
    x = jr.normal(getkey(), (2, 4, 3))
    expected = _f64(x) @ _f64(linear.weight) + (_f64(linear.bias) if use_bias else 0)
    np.testing.assert_allclose(linear(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(linear(x[0, 0]), expected[0, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(linear)(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["norm", "layer", "tanh", "scale", "map", "int8", "conv", "dora"])
def test_gradients_of_vectors_are_one_sum(getkey, name):
    linear = Linear(5, 5, use_bias=True, key=getkey())
    layer = {
        "norm": lambda: RMSNorm(5, offset=1),
        "layer": lambda: LayerNorm(5),
        "tanh": lambda: DynamicTanh(5),
        "scale": lambda: LayerScale(5),
        "map": lambda: linear,
        "int8": lambda: Int8Linear.from_linear(linear),
        "conv": lambda: Convolution(5, 5, key=getkey()),
        "dora": lambda: LoRALinear(linear, 2, alpha=1, dora=True, key=getkey()),
    }[name]()
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)
    x, cotangent = jr.normal(getkey(), (2, 2, 3, 5))

    def value(arrays):
        return jnp.vdot(jax.vmap(eqx.combine(arrays, static))(x), cotangent)

    # Devices that have an example each would exchange the sum over examples of all positions.
    assert "[3,5]" not in str(jax.make_jaxpr(jax.grad(value))(arrays))


def test_linear_is_one_product(getkey):
    linear = Linear(3, 5, use_bias=True, key=getkey())
    program = jax.jit(jax.vmap(jax.vmap(linear))).lower(jnp.ones((2, 4, 3))).as_text()
    (dot,) = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert "contracting_dims = [2] x [0]" in dot and "batching_dims" not in dot
    assert "stablehlo.transpose" not in program


def test_linear_init(getkey):
    linear = Linear(400, 300, key=getkey())
    assert abs(float(linear.weight.std()) * 20 - 1) < 0.02
    assert float(jnp.abs(linear.weight).max()) * 20 < 2.4
    zeros = Linear(3, 5, init=jax.nn.initializers.zeros, dtype=jnp.bfloat16, key=getkey())
    assert zeros.weight.dtype == jnp.bfloat16 and not zeros.weight.any()


def test_computes_in_the_dtype_of_x(getkey):
    x = jr.normal(getkey(), (4, 6), jnp.bfloat16)
    for layer in (
        Linear(6, 6, use_bias=True, key=getkey()),
        RMSNorm(6),
        LayerNorm(6),
        MLP(6, 8, key=getkey()),
        GatedMLP(6, 8, key=getkey()),
    ):
        assert layer(x).dtype == jnp.bfloat16


def test_linear_errors(getkey):
    with pytest.raises(ValueError, match="in_features=0"):
        Linear(0, 3, key=getkey())
    with pytest.raises(ValueError, match=r"\(4, 2\) but in_features=3"):
        _unchecked(Linear)(Linear(3, 5, key=getkey()), jnp.ones((4, 2)))
    stacked = eqx.filter_vmap(lambda key: Linear(3, 5, key=key))(jr.split(getkey(), 2))
    with pytest.raises(ValueError, match="stack of layers"):
        stacked(jnp.ones((4, 3)))


def _unchecked(cls):
    """The method below the run-time type checker, which would report some mistakes first."""
    return inspect.unwrap(cls.__dict__["__call__"])


def test_embedding(getkey):
    embedding = Embedding(7, 4, key=getkey())
    tokens = jnp.array([3, 0, 6, 3])
    np.testing.assert_array_equal(embedding(tokens), np.asarray(embedding.weight)[[3, 0, 6, 3]])
    x = jr.normal(getkey(), (5, 4))
    expected = _f64(x) @ _f64(embedding.weight).T
    np.testing.assert_allclose(embedding.attend(x), expected, rtol=1e-5, atol=1e-6)


def test_embedding_out_of_range(getkey):
    embedding = Embedding(7, 4, key=getkey())
    out = embedding(jnp.array([7, -1, 2]))
    assert jnp.isnan(out[:2]).all() and not jnp.isnan(out[2]).any()


def test_embedding_gradient_counts_repeats(getkey):
    embedding = Embedding(7, 4, key=getkey())
    tokens, ct = jnp.array([3, 0, 3]), jr.normal(getkey(), (3, 4))
    grad = eqx.filter_grad(lambda m: jnp.vdot(m(tokens), ct))(embedding).weight
    expected = np.zeros((7, 4))
    np.add.at(expected, np.asarray(tokens), _f64(ct))
    np.testing.assert_allclose(grad, expected, rtol=1e-6)


def test_rms_norm(getkey):
    norm = eqx.tree_at(lambda m: m.weight, RMSNorm(6, eps=1e-3), jr.normal(getkey(), (6,)))
    x = jr.normal(getkey(), (3, 2, 6))
    y = _f64(x)
    expected = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-3) * _f64(norm.weight)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-6)
    assert len(jax.tree.leaves(norm)) == 1


@pytest.mark.parametrize("use_bias", [False, True])
def test_layer_norm(getkey, use_bias):
    norm = LayerNorm(6, eps=1e-3, use_bias=use_bias)
    norm = jax.tree.map(lambda leaf: jr.normal(getkey(), leaf.shape), norm)
    x = jr.normal(getkey(), (3, 6)) + 5
    y = _f64(x)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-3)
    expected = y * _f64(norm.weight) + (_f64(norm.bias) if use_bias else 0)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_norm_accumulates_in_float32(getkey, norm):
    # The squares overflow float16, and their sum in bfloat16 would be off by percents.
    x = (300 * jr.normal(getkey(), (2, 512))).astype(jnp.float16)
    np.testing.assert_allclose(
        norm(512)(x).astype("f4"), norm(512)(x.astype("f4")), rtol=2e-3, atol=1e-3
    )


def test_mlps(getkey):
    x = jr.normal(getkey(), (3, 4))
    mlp = MLP(4, 6, activation=jnp.tanh, key=getkey())
    mlp = jax.tree.map(lambda w: w + 0.1 if eqx.is_array(w) else w, mlp)
    up, down = mlp.up_proj, mlp.down_proj
    hidden = np.tanh(_f64(x) @ _f64(up.weight) + _f64(up.bias))
    expected = hidden @ _f64(down.weight) + _f64(down.bias)
    np.testing.assert_allclose(mlp(x), expected, rtol=1e-5, atol=1e-6)
    gated = GatedMLP(4, 6, key=getkey())
    gate = _f64(x) @ _f64(gated.gate_proj.weight)
    hidden = gate / (1 + np.exp(-gate)) * (_f64(x) @ _f64(gated.up_proj.weight))
    expected = hidden @ _f64(gated.down_proj.weight)
    np.testing.assert_allclose(gated(x), expected, rtol=1e-5, atol=1e-6)


def test_learnable_activation(getkey):
    class Scaled(eqx.Module):
        scale: jax.Array

        def __call__(self, x):
            return jnp.tanh(x) * self.scale

    mlp = MLP(4, 6, activation=Scaled(jnp.ones(())), key=getkey())
    grad = eqx.filter_grad(lambda m: m(jnp.ones((2, 4))).sum())(mlp)
    assert grad.activation.scale != 0


def test_offset_of_a_norm(x64):
    norm, plain = RMSNorm(6, offset=1), RMSNorm(6)
    assert (norm.weight == 0).all() and norm.offset == 1
    x, weight = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6)))
    weight = weight[0]
    norm = eqx.tree_at(lambda m: m.weight, norm, weight)
    plain = eqx.tree_at(lambda m: m.weight, plain, 1 + weight)
    np.testing.assert_allclose(norm(x), plain(x), rtol=1e-12)
    # The sum is made in float32: 1 + 2 ** -9 is 1 in bfloat16.
    tiny = eqx.tree_at(lambda m: m.weight, norm, jnp.full(6, 2**-9, jnp.bfloat16))
    ratio = tiny(x.astype("f4")) / RMSNorm(6, dtype="bfloat16")(x.astype("f4"))
    np.testing.assert_allclose(ratio, 1 + 2**-9, rtol=1e-6)


def test_clipped_gate(getkey):
    options = {"activation": jnp.tanh, "use_bias": True, "key": getkey()}
    mlp, plain = GatedMLP(4, 6, clip=0.5, up_offset=1, **options), GatedMLP(4, 6, **options)
    x = 3 * jr.normal(getkey(), (5, 4))
    gate, up = (np.asarray(m(x)) for m in (mlp.gate_proj, mlp.up_proj))
    assert gate.max() > 0.5 and gate.min() < -0.5 and up.min() < -0.5 and up.max() > 0.5
    hidden = np.tanh(np.minimum(gate, 0.5)) * (1 + np.clip(up, -0.5, 0.5))
    np.testing.assert_allclose(mlp(x), mlp.down_proj(jnp.asarray(hidden)), rtol=1e-4, atol=1e-5)
    assert (mlp(x) != plain(x)).any()
    with pytest.raises(ValueError, match="clip=0 must be positive"):
        GatedMLP(4, 6, clip=0, key=getkey())


@pytest.mark.parametrize("mlp", [MLP, GatedMLP])
def test_batch_is_an_error(getkey, mlp):
    layer = mlp(4, 6, key=getkey())
    with pytest.raises(ValueError, match=r"x has 3 axes \(2, 3, 4\).*\[seq, d_model\].*jax.vmap"):
        layer(jnp.ones((2, 3, 4)))
    with pytest.raises(ValueError, match=r"x has 1 axes \(4,\).*add the missing"):
        layer(jnp.ones((4,)))
    assert "Float" in str(inspect.signature(mlp.__call__).parameters["x"].annotation)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("eps", [-1e-5, float("inf"), float("nan")])
def test_bad_eps(norm, eps):
    with pytest.raises(ValueError, match=f"{norm.__name__}: eps={eps} must be at least 0"):
        norm(6, eps=eps)
