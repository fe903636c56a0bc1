import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Causal, Padding, SoftCap, dot_product_attention
from eqx_transformer.nn import LatentAttention, LongRoPEScaling, RoPE, YaRNScaling

SEQ, D_MODEL = 7, 10
SIZES = {"kv_rank": 6, "nope_head_dim": 5, "rope_head_dim": 4, "v_head_dim": 3}


def _layer(key=0, **options):
    options = {"mask": Causal(), **SIZES, **options}
    layer = LatentAttention(D_MODEL, 3, key=jr.key(key), **options)
    leaves, structure = jax.tree.flatten(layer)
    rng = np.random.default_rng(1)
    fill = lambda w: w + jnp.asarray(rng.normal(size=w.shape) / 4, w.dtype)  # noqa: E731
    return structure.unflatten([fill(w) if eqx.is_inexact_array(w) else w for w in leaves])


def _x(*shape):
    return jnp.asarray(np.random.default_rng(2).normal(size=(*shape, SEQ, D_MODEL)))


def _reference(layer, x, positions, theta, interleaved=True):
    """The paper's equations (37) to (47), position by position and head by head."""
    x, get = np.asarray(x, np.float64), lambda w: np.asarray(w, np.float64)

    def linear(m, x):
        return x @ get(m.weight) + (0 if m.bias is None else get(m.bias))

    def rms(m, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + m.eps) * get(m.weight)

    def turn(x, position):
        half = len(x) // 2
        pairs = (x[0::2], x[1::2]) if interleaved else (x[:half], x[half:])
        z = (pairs[0] + 1j * pairs[1]) * np.exp(1j * position * theta ** (-np.arange(half) / half))
        return np.concatenate([z.real, z.imag])

    nope, v_dim, rank = layer.nope_head_dim, layer.v_head_dim, layer.kv_norm.weight.shape[0]
    down = linear(layer.kv_down_proj, x)
    latent = rms(layer.kv_norm, down[:, :rank])
    if layer.q_proj is None:
        q = linear(layer.q_up_proj, rms(layer.q_norm, linear(layer.q_down_proj, x)))
    else:
        q = linear(layer.q_proj, x)
    q = q.reshape(len(x), layer.num_heads, -1)
    kv = linear(layer.kv_up_proj, latent).reshape(len(x), layer.num_heads, nope + v_dim)
    out = np.zeros((len(x), layer.num_heads, v_dim))
    for i in range(len(x)):
        for h in range(layer.num_heads):
            scores = []
            for j in range(i + 1):
                p = turn(q[i, h, nope:], positions[i]) @ turn(down[j, rank:], positions[j])
                scores.append(layer.scale * (q[i, h, :nope] @ kv[j, h, :nope] + p))
            weights = np.exp(scores) / np.exp(scores).sum()
            out[i, h] = weights @ kv[: i + 1, h, nope:]
    return linear(layer.o_proj, out.reshape(len(x), -1))


@pytest.mark.parametrize(
    "options",
    [{}, {"q_rank": 8, "use_bias": True, "norm_eps": 0.1}, {"scale": 0.3, "qkv_bias": True}],
)
def test_equals_the_paper(x64, options):
    layer, x = _layer(rope=RoPE(theta=50.0, interleaved=True), **options), _x()
    np.testing.assert_allclose(layer(x), _reference(layer, x, np.arange(SEQ), 50.0), atol=1e-12)
    positions = np.array([0, 3, 4, 7, 8, 9, 20])
    got = layer(x, positions=jnp.asarray(positions))
    np.testing.assert_allclose(got, _reference(layer, x, positions, 50.0), atol=1e-12)


def test_scale_and_pairing(x64):
    assert _layer().scale == 9**-0.5 and _layer(scale=0.2).scale == 0.2
    yarn = YaRNScaling(factor=40.0, original_max_len=4096, mscale=1.0, mscale_all_dim=1.0)
    # DeepSeek-V3 multiplies by (0.1 ln 40 + 1) ** 2.
    layer = _layer(rope=RoPE(interleaved=True, scaling=yarn))
    np.testing.assert_allclose(layer.scale, 9**-0.5 * 1.3688879454113936**2)
    layer, x = _layer(rope=RoPE(theta=50.0)), _x()
    expected = _reference(layer, x, np.arange(SEQ), 50.0, interleaved=False)
    np.testing.assert_allclose(layer(x), expected, atol=1e-12)


