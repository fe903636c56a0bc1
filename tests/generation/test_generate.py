"""`generate` does what a loop over full forward passes would do."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation.decoders import markov
from jax.extend.core import jaxprs_in_params

from eqx_transformer.generation import (
    PromptLookup,
    generate,
    generate_speculatively,
    generate_with_log_probs,
    sample,
)
from eqx_transformer.generation._generate import _run
from eqx_transformer.models import Llama, LlamaConfig
from eqx_transformer.stacks import Stack, unstacked

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


def test_several_samples_read_the_prompt_once(model):
    prompt, keys = jnp.arange(9), jax.random.split(jax.random.key(0), 5)

    def one(key):
        return generate(model, prompt, max_new_tokens=6, key=key)

    rows = jax.vmap(one)(keys)
    assert len({tuple(row) for row in rows.tolist()}) > 1
    assert rows.tolist() == [one(key).tolist() for key in keys]
    # In the program nothing has the axes of a batch of prompts.
    shapes = {str(v.aval) for v in variables(jax.make_jaxpr(jax.vmap(one))(keys).jaxpr)}
    assert "float32[16,16]" in shapes and "float32[5,16,16]" not in shapes


def variables(jaxpr):
    """All variables of a program and of those inside of it."""
    for equation in equations(jaxpr):
        yield from equation.outvars


def test_a_batch_does_not_copy_its_caches(model):
    """A loop with a condition for each example would select the state of those that are done."""
    prompts, keys = jnp.zeros((3, 9), jnp.int32), jax.random.split(jax.random.key(0), 3)

    def one(prompt, key):
        return generate(model, prompt, max_new_tokens=6, key=key, stop_tokens=(1,))

    jaxpr = jax.make_jaxpr(jax.vmap(one))(prompts, keys).jaxpr
    (loop,) = [e for e in equations(jaxpr) if e.primitive.name == "while"]
    body = loop.params["body_jaxpr"].jaxpr
    cache = {v.aval.shape for v in body.outvars if v.aval.ndim >= 4}
    selected = {e.outvars[0].aval.shape for e in body.eqns if e.primitive.name == "select_n"}
    assert cache and not cache & selected


def equations(jaxpr):
    """All equations of a program and of those inside of it."""
    for equation in jaxpr.eqns:
        yield equation
        for sub in jaxprs_in_params(equation.params):
            yield from equations(sub)


def test_the_prompt_meets_the_vocabulary_at_its_last_token_only(model):
    def program(prompt):
        return generate(model, prompt, max_new_tokens=4, temperature=0)

    text = jax.jit(program).lower(jnp.arange(20)).compile().as_text()
    assert f"f32[1,{VOCAB}]" in text and f"f32[32,{VOCAB}]" not in text


def test_log_probs_and_length(model):
    prompt, key = jnp.arange(5), jax.random.key(4)
    got = generate_with_log_probs(model, prompt, max_new_tokens=12, temperature=0.7, key=key)
    assert int(got.length) == 12
    tokens = jnp.concatenate([prompt, got.tokens])
    log_p = jax.nn.log_softmax(model(tokens)[4:-1])
    np.testing.assert_allclose(
        got.log_probs, jnp.take_along_axis(log_p, got.tokens[:, None], axis=1)[:, 0], atol=1e-5
    )
    stop = got.tokens.tolist()[4]
    first = got.tokens.tolist().index(stop)
    again = generate_with_log_probs(
        model, prompt, max_new_tokens=12, temperature=0.7, key=key, stop_tokens=[stop]
    )
    assert int(again.length) == first + 1
    assert (np.asarray(again.log_probs[first + 1 :]) == 0).all()
    np.testing.assert_allclose(again.log_probs[: first + 1], got.log_probs[: first + 1], rtol=1e-6)


def test_stop_sequences_are_found_in_what_is_generated(model):
    prompt = jnp.arange(5)
    free = generate(model, prompt, max_new_tokens=12, temperature=0).tolist()
    run = free[3:6]
    options = {"max_new_tokens": 12, "temperature": 0}
    got = generate_with_log_probs(model, prompt, stop_sequences=[[99, 98], run], **options)
    end = next(i for i in range(3, 13) if free[i - 3 : i] == run)
    assert int(got.length) == end
    assert got.tokens.tolist() == free[:end] + [run[-1]] * (12 - end)
    # The prompt is not searched, nor its end together with what is new.
    across = [prompt.tolist()[-1], free[0]]
    if across not in [free[i : i + 2] for i in range(11)]:
        got = generate_with_log_probs(model, prompt, stop_sequences=[across], **options)
        assert int(got.length) == 12


def test_min_new_tokens(model):
    prompt = jnp.arange(5)
    free = generate(model, prompt, max_new_tokens=12, temperature=0).tolist()
    stop = free[1]
    options = {"max_new_tokens": 12, "temperature": 0, "stop_tokens": [stop]}
    got = generate_with_log_probs(model, prompt, min_new_tokens=5, **options)
    assert stop not in got.tokens.tolist()[:4]
    assert int(got.length) >= 5


def test_goes_on_from_a_cache(model):
    prompt, options = jnp.arange(5), {"temperature": 0}
    whole = generate(model, prompt, max_new_tokens=12, **options).tolist()
    cache = model.init_cache(32)
    first = generate_with_log_probs(model, prompt, max_new_tokens=5, cache=cache, **options)
    second = generate(model, first.tokens[-1:], max_new_tokens=7, cache=first.cache, **options)
    assert first.tokens.tolist() + second.tolist() == whole


def test_a_model_with_a_known_distribution():
    model, keys = markov(3, 0), jax.random.split(jax.random.key(0), 20_000)
    rows = jax.jit(
        jax.vmap(lambda key: generate(model, jnp.asarray([1, 2]), max_new_tokens=2, key=key))
    )(keys)
    p = jax.nn.softmax(model.table, axis=-1)
    expected = (p[1, 2][:, None] * p[2]).reshape(-1)
    got = np.bincount(np.asarray(rows @ jnp.asarray([3, 1])), minlength=9)
    expected = np.asarray(expected)
    statistic = ((got - 20_000 * expected) ** 2 / (20_000 * expected)).sum()
    assert statistic < 8 + 5 * np.sqrt(16)


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
        (jnp.zeros(3, int), {"typical_p": 2}, "typical_p=2"),
        (jnp.zeros(3, int), {"min_new_tokens": 9}, "min_new_tokens=9"),
        (jnp.zeros(3, int), {"stop_sequences": [[]]}, "stop sequence"),
        (jnp.zeros(3, int), {"prompt_length": 5}, "prompt_length=5"),
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


@pytest.mark.parametrize("function", [generate, generate_speculatively])
def test_unstacked_models_give_the_same(model, function):
    prompt, options = jnp.arange(5), {"max_new_tokens": 9, "temperature": 0}
    if function is generate_speculatively:
        options["draft"] = PromptLookup()
    apart = unstacked(model)
    assert not any(isinstance(x, Stack) for x in jax.tree.leaves(apart, is_leaf=is_stack))
    got, wanted = (jax.tree.leaves(function(m, prompt=prompt, **options)) for m in (apart, model))
    assert [x.tolist() for x in got] == [x.tolist() for x in wanted]


def is_stack(x):
    return isinstance(x, Stack)
