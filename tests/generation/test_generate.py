"""`generate` does what a loop over full forward passes would do."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformer.generation import generate, sample
from eqx_transformer.generation._generate import _run
from eqx_transformer.models import Llama, LlamaConfig

VOCAB = 23


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=VOCAB,
        d_model=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_len=40,
        window=9,
    )
    return Llama(config, key=jax.random.key(0))


def slowly(model, prompt, count, key, **options):
    """One full forward pass a token."""
    tokens = list(prompt)
    forward = eqx.filter_jit(model)
    for index in range(count):
        logits = forward(jnp.asarray(tokens, jnp.int32))[-1]
        tokens.append(int(sample(logits, jax.random.fold_in(key, index), **options)))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 7}, {"top_p": 0.9}]
)
def test_equals_full_forward_passes(model, options):
    prompt, key = np.arange(5) % VOCAB, jax.random.key(3)
    got = generate(model, jnp.asarray(prompt), max_new_tokens=12, key=key, **options)
    assert got.tolist() == slowly(model, prompt, 12, key, **options)


def test_fills_the_model_to_the_brim(model):
    """The bucket of a prompt of 33 would be 64, more than `max_len`."""
    prompt, key = np.arange(33) % VOCAB, jax.random.key(3)
    got = generate(model, jnp.asarray(prompt), max_new_tokens=7, temperature=0, key=key)
    assert got.tolist() == slowly(model, prompt, 7, key, temperature=0)


def test_stops_and_repeats_the_stop_token(model):
    prompt, key = jnp.arange(5), jax.random.key(4)
    free = generate(model, prompt, max_new_tokens=12, key=key).tolist()
    stop = free[4]
    first = free.index(stop)
    got = generate(model, prompt, max_new_tokens=12, key=key, stop_tokens=(stop, VOCAB + 5))
    assert got.tolist() == free[:first] + [stop] * (12 - first)


def test_a_batch_is_a_loop(model):
    prompts = jax.random.randint(jax.random.key(5), (3, 9), 0, VOCAB)
    lengths, keys = jnp.asarray([2, 9, 5]), jax.random.split(jax.random.key(6), 3)

    def one(prompt, length, key):
        return generate(
            model, prompt, prompt_length=length, max_new_tokens=6, key=key, stop_tokens=(1, 2)
        )

    together = jax.vmap(one)(prompts, lengths, keys)
    for row, prompt, length, key in zip(together, prompts, lengths.tolist(), keys, strict=True):
        alone = generate(model, prompt[:length], max_new_tokens=6, key=key, stop_tokens=(1, 2))
        assert row.tolist() == alone.tolist()


def test_one_compilation_for_a_bucket(model):
    def compilations():
        return _run._cached._cache_size()

    generate(model, jnp.arange(3), max_new_tokens=4, temperature=0.5, key=jax.random.key(0))
    before = compilations()
    for seq, temperature in ((5, 0.0), (9, 1.5), (16, 0.7)):
        key = jax.random.key(seq)
        generate(model, jnp.arange(seq), max_new_tokens=4, temperature=temperature, key=key)
    assert compilations() == before
    generate(model, jnp.arange(17), max_new_tokens=4, temperature=0.5, key=jax.random.key(0))
    assert compilations() == before + 1


def test_dropout_is_off(model):
    config = model.config.replace(dropout_rate=0.5)
    dropping = Llama(config, key=jax.random.key(0))
    got = generate(dropping, jnp.arange(5), max_new_tokens=4, temperature=0)
    assert got.tolist() == generate(model, jnp.arange(5), max_new_tokens=4, temperature=0).tolist()


def test_tokens_are_streamed_in_order(model):
    seen = []
    got = generate(model, jnp.arange(5), max_new_tokens=9, temperature=0, on_token=seen.append)
    jax.effects_barrier()
    assert seen == got.tolist()
    assert all(type(x) is int for x in seen)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (jnp.zeros((2, 3), int), {}, "jax.vmap"),
        (jnp.zeros(0, int), {}, "0 tokens"),
        (jnp.zeros(35, int), {"max_new_tokens": 6}, "max_len=40"),
        (jnp.zeros(3, int), {"max_new_tokens": 0}, "max_new_tokens=0"),
        (jnp.zeros(3, int), {"temperature": -1.0}, "temperature=-1.0"),
        (jnp.zeros(3, int), {"top_k": 0}, "top_k=0"),
        (jnp.zeros(3, int), {"top_p": 1.5}, "top_p=1.5"),
        (jnp.zeros(3, int), {"min_p": -0.5}, "min_p=-0.5"),
        (jnp.zeros(3, int), {"key": None}, "needs a key"),
    ],
)
def test_errors(model, prompt, options, message):
    options = {"max_new_tokens": 4, "key": jax.random.key(0)} | options
    with pytest.raises((ValueError, TypeError), match=message.replace(".", r"\.")):
        generate(model, prompt, **options)


def test_prompt_length_outside_of_the_prompt(model):
    with pytest.raises(Exception, match="prompt_length must be"):
        generate(
            model, jnp.arange(3), prompt_length=jnp.asarray(0), max_new_tokens=2, temperature=0
        )
