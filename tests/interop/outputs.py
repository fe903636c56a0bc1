"""What encoders and encoder-decoders make of the inputs of a parity folder."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_transformer.attention import Padding
from eqx_transformer.generation import generate
from eqx_transformer.models import DeBERTa, TokenClassifier, Whisper


def states_of(stack, norm, x, **options):
    """What enters the first block, and what leaves each; the last after the norm."""
    states = [x]
    for block in stack:
        states.append(block(states[-1], **options))
    return [*states[:-1], states[-1] if norm is None else norm(states[-1])]


def numbered(name, states):
    return {f"{name}hidden_states.{i}": x for i, x in enumerate(states)}


@eqx.filter_jit
def _encode(model, tokens, types, valid):
    classifier = isinstance(model, TokenClassifier)
    encoder = model.encoder if classifier else model

    def one(tokens, types, valid):
        mask = Padding(valid)
        x = encoder.embedding(tokens, token_types=types)
        states = states_of(encoder.stack, encoder.norm, x, mask=mask)
        last = encoder(tokens, token_types=types, mask=mask)
        found = {"last_hidden_state": last} | numbered("", states)
        if encoder.pooler is not None:
            found["pooler_output"] = encoder.pool(last)
        if classifier:
            found["logits"] = model(tokens, token_types=types, mask=mask)
        return found

    return jax.vmap(one)(tokens, types, valid)


@eqx.filter_jit
def _encode_with_distances(model, tokens, types, valid):
    def one(tokens, types, valid):
        start = model.embed(tokens, token_types=types, valid=valid)
        states = [start]
        for i, block in enumerate(model.layers()):
            x = block(states[-1], mask=Padding(valid))
            states.append(model.convolve(start, x) if i == 0 else x)
        last = model(tokens, token_types=types, valid=valid)
        return {"last_hidden_state": last} | numbered("", states)

    return jax.vmap(one)(tokens, types, valid)


def run_encoder(model, inputs):
    tokens = inputs["input_ids"].astype(np.int32)
    valid = inputs.get("attention_mask", np.ones_like(tokens)) == 1
    types = inputs.get("token_type_ids")
    types = None if types is None else types.astype(np.int32)
    if isinstance(model, DeBERTa):
        return _encode_with_distances(model, tokens, types, valid)
    found = _encode(model, tokens, types, valid)
    if "logits" in found and found["logits"].shape[-1] == 1:
        found["logits"] = found["logits"][..., 0]
    return found


def _source(model, inputs):
    """The source of an encoder-decoder, and which of it is not padding."""
    if isinstance(model, Whisper):
        return inputs["input_features"], None
    tokens = inputs["input_ids"].astype(np.int32)
    return tokens, inputs.get("attention_mask", np.ones_like(tokens)) == 1


def _masked(valid):
    return {} if valid is None else {"source_mask": Padding(valid)}


@eqx.filter_jit
def _translate(model, source, valid, target, target_valid):
    def one(source, valid, target, target_valid):
        options, mask = _masked(valid), Padding(target_valid)
        context = model.encode(source, **options)
        found = {
            "logits": model(source, target, mask=mask, **options),
            "encoder_last_hidden_state": context.memory,
        }
        if not isinstance(model, Whisper):
            x = model.embedding(source)
            states = states_of(model.encoder, model.encoder_norm, x, mask=options["source_mask"])
            found |= numbered("encoder_", states)
        embedding, stack, norm = model._target
        states = states_of(stack, norm, embedding(target), context=context, mask=mask)
        return found | {"last_hidden_state": states[-1]} | numbered("decoder_", states)

    return jax.vmap(one)(source, valid, target, target_valid)


def run_seq2seq(model, inputs):
    target = inputs["decoder_input_ids"].astype(np.int32)
    valid = inputs.get("decoder_attention_mask", np.ones_like(target)) == 1
    return _translate(model, *_source(model, inputs), target, valid)


@eqx.filter_jit
def translate_one_by_one(model, source, valid, target):
    """Logits from a cache that is filled token by token."""

    def one(source, valid, target):
        def step(cache, token):
            logits, cache = model.extend(token[None], cache)
            return cache, logits[0]

        cache = model.init_cache(source, target.shape[0], **_masked(valid))
        return jax.lax.scan(step, cache, target)[1]

    return jax.vmap(one)(source, valid, target)


def cached_logits(model, inputs):
    target = inputs["decoder_input_ids"].astype(np.int32)
    return translate_one_by_one(model, *_source(model, inputs), target)


def greedy(model, inputs, start, count):
    """The most likely target, after a token that begins it."""
    source, _ = _source(model, inputs)
    cache = eqx.filter_jit(lambda model, source: model.init_cache(source, count))(
        model, jnp.asarray(source[0])
    )
    start = jnp.asarray([start], jnp.int32)
    return generate(model, start, max_new_tokens=count, temperature=0, cache=cache)
