"""Saving and loading: bit-equal, strict, and safe against a crash at any moment."""

import json
import os
import signal
import struct
import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformer.interop import load, load_pytree, save, save_pytree
from eqx_transformer.models import (
    CLIP,
    CLIPConfig,
    DiT,
    DiTConfig,
    Llama,
    LlamaConfig,
    TransformerConfig,
    VisionTransformer,
    ViTConfig,
)

CONFIG = LlamaConfig(
    vocab_size=11, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=16, max_len=32
)

SEES = {"image_size": (4, 8), "patch_size": 4, "d_model": 8, "num_layers": 2, "num_heads": 2}
OTHERS = {
    VisionTransformer: ViTConfig(**SEES, num_classes=3, layer_scale=0.5),
    CLIP: CLIPConfig(
        vision=ViTConfig(**SEES),
        text=TransformerConfig(vocab_size=11, d_model=8, num_layers=1, num_heads=2),
        text_pooling="largest",
        loss="sigmoid",
    ),
    DiT: DiTConfig(**SEES, num_channels=1, num_classes=3),
}


def make(seed=0, config=CONFIG, dtype=None):
    model = Llama(config, key=jax.random.key(seed))
    if dtype is None:
        return model
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, model)


def weights_file(directory):
    (path,) = directory.glob("model-*.safetensors")
    return path


def rewrite_header(path, change):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = change(json.loads(data[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_equal_to_the_bit(tmp_path, dtype, tied):
    model = make(config=CONFIG.replace(tie_embeddings=tied, qk_norm=tied), dtype=dtype)
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert eqx.tree_equal(model, loaded, typematch=True)
    assert loaded.config == model.config


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_every_model_can_be_saved(tmp_path, kind):
    model = kind(OTHERS[kind], key=jax.random.key(0))
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is kind and loaded.config == model.config
    assert eqx.tree_equal(model, loaded, typematch=True)


def test_float64_round_trip(tmp_path, x64):
    model = make(dtype=jnp.float64)
    save(model, tmp_path)
    assert eqx.tree_equal(model, load(tmp_path))


def test_saving_again_replaces_and_tidies(tmp_path):
    save(make(0), tmp_path)
    save(make(1), tmp_path)
    assert eqx.tree_equal(load(tmp_path), make(1))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        weights_file(tmp_path).name,
    ]


def test_names_are_paths(tmp_path):
    save(make(), tmp_path)
    data = weights_file(tmp_path).read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert "stack.blocks.attention.q_proj.weight" in header
    assert header["stack.blocks.attention.q_proj.weight"]["shape"] == [2, 8, 8]


def test_everything_wrong_is_listed_at_once(tmp_path):
    save(make(), tmp_path)

    def change(header):
        header["strange"] = header.pop("norm.weight")
        header["embedding.weight"]["shape"] = header["embedding.weight"]["shape"][::-1]
        header["head.weight"]["dtype"] = "I32"
        return header

    rewrite_header(weights_file(tmp_path), change)
    with pytest.raises(ValueError, match="nothing was read") as error:
        load(tmp_path)
    for part in (
        "missing: norm.weight",
        "unexpected: strange",
        "different: embedding.weight",
        "[8, 11]",
        "[11, 8]",
        "different: head.weight",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 30, 300, -1])
def test_truncated_weights_are_refused(tmp_path, keep):
    save(make(), tmp_path)
    path = weights_file(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path)


def test_trailing_bytes_are_refused(tmp_path):
    save(make(), tmp_path)
    path = weights_file(tmp_path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path)


def test_duplicate_names_are_refused(tmp_path):
    save(make(), tmp_path)

    def twice(header):
        first, *_ = header
        text = json.dumps(header)
        return (text[:-1] + f', "{first}": {json.dumps(header[first])}}}').encode()

    rewrite_header(weights_file(tmp_path), twice)
    with pytest.raises(ValueError, match="has a duplicate name"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version=2"),
        ({"model": "Nonsense"}, "Nonsense"),
        ({"format": "other"}, "format='other'"),
        ({"weights": "../model-0123456789abcdef.safetensors"}, "save does not write"),
        ({"weights": "/etc/passwd"}, "save does not write"),
        ({"weights": None}, "save does not write"),
        ({"config": {"vocab_size": 11, "d_modle": 3}}, "did you mean 'd_model'"),
    ],
)
def test_bad_config_is_refused(tmp_path, change, message):
    save(make(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        load(tmp_path)


def test_missing_pieces(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(tmp_path)
    save(make(), tmp_path)
    weights_file(tmp_path).unlink()
    with pytest.raises(FileNotFoundError, match="do not exist"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not a config"):
        load(tmp_path)


def test_a_model_its_config_does_not_build_is_not_saved(tmp_path):
    model = eqx.tree_at(lambda m: m.norm.weight, make(), jnp.ones(9))
    with pytest.raises(ValueError, match=r"norm\.weight differ"):
        save(model, tmp_path)
    with pytest.raises(ValueError, match="not one of the models"):
        save(make().norm, tmp_path)


def test_pytree_round_trip_with_optimiser_state(tmp_path):
    import optax

    model = make()
    state = optax.adamw(1e-3).init(eqx.filter(model, eqx.is_inexact_array))
    state = jax.tree.map(lambda x: x + 3 if eqx.is_array(x) else x, state)
    save_pytree((model, state), tmp_path / "state.safetensors")
    like = eqx.filter_eval_shape(lambda: (model, state))
    assert eqx.tree_equal(load_pytree(tmp_path / "state.safetensors", like), (model, state))


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(ValueError, match="PRNG key"):
        save_pytree({"key": jax.random.key(0)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="a has dtype complex64"):
        save_pytree({"a": np.zeros(2, np.complex64)}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


CRASH = """
    import os, pathlib, signal, sys
    import jax
    from eqx_transformer.interop import save
    from eqx_transformer.models import Llama, LlamaConfig

    directory, step = sys.argv[1], int(sys.argv[2])
    count = 0

    def crash(event, args):
        # Every change to the file system is a moment to die at.
        global count
        if event in ("os.rename", "os.remove", "os.mkdir") or (
            event == "open" and isinstance(args[0], (str, bytes, os.PathLike))
            and str(directory) in os.fspath(args[0])
        ):
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    config = LlamaConfig(
        vocab_size=11, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=16, max_len=32
    )
    model = Llama(config, key=jax.random.key(1))
    sys.addaudithook(crash)
    save(model, directory)
"""


@pytest.mark.slow
def test_a_crash_at_any_step_leaves_a_whole_checkpoint(tmp_path):
    script = tmp_path / "crash.py"
    script.write_text(textwrap.dedent(CRASH))
    old, new = make(0), make(1)
    outcomes = []
    for step in range(1, 40):
        directory = tmp_path / f"checkpoint{step}"
        save(old, directory)
        done = subprocess.run(
            [sys.executable, script, directory, str(step)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            check=False,
        )
        loaded = load(directory)
        is_old, is_new = eqx.tree_equal(loaded, old), eqx.tree_equal(loaded, new)
        assert is_old or is_new
        outcomes.append(bool(is_new))
        save(new, directory)  # what a crash leaves behind does not stand in the way
        assert eqx.tree_equal(load(directory), new)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    # It died before the switch and after it, and finished in the end.
    assert outcomes[0] is False and outcomes[-1] is True and sum(outcomes) >= 2
    assert outcomes == sorted(outcomes)
