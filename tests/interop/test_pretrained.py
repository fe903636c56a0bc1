"""Where weights go, in which dtype, and what is said when they cannot."""

import json
import subprocess
import sys
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from eqx_transformer.interop import _export, load_pretrained, load_tokenizer, save_pretrained
from eqx_transformer.interop._assembly import copy
from eqx_transformer.interop._names import tensors
from eqx_transformer.interop._pytree import named_arrays, skeleton
from eqx_transformer.models import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=16, d_model=8, num_layers=4, num_heads=2, num_kv_heads=1, d_ff=24, max_len=32
)


def make(**changes):
    return Llama(CONFIG.replace(**changes), key=jax.random.key(0))


@pytest.fixture
def folder(tmp_path):
    save_pretrained(make(), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    """Changes the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_keep_their_bits(dtype, tmp_path):
    model = make(param_dtype=dtype)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.config.param_dtype == dtype
    for name, x in named_arrays(loaded).items():
        assert x.dtype == jnp.dtype(dtype)
        assert np.asarray(x).tobytes() == np.asarray(named_arrays(model)[name]).tobytes()


def test_another_dtype(folder):
    loaded = load_pretrained(folder, dtype=jnp.bfloat16)
    assert loaded.config.param_dtype == "bfloat16"
    for name, x in named_arrays(loaded).items():
        assert x.dtype == jnp.bfloat16
        assert (x == named_arrays(make())[name].astype(jnp.bfloat16)).all()
    # Its arrays are what its config builds.
    built = skeleton(Llama, loaded.config)
    assert {k: x.dtype for k, x in named_arrays(built).items()} == {
        k: x.dtype for k, x in named_arrays(loaded).items()
    }


def test_each_array_may_have_a_dtype_of_its_own(folder):
    def narrow(tensors):
        for name, x in tensors.items():
            if "norm" not in name:
                tensors[name] = x.astype(jnp.bfloat16)

    rewrite(folder, narrow)
    loaded = load_pretrained(folder)
    assert loaded.config.param_dtype == "bfloat16"
    assert loaded.norm.weight.dtype == jnp.float32
    assert loaded.head.weight.dtype == jnp.bfloat16


def test_arrays_go_to_their_sharding(folder):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    seen = {}

    def place(path, leaf):
        spec = PartitionSpec()
        if path.endswith("up_proj.weight"):
            spec = PartitionSpec("a", None, "b")
        elif path.endswith("q_proj.weight"):
            spec = PartitionSpec(None, "b")
        elif path == "embedding.weight":
            spec = PartitionSpec(("a", "b"))
        seen[path] = (leaf.shape, NamedSharding(mesh, spec))
        return seen[path][1]

    loaded, whole = load_pretrained(folder, sharding=place), load_pretrained(folder)
    assert eqx.tree_equal(loaded, whole)
    for path, x in named_arrays(loaded).items():
        assert (x.shape, x.sharding) == seen[path]


def test_one_sharding_for_all(folder):
    device = jax.devices()[3]
    loaded = load_pretrained(folder, sharding=jax.sharding.SingleDeviceSharding(device))
    assert all(x.devices() == {device} for x in named_arrays(loaded).values())


def test_copies_of_tied_tensors_must_be_equal(tmp_path):
    model = make(tie_embeddings=True)
    save_pretrained(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"].copy()}))
    assert eqx.tree_equal(load_pretrained(tmp_path).embedding, model.embedding)
    rewrite(tmp_path, lambda x: x.update({"lm_head.weight": x["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight must be equal to model\.embed_tokens"):
        load_pretrained(tmp_path)


def test_a_large_model_is_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(_export, "_MAX_BYTES", 4_000)
    model = make()
    save_pretrained(model, tmp_path)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((tmp_path / name).stat().st_size < 6_000 for name in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert eqx.tree_equal(load_pretrained(tmp_path).stack, model.stack)
    # Saving again leaves nothing of it.
    monkeypatch.undo()
    save_pretrained(model, tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_what_has_no_name_in_transformers_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="llama, but for document_start_id"):
        save_pretrained(make(document_start_id=1), tmp_path)
    with pytest.raises(ValueError, match=r"mixtral: there are no experts\."):
        save_pretrained(make(), tmp_path, model_type="mixtral")
    with pytest.raises(ValueError, match="'lama' must be one of"):
        save_pretrained(make(), tmp_path, model_type="lama")
    with pytest.raises(ValueError, match=r"norm\.weight differ"):
        save_pretrained(eqx.tree_at(lambda m: m.norm.weight, make(), jnp.ones(9)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_training_options_do_not_stand_in_the_way(tmp_path):
    model = make(dropout_rate=0.1, remat="full", unroll=2)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.config.dropout_rate == 0
    assert eqx.tree_equal(loaded.head, model.head)


def test_a_family_can_be_chosen(tmp_path):
    save_pretrained(make(), tmp_path, model_type="phi3")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("phi3", ["Phi3ForCausalLM"])
    names = load_file(tmp_path / "model.safetensors")
    assert names["model.layers.0.self_attn.qkv_proj.weight"].shape == (16, 8)
    assert eqx.tree_equal(load_pretrained(tmp_path).stack, make().stack)


def fake_hub(monkeypatch, folder):
    calls = []

    def snapshot_download(repo, *, revision, allow_patterns):
        calls.append((repo, revision, allow_patterns))
        return str(folder)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_only_what_is_needed_is_downloaded(folder, monkeypatch):
    calls = fake_hub(monkeypatch, folder)
    load_pretrained("some/model@v1")
    names = ["config.json", "model.safetensors", "model.safetensors.index.json"]
    assert calls == [("some/model", "v1", names)]


def test_shards_come_from_the_same_commit(folder, monkeypatch):
    monkeypatch.setattr(_export, "_MAX_BYTES", 4_000)
    save_pretrained(make(), folder)
    calls = fake_hub(monkeypatch, folder)
    load_pretrained("some/model")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert calls[1:] == [("some/model", folder.name, shards)]


def test_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"eqx_transformer\[hub\]"):
        load_pretrained("some/model")
    for path in (tmp_path / "nothing", str(tmp_path / "nothing"), "../x", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            load_pretrained(path)


def test_torch_is_not_needed(folder):
    code = (
        "import sys; from eqx_transformer.interop import load_pretrained; "
        f"load_pretrained({str(folder)!r}); "
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hub")
    words = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("b").ids == [1]


def test_tokenizer_needs_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"eqx_transformer\[hub\]"):
        load_tokenizer(tmp_path)


def test_a_table_without_a_name_says_which():
    model = skeleton(Llama, CONFIG)
    with pytest.raises(ValueError, match=r"no name for .*head\.weight, norm\.weight"):
        tensors({"embed": "embedding"}, model, most=10)
    with pytest.raises(ValueError, match="more than 3 tensors"):
        tensors({"l.{layer}.q": "stack.{layer}.attention.q_proj"}, model, most=3)


@pytest.mark.parametrize("shape", [(3, 130), (130, 3), (64, 64), (2, 70, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_transposed_copies(shape, dtype):
    source = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    target = np.zeros((*shape[:-2], shape[-1], shape[-2]), np.float32)
    copy(target, source.swapaxes(-1, -2))
    assert (target == source.swapaxes(-1, -2).astype(np.float32)).all()
