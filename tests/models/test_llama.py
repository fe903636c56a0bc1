import dataclasses
import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Padding, Segments
from eqx_transformer.models import Llama, LlamaConfig, MLAConfig, MoEConfig
from eqx_transformer.nn import LinearScaling

SEQ = 9
TINY = LlamaConfig(
    vocab_size=11, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=20, max_len=SEQ
)


@eqx.filter_jit
def _forward(model, tokens, **options):
    return model(tokens, **options)


@eqx.filter_jit
def _extend(model, tokens, cache, **options):
    return model.extend(tokens, cache, **options)


def _tokens(getkey, *shape):
    return jr.randint(getkey(), (*shape, SEQ), 0, TINY.vocab_size)


def _f64(model):
    return jax.tree.map(lambda x: x.astype("f8") if eqx.is_inexact_array(x) else x, model)


def _close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


# The forward pass.


def _reference(model, tokens):
    """The paper's equations in NumPy, float64, one layer, head and pair at a time."""
    config, get = model.config, lambda x: np.asarray(x, np.float64)
    rms = lambda x, w: x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * get(w)  # noqa: E731

    def turn(x):
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None] * config.rope_theta ** (-np.arange(half) / half)
        z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], -1)

    x = get(model.embedding.weight)[np.asarray(tokens)]
    group = config.num_heads // config.num_kv_heads
    for block in model.stack:
        h, attention = rms(x, block.attention_residual.norm.weight), block.attention
        q, k, v = (
            h @ get(p.weight) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        heads, d = [], attention.head_dim
        for i in range(config.num_heads):
            j = i // group
            qi, kj = turn(q[:, i * d : (i + 1) * d]), turn(k[:, j * d : (j + 1) * d])
            weights = np.tril(np.exp(qi @ kj.T / math.sqrt(d)))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, j * d : (j + 1) * d])
        x = x + np.concatenate(heads, -1) @ get(attention.o_proj.weight)
        h, mlp = rms(x, block.mlp_residual.norm.weight), block.mlp
        gate = h @ get(mlp.gate_proj.weight)
        x = x + gate / (1 + np.exp(-gate)) * (h @ get(mlp.up_proj.weight)) @ get(
            mlp.down_proj.weight
        )
    return rms(x, model.norm.weight) @ get(model.head.weight)


def test_equals_the_paper(getkey):
    config = TINY.replace(norm_eps=0.1, rope_theta=100.0)
    model, tokens = Llama(config, key=getkey()), _tokens(getkey)
    np.testing.assert_allclose(model(tokens), _reference(model, tokens), rtol=1e-4, atol=1e-5)


def test_is_causal_and_windowed(getkey):
    config = TINY.replace(window=3, num_layers=1)
    model, tokens = Llama(config, key=getkey()), _tokens(getkey)
    for i in range(SEQ):
        changed = (_forward(model, tokens.at[i].add(1)) != _forward(model, tokens)).any(axis=-1)
        assert changed.tolist() == [i <= j < i + 3 for j in range(SEQ)]


def test_caller_mask_and_positions(getkey):
    model, tokens = Llama(TINY, key=getkey()), _tokens(getkey)
    # Two documents in one row are as two rows, because rotary positions are relative.
    ids = jnp.array([0] * 4 + [1] * 5)
    packed = model(tokens, mask=Segments(ids))
    _close(packed, jnp.concatenate([model(tokens[:4]), model(tokens[4:])]), 1e-5)
    # Padding on the left only shifts positions.
    left = model(tokens, mask=Padding(jnp.arange(SEQ) >= 3))[3:]
    _close(left, model(tokens[3:], positions=jnp.arange(3, SEQ)), 1e-5)
    _close(left, model(tokens[3:]), 1e-5)


def test_soft_cap_bounds(getkey):
    model = Llama(TINY, key=getkey())
    model = eqx.tree_at(lambda m: m.head.weight, model, replace_fn=lambda w: 30 * w)
    tokens = _tokens(getkey)
    logits = np.asarray(model(tokens), np.float64)
    parts = lambda m: (m.embedding, m.stack, m.norm, m.head)  # noqa: E731
    bounded = Llama(TINY.replace(logit_soft_cap=2.0), key=getkey())
    bounded = eqx.tree_at(parts, bounded, parts(model))
    assert np.abs(logits).max() > 10
    np.testing.assert_allclose(bounded(tokens), 2 * np.tanh(logits / 2), rtol=1e-4, atol=1e-5)


def test_variance_does_not_grow_with_depth(getkey):
    model = Llama(TINY.replace(num_layers=8, d_model=64, d_ff=None), key=getkey())
    block = model.stack.blocks
    for linear in (block.attention.q_proj, block.mlp.gate_proj):
        assert abs(float(linear.weight.std()) * 8 - 1) < 0.1
    assert abs(float(block.attention.o_proj.weight.std()) * 8 * 4 - 1) < 0.1
    assert block.mlp.down_proj.weight.shape == (8, 192, 64)
    assert abs(float(block.mlp.down_proj.weight.std()) * 192**0.5 * 4 - 1) < 0.1


