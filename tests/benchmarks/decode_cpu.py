"""Decoding on CPU: time a token against the time to read the parameters, and against transformers.

    python tests/benchmarks/decode_cpu.py [--rounds 5] [--batch 1] [--json FILE]

A llama-like model of 32 million float32 parameters continues a prompt of 64 tokens by 128 tokens,
greedily: as it comes, with its layers taken apart (`unstacked`), and, where torch and transformers
are installed, the same weights in transformers' `generate`. The limit is the time in which memory
delivers the parameters once a token, measured in between.
"""

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from harness import interleaved, ratios

from eqx_transformer.generation import generate
from eqx_transformer.interop import save_pretrained
from eqx_transformer.models import Llama, LlamaConfig
from eqx_transformer.stacks import unstacked

PROMPT, NEW = 64, 128


def theirs(model: Llama, prompts: np.ndarray):
    """The same weights, decoded by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        other = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.from_numpy(prompts.astype(np.int64))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def run():
        with torch.no_grad():
            return other.generate(tokens, attention_mask=torch.ones_like(tokens), **options).numpy()

    return run


def main() -> None:
    """Prints the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    config = LlamaConfig(
        vocab_size=8192,
        d_model=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        d_ff=1408,
        max_len=512,
    )
    model = Llama(config, key=jax.random.key(0))
    parameters = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    # Of the embedding one row is read.
    read = 4 * (sum(x.size for x in parameters) - model.embedding.weight.size)
    prompts = jax.random.randint(jax.random.key(1), (args.batch, PROMPT), 0, 8192)

    def ours(model):
        def one(prompt):
            return generate(model, prompt, max_new_tokens=NEW, temperature=0)

        return (lambda: one(prompts[0])) if args.batch == 1 else lambda: jax.vmap(one)(prompts)

    block = np.ones(read // 4, np.float32)
    total = jax.jit(lambda x: x.sum())
    on_device = jnp.asarray(block)

    def memory():  # as much as a generation reads
        for _ in range(NEW):
            total(on_device).block_until_ready()

    apart = unstacked(model)
    candidates = {"as it comes": ours(model), "unstacked": ours(apart), "memory": memory}
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        candidates["transformers"] = theirs(model, np.asarray(prompts))
        got = np.asarray(candidates["unstacked"]()).reshape(args.batch, NEW)
        wanted = candidates["transformers"]()[:, PROMPT:]
        # Where two logits are nearly equal, rounding decides, and all that follows differs.
        assert (got[:, 0] == wanted[:, 0]).all()
    seconds = interleaved(candidates, args.rounds)
    result = {
        "jax": jax.__version__,
        "batch": args.batch,
        "tokens per second": {
            name: args.batch * NEW / min(values)
            for name, values in seconds.items()
            if name != "memory"
        },
        "bytes per second": NEW * read / min(seconds["memory"]),
        "time, unstacked = 1": ratios(seconds, "unstacked"),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
