"""The encoder, the decoder and both together: every field, the cache, derivatives."""

import dataclasses
import functools

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Causal, Padding, SlidingWindow
from eqx_transformer.models import (
    EncoderDecoder,
    SequenceClassifier,
    TokenClassifier,
    TransformerConfig,
    TransformerDecoder,
    TransformerEncoder,
    pool,
)
from eqx_transformer.stacks import Stack

TINY = TransformerConfig(
    vocab_size=11,
    d_model=8,
    num_layers=2,
    num_heads=2,
    d_ff=12,
    max_len=24,
    dropout_rate=0.0,
)
SOURCE = jnp.asarray([3, 9, 1, 4, 4, 7, 2, 0, 0])  # two of padding
TARGET = jnp.asarray([5, 0, 2, 8, 10, 1, 6])  # padding in the middle


def build(kind, config, key=None):
    key = jr.key(0) if key is None else key
    if kind == "encoder":
        return TransformerEncoder(config, key=key)
    if kind == "decoder":
        return TransformerDecoder(config, key=key)
    return EncoderDecoder(config, key=key)


def call(kind, model, **options):
    if kind == "encoder":
        return model(SOURCE, **options)
    if kind == "decoder":
        return model(TARGET, **options)
    return model(SOURCE, TARGET, **options)


@eqx.filter_jit
def _compiled(kind, model):
    return call(kind, model)


@functools.cache
def run(kind, config):
    """The output of a model built from `config`."""
    return _compiled(kind, build(kind, config))


@functools.cache
def program(kind, config):
    """What a model computes, and from which parameters; nothing is built or run."""
    model = eqx.filter_eval_shape(build, kind, config)
    jaxpr, _, _ = eqx.filter_make_jaxpr(call)(kind, model)
    return str(jaxpr)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# --- Every field changes what is built or computed ------------------------------------------------

# Field, value, and which models it matters to.
ALL, ENCODERS, DECODERS, BOTH = (
    ("encoder", "decoder", "both"),
    ("encoder",),
    ("decoder", "both"),
    ("both",),
)
CHANGES = [
    ("vocab_size", 12, DECODERS),
    ("d_model", 16, ALL),
    ("d_embedding", 6, ALL),
    ("num_layers", 3, ALL),
    ("num_decoder_layers", 1, BOTH),
    ("num_decoder_heads", 4, BOTH),
    ("decoder_d_ff", 20, BOTH),
    ("num_heads", 4, ALL),
    ("num_kv_heads", 1, ALL),
    ("head_dim", 6, ALL),
    ("d_ff", 20, ALL),
    ("pad_token_id", None, ALL),
    ("pad_token_id", 4, ENCODERS),
    ("num_token_types", 2, ENCODERS),
    ("embedding_norm", True, ALL),
    ("head_bias", True, DECODERS),
    ("scale_output", True, DECODERS),
    ("pooler", True, ENCODERS),
    ("layout", "post", ALL),
    ("layout", "sandwich", ALL),
    ("layout", "parallel", ("encoder", "decoder")),
    ("norm", "rms", ALL),
    ("norm", "dynamic_tanh", ALL),
    ("norm_eps", 0.5, ALL),
    ("final_norm", False, ALL),
    ("first_norm", False, ALL),
    ("positions", "sinusoidal_halves", ALL),
    ("positions", "learned", ALL),
    ("positions", "rope", ALL),
    ("positions", "alibi", ALL),
    ("positions", "relative", ALL),
    ("positions", "none", ALL),
    ("activation", "gelu_tanh", ("encoder",)),
    ("activation", "quick_gelu", ("encoder",)),
    ("activation", "relu", ALL),
    ("activation", "relu_squared", ("encoder",)),
    ("activation", "silu", ("encoder",)),
    ("activation", "swiglu", ("encoder",)),
    ("activation", "geglu", ALL),
    ("activation", "geglu_tanh", ("encoder",)),
    ("activation", "quick_geglu", ("encoder",)),
    ("activation", "reglu", ("encoder",)),
    ("use_bias", False, ALL),
    ("k_bias", False, ALL),
    ("query_scale", 1.0, ALL),
    ("window", 2, ALL),
    ("qk_norm", True, ALL),
    ("gate", "output", ALL),
    ("gate", "value", ("encoder",)),
    ("layer_scale", 0.5, ALL),
    ("scale_embeddings", True, ALL),
    ("tie_embeddings", True, DECODERS),
    ("num_experts", 3, ALL),
    ("attention", "linear", ALL),
]
UNCHANGED = {
    "attention_implementation": ("reference", ENCODERS),
    "attention_block_size": (3, ENCODERS),
    "unroll": (2, ENCODERS),
    "cache_max_len": (9, ("decoder",)),
}
ELSEWHERE = {
    "max_len": "test_the_longest_sequence",
    "dropout_rate": "test_dropout",
    "drop_path_rate": "test_drop_path",
    "rope_theta": "test_rope_theta",
    "rope_local_theta": "test_layers_of_two_types",
    "layer_types": "test_layers_of_two_types",
    "position_offset": "test_offset_and_uncounted_positions",
    "uncounted_token_id": "test_offset_and_uncounted_positions",
    "relative_buckets": "test_relative_bias",
    "relative_max_distance": "test_relative_bias",
    "experts_per_token": "test_experts",
    "expert_capacity_factor": "test_experts",
    "linear_chunk_size": "test_linear_attention",
    "remat": "test_remat_changes_what_is_kept",
}


