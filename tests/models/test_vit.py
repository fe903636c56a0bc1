"""The vision transformer: every field, what it returns, derivatives with respect to the image."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.models import ImageTokens, VisionTransformer, ViTConfig

TINY = ViTConfig(
    image_size=(8, 12),
    patch_size=4,
    num_channels=2,
    num_classes=3,
    d_model=16,
    num_layers=2,
    num_heads=2,
    d_ff=12,
)
IMAGE = jr.normal(jr.key(5), (2, 8, 12))


def build(config):
    """A model in which nothing is zero or one any more, so that everything takes part."""
    model = VisionTransformer(config, key=jr.key(0))
    leaves, structure = jax.tree.flatten(model)
    rng = np.random.default_rng(1)

    def moved(x):
        if not eqx.is_inexact_array(x):
            return x
        return x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)

    return jax.tree.unflatten(structure, [moved(x) for x in leaves])


@eqx.filter_jit
def _compiled(model, image):
    return model(image)


@functools.cache
def run(config):
    return _compiled(build(config), IMAGE)


@functools.cache
def program(config):
    """What a model computes, and from which parameters; nothing is built or run."""
    model = eqx.filter_eval_shape(VisionTransformer, config, key=jr.key(0))
    image = jnp.ones((config.num_channels, *config.image_shape))
    jaxpr, _, _ = eqx.filter_make_jaxpr(lambda model: model(image))(model)
    return str(jaxpr)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# --- Every field changes what is built or computed ------------------------------------------------

CHANGES = [
    ("image_size", (8, 8), {}),
    ("image_size", 8, {}),
    ("patch_size", (2, 4), {}),
    ("patch_size", 2, {}),
    ("num_channels", 1, {}),
    ("num_classes", 4, {}),
    ("num_classes", None, {}),
    ("d_model", 24, {}),
    ("num_layers", 3, {}),
    ("num_heads", 4, {}),
    ("num_kv_heads", 1, {}),
    ("head_dim", 6, {}),
    ("d_ff", None, {}),
    ("d_ff", None, {"activation": "swiglu"}),
    ("class_token", False, {"pooling": "mean"}),
    ("distillation_token", True, {}),
    ("num_registers", 2, {}),
    ("pooling", "mean", {}),
    ("pooling", "attention", {}),
    ("positions", "sinusoidal", {}),
    ("positions", "rope", {}),
    ("positions", "none", {}),
    ("relative_bias", True, {}),
    ("share_relative_bias", True, {"relative_bias": True}),
    ("window", 1, {}),
    ("layout", "post", {}),
    ("layout", "sandwich", {}),
    ("layout", "parallel", {}),
    ("layout", "parallel", {"positions": "rope"}),
    ("norm", "rms", {}),
    ("norm", "dynamic_tanh", {}),
    ("norm_eps", 0.5, {}),
    ("embedding_norm", True, {}),
    ("final_norm", "pooled", {"pooling": "mean"}),
    ("final_norm", "none", {}),
    ("pooler", True, {}),
    ("use_bias", False, {}),
    ("qkv_bias", False, {}),
    ("k_bias", False, {}),
    ("patch_bias", False, {}),
    ("qk_norm", True, {}),
    ("layer_scale", 0.5, {}),
    ("attention_implementation", "chunked", {}),
    ("attention_block_size", 3, {"attention_implementation": "chunked"}),
    ("unroll", 2, {}),
    *[("activation", name, {}) for name in ("gelu_tanh", "quick_gelu", "relu", "relu_squared")],
    *[("activation", name, {}) for name in ("silu", "swiglu", "geglu", "geglu_tanh")],
    *[("activation", name, {}) for name in ("quick_geglu", "reglu")],
]
ELSEWHERE = {
    "interpolation": "test_other_resolutions",
    "rope_theta": "test_rope_theta",
    "dropout_rate": "test_dropout",
    "drop_path_rate": "test_drop_path",
    "remat": "test_remat_changes_what_is_kept",
}
SAME_RESULT = {"attention_implementation", "attention_block_size", "unroll"}


@pytest.mark.parametrize(("field", "value", "rest"), CHANGES, ids=lambda x: str(x))
def test_field_changes_the_program(field, value, rest):
    plain = TINY.replace(**rest)
    assert program(plain.replace(**{field: value})) != program(plain)


@pytest.mark.slow
@pytest.mark.parametrize(("field", "value", "rest"), CHANGES, ids=lambda x: str(x))
def test_field_changes_the_result(field, value, rest):
    plain = TINY.replace(**rest)
    config = plain.replace(**{field: value})
    if field == "num_channels":
        with pytest.raises(ValueError, match="2 channels, but num_channels=1"):
            run(config)
        return
    changed, before = run(config), run(plain)
    assert jnp.isfinite(changed).all()
    same = changed.shape == before.shape and bool(jnp.allclose(changed, before, atol=1e-5))
    assert same == (field in SAME_RESULT)


def test_no_field_is_forgotten():
    known = {field for field, _, _ in CHANGES} | ELSEWHERE.keys()
    assert known == {field.name for field in dataclasses.fields(ViTConfig)}
    assert set(ELSEWHERE.values()) <= set(globals())


def test_every_documented_value_is_tried():
    tried = {(field, value) for field, value, _ in CHANGES}
    for field in dataclasses.fields(ViTConfig):
        if field.name in SAME_RESULT or field.name in ELSEWHERE:
            continue
        for value in getattr(field.type, "__args__", ()):
            if isinstance(value, str):
                assert (field.name, value) in tried or value == getattr(TINY, field.name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (8, 10)}, r"image_size=\(8, 10\) is not a multiple of patch_size=4; 12"),
        ({"image_size": (8, 8, 8)}, "must be int or a tuple of 2 int"),
        ({"patch_size": 0}, "patch_size=0 must be"),
        ({"num_heads": 3}, "d_model=16 is not a multiple of num_heads=3"),
        ({"num_kv_heads": 3}, "num_heads=2 is not a multiple of num_kv_heads=3"),
        ({"num_registers": -1}, "num_registers=-1"),
        ({"positions": "sinusoidal", "d_model": 18}, "must be a multiple of 4"),
        ({"positions": "rope", "head_dim": 2}, "head_dim=2 must be even and at least 4"),
        ({"class_token": False}, "pooling='first' takes the class token"),
        ({"distillation_token": True, "pooling": "mean"}, "class token that is pooled"),
        ({"share_relative_bias": True}, "needs relative_bias=True"),
        ({"distillation_token": True, "pooler": True, "num_classes": 5}, "leave out pooler"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0 must be at least 0 and below 1"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be positive"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"pooling": "cls"}, "'first' or 'mean' or 'attention'"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**changes)


def test_configuration_round_trip_and_sizes():
    assert ViTConfig.from_json(TINY.to_json()) == TINY
    assert (TINY.grid, TINY.num_prefix) == ((2, 3), 1)
    assert ViTConfig().inner_size == 3072
    # DINOv2 giant: 1536 wide, 4096 inside.
    assert ViTConfig(d_model=1536, num_heads=24, activation="swiglu").inner_size == 4096


# --- Meaning --------------------------------------------------------------------------------------


def test_batches_are_vmap():
    model, images = build(TINY), jr.normal(jr.key(3), (4, 2, 8, 12))
    batch = eqx.filter_jit(lambda model: jax.vmap(model)(images))(model)
    close(batch, jnp.stack([_compiled(model, image) for image in images]))


def test_images_that_do_not_fit():
    model = VisionTransformer(TINY, key=jr.key(0))
    with pytest.raises(ValueError, match="channels come first"):
        model(jnp.ones((8, 12, 2)))
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        model(jnp.ones((5, 2, 8, 12)))
    with pytest.raises(ValueError, match="height 9 has no whole number of patches"):
        model(jnp.ones((2, 9, 12)))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "none"])
def test_other_resolutions(positions):
    image = jr.normal(jr.key(2), (2, 16, 8))
    config = TINY.replace(positions=positions, num_registers=1)
    model = build(config)
    tokens = eqx.filter_jit(model.encode)(image)
    assert tokens.patches.shape == (8, 16) and tokens.prefix.shape == (2, 16)
    other = config.replace(interpolation="bicubic_antialias")
    changed = eqx.filter_jit(build(other).encode)(image)
    assert (positions == "learned") != bool(jnp.allclose(changed.patches, tokens.patches))
    close(run(other), run(config))


@pytest.mark.parametrize("shared", [False, True])
def test_a_relative_bias_is_resized_for_other_resolutions(shared):
    image = jr.normal(jr.key(2), (2, 16, 8))
    model = build(TINY.replace(positions="none", relative_bias=True, share_relative_bias=shared))

    def biases(model):
        return model.stack.score_mod if shared else model.stack.blocks.attention.score_mod

    def resized(bias):
        return bias.resized((4, 2))

    # The same parameters in a model that is built for the other resolution.
    changed = eqx.tree_at(biases, model, replace_fn=resized if shared else eqx.filter_vmap(resized))
    other = VisionTransformer(model.config.replace(image_size=(16, 8)), key=jr.key(0))
    other = jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(changed))
    found, wanted = (eqx.filter_jit(m.encode)(image).all for m in (model, other))
    close(found, wanted)


def test_rope_theta():
    config = TINY.replace(positions="rope")
    assert not jnp.allclose(run(config), run(config.replace(rope_theta=7.0)), atol=1e-5)


def test_without_positions_patches_may_come_in_any_order():
    model = build(TINY.replace(positions="none"))
    flipped = jnp.flip(IMAGE.reshape(2, 2, 4, 12), axis=1).reshape(IMAGE.shape)  # rows of patches
    close(model(IMAGE), model(flipped))
    for positions in ("learned", "sinusoidal", "rope"):
        model = build(TINY.replace(positions=positions))
        assert not jnp.allclose(model(IMAGE), model(flipped), atol=1e-4)


def test_tokens_are_in_order():
    model = build(TINY.replace(num_registers=2, distillation_token=True, final_norm="none"))
    first = model.hidden_states(IMAGE)[0]
    positions = model.positions.weight
    close(first[0], model.class_token + positions[0])
    close(first[1], model.distillation_token + positions[1])
    close(first[2:4], model.registers)
    close(first[4:], model.patch_embedding(IMAGE) + positions[2:])


def test_pooling():
    model = build(TINY.replace(num_registers=1))
    tokens = model.encode(IMAGE)
    close(model.pool(tokens), tokens.prefix[0])
    close(model(IMAGE), model.head(tokens.prefix[0]))
    close(tokens.all, jnp.concatenate([tokens.prefix, tokens.patches]))
    # The mean is that of the patches alone.
    model = build(TINY.replace(pooling="mean"))
    close(model.pool(model.encode(IMAGE)), model.encode(IMAGE).patches.mean(axis=0))
    model = build(TINY.replace(pooling="mean", final_norm="pooled", pooler=True))
    tokens = model.encode(IMAGE)
    expected = jnp.tanh(model.pooler(model.norm(tokens.patches.mean(axis=0))))
    close(model.pool(tokens), expected)
    close(build(TINY.replace(num_classes=None))(IMAGE).shape, (16,))


def test_two_heads_are_averaged():
    model = build(TINY.replace(distillation_token=True))
    tokens = model.encode(IMAGE)
    heads = model.head(tokens.prefix[0]), model.distillation_head(tokens.prefix[1])
    close(model(IMAGE), (heads[0] + heads[1]) / 2)


# --- Some patches only ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "rope"},
        {"positions": "sinusoidal"},
        {"relative_bias": True},
        {"window": 1},
    ],
    ids=str,
)
def test_dropped_patches_are_as_if_nobody_attended_to_them(changes):
    """The class token of a model of one block: what the others are does not matter then."""
    model = build(TINY.replace(num_layers=1, **changes))
    kept = jnp.asarray([1, 2, 5])
    got = eqx.filter_jit(model.encode)(IMAGE, keep=kept)
    assert got.patches.shape == (3, 16) and (got.kept == kept).all()
    poisoned = _without(model, IMAGE, kept)
    close(got.all, poisoned, 2e-5)


def _without(model, image, kept):
    """The same by masking: all patches are there, but nobody sees those that are not kept."""
    from eqx_transformer.attention import Padding

    start = model._embed(image, None, None, None)
    num_prefix = model.config.num_prefix
    rows = jnp.concatenate([jnp.arange(num_prefix), num_prefix + kept])
    valid = Padding(jnp.zeros(len(start.x), bool).at[rows].set(True))
    mask = start.options["mask"]
    options = start.options | {"mask": valid if mask is None else valid & mask}
    return model.norm(model.stack(start.x, **options))[rows]


def test_random_patches():
    model = build(TINY)
    encode = eqx.filter_jit(lambda model, key: model.encode(IMAGE, keep=3, key=key))
    tokens = [encode(model, jr.key(i)) for i in range(20)]
    kept = np.stack([x.kept for x in tokens])
    assert kept.shape == (20, 3) and (np.diff(kept, axis=1) > 0).all()
    assert len({tuple(row) for row in kept.tolist()}) > 5 and set(kept.ravel().tolist()) == {
        *range(6)
    }
    close(tokens[0].all, model.encode(IMAGE, keep=tokens[0].kept).all)
    assert isinstance(tokens[0], ImageTokens) and model.encode(IMAGE).kept is None
    with pytest.raises(ValueError, match=r"keep=7 must be .* 6"):
        model.encode(IMAGE, keep=7, key=jr.key(0))
    with pytest.raises(RuntimeError, match="needs a key"):
        model.encode(IMAGE, keep=3)


# --- Looking inside -------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"positions": "rope", "num_registers": 1}], ids=str)
def test_hidden_states_and_attention_maps(changes):
    model = build(TINY.replace(**changes))
    states = eqx.filter_jit(model.hidden_states)(IMAGE)
    assert states.shape == (3, 6 + model.config.num_prefix, 16)
    close(model.norm(states[-1]), model.encode(IMAGE).all)
    start = model._embed(IMAGE, None, None, None)
    context = start.options["context"]
    close(model.stack[0](states[0], context=context), states[1])

    maps = eqx.filter_jit(model.attention_maps)(IMAGE)
    assert maps.shape == (2, 2, states.shape[1], states.shape[1])
    close(maps.sum(axis=-1), jnp.ones(maps.shape[:3]))
    # With these weights and the values, attention is what the block computes.
    block = model.stack[1]
    h = block.attention_residual.norm(states[1])
    values = block.attention.v_proj(h).reshape(len(h), 2, 8)
    mixed = jnp.einsum("hqk,khd->qhd", maps[1], values).reshape(len(h), 16)
    where = {} if context is None else {"coordinates": context.coordinates}
    close(block.attention.o_proj(mixed), block.attention(h, **where))


def test_windows_are_seen_in_the_maps():
    maps = build(TINY.replace(window=1)).attention_maps(IMAGE)[0, 0]
    assert (np.diag(maps[1:, 1:]) > 0).all()
    close(maps[1:, 1:], np.diag(np.diag(maps[1:, 1:])))
    assert (maps[0] > 0).all() and (maps[:, 0] > 0).all()


# --- Training and derivatives ---------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["first", "attention"])
def test_dropout(pooling):
    model = build(TINY.replace(dropout_rate=0.4, pooling=pooling))
    with pytest.raises(RuntimeError):
        model(IMAGE)
    compiled = eqx.filter_jit(lambda model, key: model(IMAGE, key=key))
    a, b, again = (compiled(model, jr.key(i)) for i in (1, 2, 1))
    assert not jnp.allclose(a, b)
    close(a, again)
    close(_compiled(eqx.nn.inference_mode(model), IMAGE), run(TINY.replace(pooling=pooling)))


def test_drop_path():
    model = VisionTransformer(TINY.replace(drop_path_rate=0.6, num_layers=3), key=jr.key(0))
    residuals = model.stack.blocks.attention_residual, model.stack.blocks.mlp_residual
    for residual in residuals:
        close(residual.drop_path.rate, jnp.asarray([0.0, 0.3, 0.6]))
    # One buffer in two leaves could not be donated.
    thresholds = [r.drop_path.threshold.unsafe_buffer_pointer() for r in residuals]
    assert len(set(thresholds)) == 2
    with pytest.raises(RuntimeError, match="DropPath"):
        model(IMAGE)


def test_remat_changes_what_is_kept():
    def gradient(config):
        model = VisionTransformer(config, key=jr.key(0))
        loss = eqx.filter_grad(lambda model: (model(IMAGE) ** 3).sum())
        return str(eqx.filter_make_jaxpr(loss)(model)[0])

    assert "remat" not in gradient(TINY)
    for remat in ("full", "dots"):
        assert "remat" in gradient(TINY.replace(remat=remat))


def test_every_parameter_is_trained():
    config = TINY.replace(
        num_registers=2,
        distillation_token=True,
        qk_norm=True,
        layer_scale=0.5,
        relative_bias=True,
        embedding_norm=True,
    )
    model = build(config)
    loss = eqx.filter_jit(eqx.filter_grad(lambda model: (model(IMAGE) ** 3).sum()))
    for path, leaf in jax.tree_util.tree_flatten_with_path(loss(model))[0]:
        if "k_proj.bias" not in jax.tree_util.keystr(path):  # a norm is after it, but no matter
            assert (leaf != 0).any(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "rope", "num_registers": 1, "activation": "swiglu", "pooling": "attention"},
        {"relative_bias": True, "window": 2, "pooling": "mean", "attention_block_size": 4},
    ],
    ids=["learned", "rope", "bias and window"],
)
def test_derivatives_with_respect_to_the_image(x64, changes):
    if "attention_block_size" in changes:
        changes = changes | {"attention_implementation": "chunked"}
    model = build(TINY.replace(**changes))
    image, direction = (jr.normal(jr.key(i), IMAGE.shape) for i in (7, 8))
    cotangent = jr.normal(jr.key(9), (3,))

    def loss(image):
        return jnp.vdot(model(image), cotangent)

    @jax.jit
    def everything(image):
        value, slope = jax.jvp(loss, (image,), (direction,))
        gradient, hvp = jax.jvp(jax.grad(loss), (image,), (direction,))
        return value, slope, gradient, hvp

    value, slope, gradient, hvp = everything(image)
    assert value.dtype == hvp.dtype == jnp.float64
    np.testing.assert_allclose(jnp.vdot(gradient, direction), slope, rtol=1e-9)
    step = 1e-5
    ahead, behind = (everything(image + s * direction) for s in (step, -step))
    np.testing.assert_allclose(slope, (ahead[0] - behind[0]) / (2 * step), rtol=1e-6)
    bend = (ahead[2] - behind[2]) / (2 * step)
    np.testing.assert_allclose(hvp, bend, rtol=1e-5, atol=1e-7 * float(jnp.abs(bend).max()))


def test_low_precision():
    model = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, build(TINY)
    )
    out = _compiled(model, IMAGE.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    close(out.astype(jnp.float32), run(TINY), 0.1)
