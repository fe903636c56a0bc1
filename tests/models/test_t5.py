"""What T5, BART and Marian need of an encoder-decoder."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Padding
from eqx_transformer.generation import beam_search, generate
from eqx_transformer.models import EncoderDecoder, TransformerConfig
from eqx_transformer.stacks import BiasedStack, Stack, encoder_block

TINY = TransformerConfig(
    vocab_size=13,
    d_model=8,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=4,
    num_decoder_heads=2,
    d_ff=12,
    decoder_d_ff=10,
    max_len=24,
    dropout_rate=0.0,
    pad_token_id=None,
    tie_embeddings=True,
)
T5 = TINY.replace(
    num_decoder_heads=None,
    head_dim=3,
    positions="relative",
    relative_buckets=8,
    relative_max_distance=6,
    query_scale=1.0,
    norm="rms",
    use_bias=False,
    activation="geglu_tanh",
    scale_output=True,
)
BART = TINY.replace(
    positions="learned",
    position_offset=2,
    embedding_norm=True,
    layout="post",
    final_norm=False,
    scale_embeddings=True,
    head_bias=True,
)
MARIAN = BART.replace(positions="sinusoidal_halves", position_offset=0, embedding_norm=False)
every = pytest.mark.parametrize("config", [T5, BART, MARIAN], ids=["t5", "bart", "marian"])

SOURCE = jnp.asarray([3, 9, 1, 4, 12, 7, 2])
VALID = jnp.arange(7) < 5
TARGET = jnp.asarray([5, 0, 2, 8, 10, 1])


def build(config):
    """A model with biases and norms that are not zeros and ones."""
    leaves, structure = jax.tree.flatten(EncoderDecoder(config, key=jr.key(0)))
    keys = jr.split(jr.key(1), len(leaves))
    leaves = [
        x + 0.2 * jr.normal(k, x.shape, x.dtype) if eqx.is_inexact_array(x) else x
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@eqx.filter_jit
def forward(model, source, target, mask=None, source_mask=None):
    return model(source, target, mask=mask, source_mask=source_mask)


@eqx.filter_jit
def extend(model, tokens, cache):
    return model.extend(tokens, cache)


@every
def test_cache_is_the_forward(config):
    model, mask = build(config), Padding(VALID)
    want = forward(model, SOURCE, TARGET, None, mask)
    cache = eqx.filter_jit(EncoderDecoder.init_cache)(model, SOURCE, 9, source_mask=mask)
    got = []
    for tokens in (TARGET[:3], TARGET[3:4], TARGET[4:]):
        out, cache = extend(model, tokens, cache)
        got.append(out)
    close(jnp.concatenate(got), want)


@every
def test_padding_reaches_nobody(config):
    model = build(config)
    want = forward(model, SOURCE[:5], TARGET[:4])
    # An id that does not exist has vectors of NaN.
    source, target = SOURCE.at[5:].set(99), TARGET.at[4:].set(99)
    masks = (Padding(jnp.arange(6) < 4), Padding(VALID))
    got = forward(model, source, target, *masks)
    assert jnp.isnan(got[4:]).all()
    close(got[:4], want)


@every
def test_generation(config):
    """Through the cache, the most likely token of full forward passes."""
    model = build(config)
    tokens = [5]
    for _ in range(5):
        # Padded behind, which a decoder does not see.
        padded = jnp.asarray((tokens + [0] * 6)[:6])
        tokens.append(int(forward(model, SOURCE, padded)[len(tokens) - 1].argmax()))
    cache = model.init_cache(SOURCE, 8)
    options = {"max_new_tokens": 5, "cache": cache}
    new = generate(model, jnp.asarray([5]), temperature=0, **options)
    assert new.tolist() == tokens[1:]
    found = beam_search(model, jnp.asarray([5]), num_beams=1, **options)
    assert found.tokens[0].tolist() == tokens[1:]


@every
def test_derivatives(config, x64):
    model = jax.tree.map(
        lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, build(config)
    )
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    tangent = jax.tree.map(jnp.cos, arrays)
    weight = jnp.sin(jnp.arange(6 * 13.0)).reshape(6, 13)

    def loss(arrays):
        out = eqx.combine(arrays, static)(SOURCE, TARGET, source_mask=Padding(VALID))
        return (weight * out).sum()

    @jax.jit
    def everything(arrays, tangent):
        gradient = jax.grad(loss)(arrays)
        slope = jax.jvp(loss, (arrays,), (tangent,))[1]
        step = 1e-5
        # Of fourth order: of second, the tolerance would depend on how curved the loss is here.
        near = jax.tree.map(
            lambda x, t: jnp.stack([x + i * step * t for i in (-2, -1, 1, 2)]), arrays, tangent
        )
        a, b, c, d = jax.lax.map(loss, near)
        return gradient, slope, (a - 8 * b + 8 * c - d) / (12 * step)

    gradient, slope, difference = everything(arrays, tangent)
    dot = sum(
        jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, tangent)), strict=True)
    )
    np.testing.assert_allclose(slope, dot, rtol=1e-9)
    np.testing.assert_allclose(slope, difference, rtol=1e-6)
    # No part is left out: what softmax and norms do not see is not among these.
    parts = [gradient.embedding.embedding.weight]
    if config.positions == "relative":
        parts += [gradient.encoder.score_mod.table, gradient.decoder.score_mod.table]
    if config.positions == "learned":
        parts += [gradient.embedding.positions, gradient.decoder_embedding.positions]
        parts += [gradient.embedding.norm, gradient.decoder_embedding.norm]
    for part in parts:
        assert all((x != 0).any() for x in jax.tree.leaves(part))


def test_vectors_of_tokens_are_there_once():
    model = build(BART)
    assert model.decoder_embedding.embedding is None
    tables = [x for x in jax.tree.leaves(model) if eqx.is_array(x) and x.shape == (13, 8)]
    assert len(tables) == 1
    positions = (model.embedding.positions, model.decoder_embedding.positions)
    assert [x.table.weight.shape for x in positions] == [(26, 8), (26, 8)]
    assert not jnp.allclose(*(x.table.weight for x in positions))


def test_sizes_of_the_decoder():
    model = build(BART)
    assert model.encoder.num_layers == 3 and model.decoder.num_layers == 2
    for stack, heads, d_ff in ((model.encoder, 4, 12), (model.decoder, 2, 10)):
        assert stack.blocks.attention.head_dim == 8 // heads
        assert stack.blocks.mlp.up_proj.weight.shape[-1] == d_ff
    assert model.decoder.blocks.cross_attention.head_dim == 4


def test_output_scale_and_bias():
    model = build(T5.replace(head_bias=True))
    plain = eqx.tree_at(lambda m: m.logit_bias, model, jnp.zeros(13))
    close(forward(model, SOURCE, TARGET), forward(plain, SOURCE, TARGET) + model.logit_bias[None])
    unscaled = build(T5.replace(scale_output=False))
    close(forward(unscaled, SOURCE, TARGET) / 8**0.5, forward(build(T5), SOURCE, TARGET))


def test_one_score_mod_for_all_layers():
    stack = build(T5).encoder
    assert isinstance(stack, BiasedStack)
    assert len(stack) == 3 and len(list(stack)) == 3
    x = jr.normal(jr.key(0), (7, 8))
    want = x
    for i in range(3):
        assert jnp.array_equal(stack[i].attention.score_mod.table, stack.score_mod.table)
        want = stack[i](want)
    close(stack(x), want)
    close(stack.spread()(x), want)

    def total(stack):
        return (stack(x) ** 3).sum()

    shared = eqx.filter_grad(total)(stack).score_mod.table
    copies = eqx.filter_grad(total)(stack.spread()).blocks.attention.score_mod.table
    close(shared, copies.sum(axis=0), 1e-4)
    with pytest.raises(ValueError, match="without a score_mod"):
        BiasedStack(stack.spread(), stack.score_mod)
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        stack(x[None])
    # It need not have parameters.
    plain = Stack(lambda key: encoder_block(8, 2, 12, key=key), 2, key=jr.key(0))
    doubled = BiasedStack(plain, lambda score, q, k, head: 2 * score)
    assert not jnp.allclose(doubled(x), plain(x), atol=1e-4)
