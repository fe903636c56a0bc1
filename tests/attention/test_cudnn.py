"""cuDNN is not on this machine: its place is taken by a function as opaque as it is.

That shows that every derivative is put together rightly. What the real calls lower to is looked at
for a GPU that is not there either, on the versions of JAX it is used on.
"""

import functools
import re
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from eqx_transformer.attention import (
    ALiBi,
    Causal,
    Padding,
    Segments,
    SlidingWindow,
    _cudnn,
    attention_and_lse,
    dot_product_attention,
    explain_attention,
)
from eqx_transformer.attention._inputs import make_inputs
from eqx_transformer.attention._reference import reference


def _weights(q, k, scale, pattern):
    q_seq, heads, _ = q.shape
    scores = jnp.einsum("qhd,khd->hqk", q, jnp.repeat(k, heads // k.shape[1], axis=1)) * scale
    ahead = jnp.arange(k.shape[0])[None] - jnp.arange(q_seq)[:, None]
    left, _ = pattern.get("local_window_size", (q_seq, 0))
    if pattern.get("is_causal"):
        scores = jnp.where(((ahead > 0) | (ahead < -left))[None], -jnp.inf, scores)
    return jax.nn.softmax(scores, axis=-1)


def _value(q, k, v, *, scale, pattern):
    v = jnp.repeat(v, q.shape[1] // v.shape[1], axis=1)
    return [jnp.einsum("hqk,khd->qhd", _weights(q, k, scale, pattern), v)]


def _gradient(q, k, v, dout, *, scale, pattern):
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    weights, (out,) = _weights(q, k, scale, pattern), _value(q, k, v, scale=scale, pattern=pattern)
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
    dweights = jnp.einsum("qhd,khd->hqk", dout, v)
    dscores = weights * (dweights - jnp.einsum("qhd,qhd->hq", dout, out)[..., None]) * scale
    dk = jnp.einsum("hqk,qhd->khd", dscores, q)
    dv = jnp.einsum("hqk,qhd->khd", weights, dout)
    dk, dv = (x.reshape(x.shape[0], kv_heads, group, -1).sum(axis=2) for x in (dk, dv))
    return [jnp.einsum("hqk,khd->qhd", dscores, k), dk, dv]


def _kernel(name, function):
    """A function as a primitive that can be compiled and batched, and has no derivative."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(function)
    primitive.def_abstract_eval(lambda *xs: jax.make_jaxpr(function)(*xs).out_avals)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=True))

    def batch(args, axes):
        out = jax.vmap(function, in_axes=axes)(*args)
        return out, [0] * len(out)

    batching.primitive_batchers[primitive] = batch
    return primitive.bind


def opaque(q, k, v, scale, pattern):
    """Like JAX's function: reverse mode by a rule, and nothing else."""
    value = _kernel("value", functools.partial(_value, scale=scale, pattern=pattern))
    gradient = _kernel("gradient", functools.partial(_gradient, scale=scale, pattern=pattern))
    fused = jax.custom_vjp(lambda *qkv: value(*qkv)[0])
    fused.defvjp(
        lambda *qkv: (value(*qkv)[0], qkv),
        lambda qkv, dout: tuple(gradient(*qkv, dout)),
    )
    return fused(q, k, v)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(_cudnn, "_fused", opaque)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU and a recent JAX, as far as the choice goes."""
    monkeypatch.setattr(_cudnn, "unavailable", lambda: None)


PATTERNS = {
    "full": None,
    "causal": Causal(),
    "window": Causal() & SlidingWindow(left=3, right=5),
    "causal window": SlidingWindow(left=2, right=0),
}


@pytest.mark.parametrize("mask", PATTERNS.values(), ids=PATTERNS)
def test_derivatives(mask, stand_in, x64, getkey):
    def arrays():
        shapes = ((10, 4, 8), (10, 2, 8), (10, 2, 8))
        return tuple(jr.normal(getkey(), shape) for shape in shapes)

    primal, first, second = arrays(), arrays(), arrays()
    weight = jr.normal(getkey(), (10, 4, 8))

    def results(run):
        def loss(q, k, v):
            return (jnp.sin(run(make_inputs(q, k, v, mask=mask))[0]) * weight).sum()

        gradient = jax.grad(loss, argnums=(0, 1, 2))

        def slope(*x):
            return jax.jvp(loss, x, first)[1]

        batch = jax.tree.map(lambda *x: jnp.stack(x), primal, first, second)

        def shared_kv(q):
            return jax.vmap(loss, in_axes=(0, None, None))(q, *primal[1:]).sum()

        return {
            "value": loss(*primal),
            "gradient": gradient(*primal),
            "jvp": slope(*primal),
            "forward over reverse": jax.jvp(gradient, primal, first)[1],
            "reverse over forward": jax.grad(slope, argnums=(0, 1, 2))(*primal),
            "reverse over reverse": jax.vjp(gradient, *primal)[1](second),
            "forward over forward": jax.jvp(slope, primal, second)[1],
            "batch": jax.vmap(gradient)(*batch),
            "batch of jvps": jax.vmap(lambda *x: jax.jvp(loss, x, first)[1])(*batch),
            "shared keys": jax.grad(shared_kv)(batch[0]),
        }

    expected, actual = (jax.jit(results, static_argnums=0)(x) for x in (reference, _cudnn.cudnn))
    for name, value in actual.items():
        jax.tree.map(
            lambda x, y, name=name: np.testing.assert_allclose(
                x, y, rtol=1e-9, atol=1e-13, err_msg=name
            ),
            value,
            expected[name],
        )


def test_gradient_runs_no_other_implementation(stand_in, getkey):
    q = jr.normal(getkey(), (64, 2, 8))

    def run(q):
        return jnp.sin(_cudnn.cudnn(make_inputs(q, q, q, mask=Causal()))[0]).sum()

    assert "= value" in str(jax.make_jaxpr(jax.grad(run))(q))
    assert "while" not in jax.jit(jax.grad(run)).lower(q).as_text()


# --- Choice --------------------------------------------------------------------------------------


def _arrays(seq=16, heads=2, head_dim=8, dtype=jnp.bfloat16):
    return (jnp.zeros((seq, heads, head_dim), dtype),) * 3


@pytest.mark.parametrize("mask", PATTERNS.values(), ids=PATTERNS)
def test_chosen_for_plain_patterns(mask, gpu):
    explanation = explain_attention(*_arrays(), mask=mask)
    assert explanation.chosen == "cudnn"
    assert set(explanation.reasons) == {"reference", "chunked", "cudnn", "pallas"}
    assert explain_attention(*_arrays(seq=4), mask=mask).chosen == "reference"


REFUSED = {
    "dtype": (_arrays(dtype=jnp.float32), {}, "float32"),
    "score mod": (_arrays(), {"score_mod": ALiBi(2)}, "score_mod"),
    "sinks": (_arrays(), {"sinks": jnp.zeros(2)}, "sinks"),
    "dropout": (_arrays(), {"dropout_rate": 0.5, "dropout_key": jr.key(0)}, "drop different"),
    "positions": (_arrays(), {"q_positions": jnp.arange(16)}, "positions"),
    "padding": (_arrays(), {"mask": Padding(jnp.ones(16, bool))}, "Padding"),
    "documents": (_arrays(), {"mask": Causal() & Segments(jnp.zeros(16, int))}, "Segments"),
    "symmetric window": (_arrays(), {"mask": SlidingWindow(2, 2)}, "SlidingWindow"),
    "either": (_arrays(), {"mask": Causal() | SlidingWindow(2, 0)}, "not"),
    "odd length": (_arrays(seq=17), {}, "even lengths, not 17"),
    "head_dim": (_arrays(head_dim=20), {}, "head_dim=20"),
    "large head_dim": (_arrays(head_dim=136), {}, "head_dim=136"),
    "v_dim": ((*_arrays()[:2], _arrays(head_dim=16)[2]), {}, "v_dim=16"),
    "lengths": ((_arrays(seq=10)[0], *_arrays()[1:]), {"mask": Causal()}, "16 for 10"),
}


@pytest.mark.parametrize(("arrays", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_reason(arrays, options, reason, gpu):
    explanation = explain_attention(*arrays, **options)
    assert explanation.chosen == "chunked"
    assert reason in explanation.reasons["cudnn"]
    with pytest.raises(ValueError, match=re.escape(explanation.reasons["cudnn"])):
        dot_product_attention(*arrays, **options, implementation="cudnn")


def test_refused_for_the_log_sum_exp(gpu):
    with pytest.raises(ValueError, match="log-sum-exp"):
        attention_and_lse(*_arrays(), implementation="cudnn")
    attention_and_lse(*_arrays())


def test_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(_cudnn, "_OLDEST_JAX", (0, 0))
    with pytest.raises(ValueError, match="runs on cpu"):
        dot_product_attention(*_arrays(), implementation="cudnn")
    monkeypatch.setattr(_cudnn, "_OLDEST_JAX", (99, 0))
    assert "gradient" in explain_attention(*_arrays()).reasons["cudnn"]
    monkeypatch.setattr(_cudnn, "_OLDEST_JAX", (0, 0))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability, reason in (("7.5", "not 7.5"), ("gfx942", "not gfx942"), ("9.0", None)):
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        found = _cudnn.unavailable()
        assert found is None if reason is None else reason in found


# --- Lowering for a GPU --------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    if jax.__version_info__ < _cudnn._OLDEST_JAX:
        pytest.skip(f"cuDNN is not used with jax {jax.__version__}")
    import jax._src.cudnn.fused_attention_stablehlo as fused

    monkeypatch.setattr(_cudnn, "unavailable", lambda: None)
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91700)
    monkeypatch.setattr(fused, "check_compute_capability", lambda *_, **__: True)


def _calls(function, *args):
    """The cuDNN calls of a function, by name."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"@__cudnn\$(\w+)", text), text


@pytest.mark.parametrize("mask", PATTERNS.values(), ids=PATTERNS)
def test_lowers_to_cudnn(mask, cuda):
    shapes = tuple(jax.ShapeDtypeStruct((3, 64, h, 32), jnp.bfloat16) for h in (4, 2, 2))
    one = tuple(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in shapes)

    def run(q, k, v):
        return dot_product_attention(q, k, v, mask=mask)

    def loss(q, k, v):
        return run(q, k, v).astype(jnp.float32).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    for function, args in (
        (run, one),
        (jax.vmap(run), shapes),
        (jax.vmap(run, in_axes=(0, None, None)), (shapes[0], *one[1:])),
    ):
        calls, text = _calls(function, *args)
        assert calls == ["fmhaSoftmax"]
        assert "while" not in text
    for function, args in ((gradient, one), (jax.vmap(gradient), shapes)):
        calls, text = _calls(function, *args)
        assert sorted(calls) == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
        assert "while" not in text
    calls, text = _calls(lambda *x: jax.jvp(loss, x, x), *one)
    assert calls == ["fmhaSoftmax"]
    assert "dot_general" in text  # the tangent, in tiles
    _calls(lambda *x: jax.jvp(gradient, x, x), *one)


def test_options_are_no_leaves():
    assert not jax.tree.leaves(eqx.filter(_cudnn.cudnn, eqx.is_array))
