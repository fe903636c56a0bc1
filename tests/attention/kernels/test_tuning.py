"""Which tiles the kernels take."""

import json

import jax
import jax.numpy as jnp
import pytest

import eqx_transformer.attention as attn
from eqx_transformer.attention._inputs import make_inputs
from eqx_transformer.attention._kernels import _tuning
from eqx_transformer.attention._kernels._tuning import HopperTiles, Measured, Tiles, Tuning

KERNELS = ("forward", "tangent", "transpose_q", "transpose_kv", "decode")


def inputs(seq=4096, dim=128, dtype=jnp.bfloat16, **options):
    x = jax.ShapeDtypeStruct((seq, 2, dim), dtype)
    made = []

    def trace(x):
        made.append(make_inputs(x, x, x, **options))
        return x

    jax.eval_shape(trace, x)
    return made[0]


ROW = Measured(
    "GPU of a test", "forward", "bfloat16", 128, 4096, "masked", "none", Tiles(64, 128, 8, 4)
)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a GPU of which something was measured."""
    device = type("Device", (), {"device_kind": ROW.device})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(_tuning, "MEASURED", (ROW, ROW._replace(seq=512, tiles=Tiles(32, 32))))
    yield
    _tuning._of_user.cache_clear()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dim", [8, 64, 80, 128, 256])
def test_default_tiles_are_powers_of_two_and_not_longer_than_the_sequence(dim, dtype):
    for mask in (None, attn.Causal(), attn.Segments(jnp.arange(40))):
        for mod in (False, True):
            given = inputs(40, dim, dtype, mask=mask)
            for kernel in KERNELS:
                tiles = Tuning()(kernel, given, mod)
                assert {tiles.block_q, tiles.block_kv} <= {16, 32, 64}


def test_measured_tiles_of_the_nearest_length(gpu):
    causal = {"mask": attn.Causal()}
    assert Tuning()("forward", inputs(3000, **causal), False) == ROW.tiles
    assert Tuning()("forward", inputs(1000, **causal), False) == Tiles(32, 32)
    # What differs in anything else was not measured.
    for kernel, given, lookup in (
        ("tangent", inputs(**causal), False),
        ("forward", inputs(**causal), True),
        ("forward", inputs(), False),
        ("forward", inputs(mask=attn.SlidingWindow(100, 0)), False),
        ("forward", inputs(mask=attn.Segments(jnp.zeros(4096, jnp.int32))), False),
        ("forward", inputs(score_mod=attn.SoftCap(3.0), **causal), False),
        ("forward", inputs(dim=64, **causal), False),
        ("forward", inputs(dtype=jnp.float16, **causal), False),
    ):
        default = _tuning.default_tiles(kernel, given, _tuning.mod_kind(given, lookup))
        assert Tuning()(kernel, given, lookup) == default


def test_the_user_is_asked_first(gpu, tmp_path, monkeypatch):
    file = tmp_path / "tiles.json"
    mine = ROW._replace(tiles=Tiles(16, 64, 2, 1, 256))
    file.write_text(json.dumps([mine._asdict()]))
    monkeypatch.setenv("EQX_TRANSFORMER_TILES", str(file))
    given = inputs(mask=attn.Causal())
    assert Tuning()("forward", given, False) == mine.tiles
    # An argument of the call comes before either, and is brought to what a tile can be.
    sizes = [(33, 64), (4000, 128), (5, 16)]
    for size, tile in sizes:
        given = inputs(mask=attn.Causal(), block_size=size)
        tiles = Tuning()("forward", given, False)
        assert tiles == mine.tiles._replace(block_q=tile, block_kv=tile)


def test_kernels_for_hopper_gpus_are_used_where_they_were_faster(gpu, tmp_path, monkeypatch):
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps([ROW._replace(tiles=HopperTiles(128, 3))._asdict()]))
    monkeypatch.setenv("EQX_TRANSFORMER_TILES", str(file))
    monkeypatch.setattr(_tuning, "HOPPER", True)

    def chosen(kernel, given, takes=True):
        return Tuning().hopper(kernel, given, lambda: takes, asked=False)

    given = inputs(mask=attn.Causal())
    assert chosen("forward", given) == HopperTiles(128, 3)
    # Not where they were not measured, cannot be used, or tiles of a size are asked for.
    assert chosen("tangent", given) is None
    assert chosen("forward", inputs(mask=attn.Causal(), seq=100, dtype=jnp.float16)) is None
    assert chosen("forward", given, takes=False) is None
    assert chosen("forward", inputs(mask=attn.Causal(), block_size=64)) is None
    default = _tuning.default_tiles("forward", given, "none")
    assert Tuning()("forward", given, False) == default
    monkeypatch.setattr(_tuning, "HOPPER", False)
    assert chosen("forward", given) is None
