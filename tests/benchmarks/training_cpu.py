"""A language model's step of training on CPU: time and memory next to other libraries.

    python tests/benchmarks/training_cpu.py [--batch 4] [--seq 256] [--layers 8] [--rounds 7]
                                            [--mixed] [--json FILE]

A llama-like model (d_model 512, 8 heads, 4 of keys, d_ff 1408, vocabulary 8192), float32: forward,
and a step (cross-entropy and AdamW). PyTorch's and ours have the same weights and are compared in
what they compute; attnax's and penzai's have as many of their own. "by hand" is the Equinox model
that one writes first: a scan over layers, `vmap` of `weight @ x`, `jax.nn.dot_product_attention`, a
vmapped batch. Temporaries are what the compiled step needs besides its arguments and results.

With `--mixed`, parameters stay float32 and products are bfloat16: ours next to PyTorch's autocast,
and next to ours in float32. Libraries that are not installed are left out.
"""

import argparse
import importlib.util
import math
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import foreign_load, interleaved, matmul_limit, ratios, report

from eqx_transformer.interop import save_pretrained
from eqx_transformer.models import Llama, LlamaConfig
from eqx_transformer.stacks import unstacked
from eqx_transformer.training import model_flops

VOCAB, D_MODEL, HEADS, KV_HEADS, D_FF = 8192, 512, 8, 4, 1408
RATE = 1e-4


class HandLayer(eqx.Module):
    """A layer as one writes it first."""

    projections: list[eqx.nn.Linear]
    norms: list[eqx.nn.RMSNorm]
    rope: eqx.nn.RotaryPositionalEmbedding

    def __init__(self, key):
        kv = D_MODEL // HEADS * KV_HEADS
        sizes = [(D_MODEL, D_MODEL), (D_MODEL, kv), (D_MODEL, kv), (D_MODEL, D_MODEL)]
        sizes += [(D_MODEL, D_FF), (D_MODEL, D_FF), (D_FF, D_MODEL)]
        keys = jax.random.split(key, len(sizes))
        self.projections = [
            eqx.nn.Linear(*size, use_bias=False, key=k) for size, k in zip(sizes, keys, strict=True)
        ]
        self.norms = [eqx.nn.RMSNorm(D_MODEL, use_bias=False) for _ in range(2)]
        self.rope = eqx.nn.RotaryPositionalEmbedding(D_MODEL // HEADS)

    def __call__(self, x):
        q, k, v, o, gate, up, down = (jax.vmap(linear) for linear in self.projections)
        y = jax.vmap(self.norms[0])(x)
        heads = [z(y).reshape(len(x), -1, D_MODEL // HEADS) for z in (q, k, v)]
        rotated = [jax.vmap(self.rope, 1, 1)(z) for z in heads[:2]]
        attended = jax.nn.dot_product_attention(*rotated, heads[2], is_causal=True)
        x = x + o(attended.reshape(len(x), -1))
        y = jax.vmap(self.norms[1])(x)
        return x + down(jax.nn.silu(gate(y)) * up(y))


class ByHand(eqx.Module):
    """A model of such layers."""

    embedding: eqx.nn.Embedding
    layers: HandLayer
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self, layers, key):
        keys = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(VOCAB, D_MODEL, key=keys[0])
        self.layers = eqx.filter_vmap(HandLayer)(jax.random.split(keys[1], layers))
        self.norm = eqx.nn.RMSNorm(D_MODEL, use_bias=False)
        self.head = eqx.nn.Linear(D_MODEL, VOCAB, use_bias=False, key=keys[2])

    def __call__(self, tokens):
        params, static = eqx.partition(self.layers, eqx.is_array)

        def apply(x, layer):
            return eqx.combine(layer, static)(x), None

        x, _ = jax.lax.scan(apply, jax.vmap(self.embedding)(tokens), params)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


class JaxRun:
    """Forward and step of a model that is a PyTree."""

    def __init__(self, call: Callable[[Any, Any], Any], model: Any, tokens: Any):
        self.model, self.tokens = model, tokens
        self.size = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
        params, static = eqx.partition(model, eqx.is_inexact_array)
        optimiser = optax.adamw(RATE)

        def loss_of(params, tokens):
            logits = call(eqx.combine(params, static), tokens[:, :-1])
            targets = tokens[:, 1:]
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        def train(params, state, tokens):
            loss, gradient = jax.value_and_grad(loss_of)(params, tokens)
            updates, state = optimiser.update(gradient, state, params)
            return loss, optax.apply_updates(params, updates), state

        def evaluate(params, tokens):
            return call(eqx.combine(params, static), tokens[:, :-1])

        # Their own copy, because the arrays are given away to be overwritten.
        self.state = (jax.tree.map(jnp.copy, params), optimiser.init(params))
        self.params = params
        self.jitted = jax.jit(train, donate_argnums=(0, 1)), jax.jit(evaluate)

    def compiled(self) -> "JaxRun":
        """Ready to run."""
        train, evaluate = self.jitted
        self.train = train.lower(*self.state, self.tokens).compile()
        self.evaluate = evaluate.lower(self.params, self.tokens).compile()
        return self

    def step(self) -> Any:
        """The loss, and the model is another."""
        loss, *state = self.train(*self.state, self.tokens)
        self.state = tuple(state)
        return loss

    def forward(self) -> Any:
        """The logits."""
        return self.evaluate(self.params, self.tokens)

    def temporaries(self) -> float:
        """MiB of the step."""
        return self.train.memory_analysis().temp_size_in_bytes / 2**20


class TorchRun:
    """The same in PyTorch, with its fastest attention and optimiser."""

    def __init__(self, model: Llama, tokens: Any, mixed: bool = False):
        import torch
        import transformers

        torch.set_num_threads(os.cpu_count() or 1)
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(model, folder)
            self.model = transformers.LlamaForCausalLM.from_pretrained(
                folder, attn_implementation="sdpa", dtype=torch.float32
            )
        self.torch = torch
        self.precision = partial(torch.autocast, "cpu", torch.bfloat16, enabled=mixed)
        self.tokens = torch.from_numpy(np.asarray(tokens, np.int64))
        self.size = sum(x.numel() for x in self.model.parameters())
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=RATE, fused=True)

    def step(self) -> float:
        """The loss, and the model is another."""
        self.optimiser.zero_grad()
        with self.precision():
            logits = self.model(self.tokens[:, :-1], use_cache=False).logits
            targets = self.tokens[:, 1:].reshape(-1)
            loss = self.torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets)
        loss.backward()
        self.optimiser.step()
        return loss.item()

    def forward(self) -> np.ndarray:
        """The logits."""
        with self.torch.inference_mode(), self.precision():
            return self.model(self.tokens[:, :-1], use_cache=False).logits.float().numpy()

    def temporaries(self) -> None:
        """Not known."""


