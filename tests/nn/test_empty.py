"""Layers and sequences without tokens."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import pytest

from eqx_transformer.models import Llama, LlamaConfig
from eqx_transformer.nn import (
    Attention,
    CrossAttention,
    LatentAttention,
    LinearAttention,
    RoPE,
    SliceAttention,
)

LAYERS = {
    "attention": lambda key: Attention(8, 4, num_kv_heads=2, rope=RoPE(), qk_norm=True, key=key),
    "output gate": lambda key: Attention(8, 2, gate="output", key=key),
    "linear": lambda key: LinearAttention(8, 2, key=key),
    "latent": lambda key: LatentAttention(
        8, 2, kv_rank=4, nope_head_dim=4, rope_head_dim=2, v_head_dim=4, key=key
    ),
    "slices": lambda key: SliceAttention(8, 2, 3, key=key),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, getkey):
    layer = eqx.nn.inference_mode(LAYERS[name](getkey()))
    assert eqx.filter_jit(layer)(jnp.zeros((0, 8))).shape == (0, 8)


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0)])
def test_cross_attention(queries, keys, getkey):
    layer = eqx.filter_jit(CrossAttention(8, 2, key=getkey()))
    # A query without a key gets zero.
    assert (
        layer(jr.normal(getkey(), (queries, 8)), jnp.zeros((keys, 8))).tolist()
        == [[0.0] * 8] * queries
    )


def test_extending_by_nothing_changes_nothing(getkey):
    config = LlamaConfig(vocab_size=5, d_model=8, num_layers=2, num_heads=2, max_len=6)
    model = Llama(config, key=getkey())
    empty, tokens = jnp.zeros(0, jnp.int32), jnp.array([1, 2])
    assert eqx.filter_jit(model)(empty).shape == (0, 5)
    extend = eqx.filter_jit(lambda tokens, cache: model.extend(tokens, cache))
    _, cache = extend(tokens, model.init_cache(6))
    logits, same = extend(empty, cache)
    assert logits.shape == (0, 5)
    assert eqx.tree_equal(same, cache)
