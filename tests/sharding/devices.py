"""A model on eight devices against the same model on one, and what the devices exchange."""

import collections
import functools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_transformer.models import Llama, LlamaConfig, MoEConfig
from eqx_transformer.sharding import Rules

BATCH, SEQ = 16, 12
CONFIG = LlamaConfig(
    vocab_size=48,
    d_model=16,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    d_ff=40,
    max_len=SEQ,
    tie_embeddings=False,
)
CONFIGS = {
    "dense": CONFIG,
    "experts": CONFIG.replace(moe=MoEConfig(num_experts=8, d_expert=24)),
}
RULES = Rules(fsdp_min_size=128)


def mesh_of(**axes):
    count = math.prod(axes.values())
    return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[:count])


def cross_entropy(model, tokens):
    return cross_entropy_of(model, tokens[:, :-1], tokens[:, 1:])


def cross_entropy_of(model, inputs, targets, **options):
    """Options are those of the model, with an axis for the batch."""
    logits = jax.vmap(lambda x, options: model(x, **options))(inputs, options)
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, targets[:, :, None], axis=-1).mean()


def batch():
    return jax.random.randint(jax.random.key(1), (BATCH, SEQ + 1), 0, CONFIG.vocab_size)


@functools.cache
def on_one_device(kind):
    model = Llama(CONFIGS[kind], key=jax.random.key(0))
    return model, *eqx.filter_jit(eqx.filter_value_and_grad(cross_entropy))(model, batch())


COLLECTIVE = re.compile(
    r"= (?P<result>[^=]*?) "
    r"(?P<name>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def exchanged(text):
    """The shapes that every kind of collective makes, in the whole program."""
    found = collections.defaultdict(list)
    for match in COLLECTIVE.finditer(text):
        for dims in re.findall(r"\b[fsubp]\w*\[([\d,]*)\]", match["result"]):
            found[match["name"]].append(tuple(int(n) for n in dims.split(",") if n))
    return found


def check_equal(value, gradient, expected, expected_gradient, model):
    np.testing.assert_allclose(value, expected, atol=2e-6, rtol=0)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True)
    for x, y in pairs:
        assert np.abs(y).max() > 1e-4
        np.testing.assert_allclose(x, y, atol=2e-6, rtol=0)
    # The gradient of every parameter is where the parameter is.
    params = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    for x, g in zip(params, jax.tree.leaves(gradient), strict=True):
        assert g.sharding.is_equivalent_to(x.sharding, x.ndim)


def bytes_on(device, tree):
    arrays = [x for x in jax.tree.leaves(tree) if eqx.is_array(x)]
    return sum(s.data.nbytes for x in arrays for s in x.addressable_shards if s.device == device)
