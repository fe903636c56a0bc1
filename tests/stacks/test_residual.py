"""Residual wiring, and blocks built from numbers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.nn import MLP, DropPath, LayerNorm, LayerScale, RMSNorm
from eqx_transformer.stacks import (
    ParallelBlock,
    Residual,
    Source,
    Stack,
    decoder_block,
    encoder_block,
    linear_drop_path,
)

D_MODEL, SEQ = 8, 5


def _close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_every_place_of_a_norm(getkey):
    x = jr.normal(getkey(), (SEQ, D_MODEL))
    a, b, c = (
        eqx.tree_at(lambda n: n.weight, RMSNorm(D_MODEL), w * jnp.ones(D_MODEL)) for w in (2, 3, 5)
    )

    def branch(h, key):
        return (h**2, "aux")

    full = Residual(a, branch_norm=b, output_norm=c, scale=LayerScale(D_MODEL, init=0.5))
    out, aux = full(x, branch)
    assert aux == "aux"
    _close(out, c(x + 0.5 * b(a(x) ** 2)))
    _close(Residual()(x, branch)[0], x + x**2)
    _close(Residual(a)(x, branch)[0], x + a(x) ** 2)
    _close(Residual(output_norm=c)(x, branch)[0], c(x + x**2))


def test_dropout_and_drop_path(getkey):
    x = jr.normal(getkey(), (SEQ, D_MODEL))

    def branch(h, key):
        return (jnp.ones_like(h), None)

    out = Residual(dropout_rate=0.5)(x, branch, key=jr.key(0))[0] - x
    np.testing.assert_allclose(np.unique(np.round(out, 4)), [0, 2], atol=1e-3)
    residual = Residual(drop_path=DropPath(0.5))
    outs = [residual(x, branch, key=jr.key(i))[0] - x for i in range(8)]
    assert {float(np.round(o.min(), 4)) for o in outs} == {0.0, 2.0}
    assert all(np.ptp(np.round(o, 4)) == 0 for o in outs)
    with pytest.raises(ValueError, match="dropout_rate=2"):
        Residual(dropout_rate=2.0)


def _norms(block):
    kinds = (LayerNorm, RMSNorm)
    leaves = jax.tree.leaves(block, is_leaf=lambda x: isinstance(x, kinds))
    return sum(isinstance(x, kinds) for x in leaves)


@pytest.mark.parametrize(
    ("layout", "norms"), [("pre", 2), ("post", 2), ("sandwich", 4), ("parallel", 1)]
)
def test_layouts(layout, norms, getkey):
    block = encoder_block(D_MODEL, 2, 12, layout=layout, key=getkey())
    x = jr.normal(getkey(), (SEQ, D_MODEL))
    assert _norms(block) == norms
    assert block(x).shape == x.shape
    if layout == "parallel":
        h = block.residual.norm(x)
        _close(block(x), x + block.attention(h) + block.mlp(h))
    if layout == "post":
        h = block.attention_residual.output_norm(x + block.attention(x))
        _close(block(x), block.mlp_residual.output_norm(h + block.mlp(h)))


def test_parallel_with_two_norms_and_cache(getkey):
    plain = encoder_block(D_MODEL, 2, 12, layout="parallel", causal=True, key=getkey())
    norms = RMSNorm(D_MODEL), LayerNorm(D_MODEL)
    block = ParallelBlock(plain.attention, plain.mlp, Residual(), *norms)
    x = jr.normal(getkey(), (SEQ, D_MODEL))
    _close(block(x), x + block.attention(norms[0](x)) + block.mlp(norms[1](x)))
    head, cache = block.extend(x[:2], block.init_cache(SEQ))
    tail, _ = block.extend(x[2:], cache)
    _close(jnp.concatenate([head, tail]), block(x))


def test_what_a_block_is_made_of(getkey):
    mlp = MLP(D_MODEL, 3, key=getkey())
    block = encoder_block(
        D_MODEL,
        2,
        12,
        mlp=mlp,
        layer_scale=0.1,
        drop_path_rate=0.2,
        make_norm=RMSNorm,
        key=getkey(),
    )
    assert block.mlp is mlp
    assert isinstance(block.attention_residual.norm, RMSNorm)
    _close(block.mlp_residual.scale.weight, 0.1 * jnp.ones(D_MODEL))
    _close(block.mlp_residual.drop_path.rate, 0.2)
    assert block.attention.q_proj.bias is not None
    bare = encoder_block(D_MODEL, 2, 12, use_bias=False, gated=True, key=getkey())
    assert bare.attention.q_proj.bias is None and bare.mlp.gate_proj.bias is None
    with pytest.raises(ValueError, match="window=0"):
        encoder_block(D_MODEL, 2, 12, window=0, key=getkey())
    with pytest.raises((ValueError, TypeError), match="layout"):
        encoder_block(D_MODEL, 2, 12, layout="inside", key=getkey())


def test_decoder_block_is_three_branches(getkey):
    block = decoder_block(D_MODEL, 2, 12, d_memory=6, key=getkey())
    x, memory = jr.normal(getkey(), (SEQ, D_MODEL)), jr.normal(getkey(), (4, 6))
    h = x + block.attention(block.attention_residual.norm(x))
    h = h + block.cross_attention(block.cross_residual.norm(h), memory)
    h = h + block.mlp(block.mlp_residual.norm(h))
    _close(block(x, context=Source(memory)), h)
    for dtype in (jnp.bfloat16, jnp.int8):
        narrow = block.init_cache(SEQ, dtype, context=Source(memory))
        assert narrow.memory.k.dtype == narrow.target.k.dtype == dtype
    first = block(x[:1], context=Source(memory))
    np.testing.assert_allclose(block.extend(x[:1], narrow)[0], first, atol=0.05)


def test_drop_path_grows_with_depth(getkey):
    make = eqx.Partial(encoder_block, D_MODEL, 2, 12, drop_path_rate=0.0)
    stack = linear_drop_path(Stack(make, 5, key=getkey()), 0.4)
    for name in ("attention_residual", "mlp_residual"):
        rates = getattr(stack.blocks, name).drop_path.rate
        _close(rates, jnp.asarray([0.0, 0.1, 0.2, 0.3, 0.4]))
    with pytest.raises(ValueError, match="no DropPath"):
        linear_drop_path(Stack(eqx.Partial(encoder_block, D_MODEL, 2, 12), 2, key=getkey()), 0.1)
    with pytest.raises(ValueError, match=r"rate=1\.0"):
        linear_drop_path(stack, 1.0)
