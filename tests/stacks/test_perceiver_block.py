"""A block whose positions each attend to a source, and to nothing else."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Causal, Padding
from eqx_transformer.nn import MLP, CrossAttention, LayerNorm
from eqx_transformer.stacks import PerceiverBlock, Residual, Source

SEQ, TOKENS, D_MODEL, D_MEMORY, HEADS = 5, 7, 8, 6, 2


def make(getkey):
    return PerceiverBlock(
        CrossAttention(D_MODEL, HEADS, d_memory=D_MEMORY, key=getkey()),
        MLP(D_MODEL, 12, activation=jnp.tanh, key=getkey()),
        Residual(LayerNorm(D_MODEL)),
        Residual(LayerNorm(D_MODEL)),
    )


def by_hand(block, x, memory, valid):
    """Position by position, in float64 NumPy."""

    def norm(h):
        return (h - h.mean()) / np.sqrt(h.var() + 1e-5)

    attention, mlp = block.attention, block.mlp
    q_proj, k_proj, v_proj, o_proj = (
        np.asarray(getattr(attention, name).weight)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    )
    up, down = (np.asarray(p.weight) for p in (mlp.up_proj, mlp.down_proj))
    size = D_MODEL // HEADS
    out = []
    for h in np.asarray(x):
        q, k, v = norm(h) @ q_proj, memory[valid] @ k_proj, memory[valid] @ v_proj
        heads = []
        for i in range(HEADS):
            mine = slice(i * size, (i + 1) * size)
            weights = np.exp(k[:, mine] @ q[mine] / np.sqrt(size))
            heads.append(weights @ v[:, mine] / weights.sum())
        h = h + np.concatenate(heads) @ o_proj
        out.append(h + np.tanh(norm(h) @ up) @ down)
    return np.stack(out)


def test_equals_the_formula_whole_and_in_chunks(getkey, x64):
    block = make(getkey)
    x, memory = jr.normal(getkey(), (SEQ, D_MODEL)), jr.normal(getkey(), (TOKENS, D_MEMORY))
    valid = np.arange(TOKENS) != 2
    source = Source(memory, Padding(jnp.asarray(valid)))

    @eqx.filter_jit
    def whole_and_chunks(block, x, source):
        cache = block.init_cache(0, context=source)
        first, cache = block.extend(x[:2], cache)
        return block(x, context=source), jnp.concatenate([first, block.extend(x[2:], cache)[0]])

    expected = by_hand(block, x, np.asarray(memory), valid)
    for out in whole_and_chunks(block, x, source):
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-10)


def test_errors(getkey):
    block = make(getkey)
    x, source = jnp.ones((SEQ, D_MODEL)), Source(jnp.ones((TOKENS, D_MEMORY)))
    for bad, message in [
        (lambda: block(x), r"give context=Source\(memory\)"),
        (lambda: block(x, context=source, mask=Causal()), "positions do not see each other"),
        (lambda: block(x, context=source, positions=jnp.arange(SEQ)), "do not see each other"),
        (lambda: block(x[None], context=source), r"jax\.vmap"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()
    with pytest.raises(ValueError, match="the source belongs to the cache"):
        block.extend(x, block.init_cache(0, context=source), context=source)
