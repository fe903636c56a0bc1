import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Causal, SlidingWindow
from eqx_transformer.nn import MLP, Attention, RMSNorm
from eqx_transformer.stacks import (
    BlockSequence,
    Residual,
    Stack,
    StackSequence,
    TransformerBlock,
    layer_address,
    repeating_runs,
    stack_of_kinds,
)

SEQ, D_MODEL = 6, 8
MASKS = {"G": Causal(), "L": SlidingWindow(2, 0), "M": Causal()}


def _make_block(kind, *, key, dropout_rate=0.0):
    k1, k2 = jr.split(key)
    attention = Attention(D_MODEL, 2, mask=MASKS[kind], key=k1)
    mlp = MLP(D_MODEL, 5 if kind == "M" else 12, key=k2)
    residuals = (Residual(RMSNorm(D_MODEL), dropout_rate=dropout_rate) for _ in range(2))
    return TransformerBlock(attention, mlp, *residuals)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("A" * 80, "A*80"),
        ("LG" * 12, "LG*12"),
        (("LLLLLG" * 5)[:26], "LLLLLG*4 L*2"),
        ("G" * 28 + "L" * 28, "G*28 L*28"),
        ("DDD" + "M" * 58, "D*3 M*58"),
        ("AABABAB", "A*1 AB*3"),
        ("ABC", "ABC*1"),
        ("DMLMLM", "DM*1 LM*2"),
        ("A", "A*1"),
    ],
)
def test_runs(kinds, expected):
    found = repeating_runs(kinds)
    assert " ".join(f"{''.join(pattern)}*{repeats}" for pattern, repeats in found) == expected


def _divisions(kinds):
    """Every way to write a sequence as patterns that repeat."""
    if not kinds:
        yield []
    for period in range(1, len(kinds) + 1):
        for repeats in range(1, len(kinds) // period + 1):
            if kinds[: period * repeats] == kinds[:period] * repeats:
                for rest in _divisions(kinds[period * repeats :]):
                    yield [(kinds[:period], repeats), *rest]


def test_runs_are_the_fewest():
    for length in range(1, 8):
        for kinds in itertools.product("AB", repeat=length):
            found = repeating_runs(kinds)
            assert sum((p * r for p, r in found), ()) == kinds
            cost = lambda runs: (sum(len(p) for p, _ in runs), len(runs))  # noqa: E731
            assert cost(found) == min(map(cost, _divisions(kinds)))
    with pytest.raises(ValueError, match="at least one layer"):
        repeating_runs("")


KINDS = {"uniform": "GGG", "period": "LGLG", "several": "MLGLGLL"}
CLASSES = {"uniform": Stack, "period": Stack, "several": StackSequence}


def _stack(name, **options):
    return stack_of_kinds(_make_block, KINDS[name], key=jr.key(0), **options)


@pytest.mark.parametrize("name", KINDS)
def test_addresses(name):
    stack, kinds = _stack(name), KINDS[name]
    assert type(stack) is CLASSES[name]
    leaves, _ = jax.tree_util.tree_flatten_with_path(stack)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    weights = set()
    for i, kind in enumerate(kinds):
        path, index = layer_address(stack, i)
        weight = leaves[f"{path}.mlp.up_proj.weight"][index]
        assert weight.shape == (D_MODEL, 5 if kind == "M" else 12)
        weights.add(weight.tobytes())
        if isinstance(stack, StackSequence):
            assert (stack[i].mlp.up_proj.weight == weight).all()
            assert stack[i].attention.mask == MASKS[kind]
    # No two layers begin alike.
    assert len(weights) == len(kinds)
    with pytest.raises(IndexError, match=f"no layer {len(kinds)}; there are {len(kinds)}"):
        layer_address(stack, len(kinds))
    assert type(stack_of_kinds(_make_block, "GG", key=jr.key(0)).blocks) is TransformerBlock
    assert type(_stack("period").blocks) is BlockSequence


@pytest.mark.parametrize("options", [{}, {"unroll": 3, "remat": True}], ids=["scan", "unrolled"])
def test_equals_list_of_layers(getkey, options):
    stack, x = _stack("several", **options), jr.normal(getkey(), (SEQ, D_MODEL))
    expected = x
    for layer in stack:
        expected = layer(expected)
    np.testing.assert_allclose(stack(x), expected, rtol=1e-5, atol=1e-5)
    assert len(stack) == len(list(stack)) == 7
    assert (stack[-1].mlp.up_proj.weight == stack[6].mlp.up_proj.weight).all()
    with pytest.raises(IndexError, match="no layer 7; there are 7"):
        stack[7]


def test_cache_is_the_forward(getkey):
    stack, x = _stack("several"), jr.normal(getkey(), (SEQ, D_MODEL))
    cache, outs = stack.init_cache(SEQ), []
    for chunk in jnp.split(x, [3, 4]):
        out, cache = stack.extend(chunk, cache)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs), stack(x), rtol=1e-5, atol=1e-5)


def test_keys_and_context(getkey):
    make_block = eqx.Partial(_make_block, dropout_rate=0.5)
    stack, x = stack_of_kinds(make_block, "MLL", key=getkey()), jr.normal(getkey(), (SEQ, D_MODEL))
    one, other = jr.split(getkey())
    assert (stack(x, key=one) == stack(x, key=one)).all()
    assert (stack(x, key=one) != stack(x, key=other)).any()
    assert (stack.apply_with_stats(x, key=one)[0] == stack(x, key=one)).all()
    with pytest.raises(ValueError, match="context"):
        stack(x, key=one, context=x)
    with pytest.raises(ValueError, match="at least one stack"):
        StackSequence(())
