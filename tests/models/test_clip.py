"""Two towers: what represents a text, scores, losses."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Causal, Padding
from eqx_transformer.models import CLIP, CLIPConfig, TransformerConfig, ViTConfig

TINY = CLIPConfig(
    vision=ViTConfig(image_size=4, patch_size=2, d_model=8, num_heads=2, num_layers=1, d_ff=8),
    text=TransformerConfig(
        vocab_size=11,
        d_model=12,
        num_layers=1,
        num_heads=2,
        d_ff=8,
        max_len=6,
        dropout_rate=0.0,
        pad_token_id=None,
        positions="learned",
    ),
    d_embedding=8,
    eos_token_id=9,
)
IMAGE, TOKENS = jr.normal(jr.key(1), (3, 4, 4)), jnp.asarray([3, 10, 9, 1, 9])


def build(**changes):
    return CLIP(TINY.replace(**changes), key=jr.key(0))


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_configuration():
    assert CLIPConfig.from_json(TINY.to_json()) == TINY
    for changes, message in (
        ({"eos_token_id": None}, "'eos' needs an id"),
        ({"text_pooling": "last"}, "the others have no use for it"),
        ({"d_embedding": 0}, "d_embedding=0"),
        ({"image_projection": False, "d_embedding": 9}, r"vision.d_model=8 must be d_embedding=9"),
        ({"eos_token_id": 11}, "eos_token_id=11 must be a token id, from 0 to vocab_size - 1 = 10"),
        ({"text": TINY.text.replace(pooler=True)}, "pooler=True of the text has no effect"),
        ({"vision": TINY.vision.replace(num_classes=2)}, r"num_classes=2 must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            TINY.replace(**changes)


def test_what_represents_a_text():
    last = {"text_pooling": "last", "eos_token_id": None}
    largest = {"text_pooling": "largest", "eos_token_id": None}
    for changes, index in (({}, 2), (largest, 1), (last, 4)):
        tower = build(**changes).text_tower
        close(tower(TOKENS), tower.encode(TOKENS)[index])


def test_texts_are_read_forwards_or_both_ways():
    causal, both = build(), build(text_causal=False)
    assert causal.text_tower.stack.blocks.attention.mask == Causal()
    changed = TOKENS.at[4].set(2)
    close(causal.embed_text(changed), causal.embed_text(TOKENS))
    assert not jnp.allclose(both.embed_text(changed), both.embed_text(TOKENS), atol=1e-4)
    valid = Padding(jnp.arange(5) < 4)
    close(both.embed_text(changed, mask=valid), both.embed_text(TOKENS, mask=valid))


def test_fields_that_change_what_is_built():
    assert build(image_projection=False).image_proj is None
    assert build().text_proj.bias is None
    assert build(text_projection_bias=True).text_proj.bias is not None
    assert build().logit_bias is None and build(loss="sigmoid").logit_bias == -10
    assert build(d_embedding=4).embed_image(IMAGE).shape == (4,)
    assert build().image_tower.config.d_model == 8 and build().text_tower.config.text.d_model == 12
    names = {field.name for field in dataclasses.fields(CLIPConfig)}
    assert len(names) == 9, "a new field needs a test"


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_scores_and_losses(x64, loss):
    model = build(loss=loss)
    images = jax.vmap(model.embed_image)(jr.normal(jr.key(2), (3, 3, 4, 4)))
    texts = jax.vmap(model.embed_text)(jr.randint(jr.key(3), (3, 5), 0, 11))
    close(jnp.sum(images**2, axis=1), jnp.ones(3), 1e-12)
    close(jnp.sum(texts**2, axis=1), jnp.ones(3), 1e-12)
    scores = np.asarray(model.scores(images, texts))
    bias = 0.0 if model.logit_bias is None else float(model.logit_bias)
    np.testing.assert_allclose(
        scores, float(jnp.exp(model.logit_scale)) * np.asarray(images @ texts.T) + bias, rtol=1e-6
    )
    if loss == "softmax":
        logs = [s - np.log(np.exp(s).sum(axis=1, keepdims=True)) for s in (scores, scores.T)]
        expected = -sum(np.trace(x) for x in logs) / 6
    else:
        signs = 2 * np.eye(3) - 1
        expected = np.log1p(np.exp(-signs * scores)).sum() / 3
    np.testing.assert_allclose(model.loss(images, texts), expected, rtol=1e-9)


def test_every_parameter_is_trained():
    for loss in ("softmax", "sigmoid"):
        model = build(loss=loss, text_projection_bias=True)

        @eqx.filter_jit
        @eqx.filter_grad
        def gradient(model):
            images = jax.vmap(model.embed_image)(jr.normal(jr.key(2), (3, 3, 4, 4)))
            texts = jax.vmap(model.embed_text)(jnp.arange(15).reshape(3, 5) % 10)
            return model.loss(images, texts)

        for path, leaf in jax.tree_util.tree_flatten_with_path(gradient(model))[0]:
            name = jax.tree_util.keystr(path)
            assert (leaf != 0).any() or "k_proj.bias" in name, name