def of_attnax(layers: int, seq: int) -> tuple[Any, Any]:
    """How attnax's decoder is called, and one with as many parameters."""
    import attnax
    from flax import nnx

    config = attnax.TransformerConfig(
        vocab_size=VOCAB,
        d_model=D_MODEL,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        num_layers=layers,
        d_ff=D_FF,
        max_len=seq,
        dropout_rate=0.0,
        pos_emb_type="rope",
        ff_activation="swiglu",
        norm_type="rms",
    )
    graph, state = nnx.split(attnax.TransformerDecoder(nnx.Rngs(0), config))
    head = jax.random.normal(jax.random.key(0), (D_MODEL, VOCAB)) / math.sqrt(D_MODEL)

    def call(model, tokens):
        state, head = model
        return nnx.merge(graph, state)(tokens, deterministic=True) @ head

    return call, (nnx.to_pure_dict(state), head)


def of_penzai(layers: int, seq: int) -> tuple[Any, Any]:
    """How penzai's model is called, and one of the same architecture."""
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common

    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=KV_HEADS,
        query_head_multiplier=HEADS // KV_HEADS,
        embedding_dim=D_MODEL,
        projection_dim=D_MODEL // HEADS,
        mlp_hidden_dim=D_FF,
        num_decoder_blocks=layers,
        vocab_size=VOCAB,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
    )
    model = llamalike_common.build_llamalike_transformer(config, jax.random.key(0))
    unbound, params = pz.unbind_params(model)

    def call(params, tokens):
        bound = pz.bind_variables(unbound, [param.unfreeze_as_copy() for param in params])
        logits = bound(pz.nx.wrap(tokens, "batch", "seq"))
        return logits.unwrap("batch", "seq", "vocabulary")

    return call, [param.freeze() for param in params]


