"""Groups of tokens, patterns between them, and attention by patterns."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.test_util import check_grads

from eqx_transformer.attention import Causal, Padding, dot_product_attention
from eqx_transformer.nn import (
    AnchorBranch,
    AttentionPattern,
    AxialRoPE,
    MixedAttention,
    TokenSpec,
    cross_patterns,
    group_mask,
    joint_patterns,
    self_patterns,
)
from eqx_transformer.stacks import BlockSequence, Condition, Residual, Stack, TransformerBlock

D_MODEL, HEADS = 8, 2
SURFACE = AnchorBranch("surface", ("surface_queries",))
VOLUME = AnchorBranch("volume", ("volume_queries",))
BRANCHES = (SURFACE, VOLUME)
SIZES = {"surface": 3, "surface_queries": 5, "volume": 3, "volume_queries": 4}
TOKENS = tuple(TokenSpec(name, size) for name, size in SIZES.items())
SEQ = sum(SIZES.values())
CHAIN = (
    AttentionPattern(("surface",), ("surface", "volume_queries")),
    AttentionPattern(("volume", "surface_queries"), ("volume_queries", "surface")),
    AttentionPattern(("volume_queries",), ("surface_queries",)),
)
PATTERNS = {
    "self": self_patterns(BRANCHES),
    "cross": cross_patterns(BRANCHES),
    "joint": joint_patterns(BRANCHES),
    "chain": CHAIN,
}

# Eagerly, every operation would be compiled on its own.
extend = eqx.filter_jit(lambda layer, *args, **options: layer.extend(*args, **options))
call = eqx.filter_jit(lambda layer, *args, **options: layer(*args, **options))


def make(key, patterns, **options):
    return MixedAttention(D_MODEL, HEADS, patterns, key=key, **options)


def rows(name):
    names = list(SIZES)
    start = sum(SIZES[other] for other in names[: names.index(name)])
    return slice(start, start + SIZES[name])


def by_hand(layer, x, patterns, valid=None, coordinates=None):
    """Every token on its own, in float64 NumPy."""
    x = np.asarray(x, np.float64)
    q, k, v = (
        (x @ np.asarray(p.weight, np.float64)).reshape(SEQ, HEADS, -1)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    if coordinates is not None:
        q, k = (np.asarray(layer.rope(jnp.asarray(h), coordinates)) for h in (q, k))
    valid = np.ones(SEQ, bool) if valid is None else np.asarray(valid)
    out = np.zeros((SEQ, HEADS, D_MODEL // HEADS))
    for pattern in patterns:
        keys = np.concatenate([np.arange(SEQ)[rows(name)] for name in pattern.key_value_tokens])
        keys = keys[valid[keys]]
        for name in pattern.query_tokens:
            for i in np.arange(SEQ)[rows(name)]:
                for h in range(HEADS):
                    weights = np.exp(k[keys, h] @ q[i, h] / np.sqrt(D_MODEL // HEADS))
                    out[i, h] = weights @ v[keys, h] / weights.sum() if len(keys) else 0
    return out.reshape(SEQ, -1) @ np.asarray(layer.o_proj.weight, np.float64)


@pytest.mark.parametrize("as_mask", [False, True, None])
@pytest.mark.parametrize("name", PATTERNS)
def test_equals_the_formula(name, as_mask, getkey, x64):
    layer = make(getkey(), PATTERNS[name], rope=AxialRoPE(2), as_mask=as_mask)
    x, where = jr.normal(getkey(), (SEQ, D_MODEL)), jr.normal(getkey(), (SEQ, 2))
    valid = jnp.ones(SEQ, bool).at[jnp.asarray([1, 4, 14])].set(False)
    for flags in (None, valid):
        mask = None if flags is None else Padding(flags)
        out = call(layer, x, tokens=TOKENS, mask=mask, coordinates=where)
        expected = by_hand(layer, x, PATTERNS[name], flags, where)
        kept = np.ones(SEQ, bool) if flags is None else np.asarray(flags)
        np.testing.assert_allclose(out[kept], expected[kept], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["cross", "chain"])
def test_both_computations_have_the_same_derivatives(name, getkey, x64):
    """Values, tangents, gradients and Hessian-vector products, by coordinates and parameters."""
    key = getkey()
    x, ct = (jr.normal(getkey(), (SEQ, D_MODEL)) for _ in range(2))
    where, tangent = (jr.normal(getkey(), (SEQ, 2)) for _ in range(2))
    mask = Padding(jnp.ones(SEQ, bool).at[4].set(False))

    def derivatives(as_mask):
        options = {"rope": AxialRoPE(2), "qk_norm": True, "use_bias": True, "as_mask": as_mask}
        params, static = eqx.partition(make(key, PATTERNS[name], **options), eqx.is_inexact_array)
        leaves, treedef = jax.tree.flatten(params)
        tangents = [jr.normal(jr.key(i), p.shape, p.dtype) for i, p in enumerate(leaves)]

        def loss(leaves, where):
            model = eqx.combine(jax.tree.unflatten(treedef, leaves), static)
            return (model(x, tokens=TOKENS, mask=mask, coordinates=where) * ct).sum()

        @jax.jit
        def both(primals, tangents):
            grad = jax.grad(loss, argnums=(0, 1))
            return jax.jvp(loss, primals, tangents), jax.jvp(grad, primals, tangents)

        return jax.tree.leaves(both((leaves, where), (tangents, tangent)))

    for a, b in zip(derivatives(False), derivatives(True), strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_derivatives_are_those_of_differences(getkey, x64):
    layer = make(getkey(), PATTERNS["cross"], rope=AxialRoPE(2))
    x, where = jr.normal(getkey(), (SEQ, D_MODEL)), jr.normal(getkey(), (SEQ, 2))
    check_grads(
        jax.jit(
            lambda x, where: layer(jnp.asarray(x), tokens=TOKENS, coordinates=jnp.asarray(where))
        ),
        (x, where),
        order=2,
        rtol=1e-5,
    )


def test_equals_the_mask_over_all_tokens(getkey, x64):
    """Against the specification: dense attention with the mask that `group_mask` makes."""
    layer = make(getkey(), CHAIN)
    x = jr.normal(getkey(), (SEQ, D_MODEL))
    everything = (AttentionPattern(tuple(SIZES), tuple(SIZES)),)
    dense = make(
        jr.key(0),
        everything,
        attention_fn=_reference_with(group_mask(TOKENS, CHAIN)),
    )
    dense = eqx.tree_at(
        lambda m: (m.q_proj, m.k_proj, m.v_proj, m.o_proj),
        dense,
        (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj),
    )
    np.testing.assert_allclose(
        call(layer, x, tokens=TOKENS), call(dense, x, tokens=TOKENS), rtol=1e-9, atol=1e-10
    )


def _reference_with(allowed):
    def attend(q, k, v, *, mask, **options):
        assert mask is None
        return dot_product_attention(q, k, v, mask=allowed, implementation="reference", **options)

    return attend


def test_equal_shapes_are_one_call(getkey):
    """Two branches of equal sizes are batched, and patterns with equal keys are joined."""
    shapes = []

    def counted(q, k, v, **options):
        shapes.append((q.shape[0], k.shape[0]))
        return dot_product_attention(q, k, v, **options)

    x = jr.normal(getkey(), (SEQ, D_MODEL))
    equal = tuple(TokenSpec(name, 4 if "queries" in name else 3) for name in SIZES)
    layer = make(getkey(), PATTERNS["self"], as_mask=False, attention_fn=counted)
    layer(x[:14], tokens=equal)
    assert shapes == [(7, 3)]
    shapes.clear()
    layer(x, tokens=TOKENS)
    assert shapes == [(8, 3), (7, 3)]
    shapes.clear()
    each = [AttentionPattern((name,), ("surface", "volume")) for name in SIZES]
    make(getkey(), each, attention_fn=counted)(x, tokens=TOKENS)
    assert shapes == [(SEQ, 6)]
    shapes.clear()
    # Few scores and unequal shapes: one masked call.
    make(getkey(), PATTERNS["self"], attention_fn=counted)(x, tokens=TOKENS)
    assert shapes == [(SEQ, 6)]
    shapes.clear()
    many = tuple(TokenSpec(name, 60 + size) for name, size in SIZES.items())
    jax.eval_shape(
        lambda x: make(jr.key(0), PATTERNS["self"], attention_fn=counted)(x, tokens=many),
        jnp.zeros((4 * 60 + SEQ, D_MODEL)),
    )
    assert shapes == [(128, 63), (127, 63)]


@pytest.mark.parametrize(("name", "as_mask"), [("self", False), ("cross", True), ("joint", False)])
def test_cached_anchors_are_the_same(name, as_mask, getkey, x64):
    """Anchors once, then queries in chunks, with padding among the anchors."""
    layer = make(getkey(), PATTERNS[name], rope=AxialRoPE(2), qk_norm=True, as_mask=as_mask)
    x, where = jr.normal(getkey(), (SEQ, D_MODEL)), jr.normal(getkey(), (SEQ, 2))
    valid = jnp.ones(SEQ, bool).at[1].set(False)
    full = call(layer, x, tokens=TOKENS, mask=Padding(valid), coordinates=where)
    anchors = np.r_[rows("surface"), rows("volume")]
    out, cache = extend(
        layer,
        x[anchors],
        layer.init_cache(),
        tokens=(TokenSpec("surface", 3), TokenSpec("volume", 3)),
        mask=Padding(valid[anchors]),
        coordinates=where[anchors],
    )
    np.testing.assert_allclose(out, full[anchors], rtol=1e-9, atol=1e-10)
    assert sorted(cache.groups) == ["surface", "volume"]
    absent = (TokenSpec("volume", None), TokenSpec("surface", None))
    for queries in ("surface_queries", "volume_queries"):
        span = np.arange(SEQ)[rows(queries)]
        for chunk in (span[:1], span[1:], span[:0]):
            out, after = extend(
                layer,
                x[chunk],
                cache,
                tokens=(TokenSpec(queries, len(chunk)), *absent),
                coordinates=where[chunk],
            )
            np.testing.assert_allclose(out, full[chunk], rtol=1e-9, atol=1e-10)
            assert eqx.tree_equal(after, cache)


def test_cache_is_stored_in_its_dtype(getkey):
    layer = make(getkey(), PATTERNS["self"])
    x = jr.normal(getkey(), (3, D_MODEL))
    spec = (TokenSpec("surface", 3),)
    _, cache = extend(layer, x, layer.init_cache(dtype=jnp.bfloat16), tokens=spec)
    assert cache.groups["surface"].k.dtype == jnp.bfloat16
    out, _ = extend(
        layer, x, cache, tokens=(TokenSpec("surface_queries", 3), TokenSpec("surface", None))
    )
    assert out.dtype == x.dtype
    np.testing.assert_allclose(out, call(layer, x, tokens=spec), atol=2e-2)


def test_vmap_is_a_loop(getkey):
    layer = make(getkey(), CHAIN, rope=AxialRoPE(2))
    x, where = jr.normal(getkey(), (2, SEQ, D_MODEL)), jr.normal(getkey(), (2, SEQ, 2))
    valid = jr.bernoulli(getkey(), 0.7, (2, SEQ))

    def run(x, where, valid):
        return call(layer, x, tokens=TOKENS, mask=Padding(valid), coordinates=where)

    loop = jnp.stack([run(*args) for args in zip(x, where, valid, strict=True)])
    np.testing.assert_allclose(jax.vmap(run)(x, where, valid), loop, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("as_mask", [False, True])
def test_order_within_a_group_means_nothing(as_mask, getkey):
    layer = make(getkey(), CHAIN, as_mask=as_mask)
    x = jr.normal(getkey(), (SEQ, D_MODEL))
    order = np.concatenate(
        [np.random.default_rng(0).permutation(np.arange(SEQ)[rows(n)]) for n in SIZES]
    )
    out = call(layer, x[order], tokens=TOKENS)
    np.testing.assert_allclose(out, call(layer, x, tokens=TOKENS)[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("as_mask", [False, True])
def test_padding_reaches_nobody(as_mask, getkey):
    """What stands in padding, NaN included, changes no other token and no derivative."""
    layer = make(getkey(), PATTERNS["joint"] if not as_mask else CHAIN, as_mask=as_mask)
    x = jr.normal(getkey(), (SEQ, D_MODEL))
    valid = jnp.ones(SEQ, bool).at[jnp.asarray([2, 9])].set(False)

    def total(x):
        out = call(layer, x, tokens=TOKENS, mask=Padding(valid))
        return jnp.where(valid[:, None], out, 0), (jnp.where(valid[:, None], out, 0) ** 2).sum()

    bad = jnp.where(valid[:, None], x, jnp.nan)
    np.testing.assert_allclose(total(bad)[0], total(x)[0], rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda x: total(x)[1])(bad)
    expected = jax.grad(lambda x: total(x)[1])(x)
    kept = np.asarray(valid)
    np.testing.assert_allclose(gradient[kept], expected[kept], rtol=1e-5, atol=1e-5)


def test_dropout(getkey):
    x = jr.normal(getkey(), (SEQ, D_MODEL))
    for as_mask in (False, True):
        layer = make(getkey(), PATTERNS["self"], dropout_rate=0.5, as_mask=as_mask)
        with pytest.raises(RuntimeError, match="needs a key"):
            call(layer, x, tokens=TOKENS)
        a, b, again = (call(layer, x, tokens=TOKENS, key=jr.key(i)) for i in (0, 1, 0))
        assert not jnp.allclose(a, b)
        np.testing.assert_array_equal(a, again)
        sure = eqx.nn.inference_mode(layer)
        np.testing.assert_array_equal(
            call(sure, x, tokens=TOKENS), call(sure, x, tokens=TOKENS, key=jr.key(0))
        )


def test_in_a_stack(getkey, x64):
    """Blocks take their groups from the context; caches are filled and read layer by layer."""

    def make_block(*, key):
        keys = jr.split(key, 2)
        return BlockSequence(
            tuple(
                TransformerBlock(
                    make(k, PATTERNS[name], rope=AxialRoPE(2)), jnp_identity, Residual(), Residual()
                )
                for k, name in zip(keys, ("self", "cross"), strict=True)
            )
        )

    stack = Stack(make_block, 2, key=getkey())
    x, where = jr.normal(getkey(), (SEQ, D_MODEL)), jr.normal(getkey(), (SEQ, 2))
    full = stack(x, context=Condition(where, tokens=TOKENS))
    loop = x
    for block in stack:
        loop = block(loop, context=Condition(where, tokens=TOKENS))
    np.testing.assert_allclose(full, loop, rtol=1e-9)
    anchors = np.r_[rows("surface"), rows("volume")]
    present = Condition(where[anchors], tokens=(TokenSpec("surface", 3), TokenSpec("volume", 3)))
    h, cache = stack.extend(x[anchors], stack.init_cache(0), context=present)
    np.testing.assert_allclose(h, full[anchors], rtol=1e-9, atol=1e-10)
    queries = rows("volume_queries")
    absent = tuple(TokenSpec(name, None) for name in ("surface", "volume"))
    context = Condition(where[queries], tokens=(TokenSpec("volume_queries", 4), *absent))
    h, _ = stack.extend(x[queries], cache, context=context)
    np.testing.assert_allclose(h, full[queries], rtol=1e-9, atol=1e-10)


def jnp_identity(x, *, key=None):
    return x


def test_token_spec():
    spec = TokenSpec.from_dict({"surface": 7})
    assert spec == TokenSpec("surface", 7) and spec.to_dict() == {"surface": 7}
    assert TokenSpec.from_dict({"surface": None}) == TokenSpec("surface", None)
    for bad, message in [
        (lambda: TokenSpec("a", -1), "size=-1 of 'a' is negative"),
        (lambda: TokenSpec("", 1), "the name is empty"),
        (lambda: TokenSpec.from_dict({"a": 1, "b": 2}), "has 2 entries but must have 1"),
        (lambda: AttentionPattern("ab", ("a",)), r"query_tokens='ab' is one name"),
        (lambda: AttentionPattern((), ("a",)), "query_tokens is empty"),
        (lambda: AttentionPattern(("a",), ("b", "b")), "key_value_tokens have 'b' more than once"),
        (lambda: AnchorBranch("a", "bc"), "queries='bc' is one name"),
        (lambda: AnchorBranch("a", ("a",)), "names have 'a' more than once"),
        (lambda: cross_patterns([SURFACE]), "there are 1 branches but must be 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()


def test_ways_to_make_patterns():
    surface, volume = ("surface", "surface_queries"), ("volume", "volume_queries")
    assert PATTERNS["self"] == (
        AttentionPattern(surface, ("surface",)),
        AttentionPattern(volume, ("volume",)),
    )
    assert PATTERNS["cross"] == (
        AttentionPattern(surface, ("volume",)),
        AttentionPattern(volume, ("surface",)),
    )
    assert PATTERNS["joint"] == (AttentionPattern(surface + volume, ("surface", "volume")),)
    three = (*BRANCHES, AnchorBranch("inlet"))
    assert cross_patterns(three)[2] == AttentionPattern(("inlet",), ("surface", "volume"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"tokens": TOKENS[:3]}, r"volume=3\) add up to 11, but the input has 15 tokens"),
        ({"tokens": (*TOKENS, TokenSpec("volume", 0))}, "names of tokens have 'volume' more"),
        (
            {"tokens": (TokenSpec("surface", 10), TokenSpec("inlet", 5))},
            "no pattern has 'inlet' among its query_tokens",
        ),
        ({"tokens": (TokenSpec("volume_queries", 15),)}, "attend to 'volume', which is not one"),
        (
            {"tokens": (TokenSpec("volume_queries", 15), TokenSpec("volume", None))},
            r"'volume' has size=None, so its keys and values come from a cache, which has \[\]",
        ),
        ({"tokens": TOKENS, "mask": Causal()}, "can only be Padding"),
        ({"tokens": TOKENS, "mask": Padding(jnp.ones(3, bool))}, "has 3 flags, but the input 15"),
        ({"tokens": TOKENS, "positions": jnp.arange(15)}, "no positions"),
        ({"tokens": TOKENS, "coordinates": jnp.ones((15, 2))}, "no AxialRoPE"),
    ],
)
def test_errors(call, message, getkey):
    layer = make(getkey(), PATTERNS["self"])
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones((SEQ, D_MODEL)), **call)


def test_more_errors(getkey):
    with pytest.raises(ValueError, match="query_tokens of all patterns have 'a' more than once"):
        make(getkey(), [AttentionPattern(("a",), ("a",)), AttentionPattern(("a",), ("b",))])
    with pytest.raises(ValueError, match="there are no patterns"):
        make(getkey(), [])
    with pytest.raises(ValueError, match="coordinates must be given"):
        make(getkey(), CHAIN, rope=AxialRoPE(2))(jnp.ones((SEQ, D_MODEL)), tokens=TOKENS)
    with pytest.raises(ValueError, match=r"\['volume'\] have size=None"):
        group_mask((TokenSpec("volume", None),), PATTERNS["self"])
    layer = make(getkey(), PATTERNS["self"])
    x, spec = jnp.ones((3, D_MODEL)), (TokenSpec("surface", 3),)
    _, cache = layer.extend(x, layer.init_cache(), tokens=spec)
    queries = (TokenSpec("surface_queries", 3), TokenSpec("surface", None))
    assert layer.extend(x, cache, tokens=queries)[1] is cache  # so that no copy is made
    with pytest.raises(ValueError, match="'surface' is in the input and in the cache"):
        layer.extend(x, cache, tokens=spec)
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        layer(x[None], tokens=spec)