# Derivatives, against the same in float64 computed in another way.


def test_derivatives(getkey):
    config = TINY.replace(qk_norm=True, window=5, remat="dots", logit_soft_cap=5.0)
    model, tokens = Llama(config, key=getkey()), _tokens(getkey, 2)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    ct = jr.normal(getkey(), (2, SEQ, TINY.vocab_size))
    direction = jax.tree.map(lambda x: jr.normal(getkey(), x.shape), params)

    def loss(params):
        logits = jax.vmap(eqx.combine(params, static))(tokens)
        return jnp.vdot(logits, ct.astype(logits.dtype))

    def dot(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return sum(np.vdot(np.asarray(x, "f8"), np.asarray(y, "f8")) for x, y in pairs)

    derivatives = jax.jit(lambda p, t: jax.jvp(jax.value_and_grad(loss), (p,), (t,)))
    (value, grad), (slope, hvp) = derivatives(params, direction)
    with jax.enable_x64(True):
        p, t = _f64(params), _f64(direction)
        wide = jax.jit(jax.value_and_grad(loss))
        expected_value, expected_grad = wide(p)
        # Differences of fourth order between values in float64, which no rule for derivatives made.
        h, f = 2e-4, {0: expected_value}
        for i in (-2, -1, 1, 2):
            f[i] = wide(jax.tree.map(lambda x, y, i=i: x + i * h * y, p, t))[0]
        expected_slope = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)
        curvature = (16 * (f[1] + f[-1]) - (f[2] + f[-2]) - 30 * f[0]) / (12 * h * h)
    np.testing.assert_allclose(value, expected_value, rtol=1e-4)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-4)
    np.testing.assert_allclose(dot(expected_grad, t), expected_slope, rtol=1e-6)
    np.testing.assert_allclose(dot(hvp, direction), curvature, rtol=1e-3)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(expected_grad), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()))


def test_vmap_is_a_loop(getkey):
    model, tokens = Llama(TINY, key=getkey()), _tokens(getkey, 3)
    _close(
        _forward(eqx.filter_vmap(model), tokens),
        jnp.stack([_forward(model, t) for t in tokens]),
        1e-5,
    )
    # An ensemble: the model is the batch.
    models = eqx.filter_vmap(lambda key: Llama(TINY, key=key))(jr.split(getkey(), 2))
    out = eqx.filter_jit(eqx.filter_vmap(lambda m: m(tokens[0])))(models)
    second = jax.tree.map(lambda x: x[1] if eqx.is_array(x) else x, models)
    _close(out[1], _forward(second, tokens[0]), 1e-5)


def test_bfloat16(getkey):
    model, tokens = Llama(TINY, key=getkey()), _tokens(getkey)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, model)
    logits = low(tokens)
    assert logits.dtype == jnp.bfloat16 and low.init_cache().layers.k.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype("f4"), model(tokens), atol=0.1)
    _close(low.extend(tokens, low.init_cache())[0].astype("f4"), logits.astype("f4"), 0.05)


# The cache is the forward.

CACHE_OPTIONS = {
    "plain": {},
    "window": {"window": 3, "num_kv_heads": 1},
    "qk_norm": {"qk_norm": True, "num_kv_heads": None, "head_dim": 6},
    "tied": {"tie_embeddings": True, "logit_soft_cap": 0.5, "use_bias": True},
    "chunked": {"attention_implementation": "chunked", "window": 4, "remat": "full", "unroll": 2},
}
CHUNKINGS = {
    "mixed": [(4, None), (1, None), (1, None), (3, None)],
    "padded": [(4, 2), (4, 4), (4, 0), (4, 3)],
}


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("options", CACHE_OPTIONS)
def test_cache_is_the_forward(getkey, options, chunking):
    model = Llama(TINY.replace(**CACHE_OPTIONS[options]), key=getkey())
    tokens, cache, logits, start = _tokens(getkey), model.init_cache(), [], 0
    for given, length in CHUNKINGS[chunking]:
        count = given if length is None else length
        chunk = jnp.zeros(given, tokens.dtype).at[:count].set(tokens[start : start + count])
        length = None if length is None else jnp.array(length)
        out, cache = _extend(model, chunk, cache, length=length)
        logits.append(out[:count])
        start += count
    _close(jnp.concatenate(logits), _forward(model, tokens), 1e-5)


