import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import (
    Causal,
    Padding,
    Segments,
    SlidingWindow,
    dot_product_attention,
)
from eqx_transformer.nn import MLP, Attention, LayerNorm, RMSNorm, RoPE
from eqx_transformer.stacks import BlockSequence, Residual, Stack, TransformerBlock

SEQ, D_MODEL, DEPTH = 5, 8, 4


def _make_block(*, key, mask=None, dropout_rate=0.0, attention_dropout=0.0):
    k1, k2 = jr.split(key)
    attention = Attention(
        D_MODEL,
        2,
        num_kv_heads=1,
        rope=RoPE(theta=100.0),
        mask=Causal() if mask is None else mask,
        dropout_rate=attention_dropout,
        key=k1,
    )
    mlp = MLP(D_MODEL, 12, key=k2)
    norms = RMSNorm(D_MODEL), LayerNorm(D_MODEL)
    residuals = (Residual(norm, dropout_rate=dropout_rate) for norm in norms)
    return TransformerBlock(attention, mlp, *residuals)


def _loop(layers, x, **options):
    for layer in layers:
        x = layer(x, **options)
    return x


def _close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_block(getkey):
    block, x = _make_block(key=getkey()), jr.normal(getkey(), (SEQ, D_MODEL))
    h = x + block.attention(block.attention_residual.norm(x))
    _close(block(x), h + block.mlp(block.mlp_residual.norm(h)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unroll": 2},
        {"unroll": DEPTH, "remat": True},
        {"remat": True},
        {"remat": jax.checkpoint_policies.dots_with_no_batch_dims_saveable},
    ],
    ids=["scan", "unroll", "unroll-remat", "remat", "policy"],
)
def test_equals_list_of_layers(getkey, options):
    stack = Stack(_make_block, DEPTH, key=getkey(), **options)
    x, ct = jr.normal(getkey(), (2, SEQ, D_MODEL))
    mask = Padding(jnp.array([1, 1, 1, 1, 1, 0, 1, 1], bool))
    call = {"mask": mask, "positions": jnp.arange(3, 8)}

    def grad(model, run):
        f = lambda args: jnp.vdot(run(args[0], args[1]), ct)  # noqa: E731
        return eqx.filter_jit(eqx.filter_value_and_grad(f))((model, x))

    value, (stacked, dx) = grad(stack, lambda m, x: m(x, **call))
    expected, (layers, expected_dx) = grad(stack.unstack(), lambda m, x: _loop(m, x, **call))
    _close((value, dx), (expected, expected_dx), 1e-4)
    _close(stacked.unstack(), layers, 1e-4)


def test_program_does_not_grow_with_depth(getkey):
    def size(depth):
        stack = Stack(_make_block, depth, remat=True, key=getkey())
        grad = eqx.filter_jit(eqx.filter_grad(lambda m, x: m(x).sum()))
        return len(grad.lower(stack, jnp.ones((SEQ, D_MODEL))).as_text())

    shallow, deep = size(2), size(16)
    assert abs(deep - shallow) < 0.02 * shallow


def test_no_two_layers_begin_alike(getkey):
    stack = Stack(_make_block, DEPTH, key=getkey())
    weights = [x for x in jax.tree.leaves(stack.blocks) if eqx.is_array(x) and x.ndim == 3]
    assert len(weights) == 6
    for weight in weights:
        for i in range(DEPTH):
            for j in range(i):
                assert (weight[i] != weight[j]).all()


def test_sequence_protocol(getkey):
    stack = Stack(_make_block, DEPTH, key=getkey())
    assert len(stack) == DEPTH
    layers = stack.unstack()
    assert all(eqx.tree_equal(a, b) for a, b in zip(stack, layers, strict=True))
    assert eqx.tree_equal(stack[-1], layers[DEPTH - 1])
    assert not eqx.tree_equal(stack[0], stack[1])
    for i in (DEPTH, -DEPTH - 1):
        with pytest.raises(IndexError, match=f"no layer {i}.*num_layers={DEPTH}"):
            stack[i]
    assert eqx.tree_equal(Stack.from_layers(layers), stack)
    policy = jax.checkpoint_policies.dots_saveable
    again = Stack.from_layers(layers, remat=policy, unroll=2)
    assert (again.remat, again.unroll) == (policy, 2)
    assert len(Stack.from_layers(layers[:3])) == 3


def test_from_layers_names_what_disagrees(getkey):
    a, b = _make_block(key=getkey()), _make_block(key=getkey())
    wide = eqx.tree_at(lambda m: m.mlp.up_proj.bias, b, jnp.zeros(13))
    other = eqx.tree_at(lambda m: m.mlp.activation, b, jnp.tanh)
    bare = eqx.tree_at(lambda m: m.mlp.up_proj.bias, b, None)
    windowed = _make_block(key=getkey(), mask=SlidingWindow(1, 0))
    for layers, message in (
        ([], "at least one"),
        ([a, b, wide], r"layer 2 differs.*\.mlp\.up_proj\.bias: float32\[13\] instead of.*\[12\]"),
        ([a, other], r"layer 1 differs.*\.mlp\.activation"),
        ([a, bare], r"layer 1.*\.mlp\.up_proj\.bias"),
        ([a, windowed], r"layer 1.*\.attention\.mask: SlidingWindow.* instead of Causal"),
    ):
        with pytest.raises(ValueError, match=message):
            Stack.from_layers(layers)