def shapes(tree):
    paths, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(tree, eqx.is_array))
    return {jax.tree_util.keystr(path): x.shape for path, x in paths}


@pytest.mark.parametrize(("field", "value", "kinds"), CHANGES, ids=lambda x: str(x))
def test_field_changes_the_program(field, value, kinds):
    for kind in kinds:
        assert program(kind, TINY.replace(**{field: value})) != program(kind, TINY)


@pytest.mark.slow
@pytest.mark.parametrize(("field", "value", "kinds"), CHANGES, ids=lambda x: str(x))
def test_field_changes_the_result(field, value, kinds):
    for kind in kinds:
        config = TINY.replace(**{field: value})
        changed, plain = run(kind, config), run(kind, TINY)
        assert jnp.isfinite(changed).all()
        # Biases are zero to begin with: there the change is in what is built.
        other_parameters = shapes(build(kind, config)) != shapes(build(kind, TINY))
        assert other_parameters or float(jnp.abs(changed - plain).max()) > 1e-5


@pytest.mark.parametrize("field", UNCHANGED)
def test_field_changes_how_it_is_computed(field):
    value, kinds = UNCHANGED[field]
    for kind in kinds:
        config = TINY.replace(**{field: value})
        close(run(kind, config), run(kind, TINY), 1e-4)
        if field == "cache_max_len":
            assert build("decoder", config).init_cache().valid.shape == (value,)
        else:
            assert program(kind, config) != program(kind, TINY)


def test_no_field_is_forgotten():
    known = {field for field, _, _ in CHANGES} | UNCHANGED.keys() | ELSEWHERE.keys()
    assert known == {field.name for field in dataclasses.fields(TransformerConfig)}
    assert set(ELSEWHERE.values()) <= set(globals())


def test_every_documented_value_is_tried():
    tried = {(field, value) for field, value, _ in CHANGES}
    for field in dataclasses.fields(TransformerConfig):
        for value in getattr(field.type, "__args__", ()):
            if isinstance(value, str) and field.name not in UNCHANGED | ELSEWHERE:
                assert (field.name, value) in tried or value == getattr(TINY, field.name)


def test_the_longest_sequence():
    config = TINY.replace(max_len=6)
    for kind in ("encoder", "decoder", "both"):
        with pytest.raises(ValueError, match="max_len=6"):
            call(kind, build(kind, config))
    with pytest.raises(ValueError, match=r"=9 is more than max_len=6"):
        build("decoder", config).init_cache(9)


