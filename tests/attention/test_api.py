"""The public functions: what they refuse, what they explain, and what else they return."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_transformer.attention as attn
from eqx_transformer.attention._inputs import make_inputs

from .conformance import (
    CHUNKED_SMALL,
    NAMED,
    REFERENCE,
    assert_close,
    compiled,
    definition,
)


def _x(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def _int(*values):
    return jnp.asarray(values, jnp.int32)


Q, K = _x(5, 4, 3), _x(6, 2, 3)

# Every message says what is wrong, the two numbers, and what to do.
ERRORS = {
    "batched q": ((_x(2, 5, 4, 3), K, K), {}, r"q has 4 axes \(2, 5, 4, 3\).*jax.vmap"),
    "flat k": ((Q, _x(6, 6), K), {}, r"k has 2 axes \(6, 6\)"),
    "integer v": ((Q, K, _x(6, 2, 3, dtype=jnp.int32)), {}, r"v has dtype int32.*not floating"),
    "mixed dtypes": (
        (Q, K, _x(6, 2, 3, dtype=jnp.bfloat16)),
        {},
        r"dtypes float32, float32 and bfloat16; cast them",
    ),
    "head_dim": ((Q, _x(6, 2, 4), K), {}, r"q has head_dim=3 but k has head_dim=4"),
    "kv_seq": ((Q, K, _x(7, 2, 3)), {}, r"kv_seq=6.*kv_seq=7.*agree"),
    "kv_heads": ((Q, K, _x(6, 1, 3)), {}, r"kv_heads=2\].*kv_heads=1\].*agree"),
    "group": ((Q, _x(6, 3, 3), _x(6, 3, 3)), {}, r"heads=4 is not a multiple of kv_heads=3"),
    "more kv_heads": ((Q, _x(6, 8, 3), _x(6, 8, 3)), {}, r"heads=4 is not a multiple.*=8"),
    "no kv_heads": ((Q, _x(6, 0, 3), _x(6, 0, 3)), {}, r"heads=4 is not a multiple.*=0"),
    "sinks": ((Q, K, K), {"sinks": _x(2)}, r"sinks has shape \(2,\) but there are heads=4"),
    "q_positions": ((Q, K, K), {"q_positions": _int(1, 2)}, r"q_positions.*\[2\].*5 positions"),
    "kv_positions": ((Q, K, K), {"kv_positions": _x(6)}, r"kv_positions is float32.*integers"),
    "mask": ((Q, K, K), {"mask": jnp.ones((5, 6), bool)}, r"mask must be a mask.*Dense\("),
    "short mask": (
        (Q, K, K),
        {"mask": attn.Padding(jnp.ones(4, bool))},
        r"covers 4 kv positions but kv_seq=6; make it as long",
    ),
    "rate": ((Q, K, K), {"dropout_rate": 1.0}, r"dropout_rate=1.0 must be at least 0 and below 1"),
    "key": ((Q, K, K), {"dropout_rate": 0.5}, r"dropout_rate=0.5 needs a dropout_key"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    args, options, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"(?s)attention: .*{message}"):
        make_inputs(*args, **options)


def test_errors_come_at_trace_time():
    with pytest.raises(ValueError, match="heads=4"):
        jax.eval_shape(make_inputs, Q, _x(6, 3, 3), _x(6, 3, 3))


def test_signatures_agree():
    """The options are the same wherever they are accepted, and in the same order."""
    full = inspect.signature(attn.dot_product_attention).parameters
    for function in (attn.attention_and_lse, attn.explain_attention):
        assert list(inspect.signature(function).parameters) == list(full)
    some = inspect.signature(attn.attention_weights).parameters
    assert list(some) == [name for name in full if name in some]
    assert not any(x.kind is inspect.Parameter.VAR_KEYWORD for x in full.values())


# --- Explanations --------------------------------------------------------------------------------


def test_explain_says_who_and_why():
    one, many = _x(1, 4, 3), _x(4096, 4, 3)
    few = attn.explain_attention(one, many, many)
    assert few.chosen == "reference"
    lots = attn.explain_attention(many, many, many)
    assert lots.chosen == "chunked" and "MiB" in lots.reasons["reference"]
    asked = attn.explain_attention(one, one, one, implementation="chunked")
    assert asked.chosen == "chunked" and "asked for" in asked.reasons["chunked"]
    for explanation in (few, lots, asked):
        assert set(explanation.reasons) == set(attn.Implementation.__args__)
        assert all(explanation.reasons.values())
        text = str(explanation)
        assert explanation.chosen in text.splitlines()[0]
        assert all(reason in text for reason in explanation.reasons.values())


def test_explain_needs_shapes_only():
    shape = jax.ShapeDtypeStruct((4096, 4, 3), jnp.float32)
    chosen = []

    def trace(q):
        chosen.append(attn.explain_attention(q, q, q, mask=attn.Causal()).chosen)

    jax.eval_shape(trace, shape)
    assert chosen == ["chunked"]


def test_what_is_explained_is_what_runs():
    """Chunked loops over tiles, the reference does not."""
    for seq in (3, 700):
        q = _x(seq, 1, 2)
        text = jax.jit(attn.dot_product_attention).lower(q, q, q).as_text()
        assert ("stablehlo.while" in text) == (attn.explain_attention(q, q, q).chosen == "chunked")


def test_implementations_by_name_are_those_documented():
    q = _x(3, 1, 2)
    assert set(attn.Implementation.__args__) == {"reference", "chunked", "cudnn", "pallas"}
    for name in ("reference", "chunked", "pallas"):
        attn.dot_product_attention(q, q, q, implementation=name)
    with pytest.raises(ValueError, match="cannot compute this call"):
        attn.dot_product_attention(q, q, q, implementation="cudnn")


# --- Weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "some_nothing", "sinks_causal_mod", "empty_slots"])
def test_attention_weights(name):
    case = NAMED[name]
    args, options = case.args("float32"), case.options()
    mod, sinks = case.mod.build(args["mod"]), args.get("sinks")
    weights = attn.attention_weights(args["q"], args["k"], score_mod=mod, sinks=sinks, **options)
    assert weights.shape == (case.heads, case.q_seq, case.kv_seq)
    allowed = case.allowed()
    assert (np.asarray(weights)[:, ~allowed] == 0).all() and (weights >= 0).all()
    rows = np.asarray(weights.sum(axis=-1))
    some = allowed.any(axis=1)
    assert (rows[:, ~some] == 0).all()
    if sinks is None:
        np.testing.assert_allclose(rows[:, some], 1, rtol=1e-5)
    else:
        _, lse = definition(case, args)
        np.testing.assert_allclose(rows, 1 - np.exp(np.asarray(sinks)[:, None] - lse.T), rtol=1e-4)
    v = jnp.repeat(args["v"], case.heads // case.kv_heads, axis=1)
    out = jnp.einsum("hqk,khd->qhd", weights, v)
    assert_close(out, REFERENCE.of(case, args)[0], jnp.float32)


def test_attention_weights_are_wide():
    q = _x(3, 1, 2, dtype=jnp.bfloat16)
    assert attn.attention_weights(q, q).dtype == jnp.float32


# --- Merging -------------------------------------------------------------------------------------


def _merge(parts):
    lse = jnp.stack([lse for _, lse in parts])
    total = jax.nn.logsumexp(lse, axis=0)
    share = jnp.exp(lse - jnp.where(jnp.isneginf(total), 0, total)[None])
    return sum((out * w[..., None] for (out, _), w in zip(parts, share, strict=True))), total


@pytest.mark.parametrize("implementation", [REFERENCE, CHUNKED_SMALL], ids=str)
@pytest.mark.parametrize("name", ["causal", "relative", "some_nothing"])
def test_two_halves_of_the_keys_make_the_whole(name, implementation):
    """By their log-sum-exps, also where a query sees keys in one half only, or in none."""
    case = NAMED[name]
    args = case.args("float32")
    qkv = (args["q"], args["k"], args["v"])
    positions = jnp.arange(case.kv_seq, dtype=jnp.int32)
    options = case.options() | {"score_mod": case.mod.build(args["mod"])}

    def part(keys):
        return implementation(
            qkv[0], qkv[1][keys], qkv[2][keys], kv_positions=positions[keys], **options
        )

    @compiled
    def run():
        # Keys may come in any order: positions say where they are.
        permuted = part(np.random.default_rng(0).permutation(case.kv_seq))
        return part(slice(None)), _merge([part(slice(0, 5)), part(slice(5, None))]), permuted

    whole, halves, permuted = run()
    assert_close(halves, whole, jnp.float32)
    assert_close(permuted, whole, jnp.float32)


@pytest.mark.parametrize("implementation", [REFERENCE, CHUNKED_SMALL], ids=str)
@pytest.mark.parametrize("sizes", [(5, 1, 7), pytest.param((1,) * 13, marks=pytest.mark.slow)])
def test_prefill_in_chunks_is_the_whole(implementation, sizes):
    x = jax.random.normal(jax.random.key(0), (13, 2, 3))
    mask = attn.Causal() & attn.SlidingWindow(4, None)
    whole = implementation(x, x, x, mask=mask)
    run = compiled(lambda q, kv, i: implementation(q, kv, kv, mask=mask, q_positions=i))
    starts = np.cumsum((0, *sizes))
    # The cache is as long as it will ever get; what is not written yet is something else.
    parts = []
    for start, end in itertools.pairwise(starts):
        cache = x.at[end:].set(1e3)
        positions = jnp.arange(start, end, dtype=jnp.int32)
        part = run(x[start:end], cache, positions)
        parts.append(part)
    joined = jax.tree.map(lambda *y: jnp.concatenate(y), *parts)
    assert_close(joined, whole, jnp.float32)
