"""One model on eight devices against the same model on one, and what the devices exchange."""

import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eqx_transformer.generation import generate
from eqx_transformer.models import Llama, MLAConfig
from eqx_transformer.sharding import (
    batch_sharding,
    gathered,
    init_sharded,
    shard,
    sharding_table,
    specs,
)
from eqx_transformer.training import add_lora

from .devices import (
    BATCH,
    COLLECTIVE,
    CONFIG,
    CONFIGS,
    RULES,
    SEQ,
    batch,
    bytes_on,
    check_equal,
    cross_entropy,
    exchanged,
    mesh_of,
    on_one_device,
)

WEIGHTS = 7  # projections of a layer


def on_mesh(kind, mesh):
    """The compiled step of a model that was placed on the mesh, its result, and the model."""

    def loss(model, tokens):
        return cross_entropy(gathered(model, mesh, RULES), tokens)

    model = shard(on_one_device(kind)[0], mesh, RULES)
    tokens = jax.device_put(batch(), batch_sharding(mesh, RULES))
    step = eqx.filter_jit(eqx.filter_value_and_grad(loss)).lower(model, tokens).compile()
    return step.compiled.as_text(), *step(model, tokens), model


def check_collectives(text, *, fsdp, tensor, local_batch):
    found = exchanged(text)
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathers = found["all-gather"]
    # The projections of a layer and the head, forward and backward, and the embedding once.
    assert len(gathers) == (2 * (WEIGHTS + 1) + 1 if fsdp else 0)
    assert all(len(shape) == 2 for shape in gathers)
    activations = (local_batch, SEQ, CONFIG.d_model)
    sums = found["all-reduce"].count(activations)
    # One a branch, forward; backward one for each projection that a branch begins with; and those
    # of the embedding and the head.
    assert sums == (2 + 5 + 2 if tensor else 0)
    # No device has the logits of the whole vocabulary, or the examples of another.
    biggest = max(math.prod(shape) for shapes in found.values() for shape in shapes)
    assert biggest <= max(math.prod(activations), CONFIG.vocab_size * CONFIG.d_model)


MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 4},
    "fsdp and tensor": {"fsdp": 4, "tensor": 2},
    "data, fsdp and tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}
FAST = {"data", "fsdp and tensor"}


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MESHES],
)
def test_loss_gradient_and_collectives(name):
    axes = MESHES[name]
    text, value, gradient, model = on_mesh("dense", mesh_of(**axes))
    check_equal(value, gradient, *on_one_device("dense")[1:], model)
    examples = BATCH // (axes.get("data", 1) * axes.get("fsdp", 1))
    check_collectives(text, fsdp="fsdp" in axes, tensor="tensor" in axes, local_batch=examples)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"expert": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=str)
def test_experts(axes):
    _, value, gradient, model = on_mesh("experts", mesh_of(**axes))
    check_equal(value, gradient, *on_one_device("experts")[1:], model)


@pytest.mark.slow
def test_without_gathering_activations_travel():
    """What `gathered` is for; the check above would see it."""
    mesh = mesh_of(fsdp=8)
    model = shard(on_one_device("dense")[0], mesh, RULES)
    tokens = jax.device_put(batch(), batch_sharding(mesh, RULES))
    step = eqx.filter_jit(eqx.filter_value_and_grad(cross_entropy)).lower(model, tokens).compile()
    gathers = exchanged(step.compiled.as_text())["all-gather"]
    assert (BATCH, SEQ, CONFIG.d_model) in gathers


@pytest.mark.parametrize(
    ("axes", "kind"),
    [
        ({"data": 8}, "dense"),
        ({"fsdp": 8}, "dense"),
        ({"fsdp": 4, "tensor": 2}, "dense"),
        ({"data": 2, "expert": 4}, "experts"),
    ],
    ids=str,
)
def test_bytes_of_every_device(axes, kind):
    mesh = mesh_of(**axes)
    model = (
        on_one_device(kind)[0] if kind == "dense" else Llama(CONFIGS[kind], key=jax.random.key(0))
    )
    placed = shard(model, mesh, RULES)
    assert eqx.tree_equal(placed, model)
    held = {bytes_on(device, placed) for device in jax.devices()}
    assert len(held) == 1
    last = sharding_table(model, mesh, RULES).splitlines()[-1]
    assert last.split()[-1] == f"{held.pop():,}"
    sizes = [
        math.prod(x.shape) * 4 / math.prod(mesh.shape[n] for e in spec if e for n in np.ravel(e))
        for x, spec in zip(
            jax.tree.leaves(eqx.filter(model, eqx.is_array)),
            jax.tree.leaves(specs(model, mesh, RULES), is_leaf=lambda x: isinstance(x, P)),
            strict=True,
        )
    ]
    assert bytes_on(jax.devices()[0], placed) == sum(sizes)


