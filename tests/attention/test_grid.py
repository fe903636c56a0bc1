"""Masks and biases of tokens on a grid."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import (
    EMPTY,
    FULL,
    GridBias,
    GridWindow,
    attention_weights,
    dot_product_attention,
)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("reach", [0, 1, 5])
def test_window_is_a_square_of_cells(reach, prefix):
    height, width = 4, 3
    mask = GridWindow(width, reach, prefix)
    seq = prefix + height * width
    for q in range(seq):
        for kv in range(seq):
            if q < prefix or kv < prefix:
                expected = True
            else:
                (a, b), (c, d) = (divmod(x - prefix, width) for x in (q, kv))
                expected = max(abs(a - c), abs(b - d)) <= reach
            assert bool(mask(jnp.asarray(q), jnp.asarray(kv))) == expected


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("reach", [0, 1])
def test_blocks_are_classified_soundly_and_far_ones_are_empty(reach, prefix):
    mask, seq = GridWindow(3, reach, prefix), prefix + 15
    dense = np.asarray(mask(jnp.arange(seq)[:, None], jnp.arange(seq)[None, :]))
    bounds = [(lo, hi) for lo in range(seq) for hi in range(lo, seq)]
    lo, hi = np.asarray(bounds, np.int32).T
    q, kv = np.meshgrid(np.arange(len(bounds)), np.arange(len(bounds)), indexing="ij")
    classes = np.asarray(jax.jit(mask.block)(lo[q], hi[q], lo[kv], hi[kv]))
    for i, (a, b) in enumerate(bounds):
        for j, (c, d) in enumerate(bounds):
            block = dense[a : b + 1, c : d + 1]
            if classes[i, j] == EMPTY:
                assert not block.any()
            if classes[i, j] == FULL:
                assert block.all()
    single = bounds.index((seq - 1, seq - 1))
    assert classes[single, bounds.index((prefix, prefix + 2))] == EMPTY
    assert "GridWindow" in str(mask)


def test_a_window_in_attention(getkey):
    q, k, v = jr.normal(getkey(), (3, 2 + 20 * 20, 1, 8))
    mask = GridWindow(20, 2, 2)
    dense, tiles = (
        dot_product_attention(q, k, v, mask=mask, implementation=name, block_size=32)
        for name in ("reference", "chunked")
    )
    np.testing.assert_allclose(dense, tiles, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_bias_of_differences(getkey, prefix):
    height, width, heads = 2, 3, 2
    bias = GridBias((height, width), heads, num_prefix=prefix)
    assert bias.table.shape == (3 * 5 + (3 if prefix else 0), heads) and (bias.table == 0).all()
    table = jr.normal(getkey(), bias.table.shape)
    bias = jax.tree.map(lambda _: table, bias)
    seq = prefix + height * width
    at = jnp.arange(seq)
    head = jnp.arange(heads)[:, None, None]
    got = bias(jnp.zeros((heads, seq, seq)), at[None, :, None], at[None, None, :], head)
    for q in range(seq):
        for kv in range(seq):
            if q < prefix or kv < prefix:
                row = len(table) - (1 if q < prefix and kv < prefix else 3 if q < prefix else 2)
            else:
                (a, b), (c, d) = (divmod(x - prefix, width) for x in (q, kv))
                row = (a - c + height - 1) * (2 * width - 1) + b - d + width - 1
            np.testing.assert_allclose(got[:, q, kv], table[row])


def test_bias_is_trained_in_every_implementation(x64, getkey):
    q, k, v = jr.normal(getkey(), (3, 13, 2, 4))
    bias = GridBias((3, 4), 2, num_prefix=1)

    def gradient(implementation):
        def loss(bias):
            out = dot_product_attention(q, k, v, score_mod=bias, implementation=implementation)
            return (out * v).sum()

        return jax.grad(loss)(bias).table

    expected = gradient("reference")
    assert ((expected != 0).sum(axis=0) > 30).all()
    np.testing.assert_allclose(gradient("chunked"), expected, rtol=1e-9, atol=1e-12)
    weights = attention_weights(q, k, score_mod=bias)
    np.testing.assert_allclose(weights.sum(axis=-1), 1)


@pytest.mark.parametrize("prefix", [0, 2])
def test_bias_of_another_grid(getkey, prefix):
    bias = GridBias((2, 3), 2, num_prefix=prefix)
    bias = jax.tree.map(lambda x: jr.normal(getkey(), x.shape), bias)
    np.testing.assert_allclose(bias.resized((2, 3)).table, bias.table, rtol=1e-6)
    resized = bias.resized((4, 1))
    assert resized.grid == (4, 1) and resized.num_prefix == prefix
    cells, rest = resized.table[:7], resized.table[7:]
    picture = bias.table[:15].reshape(3, 5, 2)
    wanted = jax.image.resize(picture[:, 2:3], (7, 1, 2), "linear", antialias=False)
    np.testing.assert_allclose(cells.reshape(7, 1, 2), wanted, rtol=1e-5, atol=1e-6)
    wide = bias.resized((2, 5)).table[:27].reshape(3, 9, 2)
    wanted = jax.image.resize(picture, (3, 9, 2), "linear", antialias=False)
    np.testing.assert_allclose(wide, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rest, bias.table[15:])


def test_bad_numbers():
    for options in ({"width": 0, "reach": 1}, {"width": 1, "reach": -1}):
        with pytest.raises(ValueError, match="must be at least"):
            GridWindow(**options)
    with pytest.raises(ValueError, match=r"grid=\(0, 2\)"):
        GridBias((0, 2), 1)
