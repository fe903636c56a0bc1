"""Decoding on CPU: time a token against the time to read the parameters, and against transformers.

    python tests/benchmarks/decode_cpu.py [--rounds 5] [--batch 1 8] [--json FILE]

A llama-like model of 32 million parameters continues a prompt of 64 tokens by 128 tokens,
greedily, with its layers taken apart (`unstacked`): in float32, in bfloat16, and with `quantized`
weights. Besides, as it comes, with its layers stacked; and, where torch and transformers are
installed, the same float32 weights in transformers' `generate`.

The limit is the time in which memory delivers the parameters once a token, measured in between on
as many bytes. What fits into a cache of the processor is delivered from there. Weights of other
dtypes are given as many bytes as they have, although a program may make float32 ones of them.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from harness import interleaved, ratios, report

from eqx_transformer.generation import generate
from eqx_transformer.interop import save_pretrained
from eqx_transformer.models import Llama, LlamaConfig
from eqx_transformer.nn import quantized
from eqx_transformer.stacks import unstacked

PROMPT, NEW, VOCAB = 64, 128, 8192
SIZES = {
    "vocab_size": VOCAB,
    "d_model": 512,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 4,
    "d_ff": 1408,
    "max_len": 512,
}


def make_models() -> dict[str, Llama]:
    """The model in every form that is compared."""
    model = Llama(LlamaConfig(**SIZES), key=jax.random.key(0))
    half = Llama(
        LlamaConfig(**SIZES, dtype="bfloat16", param_dtype="bfloat16"), key=jax.random.key(0)
    )
    apart = unstacked(model)
    return {
        "float32": apart,
        "float32, stacked": model,
        "bfloat16": unstacked(half),
        "int8": quantized(apart),
    }


def bytes_per_token(model: Llama) -> int:
    """What one token has to read. Of the embedding it is one row."""
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_array))
    return sum(x.nbytes for x in arrays) - model.embedding.weight.nbytes


def ours(model: Llama, prompts: jax.Array) -> Callable[[], Any]:
    """The model, decoded by the library."""

    def one(prompt):
        return generate(model, prompt, max_new_tokens=NEW, temperature=0)

    return (lambda: one(prompts[0])) if len(prompts) == 1 else lambda: jax.vmap(one)(prompts)


def theirs(model: Llama, prompts: jax.Array) -> Callable[[], Any]:
    """The same weights, decoded by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        other = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.from_numpy(np.asarray(prompts).astype(np.int64))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def run():
        with torch.no_grad():
            return other.generate(tokens, attention_mask=torch.ones_like(tokens), **options).numpy()

    return run


def memory(size: int) -> Callable[[], Any]:
    """Reads `size` bytes as often as tokens are generated, on all cores."""
    blocks = [jnp.ones((size // 32,), jnp.float32) for _ in range(8)]
    total = jax.jit(lambda blocks: [block.sum() for block in blocks])

    def run():
        for _ in range(NEW):
            jax.block_until_ready(total(blocks))

    return run


def compare(models: dict[str, Llama], batch: int, rounds: int) -> dict[str, Any]:
    """Times everything at one size of the batch."""
    prompts = jax.random.randint(jax.random.key(1), (batch, PROMPT), 0, VOCAB)
    candidates = {name: ours(model, prompts) for name, model in models.items()}
    sizes = {name: bytes_per_token(model) for name, model in models.items()}
    for name, size in sizes.items():
        if "stacked" not in name:
            candidates[f"memory, {name}"] = memory(size)
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        candidates["transformers"] = theirs(models["float32, stacked"], prompts)
        got = np.asarray(candidates["float32"]()).reshape(batch, NEW)
        wanted = candidates["transformers"]()[:, PROMPT:]
        # Where two logits are nearly equal, rounding decides, and all that follows differs.
        assert (got[:, 0] == wanted[:, 0]).all()
    seconds = interleaved(candidates, rounds)
    texts = [name for name in candidates if not name.startswith("memory")]
    result: dict[str, Any] = {
        "tokens per second": {name: batch * NEW / min(seconds[name]) for name in texts},
        "bytes per second": {
            name: NEW * sizes[name] / min(seconds[f"memory, {name}"])
            for name in sizes
            if f"memory, {name}" in seconds
        },
        "share of the limit": {
            name: ratios(seconds, name)[f"memory, {name}"]
            for name in sizes
            if f"memory, {name}" in seconds
        },
        "time, float32 = 1": {name: ratios(seconds, "float32")[name] for name in texts},
    }
    if "transformers" in seconds:
        result["times as fast as transformers"] = {
            name: 1 / ratios(seconds, "transformers")[name] for name in texts
        }
    return result


def main() -> None:
    """Prints the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    models = make_models()
    result = {"jax": jax.__version__, "bytes per token": {}}
    result["bytes per token"] = {name: bytes_per_token(model) for name, model in models.items()}
    for batch in args.batch:
        result[f"batch {batch}"] = compare(models, batch, args.rounds)
    report(result, args.json)


if __name__ == "__main__":
    main()
