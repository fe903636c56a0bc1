"""The stacks compute what PyTorch's own transformers compute, given their weights."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Padding
from eqx_transformer.nn import LayerNorm
from eqx_transformer.stacks import Source, Stack, decoder_block, encoder_block

from .torch_golden import CASES, D_FF, D_MODEL, HEADS, LAYERS, PATH, SOURCE, outputs

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": eqx.Partial(jax.nn.gelu, approximate=False),
}


def golden(name):
    with np.load(PATH) as arrays:
        prefix = f"{name}/"
        return {k.removeprefix(prefix): arrays[k] for k in arrays if k.startswith(prefix)}


def _linear(layer, weight, bias):
    return eqx.tree_at(lambda x: (x.weight, x.bias), layer, (jnp.asarray(weight.T), bias))


def _attention(layer, weights, name):
    pairs = zip(
        np.split(weights[f"{name}.in_proj_weight"], 3),
        np.split(weights[f"{name}.in_proj_bias"], 3),
        strict=True,
    )
    pairs = [*pairs, (weights[f"{name}.out_proj.weight"], weights[f"{name}.out_proj.bias"])]

    def projections(x):
        return [x.q_proj, x.k_proj, x.v_proj, x.o_proj]

    new = [_linear(old, w, b) for old, (w, b) in zip(projections(layer), pairs, strict=True)]
    return eqx.tree_at(projections, layer, new)


def _norm(weights, name):
    norm = LayerNorm(D_MODEL)
    new = (jnp.asarray(weights[f"{name}.weight"]), jnp.asarray(weights[f"{name}.bias"]))
    return eqx.tree_at(lambda x: (x.weight, x.bias), norm, new)


def _stack(weights, prefix, pre, activation, cross):
    """A stack, and the norm after it, with the weights of a PyTorch encoder or decoder."""
    where = "norm" if pre else "output_norm"
    names = ["attention_residual", "cross_residual", "mlp_residual"]
    if not cross:
        names.remove("cross_residual")
    layers = []
    for i in range(LAYERS):
        make = decoder_block if cross else encoder_block
        block = make(
            D_MODEL,
            HEADS,
            D_FF,
            layout="pre" if pre else "post",
            activation=ACTIVATIONS[activation],
            key=jr.key(0),
        )
        layer = f"{prefix}layers.{i}."
        own = {k.removeprefix(layer): v for k, v in weights.items() if k.startswith(layer)}
        block = eqx.tree_at(
            lambda x: x.attention, block, _attention(block.attention, own, "self_attn")
        )
        if cross:
            new = _attention(block.cross_attention, own, "multihead_attn")
            block = eqx.tree_at(lambda x: x.cross_attention, block, new)
        up = _linear(block.mlp.up_proj, own["linear1.weight"], own["linear1.bias"])
        down = _linear(block.mlp.down_proj, own["linear2.weight"], own["linear2.bias"])
        block = eqx.tree_at(lambda x: (x.mlp.up_proj, x.mlp.down_proj), block, (up, down))

        def norms(x):
            return [getattr(getattr(x, name), where) for name in names]

        new = [_norm(own, f"norm{n + 1}") for n in range(len(names))]
        layers.append(eqx.tree_at(norms, block, new))
    norm = _norm(weights, f"{prefix}norm") if f"{prefix}norm.weight" in weights else lambda x: x
    stack = Stack.from_layers(layers)
    return lambda *args, **options: norm(stack(*args, **options))


def ours(name, arrays):
    kind = name.split()[0]
    weights = {
        k.removeprefix("weights/"): jnp.asarray(v)
        for k, v in arrays.items()
        if k.startswith("weights/")
    }
    options = (CASES[name]["norm_first"], CASES[name]["activation"])
    source, target = jnp.asarray(arrays["source"]), jnp.asarray(arrays["target"])
    padding = Padding(jnp.arange(SOURCE) < SOURCE - 2)
    if kind == "encoder":
        return _stack(weights, "", *options, cross=False)(source, mask=padding)
    if kind == "decoder":
        return _stack(weights, "", *options, cross=True)(target, context=Source(source, padding))
    memory = _stack(weights, "encoder.", *options, cross=False)(source, mask=padding)
    decoder = _stack(weights, "decoder.", *options, cross=True)
    return decoder(target, context=Source(memory, padding))


def _check(name, arrays):
    valid = slice(0, SOURCE - 2) if name.startswith("encoder") else slice(None)
    expected = arrays["out"][valid]
    # Compiled as a whole, building included, which is much faster than step by step.
    got = np.asarray(jax.jit(lambda: ours(name, arrays))())[valid]
    # PyTorch computes in float32 as we do: both are off by rounding.
    assert np.abs(got - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_equals_pytorch(name):
    _check(name, golden(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equals_pytorch_that_is_installed(name):
    pytest.importorskip("torch", reason="needs the parity extra")
    _check(name, outputs(name))


def test_golden_values_are_whole():
    for name in CASES:
        assert all(np.isfinite(x).all() for x in golden(name).values())
    assert functools.reduce(lambda n, name: n + len(golden(name)), CASES, 0) == 266
