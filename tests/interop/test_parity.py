"""Published models compute here what they compute in transformers.

Every folder of `parity/`, or of the directory that `EQX_TRANSFORMER_PARITY` names, has a model as
transformers saves it, inputs, and what it made of them; `parity/make.py` writes such folders.
"""

import functools
import json
import os
import re
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop.outputs import cached_logits, greedy, run_encoder, run_seq2seq
from interop.outputs_of_images import run_clip, run_vision
from safetensors.numpy import load_file

from eqx_transformer.attention import Prefix
from eqx_transformer.generation import generate
from eqx_transformer.interop import load_pretrained, save_pretrained
from eqx_transformer.interop.families import FAMILIES
from eqx_transformer.models import (
    CLIP,
    DeBERTa,
    EncoderDecoder,
    Llama,
    TokenClassifier,
    TransformerEncoder,
    VisionTransformer,
    Whisper,
)
from eqx_transformer.stacks import StackSequence

ROOT = Path(os.environ.get("EQX_TRANSFORMER_PARITY", Path(__file__).parent / "parity"))
FOLDERS = sorted(path.parent for path in ROOT.glob("*/meta.json"))
every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def lay_out(folder, target, config="config.json", weights=None):
    """A folder as it would be published, of a spelling of the config and a file of weights."""
    target.mkdir()
    shutil.copy(folder / config, target / "config.json")
    names = [path.name for path in folder.glob("model*") if not path.name.startswith("model_hub")]
    for name in names if weights is None else ["model.safetensors"]:
        shutil.copy(folder / (name if weights is None else weights), target / name)
    return target


@functools.cache
def loaded(folder):
    return load_pretrained(folder)


@functools.cache
def expected(folder):
    """Inputs and outputs by case, and prompts with what follows them."""
    cases, prompts = {}, {}
    for name, x in load_file(folder / "expected.safetensors").items():
        case, *index, direction, key = name.split(".", 3 if name.startswith("gen.") else 2)
        if case == "gen":
            prompts.setdefault(index[0], {})[key] = x
        else:
            cases.setdefault(case, {"in": {}, "out": {}})[direction][key] = x
    return cases, list(prompts.values())


def meta(folder):
    return json.loads((folder / "meta.json").read_text())


@eqx.filter_jit
def decode(model, tokens, positions):
    """Logits and the states between the layers, for a batch; padding is at negative positions."""
    stack = model.stack if isinstance(model.stack, StackSequence) else StackSequence((model.stack,))

    def one(tokens, positions):
        mask = ~Prefix(0)
        x, options = model._begin(tokens, mask, positions, None)
        states = [x]
        for i in range(model.config.num_layers):
            states.append(stack[i](states[-1], **options))
        states[-1] = model.norm(states[-1])
        logits = model(tokens, mask=mask, positions=positions)
        return {"logits": logits} | {f"hidden_states.{i}": x for i, x in enumerate(states)}

    return jax.vmap(one)(tokens, positions)


@eqx.filter_jit
def decode_one_by_one(model, tokens):
    """Logits from a cache that is filled token by token."""

    def one(tokens):
        def step(cache, token):
            logits, cache = model.extend(token[None], cache)
            return cache, logits[0]

        return jax.lax.scan(step, model.init_cache(tokens.shape[0]), tokens)[1]

    return jax.vmap(one)(tokens)


@eqx.filter_jit
def decode_at_once(model, inputs):
    """Logits from a cache that one call fills."""

    def one(tokens):
        return model.extend(tokens, model.init_cache(tokens.shape[0]))[0]

    return jax.vmap(one)(inputs["input_ids"].astype(jnp.int32))


def follows_length(model):
    """Whether all positions must have seen the length that counts; see `LongRoPEScaling`."""
    scaling = model.config.rope_scaling
    return scaling is not None and scaling.needs_length


def run_decoder(model, inputs):
    tokens = inputs["input_ids"].astype(np.int32)
    valid = inputs.get("attention_mask", np.ones_like(tokens)) == 1
    outside = np.full_like(tokens, -1)
    if model.positions is not None or follows_length(model):
        # There are no learned vectors before position 0; and where the length of a sequence counts,
        # transformers takes that of the batch. So padding comes after all else, which sees it not.
        outside = valid.sum(axis=1, keepdims=True) + np.cumsum(~valid, axis=1) - 1
    positions = np.where(valid, np.cumsum(valid, axis=1) - 1, outside).astype(np.int32)
    # Batches of one size share a compilation.
    count = len(tokens)
    tokens, positions = (np.resize(x, (3, x.shape[1])) for x in (tokens, positions))
    return {name: x[:count] for name, x in decode(model, tokens, positions).items()}


