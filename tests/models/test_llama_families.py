"""What the families of decoder-only models differ in, at tiny sizes."""

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Segments
from eqx_transformer.generation import beam_search, generate
from eqx_transformer.models import Llama, LlamaConfig, MLAConfig, MoEConfig
from eqx_transformer.nn import LinearScaling, LongRoPEScaling, YaRNScaling
from eqx_transformer.stacks import Stack, StackSequence

SEQ = 9
TINY = LlamaConfig(vocab_size=11, d_model=16, num_layers=2, num_heads=4, d_ff=20, max_len=SEQ)
LAYER_NORM = {"norm": "layer", "norm_bias": True, "use_bias": True}
FAMILIES = {
    "gemma3": TINY.replace(
        num_layers=5,
        num_kv_heads=1,
        layer_types=("sliding", "global"),
        window=3,
        rope_local_theta=10.0,
        rope_scaling=LinearScaling(factor=4.0),
        norm_offset=1.0,
        post_attention_norm=True,
        post_mlp_norm=True,
        qk_norm=True,
        query_scale=0.4,
        attention_soft_cap=3.0,
        activation="geglu_tanh",
        embedding_scale=4.0,
        tie_embeddings=True,
    ),
    "olmo2": TINY.replace(
        pre_norm=False,
        post_attention_norm=True,
        post_mlp_norm=True,
        qk_norm=True,
        qk_norm_over="projection",
    ),
    "gpt2": TINY.replace(positions="learned", activation="gelu_tanh", **LAYER_NORM),
    "neox": TINY.replace(
        parallel_residual="two_norms", rotary_fraction=0.5, activation="gelu", **LAYER_NORM
    ),
    "falcon": TINY.replace(
        parallel_residual="one_norm",
        num_kv_heads=1,
        positions="alibi",
        alibi_scale=0.5,
        activation="gelu",
        norm="layer",
    ),
    "bloom": TINY.replace(positions="alibi", embedding_norm=True, activation="relu", **LAYER_NORM),
    "mpt": TINY.replace(positions="alibi", clip_qkv=0.5, norm="layer", activation="gelu"),
    "gpt_oss": TINY.replace(
        num_layers=4,
        layer_types=("sliding", "global"),
        window=3,
        sinks=True,
        use_bias=True,
        activation="quick_geglu",
        mlp_clip=1.0,
        mlp_up_offset=1.0,
        rope_scaling=YaRNScaling(factor=4.0, original_max_len=4, beta_fast=2.0, truncate=False),
        moe=MoEConfig(num_experts=4, router_bias=True),
    ),
    "deepseek2": TINY.replace(
        num_layers=3,
        rope_interleaved=True,
        mla=MLAConfig(kv_rank=6, nope_head_dim=4, rope_head_dim=2, v_head_dim=3, q_rank=5),
        moe=MoEConfig(
            num_experts=4,
            num_groups=2,
            d_expert=8,
            renormalize=False,
            num_shared_experts=2,
            first_dense=1,
        ),
    ),
    "deepseek3": TINY.replace(
        num_layers=3,
        rope_interleaved=True,
        mla=MLAConfig(kv_rank=6, nope_head_dim=4, rope_head_dim=2, v_head_dim=3),
        moe=MoEConfig(
            num_experts=8,
            num_groups=2,
            group_score="top2",
            scores="sigmoid",
            selection_bias=True,
            route_scale=2.5,
            num_shared_experts=1,
            first_dense=1,
        ),
    ),
    "qwen2": TINY.replace(
        num_layers=3, qkv_bias=True, layer_types=("global", "global", "sliding"), window=3
    ),
    "qwen2_moe": TINY.replace(
        moe=MoEConfig(num_experts=4, every=2, num_shared_experts=1, shared_gate=True)
    ),
    "documents": TINY.replace(document_start_id=0),
    "nothing": TINY.replace(positions="none"),
}


def _model(config):
    """With random parameters, none of them at a value where a mistake would not show."""
    rng = np.random.default_rng(0)

    def fill(x):
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.asarray(rng.normal(size=x.shape) / 3, x.dtype)

    return jax.tree.map(fill, eqx.filter_eval_shape(Llama, config, key=jr.key(0)))


TOKENS = jnp.array([3, 0, 7, 7, 0, 2, 5, 10, 1])


# Most programs here run once, so time is spent on compiling them.
quick_jit = partial(eqx.filter_jit, compiler_options={"xla_backend_optimization_level": 0})


@quick_jit
def _call(model, tokens, **options):
    return model(tokens, **options)


@quick_jit
def _extend(model, tokens, cache, length=None):
    return model.extend(tokens, cache, length=length)


QUICK = ("gemma3", "gpt2", "neox", "gpt_oss", "deepseek3", "documents")


