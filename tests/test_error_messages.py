"""What a person sees after a mistake: what is wrong, where, the numbers, and what to do."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import pytest

from eqx_transformer import models

SCRIPT = Path(__file__).parent / "mistakes.py"

# By the names in mistakes.py. Ends with "..." what goes on.
MESSAGES = {
    # Batches and shapes
    "model without vmap": (
        "ValueError",
        "Llama takes one example: tokens has 2 axes (2, 6) but must be [seq]; wrap the call "
        "in jax.vmap.",
    ),
    "layer without vmap": (
        "ValueError",
        "Attention takes one example: x has 3 axes (1, 6, 16) but must be [seq, d_model]; "
        "wrap the call in jax.vmap.",
    ),
    "attention without vmap": (
        "ValueError",
        "attention: q has 4 axes (1, 6, 4, 8) but takes one example, [q_seq, heads, "
        "head_dim]; wrap the call in jax.vmap for a batch.",
    ),
    "one token": (
        "ValueError",
        "Llama takes one example: tokens has 0 axes () but must be [seq]; add the missing "
        "axes, e.g. with tokens[None], or leave out a jax.vmap.",
    ),
    "vmap over a single text": (
        "ValueError",
        "Llama takes one example: tokens has 0 axes () but must be [seq]; add the missing "
        "axes, e.g. with tokens[None], or leave out a jax.vmap.",
    ),
    "tokens as a list": (
        "ValueError",
        "Llama: tokens is a list; make it an array, e.g. with jnp.asarray.",
    ),
    "tokens as floats": (
        "ValueError",
        "Embedding: tokens have dtype float32 but must be integer ids; use "
        "tokens.astype(jnp.int32).",
    ),
    "text too long": (
        "ValueError",
        "Llama: seq=20 is more than max_len=16; shorten it, or raise max_len in the configuration.",
    ),
    "batch in positions": (
        "ValueError",
        "Llama: positions has shape (2, 6) but seq=6; give one position for each, and wrap "
        "the call in jax.vmap for a batch.",
    ),
    "too few positions": (
        "ValueError",
        "Llama: positions has shape (4,) but seq=6; give one position for each, and wrap the "
        "call in jax.vmap for a batch.",
    ),
    "wrong d_model": (
        "ValueError",
        "Linear: x has shape (6, 12) but in_features=16; its last axis must have that length.",
    ),
    "keys and values differ": (
        "ValueError",
        "attention: k is [kv_seq=6, kv_heads=4] but v is [kv_seq=5, kv_heads=4]; they must agree.",
    ),
    "head sizes differ": (
        "ValueError",
        "attention: q has head_dim=8 but k has head_dim=4; they must be equal (only v may differ).",
    ),
    "heads that do not divide": (
        "ValueError",
        "attention: heads=4 is not a multiple of kv_heads=3; every key head must serve the "
        "same number of query heads.",
    ),
    "dtypes mixed": (
        "ValueError",
        "attention: q, k and v have dtypes bfloat16, float32 and float32; cast them to one dtype.",
    ),
    "image with channels last": (
        "ValueError",
        "PatchEmbedding: image has shape (8, 8, 3), so 8 channels, but num_channels=3; "
        "channels come first: use jnp.moveaxis(image, -1, 0).",
    ),
    "image of another size": (
        "ValueError",
        "an image of height 9 has no whole number of patches of height 4; resize, crop or pad"
        " it, e.g. to 8.",
    ),
    "no target": (
        "TypeError",
        "EncoderDecoder.__call__() missing 1 required positional argument: 'target'",
    ),
    # Keys
    "no key for dropout": (
        "RuntimeError",
        "TokenEmbedding: dropout_rate=0.1 needs a key; pass key=, or switch dropout off with "
        "eqx.nn.inference_mode(model).",
    ),
    "a number as key": (
        "ValueError",
        "TransformerEncoder: key=0 is a number; use jax.random.key(0).",
    ),
    "no key for weights": (
        "ValueError",
        "Llama: key is a NoneType; make one, e.g. with jax.random.key(0).",
    ),
    # Masks
    "array as mask": (
        "ValueError",
        "Llama: mask is an array but must be a mask: Dense(matrix) for one flag per query and "
        "key, Padding(flags) for one per key; see eqx_transformer.attention.",
    ),
    "array as mask of attention": (
        "ValueError",
        "attention: mask must be a mask but has type ArrayImpl; wrap a boolean matrix in "
        "Dense(...), a function in Predicate(...), a row of flags in Padding(...).",
    ),
    "matrix of the wrong size": (
        "ValueError",
        "attention: the mask Dense(allowed) covers 5 q positions but q_seq=6; make it as long"
        " as the sequence.",
    ),
    "padding too short": (
        "ValueError",
        "attention: the mask Padding(valid) covers 5 kv positions but kv_seq=6; make it as "
        "long as the sequence.",
    ),
    "padding of a batch": (
        "ValueError",
        "attention: an array of the mask Padding(valid) has 2 axes (2, 6) but must have 1; "
        "for a batch, hand the mask to jax.vmap with the sequences.",
    ),
    "padding as numbers": (
        "ValueError",
        "Padding: valid has dtype int32 but must be boolean, true where one may attend, e.g. "
        "tokens != pad_id.",
    ),
    "documents too short": (
        "ValueError",
        "attention: the mask Segments(q_ids, kv_ids) covers 4 q positions but q_seq=6; make "
        "it as long as the sequence.",
    ),
    "masks joined by and": (
        "TypeError",
        "A mask is neither true nor false: combine masks with &, | and ~, not with and, or, "
        "not; compare with `is None`.",
    ),
    # Caches and generation
    "cache too small": (
        "ValueError",
        "KVCache: 6 positions cannot be appended to a cache of max_len=4; make it with a "
        "larger max_len.",
    ),
    "cache that gets full": (
        "EquinoxRuntimeError",
        "...KVCache: more positions than max_len=8, or a length outside 0..6; make the cache "
        "with a larger max_len....",
    ),
    "cache larger than max_len": (
        "ValueError",
        "Llama: the cache's max_len=32 is more than max_len=16; shorten it, or raise max_len "
        "in the configuration.",
    ),
    "cache of a deeper model": (
        "ValueError",
        "Stack: the cache has an array of shape (3, 4, 16, 4), but its first axis must be "
        "num_layers=2; make it with init_cache of this model.",
    ),
    "cache of a model with other heads": (
        "ValueError",
        "KVCache: vectors of shape (4, 6, 4) cannot be appended to slots of shape (2, 16, 4), "
        "heads and positions first; make the cache with init_cache of this model.",
    ),
    "cache of another class": (
        "ValueError",
        "Llama: cache is a TokenCache but must be a LlamaCache; make it with init_cache of "
        "this model.",
    ),
    "caches of a batch": (
        "ValueError",
        "Llama takes one example: the cache is a batch of (2,); wrap the call in jax.vmap, "
        "over tokens and cache.",
    ),
    "negative temperature": (
        "ValueError",
        "generate: temperature=-1.0 must be between 0 and inf.",
    ),
    "top_p above one": (
        "ValueError",
        "generate: top_p=1.5 must be between 0 and 1.",
    ),
    "sampling without a key": (
        "ValueError",
        "generate: sampling needs a key; pass key=, or temperature=0.",
    ),
    "prompt too long": (
        "ValueError",
        "generate: 6 tokens of prompt and 20 more exceed max_len=16; shorten the prompt or "
        "generate fewer tokens.",
    ),
    "empty prompt": (
        "ValueError",
        "generate: the prompt has 0 tokens; it must have at least 1.",
    ),
    "batch of prompts": (
        "ValueError",
        "Llama takes one example: prompt has 2 axes (2, 6) but must be [seq]; wrap the call "
        "in jax.vmap.",
    ),
    "generating with an encoder": (
        "ValueError",
        "generate: TransformerEncoder has no init_cache and extend, so it cannot continue a "
        "text; use a decoder, such as Llama.",
    ),
    "pages for one row": (
        "ValueError",
        "PagedCache: tokens has shape (6,) but must be [batch, seq]; tokens[:, None] for one token "
        "of every row, tokens[None] and rows= for one row.",
    ),
    "one length for all rows": (
        "ValueError",
        "PagedCache: length has shape () for the tokens of 2 rows; give one number for each.",
    ),
    "a number as rows": (
        "ValueError",
        "PagedCache: rows has shape () for the tokens of 1 rows; give one number for each.",
    ),
    "no beams": (
        "ValueError",
        "beam_search: num_beams=0 must be at least 1.",
    ),
    # Configurations
    "misspelt field": (
        "ValueError",
        "LlamaConfig has no field 'd_modle'; did you mean 'd_model'?",
    ),
    "misspelt field in replace": (
        "ValueError",
        "LlamaConfig has no field 'num_layer'; did you mean 'num_layers'?",
    ),
    "misspelt mesh axis": (
        "ValueError",
        "ParallelConfig has no field 'tensr'; did you mean 'tensor'?",
    ),
    "text for a number": (
        "ValueError",
        "LlamaConfig: vocab_size='20' (of type str) must be int.",
    ),
    "d_model and num_heads": (
        "ValueError",
        "LlamaConfig: d_model=18 is not a multiple of num_heads=4; change one, or give head_dim.",
    ),
    "num_heads and num_kv_heads": (
        "ValueError",
        "LlamaConfig: num_heads=4 is not a multiple of num_kv_heads=3; every key head must "
        "serve the same number of query heads.",
    ),
    "percent for a rate": (
        "ValueError",
        "TransformerConfig: dropout_rate=10.0 must be at least 0 and below 1.",
    ),
    "field without effect": (
        "ValueError",
        "LlamaConfig: rope_local_theta=10000.0 has no effect, because there are no sliding layers.",
    ),
    "class as config": (
        "ValueError",
        "Llama: config is the class LlamaConfig but must be a LlamaConfig.",
    ),
    "config and key swapped": (
        "ValueError",
        "Llama: config is a PRNGKeyArray but must be a LlamaConfig.",
    ),
    "unknown implementation": (
        "ValueError",
        "attention: implementation='flash' is not one of ('reference', 'chunked', 'cudnn', "
        "'pallas').",
    ),
    "unknown pooling": (
        "ValueError",
        "SequenceClassifier: pooling='last' must be 'first', 'mean' or 'pooler'.",
    ),
    "unknown pooling of vectors": (
        "ValueError",
        "pool: how='last' must be 'first' or 'mean'.",
    ),
    "unknown transform": (
        "ValueError",
        "transform='norm' is not one of ('none', 'linear', 'linear_norm').",
    ),
    # Stacks
    "layer that there is not": (
        "IndexError",
        "Stack: no layer 7; there are num_layers=2.",
    ),
    "calling a layer of a stack": (
        "ValueError",
        "norm: a parameter has 2 axes (2, 16), so this is a stack of layers; take one of "
        "them, e.g. stack[i], or call the stack.",
    ),
    "calling a projection of a stack": (
        "ValueError",
        "Linear: weight has 3 axes (2, 16, 16), so this is a stack of layers; take one of "
        "them, e.g. stack[i], or call the stack.",
    ),
    # Files
    "no checkpoint": (
        "FileNotFoundError",
        "load: there is no checkpoint in FOLDER/nothing: no config.json.",
    ),
    "published weights by load": (
        "ValueError",
        "load: FOLDER/llama/config.json is not a config of a checkpoint: it belongs to "
        "published weights, which load_pretrained reads.",
    ),
    "own checkpoint by load_pretrained": (
        "ValueError",
        "FOLDER/own/config.json was written by save; use load.",
    ),
    "no folder": (
        "FileNotFoundError",
        "there is no folder FOLDER/nothing.",
    ),
    "unknown family": (
        "ValueError",
        "FOLDER/mamba/config.json has model_type='mamba'; the families that can be loaded are ...",
    ),
    # Training, sharding, inspection
    "adapters that match nothing": (
        "ValueError",
        "add_lora: there is no linear map to adapt; `where` is given paths such as "
        "['stack.blocks.attention.q_proj', 'stack.blocks.attention.k_proj', "
        "'stack.blocks.attention.v_proj'].",
    ),
    "rank too large": (
        "ValueError",
        "add_lora: rank=64 must be at least 1 and at most 16, the smaller size of "
        "stack.blocks.attention.q_proj.weight (16, 16); leave that map out with `where`.",
    ),
    "merging without adapters": (
        "ValueError",
        "merge_lora: the model has no adapters; give it some with add_lora.",
    ),
    "targets not shifted": (
        "ValueError",
        "cross_entropy_from_hidden: hidden has shape (6, 16) and targets has (5,); there must"
        " be one target for each vector, e.g. model.hidden(tokens[:-1]) and tokens[1:].",
    ),
    "parts that do not divide": (
        "ValueError",
        "accumulated_value_and_grad: an array of the batch has shape (6, 6); its first axis "
        "counts examples and must be a multiple of num_parts=4.",
    ),
    "unknown mesh axis": (
        "ValueError",
        "sharding: the mesh has the axes ('model',) but the rules are for ('context', 'data',"
        " 'expert', 'fsdp', 'pipe', 'tensor'); rename an axis of the mesh, or change the "
        "rules.",
    ),
    "unknown value to capture": (
        "ValueError",
        "capture: there is no 'logits'; there are input, output, ...",
    ),
}

CONFIGS = {
    "AnchorTransformer": "AnchorTransformerConfig",
    "CLIP": "CLIPConfig",
    "DeBERTa": "DeBERTaConfig",
    "DiT": "DiTConfig",
    "EncoderDecoder": "TransformerConfig",
    "Llama": "LlamaConfig",
    "SequenceClassifier": "TransformerConfig",
    "TextTower": "CLIPConfig",
    "TokenClassifier": "TransformerConfig",
    "TokenEmbedding": "TransformerConfig",
    "TransformerDecoder": "TransformerConfig",
    "TransformerEncoder": "TransformerConfig",
    "Transolver": "TransolverConfig",
    "UPT": "UPTConfig",
    "VisionTransformer": "ViTConfig",
    "Whisper": "WhisperConfig",
}
"""What every model is built from."""

for model, kind in CONFIGS.items():
    other = "TransformerConfig" if model == "Llama" else "LlamaConfig"
    MESSAGES[f"{model} of another config"] = (
        "ValueError",
        f"{model}: config is a {other} but must be a {kind}.",
    )
    MESSAGES[f"{model} of a number as key"] = (
        "ValueError",
        f"{model}: key=0 is a number; use jax.random.key(0).",
    )


@pytest.fixture(scope="module")
def seen() -> dict[str, list[str]]:
    """What was raised, without the run-time checks of types that the tests have everywhere."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_mistake_is_here(seen):
    assert list(seen) == list(MESSAGES)


def test_every_model_with_a_config_is_here():
    modules = [
        x for x in vars(models).values() if isinstance(x, type) and issubclass(x, eqx.Module)
    ]
    built = {x.__name__ for x in modules if "config" in inspect.signature(x).parameters}
    assert built == set(CONFIGS)


@pytest.mark.parametrize("name", MESSAGES)
def test_a_mistake_says_what_to_do(seen, name):
    kind, message = seen[name]
    expected_kind, expected = MESSAGES[name]
    assert kind == expected_kind
    if not expected.endswith("..."):
        assert message == expected
    elif expected.startswith("..."):
        assert expected.strip(".") in message
    else:
        assert message.startswith(expected.removesuffix("..."))