def make_config(layers: int, seq: int) -> LlamaConfig:
    """Of our model."""
    return LlamaConfig(
        vocab_size=VOCAB,
        d_model=D_MODEL,
        num_layers=layers,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        d_ff=D_FF,
        max_len=seq,
    )


def call(model: Any, tokens: Any) -> Any:
    """How a model of one example is called."""
    return jax.vmap(model)(tokens)


def installed(*names: str) -> bool:
    """Whether all of these can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in names)


def make_runs(layers: int, tokens: Any) -> dict[str, Any]:
    """Everything that is compared."""
    seq = tokens.shape[1]
    config = make_config(layers, max(seq, 512))
    model = Llama(config, key=jax.random.key(0))
    saving = Llama(config.replace(remat="dots"), key=jax.random.key(0))
    runs: dict[str, Any] = {
        "ours": JaxRun(call, model, tokens),
        "ours, remat='dots'": JaxRun(call, saving, tokens),
        "ours, unstacked": JaxRun(call, unstacked(model), tokens),
        "by hand": JaxRun(call, ByHand(layers, jax.random.key(0)), tokens),
    }
    if installed("attnax"):
        runs["attnax"] = JaxRun(*of_attnax(layers, max(seq, 512)), tokens)
    if installed("penzai"):
        runs["penzai"] = JaxRun(*of_penzai(layers, seq), tokens)
    for run in runs.values():
        run.compiled()
    if installed("torch", "transformers"):
        runs["torch"] = TorchRun(model, tokens)
    return runs


def make_mixed_runs(layers: int, tokens: Any) -> dict[str, Any]:
    """What is compared in bfloat16."""
    config = make_config(layers, max(tokens.shape[1], 512))
    model = Llama(config, key=jax.random.key(0))
    configs = {
        "ours": config.replace(dtype="bfloat16", param_dtype="float32"),
        "ours, remat='dots'": config.replace(dtype="bfloat16", param_dtype="float32", remat="dots"),
        "ours in float32, remat='dots'": config.replace(remat="dots"),
    }

    def wide(model: Any, tokens: Any) -> Any:
        return call(model, tokens).astype(jnp.float32)

    runs: dict[str, Any] = {
        name: JaxRun(wide, Llama(config, key=jax.random.key(0)), tokens).compiled()
        for name, config in configs.items()
    }
    if installed("torch", "transformers"):
        runs["torch, autocast"] = TorchRun(model, tokens, mixed=True)
    return runs


def main() -> None:
    """Prints the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mixed", action="store_true", help="products in bfloat16")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    shape = (args.batch, args.seq + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, VOCAB, jnp.int32)
    runs = (make_mixed_runs if args.mixed else make_runs)(args.layers, tokens)
    ours = runs["ours"]
    for name, run in runs.items():
        # attnax counts a table of positions that it does not use.
        assert abs(run.size / ours.size - 1) < 0.03, (name, run.size, ours.size)
    tolerance = 0.1 if args.mixed else 1e-4
    for name in {"torch", "ours, unstacked", "torch, autocast"} & set(runs):
        np.testing.assert_allclose(ours.forward(), runs[name].forward(), rtol=1e-3, atol=tolerance)
    result: dict[str, Any] = {"jax": jax.__version__, "arguments": {**vars(args), "json": None}}
    result["load by others before"] = round(foreign_load(), 2)
    for name in ("forward", "step"):
        seconds = interleaved({key: getattr(run, name) for key, run in runs.items()}, args.rounds)
        result[name] = {
            "seconds": {key: round(statistics.median(x), 4) for key, x in seconds.items()},
            "time of the others over ours": ratios(seconds, "ours"),
        }
    operations = 3 * args.batch * model_flops(ours.model, tokens[0, :-1])
    result["limit"] = {
        "operations a second in a large product": f"{(peak := matmul_limit()):.3g}",
        "operations of matrix products in a step": f"{operations:.4g}",
        "so seconds at least": round(operations / peak, 3),
    }
    result["MiB of temporaries in a step"] = {key: run.temporaries() for key, run in runs.items()}
    report(result, args.json)


if __name__ == "__main__":
    main()