def test_dropout(getkey):
    config = TINY.replace(dropout_rate=0.4)
    for kind in ("encoder", "decoder", "both"):
        model = build(kind, config)
        with pytest.raises(RuntimeError):
            call(kind, model)
        compiled = eqx.filter_jit(lambda model, key, kind=kind: call(kind, model, key=key))
        a, b, again = (compiled(model, jr.key(i)) for i in (1, 2, 1))
        assert not jnp.allclose(a, b)
        close(a, again)
        close(_compiled(kind, eqx.nn.inference_mode(model)), run(kind, TINY))


def test_attention_weights_are_dropped():
    """Nothing else is left that could be: the branches' dropout is taken out."""
    model = build("encoder", TINY.replace(dropout_rate=0.5))

    def is_dropout(x):
        return isinstance(x, eqx.nn.Dropout)

    model = jax.tree.map(
        lambda x: eqx.nn.Dropout(0.0) if is_dropout(x) else x, model, is_leaf=is_dropout
    )
    assert not jnp.allclose(model(SOURCE, key=jr.key(0)), model(SOURCE, key=jr.key(1)))


def test_drop_path():
    model = build("encoder", TINY.replace(drop_path_rate=0.6, num_layers=3))
    residual = model.stack.blocks.attention_residual
    close(residual.drop_path.rate, jnp.asarray([0.0, 0.3, 0.6]))
    with pytest.raises(RuntimeError, match="DropPath"):
        model(SOURCE)
    outs = jax.jit(jax.vmap(lambda key: model(SOURCE, key=key)))(jr.split(jr.key(0), 64))
    kept = {tuple(np.round(np.asarray(x).ravel()[:4], 4)) for x in outs}
    assert 4 < len(kept) <= 16
    close(eqx.nn.inference_mode(model)(SOURCE), run("encoder", TINY.replace(num_layers=3)))


def test_rope_theta():
    rope = TINY.replace(positions="rope")
    for kind in ("encoder", "decoder", "both"):
        changed = run(kind, rope.replace(rope_theta=5.0))
        assert not jnp.allclose(changed, run(kind, rope), atol=1e-4)


def test_layers_of_two_types():
    """Global and sliding layers in turns, each with its own wavelengths."""
    config = TINY.replace(
        positions="rope", num_layers=4, window=2, layer_types=("global", "sliding")
    )
    encoder = build("encoder", config)
    assert isinstance(encoder.stack, Stack) and len(encoder.stack.blocks.blocks) == 2
    masks = [block.attention.mask for block in encoder.stack.blocks.blocks]
    assert masks == [None, SlidingWindow(1, 1)]
    sliding = run("encoder", config.replace(layer_types="sliding"))
    close(sliding, run("encoder", config.replace(layer_types=None)))
    assert not jnp.allclose(run("encoder", config), sliding, atol=1e-4)
    everywhere = config.replace(window=None, layer_types="global")
    close(run("encoder", everywhere), run("encoder", config.replace(window=None, layer_types=None)))
    local = config.replace(rope_local_theta=3.0)
    thetas = [b.attention.rope.theta for b in build("encoder", local).stack.blocks.blocks]
    assert thetas == [10_000.0, 3.0]
    for kind in ("decoder", "both"):
        got = _chunked_decoding(build(kind, local), kind, [3], 12, 2)
        close(got, run(kind, local), 2e-5)


def test_offset_and_uncounted_positions():
    learned = TINY.replace(positions="learned", pad_token_id=None)
    shifted = learned.replace(position_offset=2)
    plain, moved = build("encoder", learned), build("encoder", shifted)
    assert moved.embedding.positions.table.weight.shape == (26, 8)
    rows = moved.embedding.positions.table.weight[2:]
    plain = eqx.tree_at(lambda m: m.embedding.positions.table.weight, plain, rows)
    close(plain(SOURCE), moved(SOURCE))
    # Zeros take no position, wherever they are, and are at the row before the first.
    skipping = build("encoder", shifted.replace(uncounted_token_id=0))
    tokens = jnp.asarray([0, 3, 0, 9, 1, 0])
    close(skipping(tokens), moved(tokens, positions=jnp.asarray([-1, 0, -1, 1, 2, -1])))


