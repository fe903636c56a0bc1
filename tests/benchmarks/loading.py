"""Memory and time of loading a published model of a billion bfloat16 parameters.

    python tests/benchmarks/loading.py

Random weights are written to a temporary folder and read from there, by `load_pretrained` and by
safetensors, in turn and each in a process of its own. Memory is the peak of that process, less what
it had before.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from eqx_transformer.interop import load_pretrained
from eqx_transformer.interop._names import tensors
from eqx_transformer.interop._pytree import named_arrays, skeleton
from eqx_transformer.interop._safetensors import write_safetensors
from eqx_transformer.interop.families import FAMILIES
from eqx_transformer.models import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=32_000,
    d_model=2048,
    num_layers=22,
    num_heads=32,
    num_kv_heads=4,
    d_ff=5632,
    param_dtype="bfloat16",
)


def write(folder: Path) -> None:
    """A folder with random weights."""
    family = FAMILIES["llama"]
    wanted = tensors(family.names(CONFIG), skeleton(Llama, CONFIG), most=10_000)
    dtype = np.dtype(ml_dtypes.bfloat16)
    random = np.random.default_rng(0)

    def draw(name: str) -> np.ndarray:
        bits = random.integers(0, 2**16, shapes[name][1], np.uint16)
        return (bits & 0xBFFF).view(dtype)  # no infinities

    shapes = {tensor.name: (dtype, tensor.shape) for tensor in wanted}
    write_safetensors(folder / "model.safetensors", shapes, draw, {"format": "pt"})
    fields = family.write(CONFIG) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(fields))


def measure(what: str, folder: str) -> None:
    """Prints seconds and bytes of one way of reading."""
    import jax

    jax.devices()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize()
    start = time.perf_counter()
    if what == "load_pretrained":
        model = load_pretrained(folder)
        jax.block_until_ready(list(named_arrays(model).values()))
    else:
        from safetensors.numpy import load_file

        load_file(Path(folder) / "model.safetensors")
    seconds = time.perf_counter() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "bytes": peak - before}))


def main() -> None:
    """Prints medians of five."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        size = os.path.getsize(Path(folder) / "model.safetensors")
        largest = CONFIG.vocab_size * CONFIG.d_model * 2
        print(f"{size / 2e9:.2f}e9 parameters, {size / 2**30:.2f} GiB")
        results: dict[str, list[dict[str, float]]] = {"load_pretrained": [], "load_file": []}
        for _ in range(5):
            for what, found in results.items():
                command = [sys.executable, __file__, what, folder]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found.append(json.loads(out))
        for what, found in results.items():
            seconds = float(np.median([x["seconds"] for x in found]))
            peak = max(x["bytes"] for x in found)
            print(
                f"{what:16} {seconds:6.2f} s  {size / seconds / 2**30:5.2f} GiB/s  peak "
                f"{peak / 2**30:.2f} GiB = {(peak - largest) / size:.3f} x model + one tensor"
            )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(*sys.argv[1:])
    else:
        main()
