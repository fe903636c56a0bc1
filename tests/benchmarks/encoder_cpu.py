"""An encoder of the size of BERT-base on CPU, with padding: time against that of PyTorch.

    python tests/benchmarks/encoder_cpu.py [--batch 8] [--seq 128] [--padding 0.3] [--layers 12]
                                           [--rounds 7] [--json FILE]

The hidden vectors of a batch of which a share of the positions is padding, float32. The weights are
the same, brought over by `load_pretrained`, and what is no padding is compared. Needs torch and
transformers (the group `parity`).
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from harness import foreign_load, interleaved, ratios, report

from eqx_transformer.attention import Padding
from eqx_transformer.interop import load_pretrained
from eqx_transformer.models import TransformerEncoder


def theirs(layers: int) -> transformers.PreTrainedModel:
    """The model of transformers, with its fastest attention."""
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=layers, attn_implementation="sdpa")
    return transformers.BertModel(config).eval()


def same_model(model: transformers.PreTrainedModel) -> TransformerEncoder:
    """The same model here."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_pretrained(folder)


def lengths_of(batch: int, seq: int, padding: float) -> np.ndarray:
    """Lengths from the shortest to the whole sequence, so many that the rest is the padding."""
    shortest = max(1, round(seq * (1 - 2 * padding)))
    return np.linspace(shortest, seq, batch).round().astype(np.int32)


def main() -> None:
    """Prints the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--padding", type=float, default=0.3, help="at most a half")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    reference = theirs(args.layers)
    model = same_model(reference)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, (args.batch, args.seq)).astype(np.int32)
    lengths = lengths_of(args.batch, args.seq, args.padding)
    real = np.arange(args.seq) < lengths[:, None]

    @eqx.filter_jit
    def forward(model: TransformerEncoder, tokens: Any, real: Any) -> Any:
        return jax.vmap(lambda x, valid: model(x, mask=Padding(valid)))(tokens, real)

    torch_inputs = {
        "input_ids": torch.from_numpy(tokens.astype(np.int64)),
        "attention_mask": torch.from_numpy(real.astype(np.int64)),
    }

    def torch_forward() -> np.ndarray:
        with torch.inference_mode():
            return reference(**torch_inputs).last_hidden_state.numpy()

    data = jnp.asarray(tokens), jnp.asarray(real)
    runs = {"ours": lambda: forward(model, *data), "torch": torch_forward}
    np.testing.assert_allclose(runs["ours"]()[real], torch_forward()[real], rtol=1e-3, atol=1e-4)
    result: dict[str, Any] = {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "arguments": {**vars(args), "json": None},
        "share of padding": round(1 - float(real.mean()), 3),
        "load by others before": round(foreign_load(), 2),
    }
    seconds = interleaved(runs, args.rounds)
    result["seconds"] = {name: round(statistics.median(x), 4) for name, x in seconds.items()}
    result["time of the others over ours"] = ratios(seconds, "ours")
    report(result, args.json)


if __name__ == "__main__":
    main()