def test_cache_under_vmap_and_scan(getkey):
    model, tokens = Llama(TINY, key=getkey()), _tokens(getkey, 2)
    prompt = jnp.array([2, 5])

    @eqx.filter_jit
    def run(tokens, length):
        # Prompts of different lengths, padded to one, then one token at a time.
        first, cache = model.extend(tokens[:5], model.init_cache(), length=length)

        def step(cache, i):
            logits, cache = model.extend(tokens[i][None], cache)
            return cache, logits[0]

        return first, jax.lax.scan(step, cache, length + jnp.arange(4))[1]

    first, rest = jax.vmap(run)(tokens, prompt)
    for i, n in enumerate(prompt.tolist()):
        expected = _forward(model, tokens[i])
        _close(first[i, :n], expected[:n], 1e-5)
        _close(rest[i], expected[n : n + 4], 1e-5)


def test_cache_overflow(getkey):
    model, tokens = Llama(TINY, key=getkey()), _tokens(getkey)
    _, cache = _extend(model, tokens, model.init_cache())
    with pytest.raises(RuntimeError, match="max_len=9"):
        _extend(model, tokens[:1], cache)
    with pytest.raises(ValueError, match="max_len=10 is more than max_len=9"):
        model.init_cache(10)


# What a model is made of.


def test_every_leaf_is_a_parameter(getkey):
    config = TINY.replace(qk_norm=True, use_bias=True, dropout_rate=0.1, logit_soft_cap=3.0)
    model = Llama(config.replace(num_layers=3), key=getkey())
    paths, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(model, eqx.is_inexact_array))
    names = {jax.tree_util.keystr(path) for path, _ in paths}
    projections = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"]
    projections += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    norms = ["attention_residual.norm", "mlp_residual.norm", "attention.q_norm", "attention.k_norm"]
    blocks = [f"{p}.{leaf}" for p in projections for leaf in ("weight", "bias")]
    blocks += [f"{n}.weight" for n in norms]
    expected = {f".stack.blocks.{leaf}" for leaf in blocks}
    assert names == expected | {".embedding.weight", ".norm.weight", ".head.weight"}
    assert all(leaf.shape[0] == 3 for path, leaf in paths if "blocks" in jax.tree_util.keystr(path))
    tied = eqx.filter(Llama(TINY.replace(tie_embeddings=True), key=getkey()), eqx.is_array)
    assert tied.head is None


SLIDING = {"window": 4, "layer_types": ("sliding", "global")}
EXPERTS = MoEConfig(num_experts=4)
LATENT = MLAConfig(kv_rank=6, nope_head_dim=4, rope_head_dim=2, v_head_dim=3)
# A value, and what else must be so for it to have a meaning.
CHANGES = {
    "vocab_size": (12, {}),
    "d_model": (24, {}),
    "num_layers": (3, {}),
    "num_heads": (2, {}),
    "num_kv_heads": (1, {}),
    "head_dim": (6, {}),
    "d_ff": (24, {}),
    "ffn_multiple_of": (128, {"d_ff": None}),
    "ffn_dim_multiplier": (2.0, {"d_ff": None}),
    "max_len": (8, {}),
    "tie_embeddings": (True, {}),
    "head_bias": (True, {}),
    "embedding_scale": (4.0, {}),
    "embedding_norm": (True, {}),
    "embedding_dropout_rate": (0.2, {}),
    "logit_soft_cap": (1.0, {}),
    "positions": ("learned", {}),
    "rope_theta": (50.0, {}),
    "rope_scaling": (LinearScaling(factor=2.0), {}),
    "rope_local_theta": (50.0, SLIDING),
    "rotary_fraction": (0.5, {}),
    "rope_interleaved": (True, {}),
    "alibi_scale": (0.5, {"positions": "alibi"}),
    "causal": (False, {}),
    "window": (2, {}),
    "layer_types": ("sliding", SLIDING),
    "document_start_id": (0, {}),
    "query_scale": (0.3, {}),
    "attention_soft_cap": (5.0, {}),
    "qk_norm": (True, {}),
    "qk_norm_over": ("projection", {"qk_norm": True}),
    "clip_qkv": (1.0, {}),
    "sinks": (True, {}),
    "mla": (LATENT, {"num_kv_heads": None}),
    "activation": ("geglu", {}),
    "mlp_clip": (1.0, {}),
    "mlp_up_offset": (1.0, {}),
    "moe": (EXPERTS, {}),
    "norm": ("layer", {}),
    "norm_eps": (0.3, {}),
    "norm_offset": (1.0, {}),
    "norm_bias": (True, {"norm": "layer"}),
    "pre_norm": (False, {}),
    "post_attention_norm": (True, {}),
    "post_mlp_norm": (True, {}),
    "parallel_residual": ("one_norm", {}),
    "use_bias": (True, {}),
    "qkv_bias": (True, {}),
    "o_bias": (True, {}),
    "mlp_bias": (True, {}),
    "dropout_rate": (0.2, {}),
    "param_dtype": ("bfloat16", {}),
    "dtype": ("bfloat16", {}),
    "logits_dtype": ("bfloat16", {}),
    "remat": ("full", {}),
    "unroll": (2, {}),
    "attention_implementation": ("chunked", {}),
}
MOE_CHANGES = {
    "num_experts": (6, {}),
    "experts_per_token": (3, {}),
    "d_expert": (7, {}),
    "scores": ("sigmoid", {}),
    "renormalize": (False, {}),
    "route_scale": (2.0, {}),
    "router_bias": (True, {}),
    "selection_bias": (True, {}),
    "num_groups": (2, {}),
    "top_groups": (2, {"num_groups": 2}),
    "group_score": ("top2", {"num_groups": 2}),
    "num_shared_experts": (1, {}),
    "shared_gate": (True, {"num_shared_experts": 1}),
    "first_dense": (1, {}),
    "every": (2, {}),
    "dense_layers": ((1,), {}),
}
MLA_CHANGES = {
    "kv_rank": 5,
    "nope_head_dim": 5,
    "rope_head_dim": 4,
    "v_head_dim": 4,
    "q_rank": 3,
    "norm_eps": 0.3,
}


