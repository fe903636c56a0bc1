"""The law of caches: prefill in any parts and decoding give what one forward pass gives.

Hypothesis draws the model and the parts. Two rows are a batch, with left paddings and lengths of
their own; drafts of wrong tokens are appended and taken back.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from eqx_transformer.attention import Padding
from eqx_transformer.models import Llama, LlamaConfig, MLAConfig, MoEConfig
from eqx_transformer.nn import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    RingCache,
    YaRNScaling,
    _ring_cache,
    truncate,
)

ROWS, SEQ, VOCAB = 2, 12, 19

# Of the largest logit: a few dozen roundings, as there are sums on the way through two layers.
TOLERANCE = {"float64": 1e-13, "float32": 32 * 2.0**-23, "bfloat16": 8 * 2.0**-8}

TINY: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 16, "num_heads": 4, "max_len": SEQ}
MLA = MLAConfig(kv_rank=6, nope_head_dim=4, rope_head_dim=4, v_head_dim=5)
MOE = MoEConfig(num_experts=4, experts_per_token=2, d_expert=12)
SCALINGS = [
    LinearScaling(factor=2.0),
    Llama3Scaling(factor=4.0, original_max_len=8),
    YaRNScaling(factor=4.0, original_max_len=4, beta_fast=2.0),
    # Sequences that grow over `original_max_len` are the exception that is documented: here they
    # never do, or are longer from their first part on.
    DynamicScaling(factor=2.0, original_max_len=SEQ),
    LongRoPEScaling(
        short_factors=(1.0, 1.5), long_factors=(2.0, 3.0), factor=4.0, original_max_len=3
    ),
]


@pytest.fixture(autouse=True, scope="module")
def short_rings():
    """So that they come around within a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ring_cache, "_SPARE", 2)
        yield


@st.composite
def configs(draw, dtype):
    """Fields of a configuration: the matrix, but for what `test_what_the_matrix_leaves_out` has."""
    mla = draw(st.sampled_from([None, None, None, MLA]))
    positions = "rope"
    options = {}
    if mla is None:
        positions = draw(st.sampled_from(["rope", "alibi", "learned", "none"]))
        options = {
            "num_kv_heads": draw(st.sampled_from([4, 2, 1])),
            "sinks": draw(st.booleans()),
            "qk_norm": draw(st.booleans()),
        }
    if positions == "rope":
        choices = [None, *(x for x in SCALINGS if mla is None or not x.needs_length)]
        options["rope_scaling"] = draw(st.sampled_from(choices))
    window = draw(st.sampled_from([None, 2, 5]))
    if window is not None:
        types = ["sliding", ("sliding", "global"), ("global", "sliding")]
        options["layer_types"] = draw(st.sampled_from(types))
    # In bfloat16 a rounding changes which experts are chosen.
    experts = [None] if dtype == "bfloat16" else [None, MOE]
    return options | {
        "positions": positions,
        "window": window,
        "mla": mla,
        "moe": draw(st.sampled_from(experts)),
        "attention_soft_cap": draw(st.sampled_from([None, 1.5])),
        "document_start_id": draw(st.sampled_from([None, None, 3])),
        "param_dtype": dtype,
    }


# Parts of one token and of up to four; how many count, in every row; whether they are a draft.
COUNT = st.integers(0, 4)
PARTS = st.lists(st.tuples(st.sampled_from([1, 4]), COUNT, COUNT, st.booleans()), max_size=7)
PADDINGS = st.one_of(st.none(), st.tuples(st.integers(0, 5), st.integers(0, 5)))


def check(fields, parts, paddings, cache_dtype=None, seed=0):
    """Compares every part with the forward pass, or with one part where storage is rounded."""
    config = LlamaConfig(**TINY, num_layers=2, d_ff=24, **fields)
    with jax.enable_x64(config.param_dtype == "float64"):
        _check(model_of(config, seed), parts, paddings, cache_dtype, seed)


def model_of(config, seed):
    """A model whose norms and sinks are random too; without compiling what makes weights."""
    rng = np.random.default_rng(seed)

    def leaf(x):
        if not eqx.is_inexact_array(x) and not isinstance(x, jax.ShapeDtypeStruct):
            return x
        noise = rng.standard_normal(x.shape)
        one = 1 + 0.2 * noise if len(x.shape) < 3 else noise / np.sqrt(x.shape[-2])
        return jnp.asarray(one.astype(x.dtype))

    shapes = eqx.filter_eval_shape(Llama, config, key=jax.random.key(0))
    return jax.tree.map(leaf, shapes)