@pytest.mark.parametrize(
    "family",
    [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_cache_is_the_forward(x64, family):
    model = _model(FAMILIES[family])
    cache, logits, start = model.init_cache(), [], 0
    # Of four tokens so many count; then two single ones.
    for given, count in ((4, 3), (4, 0), (4, 4), (1, 1), (1, 1)):
        chunk = jnp.zeros(given, TOKENS.dtype).at[:count].set(TOKENS[start : start + count])
        out, cache = _extend(model, chunk, cache, jnp.array(count))
        logits.append(out[:count])
        start += count
    expected = _call(model, TOKENS)
    assert np.isfinite(expected).all() and float(jnp.abs(expected).max()) > 0.1
    np.testing.assert_allclose(jnp.concatenate(logits), expected, rtol=1e-9, atol=1e-9)
    assert cache.length == SEQ


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "deepseek2", "documents"])
def test_generation(family):
    """Through caches of several stacks, as if every token were computed from scratch."""
    model = _model(FAMILIES[family])
    prompt = TOKENS[:4]
    got = generate(model, prompt, max_new_tokens=3, temperature=0)
    tokens = prompt
    for end in range(4, 7):
        logits = _call(model, jnp.pad(tokens, (0, SEQ - end)))
        tokens = jnp.append(tokens, jnp.argmax(logits[end - 1]))
    np.testing.assert_array_equal(got, tokens[4:])
    found = beam_search(model, prompt, max_new_tokens=3, num_beams=1)
    np.testing.assert_array_equal(found.tokens[0], got)


def test_kinds_of_layers():
    kinds = lambda config: "".join("GL"[k.sliding] for k in config.layer_kinds)  # noqa: E731
    assert kinds(TINY) == "GG" and kinds(TINY.replace(window=2)) == "LL"
    assert kinds(FAMILIES["gemma3"]) == "LGLGL"
    experts = lambda moe: [k.experts for k in TINY.replace(num_layers=6, moe=moe).layer_kinds]  # noqa: E731
    moe = MoEConfig(num_experts=4)
    assert experts(moe) == [True] * 6
    assert experts(moe.replace(first_dense=2)) == [False] * 2 + [True] * 4
    assert experts(moe.replace(every=2, dense_layers=(3,))) == [i in (1, 5) for i in range(6)]
    for family, kind in (("gpt_oss", Stack), ("gemma3", StackSequence), ("gpt2", Stack)):
        assert type(eqx.filter_eval_shape(Llama, FAMILIES[family], key=jr.key(0)).stack) is kind


def test_each_layer_has_its_window_and_its_wavelengths():
    model = _model(FAMILIES["gemma3"])
    for i, layer in enumerate(model.stack):
        attention, sliding = layer.attention, i % 2 == 0
        assert attention.rope.theta == (10.0 if sliding else 10_000.0)
        assert (attention.rope.scaling is None) == sliding
        q = k = jnp.arange(SEQ)
        seen = attention.mask(q[:, None], k[None]).sum(1).tolist()
        assert seen == [min(i + 1, 3) if sliding else i + 1 for i in range(SEQ)]
    # Without wavelengths of their own, sliding layers are as the others.
    for layer in _model(FAMILIES["gpt_oss"]).stack.blocks.blocks:
        assert layer.attention.rope.scaling.factor == 4


def test_not_causal():
    model = _model(TINY.replace(causal=False, window=3))
    changed = (_call(model, TOKENS.at[4].add(1)) != _call(model, TOKENS)).any(axis=-1)
    # Two layers of two to either side.
    assert changed.tolist() == [abs(i - 4) <= 4 for i in range(SEQ)]
    with pytest.raises(ValueError, match="causal=False"):
        model.init_cache()


def test_documents(x64):
    model, plain = _model(FAMILIES["documents"]), _model(TINY)
    logits = _call(model, TOKENS)
    parts = [_call(plain, part) for part in jnp.split(TOKENS, [1, 4])]
    np.testing.assert_allclose(logits, jnp.concatenate(parts), atol=1e-9)
    # Boundaries of another kind are a mask.
    ids = jnp.array([0, 1, 1, 1, 2, 2, 2, 2, 2])
    np.testing.assert_allclose(_call(plain, TOKENS, mask=Segments(ids)), logits, atol=1e-12)
    # At given positions too.
    got = _call(model, TOKENS[2:], positions=jnp.arange(2, SEQ))
    np.testing.assert_allclose(got[2:], logits[4:], atol=1e-9)