def test_relative_bias():
    config = TINY.replace(positions="relative", relative_buckets=8, relative_max_distance=7)
    for kind in ("encoder", "decoder", "both"):
        changed = run(kind, config.replace(relative_max_distance=24))
        wider = build(kind, config.replace(relative_buckets=10))
        assert shapes(wider) != shapes(build(kind, config))
        # The tables are small to begin with.
        assert not jnp.allclose(changed, run(kind, config), atol=1e-6)
    both = build("both", config)
    assert both.encoder.score_mod.bidirectional and not both.decoder.score_mod.bidirectional


def test_experts():
    config = TINY.replace(num_experts=4)
    assert not jnp.allclose(
        run("encoder", config), run("encoder", config.replace(experts_per_token=3)), atol=1e-4
    )
    tight = config.replace(expert_capacity_factor=0.3)
    assert not jnp.allclose(run("encoder", config), run("encoder", tight), atol=1e-4)
    loss = eqx.filter_jit(eqx.filter_grad(lambda model: (model(SOURCE) ** 3).sum()))
    gradient = loss(build("encoder", config)).stack.blocks.mlp
    assert (gradient.router.weight != 0).any()
    assert (gradient.experts.up_proj.weight != 0).any()


def test_router_statistics_come_out():
    config = TINY.replace(num_experts=4, experts_per_token=2)
    out, stats = eqx.filter_jit(lambda m: m.apply_with_stats(SOURCE, TARGET))(build("both", config))
    close(out, run("both", config))
    for of_stack in stats:
        assert of_stack.load.shape == (2, 4)
        close(of_stack.load.sum(axis=1), jnp.ones(2))
        assert (of_stack.load_balance_loss > 0).all()
    assert build("encoder", TINY).apply_with_stats(SOURCE)[1] is None


def test_linear_attention():
    config = TINY.replace(attention="linear", num_kv_heads=1)
    assert program("decoder", config) != program("decoder", config.replace(linear_chunk_size=4))
    close(run("decoder", config), run("decoder", config.replace(linear_chunk_size=4)))
    got = _chunked_decoding(build("decoder", config), "decoder", [3, 4], 12, 2)
    close(got, run("decoder", config), 2e-5)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_what_is_kept(remat):
    def gradient(config):
        model = build("encoder", config)

        def loss(model):
            return (model(SOURCE) ** 3).sum()

        return eqx.filter_make_jaxpr(eqx.filter_grad(loss))(model)[0]

    plain, kept = (str(gradient(c)) for c in (TINY, TINY.replace(remat=remat)))
    assert "remat" not in plain and "remat" in kept


# --- Meaning --------------------------------------------------------------------------------------


def test_windows_look_both_ways_in_encoders_and_back_in_decoders():
    encoder = build("encoder", TINY.replace(window=3))
    assert str(encoder.stack.blocks.attention.mask) == str(SlidingWindow(2, 2))
    both = build("both", TINY.replace(window=3))
    assert str(both.encoder.blocks.attention.mask) == str(SlidingWindow(2, 2))
    assert str(both.decoder.blocks.attention.mask) == str(SlidingWindow(2, 0))

    # Attention to the source sees all of it, whatever the window.
    def far(source):
        return both(source, TARGET)[-1]

    changed = SOURCE.at[0].set(8)
    assert not jnp.allclose(far(SOURCE), far(changed), atol=1e-5)
    assert build("decoder", TINY).stack.blocks.attention.mask == Causal()


def test_padding_is_nobodys_business():
    longer = jnp.concatenate([SOURCE, jnp.zeros(5, SOURCE.dtype)])
    encoder = build("encoder", TINY)
    close(encoder(longer)[:7], encoder(SOURCE)[:7])
    both = build("both", TINY)
    close(both(longer, TARGET), both(SOURCE, TARGET))
    decoder = build("decoder", TINY)
    bare = build("decoder", TINY.replace(pad_token_id=None))
    valid = Padding(TARGET != 0)
    close(decoder(TARGET), bare(TARGET, mask=valid))
    # Poisoned weights of the padding token reach nobody else.
    poisoned = eqx.tree_at(
        lambda m: m.embedding.embedding.weight, encoder, replace_fn=lambda w: w.at[0].set(jnp.nan)
    )
    close(poisoned(SOURCE)[:7], encoder(SOURCE)[:7])