@functools.cache
def _look(config):
    """The parameters, the cache, and the program with its constants; nothing is computed."""
    key = jax.ShapeDtypeStruct((), jr.key(0).dtype)
    model = eqx.filter_eval_shape(Llama, config, key=key)
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(model) if hasattr(x, "shape")]
    cache = None
    if config.causal:
        cache = [x.shape for x in jax.tree.leaves(eqx.filter_eval_shape(model.init_cache))]
    program = eqx.filter_make_jaxpr(lambda m, key: m(jnp.arange(8), key=key))(model, key)[0]
    constants = [np.asarray(x).tolist() for x in program.consts if eqx.is_inexact_array(x)]
    # Where reverse mode recomputes, and how often the loop is unrolled, is written there too.
    return shapes, cache, str(program), constants


def _replaced(base, name, changes):
    value, context = changes[name]
    before = base.replace(**context)
    return before, before.replace(**{name: value})


def test_looking_is_reproducible():
    assert _look.__wrapped__(TINY) == _look.__wrapped__(TINY.replace())


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(LlamaConfig)])
def test_no_field_is_dead(name):
    before, after = _replaced(TINY, name, CHANGES)
    assert _look(before) != _look(after)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(MoEConfig)])
def test_no_field_of_experts_is_dead(name):
    before, after = _replaced(EXPERTS, name, MOE_CHANGES)
    assert _look(TINY.replace(moe=before)) != _look(TINY.replace(moe=after))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(MLAConfig)])
def test_no_field_of_latent_attention_is_dead(name):
    config = TINY.replace(num_kv_heads=None, mla=LATENT)
    after = config.replace(mla=LATENT.replace(**{name: MLA_CHANGES[name]}))
    assert _look(config) != _look(after)


def test_equal_construction_is_one_trace(getkey):
    key, tokens = getkey(), _tokens(getkey)
    config = TINY.replace(window=3, remat="dots", attention_implementation="reference")
    models = [Llama(config.replace(), key=key) for _ in range(2)]
    assert eqx.tree_equal(*models)
    run = eqx.filter_jit(eqx.debug.assert_max_traces(lambda m, t: m(t), max_traces=1))
    assert (run(models[0], tokens) == run(models[1], tokens)).all()


def test_dropout(getkey):
    model, tokens = Llama(TINY.replace(dropout_rate=0.3), key=getkey()), _tokens(getkey)
    with pytest.raises(RuntimeError, match="key"):
        model(tokens)
    with pytest.raises(RuntimeError, match="inference_mode"):
        model.extend(tokens, model.init_cache())
    key = getkey()
    noisy = _forward(model, tokens, key=key)
    assert (noisy == _forward(model, tokens, key=key)).all()
    assert (noisy != _forward(model, tokens, key=getkey())).any()
    off = eqx.nn.inference_mode(model)
    assert (off(tokens) == off(tokens, key=key)).all()
    _close(off.extend(tokens, off.init_cache())[0], off(tokens), 1e-5)
    assert eqx.tree_equal(eqx.nn.inference_mode(off, value=False), model)


def test_shape_errors(getkey):
    model = Llama(TINY, key=getkey())
    message = r"Llama takes one example: tokens has 2 axes \(4, 9\) but must be \[seq\]; .*jax.vmap"
    with pytest.raises(ValueError, match=message):
        model(jnp.zeros((4, SEQ), int))
    with pytest.raises(ValueError, match=message):
        model.extend(jnp.zeros((4, SEQ), int), model.init_cache())
    with pytest.raises(ValueError, match="seq=10 is more than max_len=9"):
        model(jnp.zeros(SEQ + 1, int))
