"""Memory of a step of training on CPU, by the length of the sequence, the vocabulary and the depth.

    python tests/benchmarks/memory_cpu.py [--layers 4] [--json FILE]

MiB of temporaries of the compiled step: what it needs besides parameters, state and gradients. The
models are those of `training_cpu.py` with a batch of one sequence; "chunked" is ours with
`cross_entropy_from_hidden`. Nothing is run, so nothing else on the machine matters.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import training_cpu
from harness import report
from training_cpu import ByHand, JaxRun, call, installed, make_config, of_attnax, of_penzai

from eqx_transformer.models import Llama
from eqx_transformer.training import cross_entropy_from_hidden


def chunked(model: Llama, tokens: jax.Array) -> Any:
    """The temporaries of a step that never has the logits of all tokens."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimiser = optax.adamw(1e-4)

    def loss_of(params: Any, tokens: Any) -> Any:
        model = eqx.combine(params, static)
        hidden = jax.vmap(model.hidden)(tokens[:, :-1])
        return cross_entropy_from_hidden(
            model.head, hidden.reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)
        ).mean()

    def train(params: Any, state: Any, tokens: Any) -> Any:
        gradient = jax.grad(loss_of)(params, tokens)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(train, donate_argnums=(0, 1))
    return jitted.lower(params, optimiser.init(params), tokens).compile()


def candidates(layers: int, seq: int) -> dict[str, Callable[[jax.Array], Any]]:
    """How each one's step is compiled."""

    def ours(remat: str) -> Llama:
        return Llama(make_config(layers, seq).replace(remat=remat), key=jax.random.key(0))

    def compiled(call: Any, model: Any) -> Callable[[jax.Array], Any]:
        return lambda tokens: JaxRun(call, model, tokens).compiled().train

    found = {
        "ours": compiled(call, ours("none")),
        "ours, remat='dots'": compiled(call, ours("dots")),
        "ours, remat='full', chunked": lambda tokens: chunked(ours("full"), tokens),
        "by hand": compiled(call, ByHand(layers, jax.random.key(0))),
    }
    if installed("attnax"):
        found["attnax"] = compiled(*of_attnax(layers, seq))
    if installed("penzai"):
        found["penzai"] = compiled(*of_penzai(layers, seq))
    return found


def temporaries(layers: int, seq: int) -> dict[str, int]:
    """MiB by candidate."""
    tokens = jnp.zeros((1, seq + 1), jnp.int32)
    return {
        name: round(compile(tokens).memory_analysis().temp_size_in_bytes / 2**20)
        for name, compile in candidates(layers, seq).items()
    }


def main() -> None:
    """Prints the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    result: dict[str, Any] = {"jax": jax.__version__}
    result["by length"] = {seq: temporaries(args.layers, seq) for seq in (512, 1024, 2048, 4096)}
    result["by layers"] = {layers: temporaries(layers, 512) for layers in (2, 8, 32)}
    by_vocabulary = {}
    for vocab in (8192, 32768, 131072):
        training_cpu.VOCAB = vocab
        by_vocabulary[vocab] = temporaries(args.layers, 512)
    result["by vocabulary"] = by_vocabulary
    report(result, args.json)


if __name__ == "__main__":
    main()
