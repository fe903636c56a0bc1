"""Operations and parameters, against formulas and against XLA's own count."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from eqx_transformer.attention import dot_product_attention, ring_attention
from eqx_transformer.models import (
    Llama,
    LlamaConfig,
    MoEConfig,
    VisionTransformer,
    ViTConfig,
    presets,
)
from eqx_transformer.nn import quantized
from eqx_transformer.training import model_flops, parameter_counts, summary

SEQ = 16
CONFIG = LlamaConfig(
    vocab_size=50, d_model=16, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=40, max_len=SEQ
)
TOKENS = jax.ShapeDtypeStruct((SEQ,), jnp.int32)


def shapes(config):
    make = Llama if isinstance(config, LlamaConfig) else VisionTransformer
    return eqx.filter_eval_shape(lambda key: make(config, key=key), jax.random.key(0))


def matrices(config):
    """Parameters of linear maps that a token goes through, the head included."""
    d, kv = config.d_model, config.num_kv_heads * config.attention_head_dim
    layer = 2 * d * d + 2 * d * kv + 3 * d * config.mlp_dim
    return config.num_layers * layer + d * config.vocab_size


def scores(config, seq):
    return 4 * config.num_layers * config.d_model * seq


@pytest.mark.parametrize("tied", [False, True])
def test_forward_is_two_for_every_weight_and_four_for_every_score(tied):
    config = CONFIG.replace(tie_embeddings=tied)
    expected = SEQ * (2 * matrices(config) + scores(config, SEQ))
    assert model_flops(shapes(config), TOKENS) == expected
    batch = jax.ShapeDtypeStruct((5, SEQ), jnp.int32)
    in_a_batch = model_flops(lambda model, batch: jax.vmap(model)(batch), shapes(config), batch)
    assert in_a_batch == 5 * expected


def test_the_gradient_is_twice_the_forward_pass_and_remat_once_more():
    def loss(model, tokens):
        return model(tokens).sum()

    model = shapes(CONFIG)
    forward = model_flops(loss, model, TOKENS)
    gradient = model_flops(eqx.filter_grad(loss), model, TOKENS)
    # The backward pass of attention computes scores again; nothing else is computed twice.
    again = SEQ * scores(CONFIG, SEQ) // 2
    assert gradient == 3 * forward + again
    frugal = model_flops(eqx.filter_grad(loss), shapes(CONFIG.replace(remat="full")), TOKENS)
    head = 2 * SEQ * CONFIG.d_model * CONFIG.vocab_size
    # The last product of a layer is not needed to differentiate it.
    down = 2 * SEQ * CONFIG.num_layers * CONFIG.d_model * CONFIG.mlp_dim
    assert frugal == gradient + forward - head - down


def test_what_a_mask_excludes_is_left_out_in_tiles():
    config, seq = CONFIG.replace(max_len=4096), 4096
    products = seq * 2 * matrices(config)
    counted = model_flops(shapes(config), jax.ShapeDtypeStruct((seq,), jnp.int32)) - products
    share = counted / (seq * scores(config, seq))
    assert 0.5 < share < 0.6
    narrow = model_flops(shapes(config.replace(window=64)), jax.ShapeDtypeStruct((seq,), jnp.int32))
    assert narrow - products < 0.3 * counted


def test_no_implementation_changes_the_count():
    expected = model_flops(shapes(CONFIG), TOKENS)
    for name in ("reference", "pallas"):
        model = shapes(CONFIG.replace(attention_implementation=name))
        assert model_flops(model, TOKENS) == expected


def test_as_xla_counts():
    """XLA counts what is elementwise too, and the body of a loop once."""
    config = CONFIG.replace(d_model=128, d_ff=512, attention_implementation="reference", unroll=3)
    model = Llama(config, key=jax.random.key(0))
    tokens = jnp.zeros(SEQ, jnp.int32)
    compiled = eqx.filter_jit(lambda model, tokens: model(tokens)).lower(model, tokens).compile()
    xla = compiled.compiled.cost_analysis()["flops"]
    assert 1 <= xla / model_flops(model, tokens) < 1.03


def test_experts_count_as_often_as_they_are_chosen():
    moe = MoEConfig(num_experts=5, experts_per_token=2, num_shared_experts=1, d_expert=24)
    config = CONFIG.replace(moe=moe)
    model = shapes(config)
    d, layers = config.d_model, config.num_layers
    expert = 3 * d * moe.d_expert
    dense = matrices(config.replace(moe=None)) - layers * 3 * d * config.mlp_dim
    used = dense + layers * (d * 5 + 3 * expert)
    sums = 2 * 2 * layers * d  # of the two experts, weighted
    assert model_flops(model, TOKENS) == SEQ * (2 * used + sums + scores(config, SEQ))
    counts = parameter_counts(model)
    norms = (2 * layers + 1) * d
    assert counts.embedding == config.vocab_size * d
    assert counts.total == counts.embedding + norms + used + layers * 3 * expert
    assert counts.active == counts.total - layers * 3 * expert
    assert counts.non_embedding == counts.total - counts.embedding


def test_convolutions():
    config = ViTConfig(image_size=8, patch_size=4, d_model=8, num_layers=1, num_heads=2, d_ff=8)
    model = shapes(config)
    image = jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)
    patches = model_flops(lambda model, x: model.patch_embedding(x), model, image)
    assert patches == 2 * 4 * (4 * 4 * 3) * 8
    x, kernel = jnp.zeros((1, 6, 9)), jnp.zeros((8, 3, 3))
    groups = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1,),
        padding="VALID",
        feature_group_count=2,
    )
    assert model_flops(groups, x, kernel) == 2 * 7 * 8 * 3 * 3


def test_programs_within_programs():
    x = jnp.zeros((4, 4))
    one = 2 * 4**3

    def scanned(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=3)[0]

    def chosen(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x, x)

    mesh = Mesh(np.array(jax.devices()[:2]), ("a",))
    split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    assert model_flops(scanned, x) == 3 * one
    assert model_flops(chosen, x) == 2 * one
    assert model_flops(split, x) == 2 * (2 * 2 * 4 * 2)
    assert model_flops(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: x @ x, x), x) == 5 * one
    assert model_flops(jnp.sin, x) == 0


def test_attention_on_a_ring_counts_as_a_whole():
    q = jnp.zeros((8, 2, 4))
    mesh = Mesh(np.array(jax.devices()[:2]), ("a",))
    ring = functools.partial(ring_attention, axis_name="a")
    split = jax.shard_map(ring, mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    assert model_flops(split, q, q, q) == model_flops(dot_product_attention, q, q, q) > 0


def test_ragged_products():
    x, w, sizes = jnp.ones((6, 4)), jnp.ones((3, 4, 5)), jnp.array([1, 2, 3], jnp.int32)
    one = 2 * 6 * 4 * 5  # every row meets one of the three
    assert model_flops(jax.lax.ragged_dot, x, w, sizes) == one
    gradient = jax.grad(lambda x, w: jax.lax.ragged_dot(x, w, sizes).sum(), (0, 1))
    assert model_flops(gradient, x, w) == 3 * one


def test_a_loop_of_unknown_length_is_an_error():
    def run(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="number of iterations is not known from shapes"):
        model_flops(run, jnp.zeros((4, 4)))
    experts = Llama(CONFIG.replace(moe=MoEConfig(num_experts=3)), key=jax.random.key(0))
    with pytest.raises(ValueError, match="pass the model as an argument"):
        model_flops(lambda tokens: experts(tokens), TOKENS)


def test_published_sizes():
    counts = parameter_counts(shapes(presets.LLAMA_3_70B))
    assert counts.total == 70_553_706_496  # as `transformers` counts them
    counts = parameter_counts(shapes(presets.MIXTRAL_8X7B))
    assert counts.total == 46_702_792_704
    assert round(counts.active / 1e9, 1) == 12.9  # Jiang et al., 2024, section 1


def test_summary():
    model = Llama(CONFIG, key=jax.random.key(0))
    text = summary(model)
    assert text == summary(shapes(CONFIG))
    lines = text.splitlines()
    assert lines[0].split() == ["path", "kind", "shape", "dtype", "parameters", "bytes"]
    row = next(line for line in lines if "up_proj" in line)
    assert row.split() == [
        "stack.blocks.mlp.up_proj.weight",
        *("Linear", "[3,", "16,", "40]", "float32", "1,920", "7,680"),
    ]
    total = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    assert lines[-2].split() == ["all", f"{total:,}", f"{4 * total:,}"]
    assert lines[-1] == f"{50 * 16:,} in embeddings; {total - 50 * 16:,} elsewhere"
    with_call = summary(shapes(CONFIG), TOKENS).splitlines()
    assert with_call[:-1] == lines
    flops = model_flops(model, TOKENS)
    assert with_call[-1] == f"{flops:,} floating-point operations in this call"


def test_quantised_weights_are_parameters():
    model = Llama(CONFIG, key=jax.random.key(0))
    before, after = parameter_counts(model), parameter_counts(quantized(model))
    scales = after.total - before.total
    assert 0 < scales < 0.2 * before.total
    assert "int8" in summary(quantized(model))
