"""The diffusion transformer: every field, conditioning, derivatives; blocks with a condition."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.models import DiT, DiTConfig
from eqx_transformer.nn import MLP, Attention, AxialRoPE, LayerNorm, Modulation, modulate
from eqx_transformer.stacks import Condition, ParallelBlock, Residual, Stack, TransformerBlock

TINY = DiTConfig(
    image_size=4,
    patch_size=2,
    num_channels=1,
    num_classes=3,
    class_dropout_rate=0.0,
    d_model=16,
    num_layers=2,
    num_heads=2,
    d_ff=12,
)
IMAGE, TIME, LABEL = jr.normal(jr.key(5), (1, 4, 4)), jnp.asarray(0.3), jnp.asarray(1)


def build(config):
    """A model in which nothing is zero any more, so that everything takes part."""
    model = DiT(config, key=jr.key(0))
    leaves, structure = jax.tree.flatten(model)
    rng = np.random.default_rng(1)

    def moved(x):
        if not eqx.is_inexact_array(x):
            return x
        return x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)

    return jax.tree.unflatten(structure, [moved(x) for x in leaves])


@eqx.filter_jit
def run(model, image, time, label, key=None):
    return model(image, time, label, key=key)


@functools.cache
def program(config):
    model = eqx.filter_eval_shape(DiT, config, key=jr.key(0))
    image = jnp.ones((config.num_channels, 4, 4))
    label = None if config.num_classes is None else LABEL
    jaxpr, _, _ = eqx.filter_make_jaxpr(lambda model: model(image, TIME, label))(model)
    return str(jaxpr)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


CHANGES = {
    "image_size": 8,
    "patch_size": 1,
    "num_channels": 2,
    "out_channels": 2,
    "num_classes": None,
    "time_scale": 10.0,
    "d_model": 24,
    "num_layers": 3,
    "num_heads": 4,
    "d_ff": None,
    "positions": "rope",
    "qk_norm": True,
    "norm_eps": 0.5,
    "attention_implementation": "chunked",
    "unroll": 2,
}
ELSEWHERE = {
    "class_dropout_rate": "test_classes_are_dropped",
    "dropout_rate": "test_dropout",
    "rope_theta": "test_rope_theta",
    "remat": "test_remat_changes_what_is_kept",
}


@pytest.mark.parametrize("field", CHANGES)
def test_field_changes_the_program(field):
    if field == "image_size":
        # It says what images are for, and any size that patches divide is computed.
        assert TINY.replace(image_size=8) != TINY
        assert run(build(TINY), jnp.ones((1, 6, 2)), TIME, LABEL).shape == (1, 6, 2)
        return
    assert program(TINY.replace(**{field: CHANGES[field]})) != program(TINY)


def test_no_field_is_forgotten():
    known = CHANGES.keys() | ELSEWHERE.keys()
    assert known == {field.name for field in dataclasses.fields(DiTConfig)}
    assert set(ELSEWHERE.values()) <= set(globals())


def test_configurations_that_make_no_sense():
    for changes, message in (
        ({"image_size": 5}, "image_size=5 is not a multiple of patch_size=2"),
        ({"d_model": 18}, "must be a multiple of 4"),
        ({"positions": "rope", "num_heads": 8}, "head_dim=2 must be even and at least 4"),
        ({"num_heads": 3}, "not a multiple of num_heads=3"),
        ({"time_scale": 0.0}, "time_scale=0.0"),
        ({"class_dropout_rate": 1.0}, "class_dropout_rate=1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            TINY.replace(**changes)


def test_it_begins_with_zero_and_blocks_with_the_identity(getkey):
    model = DiT(TINY, key=getkey())
    assert (model(IMAGE, TIME, LABEL) == 0).all()
    x, vector = jr.normal(getkey(), (4, 16)), jr.normal(getkey(), (16,))
    close(model.stack(x, context=Condition(vector=vector)), x)


def test_what_it_depends_on():
    model = build(TINY.replace(out_channels=2))
    out = run(model, IMAGE, TIME, LABEL)
    assert out.shape == (2, 4, 4)
    for other in (
        run(model, IMAGE + 0.1, TIME, LABEL),
        run(model, IMAGE, TIME + 0.1, LABEL),
        run(model, IMAGE, TIME, LABEL + 1),
        run(model, IMAGE, TIME, None),
    ):
        assert float(jnp.abs(other - out).max()) > 1e-4
    # A class that does not exist cannot be mistaken for one, nor for none.
    assert jnp.isnan(run(model, IMAGE, TIME, jnp.asarray(3))).all()
    with pytest.raises(ValueError, match="num_classes=None"):
        build(TINY.replace(num_classes=None))(IMAGE, TIME, LABEL)
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        model(IMAGE[None], TIME, LABEL)


def test_classes_are_dropped():
    model = build(TINY.replace(class_dropout_rate=0.4))
    with pytest.raises(RuntimeError, match=r"class_dropout_rate=0\.4 needs a key"):
        model(IMAGE, TIME, LABEL)
    keys = jr.split(jr.key(0), 400)
    outs = jax.jit(jax.vmap(lambda key: model(IMAGE, TIME, LABEL, key=key)))(keys)
    calm = eqx.nn.inference_mode(model)
    told, untold = (run(calm, IMAGE, TIME, label) for label in (LABEL, None))
    dropped = jnp.abs(outs - untold[None]).max(axis=(1, 2, 3)) < 1e-4
    kept = jnp.abs(outs - told[None]).max(axis=(1, 2, 3)) < 1e-4
    assert (dropped != kept).all() and abs(float(dropped.mean()) - 0.4) < 0.1


def test_dropout():
    model = build(TINY.replace(dropout_rate=0.4))
    a, b = (run(model, IMAGE, TIME, LABEL, jr.key(i)) for i in (1, 2))
    assert not jnp.allclose(a, b)
    close(
        run(eqx.nn.inference_mode(model), IMAGE, TIME, LABEL), run(build(TINY), IMAGE, TIME, LABEL)
    )


def test_rope_theta():
    config = TINY.replace(positions="rope")
    outs = [run(build(c), IMAGE, TIME, LABEL) for c in (config, config.replace(rope_theta=5.0))]
    assert not jnp.allclose(*outs, atol=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_what_is_kept(remat):
    def gradient(config):
        model = DiT(config, key=jr.key(0))
        loss = eqx.filter_grad(lambda model: (model(IMAGE, TIME, LABEL) ** 3).sum())
        return str(eqx.filter_make_jaxpr(loss)(model)[0])

    assert "remat" in gradient(TINY.replace(remat=remat)) and "remat" not in gradient(TINY)


def test_every_parameter_is_trained():
    model = build(TINY)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model):
        return sum((model(IMAGE, TIME, label) ** 3).sum() for label in (LABEL, None))

    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient(model))[0]:
        assert (leaf != 0).any(), jax.tree_util.keystr(path)


def test_derivatives_with_respect_to_image_and_time(x64):
    model, cotangent = build(TINY.replace(positions="rope")), jr.normal(jr.key(3), (1, 4, 4))
    image, direction = (jr.normal(jr.key(i), (1, 4, 4)) for i in (7, 8))
    at, along = (image, jnp.asarray(0.3)), (direction, jnp.asarray(0.7))

    def loss(image, time):
        return jnp.vdot(model(image, time, LABEL), cotangent)

    @jax.jit
    def everything(*at):
        return jax.jvp(loss, at, along), jax.jvp(jax.grad(loss, argnums=(0, 1)), at, along)

    (_, slope), (gradient, hvp) = everything(*at)
    dot = sum(jnp.vdot(a, b) for a, b in zip(gradient, along, strict=True))
    np.testing.assert_allclose(dot, slope, rtol=1e-9)
    step = 1e-5
    ahead, behind = (
        everything(*(x + s * d for x, d in zip(at, along, strict=True))) for s in (step, -step)
    )
    np.testing.assert_allclose(slope, (ahead[0][0] - behind[0][0]) / (2 * step), rtol=1e-6)
    for got, a, b in zip(hvp, ahead[1][0], behind[1][0], strict=True):
        np.testing.assert_allclose(got, (a - b) / (2 * step), rtol=1e-5, atol=1e-6)


# --- Blocks with a condition ----------------------------------------------------------------------


def _block(key, rope=None, mask=None):
    keys = jr.split(key, 3)
    modulation = Modulation(3, 8, 6, key=keys[2])
    weight = jr.normal(keys[2], modulation.proj.weight.shape)
    modulation = eqx.tree_at(lambda m: m.proj.weight, modulation, weight)
    attention = Attention(8, 2, rope=rope, mask=mask, key=keys[0])
    residuals = (Residual(LayerNorm(8)) for _ in range(2))
    return TransformerBlock(attention, MLP(8, 12, key=keys[1]), *residuals, modulation)


def test_a_block_is_modulated(x64, getkey):
    block, x, vector = _block(getkey()), jr.normal(getkey(), (5, 8)), jr.normal(getkey(), (3,))
    shift, scale, gate, shift2, scale2, gate2 = block.modulation(vector)
    norm = block.attention_residual.norm
    h = x + gate[None] * block.attention(modulate(norm(x), shift, scale))
    expected = h + gate2[None] * block.mlp(modulate(norm(h), shift2, scale2))
    close(block(x, context=Condition(vector=vector)), expected, 1e-12)


def test_a_condition_in_a_stack_with_a_cache(x64, getkey):
    from eqx_transformer.attention import Causal

    stack = Stack(lambda *, key: _block(key, AxialRoPE(2), Causal()), 2, key=getkey())
    x, vector, places = (jr.normal(getkey(), shape) for shape in ((5, 8), (3,), (5, 2)))
    whole = stack(x, context=Condition(places, vector))
    cache, outs = stack.init_cache(5), []
    for i in (slice(0, 3), slice(3, 5)):
        out, cache = stack.extend(x[i], cache, context=Condition(places[i], vector))
        outs.append(out)
    close(jnp.concatenate(outs), whole, 1e-10)


def test_conditions_that_nobody_asked_for(getkey):
    block, x = _block(getkey()), jnp.ones((5, 8))
    plain = eqx.tree_at(lambda b: b.modulation, block, None)
    parallel = ParallelBlock(block.attention, block.mlp, Residual(LayerNorm(8)))
    vector = Condition(vector=jnp.ones(3))
    for b in (plain, parallel):
        with pytest.raises(ValueError, match="has a vector, but the block has no modulation"):
            b(x, context=vector)
        with pytest.raises(ValueError, match=r"no use for the context .* a str"):
            b(x, context="what")
        with pytest.raises(ValueError, match="no use for the context"):
            b.init_cache(4, context="what")
    with pytest.raises(ValueError, match=r"context=Condition\(vector=...\)"):
        block(x)
    with pytest.raises(ValueError, match="no AxialRoPE"):
        plain(x, context=Condition(coordinates=jnp.ones((5, 2))))
    with pytest.raises(ValueError, match="num_vectors=2 but must have 6"):
        residuals = block.attention_residual, block.mlp_residual
        modulation = Modulation(3, 8, 2, key=getkey())
        TransformerBlock(block.attention, block.mlp, *residuals, modulation)
