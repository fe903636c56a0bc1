import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from eqx_transformer.interop import weight_decay_mask
from eqx_transformer.models import Llama, LlamaConfig


def test_only_matrices_decay():
    config = LlamaConfig(
        vocab_size=11, d_model=8, num_layers=3, num_heads=2, d_ff=16, use_bias=True, qk_norm=True
    )
    model = Llama(config, key=jax.random.key(0))
    parameters = eqx.filter(model, eqx.is_inexact_array)
    mask = weight_decay_mask(parameters)
    decayed = {
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(mask)
        if x is True
    }
    undecayed = {
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(mask)
        if x is False
    }
    assert all("norm" not in name and "bias" not in name for name in decayed)
    assert all("norm" in name or "bias" in name for name in undecayed)
    assert len(decayed) == 9 and len(undecayed) == 12

    # As optax uses it: with a zero gradient, what decays shrinks and the rest stays.
    optimiser = optax.adamw(0.1, weight_decay=0.5, mask=weight_decay_mask)
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a Python float to an integer
        updates, _ = optimiser.update(zeros, optimiser.init(parameters), parameters)
    stepped = eqx.apply_updates(model, updates)
    assert jnp.array_equal(stepped.stack.blocks.attention_residual.norm.weight, jnp.ones((3, 8)))
    ratio = stepped.stack.blocks.mlp.up_proj.weight / model.stack.blocks.mlp.up_proj.weight
    assert jnp.allclose(ratio, 0.95)
