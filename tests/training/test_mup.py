"""The maximal update parametrisation, by its law: updates of activations do not depend on width."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqx_transformer import filter_scan
from eqx_transformer.models import Llama, LlamaConfig
from eqx_transformer.training import mup_init, mup_learning_rates

BASE = LlamaConfig(
    vocab_size=32,
    d_model=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    d_ff=32,
    max_len=16,
    qkv_bias=True,
    tie_embeddings=False,
)


def wide(times, **changes):
    """As many heads, of another size."""
    head_dim = BASE.attention_head_dim
    sizes = {"d_model": times * BASE.d_model, "d_ff": times * BASE.d_ff}
    return BASE.replace(**sizes, query_scale=head_dim**0.5 / (times * head_dim), **changes)


def shapes(config):
    return eqx.filter_eval_shape(lambda key: Llama(config, key=key), jax.random.key(0))


def test_learning_rates_are_one_over_fan_in():
    rates = mup_learning_rates(shapes(wide(4)), shapes(BASE))
    params = eqx.filter(Llama(wide(4), key=jax.random.key(0)), eqx.is_inexact_array)
    assert jax.tree.structure(rates) == jax.tree.structure(params)
    block = rates.stack.blocks
    hidden = [block.attention.q_proj, block.attention.o_proj, block.mlp.down_proj, rates.head]
    assert {layer.weight for layer in hidden} == {1 / 4}
    others = [rates.embedding, rates.norm, block.attention_residual.norm]
    assert {layer.weight for layer in others} == {1}
    assert block.attention.q_proj.bias == 1


def test_initial_weights():
    model = Llama(wide(4), key=jax.random.key(0))
    scaled = mup_init(model, shapes(BASE))
    np.testing.assert_allclose(scaled.embedding.weight, 2 * model.embedding.weight)
    np.testing.assert_allclose(scaled.head.weight, model.head.weight / 2)
    same = eqx.tree_at(
        lambda m: (m.embedding.weight, m.head.weight),
        scaled,
        (model.embedding.weight, model.head.weight),
    )
    assert eqx.tree_equal(same, model)
    assert eqx.tree_equal(mup_init(model, model), model)


def test_mistakes():
    tied = BASE.replace(tie_embeddings=True)
    with pytest.raises(ValueError, match="use tie_embeddings=False"):
        mup_init(shapes(wide(2, tie_embeddings=True)), shapes(tied))
    # Keys of as many heads lead out of the width as well, and are no head.
    more = tied.replace(d_model=32, num_heads=4)
    with pytest.raises(ValueError, match="use tie_embeddings=False"):
        mup_init(shapes(more), shapes(tied))
    with pytest.raises(ValueError, match=r"k_proj\.bias is a parameter of only one"):
        mup_learning_rates(shapes(wide(2, qkv_bias=False)), shapes(BASE))


def changes(times, *, mup):
    """By how much a few steps change hidden vectors and logits, root mean square."""
    # As the base, but with all of the parametrisation, or nothing of it.
    config = wide(times) if mup else wide(times).replace(query_scale=None)
    chain, base = [optax.scale_by_adam()], shapes(BASE)
    if mup:
        factors = mup_learning_rates(shapes(config), base)
        chain.append(optax.stateless(lambda u, _: jax.tree.map(jnp.multiply, u, factors)))
    optimiser = optax.chain(*chain, optax.scale_by_learning_rate(4e-3))
    tokens = jax.random.randint(jax.random.key(2), (8, 17), 0, BASE.vocab_size)

    def outputs(model):
        x = jax.vmap(lambda t: model.stack(model.embedding(t)))(tokens[:, :-1])
        return x, jax.vmap(lambda x: model.logits(model.norm(x)))(x)

    def loss(model):
        log_p = jax.nn.log_softmax(outputs(model)[1])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()

    def step(carry, _):
        model, state = carry
        updates, state = optimiser.update(eqx.filter_grad(loss)(model), state)
        return (eqx.apply_updates(model, updates), state), None

    @eqx.filter_jit
    def run(key):
        model = Llama(config, key=key)
        model = mup_init(model, base) if mup else model
        state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
        (trained, _), _ = filter_scan(step, (model, state), None, 4)
        pairs = zip(outputs(model), outputs(trained), strict=True)
        return [jnp.sqrt(jnp.mean((after - before) ** 2)) for before, after in pairs]

    return run(jax.random.key(1))


@pytest.mark.slow
def test_coordinate_check():
    """Yang et al., 2022, appendix D.1: the law that the parametrisation is for."""
    growth = {}
    with jax.numpy_dtype_promotion("standard"):  # which optax relies on
        for mup in (True, False):
            narrow, wide = (np.asarray(changes(times, mup=mup)) for times in (4, 32))
            growth[mup] = wide / narrow  # from a width of 64 to one of 512
    (hidden, logits), (plain_hidden, plain_logits) = growth[True], growth[False]
    # What the initial head makes of changes still fades: it is of the order 1 / sqrt(width).
    assert 0.85 < hidden < 1.15 and 0.6 < logits < 1.05, growth
    assert plain_hidden > 3 and plain_logits > 1.7, growth