def test_pool():
    x = jnp.asarray([[1.0, 2.0], [3.0, 6.0], [jnp.nan, 5.0]])
    valid = jnp.asarray([True, True, False])
    close(pool(x, valid), jnp.asarray([2.0, 4.0]))
    close(pool(x, how="first"), x[0])
    close(pool(x[:2]), jnp.asarray([2.0, 4.0]))
    assert jnp.isfinite(jax.grad(lambda x: pool(x, valid).sum())(x)).all()
    assert pool(x.astype(jnp.bfloat16), valid).dtype == jnp.bfloat16


def test_heads():
    longer = jnp.concatenate([SOURCE, jnp.zeros(3, SOURCE.dtype)])
    for pooling in ("first", "mean"):
        model = SequenceClassifier(TINY, 3, pooling=pooling, key=jr.key(0))
        assert model(SOURCE).shape == (3,)
        close(model(SOURCE), model(longer))
    assert TokenClassifier(TINY, 4, key=jr.key(0))(SOURCE).shape == (9, 4)
    assert TokenClassifier(TINY, key=jr.key(0))(SOURCE).shape == (9, 11)
    tied = TokenClassifier(TINY.replace(tie_embeddings=True), key=jr.key(0))
    assert tied.head is None
    close(tied(SOURCE), tied.encoder(SOURCE) @ tied.encoder.embedding.embedding.weight.T)


# --- The cache is the forward ---------------------------------------------------------------------

POSITIONS = ["sinusoidal", "learned", "rope", "alibi", "relative", "none"]


@eqx.filter_jit
def _compiled_extend(model, tokens, cache, length):
    return model.extend(tokens, cache, length=length)


def _chunked_decoding(model, kind, cuts, cache_len, padded):
    """Logits by prefill and decoding in chunks, some of them padded to a longer one."""
    if kind == "decoder":
        cache = model.init_cache(cache_len)
    else:
        cache = model.init_cache(SOURCE, cache_len)
    eqx.filter_jit(lambda tokens, cache, length: model.extend(tokens, cache, length=length))
    outs = []
    for chunk in jnp.split(TARGET, cuts):
        if not len(chunk):
            continue
        tokens = jnp.concatenate([chunk, jnp.full(padded, 7, chunk.dtype)])
        length = jnp.asarray(len(chunk)) if padded else None
        out, cache = _compiled_extend(model, tokens, cache, length)
        outs.append(out[: len(chunk)])
    assert int(cache.length) == len(TARGET)
    return jnp.concatenate(outs)


@hypothesis.settings(max_examples=8, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    st.sampled_from(["decoder", "both"]),
    st.sampled_from(POSITIONS),
    st.sampled_from([None, 1, 3]),
    st.lists(st.integers(0, len(TARGET)), max_size=2),
    st.sampled_from([0, 2]),
)
def test_cache_is_the_forward(kind, positions, window, cuts, padded):
    _check_cache(kind, positions, window, cuts, padded)


@pytest.mark.slow
@hypothesis.settings(max_examples=60, deadline=None, database=None)
@hypothesis.given(
    st.sampled_from(["decoder", "both"]),
    st.sampled_from(POSITIONS),
    st.sampled_from([None, 1, 3]),
    st.lists(st.integers(0, len(TARGET)), max_size=3),
    st.sampled_from([0, 2]),
)
def test_cache_is_the_forward_at_length(kind, positions, window, cuts, padded):
    _check_cache(kind, positions, window, cuts, padded)


def _check_cache(kind, positions, window, cuts, padded):
    config = TINY.replace(positions=positions, window=window, num_kv_heads=1)
    model = build(kind, config)
    got = _chunked_decoding(model, kind, sorted(cuts), 12, padded)
    close(got, run(kind, config), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["post", "sandwich"])