@pytest.mark.slow
def test_longrope_on_either_side_of_the_switch(x64):
    scaling = LongRoPEScaling(
        short_factors=(1.0, 1.2), long_factors=(3.0, 9.0), factor=2.0, original_max_len=4
    )
    model = _model(TINY.replace(rope_scaling=scaling))
    logits, cache = _extend(model, TOKENS[:3], model.init_cache())
    np.testing.assert_allclose(logits, _call(model, TOKENS[:3]), atol=1e-9)
    logits, _ = _extend(model, TOKENS[3:4], cache)
    np.testing.assert_allclose(logits[0], _call(model, TOKENS[:4])[3], atol=1e-9)
    # From the beginning beyond it, in parts.
    logits, cache = _extend(model, TOKENS[:6], model.init_cache())
    np.testing.assert_allclose(logits, _call(model, TOKENS[:6]), atol=1e-9)
    logits, _ = _extend(model, TOKENS[6:], cache)
    np.testing.assert_allclose(logits, _call(model, TOKENS)[6:], atol=1e-9)
    assert jnp.abs(_call(model, TOKENS)[:4] - _call(model, TOKENS[:4])).max() > 1e-3
    # Factors that are the same on both sides make no switch.
    same = TINY.replace(rope_scaling=_same(scaling))
    model = _model(same)
    _, cache = _extend(model, TOKENS[:3], model.init_cache())
    np.testing.assert_allclose(
        _extend(model, TOKENS[3:], cache)[0], _call(model, TOKENS)[3:], atol=1e-9
    )


def _same(scaling):
    fields = {"factor": scaling.factor, "original_max_len": scaling.original_max_len}
    factors = scaling.long_factors
    return LongRoPEScaling(short_factors=factors, long_factors=factors, **fields)


def test_precision():
    config = TINY.replace(param_dtype="bfloat16", dtype="float32", logits_dtype="float16")
    model = _model(config)
    assert {x.dtype.name for x in jax.tree.leaves(model) if eqx.is_inexact_array(x)} == {"bfloat16"}
    assert _call(model, TOKENS).dtype == jnp.float16
    cache = model.init_cache()
    assert cache.layers.k.dtype == jnp.float32
    assert model.init_cache(dtype="bfloat16").layers.k.dtype == jnp.bfloat16
    # Parameters in bfloat16 are numbers of float32 too, and so is all that is computed with them.
    wide = jax.tree.map(lambda x: x.astype("f4") if eqx.is_inexact_array(x) else x, _model(config))
    np.testing.assert_array_equal(_call(wide, TOKENS), _call(model, TOKENS))
    low = _model(TINY.replace(dtype="bfloat16"))
    assert _call(low, TOKENS).dtype == jnp.bfloat16
    full = _call(_model(TINY), TOKENS)
    np.testing.assert_allclose(
        _call(low, TOKENS).astype("f4"), full, atol=0.1 * float(jnp.abs(full).max())
    )


def test_embedding_dropout():
    model = _model(TINY.replace(embedding_dropout_rate=0.5))
    with pytest.raises(RuntimeError, match="key"):
        model(TOKENS)
    one, other = jr.split(jr.key(0))
    assert (_call(model, TOKENS, key=one) == _call(model, TOKENS, key=one)).all()
    assert (_call(model, TOKENS, key=one) != _call(model, TOKENS, key=other)).any()
    off = eqx.nn.inference_mode(model)
    np.testing.assert_array_equal(_call(off, TOKENS), _call(_model(TINY), TOKENS))


def test_router_statistics():
    model = _model(FAMILIES["gpt_oss"])
    logits, stats = quick_jit(model.apply_with_stats)(TOKENS)
    np.testing.assert_allclose(logits, _call(model, TOKENS), rtol=1e-5, atol=1e-5)
    # Of the local and the global layer of a period, for two periods.
    assert [stats[i].load.shape for i in range(2)] == [(2, 4)] * 2
    np.testing.assert_allclose(stats[0].load.sum(-1), 1, rtol=1e-5)
    dense = lambda tokens: _model(FAMILIES["deepseek2"]).apply_with_stats(tokens)  # noqa: E731
    _, (first, rest) = eqx.filter_eval_shape(dense, TOKENS)
    assert first is None and rest.load.shape == (2, 4)


def test_initial_variance_of_experts():
    config = TINY.replace(num_layers=8, d_model=64, d_ff=64, moe=MoEConfig(num_experts=4))
    model = quick_jit(Llama)(config, key=jr.key(0))
    experts = model.stack.blocks.mlp.experts
    assert experts.down_proj.weight.shape == (8, 4, 64, 64)
    assert abs(float(experts.down_proj.weight.std()) * 8 * 4 - 1) < 0.1
    assert abs(float(experts.up_proj.weight.std()) * 8 - 1) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "deepseek3"])
def test_derivatives(x64, family):
    """Unrolled, recomputed and tiled, against scanned and dense: other programs altogether."""
    config, tokens = FAMILIES[family], TOKENS[:6]
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(6, 11)))

    def derivatives(config):
        params, static = eqx.partition(_model(config), eqx.is_inexact_array)
        rng = np.random.default_rng(2)
        dots = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)

        def loss(params):
            return jnp.vdot(jnp.sin(eqx.combine(params, static)(tokens)), weight)

        hvp = lambda p, t: jax.jvp(jax.value_and_grad(loss), (p,), (t,))  # noqa: E731
        return quick_jit(hvp)(params, dots)

    got = derivatives(config.replace(remat="full", attention_implementation="chunked"))
    expected = derivatives(config.replace(unroll=2, attention_implementation="reference"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(b).max()) + math.ulp(1)
        np.testing.assert_allclose(a, b, atol=1e-9 * scale)
