"""Whisper: convolutions, an encoder without masks, and a decoder that is like any other."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Padding
from eqx_transformer.generation import beam_search, generate
from eqx_transformer.models import TransformerConfig, Whisper, WhisperConfig
from eqx_transformer.nn import SinusoidalPositions

TINY = WhisperConfig(
    num_mel_bins=5,
    max_source_len=7,
    transformer=TransformerConfig(
        vocab_size=13,
        d_model=8,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=2,
        d_ff=12,
        max_len=12,
        dropout_rate=0.0,
        pad_token_id=None,
        positions="learned",
        k_bias=False,
        tie_embeddings=True,
    ),
)
TARGET = jnp.asarray([5, 0, 2, 8, 10, 1])


def sound(dtype=jnp.float32):
    return jr.normal(jr.key(5), (5, 14), dtype)


def build(config=TINY):
    return Whisper(config, key=jr.key(0))


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@eqx.filter_jit
def forward(model, features, target, mask=None):
    return model(features, target, mask=mask)


def test_the_source_is_convolved_twice():
    model = build()
    model = eqx.tree_at(lambda m: (m.conv1.bias, m.conv2.bias), model, (jnp.ones(8), -jnp.ones(8)))
    x = sound()
    for layer, stride in ((model.conv1, 1), (model.conv2, 2)):
        x = jnp.pad(x, ((0, 0), (1, 1)))
        windows = [x[:, i : i + 3] for i in range(0, x.shape[1] - 2, stride)]
        x = jnp.stack([jnp.einsum("oit,it->o", layer.weight, w) for w in windows], axis=1)
        x = jax.nn.gelu(x + layer.bias[:, None], approximate=False)
    assert x.shape == (8, 7)
    want = model.encoder_norm(model.encoder(x.T + model.positions.table.weight))
    close(model.encode(sound()).memory, want)
    sines = SinusoidalPositions(8, halves=True)(jnp.arange(7))
    close(model.positions.table.weight, sines)
    close(sines[:, 0], jnp.sin(jnp.arange(7.0)))
    close(sines[:, 4], jnp.cos(jnp.arange(7.0)))


def test_keys_have_no_bias():
    model = build()
    layers = (
        model.encoder.blocks.attention,
        model.decoder.blocks.attention,
        model.decoder.blocks.cross_attention,
    )
    for layer in layers:
        assert layer.k_proj.bias is None
        assert all(p.bias is not None for p in (layer.q_proj, layer.v_proj, layer.o_proj))


def test_cache_is_the_forward():
    model = build()
    cache = model.init_cache(sound(), 9)
    step = eqx.filter_jit(lambda tokens, cache: model.extend(tokens, cache))
    got = []
    for tokens in (TARGET[:3], TARGET[3:4], TARGET[4:]):
        out, cache = step(tokens, cache)
        got.append(out)
    close(jnp.concatenate(got), forward(model, sound(), TARGET))


def test_padding_reaches_nobody():
    model = build()
    poisoned = TARGET.at[4:].set(99)
    got = forward(model, sound(), poisoned, Padding(jnp.arange(6) < 4))
    assert jnp.isnan(got[4:]).all()
    close(got[:4], forward(model, sound(), TARGET)[:4])


def test_generation():
    model = build()
    tokens = [5]
    for _ in range(5):
        padded = jnp.asarray((tokens + [0] * 6)[:6])
        tokens.append(int(forward(model, sound(), padded)[len(tokens) - 1].argmax()))
    options = {"max_new_tokens": 5, "cache": model.init_cache(sound(), 8)}
    new = generate(model, jnp.asarray([5]), temperature=0, **options)
    assert new.tolist() == tokens[1:]
    found = beam_search(model, jnp.asarray([5]), num_beams=1, **options)
    assert found.tokens[0].tolist() == tokens[1:]


def test_derivatives(x64):
    model = jax.tree.map(lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, build())
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    tangent = jax.tree.map(jnp.cos, arrays)
    weight = jnp.sin(jnp.arange(6 * 13.0)).reshape(6, 13)

    def loss(arrays):
        return (weight * eqx.combine(arrays, static)(sound(jnp.float64), TARGET)).sum()

    @jax.jit
    def everything(arrays, tangent):
        gradient = jax.grad(loss)(arrays)
        slope = jax.jvp(loss, (arrays,), (tangent,))[1]
        step = 1e-5
        near = jax.tree.map(lambda x, t: jnp.stack([x + step * t, x - step * t]), arrays, tangent)
        above, below = jax.lax.map(loss, near)
        return gradient, slope, (above - below) / (2 * step)

    gradient, slope, difference = everything(arrays, tangent)
    dot = sum(
        jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, tangent)), strict=True)
    )
    np.testing.assert_allclose(slope, dot, rtol=1e-9)
    np.testing.assert_allclose(slope, difference, rtol=1e-6)
    for part in (gradient.conv1, gradient.conv2, gradient.positions):
        assert all((x != 0).any() for x in jax.tree.leaves(part))


def test_dropout():
    config = TINY.replace(transformer=TINY.transformer.replace(dropout_rate=0.5))
    model = build(config)
    a, b = (forward_with_key(model, i) for i in (0, 1))
    assert not jnp.allclose(a, b)
    with pytest.raises(RuntimeError, match="key"):
        model(sound(), TARGET)
    close(eqx.nn.inference_mode(model)(sound(), TARGET), forward(build(), sound(), TARGET))


@eqx.filter_jit
def forward_with_key(model, seed):
    return model(sound(), TARGET, key=jr.key(seed))


def test_wrong_input():
    model = build()
    with pytest.raises(ValueError, match=r"\(5, 12\) but must be .* \(5, 14\)"):
        model(sound()[:, :12], TARGET)
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        model(sound()[None], TARGET)
    with pytest.raises(ValueError, match="max_source_len=0"):
        TINY.replace(max_source_len=0)
    for name, value in (("positions", "rope"), ("pooler", True)):
        with pytest.raises(ValueError, match=name):
            TINY.replace(transformer=TINY.transformer.replace(**{name: value}))
    changed = build(TINY.replace(num_mel_bins=6, max_source_len=8))
    assert changed.conv1.weight.shape == (8, 6, 3)
    assert changed.positions.table.weight.shape == (8, 8)
    assert WhisperConfig.from_json(TINY.to_json()) == TINY