def test_initialised_in_place():
    mesh = mesh_of(fsdp=4, tensor=2)
    make = eqx.Partial(Llama, CONFIG.replace(d_model=64, d_ff=256, vocab_size=512))
    model = init_sharded(make, mesh, RULES, key=jax.random.key(0))
    expected = shard(make(key=jax.random.key(0)), mesh, RULES)
    assert eqx.tree_equal(model, expected, rtol=1e-6, atol=1e-6)
    for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
        assert not eqx.is_array(x) or x.sharding == y.sharding


def test_no_device_holds_a_whole_parameter_while_it_is_initialised():
    """The arrays of the compiled program are shards: none has the elements of a whole matrix."""
    mesh = mesh_of(fsdp=4, tensor=2)
    make = eqx.Partial(Llama, CONFIG.replace(d_model=64, d_ff=256, vocab_size=512))

    def init(key):
        return eqx.filter(init_sharded(make, mesh, RULES, key=key), eqx.is_array)

    text = str(jax.jit(init).lower(jax.random.key(0)).compile().as_text())
    sizes = [
        math.prod(int(n) for n in dims.split(","))
        for dims in re.findall(r"\bf32\[([\d,]+)\]", text)
    ]
    shapes = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))
    whole = max(x.size for x in shapes)
    assert max(sizes) == whole // 8
    assert "all-gather" not in text


def test_the_next_step_is_not_compiled_again():
    """What a step returns is split as what it was given, to the letter."""
    mesh = mesh_of(fsdp=8)

    traced = []

    @jax.jit
    def step(params):
        traced.append(0)
        return jax.tree.map(lambda x: 0.9 * x, params)

    params = eqx.filter(shard(on_one_device("dense")[0], mesh, RULES), eqx.is_array)
    step(step(params))
    assert len(traced) == 1


@pytest.mark.slow
def test_gathered_weights_are_not_kept():
    """A device needs less memory for a step than all weights take together."""
    mesh = mesh_of(fsdp=8)
    config = CONFIG.replace(d_model=128, d_ff=512, num_layers=16, num_kv_heads=None)
    model = init_sharded(eqx.Partial(Llama, config), mesh, RULES, key=jax.random.key(0))
    tokens = jax.device_put(batch()[:8], batch_sharding(mesh, RULES))

    def loss(model, tokens):
        return cross_entropy(gathered(model, mesh, RULES), tokens)

    step = eqx.filter_jit(eqx.filter_grad(loss)).lower(model, tokens).compile()
    whole = sum(x.nbytes for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    memory = step.compiled.memory_analysis()
    assert memory.output_size_in_bytes < 1.1 * whole / 8
    assert memory.temp_size_in_bytes < whole / 2


@pytest.mark.slow
def test_weights_travel_in_another_dtype():
    mesh = mesh_of(fsdp=8)
    model = shard(on_one_device("dense")[0], mesh, RULES)

    def loss(model, tokens):
        # In float16, as collectives of bfloat16 are in float32 on a CPU.
        return cross_entropy(gathered(model, mesh, RULES, dtype=jnp.float16), tokens)

    tokens = jax.device_put(batch(), batch_sharding(mesh, RULES))
    step = eqx.filter_jit(eqx.filter_value_and_grad(loss)).lower(model, tokens).compile()
    text = step.compiled.as_text()
    found = [match["result"] for match in COLLECTIVE.finditer(text) if "gather" in match["name"]]
    assert found and all(result.startswith("f16") for result in found)
    value, gradient = step(model, tokens)
    _, expected, expected_gradient = on_one_device("dense")
    assert 0 < abs(value - expected) < 1e-3
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, atol=5e-3 * np.abs(y).max(), rtol=0)


MLA = MLAConfig(kv_rank=16, q_rank=16, nope_head_dim=8, rope_head_dim=4, v_head_dim=8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latent attention", "adapters"])
def test_gathered_serves_other_linear_maps(kind):
    key, mesh = jax.random.key(0), mesh_of(fsdp=4, tensor=2)
    if kind == "adapters":
        model = add_lora(on_one_device("dense")[0], rank=8, alpha=8, dora=True, key=key)
    else:
        model = Llama(CONFIG.replace(mla=MLA, num_kv_heads=None, tie_embeddings=True), key=key)

    def loss(model, tokens):
        return cross_entropy(gathered(model, mesh, RULES), tokens)

    expected = eqx.filter_jit(eqx.filter_value_and_grad(cross_entropy))(model, batch())
    tokens = jax.device_put(batch(), batch_sharding(mesh, RULES))
    found = eqx.filter_jit(eqx.filter_value_and_grad(loss))(shard(model, mesh, RULES), tokens)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6, rtol=0)


@pytest.mark.slow
def test_a_split_model_generates_the_same():
    mesh = mesh_of(fsdp=2, tensor=4)
    whole = on_one_device("dense")[0]
    prompt = batch()[0, :4]
    program = eqx.filter_jit(lambda model: generate(model, prompt, max_new_tokens=6, temperature=0))
    np.testing.assert_array_equal(program(shard(whole, mesh, RULES)), program(whole))
