"""Patches of images and positions on a grid."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.nn import PatchEmbedding, PositionGrid, bicubic_matrix, patchify, unpatchify


def test_patches_are_row_by_row_and_features_like_a_convolution_has_them():
    image = jnp.arange(2 * 4 * 6).reshape(2, 4, 6).astype(float)
    patches = patchify(image, (2, 3))
    assert patches.shape == (4, 12)
    np.testing.assert_array_equal(patches[1], image[:, :2, 3:].ravel())
    np.testing.assert_array_equal(patches[2], image[:, 2:, :3].ravel())
    np.testing.assert_array_equal(unpatchify(patches, (4, 6), (2, 3)), image)


def test_embedding_is_a_convolution(getkey):
    layer = PatchEmbedding(3, 8, (2, 4), key=getkey())
    layer = eqx.tree_at(lambda m: m.proj.bias, layer, jr.normal(getkey(), (8,)))
    image = jr.normal(getkey(), (3, 6, 8))
    kernel = layer.proj.weight.T.reshape(8, 3, 2, 4)
    out = jax.lax.conv_general_dilated(image[None], kernel, (2, 4), "VALID")[0]
    expected = out.reshape(8, -1).T + layer.proj.bias[None, :]
    np.testing.assert_allclose(layer(image), expected, rtol=1e-5, atol=1e-5)
    assert PatchEmbedding(3, 8, (2, 4), use_bias=False, key=getkey()).proj.bias is None


def test_images_that_do_not_fit():
    layer = PatchEmbedding(3, 8, (4, 4), key=jr.key(0))
    with pytest.raises(ValueError, match=r"channels come first: use jnp.moveaxis\(image, -1, 0\)"):
        layer(jnp.ones((8, 8, 3)))
    with pytest.raises(ValueError, match=r"1 channels, but num_channels=3"):
        layer(jnp.ones((1, 8, 8)))
    with pytest.raises(ValueError, match=r"width 10 has no whole number .* 4; .* to 8"):
        layer(jnp.ones((3, 8, 10)))
    with pytest.raises(ValueError, match=r"height 3 .* to 4"):
        layer(jnp.ones((3, 3, 8)))
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        layer(jnp.ones((2, 3, 8, 8)))
    with pytest.raises(ValueError, match=r"2 \* 2 patches with a multiple of 16"):
        unpatchify(jnp.ones((4, 15)), (8, 8), (4, 4))
    with pytest.raises(ValueError, match=r"patches of size \(0, 4\) are empty"):
        patchify(jnp.ones((3, 8, 8)), (0, 4))
    with pytest.raises(ValueError, match="patch_size=0"):
        PatchEmbedding(3, 8, (4, 0), key=jr.key(0))


def test_interpolation_keeps_constants_and_straight_lines():
    for size, new in ((4, 9), (9, 4), (5, 5)):
        for antialias in (False, True):
            matrix = bicubic_matrix(size, new, antialias=antialias)
            np.testing.assert_allclose(matrix.sum(axis=1), 1)
            if size == new:
                np.testing.assert_allclose(matrix, np.eye(size), atol=1e-12)
    # Away from the border, a = -0.5 reproduces straight lines.
    line = bicubic_matrix(9, 18, antialias=True) @ np.arange(9.0)
    np.testing.assert_allclose(line[4:14], (np.arange(18) / 2 - 0.25)[4:14])


@pytest.mark.parametrize("num_prefix", [0, 2])
def test_position_grid(getkey, num_prefix):
    layer = PositionGrid((3, 4), 5, num_prefix=num_prefix, key=getkey())
    assert layer().shape == (num_prefix + 12, 5)
    assert layer((3, 4)) is layer.weight
    out = layer((5, 2))
    np.testing.assert_array_equal(out[:num_prefix], layer.weight[:num_prefix])
    cells = np.asarray(layer.weight[num_prefix:], np.float64).reshape(3, 4, 5)
    rows, columns = bicubic_matrix(3, 5), bicubic_matrix(4, 2)
    expected = np.einsum("ri,cj,ijd->rcd", rows, columns, cells).reshape(10, 5)
    np.testing.assert_allclose(out[num_prefix:], expected, rtol=1e-5, atol=1e-7)
    antialiased = PositionGrid((3, 4), 5, num_prefix=num_prefix, antialias=True, key=jr.key(0))
    other = eqx.tree_at(lambda m: m.weight, antialiased, layer.weight)((5, 2))
    assert not jnp.allclose(out, other, atol=1e-4)


def test_position_grid_is_linear_in_its_weight(x64):
    layer = PositionGrid((3, 4), 5, num_prefix=1, key=jr.key(0))
    cotangent = jr.normal(jr.key(1), (11, 5))

    def loss(layer):
        return (layer((5, 2)) * cotangent).sum()

    gradient = jax.grad(loss)(layer)
    np.testing.assert_allclose(jnp.vdot(gradient.weight, layer.weight), loss(layer), rtol=1e-12)
    assert (gradient.weight[0] == cotangent[0]).all()


def test_low_precision_positions_are_interpolated_in_float32():
    layer = PositionGrid((3, 4), 5, dtype=jnp.bfloat16, key=jr.key(0))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), layer)
    out = layer((6, 7))
    assert out.dtype == jnp.bfloat16
    assert (out == wide((6, 7)).astype(jnp.bfloat16)).all()


def test_bad_grids():
    with pytest.raises(ValueError, match="grid=0"):
        PositionGrid((0, 4), 5, key=jr.key(0))
    with pytest.raises(ValueError, match="d_model=0"):
        PositionGrid((2, 4), 0, key=jr.key(0))
    with pytest.raises(ValueError, match="size=3 and new_size=0 must be at least 1"):
        bicubic_matrix(3, 0)
    with pytest.raises(ValueError, match="num_prefix=-1"):
        PositionGrid((2, 4), 5, num_prefix=-1, key=jr.key(0))
