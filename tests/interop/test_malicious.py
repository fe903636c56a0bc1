"""Folders made to harm whoever loads them are refused before any data is read."""

import json
import os
import struct

import equinox as eqx
import jax
import pytest

from eqx_transformer.interop import _safetensors, load_pretrained, save_pretrained
from eqx_transformer.models import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=7, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=6, max_len=16
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    save_pretrained(Llama(CONFIG, key=jax.random.key(0)), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(published, tmp_path):
    """A folder that loads, to be spoiled."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in published.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def unread(monkeypatch):
    """Nothing may be read."""

    def read(self, name, memory=None):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(_safetensors.SafetensorsFile, "read", read)


def split(data):
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def with_header(change):
    """Changes the parsed header; what `change` returns takes its place."""

    def spoil(data):
        header, body = split(data)
        return join(change(header) or header, body)

    return spoil


def entry(change, name="model.norm.weight"):
    return with_header(lambda header: header[name].update(change))


def offsets(name, change):
    def move(header):
        header[name]["data_offsets"] = change(*header[name]["data_offsets"])

    return with_header(move)


def duplicated(data):
    header, body = split(data)
    text = json.dumps(header)
    name = next(k for k in header if k != "__metadata__")
    return join((text[:-1] + f', "{name}": {json.dumps(header[name])}}}').encode(), body)


def swap_ranges(header):
    """Two tensors of different sizes change places without changing their sizes."""
    a, b = header["model.norm.weight"], header["lm_head.weight"]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]


def overlapping(header):
    header["model.layers.0.input_layernorm.weight"]["data_offsets"] = header["model.norm.weight"][
        "data_offsets"
    ]


FILES = {
    "empty": (lambda data: b"", "damaged"),
    "no header": (lambda data: data[:6], "damaged"),
    "cut in the header": (lambda data: data[:40], "damaged"),
    "cut in the data": (lambda data: data[:-1], "damaged"),
    "more behind": (lambda data: data + b"\0", "damaged"),
    "header of 2**63 bytes": (lambda data: struct.pack("<Q", 2**63) + data[8:], "damaged"),
    "header larger than the file": (lambda data: struct.pack("<Q", 10**6) + data[8:], "damaged"),
    "header is no JSON": (lambda data: join(b"{'a': 1}", b""), "damaged"),
    "header is no text": (lambda data: join(b"\xff\xfe\xfd", b""), "damaged"),
    "header is a list": (lambda data: join(b"[]", b""), "damaged"),
    "header is deep": (lambda data: join(b'{"a":' * 100_000, b""), "too deeply"),
    "pickle": (lambda data: b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00.", "damaged"),
    "name twice": (duplicated, "has a duplicate name"),
    "entry is a list": (with_header(lambda h: h | {"model.norm.weight": []}), "damaged"),
    "entry without a shape": (
        with_header(lambda h: h["lm_head.weight"].pop("shape") and None),
        "fields",
    ),
    "entry with more": (entry({"url": "x"}), "fields"),
    "unknown dtype": (entry({"dtype": "OBJECT"}), "dtype"),
    "dtype is a list": (entry({"dtype": ["F32"]}), "damaged"),
    "negative shape": (entry({"shape": [-8]}), "-8"),
    "shape of a fraction": (entry({"shape": [8.0]}), r"8\.0"),
    "shape of a truth": (entry({"shape": [True, 8]}), "True"),
    "shape of text": (entry({"shape": ["8"]}), "'8'"),
    "shape that overflows": (entry({"shape": [2**62, 2**62, 4]}), "bytes"),
    "shape with many axes": (entry({"shape": [8] + [1] * 60}), "61 axes"),
    "shape that is infinite": (entry({"shape": [float("inf")]}), "inf"),
    "offsets of fractions": (entry({"data_offsets": [0.0, 32.0]}), "number"),
    "offsets backwards": (offsets("model.norm.weight", lambda a, b: [b, a]), "bytes"),
    "offsets past the end": (offsets("model.norm.weight", lambda a, b: [a + 2**40] * 2), "bytes"),
    "three offsets": (offsets("model.norm.weight", lambda a, b: [a, b, b]), "damaged"),
    "overlap": (with_header(overlapping), "begins at byte"),
    "ranges swapped": (with_header(swap_ranges), "has .* bytes"),
    "gap": (with_header(lambda h: h.pop("model.norm.weight") and None), "begins at byte|describes"),
    "integers for weights": (entry({"dtype": "I32"}), "not one of"),
    "float8": (entry({"dtype": "F8_E4M3", "shape": [32]}), "different"),
}


@pytest.mark.parametrize("name", FILES)
def test_weights(name, folder, unread):
    spoil, message = FILES[name]
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def fields(**changes):
    return lambda text: json.dumps(json.loads(text) | changes).encode()


CONFIGS = {
    "empty": (lambda text: b"", "cannot be read"),
    "no JSON": (lambda text: b"import os", "cannot be read"),
    "a list": (lambda text: b"[]", "list, not an object"),
    "deep": (lambda text: b"[" * 100_000, "too deeply"),
    "name twice": (lambda text: text.replace(b"{", b'{"hidden_size": 4,', 1), "duplicate"),
    "unknown kind": (fields(model_type="evil"), "model_type='evil'; the families"),
    "kind is a list": (fields(model_type=["llama"]), "model_type="),
    "another family's": (fields(model_type="gpt2"), "no field"),
    "unknown field": (fields(new_attention=3), "new_attention=3"),
    "quantised": (fields(quantization_config={"bits": 4}), "quantization_config"),
    "unknown activation": (fields(hidden_act="__import__('os')"), "hidden_act="),
    "activation is a list": (fields(hidden_act=["silu"]), "hidden_act="),
    "unknown rope": (fields(rope_scaling={"rope_type": "evil", "factor": 2.0}), "rope_type"),
    "unknown field in rope": (
        fields(rope_scaling={"rope_type": "linear", "factor": 2.0, "beta": 3}),
        "beta=3",
    ),
    "rope is text": (fields(rope_scaling="linear"), "must be an object"),
    "10**9 layers": (fields(num_hidden_layers=10**9), "num_hidden_layers"),
    "10**15 words": (fields(vocab_size=10**15), "different: |cannot be turned"),
    "width of 2**62": (fields(hidden_size=2**62), "cannot be turned|different"),
    "no heads": (fields(num_attention_heads=0), "cannot be turned"),
    "negative width": (fields(hidden_size=-8), "cannot be turned"),
    "width is text": (fields(hidden_size="8"), "cannot be turned"),
    "width is null": (fields(hidden_size=None), "cannot be turned"),
    "infinite eps": (fields(rms_norm_eps=float("inf")), "cannot be turned|cannot be read"),
    "other widths": (fields(intermediate_size=5), r"gate_proj.weight is float32\[6, 8\]"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name, folder, unread):
    spoil, message = CONFIGS[name]
    path = folder / "config.json"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def divide(folder, weight_map=None):
    """The weights in two files with an index."""
    path = folder / "model.safetensors"
    header, body = split(path.read_bytes())
    header.pop("__metadata__", None)
    names = sorted(header)
    places = {}
    for i, members in enumerate((names[:4], names[4:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        part, data = {}, b""
        for name in members:
            start, end = header[name]["data_offsets"]
            place = [len(data), len(data) + end - start]
            part[name] = header[name] | {"data_offsets": place}
            data += body[start:end]
            places[name] = file
        (folder / file).write_bytes(join(part, data))
    path.unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places if weight_map is None else weight_map}))
    return places


def test_an_honest_index_is_followed(folder):
    whole = load_pretrained(folder)
    divide(folder)
    parts = load_pretrained(folder)
    assert eqx.tree_equal(whole, parts)


INDICES = {
    "upwards": ("../model.safetensors", "plain name"),
    "absolute": ("/etc/passwd", "plain name"),
    "in a folder": ("sub/model.safetensors", "plain name"),
    "backslash": ("..\\model.safetensors", "plain name"),
    "hidden": (".model.safetensors", "plain name"),
    "zero byte": ("model\0.safetensors", "plain name"),
    "line break": ("model.safetensors\n", "plain name"),
    "pickle": ("pytorch_model.bin", "plain name"),
    "a number": (3, "plain name"),
    "null": (None, "plain name"),
    "another file": ("model-00001-of-00002.safetensors", "has it in"),
}


@pytest.mark.parametrize("name", INDICES)
def test_index(name, folder, unread):
    place, message = INDICES[name]
    places = divide(folder)
    places[max(places)] = place
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_broken_index(text, folder, unread):
    divide(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_pretrained(folder)


def test_index_and_files_must_agree(folder, unread):
    places = divide(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: places[k] for k in sorted(places)[1:]}}))
    with pytest.raises(ValueError, match="has it in None"):
        load_pretrained(folder)
    index.write_text(json.dumps({"weight_map": places | {"more": max(places.values())}}))
    with pytest.raises(ValueError, match="more is not in"):
        load_pretrained(folder)
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match="is in"):
        load_pretrained(folder)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_out_of_the_folder(name, folder, tmp_path, unread):
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(ValueError, match="link out of its folder"):
        load_pretrained(folder)


def test_links_out_of_the_folder_from_an_index(folder, tmp_path, unread):
    divide(folder)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / shard.name)
    shard.symlink_to(tmp_path / shard.name)
    with pytest.raises(ValueError, match="link out of its folder"):
        load_pretrained(folder)


def test_links_that_are_fine(folder, tmp_path):
    # Within the folder, and to the folder.
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    load_pretrained(tmp_path / "link")


def cache_of_the_hub(folder, tmp_path, owner="models--a--b"):
    cache = tmp_path / "hub" / "models--a--b"
    snapshot, blobs = cache / "snapshots" / ("0" * 40), tmp_path / "hub" / owner / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(i), snapshot))
    return snapshot


def test_the_cache_of_the_hub(folder, tmp_path):
    load_pretrained(cache_of_the_hub(folder, tmp_path))


def test_the_cache_of_another_model(folder, tmp_path, unread):
    with pytest.raises(ValueError, match="link out of its folder"):
        load_pretrained(cache_of_the_hub(folder, tmp_path, "models--c--d"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipes_are_not_waited_for(name, folder, unread):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=r"regular file|not a file"):
        load_pretrained(folder)


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="other formats are not read"):
        load_pretrained(folder)


def test_everything_wrong_is_listed_at_once(folder, unread):
    path = folder / "model.safetensors"

    def change(header):
        header["strange"] = header.pop("model.norm.weight")
        header["lm_head.weight"]["shape"].reverse()

    path.write_bytes(with_header(change)(path.read_bytes()))
    with pytest.raises(ValueError, match="nothing was read") as error:
        load_pretrained(folder)
    for part in ("missing: model.norm.weight", "unexpected: strange", "[8, 7]", "[7, 8]"):
        assert part in str(error.value)
