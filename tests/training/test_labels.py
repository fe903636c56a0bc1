"""Labels of parameters, where many layers and experts are one array, and with optax itself."""

from collections.abc import Hashable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optax.contrib
import pytest

from eqx_transformer.models import (
    Llama,
    LlamaConfig,
    MoEConfig,
    TransformerConfig,
    TransformerEncoder,
    Transolver,
    TransolverConfig,
    VisionTransformer,
    ViTConfig,
)
from eqx_transformer.training import (
    add_lora,
    muon_dimension_numbers,
    parameter_labels,
    trainable,
    weight_decay_mask,
)

CONFIG = LlamaConfig(
    vocab_size=11,
    d_model=8,
    num_layers=3,
    num_heads=2,
    d_ff=16,
    use_bias=True,
    qk_norm=True,
    moe=MoEConfig(num_experts=3, num_shared_experts=1, router_bias=True, every=2),
)
VIT = ViTConfig(image_size=8, patch_size=4, d_model=8, num_layers=2, num_heads=2, d_ff=8)
KINDS = {
    "llama": (Llama, CONFIG),
    "encoder": (TransformerEncoder, TransformerConfig(vocab_size=11, d_model=8, num_layers=2)),
    "vit": (VisionTransformer, VIT.replace(layer_scale=0.1, num_classes=3, qk_norm=True)),
    "transolver": (
        Transolver,
        TransolverConfig(
            num_features=2, out_features=1, d_model=8, num_layers=2, num_heads=2, num_conditions=2
        ),
    ),
}


def shapes(make, config):
    model = eqx.filter_eval_shape(lambda key: make(config, key=key), jr.key(0))
    return eqx.filter(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))


def by_path(tree, is_leaf=None):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_biases_are_vectors_in_every_model(kind):
    model = shapes(*KINDS[kind])
    marks, labels = by_path(weight_decay_mask(model)), by_path(parameter_labels(model))
    words = ("norm", "bias", "scale", "token", "temperature")
    for path, decays in marks.items():
        is_vector = any(word in path for word in words) and "embedding.tokens" not in path
        is_vector &= not path.endswith("proj.weight")
        assert decays != is_vector, path
        assert (labels[path] == "vector") == is_vector
    assert {"hidden", "outer", "vector"} == set(labels.values())


def test_what_is_hidden():
    model = shapes(*KINDS["llama"])
    hidden = {path for path, label in by_path(parameter_labels(model)).items() if label == "hidden"}
    assert {path.split(".")[0] for path in hidden} == {"stack"}
    assert sum(path.endswith("experts.up_proj.weight") for path in hidden) == 2
    outer = {path for path, label in by_path(parameter_labels(model)).items() if label == "outer"}
    assert outer == {"embedding.weight", "head.weight"}


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(vocab_size=11, d_model=8, num_layers=3, num_heads=2, d_ff=16)
    return Llama(config.replace(use_bias=True), key=jr.key(0))


def is_numbers(x):
    return isinstance(x, optax.contrib.MuonDimensionNumbers)


def stepped(optimiser, model, gradient):
    params = eqx.filter(model, eqx.is_inexact_array)

    @jax.jit
    def step(params, gradient):
        with jax.numpy_dtype_promotion("standard"):  # optax raises a Python float to an integer
            updates, _ = optimiser.update(gradient, optimiser.init(params), params)
        return eqx.apply_updates(params, updates)

    return step(params, gradient)


def test_decay_with_optax(model):
    """With a zero gradient what decays shrinks, and the rest stays."""
    optimiser = optax.adamw(0.1, weight_decay=0.5, mask=weight_decay_mask)
    zeros = jax.tree.map(jnp.zeros_like, eqx.filter(model, eqx.is_inexact_array))
    new = stepped(optimiser, model, zeros)
    np.testing.assert_array_equal(new.stack.blocks.attention_residual.norm.weight, jnp.ones((3, 8)))
    old = model.stack.blocks.mlp.up_proj.weight
    np.testing.assert_allclose(new.stack.blocks.mlp.up_proj.weight, 0.95 * old, rtol=1e-6)


def test_each_layer_has_matrices_of_its_own_in_muon(model):
    """One step for the stack is a step for each layer alone; biases and the head get Adam."""
    parts = ("q_proj", "head")
    params = eqx.filter(model, trainable(model, lambda path: any(part in path for part in parts)))
    gradient = jax.tree.map(lambda x: jnp.cos(40 * x + 1), params)
    optimiser = optax.contrib.muon(0.1, muon_weight_dimension_numbers=muon_dimension_numbers)
    new = stepped(optimiser, params, gradient)
    weight, slope, got = (m.stack.blocks.attention.q_proj.weight for m in (params, gradient, new))
    for layer in range(3):
        alone = stepped(optax.contrib.muon(0.1), weight[layer], slope[layer])
        np.testing.assert_allclose(got[layer], alone, rtol=1e-4, atol=1e-5)
    adam = stepped(
        optax.contrib.muon(0.1), params.head.weight.ravel(), gradient.head.weight.ravel()
    )
    np.testing.assert_allclose(new.head.weight.ravel(), adam, rtol=1e-5, atol=1e-6)


def test_muon_gets_what_is_hidden():
    model = shapes(*KINDS["llama"])
    numbers = by_path(muon_dimension_numbers(model), is_leaf=is_numbers)
    labels = by_path(parameter_labels(model))
    assert set(numbers) == {path for path, label in labels.items() if label == "hidden"}
    assert set(numbers.values()) == {(-2, -1)}


def test_labels_with_optax(model):
    """Different rates for different kinds, and nothing for vectors."""
    rates: dict[Hashable, Any] = {
        "hidden": optax.sgd(0.1),
        "outer": optax.sgd(0.2),
        "vector": optax.set_to_zero(),
    }
    optimiser = optax.multi_transform(rates, parameter_labels)
    ones = jax.tree.map(jnp.ones_like, eqx.filter(model, eqx.is_inexact_array))
    new = stepped(optimiser, model, ones)
    for part, rate in (("up_proj.weight", 0.1), ("up_proj.bias", 0)):
        layer, name = part.split(".")
        old, moved = (getattr(getattr(m.stack.blocks.mlp, layer), name) for m in (model, new))
        np.testing.assert_allclose(moved, old - rate, atol=1e-6)
    np.testing.assert_allclose(new.head.weight, model.head.weight - 0.2, atol=1e-6)


def test_freezing(model):
    spec = trainable(model, lambda path: path.startswith("head"))
    trained, frozen = eqx.partition(model, spec)
    assert [x.shape for x in jax.tree.leaves(trained)] == [(8, 11)]
    assert eqx.tree_equal(eqx.combine(trained, frozen), model)
    with pytest.raises(ValueError, match=r"no parameter; .*\['embedding.weight', "):
        trainable(model, lambda path: "heads" in path)


def test_adapters_have_labels_too(model):
    adapted = eqx.filter_eval_shape(add_lora, model, 2, alpha=2, dora=True, key=jr.key(0))
    labels = by_path(parameter_labels(eqx.filter(adapted, lambda x: hasattr(x, "shape"))))
    prefix = "stack.blocks.attention.q_proj."
    assert labels[prefix + "a"] == labels[prefix + "b"] == "hidden"
    assert labels[prefix + "magnitude"] == labels[prefix + "base.bias"] == "vector"
