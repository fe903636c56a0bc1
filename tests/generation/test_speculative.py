"""Speculative decoding has the distribution of the model it is for, whatever the draft."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation.decoders import Markov, markov
from generation.test_cache_law import model_of

from eqx_transformer.generation import (
    ForbidRepeats,
    History,
    LogitBias,
    PromptLookup,
    RepetitionPenalty,
    filter_logits,
    generate,
    generate_speculatively,
)
from eqx_transformer.models import Llama, LlamaConfig, TransformerConfig, TransformerDecoder
from eqx_transformer.nn import truncate

PROMPT = jnp.asarray([1, 0, 2])


def expected(model, count, processors=(), **options):
    """The probability of each continuation, by the definition."""
    vocab = model.table.shape[0]
    result = {}
    for new in itertools.product(range(vocab), repeat=count):
        tokens, p = [1, 0, 2], 1.0
        for token in new:
            seen = jnp.asarray([*tokens, *[0] * 8], jnp.int32)
            logits = model.table[tokens[-2], tokens[-1]]
            for processor in processors:
                past = History(seen, jnp.int32(len(tokens)), jnp.int32(3))
                logits = processor(logits, past)
            p *= float(jax.nn.softmax(filter_logits(logits, **options))[token])
            tokens.append(token)
        result[new] = p
    return result


@pytest.mark.parametrize("draft", [markov(3, 7), markov(3, 0), PromptLookup(2)])
@pytest.mark.parametrize(
    ("options", "processors"),
    [({}, ()), ({"temperature": 0.7, "top_p": 0.8}, (RepetitionPenalty(1.3), LogitBias({1: 0.4})))],
)
def test_distribution(draft, options, processors):
    model, count, draws = markov(3, 0), 3, 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    options = {"max_new_tokens": count, "num_draft_tokens": 2, **options}

    def one(key):
        return generate_speculatively(
            model, draft, PROMPT, processors=processors, key=key, **options
        ).tokens

    rows = np.asarray(jax.jit(jax.vmap(one))(keys))
    codes, counts = np.unique(rows @ [9, 3, 1], return_counts=True)
    got = np.zeros(27)
    got[codes] = counts
    del options["max_new_tokens"], options["num_draft_tokens"]
    p = np.array(list(expected(model, count, processors, **options).values()))
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert (got[p == 0] == 0).all()
    some = p * draws > 5
    statistic = ((got - p * draws)[some] ** 2 / (p * draws)[some]).sum()
    # Pearson's statistic: its mean is below the number of cells, its deviation about 7 here.
    assert statistic < some.sum() + 5 * np.sqrt(2 * some.sum())


@pytest.fixture(scope="module")
def greedy():
    """A model, and another."""
    config = LlamaConfig(
        vocab_size=23, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, max_len=64, window=9
    )
    return model_of(config, 0), model_of(config.replace(num_layers=1), 1)


@pytest.mark.parametrize("draft", ["itself", "another", "lookup"])
def test_greedy_tokens_are_those_of_generate(greedy, draft):
    model, other = greedy
    drafts = {"itself": model, "another": other, "lookup": PromptLookup()}
    prompt, count = jnp.arange(7) % 3, 21
    # No token is 23. A stop of two tokens, so that both calls are of one program.
    options: dict[str, Any] = {"max_new_tokens": count, "temperature": 0}
    options["stop_sequences"] = [[23, 23]]
    wanted = generate(model, prompt, **options)
    got = generate_speculatively(model, drafts[draft], prompt, **options)
    assert got.tokens.tolist() == wanted.tolist()
    assert int(got.length) == count
    if draft == "itself":  # four proposals and one more token a call
        assert int(got.num_calls) == -(-count // 5)
    # A stop in the middle of what is accepted at once.
    options["stop_sequences"] = [wanted.tolist()[9:11]]
    wanted = generate(model, prompt, **options)
    again = generate_speculatively(model, drafts[draft], prompt, **options)
    assert again.tokens.tolist() == wanted.tolist()
    assert int(again.length) <= 11


def test_a_batch_is_a_loop():
    model, draft = markov(5, 0), markov(5, 1)
    prompts = jax.random.randint(jax.random.key(5), (4, 6), 0, 5)
    lengths, keys = jnp.asarray([1, 6, 3, 2]), jax.random.split(jax.random.key(6), 4)

    def one(prompt, length, key):
        return generate_speculatively(
            model, draft, prompt, prompt_length=length, max_new_tokens=9, key=key, stop_tokens=[3]
        )

    together = jax.vmap(one)(prompts, lengths, keys)
    for i in range(4):
        alone = one(prompts[i, : lengths[i]], None, keys[i])
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            assert np.asarray(a).tolist() == np.asarray(b)[i].tolist()


def test_lookup_proposes_what_followed():
    def propose(tokens, count, size=3):
        padded = jnp.asarray(tokens + [9] * 5, jnp.int32)
        past = History(padded, jnp.int32(len(tokens)), jnp.int32(0))
        return PromptLookup(size).propose(past, count).tolist()

    assert propose([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert propose([7, 2, 4, 1, 2, 5, 1, 2], 1) == [5]  # the last occurrence
    assert propose([8, 2, 6, 1, 2], 3) == [6, 1, 2]  # of one token, where there is none of two
    assert propose([1, 2, 1, 2], 4) == [1, 2, 1, 2]  # on and on
    assert propose([1, 2, 3], 2) == [3, 3]  # nothing found


def test_repeating_text_takes_fewer_calls():
    """A model that counts in circles is predicted by looking back."""
    table = jnp.stack([jnp.roll(10 * jnp.eye(5), 1, axis=1)] * 5)
    model = Markov(table)
    options = {"max_new_tokens": 40, "temperature": 0}
    got = generate_speculatively(model, PromptLookup(), jnp.arange(5), **options)
    assert got.tokens.tolist() == [i % 5 for i in range(5, 45)]
    assert got.tokens.tolist() == generate(model, jnp.arange(5), **options).tolist()
    assert int(got.num_calls) <= 10


def test_processors_see_the_proposals():
    model, draft = markov(4, 0), markov(4, 0)
    options = {"max_new_tokens": 12, "temperature": 0, "processors": [ForbidRepeats(2)]}
    got = generate_speculatively(model, draft, PROMPT, **options).tokens
    assert got.tolist() == generate(model, PROMPT, **options).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens=0"),
        ({"max_new_tokens": 508}, "max_len=512"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": 1.0}, "needs a key"),
    ],
)
def test_errors(options, message):
    options = {"max_new_tokens": 4, "temperature": 0} | options
    with pytest.raises(ValueError, match=message):
        generate_speculatively(markov(3, 0), PromptLookup(), PROMPT, **options)
    with pytest.raises(ValueError, match="size=0"):
        PromptLookup(0)


@pytest.mark.parametrize("positions", ["rope", "learned", "alibi"])
def test_caches_of_models_take_tokens_back(positions):
    config = TransformerConfig(
        vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=16, positions=positions
    )
    model = eqx.nn.inference_mode(TransformerDecoder(config, key=jax.random.key(0)))
    extend = eqx.filter_jit(model.extend)
    tokens = jnp.asarray([3, 1, 0, 4, 5, 9, 2])  # with padding in the middle
    _, cache = extend(tokens[:4], model.init_cache(12))
    wanted, _ = extend(tokens[4:6], cache)
    _, longer = extend(jnp.asarray([0, 8, 8]), cache)
    got, _ = extend(tokens[4:6], truncate(longer, 4))
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_documents_are_taken_back():
    config = LlamaConfig(vocab_size=11, d_model=8, num_layers=1, num_heads=2, document_start_id=1)
    model = Llama(config, key=jax.random.key(0))
    extend = eqx.filter_jit(model.extend)
    _, cache = extend(jnp.asarray([1, 3, 4]), model.init_cache(12))
    wanted, _ = extend(jnp.asarray([5, 6]), cache)
    _, longer = extend(jnp.asarray([1, 8]), cache)
    got, _ = extend(jnp.asarray([5, 6]), truncate(longer, 3))
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_what_cannot_be_taken_back_is_refused():
    config = TransformerConfig(
        vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=16, attention="linear"
    )
    model = TransformerDecoder(config, key=jax.random.key(0))
    with pytest.raises(ValueError, match="sum over all"):
        truncate(model.init_cache(12), 0)
