"""Speculative decoding on CPU: a draft and a target that were trained on the same text.

    python examples/train_language_model.py --output runs/draft --num-layers 1 --sample-bytes 600
    python examples/train_language_model.py --output runs/target --d-model 256 --num-layers 6 \
        --learning-rate 2e-3 --sample-bytes 600
    python tests/benchmarks/speculative_cpu.py runs/target/checkpoint runs/draft/checkpoint

The target continues the beginning of a file of the standard library, alone, with the draft, and
with prompt lookup, for several numbers of proposed tokens; where it samples, several times, for how
many tokens are accepted differs from text to text. Printed are times relative to the target alone,
and the tokens that one call of the target gave, which is what the draft is good for.
"""

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from harness import interleaved, ratios, report

from eqx_transformer.generation import PromptLookup, generate, generate_speculatively
from eqx_transformer.interop import load
from eqx_transformer.stacks import unstacked

PROMPT, NEW, TEXTS = 128, 256, 4


def main() -> None:
    """Prints the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="a checkpoint")
    parser.add_argument("draft", type=Path, help="a checkpoint of a smaller model")
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 4, 6], help="tokens proposed")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--file", default="heapq.py", help="of the standard library")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    target, draft = (unstacked(load(path)) for path in (args.target, args.draft))
    text = (Path(sysconfig.get_path("stdlib")) / args.file).read_bytes()
    prompt = jnp.asarray(list(text[:PROMPT]), jnp.int32)
    result: dict[str, Any] = {"jax": jax.__version__}
    for temperature in args.temperature:
        options = {"max_new_tokens": NEW, "temperature": temperature}
        keys = jax.random.split(jax.random.key(0), TEXTS if temperature else 1)

        def alone(model, options=options, keys=keys):
            return [generate(model, prompt, key=key, **options) for key in keys]

        def with_draft(small, count, options=options, keys=keys):
            options = {"num_draft_tokens": count, **options}
            return [
                generate_speculatively(target, small, prompt, key=key, **options) for key in keys
            ]

        candidates: dict[str, Any] = {
            "alone": lambda alone=alone: alone(target),
            "draft alone": lambda alone=alone: alone(draft),
        }
        calls = {}
        for name, small in (("draft", draft), ("lookup", PromptLookup())):
            for count in args.drafts:
                label = f"{name}, {count} tokens"
                candidates[label] = lambda f=with_draft, small=small, count=count: f(small, count)
                texts = candidates[label]()
                tokens, asked = (sum(int(x[i]) for x in texts) for i in (1, 2))
                calls[label] = tokens / asked
                if temperature == 0:
                    assert (texts[0].tokens == alone(target)[0]).all(), label
        seconds = interleaved(candidates, args.rounds)
        result[f"temperature {temperature}"] = {
            "tokens per second, alone": len(keys) * NEW / min(seconds["alone"]),
            "times as fast as alone": {k: 1 / v for k, v in ratios(seconds, "alone").items()},
            "tokens per call of the target": calls,
        }
    report(result, args.json)


if __name__ == "__main__":
    main()