# Few positions use the latents themselves, many the keys and values made of them.
CHUNKINGS = {
    "whole": [(7, None)],
    "tokens": [(1, None)] * 7,
    "mixed": [(3, None), (1, None), (3, None)],
    "padded": [(4, 2), (4, 3), (4, 0), (4, 2)],
}


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_cache_is_the_forward(x64, chunking):
    layer = _layer(q_rank=8, use_bias=True, kv_rank=30, score_mod=SoftCap(2.0))
    x, cache, outs, start = _x(), layer.init_cache(SEQ), [], 0
    assert cache.k.shape == (SEQ, 30 + 4) and cache.v.size == 0
    extend = eqx.filter_jit(lambda x, cache, length: layer.extend(x, cache, length=length))
    for given, length in CHUNKINGS[chunking]:
        count = given if length is None else length
        chunk = jnp.full((given, D_MODEL), jnp.nan).at[:count].set(x[start : start + count])
        out, cache = extend(chunk, cache, None if length is None else jnp.array(length))
        outs.append(out[:count])
        start += count
    np.testing.assert_allclose(jnp.concatenate(outs), layer(x), atol=1e-12)


@pytest.mark.parametrize("kv_rank", [2, 30])
def test_few_positions_make_no_keys(kv_rank):
    """What is computed for a token is in proportion to the latents, not to heads and positions."""
    layer, max_len = _layer(kv_rank=kv_rank), 64
    struct = eqx.filter_eval_shape(layer.init_cache, max_len)

    def largest(seq):
        x = jax.ShapeDtypeStruct((seq, D_MODEL), jnp.float32)
        jaxpr = jax.make_jaxpr(lambda x, cache: layer.extend(x, cache))(x, struct)
        shapes = [v.aval.shape for e in jaxpr.jaxpr.eqns for v in e.outvars]
        return any(shape[:2] == (max_len, 3) for shape in shapes)

    assert not largest(1)
    # With long latents keys pay from few positions on; with short ones they never do.
    assert largest(16) == (kv_rank == 30)


def test_caller_mask(x64):
    layer, x = _layer(), _x()
    valid = jnp.array([1, 1, 0, 1, 0, 1, 1], bool)
    out, _ = layer.extend(x, layer.init_cache(SEQ), mask=Padding(valid))
    np.testing.assert_allclose(out, layer(x, mask=Padding(valid)), atol=1e-12)
    kept = np.flatnonzero(valid)
    expected = _reference(layer, x[kept], kept, 10_000.0)
    np.testing.assert_allclose(layer(x, mask=Padding(valid))[kept], expected, atol=1e-12)


def test_every_derivative(x64):
    """Through decoding with a cache, against the dense forward pass: other programs altogether."""
    chunked = eqx.Partial(dot_product_attention, implementation="chunked")
    layer, x, weight = _layer(q_rank=8), *_x(2)
    forward = eqx.tree_at(lambda m: m.attention_fn, layer, chunked)

    def decoded(layer, x):
        cache, outs = layer.init_cache(SEQ), []
        for chunk in jnp.split(x, [4, 5]):
            out, cache = layer.extend(chunk, cache)
            outs.append(out)
        return jnp.concatenate(outs)

    def derivatives(layer, f):
        arrays, static = eqx.partition(layer, eqx.is_inexact_array)
        rng = np.random.default_rng(4)
        dots = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), arrays)

        def loss(arrays):
            return jnp.vdot(jnp.sin(f(eqx.combine(arrays, static), x)), weight)

        hvp = lambda: jax.jvp(jax.value_and_grad(loss), (arrays,), (dots,))  # noqa: E731
        return eqx.filter_jit(hvp)()

    got = derivatives(layer, decoded)
    expected = derivatives(forward, lambda layer, x: layer(x))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def test_vmap_is_a_loop():
    layer, x = _layer(), _x(3).astype("f4")
    np.testing.assert_allclose(jax.vmap(layer)(x), jnp.stack([layer(x) for x in x]), atol=1e-5)
    assert layer(x[0].astype("bfloat16")).dtype == jnp.bfloat16


def test_dropout():
    layer, x, keys = _layer(dropout_rate=0.4), _x().astype("f4"), jr.split(jr.key(3))
    with pytest.raises(RuntimeError, match=r"LatentAttention: dropout_rate=0.4 needs a key"):
        layer(x)
    assert (layer(x, key=keys[0]) == layer(x, key=keys[0])).all()
    assert (layer(x, key=keys[0]) != layer(x, key=keys[1])).any()
    off = eqx.nn.inference_mode(layer)
    np.testing.assert_allclose(off.extend(x, off.init_cache(SEQ))[0], off(x), atol=1e-5)


def test_errors(getkey):
    long = LongRoPEScaling(short_factors=(1, 1), long_factors=(2, 2), factor=2, original_max_len=4)
    for options, message in (
        ({"kv_rank": 0}, "kv_rank=0 must be at least 1"),
        ({"v_head_dim": 0}, "v_head_dim=0"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0"),
        ({"rope": RoPE(scaling=long)}, "LongRoPEScaling depends on the length"),
    ):
        with pytest.raises(ValueError, match=message):
            LatentAttention(D_MODEL, 3, key=getkey(), **{**SIZES, **options})
    with pytest.raises(ValueError, match=r"LatentAttention takes one example.*jax.vmap"):
        _layer()(jnp.ones((2, SEQ, D_MODEL)))