def test_keys_differ_from_layer_to_layer(getkey):
    make = eqx.Partial(_make_block, dropout_rate=0.5, attention_dropout=0.3)
    stack, x, key = Stack(make, DEPTH, key=getkey()), jr.normal(getkey(), (SEQ, D_MODEL)), getkey()
    expected = x
    for layer, layer_key in zip(stack, jr.split(key, DEPTH), strict=True):
        expected = layer(expected, key=layer_key)
    _close(stack(x, key=key), expected)
    with pytest.raises(RuntimeError, match="key"):
        stack(x)
    off = eqx.nn.inference_mode(stack)
    _close(off(x, key=key), _loop(off.unstack(), x))


def test_apply_with(getkey):
    """What blocks are, and do, on the way comes out with an axis for the layers."""
    stack, x = Stack(_make_block, 3, key=getkey()), jr.normal(getkey(), (SEQ, D_MODEL))

    def twice(block, x, **options):
        y = block(x, **options)
        return y, (x, options["mask"])

    mask = Causal()
    out, (inputs, masks) = stack.apply_with(twice, x, mask=mask, key=getkey())
    np.testing.assert_allclose(out, stack(x, mask=mask), atol=1e-6)
    np.testing.assert_array_equal(inputs[0], x)
    np.testing.assert_allclose(inputs[2], stack[1](inputs[1], mask=mask), atol=1e-6)
    assert isinstance(masks, Causal)  # what is no array is the same in all layers


@pytest.mark.parametrize("options", [{}, {"unroll": 3}], ids=["scan", "unroll"])
def test_extend(getkey, options):
    stack = Stack(_make_block, DEPTH, key=getkey(), **options)
    x = jr.normal(getkey(), (SEQ, D_MODEL))
    cache = stack.init_cache(SEQ, jnp.float32)
    assert cache.k.shape == (DEPTH, SEQ, 4) and cache.length.shape == (DEPTH,)
    first, cache = stack.extend(x[:2], cache)
    padded = jnp.pad(x[2:], ((0, 1), (0, 0)))
    second, cache = stack.extend(padded, cache, length=3)
    _close(jnp.concatenate([first, second[:3]]), stack(x))
    assert (cache.length == SEQ).all()


def _make_pair(*, key):
    """Two different layers as one: how a stack gets a pattern."""
    k1, k2 = jr.split(key)
    local = _make_block(key=k1, mask=Causal() & SlidingWindow(1, 0))
    return BlockSequence((local, _make_block(key=k2)))


def test_block_of_blocks(getkey):
    stack, x = Stack(_make_pair, 2, key=getkey()), jr.normal(getkey(), (SEQ, D_MODEL))
    layers = [layer for pair in stack for layer in pair.blocks]
    _close(stack(x), _loop(layers, x))
    out, _ = stack.extend(x, stack.init_cache(SEQ))
    _close(out, stack(x))
    with pytest.raises(ValueError, match="at least one"):
        BlockSequence(())


def test_errors(getkey):
    for options, message in (({"num_layers": 0}, "num_layers=0"), ({"unroll": 0}, "unroll=0")):
        with pytest.raises(ValueError, match=message):
            Stack(_make_block, **{"num_layers": 2, "key": getkey(), **options})
    with pytest.raises(ValueError, match=r"Stack takes one example.*jax.vmap"):
        Stack(_make_block, 2, key=getkey())(jnp.ones((2, SEQ, D_MODEL)))
    with pytest.raises(ValueError, match=r"dropout_rate=1\.0"):
        _make_block(key=getkey(), dropout_rate=1.0)
    # The blocks of a stack are not a layer.
    with pytest.raises((ValueError, TypeError)):
        Stack(_make_block, 2, key=getkey()).blocks(jnp.ones((SEQ, D_MODEL)))


def test_documents_take_memory_linear_in_the_sequence():
    """What does not depend on the layer, the masks of all tiles, is not kept by the loop."""
    stack = eqx.tree_at(
        lambda stack: stack.blocks.attention.attention_fn,
        Stack(_make_block, DEPTH, key=jr.key(0)),
        eqx.Partial(dot_product_attention, block_size=128),
    )
    params, static = eqx.partition(stack, eqx.is_inexact_array)

    def temporaries(seq):
        def loss(params, x, ids):
            return (eqx.combine(params, static)(x, mask=Segments(ids)) ** 2).sum()

        x, ids = jnp.ones((seq, D_MODEL)), jnp.arange(seq) // 100
        compiled = jax.jit(jax.grad(loss)).lower(params, x, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 2.5 * temporaries(1024)
