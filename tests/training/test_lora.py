"""LoRA and DoRA: a function that does not change, adapters that alone are trained, merging."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.interop import load_pytree, save_pytree
from eqx_transformer.models import (
    EncoderDecoder,
    Llama,
    LlamaConfig,
    MLAConfig,
    MoEConfig,
    TransformerConfig,
    VisionTransformer,
    ViTConfig,
)
from eqx_transformer.nn import MLP, Linear, MixtureOfExperts
from eqx_transformer.stacks import unstacked
from eqx_transformer.training import LoRALinear, add_lora, lora_filter, merge_lora

TOKENS = jnp.asarray([3, 1, 4, 1, 5])
CONFIG = LlamaConfig(
    vocab_size=11, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=24, use_bias=True
)


def is_lora(x):
    return isinstance(x, LoRALinear)


def adapters(model):
    return [x for x in jax.tree.leaves(model, is_leaf=is_lora) if is_lora(x)]


def moved(model, key):
    """With random numbers in place of all that adapters have."""
    chosen, rest = eqx.partition(model, lora_filter(model))
    leaves, structure = jax.tree.flatten(chosen)
    keys = jr.split(key, len(leaves))
    new = [x + 0.3 * jr.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return eqx.combine(jax.tree.unflatten(structure, new), rest)


def linear(key, dtype=jnp.float32):
    bias_key, key = jr.split(key)
    layer = Linear(6, 5, use_bias=True, dtype=dtype, key=key)
    return eqx.tree_at(lambda x: x.bias, layer, jr.normal(bias_key, (5,), dtype))


@pytest.mark.parametrize("dora", [False, True])
def test_it_computes_what_its_weight_says(getkey, x64, dora):
    layer = LoRALinear(linear(getkey(), jnp.float64), 2, alpha=3, dora=dora, key=getkey())
    assert layer.scale == 1.5 and layer.a.dtype == layer.b.dtype == jnp.float64
    b = jr.normal(getkey(), layer.b.shape, jnp.float64)
    layer = eqx.tree_at(lambda x: x.b, layer, b)
    base, a = np.asarray(layer.base.weight), np.asarray(layer.a)
    expected = base + 1.5 * a @ np.asarray(b)
    if dora:
        lengths = np.linalg.norm(base, axis=0) * np.arange(1.0, 6.0)
        layer = eqx.tree_at(lambda x: x.magnitude, layer, jnp.asarray(lengths))
        expected = expected / np.linalg.norm(expected, axis=0) * lengths
    np.testing.assert_allclose(layer.weight, expected, rtol=1e-12)
    x = jr.normal(getkey(), (3, 6), jnp.float64)
    np.testing.assert_allclose(layer(x), x @ expected + layer.bias[None], rtol=1e-12)
    np.testing.assert_allclose(merge_lora(layer)(x), layer(x), rtol=1e-12)


@pytest.mark.parametrize("dora", [False, True])
def test_derivatives(getkey, x64, dora):
    """Forward mode, and reverse mode with its second derivative, against the merged weight."""
    layer = LoRALinear(linear(getkey(), jnp.float64), 2, alpha=4, dora=dora, key=getkey())
    layer = moved(layer, getkey())
    x, cotangent = (jr.normal(getkey(), shape, jnp.float64) for shape in ((3, 6), (3, 5)))
    params, static = eqx.partition((layer, x), eqx.is_inexact_array)
    tangents = jax.tree.map(lambda p: jr.normal(getkey(), p.shape, p.dtype), params)

    def adapted(params):
        layer, x = eqx.combine(params, static)
        return jnp.vdot(cotangent, jnp.sin(layer(x)))

    def written_out(params):
        layer, x = eqx.combine(params, static)
        weight = layer.base.weight + layer.scale * layer.a @ layer.b
        if dora:
            weight = weight / jnp.linalg.norm(weight, axis=0)[None] * layer.magnitude[None]
        return jnp.vdot(cotangent, jnp.sin(x @ weight + layer.bias[None]))

    def derivatives(f):
        def slope(params):
            return jax.jvp(f, (params,), (tangents,))[1]

        return slope(params), jax.grad(f)(params), jax.grad(slope)(params)

    got, expected = jax.jit(derivatives, static_argnums=0), derivatives(written_out)
    for a, b in zip(jax.tree.leaves(got(adapted)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_zero_column_has_finite_derivatives(getkey):
    base = Linear(4, 3, init=jax.nn.initializers.zeros, key=getkey())
    layer = LoRALinear(base, 2, alpha=1, dora=True, key=getkey())
    f = eqx.filter_jit(eqx.filter_value_and_grad(lambda m: m(jnp.ones((2, 4))).sum()))
    value, gradient = f(layer)
    assert value == 0
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_a_narrow_base_can_have_wide_adapters(getkey):
    layer = LoRALinear(linear(getkey(), jnp.bfloat16), 2, alpha=1, dtype=jnp.float32, key=getkey())
    assert layer.a.dtype == layer.b.dtype == jnp.float32
    assert layer.weight.dtype == layer(jnp.ones((2, 6), jnp.bfloat16)).dtype == jnp.bfloat16


def test_an_adapter_begins_as_nothing(getkey):
    base = linear(getkey())
    x = jr.normal(getkey(), (3, 6))
    layer = LoRALinear(base, 2, alpha=3, key=getkey())
    np.testing.assert_array_equal(layer(x), base(x))
    np.testing.assert_array_equal(layer.weight, base.weight)
    layer = LoRALinear(base, 2, alpha=3, dora=True, key=getkey())
    np.testing.assert_allclose(layer(x), base(x), rtol=2e-6, atol=1e-6)


def experts(key):
    config = CONFIG.replace(moe=MoEConfig(num_experts=3, num_shared_experts=1))
    return Llama(config, key=key), lambda m: m(TOKENS)


def latent(key):
    mla = MLAConfig(kv_rank=8, nope_head_dim=8, rope_head_dim=4, v_head_dim=8, q_rank=8)
    config = CONFIG.replace(mla=mla, num_kv_heads=None)

    def call(model):  # where decoding uses the weight of kv_up_proj itself
        logits, cache = model.extend(TOKENS[:4], model.init_cache(8))
        return jnp.concatenate([logits, model.extend(TOKENS[4:], cache)[0]])

    return Llama(config, key=key), call


def encoder_decoder(key):
    config = TransformerConfig(vocab_size=11, d_model=16, num_layers=2, num_heads=2, d_ff=24)
    model = EncoderDecoder(config.replace(dropout_rate=0.0), key=key)
    return model, lambda m: m(TOKENS, TOKENS[:3])


def vit(key):
    config = ViTConfig(
        image_size=8, patch_size=4, d_model=16, num_layers=2, num_heads=2, d_ff=24, num_classes=3
    )
    return VisionTransformer(config, key=key), lambda m: m(jnp.ones((3, 8, 8)))


def check_model(model, call, getkey):
    """Adding changes nothing, training does, and merging nothing again."""
    call = eqx.filter_jit(call)
    adapted = eqx.filter_jit(add_lora)(model, 2, alpha=4, key=getkey())
    before = call(model)
    # XLA fuses another program in another way.
    np.testing.assert_allclose(call(adapted), before, rtol=1e-5, atol=1e-6)
    trained = eqx.filter_jit(moved)(adapted, getkey())
    after = call(trained)
    assert float(jnp.abs(after - before).max()) > 0.01
    merged = merge_lora(trained)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    np.testing.assert_allclose(call(merged), after, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def model():
    return Llama(CONFIG, key=jr.key(0))


def test_a_model_stays_the_same_function(getkey, model):
    check_model(model, lambda m: m(TOKENS), getkey)


@pytest.mark.slow
@pytest.mark.parametrize("make", [experts, latent, encoder_decoder, vit])
def test_every_kind_of_model_stays_the_same_function(getkey, make):
    model, call = make(getkey())
    check_model(model, call, getkey)


def test_all_projections_of_the_blocks_get_one(getkey):
    def make(key):
        return add_lora(experts(key)[0], 2, alpha=4, key=key)

    model = eqx.filter_eval_shape(make, getkey())
    assert isinstance(model.head, Linear) and isinstance(model.stack.blocks.mlp.router, Linear)
    found = adapters(model)
    assert len(found) == 4 + 3 + 3
    assert {x.a.shape[:-2] for x in found} == {(2,), (2, 3)}  # layers, and experts of layers


@pytest.mark.slow
def test_experts_have_their_own(getkey):
    moe = MixtureOfExperts(8, 3, eqx.Partial(MLP, 8, 12), key=getkey())
    adapted = add_lora(moe, 2, alpha=4, key=getkey())
    a = jnp.concatenate([x.a[:, :8] for x in adapters(adapted)])
    assert len(jnp.unique(a[:, :, 0], axis=0)) == 6  # no two begin alike
    adapted, x = moved(adapted, getkey()), jr.normal(getkey(), (5, 8))
    merged = merge_lora(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(moe)
    np.testing.assert_allclose(adapted(x), merged(x), rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(adapted(x) - moe(x)).max()) > 0.01


def test_where_sees_paths(getkey, model):
    adapted = add_lora(
        model, 2, alpha=4, where=lambda path: path.endswith(("q_proj", "head")), key=getkey()
    )
    assert len(adapters(adapted)) == 2 and isinstance(adapted.head, LoRALinear)
    assert isinstance(adapted.stack.blocks.attention.q_proj, LoRALinear)
    assert adapted.stack.blocks.attention.q_proj.base.weight is (
        model.stack.blocks.attention.q_proj.weight
    )  # not copied


def test_only_adapters_are_trained_and_saved(getkey, tmp_path, model):
    adapted = add_lora(
        model, 2, alpha=4, where=lambda path: "q_proj" in path, dora=True, key=getkey()
    )
    chosen, rest = eqx.partition(adapted, lora_filter(adapted))
    assert len(jax.tree.leaves(chosen)) == 3

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(chosen, rest):
        return eqx.combine(chosen, rest)(TOKENS)[-1, 0]

    moved_by = gradient(chosen, rest)
    assert jax.tree.structure(moved_by) == jax.tree.structure(chosen)
    assert float(jnp.abs(moved_by.stack.blocks.attention.q_proj.b).max()) > 0
    trained = eqx.apply_updates(chosen, moved_by)
    save_pytree(trained, tmp_path / "adapters.safetensors")
    loaded = load_pytree(tmp_path / "adapters.safetensors", like=chosen)
    assert eqx.tree_equal(eqx.combine(loaded, rest), eqx.combine(trained, rest))


@pytest.mark.slow
def test_an_unstacked_model_keeps_its_adapters(getkey, model):
    adapted = moved(add_lora(model, 2, alpha=4, key=getkey()), getkey())
    apart = unstacked(adapted)
    assert len(adapters(apart)) == 2 * len(adapters(adapted))
    first = apart.stack.blocks[0].mlp.up_proj
    np.testing.assert_array_equal(first.a, adapted.stack.blocks.mlp.up_proj.a[0])
    np.testing.assert_allclose(
        merge_lora(first).weight, adapted.stack.blocks.mlp.up_proj.weight[0], atol=1e-6
    )


def test_errors(getkey, model):
    key = getkey()
    with pytest.raises(ValueError, match=r"no linear map to adapt.*stack\.blocks"):
        add_lora(model, 2, alpha=4, where=lambda path: "query" in path, key=key)
    with pytest.raises(ValueError, match=r"rank=17 .* at most 16.*q_proj.weight \(16, 16\)"):
        add_lora(model, 17, alpha=4, where=lambda path: "q_proj" in path, key=key)
    with pytest.raises(ValueError, match=r"rank=0 must be at least 1"):
        LoRALinear(linear(key), 0, alpha=4, key=key)
    with pytest.raises(ValueError, match=r"alpha=0 must be positive .* nothing is learned"):
        LoRALinear(linear(key), 1, alpha=0, key=key)
    layer = eqx.nn.Sequential([LoRALinear(linear(key), 1, alpha=4, key=key)])
    with pytest.raises(ValueError, match=r"layers\.0 has an adapter already"):
        add_lora(layer, 1, alpha=4, where=lambda path: True, key=key)
    for function in (merge_lora, lora_filter):
        with pytest.raises(ValueError, match="no adapters; give it some with add_lora"):
            function(model)
