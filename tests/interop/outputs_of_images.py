"""What vision transformers, and CLIP, make of the inputs of a parity folder."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_transformer.attention import Padding
from eqx_transformer.stacks import hidden_states


def _numbered(name, states):
    return {f"{name}hidden_states.{i}": states[:, i] for i in range(states.shape[1])}


@eqx.filter_jit
def _see(model, images):
    found = {
        "last_hidden_state": jax.vmap(lambda image: model.encode(image).all)(images),
        "pooler_output": jax.vmap(model)(images),
    }
    return found | _numbered("", jax.vmap(model.hidden_states)(images))


def run_vision(model, inputs):
    found = _see(model, inputs["pixel_values"])
    if model.config.num_classes is not None:
        found["logits"] = found.pop("pooler_output")
    if model.distillation_head is not None:
        heads = {"cls_logits": model.head, "distillation_logits": model.distillation_head}
        for i, (name, head) in enumerate(heads.items()):
            found[name] = jax.vmap(head)(found["last_hidden_state"][:, i])
    return found


@eqx.filter_jit
def _read(tower, proj, tokens, valid):
    def one(tokens, valid):
        mask = Padding(valid)
        last = tower.encode(tokens, mask=mask)
        states = hidden_states(tower.stack, tower.embedding(tokens), mask=mask)
        return last, proj(tower(tokens, mask=mask)), states

    return jax.vmap(one)(tokens, valid)


def run_clip(model, inputs):
    tokens = inputs["input_ids"].astype(np.int32)
    valid = inputs.get("attention_mask", np.ones_like(tokens)) == 1
    last, texts, states = _read(model.text_tower, model.text_proj, tokens, valid)
    found = {"text_model_output.last_hidden_state": last, "text_model_output.pooler_output": texts}
    found |= _numbered("text_model_output.", states)
    seen = run_vision(model.image_tower, inputs)
    images = seen["pooler_output"]
    if model.image_proj is not None:
        images = images @ model.image_proj.weight
    found |= {f"vision_model_output.{name}": x for name, x in seen.items()}
    found["vision_model_output.pooler_output"] = images
    found["image_embeds"], found["text_embeds"] = (
        x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts)
    )
    scores = model.scores(found["image_embeds"], found["text_embeds"])
    return found | {"logits_per_image": scores, "logits_per_text": scores.T}
