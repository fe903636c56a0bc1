"""Attention on a ring of eight devices against the same attention on one."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from eqx_transformer.attention import (
    AbstractMask,
    ALiBi,
    Causal,
    Padding,
    RelativeBias,
    Segments,
    SlidingWindow,
    dot_product_attention,
)
from eqx_transformer.attention._ring import ring_attention, zigzag_order

DEVICES, SEQ, HEADS, KV_HEADS, HEAD_DIM = 8, 64, 4, 2, 8
IDS = np.repeat([0, 1, 2, -1], [20, 5, 33, 6])
VALID = (np.arange(SEQ) >= 18) & (np.arange(SEQ) != 40)


def mesh_of(devices=DEVICES):
    return jax.make_mesh((devices,), ("seq",), axis_types=(AxisType.Auto,))


def ring(args, options, *, layout="contiguous", check_vma=True, devices=DEVICES):
    """`ring_attention` of whole arrays; options are the same on all devices."""
    dynamic, static = eqx.partition(options, eqx.is_array)

    def local(args, dynamic):
        options = eqx.combine(dynamic, static)
        return ring_attention(*args, axis_name="seq", layout=layout, **options)

    split = jax.shard_map(
        local,
        mesh=mesh_of(devices),
        in_specs=(P("seq"), P()),
        out_specs=P("seq"),
        check_vma=check_vma,
    )
    if layout == "contiguous":
        return split(args, dynamic)
    order, inverse = zigzag_order(args[0].shape[0], devices)
    return split(tuple(x[order] for x in args), dynamic)[inverse]


def whole(args, options):
    return dot_product_attention(*args, implementation="reference", **options)


def qkv(seed, seq=SEQ, kv_seq=None, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(seed), 3)
    kv_seq = seq if kv_seq is None else kv_seq
    shapes = (seq, HEADS, HEAD_DIM), (kv_seq, KV_HEADS, HEAD_DIM), (kv_seq, KV_HEADS, HEAD_DIM)
    return tuple(jax.random.normal(x, s, dtype) for x, s in zip(keys, shapes, strict=True))


def close(x, y):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert a.dtype == b.dtype == jnp.float64
        np.testing.assert_allclose(a, b, atol=1e-12 * max(1, np.abs(b).max()), rtol=0)


CASES = {
    "causal": lambda: {"mask": Causal()},
    "window": lambda: {"mask": SlidingWindow(11, 3)},
    "segments": lambda: {"mask": Causal() & Segments(jnp.asarray(IDS))},
    "padding": lambda: {"mask": Causal() & Padding(jnp.asarray(VALID))},
    "ALiBi": lambda: {"score_mod": ALiBi(HEADS)},
    "learned bias, sinks, scale": lambda: {
        "mask": Causal(),
        "score_mod": eqx.tree_at(
            lambda x: x.table,
            RelativeBias(HEADS, bidirectional=False, key=jax.random.key(0)),
            jax.random.normal(jax.random.key(1), (32, HEADS), jnp.float64),
        ),
        "sinks": jnp.linspace(-1.0, 2.0, HEADS),
        "scale": 0.5,
    },
}


def derivatives(function, args, options, dots, cotangent):
    """Value, tangent and gradient for everything that has one."""
    moving, fixed = eqx.partition((args, options), eqx.is_inexact_array)

    def of_moving(moving):
        return function(*eqx.combine(moving, fixed))

    dots = (dots, jax.tree.map(jnp.ones_like, moving[1]))
    out, dout = jax.jvp(of_moving, (moving,), (dots,))
    return out, dout, jax.vjp(of_moving, moving)[1](cotangent)[0]


def check(name, **how):
    args, dots, options = qkv(2), qkv(3), CASES[name]()
    cotangent = jax.random.normal(jax.random.key(4), args[0].shape, jnp.float64)

    def run(function):
        return eqx.filter_jit(derivatives)(function, args, options, dots, cotangent)

    close(run(lambda *x: ring(*x, **how)), run(whole))


@pytest.mark.parametrize("name", CASES)
def test_equals_attention_on_one_device(name, x64):
    check(name)


@pytest.mark.parametrize("name", ["causal", "segments"])
def test_zigzag(name, x64):
    check(name, layout="zigzag")


def test_without_checks_of_varying_axes(x64):
    check("learned bias, sinks, scale", check_vma=False)


def test_one_device_is_a_ring_too(x64):
    check("segments", devices=1)


def test_shards_of_several_tiles(x64):
    args, options = qkv(5, seq=2 * 300), {"mask": SlidingWindow(200, 0)}
    cotangent = jax.random.normal(jax.random.key(6), args[0].shape, jnp.float64)

    def run(function):
        return eqx.filter_jit(derivatives)(function, args, options, qkv(7, 600), cotangent)

    close(run(lambda *x: ring(*x, layout="zigzag", devices=2)), run(whole))


def test_cross_attention_and_given_positions(x64):
    args = qkv(8, seq=16, kv_seq=32)
    close(jax.jit(lambda: ring(args, {}))(), whole(args, {}))
    q_positions, kv_positions = 3 * jnp.arange(16), 40 - jnp.arange(32)

    def local(args, q_positions, kv_positions):
        return ring_attention(
            *args,
            axis_name="seq",
            mask=Causal(),
            q_positions=q_positions,
            kv_positions=kv_positions,
        )

    specs = {"mesh": mesh_of(), "in_specs": P("seq"), "out_specs": P("seq")}
    got = jax.jit(jax.shard_map(local, **specs))(args, q_positions, kv_positions)
    positions = {"q_positions": q_positions, "kv_positions": kv_positions}
    close(got, whole(args, {"mask": Causal()} | positions))


def test_batches_inside_and_outside_and_second_derivatives(x64):
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
    args, dots = (jax.tree.map(lambda *x: jnp.stack(x), qkv(i), qkv(i + 1)) for i in (9, 11))
    ids = jnp.stack([jnp.asarray(IDS), jnp.asarray(IDS[::-1].copy())])

    def one(q, k, v, ids):
        mask = Causal() & Segments(ids)
        return ring_attention(q, k, v, axis_name="seq", mask=mask)

    def inside(q, k, v):
        split = jax.shard_map(
            jax.vmap(one),
            mesh=mesh,
            in_specs=(P("data", "seq"),) * 3 + (P("data"),),
            out_specs=P("data", "seq"),
        )
        return split(q, k, v, ids)

    def outside(q, k, v):
        return jax.vmap(lambda *x: ring(x[:3], {"mask": Causal() & Segments(x[3])}))(q, k, v, ids)

    def single(q, k, v):
        return jax.vmap(lambda *x: whole(x[:3], {"mask": Causal() & Segments(x[3])}))(q, k, v, ids)

    def second(function):
        def loss(*args):
            return jnp.sum(jnp.sin(function(*args)))

        return jax.jit(lambda: jax.jvp(jax.grad(loss, (0, 1, 2)), args, dots))()

    wanted = second(single)
    close(second(inside), wanted)
    close(second(outside), wanted)


def test_nan_in_padding_reaches_nothing(x64):
    options = CASES["padding"]()
    args = qkv(13)
    unused = jnp.asarray(np.arange(SEQ) < 18)[:, None, None]
    poisoned = [jnp.where(unused, jnp.nan, args[0])]
    poisoned += [jnp.where(jnp.asarray(VALID)[:, None, None], x, jnp.nan) for x in args[1:]]

    def run(function, args):
        return eqx.filter_jit(derivatives)(
            function, tuple(args), options, qkv(14), jnp.ones(args[0].shape)
        )

    close(run(ring, poisoned), run(whole, args))


def test_narrow_inputs():
    args = qkv(15, dtype=jnp.bfloat16)
    out = jax.jit(lambda: ring(args, {"mask": Causal()}))()
    assert out.dtype == jnp.bfloat16
    wide = whole(tuple(x.astype(jnp.float32) for x in args), {"mask": Causal()})
    np.testing.assert_allclose(out.astype(jnp.float32), wide, atol=2e-2)


def test_neighbours_are_all_a_device_talks_to():
    args = qkv(16, dtype=jnp.float32)

    def forward(*args):
        return ring(args, {"mask": Causal()})

    # Keys, values and positions, in every step of the loop.
    text = jax.jit(forward).lower(*args).as_text()
    assert len(re.findall(r"stablehlo\.collective_permute", text)) == 3

    def gradient(*args):
        return jax.grad(lambda *x: jnp.sum(forward(*x)), (0, 1, 2))(*args)

    for function in (forward, gradient):
        text = jax.jit(function).lower(*args).compile().as_text()
        assert "collective-permute" in text
        for other in ("all-gather", "all-to-all", "all-reduce", "reduce-scatter"):
            assert other not in text, other


VISITED: set[tuple[int, int]] = set()


class _Watched(AbstractMask):
    """Causal, and notes which shards it is asked about."""

    def __call__(self, q_pos, kv_pos):
        def note(q, kv):
            VISITED.add((int(q) // 8, int(kv) // 8))

        jax.debug.callback(note, q_pos.min(), kv_pos.min())
        return kv_pos <= q_pos

    def block(self, q_lo, q_hi, kv_lo, kv_hi):
        return Causal().block(q_lo, q_hi, kv_lo, kv_hi)


def test_shards_the_mask_excludes_are_not_computed():
    VISITED.clear()
    args = qkv(17, dtype=jnp.float32)
    out = jax.jit(lambda: ring(args, {"mask": _Watched()}))()
    jax.effects_barrier()
    assert {(i, j) for i in range(8) for j in range(i + 1)} == VISITED
    np.testing.assert_allclose(out, whole(args, {"mask": Causal()}), atol=2e-6)


def test_memory_does_not_grow_with_the_number_of_devices():
    def temporary(devices):
        args = qkv(18, seq=256 * devices, dtype=jnp.float32)

        def loss(*args):
            return jnp.sum(ring(args, {"mask": Causal()}, devices=devices) ** 2)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8) < 1.2 * temporary(2)


def test_zigzag_order():
    order, inverse = zigzag_order(16, 2)
    assert order.tolist() == [0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7, 8, 9, 10, 11]
    np.testing.assert_array_equal(order[inverse], np.arange(16))
    # A causal query at position i has i + 1 keys: every device has the same number of pairs.
    order, _ = zigzag_order(96, 8)
    assert len(set(order.reshape(8, -1).sum(axis=1).tolist())) == 1


def test_misuse_is_an_error():
    args = qkv(19, dtype=jnp.float32)
    with pytest.raises(ValueError, match="no mesh axis 'seq' here"):
        ring_attention(*args, axis_name="seq")
    with pytest.raises(ValueError, match="seq=100 is not a multiple of 16"):
        zigzag_order(100, 8)
    with pytest.raises(ValueError, match="q_seq=3 is odd on each of 8 devices"):
        mesh, spec = mesh_of(), P("seq")
        local = eqx.Partial(ring_attention, axis_name="seq", layout="zigzag")
        short = qkv(19, seq=24, dtype=jnp.float32)
        jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)(*short)
    with pytest.raises(ValueError, match="covers 8 q positions but q_seq=64"):
        ring(args, {"mask": Segments(jnp.zeros(8, jnp.int32))})
    # A `TypeError` where annotations are checked, which is before the function looks.
    with pytest.raises((ValueError, TypeError), match="striped"):
        mesh, spec = mesh_of(), P("seq")
        local = eqx.Partial(ring_attention, axis_name="seq", layout="striped")
        jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)(*args)