def _check(model, parts, paddings, cache_dtype, seed):
    config, rng = model.config, np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (ROWS, SEQ)).astype(np.int32)
    wrong = rng.integers(0, VOCAB, (ROWS, SEQ)).astype(np.int32)
    valid = None
    if paddings is not None:
        valid = np.arange(SEQ) >= np.asarray(paddings)[:, None]

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(None, 0, 0))
    def forward(model, tokens, valid):
        return model(tokens, mask=None if valid is None else Padding(valid))

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(None, 0, 0, 0, 0, 0))
    def extend(model, cache, kept, tokens, length, valid):
        mask = None if valid is None else Padding(valid)
        return model.extend(tokens, truncate(cache, kept), length=length, mask=mask)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(None, 0))
    def init(model, row):
        return model.init_cache(SEQ, cache_dtype)

    lengths = np.zeros(ROWS, np.int32)
    cache = init(model, lengths)
    if cache_dtype is None:
        wanted = forward(model, tokens, valid)
    else:
        wanted, _ = extend(model, cache, lengths, tokens, lengths + SEQ, valid)
    wanted = np.asarray(wanted, np.float64)
    tolerance = TOLERANCE[config.param_dtype] * np.abs(wanted).max()
    if paddings is not None and cache_dtype is None:
        _check_shifted(forward, model, tokens, paddings, wanted, tolerance)

    beyond = config.rope_scaling is not None and config.rope_scaling.needs_length
    begin = [(4, 4, 4, False)] if beyond else []
    for given_, *counts, draft in [*begin, *parts, *[(4, 4, 4, False)] * 3]:
        # A ring takes back no more than its spare places and one.
        most = min(given_, _ring_cache._SPARE + 1) if draft else given_
        counts = np.minimum(np.minimum(counts, most), SEQ - lengths).astype(np.int32)
        places = lengths[:, None] + np.arange(given_)
        source = wrong if draft else tokens
        part = np.take_along_axis(source, np.minimum(places, SEQ - 1), axis=1)
        logits, cache = extend(model, cache, lengths, part, counts, valid)
        if draft:
            continue
        for row in range(ROWS):
            got = np.asarray(logits[row, : counts[row]], np.float64)
            expected = wanted[row, lengths[row] : lengths[row] + counts[row]]
            np.testing.assert_allclose(got, expected, atol=tolerance, rtol=0)
        lengths = lengths + counts
    assert (lengths == SEQ).all()


def _check_shifted(forward, model, tokens, paddings, wanted, tolerance):
    """Padding on the left is as if it were not there, where positions are relative."""
    config = model.config
    scaling = config.rope_scaling
    if config.positions == "learned" or config.document_start_id is not None:
        return
    if scaling is not None and scaling.needs_length:
        return
    shifted = np.stack([np.roll(row, -p) for row, p in zip(tokens, paddings, strict=True)])
    alone = np.asarray(forward(model, shifted, np.ones((ROWS, SEQ), bool)), np.float64)
    for row, p in enumerate(paddings):
        np.testing.assert_allclose(wanted[row, p:], alone[row, : SEQ - p], atol=tolerance, rtol=0)


def law(max_examples):
    return settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # to make a failure smaller takes long
        suppress_health_check=list(HealthCheck),
    )


# Much at once, with rings that come around while drafts are taken back.
RING = {"window": 5, "layer_types": ("sliding", "global"), "attention_soft_cap": 1.5}
HARD = {
    "float64": RING | {"num_kv_heads": 2, "sinks": True, "qk_norm": True, "mla": None, "moe": MOE},
    "float32": {"mla": MLA, "window": 2, "document_start_id": 3, "moe": None},
    "bfloat16": RING | {"num_kv_heads": 1, "positions": "alibi", "mla": None, "moe": None},
}
HARD_PARTS = [(4, 4, 2, False), (4, 3, 1, True), (1, 1, 1, False), (4, 4, 3, False)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_cache_is_the_forward(dtype):
    @law(1)
    @given(configs(dtype), PARTS, PADDINGS)
    @example(HARD[dtype] | {"param_dtype": dtype}, HARD_PARTS, (2, 0))
    def run(fields, parts, paddings):
        check(fields, parts, paddings)

    run()


@pytest.mark.parametrize("cache_dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("max_examples", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_parts_do_not_matter_to_what_is_rounded(cache_dtype, max_examples):
    """A narrow cache is not the forward, but the same cache however it was filled."""

    @law(max_examples)
    @given(configs("float64"), PARTS, PADDINGS)
    def run(fields, parts, paddings):
        if cache_dtype == jnp.int8 and fields["mla"] is not None:
            fields = fields | {"mla": None}  # which has no such cache
        check(fields, parts, paddings, cache_dtype)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_cache_is_the_forward_in_more_cases(dtype):
    @law(14)
    @given(configs(dtype), PARTS, PADDINGS, st.integers(1, 1000))
    def run(fields, parts, paddings, seed):
        check(fields, parts, paddings, seed=seed)

    run()


def test_what_the_matrix_leaves_out():
    """Combinations that a configuration refuses."""
    for refused in [
        *({"mla": MLA, "positions": x} for x in ("alibi", "learned", "none")),
        *({"mla": MLA, **x} for x in ({"num_kv_heads": 2}, {"sinks": True}, {"qk_norm": True})),
        *({"positions": x, "rope_scaling": SCALINGS[0]} for x in ("alibi", "learned", "none")),
        {"layer_types": ("sliding", "global")},
    ]:
        with pytest.raises(ValueError):
            LlamaConfig(**TINY, **refused)
    for scaling in SCALINGS:
        if scaling.needs_length:
            with pytest.raises(ValueError, match="depends on the length"):
                Llama(LlamaConfig(**TINY, mla=MLA, rope_scaling=scaling), key=jax.random.key(0))


def test_rings_come_around():
    """What the law is to find in rings is in what it draws: they are shorter than sequences."""
    config = LlamaConfig(**TINY, num_layers=1, window=5)
    cache = eqx.filter_eval_shape(model_of(config, 0).init_cache).layers
    assert isinstance(cache, RingCache) and cache.positions.shape[-1] == 7 < SEQ