RUN = {
    Llama: run_decoder,
    TransformerEncoder: run_encoder,
    DeBERTa: run_encoder,
    TokenClassifier: run_encoder,
    EncoderDecoder: run_seq2seq,
    Whisper: run_seq2seq,
    VisionTransformer: run_vision,
    CLIP: run_clip,
}


def errors(case, got):
    """The largest error of each output, where there is no padding."""
    result = {}
    for name, want in case["out"].items():
        x = np.asarray(got[name], np.float64)
        assert x.shape == want.shape, name
        error = np.abs(x - want)
        decoded = "decoder_input_ids" in case["in"] and not name.startswith("encoder")
        valid = case["in"].get("decoder_attention_mask" if decoded else "attention_mask")
        if valid is not None and valid.shape == want.shape[:2]:
            error = error[valid == 1]
        # Not the maximum of NaN, which compares as one likes.
        result[name] = np.inf if np.isnan(error).any() else error.max()
    return result


@every_folder
def test_outputs(folder):
    tolerance = meta(folder)["suggested_atol"]
    for name, case in expected(folder)[0].items():
        found = errors(case, RUN[type(loaded(folder))](loaded(folder), case["in"]))
        wrong = {key: error for key, error in found.items() if not error <= tolerance}
        assert not wrong, f"{folder.name}, {name}: more than {tolerance}: {wrong}"


@every_folder
def test_a_cache_gives_the_same(folder):
    cases, prompts = expected(folder)
    if not prompts:
        pytest.skip("not a model that generates")
    model, tolerance, full = loaded(folder), meta(folder)["suggested_atol"], cases["full"]
    if isinstance(model, Llama) and not follows_length(model):
        continued = [np.append(p["input_ids"], p["new_tokens"]) for p in prompts]
        # All of it at once: what is most likely at each position must be the token that follows.
        rows = [*full["in"]["input_ids"], *continued]
        length = max(len(row) for row in rows)
        rows = np.stack([np.pad(row, (0, length - len(row))) for row in rows]).astype(np.int32)
        found = np.asarray(decode_one_by_one(model, rows))
        want = full["out"]["logits"]
        assert np.abs(found[: len(want), : want.shape[1]] - want).max() <= tolerance
        for prompt, row, logits in zip(prompts, continued, found[len(want) :], strict=True):
            start = prompt["input_ids"].size - 1
            assert logits.argmax(-1)[start : len(row) - 1].tolist() == row[start + 1 :].tolist()
        return
    logits = (decode_at_once if isinstance(model, Llama) else cached_logits)(model, full["in"])
    assert np.abs(logits - full["out"]["logits"]).max() <= tolerance
    for prompt in prompts:
        wanted = prompt["new_tokens"].reshape(-1)
        if isinstance(model, Llama):
            tokens = jnp.asarray(prompt["input_ids"].reshape(-1), jnp.int32)
            new = generate(model, tokens, max_new_tokens=len(wanted), temperature=0)
        else:
            new = greedy(model, prompt, meta(folder)["decoder_start_token_id"], len(wanted))
        assert new.tolist() == wanted.tolist()


@every_folder
def test_every_spelling_is_the_same_model(folder, tmp_path):
    model = loaded(folder)
    others = [path.name for path in folder.glob("model_hub_*.safetensors")]
    configs = ["config.json", "config_hub_v4.json"]
    for i, (config, weights) in enumerate(
        [(configs[1], None), *((config, file) for config in configs for file in others)]
    ):
        other = load_pretrained(lay_out(folder, tmp_path / str(i), config, weights))
        assert other.config == model.config, (config, weights)
        assert eqx.tree_equal(other, model, typematch=True), (config, weights)


@every_folder
def test_what_is_saved_is_what_was_loaded(folder, tmp_path):
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    save_pretrained(loaded(folder), tmp_path, model_type=model_type)
    again = load_pretrained(tmp_path)
    assert again.config == loaded(folder).config
    assert eqx.tree_equal(again, loaded(folder), typematch=True)
    wanted = {}
    for path in folder.glob("model*.safetensors"):
        if not path.name.startswith("model_hub"):
            wanted |= load_file(path)
    written = load_file(tmp_path / "model.safetensors")
    for name, x in written.items():
        assert x.dtype == wanted[name].dtype and x.shape == wanted[name].shape
        assert x.tobytes() == wanted[name].tobytes(), name
    # But for copies of tied tensors, and what is no weight.
    kept = [x.tobytes() for x in written.values()]
    lost = [n for n in wanted if n not in written and wanted[n].tobytes() not in kept]
    ignored = FAMILIES[model_type].ignored
    assert not [n for n in lost if not any(re.fullmatch(pattern, n) for pattern in ignored)]


def test_there_are_folders():
    assert FOLDERS, f"there is no folder with a meta.json in {ROOT}"