def test_cache_is_the_forward_for_every_layout(layout):
    for kind in ("decoder", "both"):
        config = TINY.replace(layout=layout, gate="output", num_experts=3, qk_norm=True)
        got = _chunked_decoding(build(kind, config), kind, [3, 4, 5], 12, 0)
        close(got, run(kind, config), 2e-5)


def test_the_source_is_projected_once_and_not_copied():
    model = build("both", TINY)
    cache = model.init_cache(SOURCE)
    memory = cache.layers.memory
    assert memory.k.shape == (2, len(SOURCE), 2, 4)
    text = str(jax.make_jaxpr(lambda t, c: model.extend(t, c))(TARGET[:1], cache))
    assert text.count("2,9,2,4") <= 4  # two arguments, handed on to the scan
    _, after = model.extend(TARGET[:1], cache)
    assert after.layers.memory.k is memory.k


def test_overflow_is_an_error():
    model = build("decoder", TINY)
    with pytest.raises(ValueError, match="max_len=4"):
        model.extend(TARGET, model.init_cache(4))


# --- Transformations ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["encoder", "decoder", "both"])
def test_derivatives_and_batches(kind, x64):
    config = TINY.replace(positions="rope", dropout_rate=0.0)

    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, tree)

    model = wide(build(kind, config))
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    tangent = jax.tree.map(jnp.cos, arrays)

    @jax.jit
    def everything(arrays, tangent):
        def loss(arrays):
            out = call(kind, eqx.combine(arrays, static))
            return (jnp.sin(out) * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum()

        gradient = jax.grad(loss)(arrays)
        slope = jax.jvp(loss, (arrays,), (tangent,))[1]
        second = jax.jvp(jax.grad(loss), (arrays,), (tangent,))[1]
        step = 1e-5
        near = [jax.tree.map(lambda x, t, s=s: x + s * step * t, arrays, tangent) for s in (1, -1)]
        slopes = [jax.grad(loss)(x) for x in near]
        difference = jax.tree.map(lambda a, b: (a - b) / (2 * step), *slopes)
        values = (loss(near[0]) - loss(near[1])) / (2 * step)
        return gradient, slope, second, difference, values

    gradient, slope, second, difference, values = everything(arrays, tangent)
    dot = sum(
        jnp.vdot(a, b)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(tangent), strict=True)
    )
    np.testing.assert_allclose(slope, dot, rtol=1e-9)
    np.testing.assert_allclose(slope, values, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(second), jax.tree.leaves(difference), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    tokens = jnp.stack([SOURCE, SOURCE[::-1]])
    if kind == "encoder":
        each = jnp.stack([model(row) for row in tokens])
        np.testing.assert_allclose(jax.jit(jax.vmap(model))(tokens), each, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "both"])
def test_bfloat16(kind):
    model = build(kind, TINY.replace(positions="rope"))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, model)
    out, exact = call(kind, narrow), call(kind, model)
    assert out.dtype == jnp.bfloat16
    error = jnp.abs(out.astype(jnp.float32) - exact).max()
    assert error < 0.1 * jnp.abs(exact).max()


def test_bfloat16_positions_beyond_a_thousand():
    """Float32 and bfloat16 see the same positions, not those rounded to a multiple of eight."""
    config = TINY.replace(positions="rope", num_layers=1, max_len=4096, pad_token_id=None)
    model = build("encoder", config)
    near = jnp.arange(len(SOURCE), dtype=jnp.int32)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, model)
    for shift in (0, 1001, 4001):
        out = narrow(SOURCE, positions=near + shift).astype(jnp.float32)
        exact = model(SOURCE, positions=near + shift)
        assert jnp.abs(out - exact).max() < 0.06 * jnp.abs(exact).max()


# --- Bad input ------------------------------------------------------------------------------------

