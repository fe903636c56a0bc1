"""A step on the devices of one or several processes against one device; run by the tests beside it.

python processes.py '{"axes": {"fsdp": 2, "tensor": 2}, "devices": 4, "index": 0, "count": 1}'
"""

import json
import sys

import jax

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    jax.config.update("jax_num_cpu_devices", arguments["devices"])
    if arguments["count"] > 1:
        jax.distributed.initialize(
            coordinator_address=arguments["coordinator"],
            num_processes=arguments["count"],
            process_id=arguments["index"],
        )

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from eqx_transformer.models import Llama, LlamaConfig, MoEConfig
from eqx_transformer.sharding import (
    Rules,
    batch_sharding,
    context_parallel,
    expert_parallel,
    gathered,
    init_sharded,
    pipeline_parallel,
)

BATCH, SEQ = 8, 16
CONFIG = LlamaConfig(
    vocab_size=48,
    d_model=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    d_ff=40,
    max_len=SEQ,
    document_start_id=0,
    tie_embeddings=False,
)
RULES = Rules(fsdp_min_size=128)


def cross_entropy(model, inputs, targets):
    log_p = jax.nn.log_softmax(jax.vmap(model)(inputs))
    return -jnp.take_along_axis(log_p, targets[:, :, None], axis=-1).mean()


def compare(axes, *, experts=False):
    """The largest difference of loss and gradients, of the shards that this process has."""
    config = CONFIG.replace(moe=MoEConfig(num_experts=4, d_expert=24)) if experts else CONFIG
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (BATCH, SEQ + 1), np.int32)
    examples = tokens[:, :-1], tokens[:, 1:]
    make, key = eqx.Partial(Llama, config), jax.random.key(0)
    with jax.default_device(jax.local_devices()[0]):
        expected = eqx.filter_jit(eqx.filter_value_and_grad(cross_entropy))(
            make(key=key), *examples
        )

    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes))
    split = batch_sharding(mesh, RULES, sequence=True)
    # Every process reads its own part, and no more.
    inputs, targets = (
        jax.make_array_from_callback(x.shape, split, lambda index, x=x: x[index]) for x in examples
    )

    def loss(model, inputs, targets):
        model = gathered(model, mesh, RULES)
        if experts:
            model = expert_parallel(model, mesh, RULES)
        model = context_parallel(model, mesh, RULES)
        model = pipeline_parallel(model, mesh, RULES, num_microbatches=2)
        return cross_entropy(model, inputs, targets)

    model = init_sharded(make, mesh, RULES, key=key)
    found = eqx.filter_jit(eqx.filter_value_and_grad(loss))(model, inputs, targets)
    differences = [
        np.abs(np.asarray(part.data) - np.asarray(y)[part.index]).max()
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        for part in x.addressable_shards
    ]
    return float(max(differences))


if __name__ == "__main__":
    assert jax.device_count() == arguments["devices"] * arguments["count"]
    print(compare(arguments["axes"], experts=arguments.get("experts", False)))
