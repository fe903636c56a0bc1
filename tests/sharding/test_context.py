"""Sequences split over devices: the same loss and gradients, and keys that only neighbours see."""

import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformer.attention import Segments, zigzag_order
from eqx_transformer.models import Llama, MLAConfig
from eqx_transformer.nn import MLP, CrossAttention
from eqx_transformer.sharding import batch_sharding, context_parallel, gathered, shard

from .devices import CONFIG, RULES, check_equal, cross_entropy_of, exchanged, mesh_of

BATCH, SEQ = 4, 24
CONFIG = CONFIG.replace(max_len=SEQ)
CONFIGS = {
    "causal": CONFIG.replace(sinks=True, attention_soft_cap=5.0),
    "window": CONFIG.replace(window=6),
    "documents": CONFIG.replace(document_start_id=0),
    "latent": CONFIG.replace(
        num_kv_heads=None,
        mla=MLAConfig(kv_rank=20, q_rank=20, nope_head_dim=8, rope_head_dim=4, v_head_dim=8),
    ),
}


def batch():
    tokens = jax.random.randint(jax.random.key(1), (BATCH, SEQ + 1), 0, CONFIG.vocab_size)
    tokens = tokens.at[:, 5].set(0)  # a document begins
    return tokens[:, :-1], tokens[:, 1:]


def on_mesh(model, mesh, layout, inputs, targets, **options):
    """The compiled step's text, its result, and the model."""

    def loss(model, *args, **options):
        model = context_parallel(gathered(model, mesh, RULES), mesh, RULES, layout=layout)
        return cross_entropy_of(model, *args, **options)

    model = shard(model, mesh, RULES)
    split = batch_sharding(mesh, RULES, sequence=True)
    inputs, targets = jax.device_put((inputs, targets), split)
    step = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    step = step.lower(model, inputs, targets, **options).compile()
    return step.compiled.as_text(), *step(model, inputs, targets, **options), model


def check_collectives(text, mesh):
    """No device gets more than its part of a sequence, but for the ids that masks look at."""
    found = exchanged(text)
    assert set(found) <= {"all-gather", "all-reduce", "collective-permute"}
    examples, local = BATCH // mesh.shape.get("data", 1), SEQ // mesh.shape["context"]
    assert all(x == (examples, SEQ) for x in found["all-gather"])
    assert not [x for x in found["all-reduce"] if SEQ in x]
    travelling = [x for x in found["collective-permute"] if len(x) == 4]
    # Keys and values; forward, backward once more, and with them their gradients; and these home.
    assert len(travelling) == 2 + 2 + 2 + 2
    assert all(x[:2] == (examples, local) for x in travelling)


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        ("documents", {"data": 2, "context": 4}),
        ("causal", {"context": 8}),
        ("latent", {"context": 2, "tensor": 4}),
    ],
)
@pytest.mark.slow
def test_contiguous(kind, axes):
    model, mesh = Llama(CONFIGS[kind], key=jax.random.key(0)), mesh_of(**axes)
    expected = eqx.filter_jit(eqx.filter_value_and_grad(cross_entropy_of))(model, *batch())
    text, value, gradient, model = on_mesh(model, mesh, "contiguous", *batch())
    check_equal(value, gradient, *expected, model)
    check_collectives(text, mesh)


def test_zigzag_with_windows_and_documents():
    mesh = mesh_of(data=2, context=4)
    model, (inputs, targets) = Llama(CONFIGS["window"], key=jax.random.key(0)), batch()
    masks = jax.vmap(Segments)(jnp.cumsum(inputs == 0, axis=1, dtype=jnp.int32))
    expected = eqx.filter_jit(eqx.filter_value_and_grad(cross_entropy_of))(
        model, inputs, targets, mask=masks
    )
    order, _ = zigzag_order(SEQ, 4)
    positions = jnp.broadcast_to(jnp.asarray(order, jnp.int32), inputs.shape)
    text, value, gradient, model = on_mesh(
        model, mesh, "zigzag", inputs[:, order], targets[:, order], mask=masks, positions=positions
    )
    check_equal(value, gradient, *expected, model)
    check_collectives(text, mesh)


@pytest.mark.slow
def test_no_scores_are_kept():
    """Neither for the backward pass nor for other layers is anything as large as scores kept."""
    seq, mesh = 8192, mesh_of(context=8)
    config = CONFIG.replace(max_len=seq, num_heads=4, num_kv_heads=4)
    model = context_parallel(Llama(config, key=jax.random.key(0)), mesh)
    tokens = jnp.zeros((1, seq), jnp.int32)
    step = eqx.filter_make_jaxpr(eqx.filter_grad(cross_entropy_of))(model, tokens, tokens)[0]
    shapes = re.findall(r"\b(?:f32|bool|i32)\[([\d,]+)\]", str(step))
    largest = max(math.prod(int(n) for n in x.split(",")) for x in shapes)
    assert largest < 4 * (seq // 8) ** 2


@pytest.mark.slow
def test_a_source_is_split_as_well():
    layer, mesh = CrossAttention(16, 4, key=jax.random.key(0)), mesh_of(context=4)
    x, source = (
        jax.random.normal(jax.random.key(i), (BATCH, seq, 16)) for i, seq in ((1, 8), (2, SEQ))
    )

    def loss(layer, x, source, mesh=None):
        # Where no positions are given, also a zigzag layout is no other order.
        layer = layer if mesh is None else context_parallel(layer, mesh, layout="zigzag")
        return jnp.square(jax.vmap(layer)(x, source)).mean()

    expected = eqx.filter_jit(eqx.filter_value_and_grad(loss))(layer, x, source)
    x, source = jax.device_put((x, source), batch_sharding(mesh, sequence=True))
    found = eqx.filter_jit(eqx.filter_value_and_grad(loss))(layer, x, source, mesh)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6, rtol=0)


def test_what_is_refused():
    model, mesh = Llama(CONFIG, key=jax.random.key(0)), mesh_of(context=8)
    tokens = jnp.zeros(SEQ, jnp.int32)
    assert context_parallel(model, mesh_of(data=8)) is model
    with pytest.raises(ValueError, match=r"q_seq=12 is not a multiple of the 8 devices"):
        context_parallel(model, mesh)(tokens[:12])
    with pytest.raises(ValueError, match=r"positions=order"):
        context_parallel(model, mesh, layout="zigzag")(tokens)
    with pytest.raises(ValueError, match=r"no Attention, LatentAttention or CrossAttention"):
        context_parallel(MLP(8, 8, key=jax.random.key(0)), mesh)
    dropping = Llama(CONFIG.replace(dropout_rate=0.5), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"not dropped on a ring, but dropout_rate=0.5"):
        context_parallel(dropping, mesh)(tokens, key=jax.random.key(0))