WRONG = {
    "vocab_size": (0, "vocab_size=0"),
    "d_model": (9, "d_model=9 is not a multiple of num_heads=2"),
    "num_kv_heads": (3, "num_heads=2 is not a multiple of num_kv_heads=3"),
    "window": (0, "window=0"),
    "dropout_rate": (1.0, "dropout_rate=1.0"),
    "drop_path_rate": (-0.1, "drop_path_rate=-0.1"),
    "pad_token_id": (11, "pad_token_id=11"),
    "cache_max_len": (25, "cache_max_len=25 is more than max_len=24"),
    "experts_per_token": (5, "experts_per_token=5"),
    "layout": ("inside", "'pre' or 'post'"),
    "positions": ("rotary", "'rope'"),
    "norm": ("batch", "'layer'"),
    "activation": ("tanh", "'relu'"),
    "layer_scale": (-1.0, "layer_scale=-1.0"),
    "norm_eps": (0.0, "norm_eps=0.0"),
    "d_embedding": (0, "d_embedding=0"),
    "num_decoder_heads": (3, "d_model=8 is not a multiple of num_decoder_heads=3"),
    "uncounted_token_id": (3, "position_offset=0 must be at least 1"),
    "position_offset": (2, "positions='sinusoidal' has none"),
    "rope_local_theta": (7.0, "no meaning for positions='sinusoidal'"),
    "layer_types": ("sliding", "window=None and layer_types='sliding' do not fit"),
    "first_norm": (False, "layout='post' does not have"),
}


@pytest.mark.parametrize("field", WRONG)
def test_wrong_values_are_refused(field):
    value, message = WRONG[field]
    extra = {"num_experts": 4} if field == "experts_per_token" else {}
    extra = {"layout": "post"} if field == "first_norm" else extra
    with pytest.raises(ValueError, match=message):
        TINY.replace(**{field: value}, **extra)


@pytest.mark.parametrize("field", ["window", "gate", "attention_implementation", "positions"])
def test_what_linear_attention_has_not_is_refused(field):
    value = {"window": 3, "gate": "value", "attention_implementation": "chunked"}
    with pytest.raises(ValueError, match=f"(?s){field}.*attention='linear'"):
        TINY.replace(attention="linear", **{field: value.get(field, "alibi")})


def test_wrong_calls_say_what_to_do():
    encoder, both = build("encoder", TINY), build("both", TINY)
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        encoder(SOURCE[None])
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        both(SOURCE[None], TARGET)
    with pytest.raises(ValueError, match="Source"):
        both.decoder(jnp.ones((3, 8)))
    with pytest.raises(ValueError, match="context"):
        encoder.stack(jnp.ones((3, 8)), context=1)
    with pytest.raises(ValueError, match="init_cache"):
        cache = both.init_cache(SOURCE)
        both.decoder.extend(jnp.ones((1, 8)), cache.layers, context=both.encode(SOURCE))
    odd = {"positions": "rope", "head_dim": 3}
    with pytest.raises(ValueError, match="head_dim=3 must be even"):
        TINY.replace(**odd)
    for name, value in (("num_token_types", 2), ("pooler", True)):
        for kind in ("decoder", "both"):
            with pytest.raises(ValueError, match=f"{name}={value} has no meaning here"):
                build(kind, TINY.replace(**{name: value}))
    with pytest.raises(ValueError, match=r"positions='relative' needs layers .* all alike"):
        TINY.replace(positions="relative", first_norm=False)
    with pytest.raises(ValueError, match=r"drop_path_rate=0\.1 needs layers .* all alike"):
        TINY.replace(drop_path_rate=0.1, window=2, layer_types=("global", "sliding"))
    with pytest.raises(ValueError, match="d_embedding=4 and d_model=8 differ"):
        build("decoder", TINY.replace(d_embedding=4, tie_embeddings=True))
    with pytest.raises(ValueError, match="no vectors for them"):
        encoder(SOURCE, token_types=SOURCE)
    with pytest.raises(ValueError, match="there is no pooler"):
        encoder.pool(jnp.ones((3, 8)))
    with pytest.raises(ValueError, match="d_model=9 must be even"):
        TINY.replace(d_model=9, num_heads=3)
